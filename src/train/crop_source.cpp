#include "train/crop_source.h"

#include <string_view>

#include "base/error.h"
#include "base/rng.h"

namespace lesskv::train {

CropSource::CropSource(const Tokenizer& tokenizer, const std::vector<std::string>& paths) : tokenizer_(tokenizer) {
  for (const std::string& path : paths) {
    files_.push_back(MappedFile::Open(path));
    total_ += files_.back().bytes().size();
  }
  if (total_ == 0) Fail(ErrorCode::kInvalidArgument, "train: no text to train on (--text)");
}

std::vector<int32_t> CropSource::Crop(uint64_t seed, size_t n_tokens, bool begins) const {
  Rng rng(seed);
  constexpr int kTries = 64;
  for (int i = 0; i < kTries; ++i) {
    uint64_t at = rng.Below(total_);
    size_t file = 0;
    while (at >= files_[file].bytes().size()) at -= files_[file++].bytes().size();
    std::vector<int32_t> ids = CropAt(files_[file], at, n_tokens, begins);
    if (ids.size() == n_tokens) return ids;
  }
  Fail(ErrorCode::kInvalidArgument, "train: the texts hold no stretch of {} tokens", n_tokens);
}

std::vector<int32_t> CropSource::CropAt(const MappedFile& file, uint64_t at, size_t n_tokens, bool begins) const {
  constexpr size_t kBytesPerToken = 12;  // enough in one go for nearly any text
  const auto bytes = file.bytes();
  while (at < bytes.size() && at > 0 && bytes[at - 1] != std::byte{'\n'} && bytes[at - 1] != std::byte{' '}) ++at;
  const size_t n = std::min<size_t>(bytes.size() - at, n_tokens * kBytesPerToken);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + at, n);
  std::vector<int32_t> ids = tokenizer_.Encode(text, begins && tokenizer_.add_bos(), false);
  if (ids.size() > n_tokens) ids.resize(n_tokens);
  return ids;
}

uint64_t MixSeed(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15ull + b + 1;
  x ^= x >> 31;
  return x * 0xbf58476d1ce4e5b9ull;
}

}  // namespace lesskv::train
