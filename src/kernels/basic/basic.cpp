#include "kernels/basic/basic.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"

// clang-format off: this file is included again for each target, before the headers below it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/basic/basic.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace lesskv {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// 2 sqrt(2 / pi) and 0.044715 times it.
constexpr float kGeluLinear = 1.5957691216057308f, kGeluCubic = 0.0713548162726f;

// Calls full(i) at whole vectors and tail(i, count) once for what remains, if anything.
template <typename Full, typename Tail>
HWY_INLINE void Walk(size_t n, Full&& full, Tail&& tail) {
  const size_t lanes = hn::Lanes(D());
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) full(i);
  if (i < n) tail(i, n - i);
}

// The last few elements pass through a padded vector on the stack: no masked loads, no reads past the end.
struct Padded {
  HWY_ALIGN float data[HWY_MAX_BYTES / sizeof(float)];
  HWY_INLINE Padded(const float* x, size_t count, float fill) {
    for (size_t j = 0; j < hn::Lanes(D()); ++j) data[j] = j < count ? x[j] : fill;
  }
  HWY_INLINE V Load() const { return hn::Load(D(), data); }
};

HWY_INLINE void StoreFirst(V v, size_t count, float* out) {
  HWY_ALIGN float data[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(v, D(), data);
  std::memcpy(out, data, count * sizeof(float));
}

// The rule of LowestRow, a row at a time.
struct LowestRowSearch {
  const float* values;
  const int32_t* positions;
  size_t lowest;  // starts as the number of rows: none yet
  int32_t begin, end;
  bool found = false;

  void Consider(size_t r) {
    if (positions[r] < begin || positions[r] >= end) return;
    const auto value = [&](size_t i) { return values[i] == values[i] ? values[i] : kNegativeInfinity; };
    if (found && !(value(r) < value(lowest) || (value(r) == value(lowest) && positions[r] > positions[lowest]))) return;
    lowest = r;
    found = true;
  }
};

// x[i] = f(x[i]) for every element; f maps vectors.
template <typename F>
HWY_INLINE void Map(float* x, size_t n, F&& f) {
  const D d;
  Walk(
      n, [&](size_t i) HWY_ATTR { hn::StoreU(f(hn::LoadU(d, x + i)), d, x + i); },
      [&](size_t i, size_t count) HWY_ATTR { StoreFirst(f(Padded(x + i, count, 0.0f).Load()), count, x + i); });
}

// out[i] = f(x[i], y[i]).
template <typename F>
HWY_INLINE void Map2(const float* x, const float* y, size_t n, float* out, F&& f) {
  const D d;
  Walk(
      n, [&](size_t i) HWY_ATTR { hn::StoreU(f(hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, out + i); },
      [&](size_t i, size_t count) HWY_ATTR {
        StoreFirst(f(Padded(x + i, count, 0.0f).Load(), Padded(y + i, count, 0.0f).Load()), count, out + i);
      });
}

// Reduces with four independent accumulators to hide the latency of an addition. step(acc, i-th vector of x and y).
template <typename Step>
HWY_INLINE V Reduce(const float* x, const float* y, size_t n, float start, Step&& step) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V a0 = hn::Set(d, start), a1 = a0, a2 = a0, a3 = a0;
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    a0 = step(a0, hn::LoadU(d, x + i), hn::LoadU(d, y + i));
    a1 = step(a1, hn::LoadU(d, x + i + lanes), hn::LoadU(d, y + i + lanes));
    a2 = step(a2, hn::LoadU(d, x + i + 2 * lanes), hn::LoadU(d, y + i + 2 * lanes));
    a3 = step(a3, hn::LoadU(d, x + i + 3 * lanes), hn::LoadU(d, y + i + 3 * lanes));
  }
  for (; i + lanes <= n; i += lanes) a0 = step(a0, hn::LoadU(d, x + i), hn::LoadU(d, y + i));
  if (i < n) a1 = step(a1, Padded(x + i, n - i, start).Load(), Padded(y + i, n - i, start).Load());
  const bool is_max = start != 0.0f;
  return is_max ? hn::Max(hn::Max(a0, a1), hn::Max(a2, a3)) : hn::Add(hn::Add(a0, a1), hn::Add(a2, a3));
}

