#include "kvcache/ledger.h"

#include <gtest/gtest.h>

namespace lesskv {
namespace {

std::vector<int> Ints(std::span<const Position> positions) {
  std::vector<int> ints;
  for (Position p : positions) ints.push_back(ToInt(p));
  return ints;
}

// Two rows leave, one comes: positions and votes follow the same slot map.
TEST(Ledger, FollowsSlotMaps) {
  ByteCounter counter;
  HeadLedger ledger;
  ledger.Reserve(counter, 5, {5}, {.votes = true});
  EXPECT_EQ(counter.now, 6 * (sizeof(Position) + sizeof(float)));  // and a newcomer
  ledger.AppendNew(10, 5);
  LedgerSpill spill;
  LedgerRows rows = ledger.Gather(15, 1, {.votes = true}, true, spill);
  EXPECT_TRUE(spill.positions.empty());  // one newcomer has room in the ledger itself
  EXPECT_EQ(Ints(rows.positions), (std::vector<int>{10, 11, 12, 13, 14, 15}));
  std::copy_n(std::begin({1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f}), 6, rows.votes.begin());
  const Departure victims[] = {{1}, {3}};
  ledger.Apply(PlanCompaction(5, 1, victims), rows);
  EXPECT_EQ(Ints(ledger.Positions()), (std::vector<int>{10, 15, 12, 14}));
  rows = ledger.Gather(16, 0, {.votes = true}, true, spill);
  EXPECT_EQ(std::vector<float>(rows.votes.begin(), rows.votes.end()), (std::vector<float>{1, 6, 3, 5}));

  // Three newcomers do not: they wait beside it, and the result is the same.
  rows = ledger.Gather(16, 3, {.votes = true}, true, spill);
  EXPECT_EQ(Ints(rows.positions), (std::vector<int>{10, 15, 12, 14, 16, 17, 18}));
  rows.votes[1] = 60;
  rows.votes[6] = 7;
  const Departure more[] = {{0}, {2}};
  ledger.Apply(PlanCompaction(4, 3, more), rows);
  EXPECT_EQ(Ints(ledger.Positions()), (std::vector<int>{16, 15, 17, 14, 18}));
  rows = ledger.Gather(19, 0, {.votes = true}, true, spill);
  EXPECT_EQ(std::vector<float>(rows.votes.begin(), rows.votes.end()), (std::vector<float>{0, 60, 0, 5, 7}));
}

TEST(Ledger, SavedAndLoaded) {
  ByteCounter counter;
  HeadLedger ledger;
  ledger.Reserve(counter, 3, {0}, {.votes = true});
  EXPECT_EQ(counter.now, 16 * (sizeof(Position) + sizeof(float)));
  ledger.AppendNew(2, 3);
  ByteWriter out;
  ledger.Save(out);
  const auto load = [&](std::vector<std::byte> bytes, size_t rows, size_t seen) {
    ByteReader in{bytes};
    HeadLedger loaded;
    loaded.Load(in, counter, rows, {}, {.votes = true}, seen);
    return Ints(loaded.Positions());
  };
  EXPECT_EQ(load(out.bytes, 3, 5), (std::vector<int>{2, 3, 4}));
  EXPECT_THROW(load(out.bytes, 3, 4), Error);  // a position that was not seen
  EXPECT_THROW(load(out.bytes, 2, 5), Error);
  auto twice = out.bytes;
  twice[8] = std::byte{3};  // positions 3, 3, 4
  EXPECT_THROW(load(twice, 3, 5), Error);
  out.bytes.pop_back();
  EXPECT_THROW(load(out.bytes, 3, 5), Error);
  EXPECT_EQ(counter.now, 16 * (sizeof(Position) + sizeof(float)));
}

TEST(Ledger, ShrinkGoesBack) {
  ByteCounter counter;
  HeadLedger ledger;
  ledger.Reserve(counter, 7, {7}, {});
  ledger.Shrink(counter, {0}, {});
  EXPECT_EQ(counter.now, 0u);
  ledger.Reserve(counter, 100, {0}, {});
  ledger.AppendNew(0, 100);
  ledger.Reserve(counter, 300, {0}, {});
  EXPECT_EQ(counter.now, 304 * sizeof(Position));
  ledger.Reserve(counter, 16 * 128 + 1, {0}, {});  // many: a block at a time
  EXPECT_EQ(counter.now, 17 * 128 * sizeof(Position));
  ledger.Shrink(counter, {0}, {});
  EXPECT_EQ(counter.now, 112 * sizeof(Position));
  EXPECT_EQ(ToInt(ledger.Positions()[99]), 99);
}

}  // namespace
}  // namespace lesskv
