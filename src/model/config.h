// The description of an architecture: everything that the one transformer layer of forward.cpp needs to know to be
// Llama, Mistral, SmolLM or Qwen 2. Read from GGUF metadata, every number checked against a range that real models
// keep, so that a damaged file is refused by the name of the key and never turns into an absurd allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "format/gguf.h"
#include "kernels/basic/rope.h"

namespace lesskv {

struct ModelConfig {
  std::string architecture;  // "llama" or "qwen2"
  std::string name;          // general.name, or empty
  size_t n_layers = 0;
  size_t n_heads = 0;
  size_t n_kv_heads = 0;  // divides n_heads
  size_t head_dim = 0;    // even
  size_t d_model = 0;
  size_t d_ffn = 0;
  size_t n_vocab = 0;
  size_t train_ctx = 0;  // context length the model was trained for
  float norm_eps = 0;
  double rope_base = 0;
  double rope_factor = 1;  // linear scaling: positions are divided by it
  RopeStyle rope_style = RopeStyle::kInterleaved;
  bool qkv_bias = false;  // required by the architecture; other biases are used where the file has them

  size_t q_dim() const { return n_heads * head_dim; }
  size_t kv_dim() const { return n_kv_heads * head_dim; }
};

// Throws Error for an unknown architecture, a missing key, a value out of range, or a feature that would change the
// result and that the layer does not have (experts, other rope scaling).
ModelConfig ReadModelConfig(const GgufFile& file);

}  // namespace lesskv
