#include "eval/plain_read.h"

#include <algorithm>
#include <atomic>

#include "base/error.h"
#include "base/large_pages.h"
#include "base/threads.h"
#include "eval/stopwatch.h"

namespace lesskv {
namespace {

constexpr size_t kTaskWords = size_t{1} << 14;
std::atomic<uint64_t> g_sink;  // what is read must be used

}  // namespace

PlainRead::PlainRead(size_t bytes) {
  auto* data = reinterpret_cast<uint64_t*>(AllocateLargePages(bytes));
  if (data == nullptr) Fail(ErrorCode::kOutOfMemory, "no memory for a buffer of {} bytes", bytes);
  data_ = {data, bytes / sizeof(uint64_t)};
  std::fill(data_.begin(), data_.end(), 1);
}

PlainRead::~PlainRead() { FreeLargePages(reinterpret_cast<std::byte*>(data_.data()), data_.size_bytes()); }

double PlainRead::Measure() {
  const Stopwatch watch;
  ParallelFor((data_.size() + kTaskWords - 1) / kTaskWords, [&](size_t task) {
    const uint64_t* words = data_.data() + task * kTaskWords;
    const size_t n = std::min(kTaskWords, data_.size() - task * kTaskWords);
    uint64_t sums[8] = {};
    for (size_t i = 0; i + 8 <= n; i += 8)
      for (size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
    for (const uint64_t sum : sums) g_sink.fetch_add(sum, std::memory_order_relaxed);
  });
  return static_cast<double>(data_.size() * sizeof(uint64_t)) / watch.Seconds();
}

}  // namespace lesskv
