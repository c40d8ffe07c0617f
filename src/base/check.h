// CHECK states an invariant of our own code. Always on: prints the expression, the message and the place, then aborts.
// DCHECK is for hot loops and vanishes in release builds. Neither is for input: input errors are lesskv::Error.
#pragma once

#include <fmt/core.h>

#include <string>

namespace lesskv {

[[noreturn]] void CheckFailed(const char* file, int line, const char* expression, const std::string& message);

}  // namespace lesskv

#define CHECK(condition, ...)                                                                       \
  do {                                                                                              \
    if (!(condition)) [[unlikely]]                                                                  \
      ::lesskv::CheckFailed(__FILE__, __LINE__, #condition, ::fmt::format("" __VA_ARGS__));         \
  } while (false)

#ifdef NDEBUG
#define DCHECK(condition, ...) \
  do {                         \
  } while (false)
#else
#define DCHECK(condition, ...) CHECK(condition, __VA_ARGS__)
#endif
