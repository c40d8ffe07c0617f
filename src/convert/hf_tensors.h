// Which tensors of a Hugging Face checkpoint become which of a GGUF file, and how their rows move.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "convert/hf_config.h"
#include "convert/hf_directory.h"
#include "model/config.h"

namespace lesskv {

// One tensor of the GGUF file. Every row is one of the source's; values may be shifted.
struct TensorRecipe {
  std::string name;  // GGUF
  HfTensor source;
  std::vector<size_t> shape;                     // slowest dimension first: [rows, row length], or [n]
  std::function<size_t(size_t row)> source_row;  // empty: the same
  float shift = 0;                               // added to every value (Gemma's norms are stored minus one)

  size_t RowLength() const { return shape.back(); }
  size_t Rows() const { return shape.size() == 1 ? 1 : shape[0]; }
};

// Where the language model lies in the checkpoint: the prefix of its tensors, "model." in most.
std::string BodyPrefix(const HfDirectory& directory, const HfConfig& hf);

// The embedding's tensor. Throws Error when it is missing, has another type or is no matrix.
HfTensor RequireEmbedding(const HfDirectory& directory, const HfConfig& hf);

// All tensors in the order in which they are written. Throws Error for one that is missing, has another shape or type
// than `model` needs, or that the architecture does not know. `notes` receives what is left out.
std::vector<TensorRecipe> PlanTensors(const HfDirectory& directory, const HfConfig& hf, const ModelConfig& model,
                                      std::vector<std::string>& notes);

}  // namespace lesskv
