// Writing GGUF files: version 3, little-endian, alignment 32. Reading is in gguf.h.
#pragma once

#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "base/atomic_file.h"
#include "format/gguf.h"

namespace lesskv {

// Types that have a fixed-width GGUF form.
template <typename T>
concept GgufScalar = std::same_as<T, bool> || std::same_as<T, uint8_t> || std::same_as<T, int8_t> ||
    std::same_as<T, uint16_t> || std::same_as<T, int16_t> || std::same_as<T, uint32_t> || std::same_as<T, int32_t> ||
    std::same_as<T, uint64_t> || std::same_as<T, int64_t> || std::same_as<T, float> || std::same_as<T, double>;

// Collects metadata and tensors, then writes them in the order they were added. Keys and tensor names must be new and
// of the length the format allows, rows whole blocks, as the reader demands: anything else is Error(kInvalidArgument)
// at once. general.alignment is not written (32 is what its absence means) and refused as a key.
class GgufWriter {
 public:
  // Writes exactly the bytes of one tensor into the sink, in one or many pieces.
  using TensorSource = std::function<void(ByteSink& sink)>;

  // A scalar; its C++ type decides the type in the file.
  template <GgufScalar T>
  void Add(std::string_view key, T value);
  void Add(std::string_view key, std::string_view value);
  void Add(std::string_view key, const char* value) { Add(key, std::string_view(value)); }
  void Add(std::string_view key, const std::string& value) { Add(key, std::string_view(value)); }

  // An array of fixed-width elements, or of strings. (std::vector<bool> has no span: use AddBools.)
  template <GgufScalar T>
  void AddArray(std::string_view key, std::span<const T> values);
  template <GgufScalar T>
  void AddArray(std::string_view key, const std::vector<T>& values) {
    AddArray(key, std::span<const T>(values));
  }
  void AddArray(std::string_view key, std::span<const std::string> values);
  void AddArray(std::string_view key, const std::vector<std::string>& values) { AddArray(key, std::span(values)); }
  void AddBools(std::string_view key, const std::vector<bool>& values);

  // A value read from another file, byte for byte.
  void Add(std::string_view key, const GgufValue& value);

  // ne as in GgufTensor: ne[0] is the row length; 1 to 4 dimensions, none 0. `data` holds exactly the tensor's bytes
  // and must stay valid until the last Write or Serialize.
  void AddTensor(std::string_view name, DType type, std::span<const size_t> ne, std::span<const std::byte> data);
  // The same with a source that is called once in each Write or Serialize, when the tensor's turn comes.
  void AddTensor(std::string_view name, DType type, std::span<const size_t> ne, TensorSource source);
  void AddTensor(std::string_view name, DType type, std::initializer_list<size_t> ne, std::span<const std::byte> data) {
    AddTensor(name, type, std::span(ne.begin(), ne.size()), data);
  }
  void AddTensor(std::string_view name, DType type, std::initializer_list<size_t> ne, TensorSource source) {
    AddTensor(name, type, std::span(ne.begin(), ne.size()), std::move(source));
  }
  // float32 values, row after row.
  void AddTensor(std::string_view name, std::initializer_list<size_t> ne, std::span<const float> values) {
    AddTensor(name, DType::kF32, std::span(ne.begin(), ne.size()), std::as_bytes(values));
  }

  // Writes the file; it appears under `path` only when it is complete (AtomicFile). Throws Error(kIo).
  void Write(const std::string& path) const;

  // The same bytes in memory.
  std::vector<std::byte> Serialize() const;

 private:
  struct Tensor {
    std::string name;
    DType type;
    std::vector<uint64_t> ne;
    uint64_t bytes;
    TensorSource source;
  };

  void AddEncoded(std::string_view key, GgufType type, std::span<const std::byte> value);
  template <GgufScalar T>
  static constexpr GgufType TypeOf();
  void AddEncodedArray(std::string_view key, GgufType type, uint64_t count, std::span<const std::byte> elements);
  std::vector<std::byte> Header() const;
  void WriteTo(ByteSink& sink) const;

  std::vector<std::byte> pairs_;  // the metadata, encoded
  uint64_t n_pairs_ = 0;
  std::unordered_set<std::string> keys_, tensor_names_;
  std::vector<Tensor> tensors_;
};

// ---------------------------------------------------------------------------------------------------------------------

template <GgufScalar T>
constexpr GgufType GgufWriter::TypeOf() {
  if constexpr (std::same_as<T, bool>) return GgufType::kBool;
  if constexpr (std::same_as<T, uint8_t>) return GgufType::kUint8;
  if constexpr (std::same_as<T, int8_t>) return GgufType::kInt8;
  if constexpr (std::same_as<T, uint16_t>) return GgufType::kUint16;
  if constexpr (std::same_as<T, int16_t>) return GgufType::kInt16;
  if constexpr (std::same_as<T, uint32_t>) return GgufType::kUint32;
  if constexpr (std::same_as<T, int32_t>) return GgufType::kInt32;
  if constexpr (std::same_as<T, uint64_t>) return GgufType::kUint64;
  if constexpr (std::same_as<T, int64_t>) return GgufType::kInt64;
  if constexpr (std::same_as<T, float>) return GgufType::kFloat32;
  if constexpr (std::same_as<T, double>) return GgufType::kFloat64;
}

template <GgufScalar T>
void GgufWriter::Add(std::string_view key, T value) {
  AddEncoded(key, TypeOf<T>(), std::as_bytes(std::span(&value, 1)));
}

template <GgufScalar T>
void GgufWriter::AddArray(std::string_view key, std::span<const T> values) {
  AddEncodedArray(key, TypeOf<T>(), values.size(), std::as_bytes(values));
}

}  // namespace lesskv
