// The inner product of the AMX kernels. Included by translation units with flags of their own, inside their anonymous
// namespaces' reach: nothing here has external linkage (see attention_isa.h for why).
//
// A tile holds 16 rows of 64 bytes. TDPBF16PS adds to 16 x 16 float32 sums the product of a tile of the left side (16
// rows of 16 bfloat16 pairs) and one of the right side (16 pairs of 16 columns). Two tiles of each side give four
// products for four loads.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lesskv {
namespace {

constexpr size_t kTileSide = 16;   // rows of a tile, and columns of a right or sum tile
constexpr size_t kTilePairs = 16;  // pairs along a row of a left tile

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The calling thread's tiles, while it lives.
class TileScope {
 public:
  TileScope() {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~TileScope() { _tile_release(); }
};

// c (+)= a b for 16 or 32 rows and 16 or 32 columns: a [rows, pairs], b [pairs, columns] of bfloat16 pairs in 32 bits, c
// [rows, columns] float32; strides in elements of 4 bytes; pairs a multiple of 16. Inside a TileScope. Sums are tiles 0 to 3,
// the left side 4 and 5, the right side 6 and 7.
template <bool kTwoRows, bool kTwoColumns>
inline void MultiplyTiles(const uint32_t* a, size_t a_stride, size_t pairs, const uint32_t* b, size_t b_stride, float* c,
                          size_t c_stride, bool add) {
  const size_t a_bytes = a_stride * 4, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
  float* lower = c + kTileSide * c_stride;
  const uint32_t* lower_a = a + kTileSide * a_stride;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if (kTwoColumns) _tile_loadd(1, c + kTileSide, c_bytes);
    if (kTwoRows) _tile_loadd(2, lower, c_bytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, lower + kTileSide, c_bytes);
  } else {
    _tile_zero(0);
    if (kTwoColumns) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (size_t i = 0; i < pairs; i += kTilePairs) {
    _tile_loadd(4, a + i, a_bytes);
    _tile_loadd(6, b + i * b_stride, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) _tile_loadd(7, b + i * b_stride + kTileSide, b_bytes);
    if (kTwoColumns) _tile_dpbf16ps(1, 4, 7);
    if (kTwoRows) _tile_loadd(5, lower_a + i, a_bytes);
    if (kTwoRows) _tile_dpbf16ps(2, 5, 6);
    if (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if (kTwoColumns) _tile_stored(1, c + kTileSide, c_bytes);
  if (kTwoRows) _tile_stored(2, lower, c_bytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, lower + kTileSide, c_bytes);
}

}  // namespace
}  // namespace lesskv
