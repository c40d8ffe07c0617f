// What the cache must know of a model: the shape of each layer, and the context length in use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/basic/rope.h"
#include "kernels/linear/linear.h"

namespace lesskv {

// One layer's attention. Layers of one model may differ: gemma 3 has local layers, which see the last `window` tokens
// only and rotate by another table than its global ones.
struct LayerShape {
  size_t n_heads = 0;     // query heads
  size_t n_kv_heads = 0;  // divides n_heads
  size_t head_dim = 0;
  float scale = 0;  // scores are scale * q . k
  std::shared_ptr<const RopeTable> rope;  // layers that rotate alike share one
  // 0: a global layer. Else a local one: a query at position p sees the positions p - window + 1 .. p. What a spec says
  // of selection, budgets and residuals is about global layers; a local one keeps its window.
  size_t window = 0;

  size_t group() const { return n_heads / n_kv_heads; }
  size_t q_dim() const { return n_heads * head_dim; }
  size_t kv_dim() const { return n_kv_heads * head_dim; }
};

// 1 / sqrt(head_dim), rounded once.
float UsualScale(size_t head_dim);

struct CacheShape {
  std::vector<LayerShape> layers;
  size_t ctx = 0;  // --ctx: percentages refer to it
  ComputeType compute = ComputeType::kF32;
  size_t input_width = 0;  // of what enters a layer, for KvCache::ReadInputs; 0: the cache is not given it

  size_t n_layers() const { return layers.size(); }

  // All layers global and alike, with the usual scale.
  static CacheShape Uniform(size_t n_layers, size_t n_heads, size_t n_kv_heads, size_t head_dim, size_t ctx,
                            const RopeConfig& rope, ComputeType compute = ComputeType::kF32);
};

// The local layers of a model, and the largest of their windows.
struct LocalLayers {
  size_t n_layers = 0, window = 0;
};
LocalLayers CountLocal(const CacheShape& shape);

// Where trained artefacts of the model are found when a spec does not name a file.
struct SidecarSource {
  std::string path;                // NAME.less.gguf beside NAME.gguf, or one found by identity; may not exist
  uint64_t model_fingerprint = 0;  // of the file; 0: the model is not checked (tests)
  uint64_t model_identity = 0;     // of the model, whatever its quantisation (GgufFile::Identity)
};

// Numbers (layer, KV head) pairs one after the other: what lies "a head" is indexed by it.
class HeadTable {
 public:
  explicit HeadTable(std::span<const LayerShape> layers);

  size_t size() const { return first_.back(); }  // all heads of all layers
  size_t n_layers() const { return first_.size() - 1; }
  size_t operator()(size_t layer, size_t kv_head) const { return first_[layer] + kv_head; }
  size_t n_heads(size_t layer) const { return first_[layer + 1] - first_[layer]; }  // KV heads of a layer
  size_t LayerOf(size_t head) const;

 private:
  std::vector<size_t> first_;  // [n_layers + 1]
};

}  // namespace lesskv
