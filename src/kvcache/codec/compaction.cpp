#include "base/check.h"
#include "kvcache/codec/kv_store.h"

namespace lesskv {

Compaction PlanCompaction(size_t n_resident, size_t n_step, std::span<const uint32_t> victims) {
  Compaction plan;
  const size_t n_rows = n_resident + n_step;
  CHECK(victims.size() <= n_rows, "{} victims of {} rows", victims.size(), n_rows);
  plan.n_rows = n_rows - victims.size();

  size_t n_old_victims = 0;
  while (n_old_victims < victims.size() && victims[n_old_victims] < n_resident) ++n_old_victims;
  const auto holes = victims.first(n_old_victims);
  const auto lost_newcomers = victims.subspan(n_old_victims);

  // Newcomers go to the holes first (the lowest hole to the oldest newcomer), then behind the resident rows.
  size_t hole = 0, end = n_resident, lost = 0;
  for (size_t row = n_resident; row < n_rows; ++row) {
    if (lost < lost_newcomers.size() && lost_newcomers[lost] == row) {
      ++lost;
      continue;
    }
    const size_t to = hole < holes.size() ? holes[hole++] : end++;
    plan.moves.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(to)});
  }
  // Holes that are left are filled from the end; a row at the end that is itself a hole is just cut off.
  size_t last_hole = holes.size();
  while (hole < last_hole) {
    --end;
    if (holes[last_hole - 1] == end) --last_hole;
    else plan.moves.push_back({static_cast<uint32_t>(end), holes[hole++]});
  }
  CHECK(end == plan.n_rows, "{} rows after a compaction to {}", end, plan.n_rows);
  return plan;
}

}  // namespace lesskv
