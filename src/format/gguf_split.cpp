// Models in several files: their names, and how the parts become one GgufFile.
#include <algorithm>
#include <filesystem>

#include "format/gguf.h"

namespace lesskv {
namespace {

constexpr std::string_view kSuffix = "-00001-of-00001.gguf";  // five digits each
constexpr size_t kDigits = 5, kFirstNumber = 1, kSecondNumber = 10;

// The five digits at `at`, or 0 when there are other characters.
size_t FiveDigits(std::string_view text, size_t at) {
  size_t number = 0;
  for (const char c : text.substr(at, kDigits)) {
    if (c < '0' || c > '9') return 0;
    number = 10 * number + static_cast<size_t>(c - '0');
  }
  return number;
}

bool SameValue(const GgufValue& a, const GgufValue& b) {
  return a.TypeName() == b.TypeName() && std::ranges::equal(a.encoded(), b.encoded());
}

template <typename... Args>
[[noreturn]] void Bad(const std::string& path, fmt::format_string<Args...> format, Args&&... args) {
  Fail(ErrorCode::kBadFile, "{}: {}", path, fmt::format(format, std::forward<Args>(args)...));
}

// The name of the first part says where the others are.
SplitName FirstPartName(const std::string& path, size_t part, size_t count) {
  const std::optional<SplitName> name = ParseSplitName(path);
  if (part != 0) {
    const std::string first = name ? ", " + name->Part(0) : "";
    Bad(path, "this is part {} of {} of a split model; name its first part{}", part + 1, count, first);
  }
  if (!name || name->part != 0 || name->count != count) {
    Bad(path,
        "the first of {} parts of a split model, expected a name that ends in -00001-of-{:05}.gguf, by which the "
        "other parts are found",
        count, count);
  }
  return *name;
}

}  // namespace

std::string SplitName::Part(size_t index) const {
  return fmt::format("{}-{:05}-of-{:05}.gguf", prefix, index + 1, count);
}

std::optional<SplitName> ParseSplitName(std::string_view path) {
  if (path.size() <= kSuffix.size()) return std::nullopt;
  const std::string_view prefix = path.substr(0, path.size() - kSuffix.size()), suffix = path.substr(prefix.size());
  const size_t part = FiveDigits(suffix, kFirstNumber), count = FiveDigits(suffix, kSecondNumber);
  if (part == 0 || part > count) return std::nullopt;
  SplitName name{std::string(prefix), part - 1, count};
  if (name.Part(name.part) != path) return std::nullopt;
  return name;
}

std::vector<std::string> ModelFiles(const std::string& path) {
  const std::optional<SplitName> name = ParseSplitName(path);
  if (!name || name->part != 0) return {path};
  std::vector<std::string> paths;
  for (size_t i = 0; i < name->count; ++i) paths.push_back(name->Part(i));
  return paths;
}

GgufFile GgufFile::Join(GgufFile first, bool map) {
  const SplitName name = FirstPartName(first.name_, first.split_part_, first.split_count_);
  auto owners = std::make_shared<std::vector<std::shared_ptr<const void>>>();
  owners->push_back(std::move(first.owner_));
  for (size_t i = 1; i < name.count; ++i) {
    const std::string path = name.Part(i);
    std::error_code unreadable;  // left to OpenOne
    if (!std::filesystem::exists(path, unreadable) && !unreadable) {
      Fail(ErrorCode::kNotFound, "{}: part {} of {} is missing: there is no {}", first.name_, i + 1, name.count, path);
    }
    GgufFile part = OpenOne(path, map);
    first.CheckPart(part, i);
    owners->push_back(std::move(part.owner_));
    first.Append(std::move(part), i);
  }
  first.owner_ = std::move(owners);
  const size_t n_tensors = first.GetOr<size_t>("split.tensors.count", first.tensors_.size());
  if (n_tensors != first.tensors_.size()) {
    Bad(first.name_, "its {} parts hold {} tensors, split.tensors.count says {}", name.count, first.tensors_.size(),
        n_tensors);
  }
  return first;
}

void GgufFile::CheckPart(const GgufFile& part, size_t index) const {
  if (part.split_count_ != split_count_ || part.split_part_ != index) {
    Bad(part.name_, "expected part {} of {} of a split model, found part {} of {}", index + 1, split_count_,
        part.split_part_ + 1, part.split_count_);
  }
  for (const auto& [key, value] : part.metadata_) {
    const GgufValue* ours = Find(key);
    if (key == "split.no" || ours == nullptr || SameValue(*ours, value)) continue;
    Bad(part.name_, "metadata {} differs from that of {}: it is a part of another model", Quoted(key), name_);
  }
  for (const GgufTensor& tensor : part.tensors_) {
    if (FindTensor(tensor.name) == nullptr) continue;
    Bad(part.name_, "tensor {} is in an earlier part too: it is a part of another model", Quoted(tensor.name));
  }
}

void GgufFile::Append(GgufFile part, size_t index) {
  for (const auto& [name, at] : part.tensor_index_) tensor_index_.emplace(name, tensors_.size() + at);
  for (GgufTensor& tensor : part.tensors_) {
    tensor.part = index;
    tensors_.push_back(std::move(tensor));
  }
  headers_.push_back(part.headers_.front());
  file_bytes_ += part.file_bytes_;
}

}  // namespace lesskv
