// Arithmetic on sizes that come from a file or a user: overflow is an Error, never a wrapped number.
#pragma once

#include <concepts>
#include <cstdint>
#include <utility>

#include "base/error.h"

namespace lesskv {

template <std::unsigned_integral T>
T CheckedMul(T a, T b, const char* what) {
  T result;
  if (__builtin_mul_overflow(a, b, &result)) Fail(ErrorCode::kBadFile, "{}: {} times {} overflows", what, a, b);
  return result;
}

template <std::unsigned_integral T>
T CheckedAdd(T a, T b, const char* what) {
  T result;
  if (__builtin_add_overflow(a, b, &result)) Fail(ErrorCode::kBadFile, "{}: {} plus {} overflows", what, a, b);
  return result;
}

// Narrows, or refuses with a sentence.
template <std::integral To, std::integral From>
To CheckedCast(From value, const char* what) {
  if (!std::in_range<To>(value)) Fail(ErrorCode::kBadFile, "{}: {} is out of range", what, value);
  return static_cast<To>(value);
}

// Smallest multiple of `multiple` that is at least `value`. For sizes of our own, far from overflow.
constexpr size_t RoundUp(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr size_t CeilDiv(size_t value, size_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace lesskv
