// GGUF model files: reading (versions 2 and 3, little-endian, memory-mapped). Writing is in gguf_writer.h.
//
// A GGUF file is: magic "GGUF", version u32, tensor count u64, metadata count u64; the metadata pairs (key, type,
// value); one record a tensor (name, dimensions, type, offset); padding to the alignment; the tensor data. The file is
// checked once, completely, when it is opened: whatever this interface hands out lies inside the file. docs/formats.md
// lists what is refused.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "base/error.h"

namespace lesskv {

// Types of metadata values, numbered as in the file.
enum class GgufType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// "u32", "string", ...
std::string_view GgufTypeName(GgufType type);

// For error messages: `text` in quotes, unprintable bytes as \xNN, cut after 64 bytes. Names come from files.
std::string Quoted(std::string_view text);

// One metadata value: a scalar (one element), or an array of scalars or strings. A view into the file's bytes, except
// that the strings of an array are found once and kept as views; copies are cheap except for those.
class GgufValue {
 public:
  // Of a scalar its type, of an array the type of its elements (never kArray: nested arrays are refused).
  GgufType element_type() const { return element_type_; }
  bool is_array() const { return is_array_; }
  size_t size() const { return size_; }

  // "u32", or "array of u32".
  std::string TypeName() const;

  // Element i, i < size(), as T; nothing when its type or value does not fit T.
  // Integers: any stored integer type whose value T can hold. Floating point: any stored number. bool: only kBool.
  template <typename T>
  std::optional<T> Element(size_t i) const;

  // The strings of a string array, or the one string of a scalar. Empty for other types. May hold any bytes.
  std::span<const std::string_view> strings() const { return strings_; }

  // The value as stored, without key and type: what GgufWriter copies.
  std::span<const std::byte> encoded() const { return encoded_; }

 private:
  friend class GgufParser;

  std::optional<uint64_t> Unsigned(size_t i) const;
  std::optional<int64_t> Signed(size_t i) const;
  std::optional<double> Real(size_t i) const;
  std::optional<bool> Bool(size_t i) const;

  GgufType element_type_ = GgufType::kUint8;
  bool is_array_ = false;
  size_t size_ = 1;
  std::span<const std::byte> encoded_;
  const std::byte* elements_ = nullptr;  // first element of a non-string value
  std::vector<std::string_view> strings_;
};

struct GgufTensor {
  std::string name;
  DType type;
  size_t n_dims;             // 1 to 4
  std::array<size_t, 4> ne;  // dimensions, fastest first: ne[0] is the row length; those beyond n_dims are 1; none is 0
  size_t part = 0;           // which file of a split model, from 0
  uint64_t file_offset;      // of the first data byte, from the start of its file
  std::span<const std::byte> data;  // rows in order, RowBytes(type, ne[0]) each; aligned to 8 bytes at least

  size_t RowLength() const { return ne[0]; }
  size_t Rows() const { return ne[1] * ne[2] * ne[3]; }
  size_t Elements() const { return ne[0] * Rows(); }
  std::string ShapeString() const;  // "[64, 512]", in the file's order
};

// Where the parts of a model that is split into several files are: PREFIX-00001-of-00003.gguf and so on.
struct SplitName {
  std::string prefix;  // with the folder
  size_t part;         // from 0
  size_t count;

  std::string Part(size_t index) const;  // the path of another part
};

// Nothing when `path` does not end like a part's.
std::optional<SplitName> ParseSplitName(std::string_view path);

// The files that opening `path` reads, going by names alone: all parts when it ends like the first part of a split
// model, else itself.
std::vector<std::string> ModelFiles(const std::string& path);

// An open, completely checked file. Copies share the bytes, which live as long as any copy; tensor data and strings
// are views into them. Immutable, thread-safe.
class GgufFile {
 public:
  // Maps and checks a file. Touches only the header's pages, so it is cheap however large the model is.
  // Throws Error: see MappedFile::Open, and kBadFile with a sentence naming what is wrong and where.
  // With map = false the whole file is read into memory at once (MappedFile::Read).
  // The first part of a split model (split.count above 1) opens all its parts, which lie beside it under their names:
  // metadata are the first part's, tensors those of all parts in order. Throws Error also when a part is missing
  // (kNotFound), when another part than the first is named, and for a part that belongs to another model as far as
  // the parts tell.
  static GgufFile Open(const std::string& path, bool map = true);

  // The same checks on bytes in memory; `name` takes the path's place in messages.
  static GgufFile Parse(std::vector<std::byte> bytes, std::string name);

  const std::string& name() const { return name_; }
  uint32_t version() const { return version_; }
  size_t alignment() const { return alignment_; }
  uint64_t data_offset() const { return data_offset_; }  // where tensor data begins
  uint64_t file_bytes() const { return file_bytes_; }  // of all parts
  size_t n_parts() const { return headers_.size(); }

  // Metadata in file order.
  const std::vector<std::pair<std::string_view, GgufValue>>& metadata() const { return metadata_; }

