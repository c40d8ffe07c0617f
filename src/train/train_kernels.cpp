#include "train/train_kernels.h"

#include <dnnl.h>
#include <omp.h>

#include <cmath>

#include "base/check.h"
#include "kernels/basic/cpu.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "train/train_kernels.cpp"
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace lesskv::train {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

struct GeluPair {
  VF act, slope;
};

// As in the cache's fused maps: Abramowitz and Stegun 7.1.26 for the tail; the slope is Phi(x) + x phi(x).
HWY_INLINE GeluPair GeluBoth(DF df, VF x) {
  const VF one = hn::Set(df, 1.0f), half = hn::Set(df, 0.5f);
  const VF y = hn::Mul(hn::Abs(x), hn::Set(df, 0.70710678f));
  const VF t = hn::Div(one, hn::MulAdd(y, hn::Set(df, 0.3275911f), one));
  VF p = hn::MulAdd(t, hn::Set(df, 1.061405429f), hn::Set(df, -1.453152027f));
  p = hn::MulAdd(p, t, hn::Set(df, 1.421413741f));
  p = hn::MulAdd(p, t, hn::Set(df, -0.284496736f));
  p = hn::Mul(hn::MulAdd(p, t, hn::Set(df, 0.254829592f)), t);
  const VF e = hn::Exp(df, hn::Max(hn::Neg(hn::Mul(y, y)), hn::Set(df, -80.0f)));
  const VF tail = hn::Mul(half, hn::Mul(p, e));  // mass beyond |x|
  const VF cdf = hn::IfThenElse(hn::Ge(x, hn::Zero(df)), hn::Sub(one, tail), tail);
  return {hn::Mul(x, cdf), hn::MulAdd(hn::Mul(x, e), hn::Set(df, 0.39894228f), cdf)};
}

template <bool kSlope>
HWY_INLINE void GeluLoop(const float* p, size_t n, float* act, float* slope) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const GeluPair g = GeluBoth(df, hn::LoadU(df, p + i));
    hn::StoreU(g.act, df, act + i);
    if (kSlope) hn::StoreU(g.slope, df, slope + i);
  }
  if (i == n) return;
  HWY_ALIGN float rest[HWY_MAX_BYTES / sizeof(float)] = {};
  for (size_t j = i; j < n; ++j) rest[j - i] = p[j];
  const GeluPair g = GeluBoth(df, hn::Load(df, rest));
  hn::Store(g.act, df, rest);
  for (size_t j = i; j < n; ++j) act[j] = rest[j - i];
  hn::Store(g.slope, df, rest);
  for (size_t j = i; kSlope && j < n; ++j) slope[j] = rest[j - i];
}

void GeluWithSlope(const float* p, size_t n, float* act, float* slope) { GeluLoop<true>(p, n, act, slope); }
void Gelu(const float* p, size_t n, float* act) { GeluLoop<false>(p, n, act, nullptr); }

void Multiply(float* x, const float* y, size_t n) {
  const DF df;
  size_t i = 0;
  for (; i + hn::Lanes(df) <= n; i += hn::Lanes(df))
    hn::StoreU(hn::Mul(hn::LoadU(df, x + i), hn::LoadU(df, y + i)), df, x + i);
  for (; i < n; ++i) x[i] *= y[i];
}

void Axpy(float a, const float* x, size_t n, float* y) {
  const DF df;
  const VF va = hn::Set(df, a);
  size_t i = 0;
  for (; i + hn::Lanes(df) <= n; i += hn::Lanes(df))
    hn::StoreU(hn::MulAdd(va, hn::LoadU(df, x + i), hn::LoadU(df, y + i)), df, y + i);
  for (; i < n; ++i) y[i] += a * x[i];
}

void RowDots(const float* h, const float* x, size_t rank, size_t dim, float* out) {
  const DF df;
  for (size_t r = 0; r < rank; ++r) {
    VF sum = hn::Zero(df);
    size_t d = 0;
    for (; d + hn::Lanes(df) <= dim; d += hn::Lanes(df))
      sum = hn::MulAdd(hn::LoadU(df, h + r * dim + d), hn::LoadU(df, x + d), sum);
    float total = hn::GetLane(hn::SumOfLanes(df, sum));
    for (; d < dim; ++d) total += h[r * dim + d] * x[d];
    out[r] = total;
  }
}

void AddOuter(const float* a, const float* x, size_t rank, size_t dim, float* h) {
  for (size_t r = 0; r < rank; ++r) Axpy(a[r], x, dim, h + r * dim);
}

