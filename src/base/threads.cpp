#include "base/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"

namespace lesskv {
namespace {

constexpr int kSpinMicroseconds = 50;

// Of the calling thread: its pool (null: the process's), its index inside a region of that pool, whether it is in one.
thread_local internal::Workers* t_workers = nullptr;
thread_local int t_index = 0;
thread_local bool t_inside = false;

int AvailableThreads() {
  cpu_set_t allowed;
  const int n = sched_getaffinity(0, sizeof allowed, &allowed) == 0
                    ? CPU_COUNT(&allowed)
                    : static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(n, 1, ThreadPool::kMaxThreads);
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Watches for done() and sleeps on `word` once that has taken too long.
template <typename Done>
void Await(std::atomic<uint32_t>& word, Done done) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(kSpinMicroseconds);
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (done(word.load(std::memory_order_acquire))) return;
      Pause();
    }
    if (Clock::now() > deadline) break;
  }
  for (uint32_t value = word.load(std::memory_order_acquire); !done(value);
       value = word.load(std::memory_order_acquire))
    word.wait(value, std::memory_order_acquire);
}

}  // namespace

class internal::Workers {
 public:
  explicit Workers(int size) : size_(size) { threads_.reserve(static_cast<size_t>(size) - 1); }

  ~Workers() {
    stop_.store(true, std::memory_order_relaxed);
    state_.fetch_add(kEpoch, std::memory_order_release);
    state_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // False when another thread's region is running. Rethrows what a task threw.
  bool TryRun(size_t n_tasks, TaskFunction task, void* context, int n_threads) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    Start(n_threads - 1);
    task_ = task;
    context_ = context;
    n_tasks_ = n_tasks;
    n_threads_ = n_threads;
    next_.store(0, std::memory_order_relaxed);
    // Nobody is inside: the last region was closed and left. Open the next one.
    state_.store(((state_.load(std::memory_order_relaxed) & ~kInside) + kEpoch) | kOpen, std::memory_order_release);
    state_.notify_all();
    t_inside = true;
    RunShare();
    t_inside = false;
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);  // who has not begun by now stays out
    Await(state_, [](uint32_t state) { return (state & kInside) == 0; });
    Finish();
    return true;
  }

 private:
  // One word says all: how many workers are inside the region, whether it may be entered, and which region it is.
  static constexpr uint32_t kInside = 0xffff, kOpen = 1u << 16, kEpoch = 1u << 17;

  // What the system refuses once is not asked for again: a region must not pay for that each time.
  void Start(int n) {
    while (may_start_ && static_cast<int>(threads_.size()) < n) {
      try {
        threads_.emplace_back([this, index = static_cast<int>(threads_.size()) + 1] { Work(index); });
      } catch (const std::exception&) {
        may_start_ = false;
      }
    }
  }

  void RunShare() {
    try {
      for (size_t i = next_.fetch_add(1, std::memory_order_relaxed); i < n_tasks_;
           i = next_.fetch_add(1, std::memory_order_relaxed))
        task_(context_, i);
    } catch (...) {
      next_.store(n_tasks_, std::memory_order_relaxed);
      if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
    }
  }

  // Everybody has left the region.
  void Finish() {
    const std::exception_ptr failure = std::exchange(failure_, nullptr);
    failed_.store(false, std::memory_order_relaxed);
    busy_.store(false, std::memory_order_release);
    if (failure) std::rethrow_exception(failure);
  }

  void Work(int index) {
    t_workers = this;
    t_index = index;
    t_inside = true;
    for (uint32_t seen = 0;;) {
      Await(state_, [&](uint32_t state) { return state / kEpoch != seen; });
      if (stop_.load(std::memory_order_relaxed)) return;
      uint32_t state = state_.load(std::memory_order_acquire);
      seen = state / kEpoch;
      while ((state & kOpen) != 0 && !state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      }
      if ((state & kOpen) == 0) continue;
      seen = state / kEpoch;
      if (index < n_threads_) RunShare();
      if ((state_.fetch_sub(1, std::memory_order_acq_rel) & (kInside | kOpen)) == 1) state_.notify_all();
    }
  }

  const int size_;
  std::atomic<bool> busy_{false};  // not a mutex: a thread may come back to a pool from inside another's region
  std::atomic<uint32_t> state_{0};
  std::atomic<bool> stop_{false};
  // The region's work: written while nobody is inside, read by those who have entered.
  TaskFunction task_ = nullptr;
  void* context_ = nullptr;
  size_t n_tasks_ = 0;
  int n_threads_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;  // written by the one who set failed_, read when everybody has left
  alignas(64) std::atomic<size_t> next_{0};
  bool may_start_ = true;
  std::vector<std::thread> threads_;
};

namespace {

internal::Workers& CurrentWorkers() {
  if (t_workers != nullptr) return *t_workers;
  static internal::Workers of_the_process(AvailableThreads());
  return of_the_process;
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  if (threads < 0 || threads > kMaxThreads)
    Fail(ErrorCode::kInvalidArgument, "--threads: expected 0 (all CPUs) to {}, found {}", kMaxThreads, threads);
  workers_ = std::make_unique<internal::Workers>(threads == 0 ? AvailableThreads() : threads);
}
ThreadPool::~ThreadPool() = default;
int ThreadPool::size() const { return workers_->size(); }

ThreadScope::ThreadScope(const ThreadPool& pool)
    : outer_workers_(t_workers), outer_index_(t_index), outer_inside_(t_inside) {
  if (pool.workers_.get() == t_workers) return;  // inside a region of this pool it stays so
  t_workers = pool.workers_.get();
  t_index = 0;
  t_inside = false;
}

ThreadScope::~ThreadScope() {
  t_workers = outer_workers_;
  t_index = outer_index_;
  t_inside = outer_inside_;
}

int Threads() { return CurrentWorkers().size(); }
int ThreadIndex() { return t_index; }

void internal::RunTasks(size_t n_tasks, TaskFunction task, void* context) {
  if (n_tasks > 1 && !t_inside) {
    Workers& workers = CurrentWorkers();
    const auto n_threads = static_cast<int>(std::min(static_cast<size_t>(workers.size()), n_tasks));
    if (n_threads > 1 && workers.TryRun(n_tasks, task, context, n_threads)) return;
  }
  for (size_t i = 0; i < n_tasks; ++i) task(context, i);
}

}  // namespace lesskv
