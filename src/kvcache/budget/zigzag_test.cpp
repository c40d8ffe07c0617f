#include "kvcache/budget/zigzag.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/rng.h"
#include "kvcache/budget/budgeter.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

using Rows = std::vector<size_t>;

TEST(Zigzag, KeysByHand) {
  const std::vector<float> a = {.3f, .05f, .5f, .15f};
  EXPECT_EQ(KeysThatHold(0.9, a), 3u);
  EXPECT_EQ(KeysThatHold(0.8, a), 2u);
  EXPECT_EQ(KeysThatHold(0.5, a), 1u);
  EXPECT_EQ(KeysThatHold(0.9, std::vector<float>{0, 0, 1, 0, 0}), 1u);
  EXPECT_EQ(KeysThatHold(1.0, std::vector<float>{0, .5f, .5f, 0, 0}), 2u);
  EXPECT_EQ(KeysThatHold(0.9, std::vector<float>(10, 0.1f)), 9u);
  // Sums over 32 queries instead of their mean are the same.
  EXPECT_EQ(KeysThatHold(0.9, std::vector<float>(10, 3.2f)), 9u);
}

// Every query head counts its own keys: one needs a single key, the other nine of ten.
TEST(Zigzag, NeedIsTheMeanOverQueryHeads) {
  const CacheSpec spec = CacheSpec::Parse("h2o(8)+zigzag");
  const Method& method = *FindMethod("zigzag");
  const SidecarSource none;
  const auto budgeter =
      method.make_budgeter(Arguments(method.parameters, *spec.Find("zigzag")), {{}, 100, ComputeType::kF32, none});
  const std::vector<Position> positions(10, Position(0));
  std::vector<float> measured(20, 0.1f);
  std::fill_n(measured.begin(), 10, 0.0f);
  measured[3] = 1;
  HeadRows head;
  head.positions = positions;
  head.measured = measured;
  LayerRows layer;
  layer.group = 2;
  layer.heads = {&head, 1};
  EXPECT_DOUBLE_EQ(budgeter->Need(layer), 5);
}

TEST(Zigzag, KeysGrowWithTau) {
  Rng rng(6);
  for (int i = 0; i < 200; ++i) {
    std::vector<float> a(1 + rng.Below(40));
    for (float& x : a) x = rng.UniformFloat(0, 1);
    size_t before = 1;
    for (const double tau : {0.0, 0.2, 0.5, 0.8, 0.95, 1.0}) {
      const size_t keys = KeysThatHold(tau, a);
      EXPECT_GE(keys, before);
      EXPECT_LE(keys, a.size());
      before = keys;
    }
    std::vector<float> moved = a;  // in any order, not only turned round
    for (size_t k = moved.size(); k > 1; --k) std::swap(moved[k - 1], moved[rng.Below(k)]);
    EXPECT_EQ(KeysThatHold(0.7, moved), KeysThatHold(0.7, a));
  }
}

TEST(Zigzag, RowsByHand) {
  const std::vector<double> needs = {10, 20, 30, 40};
  EXPECT_EQ(ZigzagRows(needs, 100, 8, .2, 1000), (Rows{52, 84, 116, 148}));
  EXPECT_EQ(ZigzagRows(needs, 100, 8, .2, 140), (Rows{53, 87, 120, 140}));
  EXPECT_EQ(ZigzagRows(needs, 100, 8, 1, 1000), (Rows{100, 100, 100, 100}));
  EXPECT_EQ(ZigzagRows(needs, 100, 0, 0, 1000), (Rows{40, 80, 120, 160}));
  EXPECT_EQ(ZigzagRows(needs, 100, 8, .2, 100), (Rows{100, 100, 100, 100}));
  EXPECT_EQ(ZigzagRows(std::vector<double>(3, 7.5), 33, 8, .2, 1000), (Rows{33, 33, 33}));
  EXPECT_EQ(ZigzagRows(std::vector<double>{5, 900}, 33, 33, .2, 1000), (Rows{33, 33}));
  EXPECT_EQ(ZigzagRows(std::vector<double>{5, std::nan("")}, 33, 8, .2, 1000), (Rows{33, 33}));
  EXPECT_EQ(ZigzagRows(std::vector<double>{0, 0}, 33, 8, .2, 1000), (Rows{33, 33}));
  EXPECT_EQ(ZigzagRows(std::vector<double>{4}, 33, 8, .2, 1000), (Rows{33}));
}

