#include "kvcache/budget/ada.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/rng.h"

namespace lesskv {
namespace {

// Heads that hold positions 0, 1, ...; budgets of `rows` each are divided.
std::vector<size_t> Divide(std::vector<std::vector<float>> votes, size_t rows, double floor, size_t window = 0,
                           std::vector<ProtectedSpan> protect = {}, bool accumulate = false, size_t sinks = 0) {
  std::vector<std::vector<Position>> positions(votes.size());
  std::vector<HeadRows> heads(votes.size());
  for (size_t h = 0; h < votes.size(); ++h) {
    for (size_t r = 0; r < votes[h].size(); ++r) positions[h].push_back(Position(static_cast<int32_t>(r)));
    heads[h].positions = positions[h];
    heads[h].votes = votes[h];
  }
  const ProtectedSet set(std::move(protect));
  LayerRows layer;
  for (const auto& head : votes) layer.tokens_seen = std::max(layer.tokens_seen, head.size());
  layer.window = window;
  layer.sinks = sinks;
  layer.votes_accumulate = accumulate;
  layer.protect = &set;
  layer.heads = heads;
  std::vector<size_t> budgets(votes.size(), rows);
  DivideByVotes({&layer, 1}, floor, budgets);
  return budgets;
}

using Rows = std::vector<size_t>;

TEST(Ada, ByHand) {
  // The four best of all are .6, .4, .35, .3; then .9, .4, .35, .25.
  EXPECT_EQ(Divide({{.6f, .3f, .1f}, {.4f, .35f, .25f}}, 2, 0), (Rows{2, 2}));
  EXPECT_EQ(Divide({{.9f, .05f, .05f}, {.4f, .35f, .25f}}, 2, 0), (Rows{1, 3}));
  // With a floor of one row each the first head keeps its best and the rest goes by votes.
  EXPECT_EQ(Divide({{.1f, .1f, .1f, .1f}, {.9f, .8f, .7f, .6f}}, 2, 0.5), (Rows{1, 3}));
  EXPECT_EQ(Divide({{.1f, .1f, .1f, .1f}, {.9f, .8f, .7f, .6f}}, 2, 1), (Rows{2, 2}));
  // Equal votes: the lower head's rows come first.
  EXPECT_EQ(Divide({{1, 1, 1, 1}, {1, 1, 1, 1}}, 2, 0), (Rows{3, 1}));
}

// Votes of a head that accumulates are its share: ten times the votes change nothing.
TEST(Ada, AccumulatedVotesAreNormalised) {
  const std::vector<float> a = {.9f, .05f, .05f}, b = {.4f, .35f, .25f}, large = {4, 3.5f, 2.5f}, small = {.09f, .005f, .005f};
  EXPECT_EQ(Divide({a, b}, 2, 0, 0, {}, true), (Rows{1, 3}));
  EXPECT_EQ(Divide({small, large}, 2, 0, 0, {}, true), (Rows{1, 3}));
  EXPECT_EQ(Divide({large, small}, 2, 0, 0, {}, true), (Rows{3, 1}));
  EXPECT_EQ(Divide({{.9f, .8f, .7f}, {.4f, .35f, .25f}}, 2, 0, 0, {}, false), (Rows{3, 1}));
  const std::vector<float> few = {.06f, .03f, .01f};  // .6, .3, .1 of its own
  EXPECT_EQ(Divide({large, few}, 2, 0, 0, {}, true), (Rows{2, 2}));
  EXPECT_EQ(Divide({large, few}, 2, 0, 0, {}, false), (Rows{3, 1}));
}

// What always stays is charged to its head: three of four rows are no candidates.
TEST(Ada, WindowAndProtectedRowsComeFirst) {
  EXPECT_EQ(Divide({{.9f, .9f, .9f, .9f, .9f, .9f}, {.1f, .1f, .1f, .1f, .1f, .1f}}, 4, 0, 2, {{0, 1}}), (Rows{5, 3}));
  EXPECT_EQ(Divide({{.9f, .9f, .9f, .9f, .9f, .9f}, {.1f, .1f, .1f, .1f, .1f, .1f}}, 4, 0.25, 2, {{0, 1}}), (Rows{4, 4}));
}

// The newest `window` rows and no others: the third best vote of all lies just before the window.
TEST(Ada, TheWindowIsAsLongAsItSays) {
  EXPECT_EQ(Divide({{.5f, 0, 0, 0, 0, 0}, {.3f, .2f, .1f, 0, 0, 0}}, 3, 0, 2), (Rows{3, 3}));
  // Of three rows that always stay the first is a sink, so that the fourth is a candidate.
  EXPECT_EQ(Divide({{0, 0, 0, .5f, 0, 0}, {0, .3f, .2f, .1f, 0, 0}}, 4, 0, 3, {}, false, 1), (Rows{4, 4}));
}

// A head that an earlier division left two rows has no use for a floor of four: the other keeps them.
TEST(Ada, NoHeadGetsMoreThanItHolds) {
  const std::vector<float> few(2, .1f), many(10, .9f);
  EXPECT_EQ(Divide({few, many}, 4, 1), (Rows{2, 6}));
  EXPECT_EQ(Divide({few, many}, 4, 0.5), (Rows{2, 6}));
  EXPECT_EQ(Divide({many, few, many}, 4, 1), (Rows{6, 2, 4}));
}

TEST(Ada, NothingChangesWhereNothingLeaves) {
  EXPECT_EQ(Divide({{.9f, .05f}, {.4f, .35f}}, 2, 0), (Rows{2, 2}));
  EXPECT_EQ(Divide({{.9f}, {.4f}}, 5, 0.2), (Rows{5, 5}));
}

// Scores may be logarithms: what is none is worse than all of them.
TEST(Ada, NotANumberIsBelowEveryNumber) {
  const float none = std::nanf("");
  EXPECT_EQ(Divide({{-3, none, -5}, {-4, -4, -4}}, 2, 0), (Rows{1, 3}));
  EXPECT_EQ(Divide({{none, none, none}, {-4, -4, -4}}, 2, 0.5), (Rows{1, 3}));
}

TEST(Ada, SumsAreExactAndFloorsHold) {
  Rng rng(5);
  for (int i = 0; i < 2000; ++i) {
    const size_t n = 1 + rng.Below(4), rows = 1 + rng.Below(12), window = rng.Below(rows + 1);
    const double floor = rng.UniformFloat(0, 1);
    std::vector<std::vector<float>> votes(n, std::vector<float>(window + rng.Below(30)));
    for (auto& head : votes)
      for (float& vote : head) vote = rng.Below(9) == 0 ? std::nanf("") : rng.UniformFloat(0, 1);
    const Rows budgets = Divide(votes, rows, floor, window, {}, rng.Below(2) == 0);
    EXPECT_EQ(std::accumulate(budgets.begin(), budgets.end(), size_t{0}), n * rows);
    for (const size_t budget : budgets) {
      EXPECT_GE(budget, 1u);
      EXPECT_GE(budget, window + std::min(rows - window, static_cast<size_t>(floor * static_cast<double>(rows))));
      EXPECT_LE(budget, std::max(rows, votes[0].size()));
    }
  }
}

}  // namespace
}  // namespace lesskv
