// What remains of tokens that left. A residual owns no state: it is immutable and shared; the fixed-size state of each
// (sequence, layer, KV head) lies in the cache as plain floats, zero at the start, so that it can be counted, cloned and
// saved like everything else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvcache/codec/kv_store.h"
#include "kvcache/select/selector.h"

namespace lesskv {

// Tokens of one KV head that leave the cache for good.
struct EvictedRows {
  size_t kv_head = 0;
  size_t n_rows = 0;
  const float* keys = nullptr;    // [n_rows, head_dim], rotated to their true positions
  const float* values = nullptr;  // [n_rows, head_dim]
  float* state = nullptr;         // [StateFloats()]
  const float* weights = nullptr;  // [n_rows] tokens that a row stands for; null: one each
};

// Queries of one sequence and a layer against its states.
struct ResidualQuery {
  const float* queries = nullptr;  // [n_queries, n_heads, head_dim], rotated, not scaled
  size_t n_queries = 0;
  const float* states = nullptr;  // [n_kv_heads, StateFloats()]
  float* out = nullptr;           // [n_queries, n_heads, head_dim], normalised; 0 where the state is empty
  float* lse = nullptr;           // [n_queries, n_heads] log-mass; -infinity where the state is empty
};

// Rows of one KV head that may be fitted: of those that nothing protects the ones that stay, first, and the ones that
// leave, as they were before the step's cut.
struct FitBlock {
  size_t kv_head = 0;
  size_t n_rows = 0, n_kept = 0;
  size_t head_dim = 0;
  float scale = 1;                 // of scores
  const float* keys = nullptr;     // [n_rows, head_dim], rotated to their true positions
  const float* values = nullptr;   // [n_rows, head_dim]
  const float* weights = nullptr;  // [n_rows]
  // Queries of the whole group, [n_queries, head_dim], rotated to positions behind the text, so that they see every row;
  // not scaled.
  const float* queries = nullptr;
  size_t n_queries = 0;
  // What the rows that stay become, where `fitted` says so; they come as they are.
  std::vector<float> kept_weights, kept_values;  // [n_kept], [n_kept, head_dim]
  bool fitted = false;
};

// When rows are fitted: on how many positions' queries, evenly spread over the step (0: never), and in a head from how
// many leaving rows on.
struct FitRule {
  size_t n_queries = 0;
  size_t least_leaving = 1;
};

// What came of a residual's fits of kept rows, one a KV head and time, since the cache was made or restored: those that
// were refused were not finite or answered worse than no fit, and left their head as it was.
struct FitStats {
  uint64_t taken = 0, refused = 0;
};

// Rows that leave a head `rows` at a time while text comes in small steps, so that a fit has enough of them: it then
// answers the queries of the last `rows` tokens, at most `queries` of them, evenly spread, which the cache keeps.
struct Bunches {
  size_t rows = 1;  // 1: rows leave as they must, and no query is kept
  size_t queries = 1;

  size_t apart() const { return (rows + queries - 1) / queries; }        // a query is kept of every so many positions
  size_t n_kept() const { return rows > 1 ? (rows + apart() - 1) / apart() : 0; }
};

class Residual {
 public:
  virtual ~Residual() = default;

  // Floats of state a KV head.
  virtual size_t StateFloats() const { return 0; }

  // What becomes of the rows of one KV head that the selector lets go: `departures` come as kAbsorb where there is a
  // state and as kDrop where there is none. A residual that merges names the targets here. In parallel for different
  // heads.
  virtual void Decide(const LayerRows&, size_t /*kv_head*/, std::span<Departure> /*departures*/) const {}

  virtual Weights weights() const { return Weights::kNone; }
  // Keys are to be kept unrotated, whatever the selector and the codec want.
  virtual bool WantsUnrotatedKeys() const { return false; }

  // Changes weights and values of rows that stay, a layer's heads at once; after Decide, before the store closes. Runs its
  // own parallel region.
  virtual FitRule Fits(StepKind) const { return {}; }
  virtual void Fit(std::span<FitBlock>) const {}
  virtual Bunches LeaveInBunches() const { return {}; }

  // Folds evicted rows into their heads' states, of one or many sequences in one parallel region; at most one entry a state.
  // Bits do not depend on which rows come together.
  virtual void Absorb(size_t /*layer*/, std::span<const EvictedRows>) const {}

  // The states' partial attention results for all query heads of a layer, of one or many sequences in one parallel
  // region, to be merged with the exact ones. Bits do not depend on which queries come together.
  virtual void Attend(size_t /*layer*/, std::span<const ResidualQuery>) const {}

  // Whether a decode or stream step reads the state also while nothing has been absorbed (a clamp that gives an empty
  // state some mass). A prompt's own step, and a text's first, never read an empty state.
  virtual bool ReadsEmptyState() const { return false; }

  // Bytes of trained weights, shared by all sequences.
  virtual size_t WeightBytes() const { return 0; }
};

}  // namespace lesskv