float SimdDot(const float* a, const float* b, size_t n) {
  const D d;
  return hn::GetLane(
      hn::SumOfLanes(d, Reduce(a, b, n, 0.0f, [](V acc, V x, V y) HWY_ATTR { return hn::MulAdd(x, y, acc); })));
}

float SimdSum(const float* x, size_t n) {
  const D d;
  return hn::GetLane(hn::SumOfLanes(d, Reduce(x, x, n, 0.0f, [](V acc, V a, V) HWY_ATTR { return hn::Add(acc, a); })));
}

float SimdMax(const float* x, size_t n) {
  const D d;
  // x86's maximum gives its second operand when the first is NaN: in this order NaN entries are skipped.
  return hn::GetLane(
      hn::MaxOfLanes(d, Reduce(x, x, n, kNegativeInfinity, [](V acc, V a, V) HWY_ATTR { return hn::Max(a, acc); })));
}

// Two passes: the lowest value, then the rows that have it, which are few.
size_t SimdLowestRow(const float* values, const int32_t* positions, size_t n, int32_t begin, int32_t end) {
  const D d;
  const hn::RebindToSigned<D> di;
  const size_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  const V high = hn::Set(d, -kNegativeInfinity);
  const auto value = [&](size_t i) HWY_ATTR {  // of rows outside the range: infinite
    const auto p = hn::LoadU(di, positions + i);
    const auto inside = hn::AndNot(hn::Lt(p, hn::Set(di, begin)), hn::Lt(p, hn::Set(di, end)));
    const V v = hn::LoadU(d, values + i);
    const V ordered = hn::IfThenElse(hn::IsNaN(v), hn::Set(d, kNegativeInfinity), v);
    return hn::IfThenElse(hn::RebindMask(d, inside), ordered, high);
  };
  V lowest = high;
  for (size_t i = 0; i < whole; i += lanes) lowest = hn::Min(lowest, value(i));
  const V least = hn::MinOfLanes(d, lowest);
  LowestRowSearch search{values, positions, n, begin, end};
  for (size_t i = 0; i < whole; i += lanes) {
    if (hn::AllFalse(d, hn::Eq(value(i), least))) continue;
    for (size_t r = i; r < i + lanes; ++r) search.Consider(r);
  }
  for (size_t r = whole; r < n; ++r) search.Consider(r);
  return search.lowest;
}

void SimdRmsNorm(const float* x, const float* weight, float eps, size_t n, float* out) {
  if (n == 0) return;
  const float mean = SimdDot(x, x, n) / static_cast<float>(n);
  const V factor = hn::Set(D(), 1.0f / std::sqrt(mean + eps));
  Map2(x, weight, n, out, [&](V a, V w) HWY_ATTR { return hn::Mul(hn::Mul(a, factor), w); });
}

void SimdSiluMul(float* gate, const float* up, size_t n) {
  const D d;
  Map2(gate, up, n, gate, [&](V g, V u) HWY_ATTR {
    // exp overflows to infinity for gates below -88: the quotient is then 0, as it should be.
    const V e = hn::Exp(d, hn::Min(hn::Neg(g), hn::Set(d, 88.0f)));
    return hn::Mul(hn::Div(g, hn::Add(hn::Set(d, 1.0f), e)), u);
  });
}

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
void SimdGeluTanhMul(float* gate, const float* up, size_t n) {
  const D d;
  Map2(gate, up, n, gate, [&](V g, V u) HWY_ATTR {
    const V cubic = hn::Mul(g, hn::MulAdd(hn::Mul(g, g), hn::Set(d, kGeluCubic), hn::Set(d, kGeluLinear)));
    const V e = hn::Exp(d, hn::Min(hn::Neg(cubic), hn::Set(d, 88.0f)));
    return hn::Mul(hn::Div(g, hn::Add(hn::Set(d, 1.0f), e)), u);
  });
}

