// Feature maps ready to run: the sidecar's parameters packed for the kernels, psi's third layer folded (docs/less.md).
// Immutable, shared by all sequences and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvcache/residual/feature_kernels.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {

class FeatureMaps {
 public:
  // Packs the maps in the sidecar's own matrix type. Throws Error kMismatch when a layer is empty (a part that was
  // not merged).
  static std::shared_ptr<const FeatureMaps> Create(const Sidecar& sidecar, const std::string& name = "sidecar");

  // Those of a file that has been read. Throws Error kNotFound when it holds none.
  static std::shared_ptr<const FeatureMaps> OfFile(const Sidecar& sidecar, const std::string& path);

  const SidecarShape& shape() const { return shape_; }
  const SidecarTraining& training() const { return training_; }
  size_t bytes() const;  // of packed weights

  // Features of n vectors of one head, written to out [n, rank]; rows of x [n, head_dim] lie x_stride floats apart.
  // Rotated queries (phi, query head) or rotated keys (psi, KV head). Every feature is >= 0 and finite for finite x.
  void Phi(size_t layer, size_t head, const float* x, size_t x_stride, size_t n, float* out) const;
  void Psi(size_t layer, size_t kv_head, const float* x, size_t x_stride, size_t n, float* out) const;

  // What is added to the log-mass that the rotated query q [head_dim] of a query head reads: see LayerParams::center.
  float LogMassOffset(size_t layer, size_t head, const float* q) const;

 private:
  struct Map {
    std::vector<std::byte> storage;
    std::vector<float> b1, b2, w3;  // w3 [rank, rank]: psi of kGelu only
    internal::PackedMap packed;
  };
  struct Layer {
    std::vector<Map> phi, psi;
    std::vector<float> center;  // as in LayerParams
  };

  FeatureMaps() = default;
  static Map PackMap(const SidecarShape& shape, DType type, const NetParams& net, size_t head);
  void Run(const Map& map, const float* x, size_t x_stride, size_t n, float* out) const;

  SidecarShape shape_;
  SidecarTraining training_;
  std::vector<Layer> layers_;
};

// psi's third layer as one matrix, W3 = diag(|d|) (I + X diag(d2)), [rank, rank]; u W3 for row vectors u.
std::vector<float> FoldThirdLayer(const LayerParams& params, size_t rank, size_t kv_head);

// kExp features are exp of at most this, so that neither they nor sums of millions of them leave float32.
inline constexpr float kMaxExponent = 25.0f;

}  // namespace lesskv
