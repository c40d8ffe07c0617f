// Parallel regions: ParallelFor hands tasks to the threads of the calling thread's current pool. That is the pool of the
// innermost ThreadScope, or one of the process with a thread a CPU, so that small programs need no ceremony.
//
// Made for regions of microseconds that follow one another thousands of times a second, on machines that other
// programs use too: idle workers watch for the next region for about kSpinMicroseconds and then sleep, and a caller
// waits only for workers that have begun a task, never for one that the system has not yet let run.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace lesskv {

namespace internal {
class Workers;
using TaskFunction = void (*)(void* context, size_t index);
void RunTasks(size_t n_tasks, TaskFunction task, void* context);
}  // namespace internal

// Threads that serve the regions of one owner, such as an engine; pools do not disturb each other. They are started
// when regions first need them; where the system refuses one, the pool works with those it has. It is used through
// scopes, from any thread, and must outlive them.
class ThreadPool {
 public:
  static constexpr int kMaxThreads = 1024;

  // `threads` in [0, kMaxThreads], the calling one included; 0: one a CPU available. Throws Error for others.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Threads of a region at most, 1 or more. Never changes, also when fewer could be started.
  int size() const;

 private:
  friend class ThreadScope;
  std::unique_ptr<internal::Workers> workers_;
};

// Makes a pool the calling thread's current one until the scope ends. Scopes nest, and belong to their thread. A scope
// of another pool inside a region begins outside: its regions are parallel again.
class ThreadScope {
 public:
  explicit ThreadScope(const ThreadPool& pool);
  ~ThreadScope();
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  internal::Workers* outer_workers_;
  int outer_index_;
  bool outer_inside_;
};

// Size of the current pool: the number of shares that per-thread work memory needs.
int Threads();

// Index of the calling thread inside a ParallelFor, in [0, Threads()); 0 outside.
int ThreadIndex();

// Calls task(i) once for each i in [0, n), in any order, on up to Threads() threads; returns when all are done.
// Tasks are handed out one at a time, so they may be of unequal length. Nested calls run serially, and so does a call
// from a second thread while the pool is busy with another's. When a task throws, those not yet begun are left out, and
// the first exception is rethrown here.
template <typename Task>
void ParallelFor(size_t n, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  internal::RunTasks(
      n, [](void* context, size_t index) { (*static_cast<Plain*>(context))(index); },
      const_cast<std::remove_const_t<Plain>*>(std::addressof(task)));
}

}  // namespace lesskv
