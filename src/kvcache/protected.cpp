#include "kvcache/protected.h"

#include "base/error.h"

namespace lesskv {

ProtectedSet::ProtectedSet(std::vector<ProtectedSpan> spans) {
  std::sort(spans.begin(), spans.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  for (const ProtectedSpan& span : spans) {
    if (span.begin < 0 || span.end < span.begin)
      Fail(ErrorCode::kInvalidArgument, "protected span {}:{} must have 0 <= begin <= end", span.begin, span.end);
    if (span.begin == span.end) continue;
    if (!spans_.empty() && span.begin <= spans_.back().end) spans_.back().end = std::max(spans_.back().end, span.end);
    else spans_.push_back(span);
  }
  size_ = CountFrom(0);
}

size_t ProtectedSet::CountFrom(int32_t begin) const {
  size_t count = 0;
  for (const ProtectedSpan& span : spans_)
    if (span.end > begin) count += static_cast<size_t>(span.end - std::max(span.begin, begin));
  return count;
}

}  // namespace lesskv
