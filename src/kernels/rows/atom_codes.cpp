#include "kernels/rows/atom_codes.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"

// As in group_codes.cpp: levels below AVX2 run the scalar kernels.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)

// clang-format off: this file is included again for each target, before the headers below it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rows/atom_codes.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// clang-format on

#ifndef LESSKV_ATOM_CODES_COMMON
#define LESSKV_ATOM_CODES_COMMON
namespace lesskv {
namespace {

constexpr size_t kTile = 16;   // atoms of a tile
constexpr size_t kBatch = 6;   // residuals that read an atom together: 12 sums of AVX2's 16 registers

// The best atom of each residual so far.
struct BestAtom {
  float size[kBatch];  // |<R, D>|; -1 before the first
  uint32_t index[kBatch];
};

}  // namespace
}  // namespace lesskv
#endif

HWY_BEFORE_NAMESPACE();
namespace lesskv {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
using DI = hn::Rebind<int32_t, D>;
using VI = hn::Vec<DI>;
using DHalf = hn::Rebind<hwy::float16_t, D>;

constexpr size_t kLanes = hn::MaxLanes(D());
constexpr size_t kVectors = kLanes < kTile ? kTile / kLanes : 1;  // of a tile
static_assert(kLanes <= kTile);

HWY_INLINE V LoadHalf(const uint16_t* p) {
  return hn::PromoteTo(D(), hn::LoadU(DHalf(), reinterpret_cast<const hwy::float16_t*>(p)));
}

// The largest |<R, D>| a lane, and whose it is.
struct LaneBest {
  HWY_ALIGN float size[kBatch][kTile];
  HWY_ALIGN int32_t index[kBatch][kTile];
};

// MB residuals [MB, dim] against NT tiles of atoms, whose first is atom `first`.
template <int MB, int NT>
HWY_INLINE void SearchTiles(const uint16_t* lanes, size_t dim, const float* residuals, size_t first, LaneBest& best) {
  const D df;
  const DI di;
  V sum[MB][NT * kVectors];
  for (int m = 0; m < MB; ++m)
    for (size_t v = 0; v < NT * kVectors; ++v) sum[m][v] = hn::Zero(df);
  for (size_t c = 0; c < dim; ++c) {
    V atom[NT * kVectors];
    for (size_t v = 0; v < NT * kVectors; ++v)
      atom[v] = LoadHalf(lanes + (v / kVectors * dim + c) * kTile + v % kVectors * kLanes);
    for (int m = 0; m < MB; ++m) {
      const V r = hn::Set(df, residuals[static_cast<size_t>(m) * dim + c]);
      for (size_t v = 0; v < NT * kVectors; ++v) sum[m][v] = hn::MulAdd(r, atom[v], sum[m][v]);
    }
  }
  for (size_t v = 0; v < NT * kVectors; ++v) {
    const size_t lane = v % kVectors * kLanes;
    const VI index = hn::Iota(di, static_cast<int32_t>(first + v / kVectors * kTile + lane));
    for (int m = 0; m < MB; ++m) {
      const V size = hn::Abs(sum[m][v]), before = hn::Load(df, best.size[m] + lane);
      const auto better = hn::Gt(size, before);
      hn::Store(hn::IfThenElse(better, size, before), df, best.size[m] + lane);
      hn::Store(hn::IfThenElse(hn::RebindMask(di, better), index, hn::Load(di, best.index[m] + lane)), di,
                best.index[m] + lane);
    }
  }
}

// Few residuals take several tiles at once, so that there are enough independent sums.
template <int MB>
void SearchShared(const AtomPart& part, size_t dim, const float* residuals, BestAtom& best) {
  constexpr int kNT = MB == 1 ? 4 : MB == 2 ? 2 : 1;
  LaneBest lane_best;
  for (int m = 0; m < MB; ++m)
    for (size_t i = 0; i < kTile; ++i) lane_best.size[m][i] = -1, lane_best.index[m][i] = 0;
  const size_t n_tiles = (part.n + kTile - 1) / kTile;
  size_t t = 0;
  for (; t + kNT <= n_tiles; t += kNT)
    SearchTiles<MB, kNT>(part.lanes + t * dim * kTile, dim, residuals, t * kTile, lane_best);
  for (; t < n_tiles; ++t) SearchTiles<MB, 1>(part.lanes + t * dim * kTile, dim, residuals, t * kTile, lane_best);
  for (int m = 0; m < MB; ++m) {
    for (size_t i = 0; i < kTile; ++i) {
      const float size = lane_best.size[m][i];
      const auto index = static_cast<uint32_t>(lane_best.index[m][i]);
      if (size > best.size[m] || (size == best.size[m] && index < best.index[m])) best.size[m] = size, best.index[m] = index;
    }
  }
}

HWY_INLINE float DotHalf(const uint16_t* atom, const float* x, size_t dim) {
  const D df;
  V sum = hn::Zero(df);
  size_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) sum = hn::MulAdd(LoadHalf(atom + c), hn::LoadU(df, x + c), sum);
  float total = hn::GetLane(hn::SumOfLanes(df, sum));
  for (; c < dim; ++c) total += HalfToFloat(atom[c]) * x[c];
  return total;
}

