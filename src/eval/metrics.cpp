#include "eval/metrics.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {

double LogMass(std::span<const float> logits) {
  CHECK(!logits.empty());
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  const double mass = largest + std::log(sum);
  if (!std::isfinite(mass))
    Fail(ErrorCode::kRuntime, "the model's logits are not finite numbers, so nothing can be measured; its weights may be damaged");
  return mass;
}

double KlDivergence(const ReferenceDistribution& p, std::span<const float> q_logits, double q_log_mass) {
  CHECK(p.logits.size() == q_logits.size() && p.probabilities.size() == q_logits.size(), "{} and {} logits",
        p.logits.size(), q_logits.size());
  double sum = 0;
  for (size_t i = 0; i < q_logits.size(); ++i) {
    const double log_ratio = (p.logits[i] - p.log_mass) - (q_logits[i] - q_log_mass);
    sum += p.probabilities[i] * log_ratio;
  }
  return std::max(sum, 0.0);
}

double Percentile(std::vector<double> values, double percent) {
  if (values.empty()) return kNotANumber;
  const double at = percent / 100 * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::ptrdiff_t>(std::floor(at));
  std::nth_element(values.begin(), values.begin() + low, values.end());
  const double below = values[static_cast<size_t>(low)];
  const double fraction = at - static_cast<double>(low);
  if (fraction == 0) return below;
  const double above = *std::min_element(values.begin() + low + 1, values.end());
  return below + fraction * (above - below);
}

void ClusteredMean::Add(double sum, size_t count) {
  if (count == 0) return;
  clusters_.push_back({sum, count});
  sum_ += sum;
  count_ += count;
}

double ClusteredMean::Mean() const { return count_ == 0 ? kNotANumber : sum_ / static_cast<double>(count_); }

double ClusteredMean::StandardError() const {
  if (clusters_.size() < 2) return kNotANumber;
  const double mean = Mean();
  double squares = 0;
  for (const Cluster& cluster : clusters_) {
    const double residual = cluster.sum - mean * static_cast<double>(cluster.count);
    squares += residual * residual;
  }
  const double n = static_cast<double>(clusters_.size());
  return std::sqrt(squares * n / (n - 1)) / static_cast<double>(count_);
}

}  // namespace lesskv
