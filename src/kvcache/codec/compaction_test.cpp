// Slot maps against what they mean: who stays, dense slots, no row lost on the way.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/rng.h"
#include "kvcache/codec/kv_store.h"

namespace lesskv {
namespace {

// Carries the plan out on rows 0 .. n-1, the step's rows in a place of their own, as stores do.
std::vector<uint32_t> Carry(size_t n_resident, size_t n_step, const SlotMap& plan) {
  constexpr uint32_t kEmpty = ~0u;
  std::vector<uint32_t> slots(std::max(n_resident, plan.n_rows), kEmpty);
  for (uint32_t i = 0; i < n_resident; ++i) slots[i] = i;
  for (const RowMove& move : plan.moves) {
    EXPECT_LT(move.to, plan.n_rows);
    EXPECT_LT(move.from, n_resident + n_step);
    slots[move.to] = move.from < n_resident ? slots[move.from] : move.from;
  }
  slots.resize(plan.n_rows);
  return slots;
}

std::vector<Departure> Leaving(const std::vector<uint32_t>& rows) {
  std::vector<Departure> leaving;
  for (const uint32_t row : rows) leaving.push_back({row});
  return leaving;
}

TEST(Compaction, ByHand) {
  // The newcomer takes the victim's slot.
  const std::vector<Departure> one = Leaving({1});
  EXPECT_EQ(Carry(4, 1, PlanCompaction(4, 1, one)), (std::vector<uint32_t>{0, 4, 2, 3}));
  // The newcomer itself leaves: nothing moves.
  const std::vector<Departure> self = Leaving({4});
  EXPECT_TRUE(PlanCompaction(4, 1, self).moves.empty());
  // More holes than newcomers: the last rows fill them.
  const std::vector<Departure> three = Leaving({0, 2, 4});
  EXPECT_EQ(Carry(5, 1, PlanCompaction(5, 1, three)), (std::vector<uint32_t>{5, 1, 3}));
  EXPECT_EQ(Carry(0, 3, PlanCompaction(0, 3, {})), (std::vector<uint32_t>{0, 1, 2}));
  const std::vector<Departure> all = Leaving({0, 1, 2});
  EXPECT_EQ(PlanCompaction(2, 1, all).n_rows, 0u);
}

TEST(Compaction, KeepsExactlyTheSurvivors) {
  Rng rng(3);
  for (int round = 0; round < 3000; ++round) {
    const size_t n_resident = rng.Below(12), n_step = rng.Below(12), n = n_resident + n_step;
    std::vector<uint32_t> victims, survivors;
    const uint64_t odds = 1 + rng.Below(5);
    for (uint32_t r = 0; r < n; ++r) (rng.Below(odds) == 0 ? victims : survivors).push_back(r);
    const SlotMap plan = PlanCompaction(n_resident, n_step, Leaving(victims));
    ASSERT_EQ(plan.n_rows, survivors.size());
    std::vector<uint32_t> slots = Carry(n_resident, n_step, plan);
    // A resident row that stays in range and is not a hole does not move: no more copies than must be.
    ASSERT_LE(plan.moves.size(), std::max(victims.size(), n_step));
    std::sort(slots.begin(), slots.end());
    ASSERT_EQ(slots, survivors) << n_resident << " + " << n_step;
  }
}

}  // namespace
}  // namespace lesskv
