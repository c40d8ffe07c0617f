// The attention kernels for AVX-512 (F, BW, DQ, VL, VNNI). Compiled with flags of its own: see attention_isa.h.
#include "kernels/attention/attention_isa.h"

#ifdef __AVX512F__
#include <immintrin.h>

#include "kernels/rows/rows_layout.h"

namespace lesskv::avx512 {
namespace {

using V = __m512;
constexpr size_t kW = 16;

inline V Zero() { return _mm512_setzero_ps(); }
inline V Splat(float x) { return _mm512_set1_ps(x); }
inline V Load(const float* p) { return _mm512_loadu_ps(p); }
inline void Store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V Fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V Mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V Add(V a, V b) { return _mm512_add_ps(a, b); }
inline V Sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V VMax(V a, V b) { return _mm512_max_ps(a, b); }
inline V VMin(V a, V b) { return _mm512_min_ps(a, b); }
inline V Round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V TimesPow2(V y, V n) { return _mm512_scalef_ps(y, n); }
inline float ReduceMax(V x) { return _mm512_reduce_max_ps(x); }
inline float ReduceAdd(V x) { return _mm512_reduce_add_ps(x); }
inline float HalfToFloat(uint16_t half) { return _cvtsh_ss(half); }
inline V LoadF16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline V LoadBF16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V Field(const uint8_t* p, int shift, int mask) {
  const __m512i x = _mm512_loadu_si512(p);
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(x, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(mask)));
}

#include "kernels/attention/attention_vnni.h"

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode,        MergeSplits,
                                            Prefill,       ColumnSums};

}  // namespace lesskv::avx512

#endif
