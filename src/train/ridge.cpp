#include "train/ridge.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kvcache/residual/attention_fit.h"

namespace lesskv::train {
namespace {

constexpr size_t kBlock = 4;  // samples added to the product at a time

double Dot(const double* a, const double* b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// w' XX w from the lower half.
double Quadratic(const double* w, const RidgeSums& sums) {
  double total = 0;
  for (size_t i = 0; i < sums.width; ++i) {
    const double* row = &sums.xx[i * sums.width];
    total += w[i] * (2 * Dot(row, w, i) + row[i] * w[i]);
  }
  return total;
}

// Deviations of the features; 0 where a feature hardly varies.
std::vector<double> Deviations(const RidgeSums& sums) {
  std::vector<double> deviation(sums.width);
  for (size_t i = 0; i < sums.width; ++i) {
    const double mean = sums.x[i] / sums.n;
    deviation[i] = std::sqrt(std::max(0.0, sums.xx[i * sums.width + i] / sums.n - mean * mean));
  }
  const double largest = *std::max_element(deviation.begin(), deviation.end());
  for (double& d : deviation)
    if (d < 1e-6 * largest) d = 0;
  return deviation;
}

}  // namespace

RidgeSums::RidgeSums(size_t of_width, size_t of_targets)
    : width(of_width), n_targets(of_targets), x(of_width), xx(of_width * of_width), y(of_targets), yy(of_targets),
      xy(of_targets * of_width) {}

void RidgeSums::Add(const float* samples, std::span<const float* const> targets, size_t count) {
  std::vector<double> block(kBlock * width);
  for (size_t first = 0; first < count; first += kBlock) {
    std::fill(block.begin(), block.end(), 0.0);
    std::copy(samples + first * width, samples + std::min(first + kBlock, count) * width, block.begin());
    const double *a = &block[0], *b = &block[width], *c = &block[2 * width], *d = &block[3 * width];
    for (size_t i = 0; i < width; ++i) {
      double* row = &xx[i * width];
      for (size_t j = 0; j <= i; ++j) row[j] += a[i] * a[j] + b[i] * b[j] + c[i] * c[j] + d[i] * d[j];
      x[i] += a[i] + b[i] + c[i] + d[i];
    }
  }
  for (size_t t = 0; t < n_targets; ++t)
    for (size_t s = 0; s < count; ++s) {
      const double value = targets[t][s];
      y[t] += value;
      yy[t] += value * value;
      for (size_t i = 0; i < width; ++i) xy[t * width + i] += value * static_cast<double>(samples[s * width + i]);
    }
  n += static_cast<double>(count);
}

void RidgeSums::Add(const RidgeSums& other) {
  const auto add = [](std::vector<double>& to, const std::vector<double>& from) {
    std::transform(to.begin(), to.end(), from.begin(), to.begin(), [](double a, double b) { return a + b; });
  };
  CHECK(width == other.width && n_targets == other.n_targets);
  n += other.n;
  add(x, other.x), add(xx, other.xx), add(y, other.y), add(yy, other.yy), add(xy, other.xy);
}

RidgeFit FitRidge(const RidgeSums& sums, double lambda) {
  const size_t d = sums.width, n_targets = sums.n_targets;
  const std::vector<double> deviation = Deviations(sums);
  std::vector<double> gram(d * d), solved(d * n_targets);
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j <= i; ++j) {
      const double scale = deviation[i] * deviation[j];
      if (scale > 0) gram[i * d + j] = (sums.xx[i * d + j] - sums.x[i] * sums.x[j] / sums.n) / scale;
    }
    gram[i * d + i] += deviation[i] > 0 ? lambda * sums.n : 1;
    for (size_t t = 0; t < n_targets && deviation[i] > 0; ++t)
      solved[i * n_targets + t] = (sums.xy[t * d + i] - sums.x[i] * sums.y[t] / sums.n) / deviation[i];
  }
  SolveCholesky(gram, solved, d, n_targets);
  RidgeFit fit{std::vector<double>(n_targets * d), std::vector<double>(n_targets)};
  for (size_t t = 0; t < n_targets; ++t) {
    double* w = &fit.weight[t * d];
    for (size_t i = 0; i < d; ++i) w[i] = deviation[i] > 0 ? solved[i * n_targets + t] / deviation[i] : 0;
    fit.bias[t] = (sums.y[t] - Dot(w, sums.x.data(), d)) / sums.n;
  }
  return fit;
}

std::vector<double> MeanSquaredError(const RidgeFit& fit, const RidgeSums& sums) {
  std::vector<double> errors;
  for (size_t t = 0; t < sums.n_targets; ++t) {
    const double* w = &fit.weight[t * sums.width];
    const double b = fit.bias[t], wx = Dot(w, sums.x.data(), sums.width);
    const double cross = b * sums.y[t] + Dot(w, &sums.xy[t * sums.width], sums.width);
    const double square = sums.n * b * b + 2 * b * wx + Quadratic(w, sums);
    errors.push_back((sums.yy[t] - 2 * cross + square) / sums.n);
  }
  return errors;
}

std::vector<double> SquaredCorrelation(const RidgeFit& fit, const RidgeSums& sums) {
  std::vector<double> result;
  for (size_t t = 0; t < sums.n_targets; ++t) {
    const double* w = &fit.weight[t * sums.width];
    const double wx = Dot(w, sums.x.data(), sums.width);
    const double both = Dot(w, &sums.xy[t * sums.width], sums.width) - wx * sums.y[t] / sums.n;
    const double predicted = Quadratic(w, sums) - wx * wx / sums.n, target = sums.yy[t] - sums.y[t] * sums.y[t] / sums.n;
    result.push_back(predicted > 0 && target > 0 ? both * both / (predicted * target) : 0);
  }
  return result;
}

}  // namespace lesskv::train
