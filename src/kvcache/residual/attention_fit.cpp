#include "kvcache/residual/attention_fit.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace lesskv {
namespace {

constexpr int kMostSteps = 500;
constexpr int kStepsBetweenChecks = 4;
constexpr double kTolerance = 1e-6;

// Eight sums side by side, which do not wait for each other.
double Dot(const double* a, const double* b, size_t n) {
  double sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (size_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) sums[i % 8] += a[i] * b[i];
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

double SumOfSquares(std::span<const double> x) { return Dot(x.data(), x.data(), x.size()); }

void AddTimes(double* y, double a, const double* x, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// X^T X [n, n] of x [rows, n], and X X^T [rows, rows].
std::vector<double> GramOfColumns(std::span<const double> x, size_t n) {
  std::vector<double> gram(n * n);
  for (size_t r = 0; r < x.size(); r += n)
    for (size_t i = 0; i < n; ++i) AddTimes(&gram[i * n], x[r + i], &x[r], i + 1);
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < i; ++j) gram[j * n + i] = gram[i * n + j];
  return gram;
}

std::vector<double> GramOfRows(std::span<const double> x, size_t n) {
  const size_t rows = x.size() / n;
  std::vector<double> gram(rows * rows);
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j <= i; ++j)
      gram[i * rows + j] = gram[j * rows + i] = Dot(&x[i * n], &x[j * n], n);
  return gram;
}

// y = H x.
void Times(std::span<const double> h, std::span<const double> x, std::span<double> y) {
  for (size_t i = 0; i < y.size(); ++i) y[i] = Dot(x.data(), &h[i * x.size()], x.size());
}

// The largest slope of |A w - m|^2 / 2 that leads within the bounds.
double Residual(std::span<const double> h, std::span<const double> b, std::span<const double> w, const MassFit& fit) {
  std::vector<double> slope(w.size());
  Times(h, w, slope);
  double residual = 0;
  for (size_t j = 0; j < w.size(); ++j) {
    const double g = slope[j] - b[j];
    if ((w[j] > fit.lowest || g < 0) && (w[j] < fit.highest || g > 0)) residual = std::max(residual, std::abs(g));
  }
  return residual;
}

// An upper bound of the largest eigenvalue of a symmetric matrix that is close to it where entries are not negative.
double LargestRowSum(const std::vector<double>& h, size_t n) {
  double most = 0;
  for (size_t i = 0; i < n; ++i) {
    double sum = 0;
    for (size_t j = 0; j < n; ++j) sum += std::abs(h[i * n + j]);
    most = std::max(most, sum);
  }
  return most;
}

}  // namespace

void SolveCholesky(std::vector<double>& s, std::vector<double>& b, size_t k, size_t dim) {
  for (size_t j = 0; j < k; ++j) {
    for (size_t i = j; i < k; ++i) s[i * k + j] -= Dot(&s[i * k], &s[j * k], j);
    const double root = std::sqrt(s[j * k + j]);
    for (size_t i = j; i < k; ++i) s[i * k + j] /= root;
  }
  for (size_t i = 0; i < k; ++i) {
    for (size_t j = 0; j < i; ++j) AddTimes(&b[i * dim], -s[i * k + j], &b[j * dim], dim);
    for (size_t c = 0; c < dim; ++c) b[i * dim + c] /= s[i * k + i];
  }
  for (size_t i = k; i-- > 0;) {
    for (size_t c = 0; c < dim; ++c) b[i * dim + c] /= s[i * k + i];
    for (size_t j = 0; j < i; ++j) AddTimes(&b[j * dim], -s[i * k + j], &b[i * dim], dim);
  }
}

