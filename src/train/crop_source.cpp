#include "train/crop_source.h"

#include <algorithm>
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

std::vector<int32_t> CropSource::Crop(uint64_t seed, size_t n_tokens, bool begins, std::span<const Stretch> others,
                                      Stretch* where) const {
  Rng rng(seed);
  constexpr int kTries = 64;
  bool any = false;
  for (int i = 0; i < kTries; ++i) {
    Stretch stretch{0, rng.Below(total_), 0};
    while (stretch.begin >= files_[stretch.file].bytes().size()) stretch.begin -= files_[stretch.file++].bytes().size();
    std::vector<int32_t> ids = CropAt(stretch, n_tokens, begins);
    if (ids.size() < n_tokens) continue;
    any = true;
    const auto shares = [&](const Stretch& other) {
      return stretch.file == other.file && stretch.begin < other.end && other.begin < stretch.end;
    };
    if (std::any_of(others.begin(), others.end(), shares)) continue;
    if (where != nullptr) *where = stretch;
    return ids;
  }
  if (any)
    Fail(ErrorCode::kInvalidArgument,
         "train: the texts have hardly a stretch of {} tokens that no validation text shares; more text is needed, or fewer "
         "--sequences", n_tokens);
  Fail(ErrorCode::kInvalidArgument, "train: the texts hold no stretch of {} tokens", n_tokens);
}

// From the first word behind stretch.begin on; says where that is, and where the tokens end.
std::vector<int32_t> CropSource::CropAt(Stretch& stretch, size_t n_tokens, bool begins) const {
  constexpr size_t kBytesPerToken = 12;  // enough in one go for nearly any text
  const auto bytes = files_[stretch.file].bytes();
  uint64_t& at = stretch.begin;
  while (at < bytes.size() && at > 0 && bytes[at - 1] != std::byte{'\n'} && bytes[at - 1] != std::byte{' '}) ++at;
  const size_t n = std::min<size_t>(bytes.size() - at, n_tokens * kBytesPerToken);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + at, n);
  std::vector<int32_t> ids = tokenizer_.Encode(text, begins && tokenizer_.add_bos(), false);
  if (ids.size() > n_tokens) ids.resize(n_tokens);
  stretch.end = at;
  for (const int32_t id : ids) stretch.end += tokenizer_.TokenBytes(id).size();
  stretch.end = std::min(stretch.end, at + n);
  return ids;
}

uint64_t MixSeed(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15ull + b + 1;
  x ^= x >> 31;
  return x * 0xbf58476d1ce4e5b9ull;
}

}  // namespace lesskv::train
