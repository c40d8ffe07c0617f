// LESS (Dong et al., ICML 2024, arXiv 2402.09398): evicted pairs are folded into a linear-attention state of constant
// size, read by later queries under one normaliser with the exact pairs. Formulas: the paper's equations as collected
// in docs/less.md.
//
// State of a KV head, float32: H [rank, head_dim], then z [rank].
//   absorb  z += psi(k), H += psi(k)^T v
//   read    output phi(q) H / phi(q) z, log-mass log(phi(q) z)
// The log-mass is on the scale of the exact pairs' log sum exp(scale q k), so the cache merges both by log-sum-exp.
#pragma once

#include <memory>
#include <span>

#include "kvcache/cache_shape.h"

#include "kvcache/residual/feature_maps.h"
#include "kvcache/residual/residual.h"

namespace lesskv {

struct LessOptions {
  // The authors' decode code instead of the epsilon-free form: features and mass are clamped at 1e-6 when read, also
  // while the state is still empty (ReadsEmptyState). A prompt is ordinary attention in their code, without a clamp.
  bool clamp = false;
};

// For the layers given. Throws Error kMismatch when the maps were trained for another shape.
std::unique_ptr<const Residual> MakeLessResidual(const LessOptions& options, std::span<const LayerShape> layers,
                                                 std::shared_ptr<const FeatureMaps> maps);

// Floats of state a KV head: rank * (head_dim + 1).
constexpr size_t LessStateFloats(size_t rank, size_t head_dim) { return rank * (head_dim + 1); }

}  // namespace lesskv