std::vector<double> FitMass(std::span<const double> a, std::span<const double> m, size_t n, const MassFit& fit) {
  CHECK(a.size() == m.size() * n && fit.lowest <= fit.highest);
  CHECK(fit.towards.empty() || fit.towards.size() == n);
  const auto drawn_to = [&](size_t j) { return fit.towards.empty() ? 1.0 : fit.towards[j]; };
  std::vector<double> w(n);
  for (size_t j = 0; j < n; ++j) w[j] = std::clamp(drawn_to(j), fit.lowest, fit.highest);
  if (m.empty() || n == 0) return w;
  const double mu = fit.ridge * SumOfSquares(a) / static_cast<double>(n);
  std::vector<double> h = GramOfColumns(a, n), b(n);
  for (size_t q = 0; q < m.size(); ++q) AddTimes(b.data(), m[q], &a[q * n], n);
  double largest = 0;
  for (const double x : b) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < n; ++i) h[i * n + i] += mu, b[i] += mu * drawn_to(i);
  const double step = 1 / LargestRowSum(h, n);
  if (!std::isfinite(step)) return w;
  std::vector<double> ahead = w, gradient(n), next(n);
  double momentum = 1;
  for (int i = 0; i < kMostSteps; ++i) {
    if (i % kStepsBetweenChecks == 0 && Residual(h, b, w, fit) <= kTolerance * largest) break;
    Times(h, ahead, gradient);
    double forward = 0;
    for (size_t j = 0; j < n; ++j) {
      next[j] = std::clamp(ahead[j] - step * (gradient[j] - b[j]), fit.lowest, fit.highest);
      forward += (ahead[j] - next[j]) * (next[j] - w[j]);
    }
    // Nesterov's sequence, begun anew where it overshoots (O'Donoghue and Candes, arXiv 1204.3982).
    const double grown = forward > 0 ? 1 : (1 + std::sqrt(1 + 4 * momentum * momentum)) / 2;
    const double beta = forward > 0 ? 0 : (momentum - 1) / grown;
    for (size_t j = 0; j < n; ++j) ahead[j] = next[j] + beta * (next[j] - w[j]);
    momentum = grown;
    w = next;
  }
  return w;
}

std::vector<double> FitValues(std::span<const double> x, std::span<const double> y, std::span<const double> v, size_t n,
                              size_t dim, double ridge) {
  const size_t rows = n == 0 ? 0 : x.size() / n;
  CHECK(x.size() == rows * n && y.size() == rows * dim && v.size() == n * dim && ridge > 0);
  std::vector<double> c(v.begin(), v.end());
  const double squares = SumOfSquares(x);
  if (rows == 0 || squares == 0) return c;
  const double lambda = ridge * squares / static_cast<double>(n);
  std::vector<double> rest(y.begin(), y.end());  // Y - X V
  for (size_t q = 0; q < rows; ++q)
    for (size_t i = 0; i < n; ++i) AddTimes(&rest[q * dim], -x[q * n + i], &v[i * dim], dim);
  const bool primal = rows >= n;
  const size_t k = primal ? n : rows;
  std::vector<double> s = primal ? GramOfColumns(x, n) : GramOfRows(x, n);
  for (size_t i = 0; i < k; ++i) s[i * k + i] += lambda;
  const auto add_transposed = [&](std::vector<double>& to) {  // to += X^T rest
    for (size_t q = 0; q < rows; ++q)
      for (size_t i = 0; i < n; ++i) AddTimes(&to[i * dim], x[q * n + i], &rest[q * dim], dim);
  };
  if (primal) {
    std::vector<double> b(n * dim);
    add_transposed(b);
    SolveCholesky(s, b, k, dim);
    AddTimes(c.data(), 1, b.data(), c.size());
  } else {
    SolveCholesky(s, rest, k, dim);
    add_transposed(c);
  }
  return c;
}

double OutputError(std::span<const double> x, std::span<const double> c, std::span<const double> y, size_t n, size_t dim) {
  double error = 0;
  std::vector<double> row(dim);
  for (size_t q = 0; q * dim < y.size(); ++q) {
    for (size_t d = 0; d < dim; ++d) row[d] = -y[q * dim + d];
    for (size_t i = 0; i < n; ++i) AddTimes(row.data(), x[q * n + i], &c[i * dim], dim);
    error += SumOfSquares(row);
  }
  return error;
}

}  // namespace lesskv
