// The process's worker threads: one pool, started when it is first needed. Nothing may throw inside a parallel region.
//
// Made for regions of microseconds that follow one another thousands of times a second, on machines that other
// programs use too: idle workers watch for the next region for about kSpinMicroseconds and then sleep, and a caller
// waits only for workers that have begun a task, never for one that the system has not yet let run.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace lesskv {

// Number of threads of later parallel regions, 1 or more. Set once at start-up. `n` = 0: one a CPU available.
void SetThreads(int n);
int Threads();

namespace internal {
using TaskFunction = void (*)(void* context, size_t index);
void RunTasks(size_t n_tasks, TaskFunction task, void* context);
}  // namespace internal

// Calls task(i) once for each i in [0, n), in any order, on up to Threads() threads; returns when all are done.
// Tasks are handed out one at a time, so they may be of unequal length. Nested calls run serially, and so does a call
// from a second thread while the pool is busy with another's.
template <typename Task>
void ParallelFor(size_t n, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  internal::RunTasks(
      n, [](void* context, size_t index) { (*static_cast<Plain*>(context))(index); },
      const_cast<std::remove_const_t<Plain>*>(std::addressof(task)));
}

// Index of the calling thread inside a ParallelFor, in [0, Threads()); 0 outside.
int ThreadIndex();

}  // namespace lesskv
