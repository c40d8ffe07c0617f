// Which tokens leave. A selector is immutable and shared; what it must remember about rows (accumulated scores) lies in
// the cache's ledger and travels with the rows.
//
// After a step's attention a selector that asked for it sees the attention each row received, may update the rows'
// scores, and names the rows that leave. Rows are indexed as in the step's attention: first the rows that were resident
// before the step (in slot order, which after the first eviction is not the order of positions), then the step's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcache/kv_cache.h"
#include "kvcache/protected.h"

namespace lesskv {

// What a selector must see of a step. Whoever needs nothing pays nothing.
struct Observation {
  enum class Queries { kNone, kAll, kLast };
  Queries queries = Queries::kNone;
  size_t last = 0;  // kLast: the last min(last, n) queries of the step
};

// One KV head's rows after a step's attention and before anything leaves.
struct HeadRows {
  size_t budget = 0;                    // rows that may stay
  std::span<const Position> positions;  // [n_rows]
  std::span<float> scores;              // [n_rows], 0 for new rows; empty unless KeepsScores
  // Column sums of the exact softmax over the observed queries and the group's heads, [n_rows]; empty unless observed.
  std::span<const float> attention;

  size_t n_rows() const { return positions.size(); }
  size_t n_leaving() const { return n_rows() > budget ? n_rows() - budget : 0; }
};

struct LayerRows {
  size_t layer = 0;
  StepKind kind = StepKind::kDecode;
  size_t group = 1;               // query heads a KV head
  size_t tokens_seen = 0;         // this step included: positions are below it
  size_t n_step = 0;              // tokens of this step
  size_t n_observed_queries = 0;  // queries summed in HeadRows::attention
  const ProtectedSet* protect = nullptr;  // tokens that always stay
  std::span<HeadRows> heads;      // [n_kv_heads]
};

// Per KV head the rows that leave, ascending.
using VictimLists = std::vector<std::vector<uint32_t>>;

class Selector {
 public:
  virtual ~Selector() = default;

  // Whether tokens may leave at the end of a step of this kind.
  virtual bool Evicts(StepKind kind) const = 0;

  // Rows per KV head after a step (sinks and window included), before a budgeter changes it; 0 when nothing leaves.
  virtual size_t Rows() const = 0;
  // Rows among them that the selector itself always keeps (sinks, recent or observation window).
  virtual size_t Window(size_t budget) const = 0;

  // First tokens that it always keeps (part of Window).
  virtual size_t Sinks() const { return 0; }

  virtual Observation Observes(StepKind) const { return {}; }
  virtual bool KeepsScores() const { return false; }
  // All heads of a layer keep the same rows in the same slots.
  virtual bool KeepsOneSetALayer() const { return false; }
  // Keys are read at consecutive positions inside the cache instead of their true ones.
  virtual bool UsesCachePositions() const { return false; }

  // Chooses the rows of each KV head of a layer that leave; `victims` has n_kv_heads empty lists. Called after every
  // step whose kind Evicts, also when no head is over its budget (scores are updated here). Exactly n_leaving() rows
  // leave each head, never protected ones; ties: the lower position stays. The default asks ChooseHead, in parallel.
  virtual void Choose(const LayerRows& layer, VictimLists& victims) const;

 protected:
  virtual void ChooseHead(const LayerRows& layer, const HeadRows& head, std::vector<uint32_t>& victims) const;
};

}  // namespace lesskv
