// Products of bfloat16 pairs (AVX512_BF16). Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_avx512-inl.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

inline __m512i RoundPairs(__m512 first, __m512 second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

struct StoreBf16Sink {
  uint16_t* out;
  inline void Put(size_t i, __m512 a, __m512 b) const { _mm512_storeu_si512(out + i, RoundPairs(a, b)); }
  inline void PutTail(size_t i, __m512 a, __m512 b, size_t count) const {
    _mm512_mask_storeu_epi16(out + i, (1u << count) - 1, RoundPairs(a, b));
  }
};

void UnpackBf16(const RowBlock& block, uint16_t* out, size_t out_stride) {
  if (block.type == DType::kBF16) {
    for (size_t r = 0; r < block.n_rows; ++r) {
      Prefetch(block.rows + (r + 2) * block.row_bytes, block.row_bytes);
      __builtin_memcpy(out + r * out_stride, block.rows + r * block.row_bytes, block.n * 2);
    }
    return;
  }
  SwitchType(block.type, [&]<DType kType>() {
    for (size_t r = 0; r < block.n_rows; ++r) {
      Prefetch(block.rows + (r + 2) * block.row_bytes, block.row_bytes);
      Unpacker<kType>::Row(block.rows + r * block.row_bytes, block.n, StoreBf16Sink{out + r * out_stride});
    }
  });
}

// Two tokens' 32 values each, rounded, interleaved by the transposition of 32-bit pairs.
void PackBf16(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, uint16_t* out) {
  const size_t width = vectors * kTokenLanes * 2;
  for (size_t v = 0; v < vectors; ++v) {
    for (size_t i = 0; i < n; i += 32) {
      const size_t count = n - i < 32 ? n - i : 32;
      const uint32_t mask = count == 32 ? ~0u : (1u << count) - 1;
      alignas(64) uint32_t pairs[kTokenLanes][16];
      for (size_t t = 0; t < kTokenLanes; ++t) {
        const size_t token = v * kTokenLanes + t;
        const float* row = x + token * x_stride + i;
        const bool present = token < n_tokens;
        const __m512 a = _mm512_maskz_loadu_ps(present ? static_cast<__mmask16>(mask) : 0, row);
        const __m512 b = _mm512_maskz_loadu_ps(present ? static_cast<__mmask16>(mask >> 16) : 0, row + 16);
        _mm512_store_si512(pairs[t], RoundPairs(a, b));
      }
      uint16_t* to = out + i / 2 * width + v * kTokenLanes * 2;
      const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                                _mm512_set1_epi32(16));
      for (size_t j = 0; j < (count + 1) / 2; ++j) {
        _mm512_storeu_si512(to + j * width, _mm512_i32gather_epi32(column, &pairs[0][j], 4));
      }
    }
  }
}

struct Bf16Lanes {
  using Element = uint16_t;
  using Vec = __m512bh;
  static constexpr size_t kElements = 2;
  static Vec Load(const uint16_t* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static Vec Broadcast(const uint16_t* p) {
    const uint32_t pair = Load32(reinterpret_cast<const uint8_t*>(p));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
  }
  static __m512 AddProduct(Vec a, Vec b, __m512 c) { return _mm512_dpbf16_ps(c, a, b); }
};

}  // namespace

const LinearKernels& Avx512Bf16LinearKernels() {
  static const LinearKernels kernels = [] {
    LinearKernels k = Avx512LinearKernels();
    k.unpack_bf16 = UnpackBf16;
    k.pack_bf16 = PackBf16;
    k.tile_bf16 = Tile<Bf16Lanes>;
    k.shape_bf16 = k.shape_f32;
    return k;
  }();
  return kernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
