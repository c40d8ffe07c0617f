// safetensors files, the format of HF checkpoints and of our golden vectors: a little-endian u64 (bytes of the header),
// a JSON header (name -> dtype, shape, data_offsets; "__metadata__" -> strings), the tensor data without gaps.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "base/mmap.h"

namespace lesskv {

enum class SafetensorType { kF32, kF16, kBF16, kI64, kI32, kU8, kBool };

// "F32", ..., as in the file.
std::string_view SafetensorTypeName(SafetensorType type);
size_t SafetensorElementBytes(SafetensorType type);

struct Safetensor {
  std::string name;
  SafetensorType type;
  std::vector<size_t> shape;        // slowest dimension first; empty for a single number; dimensions may be 0
  std::span<const std::byte> data;  // row-major; not necessarily aligned

  size_t Elements() const;
  std::string ShapeString() const;  // "[2, 3]"
};

// An open, completely checked file. Copies share the bytes. Immutable, thread-safe.
class SafetensorsFile {
 public:
  // Throws Error: see MappedFile::Open, and kBadFile with a sentence naming what is wrong.
  static SafetensorsFile Open(const std::string& path);
  // The same checks on bytes in memory; `name` takes the path's place in messages.
  static SafetensorsFile Parse(std::vector<std::byte> bytes, std::string name);

  // In the order of their data.
  const std::vector<Safetensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // nullptr when there is no such tensor.
  const Safetensor* FindTensor(const std::string& name) const;

  // A copy of a tensor's elements. T must be the stored type: float for F32, int64_t, int32_t, uint8_t for U8 and BOOL
  // (0 or 1), uint16_t for the bits of F16 and BF16. `shape`, when given, must be the stored one. Throws Error:
  // kNotFound without the tensor, kBadFile for another type, kMismatch for another shape.
  template <typename T>
  std::vector<T> Values(const std::string& name, std::optional<std::vector<size_t>> shape = std::nullopt) const;

  // Tells the system that a tensor of this file will not be read for a while: of a mapped file, its pages leave this
  // process's memory, and come back when they are touched.
  void Release(const Safetensor& tensor) const;

  // Metadata `key`; Error(kNotFound) without it.
  const std::string& Metadata(const std::string& key) const;

 private:
  SafetensorsFile() = default;
  static SafetensorsFile Load(std::span<const std::byte> bytes, std::string name, std::shared_ptr<const void> owner);
  const Safetensor& Require(const std::string& name, const std::optional<std::vector<size_t>>& shape) const;
  [[noreturn]] void FailType(const Safetensor& tensor) const;

  std::string name_;
  std::shared_ptr<const void> owner_;
  std::shared_ptr<const MappedFile> mapping_;  // null for bytes in memory
  std::vector<Safetensor> tensors_;
  std::unordered_map<std::string, size_t> index_;
  std::map<std::string, std::string> metadata_;
};

// Collects tensors (copied) and writes them in the order they were added.
class SafetensorsWriter {
 public:
  void AddMetadata(const std::string& key, const std::string& value) { metadata_[key] = value; }
  // `data` holds exactly the elements of `shape`. Throws Error(kInvalidArgument) when it does not or the name was used.
  void Add(const std::string& name, SafetensorType type, std::vector<size_t> shape, std::span<const std::byte> data);
  void Add(const std::string& name, std::vector<size_t> shape, std::span<const float> values) {
    Add(name, SafetensorType::kF32, std::move(shape), std::as_bytes(values));
  }

  std::vector<std::byte> Serialize() const;
  // Appears under `path` only when it is complete. Throws Error(kIo).
  void Write(const std::string& path) const;

 private:
  struct Entry {
    std::string name;
    SafetensorType type;
    std::vector<size_t> shape;
    std::vector<std::byte> data;
  };
  std::map<std::string, std::string> metadata_;
  std::vector<Entry> entries_;
};

// ---------------------------------------------------------------------------------------------------------------------

namespace internal {

template <typename T>
constexpr bool IsStoredAs(SafetensorType type) {
  if constexpr (std::same_as<T, float>) return type == SafetensorType::kF32;
  if constexpr (std::same_as<T, int64_t>) return type == SafetensorType::kI64;
  if constexpr (std::same_as<T, int32_t>) return type == SafetensorType::kI32;
  if constexpr (std::same_as<T, uint8_t>) return type == SafetensorType::kU8 || type == SafetensorType::kBool;
  if constexpr (std::same_as<T, uint16_t>) return type == SafetensorType::kF16 || type == SafetensorType::kBF16;
  return false;
}

}  // namespace internal

template <typename T>
std::vector<T> SafetensorsFile::Values(const std::string& name, std::optional<std::vector<size_t>> shape) const {
  const Safetensor& tensor = Require(name, shape);
  if (!internal::IsStoredAs<T>(tensor.type)) FailType(tensor);
  std::vector<T> values(tensor.Elements());
  if (!values.empty()) std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  return values;
}

}  // namespace lesskv
