#include "kvcache/ledger.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/checked.h"
#include "kvcache/codec/row_store.h"

namespace lesskv {
namespace {

size_t Capacity(size_t rows, size_t fixed) { return fixed > 0 ? std::max(fixed, rows) + 1 : RoundUp(rows, kBlockRows); }

CountedBuffer Resized(ByteCounter& counter, const CountedBuffer& from, size_t bytes) {
  CountedBuffer to(counter, bytes);
  if (from.data() != nullptr) std::memcpy(to.data(), from.data(), std::min(bytes, from.size()));
  return to;
}

}  // namespace

void HeadLedger::Reserve(ByteCounter& counter, size_t rows, size_t fixed, bool scores) {
  const size_t capacity = Capacity(std::max(rows, n_rows), fixed);
  if (capacity == 0 || positions_.size() == capacity * sizeof(Position)) return;
  CountedBuffer positions = Resized(counter, positions_, capacity * sizeof(Position));
  if (scores) {
    CountedBuffer moved = Resized(counter, scores_, capacity * sizeof(float));
    scores_ = std::move(moved);
  }
  positions_ = std::move(positions);
}

void HeadLedger::Shrink(ByteCounter& counter, size_t fixed, bool scores) {
  if (n_rows == 0) {
    positions_ = CountedBuffer();
    scores_ = CountedBuffer();
    return;
  }
  try {
    Reserve(counter, n_rows, fixed, scores);
  } catch (const Error&) {
  }
}

void HeadLedger::AppendNew(size_t seen, size_t n) {
  const std::span<Position> positions = positions_.As<Position>();
  CHECK((n_rows + n) * sizeof(Position) <= positions_.size());
  for (size_t i = 0; i < n && !positions.empty(); ++i) positions[n_rows + i] = Position(static_cast<int32_t>(seen + i));
  n_rows += n;
}

LedgerRows HeadLedger::Gather(size_t seen, size_t n, bool with_scores, LedgerSpill& spill) {
  const size_t all = n_rows + n;
  std::span<Position> positions = positions_.As<Position>();
  std::span<float> scores = with_scores ? scores_.As<float>() : std::span<float>();
  if (all > positions.size()) {
    spill.positions.assign(positions.begin(), positions.begin() + static_cast<ptrdiff_t>(n_rows));
    spill.positions.resize(all);
    positions = spill.positions;
    if (with_scores) {
      spill.scores.assign(scores.begin(), scores.begin() + static_cast<ptrdiff_t>(n_rows));
      spill.scores.resize(all);
      scores = spill.scores;
    }
  }
  for (size_t i = 0; i < n; ++i) positions[n_rows + i] = Position(static_cast<int32_t>(seen + i));
  if (with_scores) std::fill_n(scores.begin() + static_cast<ptrdiff_t>(n_rows), n, 0.0f);
  return {positions.first(all), with_scores ? scores.first(all) : scores};
}

void HeadLedger::Apply(const Compaction& compaction, const LedgerRows& rows) {
  const std::span<Position> held = positions_.As<Position>();
  const std::span<float> held_scores = scores_.As<float>();
  CHECK(compaction.n_rows <= held.size(), "{} rows in a ledger of {}", compaction.n_rows, held.size());
  if (!rows.scores.empty() && rows.scores.data() != held_scores.data())
    std::copy_n(rows.scores.begin(), std::min(n_rows, held_scores.size()), held_scores.begin());
  for (const RowMove& move : compaction.moves) {
    held[move.to] = rows.positions[move.from];
    if (!rows.scores.empty()) held_scores[move.to] = rows.scores[move.from];
  }
  n_rows = compaction.n_rows;
}

HeadLedger HeadLedger::Clone(ByteCounter& counter) const {
  HeadLedger copy;
  copy.n_rows = n_rows;
  copy.positions_ = positions_.Clone(counter);
  copy.scores_ = scores_.Clone(counter);
  return copy;
}

void HeadLedger::Save(ByteWriter& out) const {
  out.Put<uint64_t>(n_rows);
  out.Raw(positions_.data(), n_rows * sizeof(Position));
  if (scores_.size() > 0) out.Raw(scores_.data(), n_rows * sizeof(float));
}

void HeadLedger::Load(ByteReader& in, ByteCounter& counter, size_t rows, size_t fixed, bool scores, size_t seen) {
  const size_t saved = in.Count(rows, "a head's number of positions");
  if (saved != rows) Fail(ErrorCode::kBadFile, "saved cache: a head has {} rows and {} positions", rows, saved);
  Reserve(counter, rows, fixed, scores);
  n_rows = rows;
  in.Raw(positions_.data(), rows * sizeof(Position));
  std::vector<Position> sorted(Positions().begin(), Positions().end());
  std::sort(sorted.begin(), sorted.end());
  const bool distinct = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  if (!distinct || (rows > 0 && (ToInt(sorted.front()) < 0 || static_cast<size_t>(ToInt(sorted.back())) >= seen)))
    Fail(ErrorCode::kBadFile, "saved cache: a head's positions are not distinct positions below {}", seen);
  if (scores_.size() == 0) return;
  in.Raw(scores_.data(), rows * sizeof(float));
  for (float score : scores_.As<float>().first(rows))
    if (!std::isfinite(score)) Fail(ErrorCode::kBadFile, "saved cache: a score is not finite");
}

}  // namespace lesskv
