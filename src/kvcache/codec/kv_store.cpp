#include "kvcache/codec/kv_store.h"

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "base/checked.h"

namespace lesskv {

namespace {

// The next list of a pool whose lists keep their memory.
template <typename T>
std::vector<T>& Next(std::vector<std::unique_ptr<std::vector<T>>>& pool, size_t& used) {
  if (used == pool.size()) pool.push_back(std::make_unique<std::vector<T>>());
  pool[used]->clear();
  return *pool[used++];
}

}  // namespace

std::vector<RowSpan>& JobList::NewSpans() { return Next(spans_, n_spans_); }
std::vector<float>& JobList::NewFloats() { return Next(floats_, n_floats_); }
std::vector<int32_t>& JobList::NewInts() { return Next(ints_, n_ints_); }

void JobList::Clear() {
  jobs.clear();
  n_spans_ = n_floats_ = n_ints_ = 0;
}

size_t RowsAhead(size_t n, size_t budget) {
  const size_t block = std::max(size_t{128}, std::bit_floor(n) / 8);
  return std::min(budget, RoundUp(n, block));
}

void KvStore::RewriteValues(size_t, size_t, std::span<const uint32_t>, const float*) {
  CHECK(false, "this store does not rewrite rows");
}

SlotMap PlanCompaction(size_t n_resident, size_t n_step, std::span<const Departure> leaving) {
  SlotMap map;
  const size_t n_rows = n_resident + n_step;
  CHECK(leaving.size() <= n_rows, "{} of {} rows leave", leaving.size(), n_rows);
  map.n_rows = n_rows - leaving.size();

  size_t n_holes = 0;
  while (n_holes < leaving.size() && leaving[n_holes].row < n_resident) ++n_holes;

  // Newcomers go to the holes first (the lowest hole to the oldest newcomer), then behind the resident rows.
  size_t hole = 0, end = n_resident, lost = n_holes;
  for (size_t row = n_resident; row < n_rows; ++row) {
    if (lost < leaving.size() && leaving[lost].row == row) {
      ++lost;
      continue;
    }
    const size_t to = hole < n_holes ? leaving[hole++].row : end++;
    map.moves.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(to)});
  }
  // Holes that are left are filled from the end; a row at the end that is itself a hole is just cut off.
  size_t last_hole = n_holes;
  while (hole < last_hole) {
    --end;
    if (leaving[last_hole - 1].row == end) --last_hole;
    else map.moves.push_back({static_cast<uint32_t>(end), leaving[hole++].row});
  }
  CHECK(end == map.n_rows, "{} rows after a compaction to {}", end, map.n_rows);
  return map;
}

}  // namespace lesskv
