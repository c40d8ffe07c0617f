// The immutable configuration of a cache: a parsed spec bound to a model's shape, a context length and protected spans.
// Shared by all sequences that use it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvcache/budget/budgeter.h"
#include "kvcache/cache_shape.h"
#include "kvcache/codec/codec.h"
#include "kvcache/protected.h"
#include "kvcache/registry.h"
#include "kvcache/residual/residual.h"
#include "kvcache/select/selector.h"
#include "kvcache/spec.h"

namespace lesskv {

// What governs some layers of a model: all its global ones, which the spec is about, or its local ones of one window,
// which keep that window whatever the spec says. Layers are numbered inside their policy.
struct LayerPolicy {
  LayerPolicy(std::vector<LayerShape> shapes, std::vector<size_t> of_model)
      : layers(std::move(shapes)), model_layers(std::move(of_model)), heads(layers) {}

  std::vector<LayerShape> layers;
  std::vector<size_t> model_layers;  // their numbers in the model
  HeadTable heads;
  size_t window = 0;  // of local layers; 0: global ones
  size_t ctx = 0;
  ComputeType compute = ComputeType::kF32;
  std::string name;  // the spec, for messages
  ProtectedSet protect;
  std::shared_ptr<const Selector> selector;
  std::shared_ptr<const Budgeter> budgeter;
  std::shared_ptr<const Codec> codec;
  std::shared_ptr<const Residual> residual;  // null: drop

  bool ranks_positions() const { return selector->UsesCachePositions(); }
  bool unrotated_keys() const {
    return ranks_positions() || codec->traits().unrotated_keys || selector->WantsUnrotatedKeys() ||
           (residual != nullptr && residual->WantsUnrotatedKeys());
  }
  Weights weights() const {
    return std::max(selector->weights(), residual == nullptr ? Weights::kNone : residual->weights());
  }
  // Heads of a layer keep the same rows in the same slots.
  bool keeps_one_set() const {
    return selector->MustKeepOneSetALayer() ||
           (selector->KeepsOneSetALayer() && budgeter->differ() != BudgetsDiffer::kBetweenHeads);
  }
  StoreShape store_shape() const {
    return {layers, compute, unrotated_keys(), !selector->Bounded(), budgeter->differ() != BudgetsDiffer::kNowhere,
            selector->SaysHowMany(), !selector->Evicts()};
  }
  Bunches bunches() const { return residual == nullptr ? Bunches{} : residual->LeaveInBunches(); }
  // Of n rows of a head with this budget, once those in excess have left: in whole groups where the codec has such, or
  // as many at a time as the residual wants.
  size_t RowsThatStay(size_t n, size_t budget) const;
  // Rows of a head that stay whatever their scores after so many tokens: the selector's window and protected tokens.
  size_t RowsThatAlwaysStay(size_t tokens_seen) const;
  BudgetRequest Request(size_t rows, size_t n_tokens) const;
  // Rows that may stay after a step whose growth law says `rows`, [heads], for a prompt (or, while text streams in, a
  // context) of n_tokens. Throws Error when the protected tokens do not fit, or the codec's groups.
  std::vector<size_t> Budgets(size_t rows, size_t n_tokens) const;

 private:
  // Whether a budget holds what always stays.
  bool Holds(size_t budget) const;
  void CheckGroups(size_t head, size_t budget) const;
};

// Where a model's layer is governed.
struct LayerPlace {
  size_t policy = 0;
  size_t layer = 0;
};

// Bytes that a cache of this configuration needs for a life of the given lengths; see CacheConfig::Plan.
struct CachePlan {
  size_t bytes_peak = 0;   // largest at any moment, prompt included
  size_t bytes_after_prompt = 0;
  size_t bytes_end = 0;
  size_t bytes_local = 0;  // of bytes_end, those of the local layers
  size_t bytes_slack = 0;  // of bytes_end, what rounding to tiles and blocks costs
  double rows_end = 0;  // mean rows a (global layer, KV head)
  // Where the selector says how many rows stay (Selector::SaysHowMany) all of these are the most that the life can take,
  // and this is the least; else the same.
  size_t bytes_end_least = 0;
  double rows_end_least = 0;
};

class CacheConfig {
 public:
  // Throws Error when the spec cannot work with this shape: a budget below its protected rows, a head size the codec
  // does not take, a sidecar that is missing or does not belong to the model.
  static std::shared_ptr<const CacheConfig> Create(const CacheSpec& spec, const CacheShape& shape,
                                                   std::vector<ProtectedSpan> protected_spans = {},
                                                   const SidecarSource& sidecar = {});
  // The same with other protected spans. Methods and trained parts are shared, and no file is read. Throws Error when the
  // spans do not fit.
  std::shared_ptr<const CacheConfig> WithProtected(std::vector<ProtectedSpan> protected_spans) const;

  const CacheSpec& spec() const { return spec_; }
  // The canonical spec as results and sessions name it: a trained artefact appears as its fingerprint, never as a path.
  const std::string& spec_text() const { return spec_text_; }
  const CacheShape& shape() const { return shape_; }
  // Prompts are fed so many tokens a step (StepKind::kStream): the N of prefill(chunk=N), else the selector's own blocks.
  // 0: a prompt is one step (kPrompt).
  size_t prefill_chunk() const { return prefill_chunk_; }
  const ProtectedSet& protect() const { return global().protect; }
  // Whether a text's first prompt, read in one step, gives the same bits behind every layer under both: what a cache
  // keeps of it is decided when it has been attended. Such prompts can be read together (StepItem::reads_with).
  bool ReadsPromptsAs(const CacheConfig& other) const;

  // The global layers' policy first (it may govern no layer), then one for each window of local layers.
  const std::vector<LayerPolicy>& policies() const { return policies_; }
  const LayerPolicy& global() const { return policies_[0]; }
  LayerPlace place(size_t layer) const { return places_[layer]; }

  // The global layers' budgets after a prompt of n_tokens, [heads]; empty when nothing ever leaves.
  std::vector<size_t> Budgets(size_t n_tokens) const;
  // Bytes of trained artefacts this configuration reads (shared by all sequences); 0 without a sidecar.
  size_t sidecar_bytes() const;
  // What an f16 full cache of so many tokens takes, without slack or metadata; local layers hold their window.
  size_t FullBytes(size_t n_tokens) const;

  // Bytes for one sequence that sees a prompt of n_prompt tokens and then n_decode single tokens: exact ones, or, where
  // they depend on the text, the most and the least.
  CachePlan Plan(size_t n_prompt, size_t n_decode) const;
  // Of a cache that has read n_tokens in pieces, what it and its clones hold once, at least. 0 where tokens leave.
  size_t SharedBytes(size_t n_tokens) const;

 private:
  CacheConfig(const CacheSpec& spec, const CacheShape& shape) : spec_(spec), shape_(shape) {}
  void DivideLayers();
  void MakeMethods(const SidecarSource& sidecar);
  CachePlan Count(size_t n_prompt, size_t n_decode, bool least) const;

  CacheSpec spec_;
  std::string spec_text_;
  CacheShape shape_;
  size_t prefill_chunk_ = 0;
  std::vector<LayerPolicy> policies_;
  std::vector<LayerPlace> places_;  // [n_layers]
};

}  // namespace lesskv
