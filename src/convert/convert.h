// A Hugging Face model directory to one GGUF file, tensor by tensor: memory holds a slab of rows, never the model.
// docs/convert.md says what is read and what is refused.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace lesskv {

struct ConvertOptions {
  std::string in;             // directory
  std::string out;            // file
  std::optional<DType> type;  // of matrices: F32, F16, BF16, Q8_0 or Q4_0; none: as the embedding is stored
  // Called after every slab of rows with the share done, in [0, 1]; what it throws ends the conversion.
  std::function<void(double done)> progress;
};

struct ConvertReport {
  DType type;
  uint64_t bytes_read = 0;         // of weights
  std::vector<std::string> notes;  // what people should know, a line each
};

// Reads and checks everything but the weights, then writes the file, which appears under its name only when it is
// complete. Throws Error with one sentence for whatever cannot be converted.
ConvertReport Convert(const ConvertOptions& options);

}  // namespace lesskv
