#include "kernels/basic/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/rng.h"

namespace lesskv {
namespace {

std::vector<float> RandomVector(size_t n, Rng& rng) {
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

double Dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

std::vector<float> Rotated(const RopeTable& table, std::vector<float> x, int32_t position) {
  RotateRows(table, x.data(), 1, x.size(), 1, x.size(), &position);
  return x;
}

class RopeTest : public testing::TestWithParam<RopeStyle> {};

TEST_P(RopeTest, PositionZeroIsTheIdentity) {
  Rng rng(1);
  const RopeTable table({.n_dims = 64, .style = GetParam()});
  const std::vector<float> x = RandomVector(64, rng);
  EXPECT_EQ(Rotated(table, x, 0), x);
}

TEST_P(RopeTest, LengthIsKeptAndProductsDependOnTheDistanceOnly) {
  Rng rng(2);
  const RopeTable table({.n_dims = 64, .style = GetParam()});
  for (int trial = 0; trial < 20; ++trial) {
    const std::vector<float> q = RandomVector(64, rng), k = RandomVector(64, rng);
    const int32_t a = static_cast<int32_t>(rng.Below(100000)), b = static_cast<int32_t>(rng.Below(100000));
    const int32_t shift = static_cast<int32_t>(rng.Below(1 << 30));
    EXPECT_NEAR(Dot(Rotated(table, q, a), Rotated(table, q, a)), Dot(q, q), 1e-4);
    const double near = Dot(Rotated(table, q, a), Rotated(table, k, b));
    const double far = Dot(Rotated(table, q, a + shift), Rotated(table, k, b + shift));
    EXPECT_NEAR(near, far, 2e-5) << a << ' ' << b << ' ' << shift;
  }
}

// The formula itself, evaluated pair by pair.
TEST_P(RopeTest, MatchesTheFormulaAlsoFarOut) {
  Rng rng(3);
  const RopeConfig config = {
      .n_dims = 6, .style = GetParam(), .base = 500000, .linear_scale = 4, .frequency_factors = {1, 2.5f, 8}};
  const RopeTable table(config);
  for (int32_t position : {1, 2, 255, 256, 65535, 65536, 1000000, 16777216, 2147483647}) {
    const std::vector<float> x = RandomVector(8, rng);  // the last two coordinates pass through
    const std::vector<float> y = Rotated(table, x, position);
    for (size_t i = 0; i < 3; ++i) {
      const double angle =
          position / 4.0 / config.frequency_factors[i] * std::pow(500000.0, -2.0 * static_cast<double>(i) / 6);
      const size_t a = GetParam() == RopeStyle::kInterleaved ? 2 * i : i;
      const size_t b = GetParam() == RopeStyle::kInterleaved ? 2 * i + 1 : i + 3;
      EXPECT_NEAR(y[a], x[a] * std::cos(angle) - x[b] * std::sin(angle), 2e-6) << position << ' ' << i;
      EXPECT_NEAR(y[b], x[a] * std::sin(angle) + x[b] * std::cos(angle), 2e-6) << position << ' ' << i;
    }
    EXPECT_EQ(y[6], x[6]);
    EXPECT_EQ(y[7], x[7]);
  }
}

TEST_P(RopeTest, RotateBackUndoes) {
  Rng rng(4);
  constexpr size_t kRows = 37, kHeads = 3, kDim = 16, kStride = 50;
  const RopeTable table({.n_dims = 12, .style = GetParam()});
  const std::vector<float> x = RandomVector(kRows * kStride, rng);
  std::vector<int32_t> positions(kRows);
  for (int32_t& p : positions) p = static_cast<int32_t>(rng.Below(40000));
  positions[5] = positions[4];
  std::vector<float> y = x;
  RotateRows(table, y.data(), kRows, kStride, kHeads, kDim, positions.data());
  // Each head as if alone, and nothing between the rows touched.
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t h = 0; h < kHeads; ++h) {
      const size_t at = r * kStride + h * kDim;
      const std::vector<float> head(&x[at], &x[at] + kDim);
      EXPECT_EQ(Rotated(table, head, positions[r]), std::vector<float>(&y[at], &y[at] + kDim));
    }
    for (size_t i = kHeads * kDim; i < kStride; ++i) EXPECT_EQ(y[r * kStride + i], x[r * kStride + i]);
  }
}

INSTANTIATE_TEST_SUITE_P(Styles, RopeTest, testing::Values(RopeStyle::kInterleaved, RopeStyle::kHalves),
                         [](const auto& test) {
                           return std::string(test.param == RopeStyle::kInterleaved ? "interleaved" : "halves");
                         });

TEST(Rope, QuarterTurnByHand) {
  // One pair with frequency 1; a linear scale of 2 / pi makes position 1 a quarter turn.
  const RopeTable table({.n_dims = 2, .linear_scale = 2 / M_PI});
  const std::vector<float> y = Rotated(table, {3, 4}, 1);
  EXPECT_NEAR(y[0], -4, 1e-6);
  EXPECT_NEAR(y[1], 3, 1e-6);
}

// By hand: with base e^2 and four pairs frequencies are e^(-i/2); a context of 2 pi e^(3/2) tokens lets pair i turn
// e^((3 - i) / 2) times. Bounds of e and e^(1/2) turns are reached by pairs 1 and 2: 0 and 1 stay, 2 and 3 are stretched.
TEST(Rope, YarnStretchesWhatTurnsRarely) {
  RopeConfig config{.n_dims = 8, .base = std::exp(2.0), .linear_scale = 4, .frequency_factors = {}};
  config.yarn = {.original_ctx = 2 * M_PI * std::exp(1.5), .beta_fast = std::exp(1 - 1e-9), .beta_slow = std::exp(0.5 + 1e-9)};
  const auto frequency = [&](size_t i) { return RopeTable(config).frequencies()[i] * std::exp(static_cast<double>(i) / 2); };
  EXPECT_NEAR(frequency(0), 1, 1e-12);
  EXPECT_NEAR(frequency(1), 1, 1e-12);
  EXPECT_NEAR(frequency(2), 0.25, 1e-12);
  EXPECT_NEAR(frequency(3), 0.25, 1e-12);
  config.yarn.beta_slow = std::exp(1e-9);  // pair 3: 2 lies in the middle
  EXPECT_NEAR(frequency(2), 0.5 + 0.5 * 0.25, 1e-12);
}

TEST(Rope, MagnitudeMultiplies) {
  Rng rng(6);
  const RopeTable plain({.n_dims = 6, .frequency_factors = {}});
  const RopeTable larger({.n_dims = 6, .frequency_factors = {}, .magnitude = 1.5});
  const std::vector<float> x = RandomVector(8, rng);
  const std::vector<float> y = Rotated(plain, x, 77);
  const std::vector<float> z = Rotated(larger, x, 77);
  for (size_t i = 0; i < 8; ++i) EXPECT_NEAR(z[i], (i < 6 ? 1.5 : 1) * y[i], 1e-6);
}

TEST(Rope, BadConfigurationsAreRefused) {
  EXPECT_THROW(RopeTable({.n_dims = 8, .frequency_factors = {}, .magnitude = 0}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 8, .frequency_factors = {}, .yarn = {.original_ctx = -1}}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 8, .frequency_factors = {}, .yarn = {.original_ctx = 9, .beta_slow = 0}}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 7}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 8, .base = 0}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 8, .base = NAN}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 8, .linear_scale = -1}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 8, .frequency_factors = {1, 1, 1}}), Error);
  EXPECT_THROW(RopeTable({.n_dims = 4, .frequency_factors = {1, 0}}), Error);
}

TEST(Rope, NoRotaryDimensionsLeaveEverything) {
  Rng rng(5);
  const RopeTable table({.n_dims = 0});
  const std::vector<float> x = RandomVector(8, rng);
  EXPECT_EQ(Rotated(table, x, 9), x);
}

}  // namespace
}  // namespace lesskv
