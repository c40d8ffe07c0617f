// Tokens the caller protects (a system prompt, --keep, --protect): an explicit set of positions, never a high score.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvcache/kv_cache.h"

namespace lesskv {

// Half-open range of positions [begin, end).
struct ProtectedSpan {
  int32_t begin = 0;
  int32_t end = 0;
};

class ProtectedSet {
 public:
  ProtectedSet() = default;
  // Spans may overlap and be in any order. Throws Error for negative or reversed ones.
  explicit ProtectedSet(std::vector<ProtectedSpan> spans);

  bool empty() const { return spans_.empty(); }
  size_t size() const { return size_; }  // positions in the set
  bool Contains(Position position) const {
    for (const ProtectedSpan& span : spans_)
      if (ToInt(position) >= span.begin && ToInt(position) < span.end) return true;
    return false;
  }
  // Positions of the set at or beyond `begin`.
  size_t CountFrom(int32_t begin) const;
  const std::vector<ProtectedSpan>& spans() const { return spans_; }  // sorted, disjoint

 private:
  std::vector<ProtectedSpan> spans_;
  size_t size_ = 0;
};

}  // namespace lesskv
