// A language model: its description and its weights. Immutable, shared by all sequences and threads.
// Matrices stay in their stored type, mapped or read (ModelLoading); norm weights and biases are copied to f32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "format/gguf.h"
#include "kernels/linear/linear.h"
#include "kernels/basic/rope.h"
#include "kvcache/cache_config.h"
#include "model/config.h"

namespace lesskv {

// A norm's weight and, for NormKind::kLayer, bias. An empty weight: the architecture has no such norm.
struct NormWeights {
  std::vector<float> weight, bias;
};

// Matrices are [outputs, inputs], row-major; parts of a matrix that holds several are views into it. An empty vector
// means that the file has no such bias, a matrix without rows that the architecture has no such product.
struct LayerWeights {
  NormWeights attn_norm, ffn_norm;            // [d_model] before each half
  NormWeights q_norm, k_norm;                 // [head_dim] of each head
  NormWeights post_attn_norm, post_ffn_norm;  // [d_model] of each half's result
  WeightView q, k, v;                         // [q_dim | kv_dim | kv_dim, d_model]
  std::vector<float> q_bias, k_bias, v_bias;  // [q_dim | kv_dim | kv_dim]
  WeightView attn_output;                     // [d_model, q_dim]
  std::vector<float> attn_output_bias;        // [d_model]
  WeightView ffn_gate, ffn_up;                // [d_ffn, d_model]
  WeightView ffn_down;                        // [d_model, d_ffn]
  std::vector<float> ffn_gate_bias, ffn_up_bias, ffn_down_bias;
};

// The rotations of a model's layers. Of those that a model does not need there is none.
struct RopeTables {
  std::shared_ptr<const RopeTable> global, local, none;
  std::shared_ptr<const RopeTable> global_long;  // for contexts beyond ModelConfig::original_ctx (LongRoPE)
};

// Where the weights lie. kMap: in the mapped file, read when first used and shared by all processes. kRead: read at
// once into memory in large pages, which decoding streams through faster. kAuto: kRead for a file of 64 MiB or more
// where the system has large pages and twice the file's size is available memory, else kMap.
enum class ModelLoading { kAuto, kMap, kRead };

class Model {
 public:
  // Opens the file as `loading` says and checks it: a missing tensor, a tensor of the wrong shape or one that the
  // architecture does not know is an Error that names it.
  static std::shared_ptr<const Model> Load(const std::string& path, ModelLoading loading = ModelLoading::kMap);

  const std::string& path() const { return path_; }
  const GgufFile& file() const { return *file_; }
  const ModelConfig& config() const { return config_; }

  const WeightView& token_embedding() const { return token_embedding_; }  // [n_vocab, d_model]
  const LayerWeights& layer(size_t index) const { return layers_[index]; }
  const NormWeights& output_norm() const { return output_norm_; }  // [d_model]
  const WeightView& output() const { return output_; }  // [n_vocab, d_model]; the embedding when the file ties them

  // Identifies the file: see GgufFile::Fingerprint.
  uint64_t fingerprint() const { return fingerprint_; }
  // Identifies the model whatever its quantisation: see GgufFile::Identity.
  uint64_t identity() const { return identity_; }
  std::string FingerprintText() const { return FingerprintString(fingerprint_); }

  size_t parameter_count() const { return parameter_count_; }
  size_t weight_bytes() const { return weight_bytes_; }  // as stored

  // The cache's view of this model for a context of `ctx` tokens, by which LongRoPE chooses its factors. `sidecar` is
  // NAME.less.gguf beside NAME.gguf or NAME-00001-of-0000N.gguf, else the first .less.gguf there or one folder up (in the order of names) that was
  // trained for this identity.
  CacheShape MakeCacheShape(size_t ctx, ComputeType compute) const;
  const SidecarSource& Sidecar() const { return sidecar_; }

 private:
  Model(std::shared_ptr<const GgufFile> file, ModelConfig config) : file_(std::move(file)), config_(std::move(config)) {}

  std::string path_;
  std::shared_ptr<const GgufFile> file_;
  ModelConfig config_;
  RopeTables rope_;
  WeightView token_embedding_{}, output_{};
  NormWeights output_norm_;
  std::vector<LayerWeights> layers_;
  uint64_t fingerprint_ = 0, identity_ = 0;
  SidecarSource sidecar_;
  size_t parameter_count_ = 0;
  size_t weight_bytes_ = 0;
};

}  // namespace lesskv
