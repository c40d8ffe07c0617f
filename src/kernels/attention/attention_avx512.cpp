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

// A type of its own because GCC 12 copies sums of type __m512i from one register to another around each addition in a
// loop.
using Ints = uint32_t __attribute__((vector_size(64)));

inline Ints LoadInts(const void* p) { return reinterpret_cast<Ints>(_mm512_loadu_si512(p)); }
inline V ToFloat(Ints x) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)); }
inline uint32_t SumLanes(Ints x) {
  const __m512i all = reinterpret_cast<__m512i>(x);
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  y = _mm_add_epi32(y, _mm_unpackhi_epi64(y, y));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 1))));
}
inline V LargerMagnitude(V a, V b) { return _mm512_range_ps(a, b, 0b1011); }
inline V LoadLanes(const float* p, uint32_t lanes) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
}
inline V LoadF16Lanes(const uint16_t* p, uint32_t lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
}

// Both words, low and high bytes of numbers, take the same codes.
inline Ints Bytes(Ints x, int) { return x; }
inline Ints LowHalves(Ints x, int) { return x & 0x0f0f0f0f; }
inline Ints HighHalves(Ints x, int) {
  return LowHalves(reinterpret_cast<Ints>(_mm512_srli_epi16(reinterpret_cast<__m512i>(x), 4)), 0);
}

// 1.5 * 2^23 leaves a whole number in the low bits; 128 more, and the second byte is `high`, the first `low` + 128.
constexpr float kShift = 12582912.0f + 128;
constexpr size_t kQuadInts = 4;  // four low bytes, four high bytes, 8 bytes of nothing
inline Ints StoreQuads(const V* shifted, uint32_t* quads) {
  const __m512i gather =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m512i flip = _mm512_broadcast_i32x4(_mm_setr_epi32(static_cast<int>(0x80808080u), 0, 0, 0));
  const __m512i bits = _mm512_castps_si512(shifted[0]);
  _mm512_store_si512(quads, _mm512_xor_si512(_mm512_shuffle_epi8(bits, gather), flip));
  return reinterpret_cast<Ints>(bits) - __builtin_bit_cast(uint32_t, kShift);
}

struct Sums {
  Ints high, low;
};
inline Sums StartAt(uint32_t x) { return {Ints{}, Ints{} + x}; }
inline void AddProducts(Sums& sums, Ints codes, Ints numbers, int word) {
  Ints& sum = word == 0 ? sums.low : sums.high;
  sum = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(codes),
                                                   reinterpret_cast<__m512i>(numbers)));
}
inline Ints Total(const Sums& sums) { return (sums.high << 8) + sums.low; }

#include "kernels/attention/attention_codes.h"

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode,        MergeSplits,
                                            Prefill,       ColumnSums};

}  // namespace lesskv::avx512

#endif
