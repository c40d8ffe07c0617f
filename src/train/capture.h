// Capturing training material: a text goes through the engine's own forward pass with a cache that, layer by layer,
// attends in full (the target), then replays the layer's queries, keys and values through the real cache under each
// policy, step by step, and notes what stays and what leaves when. The policies are the cache's own code; nothing is
// simulated.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kvcache/kv_cache.h"
#include "kvcache/sequence_cache.h"
#include "train/capture_record.h"

namespace lesskv::train {

struct ViewRequest {
  std::string spec;
  size_t step = 1;
};

// Stands between a model and full attention for one prompt of n_tokens in one step.
class CaptureCache final : public KvCache {
 public:
  // Called once a layer in [first_layer, end_layer), in order.
  using Sink = std::function<void(size_t layer, const CaptureRecord& record)>;

  // `shape` of the whole model. `plus_rows` > 0 also records Baseline+ with that many more rows.
  // Throws Error for a spec that does not parse, fit or work on single layers (a budgeter over layers).
  CaptureCache(const CacheShape& shape, size_t n_tokens, std::vector<ViewRequest> views, size_t plus_rows,
               size_t first_layer, size_t end_layer, Sink sink);
  ~CaptureCache() override;

  void Append(size_t layer, const float* keys, const float* values) override;
  void Attend(size_t layer, const float* queries, float* out) override;

 private:
  struct Policy;
  CaptureView Replay(const Policy& policy, size_t step, bool outputs_only) const;
  void AddMasses(const std::vector<std::vector<int32_t>>& resident, size_t seen, size_t n, CaptureView& view) const;

  CacheShape shape_;  // of one layer
  LayerShape layer_;
  size_t n_tokens_, first_layer_, end_layer_;
  Sink sink_;
  std::vector<ViewRequest> requests_;
  std::vector<Policy> policies_, plus_policies_;
  std::shared_ptr<const CacheConfig> full_;
  std::vector<float> keys_, values_, queries_;  // of the present layer, unrotated
  CaptureRecord record_;
};

// Records the unrotated queries, keys and values that pass to another cache, over all its steps: what a compressed model
// really sees. They then go through a CaptureCache layer by layer.
class RecordingCache final : public KvCache {
 public:
  RecordingCache(SequenceCache& inner, const CacheShape& shape) : inner_(inner), shape_(shape), layers_(shape.n_layers()) {}

  // Before each step of the inner cache.
  void SetStep(size_t n_tokens) { n_step_ = n_tokens; }
  bool WantsInputs(size_t layer) const override { return inner_.WantsInputs(layer); }
  void ReadInputs(size_t layer, size_t first, size_t n, const float* x) override { inner_.ReadInputs(layer, first, n, x); }
  void Append(size_t layer, const float* keys, const float* values) override;
  void Attend(size_t layer, const float* queries, float* out) override;

  // Gives layer `layer` to `capture` as if the text had come in one step.
  void Replay(size_t layer, CaptureCache& capture) const;

 private:
  struct Layer {
    std::vector<float> q, k, v;
  };
  SequenceCache& inner_;
  const CacheShape& shape_;
  std::vector<Layer> layers_;
  size_t n_step_ = 0;
};

}  // namespace lesskv::train