void SimdExp(float* x, size_t n) {
  const D d;
  Map(x, n, [&](V v) HWY_ATTR {
    // The polynomial is good up to 88.7; beyond, the result is infinite. Comparisons keep NaN a NaN.
    const V clamped = hn::IfThenElse(hn::Gt(v, hn::Set(d, 88.7228f)), hn::Set(d, 0.0f), v);
    const V e = hn::Exp(d, clamped);
    const V overflow = hn::Set(d, std::numeric_limits<float>::infinity());
    const V nan_kept = hn::IfThenElse(hn::Eq(v, v), e, v);
    return hn::IfThenElse(hn::Gt(v, hn::Set(d, 88.7228f)), overflow, nan_kept);
  });
}

void SimdScale(float* x, float factor, size_t n) {
  const V f = hn::Set(D(), factor);
  Map(x, n, [&](V v) HWY_ATTR { return hn::Mul(v, f); });
}

float SimdLogSumExp(const float* x, size_t n) {
  const D d;
  const float max = SimdMax(x, n);
  if (max == kNegativeInfinity) return max;
  const V shift = hn::Set(d, max);
  V sum = hn::Zero(d);
  Walk(
      n, [&](size_t i) HWY_ATTR { sum = hn::Add(sum, hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), shift))); },
      [&](size_t i, size_t count)
          HWY_ATTR { sum = hn::Add(sum, hn::Exp(d, hn::Sub(Padded(x + i, count, kNegativeInfinity).Load(), shift))); });
  return max + std::log(hn::GetLane(hn::SumOfLanes(d, sum)));
}

void SimdAdd(float* x, const float* y, size_t n) {
  Map2(x, y, n, x, [](V a, V b) HWY_ATTR { return hn::Add(a, b); });
}

void SimdAxpy(float* y, float a, const float* x, size_t n) {
  const V factor = hn::Set(D(), a);
  Map2(x, y, n, y, [&](V v, V acc) HWY_ATTR { return hn::MulAdd(factor, v, acc); });
}

// --- Conversions: a vector of floats and a half-size vector of 16-bit values ---

using D16 = hn::Rebind<uint16_t, D>;
using DHalf = hn::Rebind<hwy::float16_t, D>;

void SimdF32ToF16(const float* x, size_t n, uint16_t* out) {
  const auto round = [](V v) HWY_ATTR { return hn::BitCast(D16(), hn::DemoteTo(DHalf(), v)); };
  Walk(
      n, [&](size_t i) HWY_ATTR { hn::StoreU(round(hn::LoadU(D(), x + i)), D16(), out + i); },
      [&](size_t i, size_t count) HWY_ATTR {
        HWY_ALIGN uint16_t data[HWY_MAX_BYTES / sizeof(float)];
        hn::StoreU(round(Padded(x + i, count, 0.0f).Load()), D16(), data);
        std::memcpy(out + i, data, count * sizeof(uint16_t));
      });
}

void SimdF16ToF32(const uint16_t* x, size_t n, float* out) {
  const auto widen = [](hn::Vec<D16> v) HWY_ATTR { return hn::PromoteTo(D(), hn::BitCast(DHalf(), v)); };
  Walk(
      n, [&](size_t i) HWY_ATTR { hn::StoreU(widen(hn::LoadU(D16(), x + i)), D(), out + i); },
      [&](size_t i, size_t count) HWY_ATTR {
        HWY_ALIGN uint16_t data[HWY_MAX_BYTES / sizeof(float)] = {};
        std::memcpy(data, x + i, count * sizeof(uint16_t));
        StoreFirst(widen(hn::LoadU(D16(), data)), count, out + i);
      });
}

