// Products of bfloat16 pairs for the prefill. Compiled with flags of its own: see attention_isa.h.
#include "kernels/attention/attention_isa.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace lesskv::avx512bf16 {
namespace {

constexpr size_t kRows = 6;
constexpr size_t kVectors = 4;  // 24 of 32 registers sum up

template <int MB, int NV>
inline void Multiply(size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b, size_t b_stride, float* c,
                     size_t c_stride, bool add) {
  __m512 sum[MB][NV];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) sum[m][v] = add ? _mm512_loadu_ps(c + m * c_stride + v * 16) : _mm512_setzero_ps();
  }
  for (size_t i = 0; i < pairs; ++i) {
    __m512bh right[NV];
    for (int v = 0; v < NV; ++v) {
      right[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + i * b_stride + v * 16));
    }
    for (int m = 0; m < MB; ++m) {
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[m * a_stride + i])));
      for (int v = 0; v < NV; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], left, right[v]);
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(c + m * c_stride + v * 16, sum[m][v]);
  }
}

template <int NV>
inline void MultiplyPanel(size_t m, size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b,
                          size_t b_stride, float* c, size_t c_stride, bool add) {
  for (size_t i = 0; i < m; i += kRows) {
    const uint32_t* left = a + i * a_stride;
    float* to = c + i * c_stride;
    WithCount<kRows>(m - i, [&](auto count) {
      Multiply<count.value, NV>(pairs, left, a_stride, b, b_stride, to, c_stride, add);
    });
  }
}

}  // namespace

void MultiplyPairs(size_t m, size_t n, size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b,
                   size_t b_stride, float* c, size_t c_stride, bool add) {
  for (size_t j = 0; j < n; j += kVectors * 16) {
    WithCount<kVectors>((n - j + 15) / 16, [&](auto count) {
      MultiplyPanel<count.value>(m, pairs, a, a_stride, b + j, b_stride, c + j, c_stride, add);
    });
  }
}

void RoundPairs(const float* x, size_t n, uint32_t* out) {
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 in = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffffu);
    const __mmask8 pairs = static_cast<__mmask8>(n - i < 16 ? (1u << (n - i + 1) / 2) - 1 : 0xffu);
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(in, x + i));
    _mm256_mask_storeu_epi32(out + i / 2, pairs, reinterpret_cast<__m256i>(rounded));
  }
}

void JoinPairs(const float* even, const float* odd, size_t n, uint32_t* out) {
  for (size_t i = 0; i < n; i += 16) {
    const __m256bh low = _mm512_cvtneps_pbh(_mm512_loadu_ps(even + i));
    __m512i pair = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(low));
    if (odd) {
      const __m256bh high = _mm512_cvtneps_pbh(_mm512_loadu_ps(odd + i));
      pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(high)), 16));
    }
    _mm512_storeu_si512(out + i, pair);
  }
}

}  // namespace lesskv::avx512bf16

#else

// Never called: no view asks for bfloat16 where the instruction set is missing.
namespace lesskv::avx512bf16 {
void MultiplyPairs(size_t, size_t, size_t, const uint32_t*, size_t, const uint32_t*, size_t, float*, size_t, bool) {
  __builtin_trap();
}
void RoundPairs(const float*, size_t, uint32_t*) { __builtin_trap(); }
void JoinPairs(const float*, const float*, size_t, uint32_t*) { __builtin_trap(); }
}  // namespace lesskv::avx512bf16

#endif
