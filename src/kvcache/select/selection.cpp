#include "kvcache/select/selection.h"

#include "kernels/basic/basic.h"
#include "kvcache/protected.h"

namespace lesskv {
namespace {

class WorseRow {
 public:
  WorseRow(const HeadRows& head, std::span<const float> values) : head_(head), values_(values) {}

  bool operator()(uint32_t a, uint32_t b) const {
    const float va = Ordered(values_[a]), vb = Ordered(values_[b]);
    return va != vb ? va < vb : ToInt(head_.positions[a]) > ToInt(head_.positions[b]);
  }

 private:
  static float Ordered(float x) { return x == x ? x : -std::numeric_limits<float>::infinity(); }

  const HeadRows& head_;
  std::span<const float> values_;
};

// The worst row between the protected spans.
uint32_t WorstRow(const HeadRows& head, std::span<const float> values, PositionRange range,
                  const ProtectedSet& protect) {
  static_assert(sizeof(Position) == sizeof(int32_t));
  const auto* positions = reinterpret_cast<const int32_t*>(head.positions.data());
  const size_t n = head.n_rows();
  const WorseRow worse(head, values);
  size_t worst = n;
  const auto consider = [&](int32_t begin, int32_t end) {
    if (begin >= end) return;
    const size_t row = LowestRow(values.data(), positions, n, begin, end);
    if (row < n && (worst == n || worse(static_cast<uint32_t>(row), static_cast<uint32_t>(worst)))) worst = row;
  };
  int32_t begin = range.begin;
  for (const ProtectedSpan& span : protect.spans()) {
    consider(begin, std::min(range.end, span.begin));
    begin = std::max(begin, span.end);
  }
  consider(begin, range.end);
  CHECK(worst < n, "no row may leave");
  return static_cast<uint32_t>(worst);
}

}  // namespace

void ChooseWorst(const HeadRows& head, std::span<const float> values, PositionRange range, const ProtectedSet& protect,
                 size_t n_leave, std::vector<uint32_t>& leave) {
  CHECK(values.size() == head.n_rows());
  if (n_leave == 0) return;
  if (n_leave == 1) return leave.push_back(WorstRow(head, values, range, protect));
  std::vector<uint32_t> rows;
  rows.reserve(head.n_rows());
  for (uint32_t r = 0; r < head.n_rows(); ++r) {
    const Position p = head.positions[r];
    if (ToInt(p) >= range.begin && ToInt(p) < range.end && !protect.Contains(p)) rows.push_back(r);
  }
  TakeFirst(rows, n_leave, WorseRow(head, values), leave);
}

}  // namespace lesskv