// Rows i .. i + kRows - 1 of a small product, kVectors vectors from column j on.
template <size_t kRows, size_t kVectors>
HWY_INLINE void ProductTile(size_t k, const float* a, size_t a_row, size_t a_column, const float* b, size_t b_row,
                            V (&sum)[kRows][kVectors]) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (size_t i = 0; i < kRows; ++i)
    for (size_t v = 0; v < kVectors; ++v) sum[i][v] = hn::Zero(d);
  for (size_t l = 0; l < k; ++l) {
    V column[kVectors];
    for (size_t v = 0; v < kVectors; ++v) column[v] = hn::LoadU(d, b + l * b_row + v * lanes);
    for (size_t i = 0; i < kRows; ++i) {
      const V factor = hn::Set(d, a[i * a_row + l * a_column]);
      for (size_t v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(factor, column[v], sum[i][v]);
    }
  }
}

template <size_t kRows>
void ProductRows(size_t n, size_t k, const float* a, size_t a_row, size_t a_column, const float* b, size_t b_row, float* c,
                 size_t c_row) {
  constexpr size_t kVectors = 4;
  const D d;
  const size_t lanes = hn::Lanes(d);
  size_t j = 0;
  for (; j + kVectors * lanes <= n; j += kVectors * lanes) {
    V sum[kRows][kVectors];
    ProductTile<kRows, kVectors>(k, a, a_row, a_column, b + j, b_row, sum);
    for (size_t i = 0; i < kRows; ++i)
      for (size_t v = 0; v < kVectors; ++v) hn::StoreU(sum[i][v], d, c + i * c_row + j + v * lanes);
  }
  for (; j + lanes <= n; j += lanes) {
    V sum[kRows][1];
    ProductTile<kRows, 1>(k, a, a_row, a_column, b + j, b_row, sum);
    for (size_t i = 0; i < kRows; ++i) hn::StoreU(sum[i][0], d, c + i * c_row + j);
  }
  for (; j < n; ++j)
    for (size_t i = 0; i < kRows; ++i) {
      float sum = 0;
      for (size_t l = 0; l < k; ++l) sum = std::fma(a[i * a_row + l * a_column], b[l * b_row + j], sum);
      c[i * c_row + j] = sum;
    }
}

