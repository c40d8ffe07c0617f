// Features of standardised inputs and of plain ones are the same, whatever the biases of the inputs; also when w1 is
// stored in half the bits.
#include "train/input_scaling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/rng.h"
#include "kernels/basic/basic.h"
#include "kernels/quants/half.h"
#include "kvcache/cache_shape.h"
#include "train/feature_net.h"

namespace lesskv::train {
namespace {

constexpr size_t kDim = 8, kTokens = 400;

SidecarShape Shape() { return {1, 4, 2, kDim, 3, 16, FeatureKind::kExp}; }

// Channel c of the heads together: around 40 c, spread 0.5 + c.
LessExample BiasedText(uint64_t seed) {
  Rng rng(seed);
  LessExample e;
  e.n_tokens = kTokens;
  for (auto [x, heads] : {std::pair{&e.q, Shape().n_heads}, std::pair{&e.k, Shape().n_kv_heads}})
    for (size_t i = 0; i < kTokens * heads * kDim; ++i) {
      const float c = static_cast<float>(i % (heads * kDim));
      x->push_back(40 * c + (0.5f + c) * rng.Normal());
    }
  for (size_t i = 0; i < kTokens * Shape().n_heads; ++i) e.exact_lse.push_back(rng.Normal());
  return e;
}

// Features of all tokens' keys of a KV head, or queries of a query head.
std::vector<float> Features(const LayerParams& params, const LessExample& e, bool is_psi, size_t head) {
  const SidecarShape shape = Shape();
  const LessLayer layer(shape, params, std::vector<float>(std::pow(shape.n_heads * kDim, 2)));
  const NetLayout phi(shape, false), psi(shape, true);
  const size_t at = is_psi ? shape.n_heads * phi.total + head * psi.total : head * phi.total;
  const size_t heads = is_psi ? shape.n_kv_heads : shape.n_heads;
  std::vector<float> p2(kTokens * shape.rank), features(kTokens * shape.rank);
  FeatureNet(shape, is_psi ? psi : phi, is_psi, layer.parameters().data() + at, {}, 0)
      .Forward({(is_psi ? e.k : e.q).data() + head * kDim, heads * kDim, kTokens}, p2.data(), features.data());
  return features;
}

LayerParams SomeMaps() {
  LayerParams maps = InitialSidecar(Shape(), 3).layers[0];
  Rng rng(4);
  for (NetParams* net : {&maps.phi, &maps.psi})
    for (float& b : net->b1) b = rng.Normal();
  return maps;
}

double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(a[i] - b[i], 2);
    norm += std::pow(b[i], 2);
  }
  return std::sqrt(difference / norm);
}

TEST(InputScaling, StandardizedChannelsHaveMeanZeroAndDeviationOne) {
  std::vector<LessExample> texts = {BiasedText(1), BiasedText(2)};
  const InputScaling scaling = InputScaling::Measure(Shape(), UsualScale(kDim), texts);
  for (LessExample& text : texts) scaling.Standardize(Shape(), text);
  const InputScaling after = InputScaling::Measure(Shape(), UsualScale(kDim), texts);
  for (const ChannelScaling* channels : {&after.q, &after.k})
    for (size_t c = 0; c < channels->mean.size(); ++c) {
      EXPECT_NEAR(channels->mean[c], 0, 1e-3) << c;
      EXPECT_NEAR(channels->deviation[c], 1, 1e-3) << c;
    }
}

TEST(InputScaling, AChannelThatDoesNotVaryKeepsItsScale) {
  LessExample text = BiasedText(1);
  for (size_t t = 0; t < kTokens; ++t) text.k[t * 2 * kDim + 5] = 7;
  const InputScaling scaling = InputScaling::Measure(Shape(), UsualScale(kDim), {&text, 1});
  EXPECT_EQ(scaling.k.deviation[5], 1);
  scaling.Standardize(Shape(), text);
  for (const float x : text.k) EXPECT_TRUE(std::isfinite(x));
}

