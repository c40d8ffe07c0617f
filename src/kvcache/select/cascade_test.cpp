// The rings of the cascading cache: against golden contents, and against pushes written down as the method says them.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/rng.h"
#include "kvcache/cache_config.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

std::unique_ptr<const Selector> MakeSelector(const std::string& spec, size_t ctx = 1000) {
  const CacheSpec parsed = CacheSpec::Parse(spec);
  const Method& method = *FindMethod(parsed.terms()[0].name);
  const SidecarSource no_sidecar;
  return method.make_selector(Arguments(method.parameters, parsed.terms()[0]), {{}, ctx, ComputeType::kF32, no_sidecar});
}

// One KV head whose tokens have scores given once and for all.
struct Head {
  Head(const std::string& spec, size_t rows) : selector(MakeSelector(spec)), budget(rows) {}

  // Tokens [seen, seen + n) arrive in one step; `scores` by position.
  void Step(size_t n, const std::vector<float>& scores) {
    for (size_t i = 0; i < n; ++i) held.push_back(static_cast<int>(seen + i));
    seen += n;
    std::vector<Position> at;
    std::vector<float> votes;
    for (const int p : held) at.push_back(Position(p)), votes.push_back(scores[static_cast<size_t>(p)]);
    HeadRows head;
    head.budget = budget;
    head.positions = at;
    head.votes = votes;
    LayerRows layer;
    layer.tokens_seen = seen;
    layer.n_step = n;
    layer.protect = &protect;
    layer.heads = {&head, 1};
    std::vector<uint32_t> victims;
    selector->Choose(layer, 0, victims);
    ASSERT_TRUE(std::is_sorted(victims.begin(), victims.end()));
    ASSERT_EQ(victims.size(), head.n_leaving());
    lost += victims.size();
    for (size_t i = victims.size(); i-- > 0;) held.erase(held.begin() + victims[i]);
  }
  std::vector<int> Behind(size_t sinks) const { return {held.begin() + static_cast<ptrdiff_t>(sinks), held.end()}; }

  std::unique_ptr<const Selector> selector;
  ProtectedSet protect;
  size_t budget, seen = 0, lost = 0;
  std::vector<int> held;  // in order of slots, which here is that of positions
};

std::vector<float> Zeros(size_t n) { return std::vector<float>(n, 0.0f); }

// The specification's golden vectors, the oldest ring first.
TEST(Cascade, Golden) {
  Head a("cascade(10, levels=2, sinks=2)", 10), b("cascade(10, levels=2, sinks=2)", 10),
      c("cascade(14, levels=3, sinks=2)", 14);
  std::vector<float> sevens(24);
  for (size_t t = 0; t < 24; ++t) sevens[t] = static_cast<float>(7 * t % 11);
  for (size_t t = 0; t < 24; ++t) a.Step(1, Zeros(64)), b.Step(1, sevens);
  for (size_t t = 0; t < 64; ++t) c.Step(1, Zeros(64));
  EXPECT_EQ(a.held, (std::vector<int>{0, 1, 13, 15, 17, 19, 20, 21, 22, 23}));
  EXPECT_EQ(b.held, (std::vector<int>{0, 1, 12, 14, 17, 18, 20, 21, 22, 23}));
  EXPECT_EQ(c.held, (std::vector<int>{0, 1, 41, 45, 49, 51, 53, 55, 57, 59, 60, 61, 62, 63}));
}

// Pushes of one token after another as the specification writes them: rings of slots with a start and a count.
struct Pushes {
  struct Ring {
    std::vector<int> slots;
    size_t start = 0, count = 0;
  };
  Pushes(size_t s, size_t c, size_t levels) : sinks(s), cache(c), rings(levels) {
    for (Ring& ring : rings) ring.slots.resize(c / levels);
  }
  void Push(int t, const std::vector<float>& scores) {
    if (static_cast<size_t>(t) < sinks) return first.push_back(t);
    const bool eager = static_cast<size_t>(t) <= sinks + cache;
    const size_t tau = static_cast<size_t>(t) - sinks;
    int carried = t;
    for (size_t i = 0; i < rings.size(); ++i) {
      Ring& ring = rings[i];
      const size_t width = ring.slots.size();
      if (eager || tau % (size_t{1} << i) == 0) {
        if (ring.count < width) {
          ring.slots[ring.start + ring.count++] = carried;
          return;
        }
        std::swap(carried, ring.slots[ring.start]);
        ring.start = (ring.start + 1) % width;
        continue;
      }
      if (ring.count == 0) {
        ring.slots[0] = carried, ring.count = 1;
        return;
      }
      const size_t newest = (ring.start + ring.count - 1) % ring.count;
      if (scores[static_cast<size_t>(carried)] >= scores[static_cast<size_t>(ring.slots[newest])])
        ring.slots[newest] = carried;
      return;
    }
  }
  std::vector<int> Held() const {
    std::vector<int> held = first;
    for (size_t i = rings.size(); i-- > 0;)
      for (size_t r = 0; r < rings[i].count; ++r)
        held.push_back(rings[i].slots[(rings[i].start + r) % rings[i].slots.size()]);
    return held;
  }
  size_t sinks, cache;
  std::vector<int> first;
  std::vector<Ring> rings;
};

