// 8-bit products of many tokens with AVX2. Built with those flags; see linear_avx512.cpp for the rules.
//
// vpmaddubsw adds two products of an unsigned code and a signed activation in 16 bits, and 16 bits hold more than one
// of its sums: activations are 127 at most, so eight sums of 4-bit codes stay below 8 * 2 * 15 * 127 = 30480, four of
// 5-bit codes below 31496 and two of 6-bit codes below 32004. Signed codes of 8 bits pass their sign to the activation.
#if defined(__x86_64__)

#include "kernels/linear/linear_int8-inl.h"

namespace lesskv::internal {
namespace {

// Keeps the compiler from adding in another order, which would hold all products in memory before the first sum.
inline __m256i InOrder(__m256i v) {
  __asm__("" : "+x"(v));
  return v;
}

struct Avx2Simd : Simd256 {
  static inline Int AddPairs(Int total, Int pairs) {
    return InOrder(_mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }

  template <size_t kBits, size_t kVectors, size_t kTokens, size_t kFours>
  static inline void AddProducts(const uint8_t* codes, const int8_t* q, size_t q_stride, Int total[kVectors][kTokens]) {
    if constexpr (kBits == 8) {
      AddSigned<kVectors, kTokens, kFours>(codes, q, q_stride, total);
    } else {
      constexpr size_t kFit = kBits == 4 ? 8 : kBits == 5 ? 4 : 2;
      constexpr size_t kRun = kFit < kFours ? kFit : kFours;
#pragma GCC unroll 4
      for (size_t k = 0; k < kFours; k += kRun) {
        AddRun<kVectors, kTokens, kRun>(codes + k * kVectors * kLanes * 4, q + k * 4, q_stride, total);
      }
    }
  }

 private:
  template <size_t kVectors, size_t kTokens, size_t kRun>
  static inline void AddRun(const uint8_t* codes, const int8_t* q, size_t q_stride, Int total[kVectors][kTokens]) {
    Int pairs[kVectors][kTokens];
#pragma GCC unroll 8
    for (size_t k = 0; k < kRun; ++k) {
      Int w[kVectors];
#pragma GCC unroll 2
      for (size_t v = 0; v < kVectors; ++v) w[v] = LoadInt(codes + (k * kVectors + v) * kLanes * 4);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) {
        const Int x = BroadcastFour(q + t * q_stride + k * 4);
#pragma GCC unroll 2
        for (size_t v = 0; v < kVectors; ++v) {
          const Int products = _mm256_maddubs_epi16(w[v], x);
          pairs[v][t] = k == 0 ? products : InOrder(_mm256_add_epi16(pairs[v][t], products));
        }
      }
    }
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) total[v][t] = AddPairs(total[v][t], pairs[v][t]);
    }
  }

  template <size_t kVectors, size_t kTokens, size_t kFours>
  static inline void AddSigned(const uint8_t* codes, const int8_t* q, size_t q_stride, Int total[kVectors][kTokens]) {
#pragma GCC unroll 8
    for (size_t k = 0; k < kFours; ++k) {
      Int w[kVectors], magnitude[kVectors];
#pragma GCC unroll 2
      for (size_t v = 0; v < kVectors; ++v) {
        w[v] = LoadInt(codes + (k * kVectors + v) * kLanes * 4);
        magnitude[v] = _mm256_abs_epi8(w[v]);
      }
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) {
        const Int x = BroadcastFour(q + t * q_stride + k * 4);
#pragma GCC unroll 2
        for (size_t v = 0; v < kVectors; ++v) {
          total[v][t] = AddPairs(total[v][t], _mm256_maddubs_epi16(magnitude[v], _mm256_sign_epi8(x, w[v])));
        }
      }
    }
  }
};

}  // namespace

const Int8Kernels& Avx2Int8Kernels() {
  static constexpr Int8Kernels kKernels = MakeInt8Kernels<Avx2Simd>();
  return kKernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
