// 8-bit products of many tokens with AVX-VNNI: dot products of four in vectors of 256 bits. Built with those flags; see
// linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_int8-inl.h"

namespace lesskv::internal {
namespace {

struct AvxVnniSimd {
  using Int = __m256i;
  using Float = __m256;
  static constexpr size_t kLanes = 8;
  static constexpr int kSignedOffset = 128;

  static inline Float Zero() { return _mm256_setzero_ps(); }
  static inline Int ZeroInt() { return _mm256_setzero_si256(); }
  static inline Int Broadcast(int32_t v) { return _mm256_set1_epi32(v); }
  static inline Float Broadcast(float v) { return _mm256_set1_ps(v); }
  static inline Int BroadcastFour(const int8_t* p) {
    return _mm256_set1_epi32(static_cast<int>(Load32(reinterpret_cast<const uint8_t*>(p))));
  }
  static inline Int LoadInt(const uint8_t* p) { return Load32Bytes(p); }
  static inline Float Load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void Store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static inline Float Add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static inline Float Mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static inline Float MulAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static inline Float ToFloat(Int v) { return _mm256_cvtepi32_ps(v); }
  template <bool kSigned>
  static inline Int Byte(Int v, size_t at) {
    const Int up = _mm256_sll_epi32(v, _mm_cvtsi32_si128(static_cast<int>(24 - 8 * at)));
    return kSigned ? _mm256_srai_epi32(up, 24) : _mm256_srli_epi32(up, 24);
  }
  static inline Int Dot(Int total, Int w, Int x) { return _mm256_dpbusd_avx_epi32(total, w, x); }

  template <size_t, size_t kVectors, size_t kTokens, size_t kFours>
  static inline void AddProducts(const uint8_t* codes, const int8_t* q, size_t q_stride, Int total[kVectors][kTokens]) {
    AddDotProducts<AvxVnniSimd, kVectors, kTokens, kFours>(codes, q, q_stride, total);
  }
};

}  // namespace

const Int8Kernels& AvxVnniInt8Kernels() {
  static constexpr Int8Kernels kKernels = MakeInt8Kernels<AvxVnniSimd>();
  return kKernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
