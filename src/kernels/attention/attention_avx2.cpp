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

using Ints = uint32_t __attribute__((vector_size(32)));

inline Ints LoadInts(const void* p) {
  return reinterpret_cast<Ints>(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline V ToFloat(Ints x) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(x)); }
inline uint32_t SumLanes(Ints x) {
  const __m256i all = reinterpret_cast<__m256i>(x);
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  y = _mm_add_epi32(y, _mm_unpackhi_epi64(y, y));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 1))));
}
inline V LargerMagnitude(V a, V b) {
  return VMax(_mm256_and_ps(b, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))), a);
}
inline __m256i LaneMask(uint32_t lanes) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bits), bits);
}
inline V LoadLanes(const float* p, uint32_t lanes) { return _mm256_maskload_ps(p, LaneMask(lanes)); }
inline V LoadF16Lanes(const uint16_t* p, uint32_t lanes) {
  return _mm256_and_ps(LoadF16(p), _mm256_castsi256_ps(LaneMask(lanes)));
}

// Word 0 of a quad has its numbers 0 and 2, word 1 those 1 and 3, of 16 bits each, as their codes are taken to be.
inline Ints ShiftPairs(Ints x, int bits) {
  return reinterpret_cast<Ints>(_mm256_srli_epi16(reinterpret_cast<__m256i>(x), bits));
}
inline Ints Bytes(Ints x, int word) { return word == 0 ? x & 0x00ff00ff : ShiftPairs(x, 8); }
inline Ints LowHalves(Ints x, int word) { return (word == 0 ? x : ShiftPairs(x, 8)) & 0x000f000f; }
inline Ints HighHalves(Ints x, int word) { return word == 0 ? ShiftPairs(x, 4) & 0x000f000f : ShiftPairs(x, 12); }

constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the lowest 16 bits are the whole number's
constexpr size_t kQuadInts = 2;
inline Ints StoreQuads(const V* shifted, uint32_t* quads) {
  constexpr int64_t kPairs = 0x0d0c'0504'0908'0100, kZeros = -1;  // bytes 0 1, 8 9, 4 5, 12 13: numbers 0 2 1 3
  const __m256i first = _mm256_setr_epi64x(kPairs, kZeros, kPairs, kZeros);
  const __m256i second = _mm256_setr_epi64x(kZeros, kPairs, kZeros, kPairs);
  const __m256i mixed = _mm256_or_si256(_mm256_shuffle_epi8(_mm256_castps_si256(shifted[0]), first),
                                        _mm256_shuffle_epi8(_mm256_castps_si256(shifted[1]), second));
  const __m256i four = _mm256_permute4x64_epi64(mixed, 0b11011000);  // quads 0 2 1 3 lie in order
  _mm256_store_si256(reinterpret_cast<__m256i*>(quads), four);
  return reinterpret_cast<Ints>(_mm256_madd_epi16(four, _mm256_set1_epi16(1)));
}

using Sums = Ints;
inline Sums StartAt(uint32_t x) { return Ints{} + x; }
inline void AddProducts(Sums& sums, Ints codes, Ints numbers, int) {
  const __m256i products = _mm256_madd_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(numbers));
  Ints sum = sums;
  // sum += products; but GCC 12 puts such additions off until registers run out.
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
  sums = sum;
}
inline Ints Total(Sums sums) { return sums; }

#include "kernels/attention/attention_codes.h"

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode,        MergeSplits,
                                            Prefill,       ColumnSums};

}  // namespace lesskv::avx2

#endif
