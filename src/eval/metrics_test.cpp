#include "eval/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"

namespace lesskv {
namespace {

TEST(MetricsTest, LogMassOfEqualLogitsIsTheirCount) {
  const std::vector<float> logits(8, 3.0f);
  EXPECT_NEAR(LogMass(logits), 3.0 + std::log(8.0), 1e-14);
}

TEST(MetricsTest, LogMassSurvivesHugeAndTinyLogits) {
  EXPECT_NEAR(LogMass(std::vector<float>{10000.0f, 10000.0f}), 10000.0 + std::log(2.0), 1e-9);
  EXPECT_NEAR(LogMass(std::vector<float>{-10000.0f, -20000.0f}), -10000.0, 1e-9);
}

TEST(MetricsTest, NothingIsMeasuredByLogitsThatAreNoNumbers) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const std::vector<float>& logits : {std::vector{nan, 1.0f}, {1.0f, nan}, {1.0f, infinity}, {-infinity, -infinity}})
    EXPECT_THROW(LogMass(logits), Error);
  EXPECT_EQ(LogMass(std::vector{-infinity, 2.0f}), 2.0);  // a token that cannot come is one
}

double Kl(const std::vector<float>& p, const std::vector<float>& q) {
  const double log_mass = LogMass(p);
  std::vector<float> probabilities;
  for (const float logit : p) probabilities.push_back(static_cast<float>(std::exp(logit - log_mass)));
  return KlDivergence({p, probabilities, log_mass}, q, LogMass(q));
}

// p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
TEST(MetricsTest, KlDivergenceByHand) {
  EXPECT_NEAR(Kl({0.0f, 0.0f}, {0.0f, std::log(3.0f)}), 0.5 * std::log(4.0 / 3.0), 1e-7);
  EXPECT_NEAR(Kl({0.0f, std::log(3.0f)}, {0.0f, 0.0f}), 0.75 * std::log(3.0) - std::log(2.0), 1e-7);  // not symmetric
}

TEST(MetricsTest, KlDivergenceIgnoresAShiftAndIsZeroForEqualLogits) {
  EXPECT_EQ(Kl({0.5f, -1.25f, 2.0f}, {0.5f, -1.25f, 2.0f}), 0.0);
  EXPECT_NEAR(Kl({0.5f, -1.25f, 2.0f}, {4.5f, 2.75f, 6.0f}), 0.0, 1e-14);
}

TEST(MetricsTest, PercentileInterpolates) {
  const std::vector<double> values = {40, 10, 30, 20, 50};
  EXPECT_EQ(Percentile(values, 0), 10);
  EXPECT_EQ(Percentile(values, 50), 30);
  EXPECT_EQ(Percentile(values, 100), 50);
  EXPECT_DOUBLE_EQ(Percentile(values, 95), 48);  // index 3.8: 40 + 0.8 * 10
  EXPECT_EQ(Percentile({7}, 99), 7);
  EXPECT_TRUE(std::isnan(Percentile({}, 50)));
}

// Values 1, 2, 3, 4: mean 2.5, s^2 = 5/3, standard error sqrt(5/3/4).
TEST(MetricsTest, SingleMeasurementsGiveTheUsualStandardError) {
  ClusteredMean mean;
  for (const double value : {1.0, 2.0, 3.0, 4.0}) mean.AddOne(value);
  EXPECT_DOUBLE_EQ(mean.Mean(), 2.5);
  EXPECT_DOUBLE_EQ(mean.StandardError(), std::sqrt(5.0 / 12.0));
}

// Clusters (sum 4, n 2) and (sum 2, n 4): mean 1; residuals 2 and -2; error sqrt(8 * 2/1) / 6.
TEST(MetricsTest, ClustersOfDifferentSizes) {
  ClusteredMean mean;
  mean.Add(4, 2);
  mean.Add(0, 0);  // no measurement, no cluster
  mean.Add(2, 4);
  EXPECT_EQ(mean.count(), 6u);
  EXPECT_DOUBLE_EQ(mean.Mean(), 1.0);
  EXPECT_DOUBLE_EQ(mean.StandardError(), 4.0 / 6.0);
}

TEST(MetricsTest, TooFewClustersHaveNoError) {
  ClusteredMean mean;
  EXPECT_TRUE(std::isnan(mean.Mean()));
  mean.Add(3, 3);
  EXPECT_EQ(mean.Mean(), 1.0);
  EXPECT_TRUE(std::isnan(mean.StandardError()));
}

}  // namespace
}  // namespace lesskv
