// The process's worker threads: one pool, the one oneDNN also uses (OpenMP). With LESSKV_PLAIN_THREADS it is built on
// std::thread instead, for ThreadSanitizer and fuzzers. Nothing may throw inside a parallel region.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace lesskv {

// Number of threads of later parallel regions, 1 or more. Set once at start-up. `n` = 0: one a physical CPU available.
void SetThreads(int n);
int Threads();

namespace internal {
using TaskFunction = void (*)(void* context, size_t index);
void RunTasks(size_t n_tasks, TaskFunction task, void* context);
}  // namespace internal

// Calls task(i) once for each i in [0, n), in any order, on up to Threads() threads; returns when all are done.
// Tasks are handed out one at a time, so they may be of unequal length. Nested calls run serially.
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