void SimdSmallProduct(size_t m, size_t n, size_t k, const float* a, size_t a_row, size_t a_column, const float* b,
                      size_t b_row, float* c, size_t c_row) {
  size_t i = 0;
  for (; i + 4 <= m; i += 4) ProductRows<4>(n, k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row);
  for (; i < m; ++i) ProductRows<1>(n, k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace lesskv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lesskv {
namespace {

HWY_EXPORT(SimdDot);
HWY_EXPORT(SimdSum);
HWY_EXPORT(SimdMax);
HWY_EXPORT(SimdLowestRow);
HWY_EXPORT(SimdRmsNorm);
HWY_EXPORT(SimdSiluMul);
HWY_EXPORT(SimdGeluTanhMul);
HWY_EXPORT(SimdExp);
HWY_EXPORT(SimdScale);
HWY_EXPORT(SimdLogSumExp);
HWY_EXPORT(SimdAdd);
HWY_EXPORT(SimdAxpy);
HWY_EXPORT(SimdSmallProduct);
HWY_EXPORT(SimdF32ToF16);
HWY_EXPORT(SimdF16ToF32);

bool UseScalar() { return ActiveIsa() == Isa::kScalar; }

// --- The reference: plain loops ---

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

float ScalarMax(const float* x, size_t n) {
  float max = kNegativeInfinity;
  for (size_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

float ScalarDot(const float* a, const float* b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return static_cast<float>(sum);
}

}  // namespace

void RmsNorm(const float* x, const float* weight, float eps, size_t n, float* out) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdRmsNorm)(x, weight, eps, n, out);
  if (n == 0) return;
  const float factor = 1.0f / std::sqrt(ScalarDot(x, x, n) / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void SiluMul(float* gate, const float* up, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdSiluMul)(gate, up, n);
  for (size_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void LayerNorm(const float* x, const float* weight, const float* bias, float eps, size_t n, float* out) {
  if (n == 0) return;
  const float mean = Sum(x, n) / static_cast<float>(n);
  for (size_t i = 0; i < n; ++i) out[i] = x[i] - mean;
  const float factor = 1.0f / std::sqrt(Dot(out, out, n) / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) out[i] = out[i] * factor * weight[i] + bias[i];
}

void GeluTanhMul(float* gate, const float* up, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdGeluTanhMul)(gate, up, n);
  for (size_t i = 0; i < n; ++i) {
    const float x = gate[i], twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2u, 2 sqrt(2 / pi)
    gate[i] = x / (1.0f + std::exp(-twice)) * up[i];
  }
}

void Gelu(float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) x[i] = 0.5f * x[i] * std::erfc(x[i] * -0.70710678118654752f);
}

float LogSumExp(const float* x, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdLogSumExp)(x, n);
  const float max = ScalarMax(x, n);
  if (max == kNegativeInfinity) return max;
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(x[i] - max);
  return max + static_cast<float>(std::log(sum));
}

void Exp(float* x, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdExp)(x, n);
  for (size_t i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}

float Dot(const float* a, const float* b, size_t n) {
  return UseScalar() ? ScalarDot(a, b, n) : HWY_DYNAMIC_DISPATCH(SimdDot)(a, b, n);
}

float Sum(const float* x, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdSum)(x, n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i];
  return static_cast<float>(sum);
}

float Max(const float* x, size_t n) { return UseScalar() ? ScalarMax(x, n) : HWY_DYNAMIC_DISPATCH(SimdMax)(x, n); }

void Add(float* x, const float* y, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdAdd)(x, y, n);
  for (size_t i = 0; i < n; ++i) x[i] += y[i];
}

void Scale(float* x, float factor, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdScale)(x, factor, n);
  for (size_t i = 0; i < n; ++i) x[i] *= factor;
}

void Axpy(float* y, float a, const float* x, size_t n) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdAxpy)(y, a, x, n);
  for (size_t i = 0; i < n; ++i) y[i] += a * x[i];
}

size_t ArgMax(const float* x, size_t n) {
  // The largest value first, then its lowest index: two simple passes instead of carrying indices in vectors.
  const float max = Max(x, n);
  for (size_t i = 0; i < n; ++i) {
    if (x[i] == max) return i;
  }
  return 0;
}

void SmallProduct(size_t m, size_t n, size_t k, const float* a, size_t a_row, size_t a_column, const float* b, size_t b_row,
                  float* c, size_t c_row) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdSmallProduct)(m, n, k, a, a_row, a_column, b, b_row, c, c_row);
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < n; ++j) {
      float sum = 0;
      for (size_t l = 0; l < k; ++l) sum += a[i * a_row + l * a_column] * b[l * b_row + j];
      c[i * c_row + j] = sum;
    }
}

size_t LowestRow(const float* values, const int32_t* positions, size_t n, int32_t begin, int32_t end) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdLowestRow)(values, positions, n, begin, end);
  HWY_NAMESPACE::LowestRowSearch search{values, positions, n, begin, end};
  for (size_t r = 0; r < n; ++r) search.Consider(r);
  return search.lowest;
}

void F32ToF16(const float* x, size_t n, uint16_t* out) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdF32ToF16)(x, n, out);
  for (size_t i = 0; i < n; ++i) out[i] = FloatToHalf(x[i]);
}

void F16ToF32(const uint16_t* x, size_t n, float* out) {
  if (!UseScalar()) return HWY_DYNAMIC_DISPATCH(SimdF16ToF32)(x, n, out);
  for (size_t i = 0; i < n; ++i) out[i] = HalfToFloat(x[i]);
}

}  // namespace lesskv
#endif  // HWY_ONCE
