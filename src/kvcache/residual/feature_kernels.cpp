#include "kvcache/residual/feature_kernels.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/basic/cpu.h"

// Two vector levels of Highway; what they are chosen by is kernels/cpu.h, so that LESSKV_ISA holds here too.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kvcache/residual/feature_kernels.cpp"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace lesskv::internal {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// GELU(x) = x Phi(x), exact (erf) form. Phi's tail is p(t) exp(-x^2/2) with Abramowitz and Stegun 7.1.26: absolute error
// of erf below 1.5e-7, and no cancellation for negative x.
HWY_INLINE VF Gelu(DF df, VF x) {
  const VF y = hn::Mul(hn::Abs(x), hn::Set(df, 0.70710678f));
  const VF t = hn::Div(hn::Set(df, 1.0f), hn::MulAdd(y, hn::Set(df, 0.3275911f), hn::Set(df, 1.0f)));
  VF p = hn::MulAdd(t, hn::Set(df, 1.061405429f), hn::Set(df, -1.453152027f));
  p = hn::MulAdd(p, t, hn::Set(df, 1.421413741f));
  p = hn::MulAdd(p, t, hn::Set(df, -0.284496736f));
  p = hn::Mul(hn::MulAdd(p, t, hn::Set(df, 0.254829592f)), t);
  // Below -100 exp is 0 to any purpose and Highway's Exp leaves its range.
  const VF e = hn::Exp(df, hn::Max(hn::Neg(hn::Mul(y, y)), hn::Set(df, -80.0f)));
  const VF tail = hn::Mul(hn::Mul(hn::Set(df, 0.5f), x), hn::Mul(p, e));  // x times the mass beyond |x|
  return hn::IfThenElse(hn::Ge(x, hn::Zero(df)), hn::Sub(x, tail), tail);
}

// Vector `i` of a packed row.
template <bool kBf16>
struct Row;

template <>
struct Row<false> {
  static HWY_INLINE VF Load(DF df, const void* base, size_t row, size_t i) {
    return hn::LoadU(df, static_cast<const float*>(base) + row * kHiddenTile + i * hn::Lanes(df));
  }
};

template <>
struct Row<true> {
  static HWY_INLINE VF Load(DF df, const void* base, size_t row, size_t i) {
    const hn::RebindToUnsigned<DF> du;
    const size_t half_vectors = kHiddenTile / 2 / hn::Lanes(df);
    const bool high = i >= half_vectors;
    const uint32_t* words = static_cast<const uint32_t*>(base) + row * (kHiddenTile / 2);
    const auto w = hn::LoadU(du, words + (high ? i - half_vectors : i) * hn::Lanes(df));
    return hn::BitCast(df, high ? hn::And(w, hn::Set(du, 0xffff0000u)) : hn::ShiftLeft<16>(w));
  }
};

constexpr size_t kLanes = hn::MaxLanes(DF());
constexpr size_t kVectors = kHiddenTile / kLanes;  // vectors a hidden tile

// hidden[m][64] = GELU(x_m w1 + b1) of one tile. Registers hold all of the tile's accumulators (AVX-512: 16 for four
// inputs) or two vectors of each input at a time.
template <bool kBf16, size_t kInputs>
HWY_NOINLINE void HiddenTile(const PackedMap& map, size_t tile, const float* x, size_t x_stride, float* hidden) {
  const DF df;
  constexpr size_t kGroup = kVectors == 4 ? 4 : 2;
  const size_t lanes = hn::Lanes(df);
  const size_t first_row = tile * map.head_dim;
  for (size_t v = 0; v < kVectors; v += kGroup) {
    VF acc[kInputs][kGroup];
    for (size_t i = 0; i < kGroup; ++i) {
      const VF bias =
          map.b1 == nullptr ? hn::Zero(df) : hn::LoadU(df, map.b1 + tile * kHiddenTile + (v + i) * lanes);
      for (size_t m = 0; m < kInputs; ++m) acc[m][i] = bias;
    }
    for (size_t d = 0; d < map.head_dim; ++d) {
      VF w[kGroup];
      for (size_t i = 0; i < kGroup; ++i) w[i] = Row<kBf16>::Load(df, map.w1, first_row + d, v + i);
      for (size_t m = 0; m < kInputs; ++m) {
        const VF xd = hn::Set(df, x[m * x_stride + d]);
        for (size_t i = 0; i < kGroup; ++i) acc[m][i] = hn::MulAdd(xd, w[i], acc[m][i]);
      }
    }
    for (size_t m = 0; m < kInputs; ++m)
      for (size_t i = 0; i < kGroup; ++i)
        hn::StoreU(Gelu(df, acc[m][i]), df, hidden + m * kHiddenTile + (v + i) * lanes);
  }
}

