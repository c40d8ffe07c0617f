// The one pass that checks a GGUF file and fills a GgufFile. Used by GgufFile::Open and Parse only.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "format/gguf.h"

namespace lesskv {

// Trusts nothing: a count is compared with the bytes that are left before anything is allocated for it, so memory use
// is bounded by a small multiple of the header's size. Used once.
class GgufParser {
 public:
  GgufParser(std::span<const std::byte> bytes, std::string name, std::shared_ptr<const void> owner);
  GgufFile Run();

 private:
  template <typename... Args>
  [[noreturn]] void Bad(fmt::format_string<Args...> format, Args&&... args) const {
    Fail(ErrorCode::kBadFile, "{}: {}", file_.name_, fmt::format(format, std::forward<Args>(args)...));
  }

  uint64_t Remaining() const { return bytes_.size() - position_; }
  std::span<const std::byte> Take(uint64_t n, const char* what);
  template <typename T>
  T Number(const char* what);
  std::string_view String(const char* what);
  // A count of things that take at least `smallest` bytes each.
  uint64_t Count(uint64_t smallest, const char* what);

  void ReadMagicAndVersion();
  void ReadPair(uint64_t index);
  GgufValue ReadValue(std::string_view key);
  void ReadElements(std::string_view key, GgufValue& value);
  GgufType ReadType(std::string_view key);
  void ReadAlignment();
  void ReadSplit();
  void ReadTensor(uint64_t index);
  void ReadShape(GgufTensor& tensor);
  void ReadTensorType(GgufTensor& tensor);
  void FindDataOffset();
  void PlaceTensors();
  void RefuseOverlap() const;

  GgufFile file_;
  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
  std::vector<uint64_t> relative_offsets_;  // of each tensor's data, from the start of the data
};

}  // namespace lesskv
