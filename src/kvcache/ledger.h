// Who is where: the position of the token in each slot of one (layer, KV head), and where they are kept the selector's
// votes for it and the row's weight. Follows the store's slot maps, so that slots mean the same in both. Kept only where
// tokens can leave; in a full cache the token in slot i is the one at position i.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "kvcache/bytes.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/kv_cache.h"
#include "kvcache/memory.h"

namespace lesskv {

// What a ledger keeps beside positions.
struct LedgerColumns {
  bool votes = false;
  bool weights = false;
};

struct LedgerRows {
  std::span<Position> positions;
  std::span<float> votes, weights;  // empty where none are kept
};

struct LedgerSpill {
  std::vector<Position> positions;
  std::vector<float> votes, weights;
};

// What a ledger has room for: a head of bounded rows `fixed` ones (RowsAhead of them) and a newcomer, a head that grows `fixed` ones and
// whole blocks behind them; without `fixed` both whole blocks.
struct LedgerRoom {
  size_t fixed = 0;
  bool grows = false;
};

struct HeadLedger {
  size_t n_rows = 0;

  size_t capacity() const { return positions_.size() / sizeof(Position); }
  size_t bytes() const { return positions_.size() + votes_.size() + weights_.size(); }
  std::span<const Position> Positions() const { return positions_.As<Position>().first(n_rows); }
  std::span<const float> Weights() const {
    const std::span<const float> all = weights_.As<float>();
    return all.first(std::min(all.size(), n_rows));
  }

  // Room for `rows` rows at least. The memory it had goes to `freed` where that is given.
  void Reserve(ByteCounter& counter, size_t rows, LedgerRoom room, LedgerColumns columns,
               std::vector<CountedBuffer>* freed = nullptr);

  // Takes back a Reserve: room as for the rows that are there. Keeps the larger room when there is no memory to move.
  void Shrink(ByteCounter& counter, LedgerRoom room, LedgerColumns columns);

  // New tokens at positions seen, seen + 1, ... take the next slots, with vote 0 and weight 1.
  void AppendNew(size_t seen, size_t n);

  // Rows as a step sees them: resident ones, then n new ones with vote 0 and weight 1. They lie in the ledger itself when it has
  // room for the new ones (a single token, the steady state) and they `may_stay` there, else as a copy in `spill`, which
  // later changes of the ledger's room do not touch.
  LedgerRows Gather(size_t seen, size_t n, LedgerColumns columns, bool may_stay, LedgerSpill& spill);

  // Takes over the gathered (and observed) rows in the places that the slot map gives them.
  void Apply(const SlotMap& map, const LedgerRows& rows);

  HeadLedger Clone(ByteCounter& counter) const;
  void Save(ByteWriter& out) const;
  // Refuses positions that are not distinct or not below `seen`, votes that are not finite and weights that are not
  // positive.
  void Load(ByteReader& in, ByteCounter& counter, size_t rows, LedgerRoom room, LedgerColumns columns, size_t seen);

 private:
  CountedBuffer positions_;  // Position [capacity]
  CountedBuffer votes_;     // float [capacity], or empty
  CountedBuffer weights_;   // float [capacity], or empty
};

}  // namespace lesskv