// Rings found anew from ranks are the rings that pushes make: in order of positions, whatever the scores and steps.
TEST(Cascade, RanksAreRings) {
  Rng rng(1);
  for (int round = 0; round < 200; ++round) {
    const size_t levels = 1 + rng.Below(5), width = 1 + rng.Below(5), sinks = rng.Below(4), n = 1 + rng.Below(200);
    const size_t rows = sinks + levels * width;
    SCOPED_TRACE(testing::Message() << levels << " rings of " << width << ", " << sinks << " sinks, " << n << " tokens");
    std::vector<float> scores(n);
    for (float& s : scores) s = static_cast<float>(rng.Below(round % 2 == 0 ? 1000 : 3));
    Head head("cascade(" + std::to_string(rows) + ", levels=" + std::to_string(levels) + ", sinks=" + std::to_string(sinks) + ")",
              rows);
    Pushes pushes(sinks, levels * width, levels);
    while (head.seen < n) {
      const size_t step = std::min<size_t>(n - head.seen, round % 3 == 0 ? 1 : 1 + rng.Below(30));
      for (size_t t = head.seen; t < head.seen + step; ++t) pushes.Push(static_cast<int>(t), scores);
      head.Step(step, scores);
      ASSERT_EQ(head.held, pushes.Held());
      ASSERT_EQ(head.held.size(), std::min(head.seen, rows));
      ASSERT_EQ(head.lost, head.seen - head.held.size());
    }
  }
}

TEST(Cascade, OneLevelIsAWindow) {
  Head one("cascade(9, levels=1, sinks=2)", 9), window("window(9, sinks=2)", 9);
  for (size_t t = 0; t < 40; t += 4) {
    one.Step(4, Zeros(40)), window.Step(4, Zeros(40));
    EXPECT_EQ(one.held, window.held);
  }
  EXPECT_TRUE(one.selector->KeepsOneSetALayer());
  EXPECT_FALSE(one.selector->Observes(StepKind::kDecode).wanted());
}

// The reach in the steady state, newest - oldest + 1, lies in [W (2^c - 1) - 2 (2^(c-1) - 1), W (2^c - 1)].
TEST(Cascade, ReachDoublesWithEachLevel) {
  for (const size_t levels : {size_t{1}, size_t{2}, size_t{4}, size_t{6}}) {
    constexpr size_t kWidth = 8;
    const size_t most = kWidth * ((size_t{1} << levels) - 1), least = most - 2 * ((size_t{1} << (levels - 1)) - 1);
    Head head("cascade(" + std::to_string(2 + levels * kWidth) + ", sinks=2, levels=" + std::to_string(levels) + ")",
              2 + levels * kWidth);
    Rng rng(2);
    const size_t n = 3 * most + 200;
    std::vector<float> scores(n);
    for (float& s : scores) s = rng.UniformFloat(0.0f, 1.0f);
    while (head.seen < n) {
      head.Step(1, scores);
      if (head.seen < 2 * most + 100) continue;
      const auto held = head.Behind(2);
      const auto reach = static_cast<size_t>(held.back() - held.front() + 1);
      ASSERT_GE(reach, least) << levels;
      ASSERT_LE(reach, most) << levels;
    }
  }
}

// Steady state: of each aligned group of 2^i tokens ring i holds at most one, and of a whole group the best one.
TEST(Cascade, ARingHoldsTheBestOfItsGroups) {
  constexpr size_t kWidth = 5, kLevels = 3, kSinks = 2, kTokens = 400;
  Head head("cascade(17, levels=3, sinks=2)", 17);
  Rng rng(3);
  std::vector<float> scores(kTokens);
  for (float& s : scores) s = static_cast<float>(rng.Below(4));
  while (head.seen < kTokens) {
    head.Step(1, scores);
    if (head.seen < 150) continue;
    const auto held = head.Behind(kSinks);
    for (size_t i = 1; i < kLevels; ++i) {
      const int group = 1 << i, origin = -static_cast<int>(kWidth) * (group - 1);
      std::map<int, std::vector<int>> by_group;
      for (size_t r = 0; r < kWidth; ++r) {
        const int tau = held[(kLevels - 1 - i) * kWidth + r] - static_cast<int>(kSinks);
        by_group[(tau - origin) / group].push_back(tau);
      }
      for (const auto& [g, members] : by_group) {
        ASSERT_EQ(members.size(), 1u);
        if (g == by_group.rbegin()->first) continue;  // not yet whole
        int best = g * group + origin;
        for (int t = best; t < g * group + origin + group; ++t)
          if (scores[static_cast<size_t>(t) + kSinks] >= scores[static_cast<size_t>(best) + kSinks]) best = t;
        ASSERT_EQ(members[0], best) << "ring " << i;
      }
    }
  }
}

