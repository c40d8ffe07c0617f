// Helpers that selectors share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "base/check.h"
#include "kvcache/kv_cache.h"
#include "kvcache/select/selector.h"

namespace lesskv {

// Half-open range of positions.
struct PositionRange {
  int32_t begin = 0;
  int32_t end = std::numeric_limits<int32_t>::max();
};

// Appends to `leave`, ascending, the n_leave rows of a head with the lowest values [n_rows] among those at positions in
// `range` that are not protected; of equal values the higher position (so that the lower position stays). Not-a-number
// is below every number. CHECKs that there are enough. One victim, the steady state of decoding, costs one quick scan.
void ChooseWorst(const HeadRows& head, std::span<const float> values, PositionRange range, const ProtectedSet& protect,
                 size_t n_leave, std::vector<uint32_t>& leave);

// Appends to `leave`, ascending, the first n_leave of `rows` in the order of before(a, b). Reorders `rows`.
template <typename Before>
void TakeFirst(std::vector<uint32_t>& rows, size_t n_leave, Before&& before, std::vector<uint32_t>& leave) {
  CHECK(n_leave <= rows.size(), "{} rows must leave, {} may", n_leave, rows.size());
  if (n_leave == 0) return;
  std::nth_element(rows.begin(), rows.begin() + static_cast<ptrdiff_t>(n_leave - 1), rows.end(), before);
  rows.resize(n_leave);
  std::sort(rows.begin(), rows.end());
  leave.insert(leave.end(), rows.begin(), rows.end());
}

}  // namespace lesskv
