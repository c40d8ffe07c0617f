// Feature maps with random weights in a temporary file, removed with the object.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kvcache/cache_config.h"
#include "model/model.h"

namespace lesskv {

class RandomSidecar {
 public:
  // Throws Error kIo when the file cannot be written.
  RandomSidecar(const Model& model, size_t rank, size_t hidden, uint64_t seed);
  ~RandomSidecar();
  RandomSidecar(const RandomSidecar&) = delete;
  RandomSidecar& operator=(const RandomSidecar&) = delete;

  SidecarSource source() const { return {path_, fingerprint_, 0}; }

 private:
  std::string path_;
  uint64_t fingerprint_;
};

}  // namespace lesskv
