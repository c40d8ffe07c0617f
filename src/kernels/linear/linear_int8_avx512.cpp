// 8-bit products of many tokens with AVX-512 VNNI. Built with those flags; see linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_int8-inl.h"

namespace lesskv::internal {
namespace {

struct Avx512Simd {
  using Int = __m512i;
  using Float = __m512;
  static constexpr size_t kLanes = 16;
  static constexpr int kSignedOffset = 128;

  static inline Float Zero() { return _mm512_setzero_ps(); }
  static inline Int ZeroInt() { return _mm512_setzero_si512(); }
  static inline Int Broadcast(int32_t v) { return _mm512_set1_epi32(v); }
  static inline Float Broadcast(float v) { return _mm512_set1_ps(v); }
  static inline Int BroadcastFour(const int8_t* p) {
    return _mm512_set1_epi32(static_cast<int>(Load32(reinterpret_cast<const uint8_t*>(p))));
  }
  static inline Int LoadInt(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline Float Load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void Store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static inline Float Add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static inline Float Mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static inline Float MulAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Float ToFloat(Int v) { return _mm512_cvtepi32_ps(v); }
  static inline Float AsFloat(Int bits) { return _mm512_castsi512_ps(bits); }
  static inline Float HalvesToFloat(Int v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
  static inline Int Sub(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static inline Int EveryFourthRow(const uint8_t* const* rows, size_t at) {
    Int v = _mm512_castsi128_si512(Load16Bytes(rows[0] + at));
    v = _mm512_inserti32x4(v, Load16Bytes(rows[4] + at), 1);
    v = _mm512_inserti32x4(v, Load16Bytes(rows[8] + at), 2);
    return _mm512_inserti32x4(v, Load16Bytes(rows[12] + at), 3);
  }
  static inline Int LowWords(Int a, Int b) { return _mm512_unpacklo_epi32(a, b); }
  static inline Int HighWords(Int a, Int b) { return _mm512_unpackhi_epi32(a, b); }
  static inline Int LowPairs(Int a, Int b) { return _mm512_unpacklo_epi64(a, b); }
  static inline Int HighPairs(Int a, Int b) { return _mm512_unpackhi_epi64(a, b); }
  static inline Int And(Int a, Int b) { return _mm512_and_si512(a, b); }
  static inline Int Or(Int a, Int b) { return _mm512_or_si512(a, b); }
  static inline Int Xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static inline Int ShiftRight(Int v, int bits) { return _mm512_srl_epi16(v, _mm_cvtsi32_si128(bits)); }
  static inline Int ShiftRight32(Int v, int bits) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(bits)); }
  static inline Int ShiftLeft32(Int v, int bits) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits)); }
  static inline Int LookUp(const int8_t table[16], Int at) {
    const __m128i entries = Load16Bytes(reinterpret_cast<const uint8_t*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), at);
  }
  static inline void StoreInt(uint8_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static inline Int Dot(Int total, Int w, Int x) { return _mm512_dpbusd_epi32(total, w, x); }

  template <size_t, size_t kVectors, size_t kTokens, size_t kFours>
  static inline void AddProducts(const uint8_t* codes, const int8_t* q, size_t q_stride, Int total[kVectors][kTokens]) {
    AddDotProducts<Avx512Simd, kVectors, kTokens, kFours>(codes, q, q_stride, total);
  }
};

}  // namespace

const Int8Kernels& Avx512Int8Kernels() {
  static constexpr Int8Kernels kKernels = MakeInt8Kernels<Avx512Simd>();
  return kKernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
