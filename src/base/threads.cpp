#include "base/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace lesskv {
namespace {

constexpr int kSpinMicroseconds = 50;

int g_threads = 0;
thread_local int t_index = 0;
thread_local bool t_inside = false;

int DefaultThreads() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
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

class Pool {
 public:
  ~Pool() {
    stop_.store(true, std::memory_order_relaxed);
    state_.fetch_add(kEpoch, std::memory_order_release);
    state_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  // False when another thread's region is running.
  bool TryRun(size_t n_tasks, internal::TaskFunction task, void* context, int n_threads) {
    std::unique_lock lock(owner_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    while (static_cast<int>(workers_.size()) < n_threads - 1)
      workers_.emplace_back([this, index = static_cast<int>(workers_.size()) + 1] { Work(index); });
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
    return true;
  }

 private:
  // One word says all: how many workers are inside the region, whether it may be entered, and which region it is.
  static constexpr uint32_t kInside = 0xffff, kOpen = 1u << 16, kEpoch = 1u << 17;

  void RunShare() {
    for (size_t i = next_.fetch_add(1, std::memory_order_relaxed); i < n_tasks_;
         i = next_.fetch_add(1, std::memory_order_relaxed))
      task_(context_, i);
  }

  void Work(int index) {
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

  std::mutex owner_;
  std::atomic<uint32_t> state_{0};
  std::atomic<bool> stop_{false};
  // The region's work: written while nobody is inside, read by those who have entered.
  internal::TaskFunction task_ = nullptr;
  void* context_ = nullptr;
  size_t n_tasks_ = 0;
  int n_threads_ = 0;
  alignas(64) std::atomic<size_t> next_{0};
  std::vector<std::thread> workers_;
};

Pool& ThePool() {
  static Pool pool;
  return pool;
}

}  // namespace

void SetThreads(int n) { g_threads = n; }
int Threads() {
  static const int available = DefaultThreads();
  return g_threads > 0 ? g_threads : available;
}

int ThreadIndex() { return t_index; }

void internal::RunTasks(size_t n_tasks, TaskFunction task, void* context) {
  const int n_threads = static_cast<int>(std::min<size_t>(static_cast<size_t>(Threads()), n_tasks));
  if (n_threads > 1 && !t_inside && ThePool().TryRun(n_tasks, task, context, n_threads)) return;
  for (size_t i = 0; i < n_tasks; ++i) task(context, i);
}

}  // namespace lesskv