template <bool kBf16, size_t kInputs>
void MapBlock(const PackedMap& map, const float* x, size_t x_stride, float* p2) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  HWY_ALIGN float hidden[kInputs * kHiddenTile];
  HWY_ALIGN float sums[kInputs * kMaxRank * kLanes];
  std::memset(sums, 0, kInputs * map.rank * lanes * sizeof(float));
  for (size_t tile = 0; tile < map.n_tiles; ++tile) {
    HiddenTile<kBf16, kInputs>(map, tile, x, x_stride, hidden);
    for (size_t r = 0; r < map.rank; ++r) {
      VF acc[kInputs];
      for (size_t m = 0; m < kInputs; ++m) acc[m] = hn::LoadU(df, sums + (m * map.rank + r) * lanes);
      for (size_t i = 0; i < kVectors; ++i) {
        const VF w = Row<kBf16>::Load(df, map.w2, tile * map.rank + r, i);
        for (size_t m = 0; m < kInputs; ++m)
          acc[m] = hn::MulAdd(hn::LoadU(df, hidden + m * kHiddenTile + i * lanes), w, acc[m]);
      }
      for (size_t m = 0; m < kInputs; ++m) hn::StoreU(acc[m], df, sums + (m * map.rank + r) * lanes);
    }
  }
  for (size_t i = 0; i < kInputs * map.rank; ++i) {
    float sum = 0;
    for (size_t lane = 0; lane < lanes; ++lane) sum += sums[i * lanes + lane];
    p2[i] = sum;
  }
}

template <bool kBf16>
void MapAll(const PackedMap& map, const float* x, size_t x_stride, size_t n, float* p2) {
  size_t i = 0;
  for (; i + kQueryBlock <= n; i += kQueryBlock)
    MapBlock<kBf16, kQueryBlock>(map, x + i * x_stride, x_stride, p2 + i * map.rank);
  for (; i < n; ++i) MapBlock<kBf16, 1>(map, x + i * x_stride, x_stride, p2 + i * map.rank);
}

void HiddenMap(const PackedMap& map, const float* x, size_t x_stride, size_t n, float* p2) {
  map.is_bf16 ? MapAll<true>(map, x, x_stride, n, p2) : MapAll<false>(map, x, x_stride, n, p2);
}

// Rows of H in registers while all n pairs pass: kRanks features by two vectors of the head.
template <size_t kRanks>
void AbsorbBlock(const float* psi, const float* v, size_t n, size_t rank, size_t head_dim, float* h) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  size_t d = 0;
  for (; d + lanes <= head_dim; d += lanes) {
    VF acc[kRanks];
    for (size_t r = 0; r < kRanks; ++r) acc[r] = hn::LoadU(df, h + r * head_dim + d);
    for (size_t j = 0; j < n; ++j) {
      const VF vj = hn::LoadU(df, v + j * head_dim + d);
      for (size_t r = 0; r < kRanks; ++r) acc[r] = hn::MulAdd(hn::Set(df, psi[j * rank + r]), vj, acc[r]);
    }
    for (size_t r = 0; r < kRanks; ++r) hn::StoreU(acc[r], df, h + r * head_dim + d);
  }
  for (; d < head_dim; ++d)
    for (size_t r = 0; r < kRanks; ++r)
      for (size_t j = 0; j < n; ++j) h[r * head_dim + d] += psi[j * rank + r] * v[j * head_dim + d];
}

void Absorb(const float* psi, const float* v, size_t n, size_t rank, size_t head_dim, float* h, float* z) {
  size_t r = 0;
  for (; r + 8 <= rank; r += 8) AbsorbBlock<8>(psi + r, v, n, rank, head_dim, h + r * head_dim);
  for (; r < rank; ++r) AbsorbBlock<1>(psi + r, v, n, rank, head_dim, h + r * head_dim);
  for (size_t j = 0; j < n; ++j)
    for (size_t i = 0; i < rank; ++i) z[i] += psi[j * rank + i];
}

