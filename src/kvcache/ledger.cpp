#include "kvcache/ledger.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/checked.h"
#include "kvcache/codec/row_store.h"

namespace lesskv {
namespace {

// What grows does so by a tile's rows, or, where copying what is there would tell, by a block's.
size_t Capacity(size_t rows, LedgerRoom room) {
  constexpr size_t kMany = 16 * kBlockRows;
  const size_t beyond = rows - std::min(rows, room.fixed);
  if (room.fixed == 0 || room.grows) return room.fixed + RoundUp(beyond, beyond < kMany ? kTileRows : kBlockRows);
  return RowsAhead(rows, room.fixed) + beyond + 1;
}

CountedBuffer Resized(ByteCounter& counter, const CountedBuffer& from, size_t bytes) {
  CountedBuffer to(counter, bytes);
  if (from.data() != nullptr) std::memcpy(to.data(), from.data(), std::min(bytes, from.size()));
  return to;
}

// A column as a step sees it, new rows with `fresh`; in `spill` where the ledger's own has no room.
std::span<float> GatherColumn(CountedBuffer& own, bool spills, size_t n_rows, size_t n, float fresh,
                              std::vector<float>& spill) {
  std::span<float> column = own.As<float>();
  if (spills) {
    spill.assign(column.begin(), column.begin() + static_cast<ptrdiff_t>(n_rows));
    spill.resize(n_rows + n);
    column = spill;
  }
  std::fill_n(column.begin() + static_cast<ptrdiff_t>(n_rows), n, fresh);
  return column.first(n_rows + n);
}

// Takes over what happened to the rows that stay where they are; the others follow by moves.
void TakeOver(std::span<const float> given, std::span<float> held, size_t n_rows) {
  if (!given.empty() && given.data() != held.data())
    std::copy_n(given.begin(), std::min(n_rows, held.size()), held.begin());
}

void SaveColumn(const CountedBuffer& column, size_t n_rows, ByteWriter& out) {
  if (column.size() > 0) out.Raw(column.data(), n_rows * sizeof(float));
}

}  // namespace

void HeadLedger::Reserve(ByteCounter& counter, size_t rows, LedgerRoom room, LedgerColumns columns,
                         std::vector<CountedBuffer>* freed) {
  const size_t capacity = Capacity(std::max(rows, n_rows), room);
  if (capacity == 0 || positions_.size() == capacity * sizeof(Position)) return;
  CountedBuffer positions = Resized(counter, positions_, capacity * sizeof(Position));
  CountedBuffer votes, weights;
  if (columns.votes) votes = Resized(counter, votes_, capacity * sizeof(float));
  if (columns.weights) weights = Resized(counter, weights_, capacity * sizeof(float));
  std::swap(positions_, positions);
  std::swap(votes_, votes);
  std::swap(weights_, weights);
  if (freed == nullptr) return;
  for (CountedBuffer* old : {&positions, &votes, &weights}) freed->push_back(std::move(*old));
}

void HeadLedger::Shrink(ByteCounter& counter, LedgerRoom room, LedgerColumns columns) {
  if (n_rows == 0) {
    positions_ = CountedBuffer();
    votes_ = CountedBuffer();
    weights_ = CountedBuffer();
    return;
  }
  try {
    Reserve(counter, n_rows, room, columns);
  } catch (const Error&) {
  }
}

void HeadLedger::AppendNew(size_t seen, size_t n) {
  const std::span<Position> positions = positions_.As<Position>();
  CHECK((n_rows + n) * sizeof(Position) <= positions_.size());
  for (size_t i = 0; i < n && !positions.empty(); ++i) positions[n_rows + i] = Position(static_cast<int32_t>(seen + i));
  const std::span<float> votes = votes_.As<float>(), weights = weights_.As<float>();
  if (!votes.empty()) std::fill_n(votes.begin() + static_cast<ptrdiff_t>(n_rows), n, 0.0f);
  if (!weights.empty()) std::fill_n(weights.begin() + static_cast<ptrdiff_t>(n_rows), n, 1.0f);
  n_rows += n;
}

LedgerRows HeadLedger::Gather(size_t seen, size_t n, LedgerColumns columns, bool may_stay, LedgerSpill& spill) {
  const size_t all = n_rows + n;
  LedgerRows rows{positions_.As<Position>(), {}, {}};
  const bool spills = all > rows.positions.size() || !may_stay;
  if (spills) {
    spill.positions.assign(rows.positions.begin(), rows.positions.begin() + static_cast<ptrdiff_t>(n_rows));
    spill.positions.resize(all);
    rows.positions = spill.positions;
  }
  rows.positions = rows.positions.first(all);
  for (size_t i = 0; i < n; ++i) rows.positions[n_rows + i] = Position(static_cast<int32_t>(seen + i));
  if (columns.votes) rows.votes = GatherColumn(votes_, spills, n_rows, n, 0, spill.votes);
  if (columns.weights) rows.weights = GatherColumn(weights_, spills, n_rows, n, 1, spill.weights);
  return rows;
}

void HeadLedger::Apply(const SlotMap& map, const LedgerRows& given) {
  LedgerRows rows = given;
  LedgerSpill apart;
  if (map.at_once && rows.positions.data() == positions_.As<Position>().data()) {  // moves must not see each other
    apart.positions.assign(rows.positions.begin(), rows.positions.end());
    apart.votes.assign(rows.votes.begin(), rows.votes.end());
    apart.weights.assign(rows.weights.begin(), rows.weights.end());
    rows = {apart.positions, apart.votes, apart.weights};
  }
  const std::span<Position> held = positions_.As<Position>();
  const std::span<float> held_votes = votes_.As<float>(), held_weights = weights_.As<float>();
  CHECK(map.n_rows <= held.size(), "{} rows in a ledger of {}", map.n_rows, held.size());
  TakeOver(rows.votes, held_votes, n_rows);
  TakeOver(rows.weights, held_weights, n_rows);
  for (const RowMove& move : map.moves) {
    held[move.to] = rows.positions[move.from];
    if (!rows.votes.empty()) held_votes[move.to] = rows.votes[move.from];
    if (!rows.weights.empty()) held_weights[move.to] = rows.weights[move.from];
  }
  n_rows = map.n_rows;
}

HeadLedger HeadLedger::Clone(ByteCounter& counter) const {
  HeadLedger copy;
  copy.n_rows = n_rows;
  copy.positions_ = positions_.Clone(counter);
  copy.votes_ = votes_.Clone(counter);
  copy.weights_ = weights_.Clone(counter);
  return copy;
}

void HeadLedger::Save(ByteWriter& out) const {
  out.Put<uint64_t>(n_rows);
  out.Raw(positions_.data(), n_rows * sizeof(Position));
  SaveColumn(votes_, n_rows, out);
  SaveColumn(weights_, n_rows, out);
}

void HeadLedger::Load(ByteReader& in, ByteCounter& counter, size_t rows, LedgerRoom room, LedgerColumns columns,
                      size_t seen) {
  const size_t saved = in.Count(rows, "a head's number of positions");
  if (saved != rows) Fail(ErrorCode::kBadFile, "saved cache: a head has {} rows and {} positions", rows, saved);
  Reserve(counter, rows, room, columns);
  n_rows = rows;
  in.Raw(positions_.data(), rows * sizeof(Position));
  std::vector<Position> sorted(Positions().begin(), Positions().end());
  std::sort(sorted.begin(), sorted.end());
  const bool distinct = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  if (!distinct || (rows > 0 && (ToInt(sorted.front()) < 0 || static_cast<size_t>(ToInt(sorted.back())) >= seen)))
    Fail(ErrorCode::kBadFile, "saved cache: a head's positions are not distinct positions below {}", seen);
  if (columns.votes && rows > 0) in.Raw(votes_.data(), rows * sizeof(float));
  if (columns.weights && rows > 0) in.Raw(weights_.data(), rows * sizeof(float));
  for (const float vote : votes_.As<float>().first(columns.votes && rows > 0 ? rows : 0))
    if (!std::isfinite(vote)) Fail(ErrorCode::kBadFile, "saved cache: a vote is not finite");
  for (const float weight : Weights())
    if (!std::isfinite(weight) || weight <= 0) Fail(ErrorCode::kBadFile, "saved cache: a row's weight is not positive");
}

}  // namespace lesskv
