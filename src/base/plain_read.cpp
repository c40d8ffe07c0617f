#include "base/checked.h"
#include "base/plain_read.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "base/error.h"
#include "base/large_pages.h"
#include "base/threads.h"

namespace lesskv {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kTaskLines = (size_t{1} << 20) / kLine;
std::atomic<uint64_t> g_sink;  // what is read must be used

inline void AddLine(const std::byte* line, uint64_t* sums) {
  uint64_t words[kLine / sizeof(uint64_t)];
  std::memcpy(words, line, sizeof words);
  for (size_t j = 0; j < std::size(words); ++j) sums[j] += words[j];
}

}  // namespace

double PlainReadSeconds(std::span<const std::byte> data) {
  const auto start = std::chrono::steady_clock::now();
  const size_t n_lines = data.size() / kLine;
  ParallelFor(CeilDiv(n_lines, kTaskLines), [&](size_t task) {
    const std::byte* first = data.data() + task * kTaskLines * kLine;
    const size_t half = std::min(kTaskLines, n_lines - task * kTaskLines) / 2;
    uint64_t sums[2][kLine / sizeof(uint64_t)] = {};
    for (size_t i = 0; i < half; ++i) {
      AddLine(first + i * kLine, sums[0]);
      AddLine(first + (half + i) * kLine, sums[1]);
    }
    for (const auto& stream : sums)
      for (const uint64_t sum : stream) g_sink.fetch_add(sum, std::memory_order_relaxed);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

PlainRead::PlainRead(size_t bytes) {
  std::byte* data = AllocateLargePages(bytes);
  if (data == nullptr) Fail(ErrorCode::kOutOfMemory, "no memory for a buffer of {} bytes", bytes);
  data_ = {data, bytes};
  std::memset(data, 1, bytes);
}

PlainRead::~PlainRead() { FreeLargePages(data_.data(), data_.size()); }

}  // namespace lesskv
