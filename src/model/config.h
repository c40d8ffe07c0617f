// The description of a model: everything that the one transformer layer of forward.cpp needs to know to be Llama,
// Qwen, Gemma 3, Phi 3, Falcon or SmolLM 3. What an architecture fixes stands in a table (config.cpp); numbers are read
// from GGUF metadata, every one checked against a range that real models keep, so that a damaged file is refused by the
// name of the key and never turns into an absurd allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "format/gguf.h"
#include "kernels/basic/rope.h"

namespace lesskv {

enum class NormKind { kRms, kLayer };  // kLayer: with a bias
// What stands between the products of the feed-forward half: silu or GELU by tanh of one product times another, or the
// exact GELU of the only one.
enum class Activation { kSiluGate, kGeluTanhGate, kGelu };

// What the models of an architecture have in common.
struct Architecture {
  std::string_view name;  // general.architecture
  RopeStyle rope_style = RopeStyle::kInterleaved;
  NormKind norm = NormKind::kRms;
  Activation activation = Activation::kSiluGate;
  bool gate_in_up = false;        // gate and up are one matrix, ffn_up: first the gate's rows
  bool qk_norm = false;           // each head of the queries and the keys is normed before it is rotated
  bool post_norms = false;        // the results of attention and feed-forward are normed before they are added
  bool parallel = false;          // attention and feed-forward read the same input
  bool scaled_embedding = false;  // embeddings times sqrt(d_model)
  bool partial_rotation = false;  // rope.dimension_count may be less than the head size
  bool local_layers = false;      // attention.sliding_window holds for the layers of sliding_window_pattern
  size_t unrotated_every = 0;     // of so many layers the last is not rotated; 0: all are

  bool gated() const { return activation != Activation::kGelu; }
};

struct ModelConfig {
  Architecture architecture;
  std::string name;  // general.name, or empty
  size_t n_layers = 0;
  size_t n_heads = 0;
  size_t n_kv_heads = 0;  // divides n_heads
  size_t head_dim = 0;    // even
  size_t d_model = 0;
  size_t d_ffn = 0;
  size_t n_vocab = 0;
  size_t train_ctx = 0;  // context length the model was trained for
  float norm_eps = 0;
  float attention_scale = 0;  // scores are it times q . k
  RopeConfig rope;            // without the factors that lie in tensors
  bool long_rope = false;     // LongRoPE (arXiv 2402.13753): two sets of factors, in tensors
  size_t original_ctx = 0;    // contexts beyond it take the long ones
  // Local layers: their window and the base of their own, unscaled rotation. Empty: all layers are global.
  std::vector<bool> local;  // [n_layers]
  size_t window = 0;
  double local_rope_base = 0;

  size_t q_dim() const { return n_heads * head_dim; }
  size_t kv_dim() const { return n_kv_heads * head_dim; }
  bool is_local(size_t layer) const { return !local.empty() && local[layer]; }
  bool is_rotated(size_t layer) const {
    return architecture.unrotated_every == 0 || (layer + 1) % architecture.unrotated_every != 0;
  }
};

// Throws Error for an unknown architecture, a missing key, a value out of range, or a feature that would change the
// result and that the layer does not have (experts, soft caps, other rope scaling).
ModelConfig ReadModelConfig(const GgufFile& file);

}  // namespace lesskv
