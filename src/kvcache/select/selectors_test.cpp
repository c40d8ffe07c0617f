// Selectors alone, on attention given by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "kvcache/cache_config.h"
#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

// One layer, one KV head, rows at positions given; what leaves, as positions in order of rows.
std::vector<int> Leaving(const char* spec, size_t ctx, size_t budget, const std::vector<int>& positions,
                         const std::vector<float>& attention, size_t seen, StepKind kind = StepKind::kPrompt,
                         std::vector<float>* scores = nullptr, size_t group = 1) {
  const CacheSpec parsed = CacheSpec::Parse(spec);
  const Method& method = *FindMethod(parsed.terms()[0].name);
  const SidecarSource no_sidecar;
  const MethodContext context{{}, ctx, ComputeType::kF32, no_sidecar};
  const auto selector = method.make_selector(Arguments(method.parameters, parsed.terms()[0]), context);
  std::vector<Position> at;
  for (int p : positions) at.push_back(Position(p));
  std::vector<float> kept(positions.size());
  const ProtectedSet none;
  HeadRows head;
  head.budget = budget;
  head.positions = at;
  head.attention = attention;
  head.votes = scores != nullptr ? *scores : kept;
  LayerRows layer;
  layer.kind = kind;
  layer.group = group;
  layer.tokens_seen = seen;
  layer.protect = &none;
  layer.heads = {&head, 1};
  std::vector<uint32_t> victims;
  selector->Observe(layer, 0);
  selector->Choose(layer, 0, victims);
  EXPECT_TRUE(std::is_sorted(victims.begin(), victims.end()));
  std::vector<int> left;
  for (uint32_t r : victims) left.push_back(positions[r]);
  return left;
}

// Votes zero except s[5] = 1, kernel 3, max pooling, 3 rows: {4, 5, 6} stay of a prefix of 10.
TEST(Selectors, SnapkvPoolsNeighbours) {
  std::vector<float> votes(12, 0.0f);
  votes[5] = 1;
  const std::vector<int> positions = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  EXPECT_EQ(Leaving("snapkv(5, window=2, kernel=3)", 100, 5, positions, votes, 12),
            (std::vector<int>{0, 1, 2, 3, 7, 8, 9}));
  // Without pooling only 5 stands out, and ties leave the lower positions.
  EXPECT_EQ(Leaving("snapkv(5, window=2, kernel=1)", 100, 5, positions, votes, 12),
            (std::vector<int>{2, 3, 4, 6, 7, 8, 9}));
  // A vote inside the window counts for nothing, not even for its neighbours.
  votes.assign(12, 0.0f);
  votes[10] = 9;
  EXPECT_EQ(Leaving("snapkv(5, window=2, kernel=3)", 100, 5, positions, votes, 12),
            (std::vector<int>{3, 4, 5, 6, 7, 8, 9}));
}

// Average pooling divides by the kernel at the edges too: the last row before the window gets (2 + 2) / 3, not 2, which
// ties with the row before it.
TEST(Selectors, SnapkvAverageIsBiasedLowAtEdges) {
  const std::vector<int> positions = {0, 1, 2, 3, 4, 5, 6};
  // Pooled: 1, 1, 2/3, 4/3, 4/3 | window.
  EXPECT_EQ(Leaving("snapkv(3, window=2, kernel=3, pool=avg)", 100, 3, positions, {3, 0, 0, 2, 2, 1.5f, 9}, 7),
            (std::vector<int>{0, 1, 2, 4}));
}

// Rows lie in any order of slots: pooling and ties go by position.
TEST(Selectors, SlotsAreNotPositions) {
  EXPECT_EQ(Leaving("snapkv(4, window=1, kernel=3)", 100, 4, {7, 2, 9, 4, 0, 5}, {0, 0, 0, 1, 0, 0}, 10),
            (std::vector<int>{7, 0}));
  EXPECT_EQ(Leaving("tova(2)", 100, 2, {7, 2, 9, 4}, {1, 1, 1, 1}, 10), (std::vector<int>{7, 9}));
}

