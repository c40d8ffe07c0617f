// Ridge regression from sums, so that texts need not be kept: features are standardised, the intercept is free.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace lesskv::train {

// Sums over samples x [width] with targets y [n_targets], in double.
class RidgeSums {
 public:
  RidgeSums(size_t width, size_t n_targets);

  // x [n, width]; y[t] points to the n values of target t.
  void Add(const float* x, std::span<const float* const> y, size_t n);
  void Add(const RidgeSums& other);

  double n = 0;
  size_t width, n_targets;
  std::vector<double> x, xx;   // [width], [width, width] (lower half)
  std::vector<double> y, yy;   // [n_targets]
  std::vector<double> xy;      // [n_targets, width]
};

struct RidgeFit {
  std::vector<double> weight;  // [n_targets, width]
  std::vector<double> bias;    // [n_targets]
};

// Minimises sum of (b + w z - y)^2 + lambda n |w|^2 over standardised features z; what does not vary weighs 0.
RidgeFit FitRidge(const RidgeSums& sums, double lambda);

// On other samples, a target each: mean squared error, and the squared correlation of prediction and target.
std::vector<double> MeanSquaredError(const RidgeFit& fit, const RidgeSums& sums);
std::vector<double> SquaredCorrelation(const RidgeFit& fit, const RidgeSums& sums);

}  // namespace lesskv::train
