// Exact attention over one prompt, a layer at a time and with the memory of one: what the caches that stand between a
// model and its training answer with, while they look at what passes.
#pragma once

#include <cstddef>
#include <memory>

#include "kvcache/sequence_cache.h"

namespace lesskv::train {

class FullLayers {
 public:
  FullLayers(const CacheShape& shape, size_t n_tokens) : shape_(shape), n_tokens_(n_tokens) {}

  // As KvCache's; Attend lets the layer go.
  void Append(size_t layer, const float* keys, const float* values);
  void Attend(const float* queries, float* out);

 private:
  CacheShape shape_;
  size_t n_tokens_;
  std::unique_ptr<SequenceCache> layer_;
};

}  // namespace lesskv::train
