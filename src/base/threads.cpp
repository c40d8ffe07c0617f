#include "base/threads.h"

#include <algorithm>
#include <thread>

#include "base/check.h"

#ifdef LESSKV_PLAIN_THREADS
#include <atomic>
#include <vector>
#else
#include <omp.h>
#endif

namespace lesskv {
namespace {

int g_threads = 0;
int DefaultThreads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

}  // namespace

int Threads() { return g_threads > 0 ? g_threads : DefaultThreads(); }

#ifdef LESSKV_PLAIN_THREADS

namespace {
thread_local int t_index = 0;
thread_local bool t_inside = false;
}  // namespace

void SetThreads(int n) { g_threads = n; }
int ThreadIndex() { return t_index; }

void internal::RunTasks(size_t n_tasks, TaskFunction task, void* context) {
  const size_t n_threads = t_inside ? 1 : std::min<size_t>(static_cast<size_t>(Threads()), n_tasks);
  if (n_threads <= 1) {
    for (size_t i = 0; i < n_tasks; ++i) task(context, i);
    return;
  }
  std::atomic<size_t> next{0};
  auto work = [&](int index) {
    t_index = index;
    t_inside = true;
    for (size_t i = next++; i < n_tasks; i = next++) task(context, i);
    t_inside = false;
    t_index = 0;
  };
  std::vector<std::thread> workers;
  for (size_t t = 1; t < n_threads; ++t) workers.emplace_back(work, static_cast<int>(t));
  work(0);
  for (std::thread& worker : workers) worker.join();
}

#else

void SetThreads(int n) {
  g_threads = n;
  omp_set_dynamic(0);
  omp_set_num_threads(Threads());  // oneDNN takes its share from here
}

int ThreadIndex() { return omp_get_thread_num(); }

void internal::RunTasks(size_t n_tasks, TaskFunction task, void* context) {
  const int n_threads = static_cast<int>(std::min<size_t>(static_cast<size_t>(Threads()), n_tasks));
  if (n_threads <= 1 || omp_in_parallel()) {
    for (size_t i = 0; i < n_tasks; ++i) task(context, i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
  for (size_t i = 0; i < n_tasks; ++i) task(context, i);
}

#endif

}  // namespace lesskv
