// Random activations for benchmarks of the cache alone, and a cache with random feature maps. Shared by bench_cache and
// bench_check.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kvcache/residual/sidecar.h"
#include "kvcache/sequence_cache.h"

namespace lesskv::bench {

// Caches of the given specs; `less` gets random maps of this rank and hidden width from a temporary file.
inline std::vector<std::unique_ptr<SequenceCache>> MakeCaches(const std::vector<std::string>& specs, const CacheShape& shape,
                                                              size_t rank, size_t hidden) {
  const std::string sidecar =
      fmt::format("{}/lesskv_bench_{}.less.gguf", std::filesystem::temp_directory_path().string(), getpid());
  const LayerShape& layer = shape.layers[0];
  WriteSidecar(sidecar, InitialSidecar({.n_layers = shape.n_layers(), .n_heads = layer.n_heads,
                                        .n_kv_heads = layer.n_kv_heads, .head_dim = layer.head_dim, .rank = rank,
                                        .hidden = hidden}, 1));
  std::vector<std::unique_ptr<SequenceCache>> caches;
  for (const std::string& spec : specs)
    caches.push_back(std::make_unique<SequenceCache>(CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, {sidecar, 0})));
  std::filesystem::remove(sidecar);
  return caches;
}

class Feeder {
 public:
  Feeder(const CacheShape& shape, size_t most_tokens) : shape_(shape), rng_(1) {
    Fill(keys_, most_tokens * shape.layers[0].kv_dim());
    Fill(values_, most_tokens * shape.layers[0].kv_dim());
    Fill(queries_, most_tokens * shape.layers[0].q_dim());
    out_.resize(queries_.size());
  }

  void Step(SequenceCache& cache, size_t n, StepKind kind) {
    cache.BeginStep(n, kind);
    for (size_t layer = 0; layer < shape_.n_layers(); ++layer) {
      cache.Append(layer, keys_.data(), values_.data());
      cache.Attend(layer, queries_.data(), out_.data());
    }
    cache.EndStep();
  }

 private:
  void Fill(std::vector<float>& x, size_t n) {
    x.resize(n);
    for (float& value : x) value = rng_.Normal();
  }

  CacheShape shape_;
  Rng rng_;
  std::vector<float> keys_, values_, queries_, out_;
};

}  // namespace lesskv::bench
