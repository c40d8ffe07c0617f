// Training texts: random crops of files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/mmap.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

// Random crops of the files, in proportion to their bytes. A crop is found by a byte offset and tokenized on its own,
// so that no corpus is ever tokenized or held whole.
class CropSource {
 public:
  // Throws Error when there is no file, or one that cannot be read.
  CropSource(const Tokenizer& tokenizer, const std::vector<std::string>& paths);

  // Behind BOS where the vocabulary wants one and the crop begins what the model reads. Throws Error when the files hold no
  // stretch of so many tokens.
  std::vector<int32_t> Crop(uint64_t seed, size_t n_tokens, bool begins = true) const;

 private:
  std::vector<int32_t> CropAt(const MappedFile& file, uint64_t at, size_t n_tokens, bool begins) const;

  const Tokenizer& tokenizer_;
  std::vector<MappedFile> files_;
  uint64_t total_ = 0;
};

// A seed for the b-th of the things that share seed a.
uint64_t MixSeed(uint64_t a, uint64_t b);

}  // namespace lesskv::train
