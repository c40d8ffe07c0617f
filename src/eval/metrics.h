// The arithmetic of evaluation: all sums, logarithms and errors are in double.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace lesskv {

// log(sum(exp(logits))): the log-probability of token t is logits[t] - LogMass(logits). Needs one element or more. Throws
// Error (kRuntime) when it is no finite number, as of logits with a NaN or an infinity: no measure rests on such.
double LogMass(std::span<const float> logits);

// A next-token distribution that others are compared with.
struct ReferenceDistribution {
  std::span<const float> logits;
  std::span<const float> probabilities;  // exp(logits - log_mass)
  double log_mass;
};

// KL(p || q) in nats; `q_log_mass` is LogMass(q_logits). Rounding can make the sum of two nearly equal distributions
// slightly negative; it is 0 then. Equal logits give exactly 0.
double KlDivergence(const ReferenceDistribution& p, std::span<const float> q_logits, double q_log_mass);

// The value below which `percent` of the values lie, interpolated linearly between neighbours (0: the smallest,
// 100: the largest). NaN for no values.
double Percentile(std::vector<double> values, double percent);

inline constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// The mean of many measurements that come in clusters (the tokens of a window, the samples of a prompt), and its
// standard error. Measurements of one cluster depend on each other, so the error is that of a ratio of cluster sums
// (Cochran, Sampling Techniques, eq. 6.13), not the far smaller one of independent measurements. With clusters of one
// measurement each it is the usual s / sqrt(n).
class ClusteredMean {
 public:
  void Add(double sum, size_t count);
  void AddOne(double value) { Add(value, 1); }

  size_t count() const { return count_; }
  double Sum() const { return sum_; }
  double Mean() const;           // NaN when empty
  double StandardError() const;  // NaN for fewer than two clusters

 private:
  struct Cluster {
    double sum;
    size_t count;
  };
  std::vector<Cluster> clusters_;
  double sum_ = 0;
  size_t count_ = 0;
};

}  // namespace lesskv
