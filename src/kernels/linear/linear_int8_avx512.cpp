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
  template <bool kSigned>
  static inline Int Byte(Int v, size_t at) {
    const Int up = _mm512_sll_epi32(v, _mm_cvtsi32_si128(static_cast<int>(24 - 8 * at)));
    return kSigned ? _mm512_srai_epi32(up, 24) : _mm512_srli_epi32(up, 24);
  }
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
