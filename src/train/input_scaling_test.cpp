// Features of standardised inputs and of plain ones are the same, whatever the biases of the inputs; also when w1 is
// stored in half the bits.
#include "train/input_scaling.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "kernels/quants/half.h"
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
  const InputScaling scaling = InputScaling::Measure(Shape(), texts);
  for (LessExample& text : texts) scaling.Standardize(Shape(), text);
  const InputScaling after = InputScaling::Measure(Shape(), texts);
  for (const ChannelScaling* channels : {&after.q, &after.k})
    for (size_t c = 0; c < channels->mean.size(); ++c) {
      EXPECT_NEAR(channels->mean[c], 0, 1e-3) << c;
      EXPECT_NEAR(channels->deviation[c], 1, 1e-3) << c;
    }
}

TEST(InputScaling, AChannelThatDoesNotVaryKeepsItsScale) {
  LessExample text = BiasedText(1);
  for (size_t t = 0; t < kTokens; ++t) text.k[t * 2 * kDim + 5] = 7;
  const InputScaling scaling = InputScaling::Measure(Shape(), {&text, 1});
  EXPECT_EQ(scaling.k.deviation[5], 1);
  scaling.Standardize(Shape(), text);
  for (const float x : text.k) EXPECT_TRUE(std::isfinite(x));
}

TEST(InputScaling, MapsOfEitherSpaceGiveTheSameFeatures) {
  const LessExample text = BiasedText(1);
  const InputScaling scaling = InputScaling::Measure(Shape(), {&text, 1});
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

// Rounding w1 moves what multiplies the means by far more than the rest of the sum; the bias takes that back.
TEST(InputScaling, BiasesMakeUpForTheRoundingOfStoredMatrices) {
  const LessExample text = BiasedText(1);
  const InputScaling scaling = InputScaling::Measure(Shape(), {&text, 1});
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
