#include "base/threads.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace lesskv {
namespace {

class ThreadsTest : public testing::Test {
 protected:
  ~ThreadsTest() override { SetThreads(0); }
};

TEST_F(ThreadsTest, EveryTaskRunsOnceWhateverTheNumberOfThreads) {
  for (int threads : {1, 2, 3, 8}) {
    SetThreads(threads);
    for (size_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(n);
      ParallelFor(n, [&](size_t i) {
        EXPECT_LT(ThreadIndex(), threads);
        ++runs[i];
      });
      for (size_t i = 0; i < n; ++i) EXPECT_EQ(runs[i], 1) << i << " of " << n << " on " << threads;
    }
  }
}

TEST_F(ThreadsTest, ShortRegionsInARowSeeWhatTheOnesBeforeWrote) {
  SetThreads(3);
  std::vector<size_t> values(5, 0);
  for (size_t round = 0; round < 20000; ++round) ParallelFor(values.size(), [&](size_t i) { values[i] += i + round; });
  for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(values[i], 20000 * i + 20000 * 19999 / 2);
}

TEST_F(ThreadsTest, AThreadIndexBelongsToOneTaskAtATime) {
  SetThreads(4);
  std::vector<std::atomic<int>> users(4);
  ParallelFor(200, [&](size_t) {
    std::atomic<int>& user = users[static_cast<size_t>(ThreadIndex())];
    EXPECT_EQ(user.fetch_add(1), 0);
    std::this_thread::yield();
    user.fetch_sub(1);
  });
  EXPECT_EQ(ThreadIndex(), 0);
}

TEST_F(ThreadsTest, NestedCallsRunInTheirTask) {
  SetThreads(3);
  std::vector<size_t> sums(16, 0);
  ParallelFor(sums.size(), [&](size_t i) {
    const int mine = ThreadIndex();
    ParallelFor(100, [&](size_t j) {
      EXPECT_EQ(ThreadIndex(), mine);
      sums[i] += j;
    });
  });
  for (size_t sum : sums) EXPECT_EQ(sum, 4950u);
}

TEST_F(ThreadsTest, CallersFromSeveralThreadsDoNotMeet) {
  SetThreads(2);
  std::vector<std::thread> callers;
  std::vector<size_t> totals(4, 0);
  for (size_t c = 0; c < totals.size(); ++c) {
    callers.emplace_back([&totals, c] {
      for (int round = 0; round < 500; ++round) {
        std::atomic<size_t> total{0};
        ParallelFor(10, [&](size_t i) { total += i; });
        totals[c] += total;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (size_t total : totals) EXPECT_EQ(total, 500u * 45);
}

}  // namespace
}  // namespace lesskv
