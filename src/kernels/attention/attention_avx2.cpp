// The attention kernels for AVX2, FMA and F16C. Compiled with flags of its own: see attention_isa.h.
#include "kernels/attention/attention_isa.h"

#ifdef __AVX2__
#include <immintrin.h>

#include "kernels/rows/rows_layout.h"

namespace lesskv::avx2 {
namespace {

using V = __m256;
constexpr size_t kW = 8;

inline V Zero() { return _mm256_setzero_ps(); }
inline V Splat(float x) { return _mm256_set1_ps(x); }
inline V Load(const float* p) { return _mm256_loadu_ps(p); }
inline void Store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V Fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V Mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V Add(V a, V b) { return _mm256_add_ps(a, b); }
inline V Sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V VMax(V a, V b) { return _mm256_max_ps(a, b); }
inline V VMin(V a, V b) { return _mm256_min_ps(a, b); }
inline V Round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V TimesPow2(V y, V n) {
  n = VMax(Splat(-127), n);  // the bits of 2^-127 are 0
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return Mul(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline float ReduceMax(V x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline float ReduceAdd(V x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float HalfToFloat(uint16_t half) { return _cvtsh_ss(half); }
inline V LoadF16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V LoadBF16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V Field(const uint8_t* p, int shift, int mask) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(mask)));
}

#include "kernels/attention/attention_prefill.h"

bool FusedScores(const AttentionView&, const DecodeScratch&, const RowSpan&, size_t, size_t, size_t) { return false; }
bool FusedValues(const AttentionView&, const DecodeScratch&, RowType, size_t, size_t, size_t) { return false; }

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode,        MergeSplits,
                                            Prefill,       ColumnSums};

}  // namespace lesskv::avx2

#endif
