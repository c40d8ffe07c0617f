// What remains of tokens that left. A residual owns no state: it is immutable and shared; the fixed-size state of each
// (sequence, layer, KV head) lies in the cache as plain floats, zero at the start, so that it can be counted, cloned and
// saved like everything else.
#pragma once

#include <cstddef>
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
};

// Queries of one sequence and a layer against its states.
struct ResidualQuery {
  const float* queries = nullptr;  // [n_queries, n_heads, head_dim], rotated, not scaled
  size_t n_queries = 0;
  const float* states = nullptr;  // [n_kv_heads, StateFloats()]
  float* out = nullptr;           // [n_queries, n_heads, head_dim], normalised; 0 where the state is empty
  float* lse = nullptr;           // [n_queries, n_heads] log-mass; -infinity where the state is empty
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

  // Folds evicted rows into their heads' states; at most one entry a KV head. Runs its own parallel region.
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
