// The one exception type of the library: what the caller gave us (a file, a flag, a request) cannot be used.
// Our own mistakes are CHECK failures (check.h), never Errors.
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace lesskv {

enum class ErrorCode {
  kInvalidArgument,  // a flag, spec or API argument that makes no sense
  kBadFile,          // a file that is damaged, truncated, foreign or of an unsupported kind
  kNotFound,         // a file or tensor that is not there
  kMismatch,         // two things that do not belong together (sidecar and model, session and spec)
  kIo,               // reading or writing failed while running
  kOutOfMemory,      // memory that was asked for cannot be had
  kRuntime,          // anything else that went wrong while running
};

class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

  // The program's exit status: 2 for bad usage or bad input, 1 for a failure while running.
  int ExitStatus() const { return code_ == ErrorCode::kIo || code_ >= ErrorCode::kOutOfMemory ? 1 : 2; }

 private:
  ErrorCode code_;
};

// Throws Error with a formatted message: one sentence naming the thing, what was expected and what was found.
template <typename... Args>
[[noreturn]] void Fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace lesskv