void Adam(const AdamStep& step, const float* gradient, size_t n, float* parameters, float* m, float* v) {
  const DF df;
  const size_t lanes = hn::Lanes(df);
  const VF b1 = hn::Set(df, step.beta1), c1 = hn::Set(df, 1 - step.beta1);
  const VF b2 = hn::Set(df, step.beta2), c2 = hn::Set(df, 1 - step.beta2);
  const VF rate = hn::Set(df, step.rate), epsilon = hn::Set(df, step.epsilon);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF g = hn::LoadU(df, gradient + i);
    const VF mi = hn::MulAdd(b1, hn::LoadU(df, m + i), hn::Mul(c1, g));
    const VF vi = hn::MulAdd(b2, hn::LoadU(df, v + i), hn::Mul(c2, hn::Mul(g, g)));
    hn::StoreU(mi, df, m + i);
    hn::StoreU(vi, df, v + i);
    const VF change = hn::Div(hn::Mul(rate, mi), hn::Add(hn::Sqrt(vi), epsilon));
    hn::StoreU(hn::Sub(hn::LoadU(df, parameters + i), change), df, parameters + i);
  }
  for (; i < n; ++i) {
    m[i] = step.beta1 * m[i] + (1 - step.beta1) * gradient[i];
    v[i] = step.beta2 * v[i] + (1 - step.beta2) * gradient[i] * gradient[i];
    parameters[i] -= step.rate * m[i] / (std::sqrt(v[i]) + step.epsilon);
  }
}

struct Table {
  decltype(&GeluWithSlope) gelu_with_slope = GeluWithSlope;
  decltype(&Gelu) gelu = Gelu;
  decltype(&Multiply) multiply = Multiply;
  decltype(&Axpy) axpy = Axpy;
  decltype(&RowDots) row_dots = RowDots;
  decltype(&AddOuter) add_outer = AddOuter;
  decltype(&Adam) adam = Adam;
};

}  // namespace HWY_NAMESPACE
}  // namespace lesskv::train
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lesskv::train {
namespace {

// One table; the same pointers for every instruction set.
struct Kernels {
  void (*gelu_with_slope)(const float*, size_t, float*, float*);
  void (*gelu)(const float*, size_t, float*);
  void (*multiply)(float*, const float*, size_t);
  void (*axpy)(float, const float*, size_t, float*);
  void (*row_dots)(const float*, const float*, size_t, size_t, float*);
  void (*add_outer)(const float*, const float*, size_t, size_t, float*);
  void (*adam)(const AdamStep&, const float*, size_t, float*, float*, float*);
};

template <typename Table>
Kernels From(const Table& t) {
  return {t.gelu_with_slope, t.gelu, t.multiply, t.axpy, t.row_dots, t.add_outer, t.adam};
}

// Below AVX2 the compiler's own target (SSE2 on x86-64) serves: training has no scalar twin of its own, its reference
// is the double-precision masked form of the tests.
const Kernels& Active() {
#if defined(__x86_64__)
  static const Kernels avx512 = From(N_AVX3::Table()), avx2 = From(N_AVX2::Table());
  static const Kernels base = From(HWY_STATIC_DISPATCH(Table)());
  const Isa isa = ActiveIsa();
  return isa >= Isa::kAvx512 ? avx512 : isa >= Isa::kAvx2 ? avx2 : base;
#else
  static const Kernels base = From(HWY_STATIC_DISPATCH(Table)());
  return base;
#endif
}

}  // namespace

void Gemm(bool transpose_a, bool transpose_b, size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b,
          size_t ldb, float* c, size_t ldc, bool accumulate) {
  if (m == 0 || n == 0) return;
  // oneDNN's own threads would come on top of the pool's, from which this is called.
  thread_local const bool on_this_thread = (omp_set_num_threads(1), true);
  static_cast<void>(on_this_thread);
  const dnnl_status_t status = dnnl_sgemm(
      transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', static_cast<dnnl_dim_t>(m), static_cast<dnnl_dim_t>(n),
      static_cast<dnnl_dim_t>(k), 1.0f, a, static_cast<dnnl_dim_t>(lda), b, static_cast<dnnl_dim_t>(ldb),
      accumulate ? 1.0f : 0.0f, c, static_cast<dnnl_dim_t>(ldc));
  CHECK(status == dnnl_success, "oneDNN status {}", static_cast<int>(status));
}

void GeluWithSlope(const float* p, size_t n, float* act, float* slope) { Active().gelu_with_slope(p, n, act, slope); }
void Gelu(const float* p, size_t n, float* act) { Active().gelu(p, n, act); }
void Multiply(float* x, const float* y, size_t n) { Active().multiply(x, y, n); }

void AddBias(float* x, const float* bias, size_t rows, size_t n) {
  for (size_t i = 0; i < rows; ++i) Active().axpy(1.0f, bias, n, x + i * n);
}

void AddColumnSums(const float* x, size_t rows, size_t n, float* sums) {
  for (size_t i = 0; i < rows; ++i) Active().axpy(1.0f, x + i * n, n, sums);
}

void RowDots(const float* h, const float* x, size_t rank, size_t dim, float* out) {
  Active().row_dots(h, x, rank, dim, out);
}

void AddOuter(const float* a, const float* x, size_t rank, size_t dim, float* h) {
  Active().add_outer(a, x, rank, dim, h);
}

void Adam(const AdamStep& step, const float* gradient, size_t n, float* parameters, float* m, float* v) {
  Active().adam(step, gradient, n, parameters, m, v);
}

}  // namespace lesskv::train
#endif
