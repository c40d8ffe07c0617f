// What all of the C API (include/lesskv/lesskv.h) shares: handles that are checked, and failures that become a status and
// a sentence.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "engine/engine.h"
#include "lesskv/lesskv.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::capi {

// Every live handle, so that a freed one or one of another kind is an error and not a crash. A call holds what it works on:
// what a callback frees meanwhile goes when the call ends.
enum class Kind { kModel, kSequence, kCache };
void Register(std::shared_ptr<void> handle, Kind kind);
void Release(const void* handle, Kind kind);  // nothing happens where it is none
std::shared_ptr<void> FindLive(const void* handle, Kind kind, const char* what);

template <typename Handle>
void Hand(std::shared_ptr<Handle> made, Kind kind, Handle** to) {
  Register(made, kind);
  *to = made.get();
}

// A model computes for one call at a time. What would wait for its own end is refused: a callback that computes with the
// model whose call it is in.
class Turns {
 public:
  void lock();
  void unlock();

 private:
  std::mutex mutex_;
  std::atomic<std::thread::id> owner_;
};

// While a caller's selector votes, on a thread of a step that may be any model's: nobody is waited for.
class InVote {
 public:
  InVote();
  ~InVote();
};

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

// Structures begin with their size, which says what version of them the caller was built with. A multiple of the largest
// alignment, so that no field is cut in two.
inline void RequireSize(size_t size) {
  constexpr size_t kMost = 1 << 16;
  if (size == 0 || size >= kMost || size % sizeof(size_t) != 0)
    Fail(ErrorCode::kInvalidArgument, "a structure's size is {}: expected its sizeof, as the default functions set it", size);
}

// Writes what both sides know of a structure of `size` bytes, and 0 behind that.
template <typename Structure>
void Write(Structure* to, size_t size, Structure from) {
  Require(to != nullptr, "there is no structure to write to");
  RequireSize(size);
  from.size = size;
  std::memcpy(to, &from, std::min(size, sizeof from));
  if (size > sizeof from) std::memset(reinterpret_cast<char*>(to) + sizeof from, 0, size - sizeof from);
}

template <typename Params>
lesskv_status Init(Params* params, size_t size, const Params& defaults) noexcept {
  return Guard([&] { Write(params, size, defaults); });
}

// A result, in the caller's version of its structure.
template <typename Result>
void Give(Result* to, const Result& from) {
  Require(to != nullptr, "there is no structure to write to");
  Write(to, to->size, from);
}

// Options of the caller's version: fields that it does not have keep their defaults; what it has behind those known here
// must be 0. `given` null: the defaults.
template <typename Params>
Params Options(const Params* given, const Params& defaults) {
  Params result = defaults;
  if (given == nullptr) return result;
  const size_t size = given->size;
  RequireSize(size);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (size > sizeof result && std::any_of(bytes + sizeof result, bytes + size, [](unsigned char byte) { return byte != 0; }))
    Fail(ErrorCode::kInvalidArgument, "a structure of {} bytes asks for something behind the {} that this library knows: "
         "it needs a later lesskv than {}", size, sizeof result, lesskv_version());
  std::memcpy(&result, given, std::min(size, sizeof result));
  result.size = sizeof result;
  return result;
}

// A place for a result, before anything is done that it should tell of; null: nobody wants it.
template <typename Result>
void RequireResult(const Result* to) {
  if (to != nullptr) RequireSize(to->size);
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
  Turns in_use;
};

}  // namespace lesskv::capi

struct lesskv_model {
  std::shared_ptr<lesskv::capi::LoadedModel> loaded;
};

namespace lesskv::capi {

std::shared_ptr<LoadedModel> Loaded(const lesskv_model* model);

}  // namespace lesskv::capi
