#include "capi/handles.h"

#include <unordered_map>

namespace lesskv::capi {
namespace {

struct Handles {
  std::mutex mutex;
  std::unordered_map<const void*, Kind> live;
};

Handles& All() {
  static Handles handles;
  return handles;
}

thread_local std::string t_last_error;

struct Log {
  std::mutex mutex;
  lesskv_log_callback callback = nullptr;
  void* user_data = nullptr;
};

Log& TheLog() {
  static Log log;
  return log;
}

lesskv_status StatusOf(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument: return LESSKV_INVALID_ARGUMENT;
    case ErrorCode::kBadFile: return LESSKV_BAD_FILE;
    case ErrorCode::kNotFound: return LESSKV_NOT_FOUND;
    case ErrorCode::kMismatch: return LESSKV_MISMATCH;
    case ErrorCode::kIo: return LESSKV_IO;
    case ErrorCode::kOutOfMemory: return LESSKV_OUT_OF_MEMORY;
    case ErrorCode::kRuntime: break;
  }
  return LESSKV_RUNTIME;
}

}  // namespace

void Register(const void* handle, Kind kind) {
  const std::lock_guard lock(All().mutex);
  All().live[handle] = kind;
}

bool Unregister(const void* handle, Kind kind) {
  const std::lock_guard lock(All().mutex);
  const auto found = All().live.find(handle);
  if (found == All().live.end() || found->second != kind) return false;
  All().live.erase(found);
  return true;
}

void RequireLive(const void* handle, Kind kind, const char* what) {
  const std::lock_guard lock(All().mutex);
  const auto found = All().live.find(handle);
  if (found == All().live.end() || found->second != kind)
    Fail(ErrorCode::kInvalidArgument, "the handle is no live {}", what);
}

std::vector<std::string> Strings(const char* const* strings, size_t n, const char* what) {
  if (strings == nullptr && n > 0) Fail(ErrorCode::kInvalidArgument, "there are no {} to read", what);
  std::vector<std::string> result;
  for (size_t i = 0; i < n; ++i) {
    if (strings[i] == nullptr) Fail(ErrorCode::kInvalidArgument, "one of the {} is NULL", what);
    result.emplace_back(strings[i]);
  }
  return result;
}

void GiveText(const std::string& text, char** to) {
  if (to == nullptr) return;
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) throw std::bad_alloc();
  std::memcpy(copy, text.c_str(), text.size() + 1);
  *to = copy;
}

lesskv_status Failed(ErrorCode code, const char* sentence) {
  const lesskv_status status = StatusOf(code);
  try {
    t_last_error = sentence;
    const std::lock_guard lock(TheLog().mutex);
    if (TheLog().callback != nullptr) TheLog().callback(status, t_last_error.c_str(), TheLog().user_data);
  } catch (...) {  // no memory for the sentence: the status tells
  }
  return status;
}

const LoadedModel& Loaded(const lesskv_model* model) {
  RequireLive(model, Kind::kModel, "model");
  return *model->loaded;
}

LoadedModel& Loaded(lesskv_model* model) {
  RequireLive(model, Kind::kModel, "model");
  return *model->loaded;
}

}  // namespace lesskv::capi

extern "C" {

const char* lesskv_last_error(void) { return lesskv::capi::t_last_error.c_str(); }

void lesskv_log_set(lesskv_log_callback callback, void* user_data) {
  lesskv::capi::Log& log = lesskv::capi::TheLog();
  const std::lock_guard lock(log.mutex);
  log.callback = callback;
  log.user_data = user_data;
}

const char* lesskv_status_name(lesskv_status status) {
  switch (status) {
    case LESSKV_OK: return "ok";
    case LESSKV_INVALID_ARGUMENT: return "invalid argument";
    case LESSKV_BAD_FILE: return "bad file";
    case LESSKV_NOT_FOUND: return "not found";
    case LESSKV_MISMATCH: return "mismatch";
    case LESSKV_IO: return "input or output failed";
    case LESSKV_OUT_OF_MEMORY: return "out of memory";
    case LESSKV_RUNTIME: return "failed while running";
  }
  return "unknown status";
}

}  // extern "C"
