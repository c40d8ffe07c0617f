#include "format/gguf.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "base/check.h"
#include "base/mmap.h"
#include "format/gguf_parser.h"

namespace lesskv {
namespace {

template <typename T>
T Load(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace

std::string_view GgufTypeName(GgufType type) {
  static constexpr std::string_view kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                                "bool", "string", "array", "u64", "i64", "f64"};
  CHECK(static_cast<size_t>(type) < std::size(kNames), "metadata type {}", static_cast<uint32_t>(type));
  return kNames[static_cast<size_t>(type)];
}

std::string Quoted(std::string_view text) {
  constexpr size_t kLongest = 64;
  std::string result = "'";
  for (const char c : text.substr(0, kLongest)) {
    if (c >= ' ' && c <= '~') {
      result += c;
    } else {
      result += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  return result + (text.size() > kLongest ? "...'" : "'");
}

std::string FingerprintString(uint64_t fingerprint) { return fmt::format("{:016x}", fingerprint); }

std::string GgufValue::TypeName() const {
  return fmt::format("{}{}", is_array_ ? "array of " : "", GgufTypeName(element_type_));
}

std::optional<uint64_t> GgufValue::Unsigned(size_t i) const {
  CHECK(i < size_);
  switch (element_type_) {
    case GgufType::kUint8:
      return Load<uint8_t>(elements_ + i);
    case GgufType::kUint16:
      return Load<uint16_t>(elements_ + 2 * i);
    case GgufType::kUint32:
      return Load<uint32_t>(elements_ + 4 * i);
    case GgufType::kUint64:
      return Load<uint64_t>(elements_ + 8 * i);
    default:
      return std::nullopt;
  }
}

std::optional<int64_t> GgufValue::Signed(size_t i) const {
  CHECK(i < size_);
  switch (element_type_) {
    case GgufType::kInt8:
      return Load<int8_t>(elements_ + i);
    case GgufType::kInt16:
      return Load<int16_t>(elements_ + 2 * i);
    case GgufType::kInt32:
      return Load<int32_t>(elements_ + 4 * i);
    case GgufType::kInt64:
      return Load<int64_t>(elements_ + 8 * i);
    default:
      return std::nullopt;
  }
}

std::optional<double> GgufValue::Real(size_t i) const {
  CHECK(i < size_);
  if (element_type_ == GgufType::kFloat32) return Load<float>(elements_ + 4 * i);
  if (element_type_ == GgufType::kFloat64) return Load<double>(elements_ + 8 * i);
  if (const auto value = Unsigned(i)) return static_cast<double>(*value);
  if (const auto value = Signed(i)) return static_cast<double>(*value);
  return std::nullopt;
}

std::optional<bool> GgufValue::Bool(size_t i) const {
  CHECK(i < size_);
  if (element_type_ != GgufType::kBool) return std::nullopt;
  return elements_[i] != std::byte{0};
}

std::string GgufTensor::ShapeString() const {
  return fmt::format("[{}]", fmt::join(ne.begin(), ne.begin() + n_dims, ", "));
}

GgufFile GgufFile::Open(const std::string& path, bool map) {
  GgufFile file = OpenOne(path, map);
  return file.split_count_ > 1 ? Join(std::move(file), map) : file;
}

GgufFile GgufFile::OpenOne(const std::string& path, bool map) {
  auto mapping = std::make_shared<const MappedFile>(map ? MappedFile::Open(path) : MappedFile::Read(path));
  const std::span<const std::byte> bytes = mapping->bytes();
  return GgufParser(bytes, path, std::move(mapping)).Run();
}

GgufFile GgufFile::Parse(std::vector<std::byte> bytes, std::string name) {
  auto owner = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  const std::span<const std::byte> view = *owner;
  GgufFile file = GgufParser(view, std::move(name), std::move(owner)).Run();
  if (file.split_count_ > 1) {
    Fail(ErrorCode::kBadFile, "{}: this is one of {} files of a split model, which are opened by name", file.name_,
         file.split_count_);
  }
  return file;
}

const GgufValue* GgufFile::Find(std::string_view key) const {
  const auto it = key_index_.find(key);
  return it == key_index_.end() ? nullptr : &metadata_[it->second].second;
}

const GgufTensor* GgufFile::FindTensor(std::string_view name) const {
  const auto it = tensor_index_.find(name);
  return it == tensor_index_.end() ? nullptr : &tensors_[it->second];
}

std::span<const std::string_view> GgufFile::Strings(std::string_view key) const {
  const GgufValue& value = Require(key);
  if (!value.is_array() || value.element_type() != GgufType::kString) FailType(key, value, "array of string");
  return value.strings();
}

const GgufValue& GgufFile::Require(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) Fail(ErrorCode::kNotFound, "{} has no metadata key {}", name_, Quoted(key));
  return *value;
}

void GgufFile::FailType(std::string_view key, const GgufValue& value, std::string_view expected) const {
  std::string found = value.TypeName();
  if (!value.is_array() && value.element_type() != GgufType::kString) {
    found += fmt::format(" {}", value.Element<bool>(0) ? *value.Element<bool>(0) : *value.Element<double>(0));
  }
  Fail(ErrorCode::kBadFile, "{}: metadata {} is of type {}, expected {}", name_, Quoted(key), found, expected);
}

uint64_t GgufFile::Identity() const {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  if (state == nullptr) Fail(ErrorCode::kOutOfMemory, "no memory to fingerprint {}", name_);
  XXH3_64bits_reset(state.get());
  const auto text = [&](std::string_view s) {
    const uint64_t size = s.size();
    XXH3_64bits_update(state.get(), &size, sizeof size);
    XXH3_64bits_update(state.get(), s.data(), s.size());
  };
  text(GetOr<std::string>("general.architecture", ""));
  for (const std::string& token : GetOr<std::vector<std::string>>("tokenizer.ggml.tokens", {})) text(token);
  std::map<std::string_view, const GgufTensor*> by_name;  // writers order tensors as they like
  for (const GgufTensor& tensor : tensors_) by_name[tensor.name] = &tensor;
  for (const auto& [name, tensor] : by_name) {
    text(name);
    for (const uint64_t extent : tensor->ne) XXH3_64bits_update(state.get(), &extent, sizeof extent);
    const bool is_norm = tensor->type == DType::kF32 && name.ends_with("norm.weight");
    if (is_norm) XXH3_64bits_update(state.get(), tensor->data.data(), tensor->data.size());
  }
  return XXH3_64bits_digest(state.get());
}

uint64_t GgufFile::Fingerprint() const {
  constexpr size_t kSample = 4096;
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  if (state == nullptr) Fail(ErrorCode::kOutOfMemory, "no memory to fingerprint {}", name_);
  XXH3_64bits_reset(state.get());
  for (const std::span<const std::byte> header : headers_) {
    XXH3_64bits_update(state.get(), header.data(), header.size());
  }
  for (const GgufTensor& tensor : tensors_) {
    const size_t n = std::min(kSample, tensor.data.size());
    XXH3_64bits_update(state.get(), tensor.data.data(), n);
    XXH3_64bits_update(state.get(), tensor.data.last(n).data(), n);
  }
  return XXH3_64bits_digest(state.get());
}

}  // namespace lesskv