TEST(Selectors, H2oAccumulatesOverTheGroup) {
  std::vector<float> scores = {5, 1, 2, 0};
  // Rows get 1, 4, 0 and 2 from the two heads of the group together.
  EXPECT_EQ(Leaving("h2o(heavy=2, recent=1)", 100, 3, {0, 1, 2, 3}, {1, 4, 0, 2}, 4, StepKind::kDecode, &scores, 2),
            (std::vector<int>{2}));
  EXPECT_EQ(scores, (std::vector<float>{6, 5, 2, 2}));
  // Recent ones stay whatever their score.
  scores = {5, 6, 7, 0, 0};
  EXPECT_EQ(Leaving("h2o(heavy=1, recent=2)", 100, 3, {0, 1, 2, 3, 4}, {0, 0, 0, 0, 0}, 5, StepKind::kDecode, &scores),
            (std::vector<int>{0, 1}));
}

TEST(Selectors, WindowTakesTheOldestBehindTheSinks) {
  EXPECT_EQ(Leaving("window(5, sinks=2)", 100, 5, {0, 8, 1, 7, 6, 9}, {}, 10), (std::vector<int>{6}));
  EXPECT_EQ(Leaving("window(5, sinks=2)", 100, 3, {0, 8, 1, 7, 6, 9}, {}, 10), (std::vector<int>{8, 7, 6}));
}

TEST(Selectors, ChooseWorstTakesOneOrMany) {
  const std::vector<Position> positions = {Position(3), Position(1), Position(2), Position(0)};
  HeadRows head;
  head.positions = positions;
  const float nan = std::nanf("");
  const auto worst = [&](size_t n, const std::vector<float>& values) {
    std::vector<uint32_t> leave;
    ChooseWorst(head, values, {}, ProtectedSet(), n, leave);
    return leave;
  };
  EXPECT_EQ(worst(1, {1, 1, 1, 1}), (std::vector<uint32_t>{0}));
  EXPECT_EQ(worst(2, {1, 1, 1, 1}), (std::vector<uint32_t>{0, 2}));
  EXPECT_EQ(worst(1, {2, 1, 2, 2}), (std::vector<uint32_t>{1}));
  EXPECT_EQ(worst(3, {1, nan, 2, 3}), (std::vector<uint32_t>{0, 1, 2}));
  EXPECT_EQ(worst(1, {1, nan, nan, 3}), (std::vector<uint32_t>{2}));
  EXPECT_EQ(worst(0, {1, 1, 1, 1}), (std::vector<uint32_t>{}));
}

TEST(Selectors, ChooseWorstPassesOverProtectedRowsAndThoseOutsideItsRange) {
  std::vector<Position> positions;
  for (int p : {4, 9, 0, 7, 2, 5, 8, 1}) positions.push_back(Position(p));
  HeadRows head;
  head.positions = positions;
  const std::vector<float> values = {3, 0, 0, 1, 5, 2, 1, 4};
  const ProtectedSet protect({{0, 1}, {7, 8}});
  const auto worst = [&](size_t n, PositionRange range) {
    std::vector<uint32_t> leave;
    ChooseWorst(head, values, range, protect, n, leave);
    return leave;
  };
  EXPECT_EQ(worst(1, {}), (std::vector<uint32_t>{1}));
  EXPECT_EQ(worst(1, {0, 9}), (std::vector<uint32_t>{6}));
  EXPECT_EQ(worst(1, {0, 8}), (std::vector<uint32_t>{5}));
  EXPECT_EQ(worst(1, {0, 3}), (std::vector<uint32_t>{7}));
  EXPECT_EQ(worst(3, {0, 9}), (std::vector<uint32_t>{0, 5, 6}));
  EXPECT_EQ(worst(1, {2, 3}), (std::vector<uint32_t>{4}));  // a span before the range does not widen it
}

}  // namespace
}  // namespace lesskv
