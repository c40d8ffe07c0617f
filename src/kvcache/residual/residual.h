// What remains of tokens that left. A residual owns no state: it is immutable and shared; the fixed-size state of each
// (sequence, layer, KV head) lies in the cache as plain floats, zero at the start, so that it can be counted, cloned and
// saved like everything else.
#pragma once

#include <cstddef>
#include <span>

namespace lesskv {

// Tokens of one KV head that leave the cache for good.
struct EvictedRows {
  size_t kv_head = 0;
  size_t n_rows = 0;
  const float* keys = nullptr;    // [n_rows, head_dim], rotated to their true positions
  const float* values = nullptr;  // [n_rows, head_dim]
  float* state = nullptr;         // [StateFloats()]
};

class Residual {
 public:
  virtual ~Residual() = default;

  // Floats of state a KV head.
  virtual size_t StateFloats() const = 0;

  // Folds evicted rows into their heads' states; at most one entry a KV head. Runs its own parallel region.
  virtual void Absorb(size_t layer, std::span<const EvictedRows> evicted) const = 0;

  // The residual's partial attention result for all query heads of a layer, to be merged with the exact one.
  //   queries [n_queries, n_heads, head_dim], rotated, not scaled
  //   states  n_kv_heads pointers to [StateFloats()]
  //   out     [n_queries, n_heads, head_dim] normalised output; lse [n_queries, n_heads] log-mass, -infinity where the
  //           state is empty (out is then 0)
  virtual void Attend(size_t layer, const float* queries, size_t n_queries, std::span<const float* const> states,
                      float* out, float* lse) const = 0;

  // Whether a decode or stream step reads the state also while nothing has been absorbed (a clamp that gives an empty
  // state some mass). A prompt's own step, and a text's first, never read an empty state.
  virtual bool ReadsEmptyState() const { return false; }

  // Bytes of trained weights, shared by all sequences.
  virtual size_t WeightBytes() const = 0;
};

}  // namespace lesskv
