// config.json to GGUF metadata. What the numbers mean, and whether they make sense together, is left to the loader's
// own ReadModelConfig, through which every result goes before anything is written.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/gguf_writer.h"
#include "format/json_reader.h"

namespace lesskv {

struct HfConfig {
  std::string_view architecture;  // general.architecture
  bool tied = false;              // the output matrix is the embedding
  bool multimodal = false;        // the language model is a part of the checkpoint
  std::optional<size_t> n_vocab;  // rows of the embedding, where config.json says
  bool two_norms = false;         // falcon: one norm for each half of a layer
  // Divisors of rotations, by the names of their tensors.
  std::map<std::string, std::vector<float>> rope_factors;
  std::vector<std::string> notes;  // what people should know
};

// Adds the keys of the architecture to `writer`. Throws Error naming the key for an architecture that is not known, a
// value of the wrong kind, and a feature that would change the result and that the engine does not have.
HfConfig TranslateConfig(const JsonReader& config, GgufWriter& writer);

}  // namespace lesskv
