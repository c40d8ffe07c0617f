// What tiles and dropout make of many rows; the maps themselves are checked in less_layer_test.cpp.
#include "train/feature_net.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "kvcache/residual/feature_maps.h"

namespace lesskv::train {
namespace {

constexpr size_t kRows = 600, kDim = 6;  // more than two tiles of 256 rows

SidecarShape Shape(FeatureKind kind) { return {1, 1, 1, kDim, 3, 16, kind}; }

std::vector<float> RandomNumbers(size_t n, float scale, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& value : x) value = scale * rng.Normal();
  return x;
}

class FeatureNetKinds : public testing::TestWithParam<FeatureKind> {};
INSTANTIATE_TEST_SUITE_P(Features, FeatureNetKinds, testing::Values(FeatureKind::kGelu, FeatureKind::kExp),
                         [](const auto& kind) { return FeatureKindName(kind.param); });

// Many rows at once are the rows one by one.
TEST_P(FeatureNetKinds, TilesChangeNothing) {
  const SidecarShape shape = Shape(GetParam());
  const std::vector<float> x = RandomNumbers(kRows * kDim, 1, 1), slopes = RandomNumbers(kRows * shape.rank, 1, 2);
  for (const bool is_psi : {false, true}) {
    const NetLayout layout(shape, is_psi);
    const std::vector<float> parameters = RandomNumbers(layout.total, 0.3f, 3);
    const FeatureNet net(shape, layout, is_psi, parameters.data(), {}, 0);
    std::vector<float> p2(kRows * shape.rank), features = p2, d = slopes, gradient(layout.total), want(layout.total);
    net.Forward({x.data(), kDim, kRows}, p2.data(), features.data());
    net.Backward({x.data(), kDim, kRows}, p2.data(), d.data(), gradient.data());
    for (size_t i = 0; i < kRows; ++i) {
      const Rows row{&x[i * kDim], kDim, 1};
      std::vector<float> one_p2(shape.rank), one(shape.rank), one_d(&slopes[i * shape.rank], &slopes[(i + 1) * shape.rank]);
      net.Forward(row, one_p2.data(), one.data());
      net.Backward(row, one_p2.data(), one_d.data(), want.data());
      for (size_t r = 0; r < shape.rank; ++r) EXPECT_NEAR(features[i * shape.rank + r], one[r], 1e-5 * (1 + one[r])) << i;
    }
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(gradient[i], want[i], 1e-3 + 1e-4 * std::fabs(want[i])) << i;
  }
}

// Beyond the largest exponent features do not grow, and nothing pulls at them.
TEST(FeatureNet, FeaturesThatAreCutHaveNoGradient) {
  const SidecarShape shape = Shape(FeatureKind::kExp);
  const NetLayout layout(shape, false);
  std::vector<float> parameters = RandomNumbers(layout.total, 0.1f, 3);
  std::fill_n(&parameters[layout.b2], shape.rank, kMaxExponent + 5);
  const std::vector<float> x(kDim, 1.0f);
  std::vector<float> p2(shape.rank), features = p2, d(shape.rank, 1.0f), gradient(layout.total);
  const FeatureNet net(shape, layout, false, parameters.data(), {}, 0);
  net.Forward({x.data(), kDim, 1}, p2.data(), features.data());
  net.Backward({x.data(), kDim, 1}, p2.data(), d.data(), gradient.data());
  for (const float feature : features) EXPECT_FLOAT_EQ(feature, std::exp(kMaxExponent));
  for (const float g : gradient) EXPECT_EQ(g, 0);
}

// Hidden units that GELU leaves as they are: what dropout takes from some, others get, and each tile has a mask of its own.
TEST(FeatureNet, DropoutKeepsTheMeanAndDrawsForEveryRow) {
  const SidecarShape shape = Shape(FeatureKind::kExp);
  const NetLayout layout(shape, false);
  std::vector<float> parameters(layout.total);
  std::fill_n(&parameters[layout.b1], shape.hidden, 20.0f);
  std::fill_n(&parameters[layout.w2], shape.hidden * shape.rank, 1.0f / 320);  // 16 units of 20 make 1
  const std::vector<float> x(kRows * kDim);
  std::vector<float> p2(kRows * shape.rank), features = p2;
  FeatureNet(shape, layout, false, parameters.data(), {0.25f, 7}, 1).Forward({x.data(), kDim, kRows}, p2.data(), features.data());
  double mean = 0;
  size_t n_like_the_tile_before = 0;
  for (size_t i = 0; i < kRows; ++i) {
    mean += p2[i * shape.rank] / kRows;
    n_like_the_tile_before += i >= 256 && p2[i * shape.rank] == p2[(i - 256) * shape.rank];
  }
  EXPECT_NEAR(mean, 1, 0.02);  // a deviation of sqrt(1/3 / 16 / 600) = 0.006
  EXPECT_LT(n_like_the_tile_before, (kRows - 256) / 2);
}

}  // namespace
}  // namespace lesskv::train