// Layers that hold fewer rows than their share keep those, and the others have what is over; the sum stays.
TEST(Zigzag, NoLayerGetsMoreThanItHolds) {
  const auto rows = [](std::vector<double> needs, size_t mean, std::vector<size_t> most) {
    return ZigzagRows(needs, mean, 8, .2, most);
  };
  EXPECT_EQ(rows({10, 20, 30, 40}, 100, {1000, 1000, 1000, 140}), (Rows{53, 87, 120, 140}));
  EXPECT_EQ(rows({10, 20, 30, 40}, 100, {52, 84, 116, 149}), (Rows{52, 84, 116, 148}));
  EXPECT_EQ(rows({40, 30, 20, 10}, 100, {53, 87, 121, 141}), (Rows{53, 87, 121, 139}));
  // All that is there fits: each keeps what it holds, whatever the needs.
  EXPECT_EQ(rows({40, 30, 20, 10}, 100, {30, 90, 110, 150}), (Rows{35, 95, 115, 155}));
  EXPECT_EQ(rows({std::nan(""), 1, 1, 1}, 100, {30, 90, 160, 160}), (Rows{30, 90, 140, 140}));

  Rng rng(9);
  for (int i = 0; i < 5000; ++i) {
    const size_t n = 2 + rng.Below(6), mean = 4 + rng.Below(40), least = rng.Below(4);
    std::vector<double> needs(n);
    std::vector<size_t> most(n);
    for (double& need : needs) need = rng.UniformFloat(0, 1);
    for (size_t& m : most) m = 4 + rng.Below(90);
    const Rows budgets = ZigzagRows(needs, mean, least, 0.2, most);
    ASSERT_EQ(std::accumulate(budgets.begin(), budgets.end(), size_t{0}), n * mean);
    const bool cut = std::accumulate(most.begin(), most.end(), size_t{0}) > n * mean;
    for (size_t l = 0; l < n; ++l) ASSERT_TRUE(!cut || budgets[l] <= most[l]);
  }
}

TEST(Zigzag, SumsAreExactWithinBounds) {
  Rng rng(7);
  for (int i = 0; i < 20000; ++i) {
    const size_t n = 1 + rng.Below(8), n_tokens = 2 + rng.Below(300), rows = 1 + rng.Below(n_tokens - 1);
    const size_t least = rng.Below(rows + 1);
    const double beta = rng.UniformFloat(0, 1);
    std::vector<double> needs(n);
    for (double& need : needs) need = 1 + rng.UniformFloat(0, 1) * static_cast<double>(n_tokens);
    const Rows budgets = ZigzagRows(needs, rows, least, beta, n_tokens);
    ASSERT_EQ(std::accumulate(budgets.begin(), budgets.end(), size_t{0}), n * rows);
    const auto floor = static_cast<size_t>(beta * static_cast<double>(rows));
    for (size_t l = 0; l < n; ++l) {
      ASSERT_GE(budgets[l], std::max(floor, least));
      ASSERT_LE(budgets[l], n_tokens);
      for (size_t m = 0; m < n; ++m)
        if (needs[l] > needs[m]) {
          ASSERT_GE(budgets[l], budgets[m]);
        }
    }
    for (const double factor : {4.0, 0.125, 3.0, 1e-6, 7e5}) {
      std::vector<double> scaled = needs;
      for (double& need : scaled) need *= factor;
      ASSERT_EQ(ZigzagRows(scaled, rows, least, beta, n_tokens), budgets) << factor;
    }
  }
}

}  // namespace
}  // namespace lesskv