// Protected tokens take rows from the rings, wherever in the text they stand.
TEST(Cascade, ProtectedTokensNarrowTheRings) {
  Head head("cascade(10, levels=2, sinks=2)", 10);
  head.protect = ProtectedSet({{5, 7}, {30, 33}, {1, 2}});
  for (size_t t = 0; t < 60; ++t) {
    head.Step(t % 7 == 0 && t > 0 ? 3 : 1, Zeros(120));
    ASSERT_EQ(head.held.size(), std::min<size_t>(head.seen, 10));
    for (const int p : {5, 6, 30, 31, 32}) {
      if (static_cast<size_t>(p) >= head.seen) continue;
      ASSERT_TRUE(std::binary_search(head.held.begin(), head.held.end(), p)) << p << " after " << head.seen;
    }
    ASSERT_EQ(head.held.back(), static_cast<int>(head.seen) - 1);
  }
}

// Scores: decayed by the step's queries, then what the step's own queries gave, the largest of the group (or the mean).
TEST(Cascade, ScoresAreMovingAverages) {
  const auto votes = [](const char* spec, size_t group, const std::vector<float>& attention, size_t n_step) {
    std::vector<float> kept = {8, 4, 0};
    const std::vector<Position> at = {Position(0), Position(1), Position(2)};
    HeadRows head;
    head.budget = 3;
    head.positions = at;
    head.votes = kept;
    head.attention = attention;
    LayerRows layer;
    layer.group = group;
    layer.n_step = n_step;
    layer.heads = {&head, 1};
    MakeSelector(spec)->Observe(layer, 0);
    return kept;
  };
  const std::vector<float> by_head = {1, 0, 2, 0, 3, 1, 0.5f, 1, 5};  // [3 heads, 3 rows]
  EXPECT_EQ(votes("cascade(12, decay=0.5)", 3, by_head, 1), (std::vector<float>{5, 5, 5}));
  EXPECT_EQ(votes("cascade(12, decay=0.5)", 3, by_head, 2), (std::vector<float>{3, 4, 5}));
  EXPECT_EQ(votes("cascade(12, decay=0.5, heads=median)", 3, by_head, 1), (std::vector<float>{4.5f, 3, 2}));
  const std::vector<float> two_heads = {1, 0, 2, 3, 5, 0};  // of an even number the lower one in the middle
  EXPECT_EQ(votes("cascade(12, decay=0.5, heads=median)", 2, two_heads, 1), (std::vector<float>{5, 2, 0}));
  EXPECT_EQ(votes("cascade(12, decay=0.5, heads=mean)", 3, {1, 2, 3}, 1), (std::vector<float>{5, 4, 3}));
  const Observation max = MakeSelector("cascade(12, decay=0.5)")->Observes(StepKind::kDecode);
  EXPECT_TRUE(max.by_query_head);
  EXPECT_FLOAT_EQ(max.decay, 0.5f);
  EXPECT_FALSE(MakeSelector("cascade(12, heads=mean)")->Observes(StepKind::kStream).by_query_head);
}

TEST(Cascade, RowsThatDoNotDivideAreRefused) {
  EXPECT_THROW(MakeSelector("cascade(11, levels=2, sinks=2)"), Error);
  EXPECT_THROW(MakeSelector("cascade(5, levels=4, sinks=2)"), Error);
  EXPECT_THROW(CacheSpec::Parse("cascade"), Error);
  EXPECT_THROW(CacheSpec::Parse("cascade(12)+less"), Error);
  EXPECT_NO_THROW(CacheSpec::Parse("cascade(12, positions=true)+less"));
  // Of a percentage, and of rows added, the remainder falls to ring 0: 17 = 7 + 5 + 5.
  Head head("cascade(1.9%, levels=3, sinks=2)", 19);
  while (head.seen < 200) head.Step(1, Zeros(200));
  EXPECT_EQ(head.Behind(12), (std::vector<int>{193, 194, 195, 196, 197, 198, 199}));
}

}  // namespace
}  // namespace lesskv
