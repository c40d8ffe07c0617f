// For tests: what the authors' own modules made of random maps and tokens (golden/less of the shared test data).
#pragma once

#include <cstdlib>
#include <string>

#include "format/safetensors.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {

inline std::string LessGoldenPath(const std::string& name) {
  const char* shared = std::getenv("LESSKV_SHARED_DIR");
  return (shared ? std::string(shared) : LESSKV_SOURCE_DIR "/../shared") + "/golden/less/" + name;
}

inline size_t GoldenNumber(const SafetensorsFile& file, const char* key) { return std::stoul(file.Metadata(key)); }

// The file's maps, of one layer.
inline Sidecar LessGoldenSidecar(const SafetensorsFile& file) {
  Sidecar sidecar;
  SidecarShape& s = sidecar.shape;
  s.n_layers = 1;
  s.n_heads = s.n_kv_heads = GoldenNumber(file, "n_heads");
  s.head_dim = GoldenNumber(file, "head_dim");
  s.rank = GoldenNumber(file, "rank");
  s.hidden = GoldenNumber(file, "hidden");
  sidecar.matrix_type = DType::kF32;
  LayerParams& p = sidecar.layers.emplace_back();
  p.phi.w1 = file.Values<float>("w_kernel_q_mat1");
  p.phi.w2 = file.Values<float>("w_kernel_q_mat2");
  p.psi.w1 = file.Values<float>("w_kernel_k_mat1");
  p.psi.w2 = file.Values<float>("w_kernel_k_mat2");
  p.d = file.Values<float>("w_scalingD");
  p.d2 = file.Values<float>("w_scalingD2");
  p.x = file.Values<float>("w_interaction_k");
  return sidecar;
}

}  // namespace lesskv
