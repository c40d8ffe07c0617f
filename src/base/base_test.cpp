#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <vector>

#include "base/checked.h"
#include "base/dtype.h"
#include "base/rng.h"
#include "base/threads.h"

namespace lesskv {
namespace {

TEST(Error, ExitStatusTellsInputFromFailure) {
  EXPECT_EQ(Error(ErrorCode::kInvalidArgument, "x").ExitStatus(), 2);
  EXPECT_EQ(Error(ErrorCode::kBadFile, "x").ExitStatus(), 2);
  EXPECT_EQ(Error(ErrorCode::kNotFound, "x").ExitStatus(), 2);
  EXPECT_EQ(Error(ErrorCode::kMismatch, "x").ExitStatus(), 2);
  EXPECT_EQ(Error(ErrorCode::kIo, "x").ExitStatus(), 1);
  EXPECT_EQ(Error(ErrorCode::kRuntime, "x").ExitStatus(), 1);
}

TEST(Checked, OverflowIsAnError) {
  EXPECT_EQ(CheckedMul<uint64_t>(6, 7, "size"), 42u);
  EXPECT_THROW(CheckedMul<uint64_t>(uint64_t{1} << 33, uint64_t{1} << 33, "size"), Error);
  EXPECT_THROW(CheckedAdd<uint64_t>(~uint64_t{0}, 1, "size"), Error);
  EXPECT_EQ(CheckedCast<int8_t>(127, "value"), 127);
  EXPECT_THROW(CheckedCast<int8_t>(128, "value"), Error);
  EXPECT_THROW(CheckedCast<uint32_t>(-1, "value"), Error);
}

TEST(Threads, EveryTaskRunsOnceAlsoNested) {
  const ThreadPool pool(3);
  const ThreadScope scope(pool);
  std::vector<std::atomic<int>> hits(1000);
  ParallelFor(hits.size(), [&](size_t i) { ++hits[i]; });
  for (const auto& hit : hits) EXPECT_EQ(hit, 1);
  std::atomic<int> inner{0};
  ParallelFor(4, [&](size_t) { ParallelFor(5, [&](size_t) { ++inner; }); });
  EXPECT_EQ(inner, 20);
  ParallelFor(0, [&](size_t) { ADD_FAILURE(); });
}

TEST(Rng, SeedFixesTheSequenceAndRangesHold) {
  Rng a(7), b(7), c(8);
  EXPECT_EQ(a.Next(), b.Next());
  EXPECT_NE(a.Next(), c.Next());
  std::set<uint64_t> seen;
  for (int i = 0; i < 1000; ++i) seen.insert(a.Below(5));
  EXPECT_EQ(seen, (std::set<uint64_t>{0, 1, 2, 3, 4}));
  double sum = 0, squares = 0;
  for (int i = 0; i < 20000; ++i) {
    const double x = a.Normal();
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / 20000, 0, 0.03);
  EXPECT_NEAR(squares / 20000, 1, 0.05);
}

TEST(DType, SizesAndUnknownNumbers) {
  EXPECT_EQ(RowBytes(DType::kQ8_0, 64), 68u);
  EXPECT_EQ(RowBytes(DType::kQ4_K, 512), 288u);
  EXPECT_EQ(FindDType(16), nullptr);  // IQ2_XXS
  EXPECT_EQ(FindDType(4000), nullptr);
}

}  // namespace
}  // namespace lesskv
