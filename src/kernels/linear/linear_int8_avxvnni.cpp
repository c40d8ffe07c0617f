// 8-bit products of many tokens with AVX-VNNI: dot products of four in vectors of 256 bits. Built with those flags; see
// linear_avx512.cpp for the rules.
#if defined(__x86_64__)

#include "kernels/linear/linear_int8-inl.h"

namespace lesskv::internal {
namespace {

struct AvxVnniSimd : Simd256 {
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