float Read(const float* phi, const float* h, const float* z, size_t rank, size_t head_dim, float* numerator) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  size_t d = 0;
  for (; d + lanes <= head_dim; d += lanes) {
    VF even = hn::Zero(df), odd = hn::Zero(df);
    size_t r = 0;
    for (; r + 2 <= rank; r += 2) {
      even = hn::MulAdd(hn::Set(df, phi[r]), hn::LoadU(df, h + r * head_dim + d), even);
      odd = hn::MulAdd(hn::Set(df, phi[r + 1]), hn::LoadU(df, h + (r + 1) * head_dim + d), odd);
    }
    if (r < rank) even = hn::MulAdd(hn::Set(df, phi[r]), hn::LoadU(df, h + r * head_dim + d), even);
    hn::StoreU(hn::Add(even, odd), df, numerator + d);
  }
  for (; d < head_dim; ++d) {
    float sum = 0;
    for (size_t r = 0; r < rank; ++r) sum += phi[r] * h[r * head_dim + d];
    numerator[d] = sum;
  }
  float mass = 0;
  for (size_t r = 0; r < rank; ++r) mass += phi[r] * z[r];
  return mass;
}

LessKernels Table() { return {HiddenMap, Absorb, Read}; }

}  // namespace HWY_NAMESPACE
}  // namespace lesskv::internal
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lesskv::internal {
namespace {

float PackedValue(const PackedMap& map, const void* base, size_t row, size_t unit) {
  if (!map.is_bf16) return static_cast<const float*>(base)[row * kHiddenTile + unit];
  const uint32_t word = static_cast<const uint32_t*>(base)[row * (kHiddenTile / 2) + unit % (kHiddenTile / 2)];
  return std::bit_cast<float>(unit < kHiddenTile / 2 ? word << 16 : word & 0xffff0000u);
}

float ScalarGelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }

void ScalarHiddenMap(const PackedMap& map, const float* x, size_t x_stride, size_t n, float* p2) {
  std::memset(p2, 0, n * map.rank * sizeof(float));
  for (size_t m = 0; m < n; ++m) {
    for (size_t unit = 0; unit < map.n_tiles * kHiddenTile; ++unit) {
      const size_t tile = unit / kHiddenTile, u = unit % kHiddenTile;
      float sum = map.b1 == nullptr ? 0.0f : map.b1[unit];
      for (size_t d = 0; d < map.head_dim; ++d)
        sum += x[m * x_stride + d] * PackedValue(map, map.w1, tile * map.head_dim + d, u);
      const float g = ScalarGelu(sum);
      for (size_t r = 0; r < map.rank; ++r) p2[m * map.rank + r] += g * PackedValue(map, map.w2, tile * map.rank + r, u);
    }
  }
}

void ScalarAbsorb(const float* psi, const float* v, size_t n, size_t rank, size_t head_dim, float* h, float* z) {
  for (size_t j = 0; j < n; ++j) {
    for (size_t r = 0; r < rank; ++r) {
      z[r] += psi[j * rank + r];
      for (size_t d = 0; d < head_dim; ++d) h[r * head_dim + d] += psi[j * rank + r] * v[j * head_dim + d];
    }
  }
}

float ScalarRead(const float* phi, const float* h, const float* z, size_t rank, size_t head_dim, float* numerator) {
  float mass = 0;
  std::memset(numerator, 0, head_dim * sizeof(float));
  for (size_t r = 0; r < rank; ++r) {
    mass += phi[r] * z[r];
    for (size_t d = 0; d < head_dim; ++d) numerator[d] += phi[r] * h[r * head_dim + d];
  }
  return mass;
}

}  // namespace

const LessKernels& ScalarLessKernels() {
  static const LessKernels kernels = {ScalarHiddenMap, ScalarAbsorb, ScalarRead};
  return kernels;
}

const LessKernels& ActiveLessKernels() {
#if defined(__x86_64__)
  static const LessKernels avx512 = N_AVX3::Table(), avx2 = N_AVX2::Table();
  const Isa isa = ActiveIsa();
  return isa >= Isa::kAvx512 ? avx512 : isa >= Isa::kAvx2 ? avx2 : ScalarLessKernels();
#else
  static const LessKernels native = HWY_STATIC_DISPATCH(Table)();
  return ActiveIsa() == Isa::kScalar ? ScalarLessKernels() : native;
#endif
}

}  // namespace lesskv::internal
#endif
