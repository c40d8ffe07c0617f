// Products of bfloat16 pairs for the prefill in the matrix unit (AMX). Compiled with flags of its own: see
// attention_isa.h.
#include "kernels/attention/attention_isa.h"

#ifdef __AMX_BF16__
#include "kernels/basic/amx_tiles.h"

namespace lesskv::amx {
namespace {

template <bool kTwoRows>
void MultiplyRows(size_t n, size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b, size_t b_stride,
                  float* c, size_t c_stride, bool add) {
  size_t j = 0;
  for (; j + kTileSide < n; j += 2 * kTileSide)
    MultiplyTiles<kTwoRows, true>(a, a_stride, pairs, b + j, b_stride, c + j, c_stride, add);
  if (j < n) MultiplyTiles<kTwoRows, false>(a, a_stride, pairs, b + j, b_stride, c + j, c_stride, add);
}

}  // namespace

void MultiplyPairs(size_t m, size_t n, size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b,
                   size_t b_stride, float* c, size_t c_stride, bool add) {
  const TileScope tiles;
  for (size_t i = 0; i < m; i += 2 * kTileSide) {
    if (m - i > kTileSide) {
      MultiplyRows<true>(n, pairs, a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, add);
    } else {
      MultiplyRows<false>(n, pairs, a + i * a_stride, a_stride, b, b_stride, c + i * c_stride, c_stride, add);
    }
  }
}

}  // namespace lesskv::amx

#else

namespace lesskv::amx {
void MultiplyPairs(size_t, size_t, size_t, const uint32_t*, size_t, const uint32_t*, size_t, float*, size_t, bool) {
  __builtin_trap();
}
}  // namespace lesskv::amx

#endif
