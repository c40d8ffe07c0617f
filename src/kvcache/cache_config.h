// The immutable configuration of a cache: a parsed spec bound to a model's shape, a context length and protected spans.
// Shared by all sequences that use it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/linear/linear.h"
#include "kernels/basic/rope.h"
#include "kvcache/protected.h"
#include "kvcache/registry.h"
#include "kvcache/spec.h"

namespace lesskv {

// What the cache must know of the model, and the context length in use (--ctx): percentages refer to it.
struct CacheShape {
  size_t n_layers = 0;
  size_t n_heads = 0;     // query heads
  size_t n_kv_heads = 0;  // divides n_heads
  size_t head_dim = 0;
  size_t ctx = 0;
  RopeTable rope;
  ComputeType compute = ComputeType::kF32;

  size_t group() const { return n_heads / n_kv_heads; }
};

// Where trained artefacts of the model are found when a spec does not name a file.
struct SidecarSource {
  std::string path;               // NAME.less.gguf beside NAME.gguf; may not exist
  uint64_t model_fingerprint = 0;  // 0: not checked (tests)
};

// Bytes that a cache of this configuration needs for a life of the given lengths; see CacheConfig::Plan.
struct CachePlan {
  size_t bytes_peak = 0;   // largest at any moment, prompt included
  size_t bytes_after_prompt = 0;
  size_t bytes_end = 0;
  double rows_end = 0;  // mean rows a (layer, KV head)
};

class Selector;
class Budgeter;
class Residual;

class CacheConfig {
 public:
  // Throws Error when the spec cannot work with this shape: a budget below its protected rows, a head size the codec
  // does not take, a sidecar that is missing or does not belong to the model.
  static std::shared_ptr<const CacheConfig> Create(const CacheSpec& spec, const CacheShape& shape,
                                                   std::vector<ProtectedSpan> protected_spans = {},
                                                   const SidecarSource& sidecar = {});
  ~CacheConfig();

  const CacheSpec& spec() const { return spec_; }
  // The canonical spec as results and sessions name it: a trained artefact appears as its fingerprint, never as a path.
  const std::string& spec_text() const { return spec_text_; }
  const CacheShape& shape() const { return shape_; }
  // prefill(chunk=N): prompts are fed N tokens a step (StepKind::kStream). 0: a prompt is one step (kPrompt).
  size_t prefill_chunk() const { return prefill_chunk_; }
  const ProtectedSet& protect() const { return protect_; }
  // Rows that may stay, [n_layers, n_kv_heads], for a prompt (or, while text streams in, a context) of n_tokens; empty
  // when nothing ever leaves. Throws Error when the protected tokens do not fit.
  std::vector<size_t> Budgets(size_t n_tokens) const;
  // Bytes of trained artefacts this configuration reads (shared by all sequences); 0 without a sidecar.
  size_t sidecar_bytes() const;

  // Exact bytes for one sequence that sees a prompt of n_prompt tokens and then n_decode single tokens.
  CachePlan Plan(size_t n_prompt, size_t n_decode) const;

 private:
  friend class SequenceCache;
  CacheConfig(const CacheSpec& spec, const CacheShape& shape, ProtectedSet protect);

  CacheSpec spec_;
  std::string spec_text_;
  CacheShape shape_;
  ProtectedSet protect_;
  size_t prefill_chunk_ = 0;
  RowTypes row_types_;
  std::unique_ptr<const Selector> selector_;
  std::unique_ptr<const Budgeter> budgeter_;
  std::unique_ptr<const Residual> residual_;  // null: drop
};

}  // namespace lesskv
