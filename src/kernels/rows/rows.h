// Rows: how the keys or the values of one KV head lie in memory, and the operations on them that need no attention.
//
// A *region* is memory for `capacity` rows, capacity a multiple of kTileRows. Its inner layout belongs to this file
// (keys lie in small transposed tiles so that a decode step needs no horizontal sums); callers only name slots. A
// region is plain memory that begins with its tiles, tile t (rows [t, t + 1) * kTileRows) at byte t *
// TileBytes(format), the same bytes on every instruction set: it can be copied, saved, cloned, grown and cut at tiles.
// Rows are `head_dim` floats outside, whatever the type inside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lesskv {

inline constexpr size_t kTileRows = 16;     // rows a tile; region capacities are multiples of it
inline constexpr size_t kRegionAlign = 64;  // alignment in bytes that every region must have

// kQ8 and kQ4 carry the content of llama.cpp's q8_0 and q4_0: blocks of 32 along the head dimension with one f16 scale.
enum class RowType : uint8_t { kF32, kF16, kBF16, kQ8, kQ4 };
enum class RowSide : uint8_t { kKeys, kValues };

std::string_view Name(RowType type);  // "f32", "f16", "bf16", "q8", "q4"

struct RowFormat {
  RowType type = RowType::kF16;
  RowSide side = RowSide::kKeys;
  size_t head_dim = 0;
};

// kQ8 and kQ4 need head_dim to be a multiple of 32; the others take any head_dim >= 1.
bool Supports(RowType type, size_t head_dim);

// Bytes of a region of `capacity` rows, a multiple of kRegionAlign; capacity must be a multiple of kTileRows.
size_t RegionBytes(const RowFormat& format, size_t capacity);

// Bytes of one tile. Regions may be longer than their tiles, for whole vectors to be read at the end.
size_t TileBytes(const RowFormat& format);

// Encodes rows x[i * x_stride .. + head_dim), i < n, into slots [first_slot, first_slot + n).
void WriteRows(const RowFormat& format, std::byte* region, size_t first_slot, size_t n, const float* x,
               size_t x_stride);

// Decodes slots [first_slot, first_slot + n) to out[i * out_stride .. + head_dim).
void ReadRows(const RowFormat& format, const std::byte* region, size_t first_slot, size_t n, float* out,
              size_t out_stride);

// Copies one row bit for bit between regions of the same format (or inside one), never through floats.
void CopyRow(const RowFormat& format, const std::byte* from, size_t from_slot, std::byte* to, size_t to_slot);

// Some channels of a key, `channels` [to_format.head_dim], as a key of the same type that has these alone: bit for bit
// where elements are stored one by one; kQ8 and kQ4, whose scales are those of other blocks then, are rounded anew.
void CopyChannels(const RowFormat& format, const std::byte* from, size_t from_slot, const uint16_t* channels,
                  const RowFormat& to_format, std::byte* to, size_t to_slot);

}  // namespace lesskv
