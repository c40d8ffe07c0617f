#include "capi/handles.h"

#include <unordered_map>
#include <utility>

namespace lesskv::capi {
namespace {

struct Live {
  Kind kind;
  std::shared_ptr<void> handle;
};

struct Handles {
  std::mutex mutex;
  std::unordered_map<const void*, Live> live;
};

// Never destroyed: what a program has not freed when it ends may still be in use by a thread.
Handles& All() {
  static Handles& handles = *new Handles;
  return handles;
}

thread_local std::string t_last_error;
thread_local bool t_logging = false, t_in_vote = false;

// The callback may fail itself, which is not logged, and may set another one.
struct Log {
  std::recursive_mutex mutex;
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

void Register(std::shared_ptr<void> handle, Kind kind) {
  const std::lock_guard lock(All().mutex);
  const void* const address = handle.get();
  All().live[address] = {kind, std::move(handle)};
}

void Release(const void* handle, Kind kind) {
  std::shared_ptr<void> last;  // destroyed when others can use the list again
  const std::lock_guard lock(All().mutex);
  const auto found = All().live.find(handle);
  if (found == All().live.end() || found->second.kind != kind) return;
  last = std::move(found->second.handle);
  All().live.erase(found);
}

std::shared_ptr<void> FindLive(const void* handle, Kind kind, const char* what) {
  const std::lock_guard lock(All().mutex);
  const auto found = All().live.find(handle);
  if (found == All().live.end() || found->second.kind != kind)
    Fail(ErrorCode::kInvalidArgument, "the handle is no live {}", what);
  return found->second.handle;
}

void Turns::lock() {
  if (owner_ == std::this_thread::get_id())
    Fail(ErrorCode::kInvalidArgument, "a callback cannot compute with the model whose call it is in");
  if (!t_in_vote)
    mutex_.lock();
  else if (!mutex_.try_lock())
    Fail(ErrorCode::kInvalidArgument, "a selector cannot compute with a model that is computing");
  owner_ = std::this_thread::get_id();
}

void Turns::unlock() {
  owner_ = std::thread::id();
  mutex_.unlock();
}

InVote::InVote() { t_in_vote = true; }
InVote::~InVote() { t_in_vote = false; }

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
    if (t_logging) return status;
    const std::lock_guard lock(TheLog().mutex);
    if (TheLog().callback == nullptr) return status;
    t_logging = true;
    const std::string own = t_last_error;  // whatever fails in the callback
    try {
      TheLog().callback(status, own.c_str(), TheLog().user_data);
    } catch (...) {  // a callback of C++ may throw; it is not the failure that is told
    }
    t_logging = false;
    t_last_error = own;
  } catch (...) {  // no memory for the sentence: the status tells
  }
  return status;
}

std::shared_ptr<LoadedModel> Loaded(const lesskv_model* model) {
  return std::static_pointer_cast<lesskv_model>(FindLive(model, Kind::kModel, "model"))->loaded;
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
