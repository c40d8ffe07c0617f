// Plain little-endian serialisation of cache state. The reader refuses to run past its end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "base/error.h"

namespace lesskv {

struct ByteWriter {
  std::vector<std::byte> bytes;

  void Raw(const void* data, size_t size) {
    const auto* begin = static_cast<const std::byte*>(data);
    bytes.insert(bytes.end(), begin, begin + size);
  }
  template <typename T>
  void Put(T value) {
    static_assert(std::is_arithmetic_v<T>);
    Raw(&value, sizeof value);
  }
};

struct ByteReader {
  std::span<const std::byte> rest;

  void Raw(void* data, size_t size) {
    const std::span<const std::byte> from = Skip(size);
    if (size > 0) std::memcpy(data, from.data(), size);
  }
  std::span<const std::byte> Skip(size_t size) {
    if (size > rest.size())
      Fail(ErrorCode::kBadFile, "saved cache: {} more bytes expected, {} found", size, rest.size());
    const std::span<const std::byte> skipped = rest.first(size);
    rest = rest.subspan(size);
    return skipped;
  }
  template <typename T>
  T Get() {
    static_assert(std::is_arithmetic_v<T>);
    T value;
    Raw(&value, sizeof value);
    return value;
  }
  // A count that must not exceed `max`.
  size_t Count(size_t max, const char* what) {
    const auto value = Get<uint64_t>();
    if (value > max) Fail(ErrorCode::kBadFile, "saved cache: {} is {}, at most {} is possible", what, value, max);
    return static_cast<size_t>(value);
  }
};

}  // namespace lesskv
