// Codes of 2 to 4 bits whose scale and minimum are shared by a group of neighbours: keys along the tokens (one channel
// of `group` tokens), values along the channels (`group` channels of one token). What KIVI stores (Liu et al., arXiv
// 2402.02750): value = code * scale + minimum, both in f16, round to nearest even, encoded against the parameters as
// they are stored.
//
// Rows lie in units: a unit of keys is a whole group of tokens, one of values a tile of 16 tokens. Units of one side
// follow one another; every kernel takes the first one and counts rows from it.
//
//   unit of keys     scales [head_dim], minima [head_dim], words [head_dim / n][group]
//   unit of values   scales [head_dim / group][16], minima [head_dim / group][16], words [16 / n][head_dim]
//
// A word of 32 bits holds n codes along the side that a product sums up (a key's channels, a value's tokens): 16 of 2 or 3
// bits, 8 of 4. They come in quads: one mask leaves four neighbours in the four bytes, which one instruction multiplies with
// four signed bytes and adds up. The first quad has the lowest bits of each byte, and so on. Of 3 bits the words hold the
// lower two, as they do of 2 bits, and behind all words lie the third ones, 16 bits a word: a nibble for each byte, its
// lowest bit for the first quad.
//
// Keys may also have 0 bits: each channel is its mean over the group, and a unit the means alone, f16 [head_dim].
//
// Products are summed up as whole numbers: the queries times the scales of a group of keys are rounded relative to the
// largest of the (query, group), weights times scales relative to the largest of a (query, channel group) and 128 tokens.
//   3 and 4 bits  to two bytes: an error of at most half of a 16,256th of the largest, times the code, in each part
//   2 bits        to one byte, as the codes err far more. Keys: at most half of a 127th of the largest, times the code's
//                 distance from 1.5. Values: at most a 254th, times the code; what a weight loses is added to the one 16
//                 tokens on, so that many small weights beside a large one keep their sum. With heads of up to 128 the
//                 squared error of a sum grows by less than a 500th of what the codes have lost, with a channel or a token
//                 that dwarfs the others by less than a 100th (by up to half if weights did not carry what they lose).
// The scalar kernels (ForceIsa) round nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/rows/rows.h"

namespace lesskv {

inline constexpr size_t kMostGroupedChannels = 512;
inline constexpr size_t kGroupedChannels = 16;  // head_dim is a multiple of so many

// How a group's scale and minimum are chosen as it is written.
//   kExtremes    of its extremes, which are then next to exact: rounding errors only, which know nothing of the numbers
//   kFitted      for about the least squared error (of normal numbers half of the above at 2 bits, four fifths at 3),
//                then widened: least squares alone shrink every sum of rows (sum (x^ - x) (x - mean) = -error)
enum class GroupFit : uint8_t { kExtremes, kFitted };

struct GroupFormat {
  RowSide side = RowSide::kKeys;
  size_t bits = 2;    // 2, 3 or 4; of keys also 0
  size_t group = 32;  // a multiple of 16, at most 256; a divisor of 256 keeps the pieces of attention whole
  size_t head_dim = 0;
  GroupFit fit = GroupFit::kExtremes;

  size_t unit_rows() const { return side == RowSide::kKeys ? group : kTileRows; }
};

// head_dim must be a multiple of kGroupedChannels, of values also of the group, and at most kMostGroupedChannels.
bool Supports(const GroupFormat& format);

// n * head_dim * (bits + 32 / group) / 8 for the n rows of a unit; without bits, of keys, 2 * head_dim.
size_t UnitBytes(const GroupFormat& format);

// Encodes a unit of keys [group, head_dim].
void WriteKeyUnit(const GroupFormat& format, std::byte* unit, const float* keys);

// Encodes a value as token `lane` of a unit; lane 0 clears the unit first.
void WriteValueRow(const GroupFormat& format, std::byte* unit, size_t lane, const float* value);

// Rows [first, first + n) decoded: keys to out[c * stride + i], values to out[i * stride + c].
void ExpandKeyUnits(const GroupFormat& format, const std::byte* units, size_t first, size_t n, float* out,
                    size_t stride);
void ExpandValueUnits(const GroupFormat& format, const std::byte* units, size_t first, size_t n, float* out,
                      size_t stride);

// Of the two below `next` names what the caller reads afterwards, units of either side, to be fetched meanwhile; or null.
//
// scores[m * stride + i] = q_m . key of row first + i; channel c of query m is q[c * stacked + m].
void ScoreKeyUnits(const GroupFormat& format, const std::byte* units, size_t first, size_t n, const float* q,
                   size_t stacked, float* scores, size_t stride, const std::byte* next = nullptr);

// out[m * out_stride + c] += sum over i of weights[m * stride + i] * channel c of row first + i; weights are at least 0.
void AddValueUnits(const GroupFormat& format, const std::byte* units, size_t first, size_t n, const float* weights,
                   size_t stride, size_t stacked, float* out, size_t out_stride,
                   const std::byte* next = nullptr);

}  // namespace lesskv
