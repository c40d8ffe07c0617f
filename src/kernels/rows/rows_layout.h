// Where the parts of a row lie inside a region. Shared by rows.cpp and the attention kernels; everything here has
// internal linkage because it is compiled with several instruction sets.
//
// Keys, one tile of 16 slots:
//   f32, f16, bf16   [head_dim][16] elements: one vector holds one channel of 16 rows
//   q8               [head_dim / 32][16] f16 scales, then [head_dim / 4][16][4] codes + 128 (unsigned): the four
//                    channels that an 8-bit dot-product instruction adds up are adjacent
//   q4               [head_dim / 32][16] f16 scales, then a block of 32 channels as [4][16][4] bytes; byte (j, row, i)
//                    holds the codes + 8 of channels 4 j + i (low half) and 16 + 4 j + i (high half)
// Values:
//   f32, f16, bf16   [capacity][head_dim] elements, plus 64 bytes at the end when a row is not whole vectors, so that
//                    the last vector of the last row can be loaded
//   q8               a tile of 16 slots: [head_dim / 32][16] f16 scales, then a block of 32 channels as [4][32][4]
//                    codes + 128 (unsigned); code (j, i, row) is channel i of slot 4 j + row: the four slots that an
//                    8-bit dot-product instruction adds up are adjacent
//   q4               a tile of 16 slots: [head_dim / 32][16] f16 scales, then a block of 32 channels as [4][16][4]
//                    bytes; byte (j, i, row) holds the codes + 8 of channels i (low half) and 16 + i (high half) of slot
//                    4 j + row
#pragma once

#include "kernels/rows/rows.h"

namespace lesskv {
namespace {

constexpr size_t kQuantBlock = 32;  // channels that share a scale in q8 and q4

constexpr bool IsQuantised(RowType type) { return type == RowType::kQ8 || type == RowType::kQ4; }

// Bytes of one element of a type that is not quantised.
constexpr size_t ElementBytes(RowType type) { return type == RowType::kF32 ? 4 : 2; }

// Bytes of the scales at the start of a quantised tile.
constexpr size_t TileScaleBytes(size_t head_dim) { return head_dim / kQuantBlock * kTileRows * 2; }

// Bytes of one tile of 16 slots, keys or values.
constexpr size_t TileBytes(RowType type, size_t head_dim) {
  if (type == RowType::kQ8) return TileScaleBytes(head_dim) + kTileRows * head_dim;
  if (type == RowType::kQ4) return TileScaleBytes(head_dim) + kTileRows * head_dim / 2;
  return kTileRows * head_dim * ElementBytes(type);
}

// Places of codes inside a tile, after its scales.
[[maybe_unused]] constexpr size_t Q8KeyCode(size_t channel, size_t lane) {
  return (channel / 4 * kTileRows + lane) * 4 + channel % 4;
}
[[maybe_unused]] constexpr size_t Q4KeyByte(size_t channel, size_t lane) {  // channel % 32 >= 16: the high half
  return channel / kQuantBlock * 256 + (channel % 16 / 4 * kTileRows + lane) * 4 + channel % 4;
}
[[maybe_unused]] constexpr size_t Q8ValueCode(size_t channel, size_t lane) {
  return channel / kQuantBlock * 512 + (lane / 4 * kQuantBlock + channel % kQuantBlock) * 4 + lane % 4;
}
[[maybe_unused]] constexpr size_t Q4ValueByte(size_t channel, size_t lane) {  // channel % 32 >= 16: the high half
  return channel / kQuantBlock * 256 + (lane / 4 * 16 + channel % 16) * 4 + lane % 4;
}

}  // namespace
}  // namespace lesskv
