// Rows that leave averaged into rows that stay, by weights: a row's weight is the number of tokens in it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <span>
#include <vector>

#include "kvcache/codec/kv_store.h"
#include "kvcache/select/selector.h"

namespace lesskv {

// Of the departures that leaves(row) names, each becomes a merge into the nearest of the rows that stay and that
// takes(row) names, by position; ties: the earlier row. A target's weight becomes the sum of all, and shares are such
// that its key and value are the mean by weights. Without a row that takes them, departures keep their fate.
template <typename Leaves, typename Takes>
void MergeIntoNearest(const HeadRows& head, std::span<Departure> departures, Leaves&& leaves, Takes&& takes) {
  struct Target {
    int32_t position;
    uint32_t row;
  };
  std::vector<char> departs(head.n_rows());
  for (const Departure& departure : departures) departs[departure.row] = 1;
  std::vector<Target> targets;
  for (uint32_t r = 0; r < head.n_rows(); ++r)
    if (!departs[r] && takes(r)) targets.push_back({ToInt(head.positions[r]), r});
  if (targets.empty()) return;
  std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) { return a.position < b.position; });
  for (Departure& departure : departures) {
    if (!leaves(departure.row)) continue;
    const int32_t at = ToInt(head.positions[departure.row]);
    auto next = std::lower_bound(targets.begin(), targets.end(), at, [](const Target& t, int32_t p) { return t.position < p; });
    if (next == targets.end() || (next != targets.begin() && at - std::prev(next)->position <= next->position - at)) --next;
    departure.fate = Fate::kMerge;
    departure.target = next->row;
    departure.share = head.weights[departure.row];
    head.weights[next->row] += departure.share;
  }
  for (Departure& departure : departures)
    if (departure.fate == Fate::kMerge && leaves(departure.row)) departure.share /= head.weights[departure.target];
}

}  // namespace lesskv