TEST(InputScaling, MapsOfEitherSpaceGiveTheSameFeatures) {
  const LessExample text = BiasedText(1);
  const InputScaling scaling = InputScaling::Measure(Shape(), UsualScale(kDim), {&text, 1});
  LessExample standard = text;
  scaling.Standardize(Shape(), standard);
  const LayerParams maps = SomeMaps(), plain = scaling.ToPlain(Shape(), maps, DType::kF32);
  const LayerParams again = scaling.ToStandard(Shape(), plain);
  for (const bool is_psi : {false, true})
    for (size_t head = 0; head < (is_psi ? 2u : 4u); ++head) {
      const std::vector<float> want = Features(maps, standard, is_psi, head);
      EXPECT_LT(Distance(Features(plain, text, is_psi, head), want), 1e-3) << is_psi << head;
      EXPECT_LT(Distance(Features(again, standard, is_psi, head), want), 1e-3) << is_psi << head;
    }
}

// Masses of keys with a common bias vary with the query's product with it; the centre takes just that out, of the heads that
// have one.
TEST(InputScaling, TheCentreIsWhatAllKeysAddToALogMass) {
  constexpr float kScale = 0.1f;
  LessExample text = BiasedText(1);
  text.first_scored = 100;
  const std::vector<float> noise = text.exact_lse;
  const InputScaling plain = InputScaling::Measure(Shape(), kScale, {&text, 1});
  EXPECT_EQ(std::count(plain.center.begin(), plain.center.end(), 0.0f), 2 * static_cast<ptrdiff_t>(kDim));
  for (size_t row = 0; row < kTokens * 4; ++row)
    if (row % 4 >= 2)  // the query heads of the second KV head
      text.exact_lse[row] += kScale * Dot(&text.q[row * kDim], &plain.k.mean[kDim], kDim);
  const InputScaling scaling = InputScaling::Measure(Shape(), kScale, {&text, 1});
  for (size_t c = 0; c < 2 * kDim; ++c) EXPECT_EQ(scaling.center[c], c < kDim ? 0 : kScale * scaling.k.mean[c]) << c;
  scaling.Standardize(Shape(), text);
  // Products of some 400,000, whose float32 has steps of 1/32, and a deviation of some 3,000.
  for (size_t row = 0; row < kTokens * 4; ++row) EXPECT_NEAR(text.exact_lse[row], noise[row], 1) << row;
}

// Features of one everywhere: the state's masses in the middle of a text are then a hundredth of the exact ones.
TEST(InputScaling, FreshStatesWeighAHundredth) {
  LessExample text = BiasedText(1);
  text.first_scored = kTokens / 2;
  for (size_t row = 0; row < kTokens * 4; ++row) text.exact_lse[row] = static_cast<float>(row % 4) + (row < kTokens * 2 ? 50 : 0);
  LayerParams fresh = InitialSidecar(Shape(), 3).layers[0];
  std::fill(fresh.psi.b2.begin(), fresh.psi.b2.end(), 0.5f);
  const LayerParams near = NearTheBareSelector(Shape(), fresh, {&text, 1});
  for (size_t head = 0; head < 4; ++head)
    for (size_t r = 0; r < 3; ++r) {
      const double phi = std::exp(double(near.phi.b2[head * 3 + r])), psi = std::exp(0.5);
      EXPECT_NEAR(kTokens / 2 * 3 * phi * psi / std::exp(double(head)), 0.01, 1e-5) << head;
    }
}

// Rounding w1 moves what multiplies the means by far more than the rest of the sum; the bias takes that back.
TEST(InputScaling, BiasesMakeUpForTheRoundingOfStoredMatrices) {
  const LessExample text = BiasedText(1);
  const InputScaling scaling = InputScaling::Measure(Shape(), UsualScale(kDim), {&text, 1});
  LessExample standard = text;
  scaling.Standardize(Shape(), standard);
  const LayerParams maps = SomeMaps(), stored = scaling.ToPlain(Shape(), maps, DType::kBF16);
  for (const NetParams* net : {&stored.phi, &stored.psi})
    for (const float w : net->w1) ASSERT_EQ(w, Bf16ToFloat(FloatToBf16(w)));
  for (const bool is_psi : {false, true})
    EXPECT_LT(Distance(Features(stored, text, is_psi, 1), Features(maps, standard, is_psi, 1)), 0.02) << is_psi;
}

}  // namespace
}  // namespace lesskv::train
