#include "base/threads.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "base/error.h"

namespace lesskv {
namespace {

TEST(Threads, EveryTaskRunsOnceWhateverTheNumberOfThreads) {
  for (int threads : {1, 2, 3, 8}) {
    const ThreadPool pool(threads);
    const ThreadScope scope(pool);
    EXPECT_EQ(Threads(), threads);
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

TEST(Threads, ShortRegionsInARowSeeWhatTheOnesBeforeWrote) {
  const ThreadPool pool(3);
  const ThreadScope scope(pool);
  std::vector<size_t> values(5, 0);
  for (size_t round = 0; round < 20000; ++round) ParallelFor(values.size(), [&](size_t i) { values[i] += i + round; });
  for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(values[i], 20000 * i + 20000 * 19999 / 2);
}

TEST(Threads, AThreadIndexBelongsToOneTaskAtATime) {
  const ThreadPool pool(4);
  const ThreadScope scope(pool);
  std::vector<std::atomic<int>> users(4);
  ParallelFor(200, [&](size_t) {
    std::atomic<int>& user = users[static_cast<size_t>(ThreadIndex())];
    EXPECT_EQ(user.fetch_add(1), 0);
    std::this_thread::yield();
    user.fetch_sub(1);
  });
  EXPECT_EQ(ThreadIndex(), 0);
}

TEST(Threads, NestedCallsRunInTheirTask) {
  const ThreadPool pool(3);
  const ThreadScope scope(pool);
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

TEST(Threads, CallersFromSeveralThreadsDoNotMeet) {
  const ThreadPool pool(2);
  std::vector<std::thread> callers;
  std::vector<size_t> totals(4, 0);
  for (size_t c = 0; c < totals.size(); ++c) {
    callers.emplace_back([&pool, &totals, c] {
      const ThreadScope own_scope(pool);
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

using Clock = std::chrono::steady_clock;

// Waits until `count` reaches n, which may never happen.
bool Reaches(const std::atomic<int>& count, int n) {
  const auto deadline = Clock::now() + std::chrono::seconds(10);
  while (count < n && Clock::now() < deadline) std::this_thread::yield();
  return count >= n;
}

// Calls task() on n threads: n tasks meet only if each has a thread of its own. Whether they did.
template <typename Task>
bool OnThreads(int n, Task&& task) {
  std::atomic<int> arrived{0}, met{0};
  ParallelFor(static_cast<size_t>(n), [&](size_t) {
    ++arrived;
    met += Reaches(arrived, n);
    task();
  });
  return met == n;
}
bool RunsInParallel() {
  return OnThreads(2, [] {});
}

TEST(Threads, PoolsOfTwoOwnersRunAtTheSameTime) {
  // All four tasks meet only if both regions are parallel at the same time; of one pool the second would be serial.
  std::atomic<int> arrived{0}, met{0};
  const auto own = [&] {
    const ThreadPool pool(2);
    const ThreadScope scope(pool);
    ParallelFor(2, [&](size_t) {
      ++arrived;
      met += Reaches(arrived, 4);
    });
  };
  std::thread other(own);
  own();
  other.join();
  EXPECT_EQ(met, 4);
}

TEST(Threads, ScopesNestAndEnd) {
  const int outside = Threads();
  const int n = outside % 4 + 2, m = n + 1;  // neither is the process's number
  const ThreadPool first(n), second(m);
  {
    const ThreadScope outer(first);
    EXPECT_EQ(Threads(), n);
    {
      const ThreadScope inner(second);
      EXPECT_EQ(Threads(), m);
      std::thread([&] { EXPECT_EQ(Threads(), outside); }).join();
    }
    EXPECT_EQ(Threads(), n);
    EXPECT_TRUE(OnThreads(2, [&] { EXPECT_EQ(Threads(), n); }));
  }
  EXPECT_EQ(Threads(), outside);
}

TEST(Threads, AnotherPoolsScopeInsideARegionIsOutside) {
  const ThreadPool four(4), two(2);
  const ThreadScope scope(four);
  std::atomic<size_t> total{0};
  std::atomic<int> parallel{0};
  EXPECT_TRUE(OnThreads(4, [&] {
    const int mine = ThreadIndex();
    {
      const ThreadPool own(2);
      const ThreadScope other(own);
      EXPECT_EQ(ThreadIndex(), 0);  // an index of the other pool: work memory has Threads() shares
      parallel += RunsInParallel();
      const ThreadScope shared(two);  // by all four at the same time
      ParallelFor(10, [&](size_t i) {
        EXPECT_LT(ThreadIndex(), Threads());
        const ThreadScope back(four);
        ParallelFor(3, [&](size_t) { total += i; });
      });
    }
    EXPECT_EQ(ThreadIndex(), mine);
  }));
  EXPECT_EQ(parallel, 4);
  EXPECT_EQ(total, 4u * 45 * 3);
}

TEST(Threads, AnExceptionReachesTheCallerAndThePoolGoesOn) {
  for (const int threads : {1, 3}) {
    const ThreadPool pool(threads);
    const ThreadScope scope(pool);
    for (int round = 0; round < 200; ++round) {
      std::atomic<size_t> done{0};
      const auto fails_at_times = [&](size_t i) {
        if (i % 10 == 5) Fail(ErrorCode::kRuntime, "task {}", i);
        ++done;
      };
      EXPECT_THROW(ParallelFor(100, fails_at_times), Error);
      EXPECT_LE(done, 90u);
      done = 0;
      ParallelFor(100, [&](size_t) { ++done; });
      EXPECT_EQ(done, 100u);
    }
    EXPECT_EQ(ThreadIndex(), 0);
    if (threads > 1) {
      EXPECT_TRUE(RunsInParallel());
    }
  }
}

TEST(Threads, WhatAWorkerThrowsReachesTheCaller) {
  const ThreadPool pool(2);
  const ThreadScope scope(pool);
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> thrown{0};
  const auto fails_in_the_worker = [&](size_t) {
    if (std::this_thread::get_id() == caller) {
      Reaches(thrown, 1);
    } else {
      ++thrown;
      throw std::bad_alloc();
    }
  };
  EXPECT_THROW(ParallelFor(2, fails_in_the_worker), std::bad_alloc);
}

TEST(Threads, TasksNotYetBegunWhenOneThrowsAreLeftOut) {
  const ThreadPool pool(2);
  const ThreadScope scope(pool);
  std::atomic<int> others{0};
  const auto task = [&](size_t i) {
    if (i == 0) {
      Reaches(others, 1);
      throw std::bad_alloc();
    }
    ++others;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  EXPECT_THROW(ParallelFor(3000, task), std::bad_alloc);
  EXPECT_LT(others, 2999);
}

TEST(Threads, NumbersOutOfRangeAreRefused) {
  EXPECT_THROW(ThreadPool(-1), Error);
  EXPECT_THROW(ThreadPool(ThreadPool::kMaxThreads + 1), Error);
  EXPECT_GE(ThreadPool(0).size(), 1);
}

#if defined(__GLIBC__)
// Threads whose stack finds no room in the address space cannot be created.
class NoNewThreads {
 public:
  NoNewThreads() {
    pthread_getattr_default_np(&before_);
    pthread_attr_t huge;
    pthread_attr_init(&huge);
    pthread_attr_setstacksize(&huge, size_t{1} << 47);
    EXPECT_EQ(pthread_setattr_default_np(&huge), 0);
    pthread_attr_destroy(&huge);
  }
  ~NoNewThreads() { pthread_setattr_default_np(&before_); }

 private:
  pthread_attr_t before_;
};

TEST(Threads, WhereTheSystemRefusesThreadsThePoolWorksWithFewer) {
  const ThreadPool pool(6);
  const ThreadScope scope(pool);
  EXPECT_TRUE(RunsInParallel());  // starts one worker
  const NoNewThreads no_new_threads;
  EXPECT_THROW(std::thread([] {}).join(), std::system_error);
  for (int round = 0; round < 100; ++round) {
    std::vector<std::atomic<int>> runs(30);
    ParallelFor(runs.size(), [&](size_t i) {
      EXPECT_LT(ThreadIndex(), 2);
      ++runs[i];
    });
    for (const auto& n : runs) EXPECT_EQ(n, 1);
  }
  EXPECT_TRUE(RunsInParallel());
  EXPECT_EQ(Threads(), 6);
}
#endif

}  // namespace
}  // namespace lesskv
