// Which tokens leave. A selector is immutable and shared; what it must remember about rows (accumulated votes) lies in
// the cache's ledger and travels with the rows.
//
// After a step's attention a layer is observed (rows get votes), then cut: the selector names the rows that leave. The
// two are apart because a budgeter may want to see the votes of a whole layer, or of all layers, before it says how many
// rows each head keeps. Rows are indexed as in the step's attention: first the rows that were resident before the step
// (in slot order, which after the first eviction is not the order of positions), then the step's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "kvcache/codec/kv_store.h"
#include "kvcache/kv_cache.h"
#include "kvcache/protected.h"

namespace lesskv {

// What must be seen of a step. Whoever needs nothing pays nothing.
struct Observation {
  enum class Queries { kNone, kAll, kLast };
  Queries queries = Queries::kNone;
  size_t last = 0;             // kLast: the last min(last, n) queries of the step
  bool by_query_head = false;  // HeadRows::attention apart for each query head, not summed over the group
  float decay = 1;             // query m of n weighs decay^(n - 1 - m)

  bool wanted() const { return queries != Queries::kNone; }
  // Index of the first query of a step of n tokens that is observed; n when none is.
  size_t First(size_t n) const {
    return queries == Queries::kNone ? n : queries == Queries::kAll ? 0 : n - (last < n ? last : n);
  }
};

// Votes on rows: none; made anew in each step by Observe; or kept and accumulated (a column of the ledger).
enum class Votes { kNone, kStep, kKept };

// Weights of rows, for methods that let a row stand for several tokens: none; a number a row that the ledger carries (1
// for a new row) and whoever decides fates or fits rows changes; or that number, whose logarithm is added to the row's
// scores as well.
enum class Weights { kNone, kKept, kInLogits };

// One KV head's rows after a step's attention and before anything leaves.
struct HeadRows {
  size_t budget = 0;                    // rows that may stay; not known yet in Observe where budgets are decided later
  std::span<const Position> positions;  // [n_rows]
  std::span<float> votes;               // [n_rows]; kKept: 0, or the input's score, for new rows; kStep: not initialised; empty for kNone
  std::span<float> weights;             // [n_rows], positive; empty for Weights::kNone
  // Column sums of the exact softmax over the observed queries, [n_rows] summed over the group's heads, or
  // [group, n_rows] by_query_head; empty unless observed. `measured` is the same as the budgeter asked for it.
  std::span<const float> attention, measured;

  size_t n_rows() const { return positions.size(); }
  size_t n_leaving() const { return n_rows() > budget ? n_rows() - budget : 0; }
};

struct LayerRows {
  size_t layer = 0;  // among the layers that the selector governs
  StepKind kind = StepKind::kDecode;
  size_t group = 1;        // query heads a KV head
  size_t tokens_seen = 0;  // this step included: positions are below it
  size_t n_step = 0;       // tokens of this step
  double need = 0;         // what the budgeter measured of this layer
  // Rows of a usual budget that the selector always keeps, the first `sinks` tokens among them and else the newest.
  size_t window = 0, sinks = 0;
  size_t apart = 0;  // rows that the codec keeps apart (CodecTraits::apart_rows): no head gets fewer by division
  bool votes_accumulate = false;  // Votes::kKept, but for scores of inputs
  const ProtectedSet* protect = nullptr;  // tokens that always stay
  std::span<HeadRows> heads;              // [n_kv_heads]
};

// Per KV head the rows that leave, ascending.
using VictimLists = std::vector<std::vector<uint32_t>>;

// How the rows of a KV head grow: what is true at the end of a step, before a budgeter divides the rows.
struct Growth {
  bool evicts = false;  // rows may leave
  size_t rows = 0;      // where they do: rows that stay at most
};

class Selector {
 public:
  virtual ~Selector() = default;

  // The growth law: after a step of this kind, once `tokens_seen` tokens (the step included) have been seen.
  virtual Growth After(StepKind kind, size_t tokens_seen) const = 0;

  // Rows of a budget that the selector itself always keeps (sinks, recent or observation window).
  virtual size_t Window(size_t budget) const = 0;
  // First tokens that it always keeps (part of Window).
  virtual size_t Sinks() const { return 0; }

  virtual Observation Observes(StepKind) const { return {}; }
  virtual Votes votes() const { return Votes::kNone; }
  // The votes of new rows (kKept) are scores of the layer's input, which never change: x [CacheShape::input_width], and
  // the score for KV head h in scores[h * stride]. In parallel for different tokens.
  virtual bool ReadsInputs() const { return false; }
  virtual void ScoreInput(size_t /*layer*/, const float* /*x*/, float* /*scores*/, size_t /*stride*/) const {}
  // The trained artefact it reads: its fingerprint; empty: none.
  virtual std::string artefact() const { return {}; }
  virtual size_t ArtefactBytes() const { return 0; }
  // All heads of a layer keep the same rows in the same slots where their budgets are equal: head 0 is observed and cut
  // for all. Where it must, its heads are never given different budgets.
  virtual bool KeepsOneSetALayer() const { return false; }
  virtual bool MustKeepOneSetALayer() const { return false; }
  // Keys are read at consecutive positions inside the cache instead of their true ones.
  virtual bool UsesCachePositions() const { return false; }
  // Keys are to be kept unrotated though they are read at their true positions.
  virtual bool WantsUnrotatedKeys() const { return false; }
  // The law is only a bound: Choose says itself how many rows of each head leave, n_leaving() at least, and is asked after
  // every step. Room for those that stay is made once they are known, so that memory follows them.
  virtual bool SaysHowMany() const { return false; }
  // The law is a share of the text, which at first is less than what always stays (the window and protected tokens): that
  // stays all the same, where a fixed number of rows would be refused.
  virtual bool KeepsAShare() const { return false; }
  virtual Weights weights() const { return Weights::kNone; }

  // Fills or updates the votes of one KV head. Called once a step whose growth evicts, also when no row must leave; in
  // parallel for different heads.
  virtual void Observe(const LayerRows&, size_t /*kv_head*/) const {}

  // Appends the rows of one KV head that leave: exactly n_leaving() of them (SaysHowMany: or more), ascending, never
  // protected ones; ties: the lower position stays. In parallel for different heads, after Observe.
  virtual void Choose(const LayerRows& layer, size_t kv_head, std::vector<uint32_t>& victims) const = 0;

  // For selectors that merge: what becomes of chosen rows, before the residual is asked (Residual::Decide). What is a
  // merge already is none of the residual's business.
  virtual void Decide(const LayerRows&, size_t /*kv_head*/, std::span<Departure> /*departures*/) const {}

  // Derived from the growth law.
  bool EvictsIn(StepKind kind) const { return After(kind, 1).evicts; }
  bool Evicts() const {
    return EvictsIn(StepKind::kPrompt) || EvictsIn(StepKind::kStream) || EvictsIn(StepKind::kDecode);
  }
  // Every head has room for a number of rows known from the start, and never holds more.
  bool Bounded() const {
    if (SaysHowMany()) return false;
    constexpr size_t kFar = size_t{1} << 40;
    const size_t rows = After(StepKind::kDecode, kFar).rows;
    for (const StepKind kind : {StepKind::kPrompt, StepKind::kStream, StepKind::kDecode})
      for (const size_t seen : {size_t{1}, kFar})
        if (const Growth growth = After(kind, seen); !growth.evicts || growth.rows != rows) return false;
    return true;
  }
};

}  // namespace lesskv