// Atoms that lie as rows only.
void SearchOwn(const Atoms& atoms, const float* residuals, size_t n, BestAtom& best) {
  for (size_t i = 0; i < atoms.own.n; ++i)
    for (size_t m = 0; m < n; ++m) {
      const float size = std::fabs(DotHalf(atoms.own.rows + i * atoms.dim, residuals + m * atoms.dim, atoms.dim));
      if (size > best.size[m]) best.size[m] = size, best.index[m] = static_cast<uint32_t>(atoms.shared.n + i);
    }
}

void SimdSearch(const Atoms& atoms, const float* residuals, size_t n, BestAtom& best) {
  const AtomPart& part = atoms.shared;
  switch (part.n == 0 ? 0 : n) {
    case 1: SearchShared<1>(part, atoms.dim, residuals, best); break;
    case 2: SearchShared<2>(part, atoms.dim, residuals, best); break;
    case 3: SearchShared<3>(part, atoms.dim, residuals, best); break;
    case 4: SearchShared<4>(part, atoms.dim, residuals, best); break;
    case 5: SearchShared<5>(part, atoms.dim, residuals, best); break;
    case 6: SearchShared<6>(part, atoms.dim, residuals, best); break;
    default: break;
  }
  SearchOwn(atoms, residuals, n, best);
}

// NV vectors of a row's channels from c on.
template <int NV>
HWY_INLINE void SumAtoms(const Atoms& atoms, size_t pairs, const uint16_t* indices, const float* coefficients, size_t c,
                         float* out) {
  const D df;
  V sum[NV];
  for (int v = 0; v < NV; ++v) sum[v] = hn::Zero(df);
  for (size_t g = 0; g < pairs; ++g) {
    const uint16_t* atom = atoms.Row(indices[g]) + c;
    const V coefficient = hn::Set(df, coefficients[g]);
    for (int v = 0; v < NV; ++v)
      sum[v] = hn::MulAdd(coefficient, LoadHalf(atom + static_cast<size_t>(v) * kLanes), sum[v]);
  }
  for (int v = 0; v < NV; ++v) hn::StoreU(sum[v], df, out + c + static_cast<size_t>(v) * kLanes);
}

