// Training texts: random crops of files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/mmap.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

// Random crops of the files, in proportion to their bytes. A crop is found by a byte offset and tokenized on its own,
// so that no corpus is ever tokenized or held whole.
class CropSource {
 public:
  struct Stretch {
    size_t file;
    uint64_t begin, end;  // bytes, half-open
  };

  // Throws Error when there is no file, or one that cannot be read.
  CropSource(const Tokenizer& tokenizer, const std::vector<std::string>& paths);

  // Behind BOS where the vocabulary wants one and the crop begins what the model reads. Throws Error when the files hold no
  // stretch of so many tokens.
  std::vector<int32_t> Crop(uint64_t seed, size_t n_tokens, bool begins = true) const { return Crop(seed, n_tokens, begins, {}); }
  // One that shares nothing with the stretches of `others`, and where it lies (null: nobody asks).
  std::vector<int32_t> Crop(uint64_t seed, size_t n_tokens, bool begins, std::span<const Stretch> others, Stretch* where = nullptr) const;

 private:
  std::vector<int32_t> CropAt(Stretch& stretch, size_t n_tokens, bool begins) const;

  const Tokenizer& tokenizer_;
  std::vector<MappedFile> files_;
  uint64_t total_ = 0;
};

// A seed for the b-th of the things that share seed a.
uint64_t MixSeed(uint64_t a, uint64_t b);

}  // namespace lesskv::train