  // nullptr when there is no such key.
  const GgufValue* Find(std::string_view key) const;

  // The value of `key` as T: bool, an integer, a floating-point type, std::string, std::string_view, or a std::vector
  // of one of these (which needs an array in the file). Throws Error: kNotFound without the key, kBadFile when the
  // stored type or value does not fit T.
  template <typename T>
  T Get(std::string_view key) const;

  // As Get, but `fallback` when the key is absent. A key of the wrong type is still an Error.
  template <typename T>
  T GetOr(std::string_view key, T fallback) const;

  // The string array `key` without a copy. Throws as Get does.
  std::span<const std::string_view> Strings(std::string_view key) const;

  // Tensors in file order.
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  // nullptr when there is no such tensor.
  const GgufTensor* FindTensor(std::string_view name) const;

  // Names this model for sidecars and result rows: XXH3-64 of the header (everything before the padding) followed by,
  // for each tensor in file order, its first and its last 4096 bytes (all of it, twice, when shorter). Reads 8 KiB a
  // tensor. Of a split model, the headers of all parts come first. Two files of the same bytes agree; files that differ in metadata, shapes, types or sampled bytes do not.
  // Damage in the middle of a tensor is not seen: this identifies a model, it does not verify it.
  uint64_t Fingerprint() const;
  // Identifies the model in whatever quantisation: architecture, vocabulary, names and shapes of all tensors, and the
  // norm weights, which quantisers leave in float32.
  uint64_t Identity() const;

 private:
  friend class GgufParser;
  GgufFile() = default;

  static GgufFile OpenOne(const std::string& path, bool map);
  static GgufFile Join(GgufFile first, bool map);
  void CheckPart(const GgufFile& part, size_t index) const;
  void Append(GgufFile part, size_t index);
  const GgufValue& Require(std::string_view key) const;
  [[noreturn]] void FailType(std::string_view key, const GgufValue& value, std::string_view expected) const;

  std::string name_;
  std::shared_ptr<const void> owner_;
  uint64_t file_bytes_ = 0;
  uint32_t version_ = 0;
  size_t alignment_ = 0;
  std::vector<std::span<const std::byte>> headers_;  // of each part, up to the padding
  uint64_t data_offset_ = 0;
  size_t split_part_ = 0, split_count_ = 1;  // as this file says
  std::vector<std::pair<std::string_view, GgufValue>> metadata_;
  std::unordered_map<std::string_view, size_t> key_index_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;  // keys are views into the file, not into tensors_
};

// 16 lower-case hexadecimal digits, as fingerprints are printed and stored.
std::string FingerprintString(uint64_t fingerprint);

// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
std::optional<T> GgufValue::Element(size_t i) const {
  if constexpr (std::same_as<T, bool>) {
    return Bool(i);
  } else if constexpr (std::integral<T>) {
    if (const auto value = Unsigned(i)) return std::in_range<T>(*value) ? std::optional<T>(*value) : std::nullopt;
    if (const auto value = Signed(i)) return std::in_range<T>(*value) ? std::optional<T>(*value) : std::nullopt;
    return std::nullopt;
  } else if constexpr (std::floating_point<T>) {
    if (const auto value = Real(i)) return static_cast<T>(*value);
    return std::nullopt;
  } else {
    static_assert(std::same_as<T, std::string> || std::same_as<T, std::string_view>, "unsupported metadata type");
    return i < strings_.size() ? std::optional<T>(strings_[i]) : std::nullopt;
  }
}

namespace internal {

template <typename T>
inline constexpr bool kIsVector = false;
template <typename T>
inline constexpr bool kIsVector<std::vector<T>> = true;

// What an error message says was expected.
template <typename T>
std::string GgufExpected() {
  if constexpr (kIsVector<T>) {
    return "array of " + GgufExpected<typename T::value_type>();
  } else if constexpr (std::same_as<T, bool>) {
    return "bool";
  } else if constexpr (std::integral<T>) {
    return fmt::format("integer in [{}, {}]", std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  } else if constexpr (std::floating_point<T>) {
    return "number";
  } else {
    return "string";
  }
}

}  // namespace internal

template <typename T>
T GgufFile::Get(std::string_view key) const {
  const GgufValue& value = Require(key);
  if (value.is_array() != internal::kIsVector<T>) FailType(key, value, internal::GgufExpected<T>());
  if constexpr (internal::kIsVector<T>) {
    T result;
    result.reserve(value.size());
    for (size_t i = 0; i < value.size(); ++i) {
      const auto element = value.Element<typename T::value_type>(i);
      if (!element) FailType(key, value, internal::GgufExpected<T>());
      result.push_back(*element);
    }
    return result;
  } else {
    const auto element = value.Element<T>(0);
    if (!element) FailType(key, value, internal::GgufExpected<T>());
    return *element;
  }
}

template <typename T>
T GgufFile::GetOr(std::string_view key, T fallback) const {
  return Find(key) == nullptr ? std::move(fallback) : Get<T>(key);
}

}  // namespace lesskv
