#include "train/ridge.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"

namespace lesskv::train {
namespace {

RidgeSums Sums(const std::vector<float>& x, size_t width, const std::vector<float>& y) {
  RidgeSums sums(width, 1);
  const float* target = y.data();
  sums.Add(x.data(), {&target, 1}, y.size());
  return sums;
}

// x = 1..5, y = (-6, -5.5, -4, -3.5, -1); lambda is that of the sum, a fifth of it that of the mean.
TEST(Ridge, ByHand) {
  const RidgeSums sums = Sums({1, 2, 3, 4, 5}, 1, {-6, -5.5f, -4, -3.5f, -1});
  const double expected[][3] = {{0, 1.2, -7.6}, {1, 1.0, -7.0}, {5, 0.6, -5.8}};
  for (const auto& [lambda, weight, bias] : expected) {
    const RidgeFit fit = FitRidge(sums, lambda / 5);
    EXPECT_NEAR(fit.weight[0], weight, 1e-12);
    EXPECT_NEAR(fit.bias[0], bias, 1e-12);
    EXPECT_NEAR(SquaredCorrelation(fit, sums)[0], 0.929032, 1e-6);
  }
  const double errors[] = {-6 + 6.4, -5.5 + 5.2, -4 + 4.0, -3.5 + 2.8, -1 + 1.6};
  double squares = 0;
  for (const double e : errors) squares += e * e;
  EXPECT_NEAR(MeanSquaredError(FitRidge(sums, 0), sums)[0], squares / 5, 1e-12);
}

// Features shifted or scaled predict the same; one that does not vary weighs nothing; sums of parts are the whole.
TEST(Ridge, ShiftsScalesAndPartsChangeNothing) {
  Rng rng(3);
  const size_t n = 61, width = 6;
  std::vector<float> x(n * width), turned(n * width), y(n), z(n);
  for (float& value : x) value = std::round(256 * rng.Normal()) / 256;  // so that shifts and scales of single floats are exact
  for (size_t i = 0; i < n; ++i) {
    x[i * width + 5] = 0.25f;
    y[i] = 2 * x[i * width] - x[i * width + 3] + 0.5f * rng.Normal() - 4;
    z[i] = rng.Normal();
    for (size_t c = 0; c < width; ++c) turned[i * width + c] = c == 2 ? 8 * x[i * width + c] : c == 3 ? x[i * width + c] + 1 : x[i * width + c];
  }
  const float* targets[] = {y.data(), z.data()};
  RidgeSums whole(width, 2), other(width, 2), parts(width, 2), rest(width, 2);
  whole.Add(x.data(), targets, n);
  other.Add(turned.data(), targets, n);
  parts.Add(x.data(), targets, 17);
  const float* behind[] = {y.data() + 17, z.data() + 17};
  rest.Add(x.data() + 17 * width, behind, n - 17);
  parts.Add(rest);
  const RidgeFit a = FitRidge(whole, 0.1), b = FitRidge(other, 0.1), c = FitRidge(parts, 0.1);
  EXPECT_EQ(a.weight[5], 0);
  for (size_t i = 0; i < n; ++i)
    for (size_t t = 0; t < 2; ++t) {
      const auto predict = [&](const RidgeFit& fit, const std::vector<float>& from) {
        double sum = fit.bias[t];
        for (size_t k = 0; k < width; ++k) sum += fit.weight[t * width + k] * double(from[i * width + k]);
        return sum;
      };
      EXPECT_NEAR(predict(a, x), predict(b, turned), 1e-9);
      EXPECT_NEAR(predict(a, x), predict(c, x), 1e-10);
    }
  EXPECT_GT(SquaredCorrelation(a, whole)[0], 0.9);
}

}  // namespace
}  // namespace lesskv::train
