#include "kvcache/ledger.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/checked.h"
#include "kvcache/codec/row_store.h"

namespace lesskv {
namespace {

size_t Capacity(size_t rows, LedgerRoom room) {
  const size_t beyond = rows - std::min(rows, room.fixed);
  if (room.fixed == 0 || room.grows) return room.fixed + RoundUp(beyond, kBlockRows);
  return room.fixed + beyond + 1;
}

CountedBuffer Resized(ByteCounter& counter, const CountedBuffer& from, size_t bytes) {
  CountedBuffer to(counter, bytes);
  if (from.data() != nullptr) std::memcpy(to.data(), from.data(), std::min(bytes, from.size()));
  return to;
}

}  // namespace

void HeadLedger::Reserve(ByteCounter& counter, size_t rows, LedgerRoom room, bool votes, std::vector<CountedBuffer>* freed) {
  const size_t capacity = Capacity(std::max(rows, n_rows), room);
  if (capacity == 0 || positions_.size() == capacity * sizeof(Position)) return;
  CountedBuffer positions = Resized(counter, positions_, capacity * sizeof(Position));
  if (votes) {
    CountedBuffer moved = Resized(counter, votes_, capacity * sizeof(float));
    std::swap(votes_, moved);
    if (freed != nullptr) freed->push_back(std::move(moved));
  }
  std::swap(positions_, positions);
  if (freed != nullptr) freed->push_back(std::move(positions));
}

void HeadLedger::Shrink(ByteCounter& counter, LedgerRoom room, bool votes) {
  if (n_rows == 0) {
    positions_ = CountedBuffer();
    votes_ = CountedBuffer();
    return;
  }
  try {
    Reserve(counter, n_rows, room, votes);
  } catch (const Error&) {
  }
}

void HeadLedger::AppendNew(size_t seen, size_t n) {
  const std::span<Position> positions = positions_.As<Position>();
  CHECK((n_rows + n) * sizeof(Position) <= positions_.size());
  for (size_t i = 0; i < n && !positions.empty(); ++i) positions[n_rows + i] = Position(static_cast<int32_t>(seen + i));
  n_rows += n;
}

LedgerRows HeadLedger::Gather(size_t seen, size_t n, bool with_votes, bool may_stay, LedgerSpill& spill) {
  const size_t all = n_rows + n;
  std::span<Position> positions = positions_.As<Position>();
  std::span<float> votes = with_votes ? votes_.As<float>() : std::span<float>();
  if (all > positions.size() || !may_stay) {
    spill.positions.assign(positions.begin(), positions.begin() + static_cast<ptrdiff_t>(n_rows));
    spill.positions.resize(all);
    positions = spill.positions;
    if (with_votes) {
      spill.votes.assign(votes.begin(), votes.begin() + static_cast<ptrdiff_t>(n_rows));
      spill.votes.resize(all);
      votes = spill.votes;
    }
  }
  for (size_t i = 0; i < n; ++i) positions[n_rows + i] = Position(static_cast<int32_t>(seen + i));
  if (with_votes) std::fill_n(votes.begin() + static_cast<ptrdiff_t>(n_rows), n, 0.0f);
  return {positions.first(all), with_votes ? votes.first(all) : votes};
}

void HeadLedger::Apply(const SlotMap& map, const LedgerRows& given) {
  LedgerRows rows = given;
  LedgerSpill apart;
  if (map.at_once && rows.positions.data() == positions_.As<Position>().data()) {  // moves must not see each other
    apart.positions.assign(rows.positions.begin(), rows.positions.end());
    apart.votes.assign(rows.votes.begin(), rows.votes.end());
    rows = {apart.positions, apart.votes};
  }
  const std::span<Position> held = positions_.As<Position>();
  const std::span<float> held_votes = votes_.As<float>();
  CHECK(map.n_rows <= held.size(), "{} rows in a ledger of {}", map.n_rows, held.size());
  if (!rows.votes.empty() && rows.votes.data() != held_votes.data())
    std::copy_n(rows.votes.begin(), std::min(n_rows, held_votes.size()), held_votes.begin());
  for (const RowMove& move : map.moves) {
    held[move.to] = rows.positions[move.from];
    if (!rows.votes.empty()) held_votes[move.to] = rows.votes[move.from];
  }
  n_rows = map.n_rows;
}

HeadLedger HeadLedger::Clone(ByteCounter& counter) const {
  HeadLedger copy;
  copy.n_rows = n_rows;
  copy.positions_ = positions_.Clone(counter);
  copy.votes_ = votes_.Clone(counter);
  return copy;
}

void HeadLedger::Save(ByteWriter& out) const {
  out.Put<uint64_t>(n_rows);
  out.Raw(positions_.data(), n_rows * sizeof(Position));
  if (votes_.size() > 0) out.Raw(votes_.data(), n_rows * sizeof(float));
}

void HeadLedger::Load(ByteReader& in, ByteCounter& counter, size_t rows, LedgerRoom room, bool votes, size_t seen) {
  const size_t saved = in.Count(rows, "a head's number of positions");
  if (saved != rows) Fail(ErrorCode::kBadFile, "saved cache: a head has {} rows and {} positions", rows, saved);
  Reserve(counter, rows, room, votes);
  n_rows = rows;
  in.Raw(positions_.data(), rows * sizeof(Position));
  std::vector<Position> sorted(Positions().begin(), Positions().end());
  std::sort(sorted.begin(), sorted.end());
  const bool distinct = std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end();
  if (!distinct || (rows > 0 && (ToInt(sorted.front()) < 0 || static_cast<size_t>(ToInt(sorted.back())) >= seen)))
    Fail(ErrorCode::kBadFile, "saved cache: a head's positions are not distinct positions below {}", seen);
  if (votes_.size() == 0) return;
  in.Raw(votes_.data(), rows * sizeof(float));
  for (float vote : votes_.As<float>().first(rows))
    if (!std::isfinite(vote)) Fail(ErrorCode::kBadFile, "saved cache: a vote is not finite");
}

}  // namespace lesskv