void SimdDecode(const Atoms& atoms, size_t pairs, const uint16_t* indices, const float* coefficients, float* out) {
  size_t c = 0;
  for (; c + 4 * kLanes <= atoms.dim; c += 4 * kLanes) SumAtoms<4>(atoms, pairs, indices, coefficients, c, out);
  for (; c + kLanes <= atoms.dim; c += kLanes) SumAtoms<1>(atoms, pairs, indices, coefficients, c, out);
  for (; c < atoms.dim; ++c) {
    float sum = 0;
    for (size_t g = 0; g < pairs; ++g) sum += coefficients[g] * HalfToFloat(atoms.Row(indices[g])[c]);
    out[c] = sum;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace lesskv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lesskv {
namespace {

HWY_EXPORT(SimdSearch);
HWY_EXPORT(SimdDecode);

constexpr float kLargestHalf = 65504;
constexpr float kNothingLeft = 1e-6f;  // of a vector's length
constexpr size_t kMostPairs = 256;

void ScalarSearch(const Atoms& atoms, const float* residuals, size_t n, BestAtom& best) {
  for (size_t i = 0; i < atoms.size(); ++i) {
    const uint16_t* atom = atoms.Row(i);
    for (size_t m = 0; m < n; ++m) {
      float dot = 0;
      for (size_t c = 0; c < atoms.dim; ++c) dot += residuals[m * atoms.dim + c] * HalfToFloat(atom[c]);
      if (std::fabs(dot) > best.size[m]) best.size[m] = std::fabs(dot), best.index[m] = static_cast<uint32_t>(i);
    }
  }
}

void Search(const Atoms& atoms, const float* residuals, size_t n, BestAtom& best) {
  std::fill_n(best.size, n, -1.0f);
  std::fill_n(best.index, n, 0u);
  if (ActiveIsa() == Isa::kScalar) return ScalarSearch(atoms, residuals, n, best);
  HWY_DYNAMIC_DISPATCH(SimdSearch)(atoms, residuals, n, best);
}

uint16_t RoundCoefficient(float exact, CoefficientType type) {
  if (type == CoefficientType::kE4m3) return E4m3ToHalf(FloatToE4m3(exact));
  return FloatToHalf(exact > kLargestHalf ? kLargestHalf : exact < -kLargestHalf ? -kLargestHalf : exact);
}

// Subtracts an atom from a residual; the rounded coefficient.
uint16_t Subtract(const Atoms& atoms, uint32_t index, float* residual, CoefficientType type) {
  float atom[kMostAtomChannels];
  F16ToF32(atoms.Row(index), atoms.dim, atom);
  const float exact = Dot(residual, atom, atoms.dim);
  const uint16_t half = RoundCoefficient(exact, type);
  Axpy(residual, -HalfToFloat(half), atom, atoms.dim);
  return half;
}

// One to kBatch vectors.
void EncodeBatch(const Atoms& atoms, size_t pairs, const float* x, size_t n, size_t x_stride, uint16_t* indices,
                 uint16_t* coefficients, float* relative, CoefficientType type) {
  float residuals[kBatch * kMostAtomChannels], length[kBatch], left[kBatch];
  const size_t dim = atoms.dim;
  for (size_t m = 0; m < n; ++m) {
    std::copy_n(x + m * x_stride, dim, residuals + m * dim);
    length[m] = left[m] = std::sqrt(Dot(residuals + m * dim, residuals + m * dim, dim));
  }
  const auto done = [&](size_t m) { return left[m] <= kNothingLeft * length[m]; };
  BestAtom best;
  for (size_t g = 0; g < pairs; ++g) {
    Search(atoms, residuals, n, best);
    for (size_t m = 0; m < n; ++m) {
      uint16_t &index = indices[m * pairs + g], &coefficient = coefficients[m * pairs + g];
      index = coefficient = 0;
      if (done(m)) continue;
      index = static_cast<uint16_t>(best.index[m]);
      coefficient = Subtract(atoms, best.index[m], residuals + m * dim, type);
      left[m] = std::sqrt(Dot(residuals + m * dim, residuals + m * dim, dim));
    }
  }
  for (size_t m = 0; m < n && relative != nullptr; ++m) relative[m] = length[m] == 0 ? 0 : left[m] / length[m];
}

}  // namespace

uint8_t FloatToE4m3(float x) {
  constexpr float kLeastNormal = 0x1p-6f, kLargest = 448;
  const auto sign = static_cast<uint8_t>(std::signbit(x) ? 0x80 : 0);
  const float size = std::min(std::fabs(x), kLargest);
  if (std::isnan(x)) return sign | 0x7f;
  if (size < kLeastNormal) return sign | static_cast<uint8_t>(std::nearbyint(size * 0x1p9f));
  const auto bits = std::bit_cast<uint32_t>(size);
  const uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;  // of a float's exponent and mantissa the upper 3 bits
  return static_cast<uint8_t>(sign | (rounded - ((127 - 7) << 3)));
}

uint16_t E4m3ToHalf(uint8_t code) {
  const uint32_t sign = code >> 7 << 15, size = code & 0x7f;
  if (size == 0x7f) return static_cast<uint16_t>(sign | 0x7e00);
  if (size < 8) return static_cast<uint16_t>(sign | FloatToHalf(static_cast<float>(size) * 0x1p-9f));
  return static_cast<uint16_t>(sign | ((size << 7) + ((15 - 7) << 10)));
}

std::vector<uint16_t> AtomLanes(std::span<const uint16_t> rows, size_t dim) {
  const size_t n = rows.size() / dim;
  std::vector<uint16_t> lanes((n + kTile - 1) / kTile * kTile * dim);
  for (size_t i = 0; i < n; ++i)
    for (size_t c = 0; c < dim; ++c) lanes[(i / kTile * dim + c) * kTile + i % kTile] = rows[i * dim + c];
  return lanes;
}

void EncodeAtoms(const Atoms& atoms, size_t pairs, const float* x, size_t n, size_t x_stride, uint16_t* indices,
                 uint16_t* coefficients, float* residuals, CoefficientType type) {
  CHECK(atoms.dim > 0 && atoms.dim <= kMostAtomChannels && atoms.size() > 0 && atoms.size() <= kMostAtoms,
        "{} atoms of {} channels", atoms.size(), atoms.dim);
  for (size_t i = 0; i < n; i += kBatch)
    EncodeBatch(atoms, pairs, x + i * x_stride, std::min(kBatch, n - i), x_stride, indices + i * pairs,
                coefficients + i * pairs, residuals == nullptr ? nullptr : residuals + i, type);
}

void DecodeAtoms(const Atoms& atoms, size_t pairs, const uint16_t* indices, const uint16_t* coefficients, size_t n,
                 float* out, size_t out_stride) {
  CHECK(pairs <= kMostPairs, "{} pairs", pairs);
  float floats[kMostPairs];
  const bool simd = ActiveIsa() != Isa::kScalar;
  for (size_t i = 0; i < n; ++i) {
    F16ToF32(coefficients + i * pairs, pairs, floats);
    float* row = out + i * out_stride;
    if (simd) {
      HWY_DYNAMIC_DISPATCH(SimdDecode)(atoms, pairs, indices + i * pairs, floats, row);
      continue;
    }
    std::fill_n(row, atoms.dim, 0.0f);
    for (size_t g = 0; g < pairs; ++g)
      for (size_t c = 0; c < atoms.dim; ++c) row[c] += floats[g] * HalfToFloat(atoms.Row(indices[i * pairs + g])[c]);
  }
}

}  // namespace lesskv
#endif  // HWY_ONCE
