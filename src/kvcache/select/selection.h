// Helpers that selectors share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "kvcache/kv_cache.h"
#include "kvcache/select/selector.h"

namespace lesskv {

// Adds a [group, n_rows] matrix, summed over the group, to out [n_rows]. The field's usual reduction of scores over a
// query group.
void AddOverGroup(std::span<const float> attention, size_t group, std::span<float> out);

// Appends to `leave`, ascending, the n_leave worst rows among those with evictable(row): lower value(row) first, and
// of equal values the higher position (so that the lower position stays). CHECKs that there are enough.
// One victim, the steady state of decoding, costs one scan.
template <typename Evictable, typename Value>
void ChooseWorst(const HeadRows& head, size_t n_leave, Evictable&& evictable, Value&& value,
                 std::vector<uint32_t>& leave) {
  if (n_leave == 0) return;
  // Not-a-number is below every number: the order stays total whatever was computed.
  const auto worse = [&](uint32_t a, uint32_t b) {
    const auto va = value(a), vb = value(b);
    if (va != va || vb != vb) {
      if ((va != va) != (vb != vb)) return va != va;
      return ToInt(head.positions[a]) > ToInt(head.positions[b]);
    }
    return va != vb ? va < vb : ToInt(head.positions[a]) > ToInt(head.positions[b]);
  };
  const auto n_rows = static_cast<uint32_t>(head.n_rows());
  if (n_leave == 1) {
    uint32_t worst = n_rows;
    for (uint32_t r = 0; r < n_rows; ++r) {
      // The value first: it turns nearly every row away, and is the cheaper question.
      if (worst < n_rows && value(r) > value(worst)) continue;
      if (evictable(r) && (worst == n_rows || worse(r, worst))) worst = r;
    }
    CHECK(worst < n_rows, "no row may leave");
    leave.push_back(worst);
    return;
  }
  std::vector<uint32_t> rows;
  rows.reserve(n_rows);
  for (uint32_t r = 0; r < n_rows; ++r)
    if (evictable(r)) rows.push_back(r);
  CHECK(n_leave <= rows.size(), "{} rows must leave, {} may", n_leave, rows.size());
  std::nth_element(rows.begin(), rows.begin() + static_cast<ptrdiff_t>(n_leave - 1), rows.end(), worse);
  rows.resize(n_leave);
  std::sort(rows.begin(), rows.end());
  leave.insert(leave.end(), rows.begin(), rows.end());
}

}  // namespace lesskv
