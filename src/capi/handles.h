// What all of the C API (include/lesskv/lesskv.h) shares: handles that are checked, and failures that become a status and
// a sentence.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/engine.h"
#include "lesskv/lesskv.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::capi {

// Every live handle, so that a freed one or one of another kind is an error and not a crash.
enum class Kind { kModel, kSequence, kCache };
void Register(const void* handle, Kind kind);
bool Unregister(const void* handle, Kind kind);  // false: it is none
void RequireLive(const void* handle, Kind kind, const char* what);

lesskv_status Failed(ErrorCode code, const char* sentence);  // remembers and logs it

template <typename Body>
lesskv_status Guard(Body&& body) noexcept {
  try {
    body();
    return LESSKV_OK;
  } catch (const Error& error) {
    return Failed(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return Failed(ErrorCode::kOutOfMemory, "memory ran out");
  } catch (const std::exception& error) {
    return Failed(ErrorCode::kRuntime, error.what());
  } catch (...) {
    return Failed(ErrorCode::kRuntime, "an unknown exception");
  }
}

inline void Require(bool condition, const char* sentence) {
  if (!condition) Fail(ErrorCode::kInvalidArgument, "{}", sentence);
}

// Options of the caller's version: fields that it does not know keep their defaults. `given` null: the defaults.
template <typename Params>
Params Options(const Params* given, const Params& defaults) {
  Params result = defaults;
  if (given == nullptr) return result;
  if (given->size < sizeof(size_t) || given->size > size_t{1} << 16)
    Fail(ErrorCode::kInvalidArgument, "a structure's size is {}; begin with what its default function gives", given->size);
  std::memcpy(&result, given, std::min(given->size, sizeof result));
  result.size = sizeof result;
  return result;
}

// Writes as much of a result as the caller's version of the structure has.
template <typename Result>
void Give(Result* to, Result from) {
  Require(to != nullptr, "there is no structure to write to");
  if (to->size < sizeof(size_t) || to->size > size_t{1} << 16)
    Fail(ErrorCode::kInvalidArgument, "a structure's size is {}; set it to its sizeof", to->size);
  from.size = to->size;
  std::memcpy(to, &from, std::min(to->size, sizeof from));
}

// As many as fit, and how many there are.
template <typename T, typename From>
void GiveArray(const From& from, T* to, size_t capacity, size_t* count) {
  Require(count != nullptr, "there is nowhere to write how many there are");
  Require(to != nullptr || capacity == 0, "there is room for some, but nowhere to write them");
  std::copy_n(from.begin(), std::min(capacity, from.size()), to);
  *count = from.size();
}

// The caller's array of texts; Error where one is missing.
std::vector<std::string> Strings(const char* const* strings, size_t n, const char* what);
// A copy for lesskv_string_free; `to` null: nobody wants it.
void GiveText(const std::string& text, char** to);

// Shared by the sequences of a model, which may outlive its handle.
struct LoadedModel {
  std::shared_ptr<const Model> model;
  std::unique_ptr<const Tokenizer> tokenizer;
  std::unique_ptr<Engine> engine;
  std::mutex in_use;  // the engine takes one step at a time
};

}  // namespace lesskv::capi

struct lesskv_model {
  std::shared_ptr<lesskv::capi::LoadedModel> loaded;
};

namespace lesskv::capi {

const LoadedModel& Loaded(const lesskv_model* model);
LoadedModel& Loaded(lesskv_model* model);

}  // namespace lesskv::capi
