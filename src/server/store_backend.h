// Where a session store keeps its values: byte strings, each whole or not at all, under names that say what they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace lesskv {

// What a stored conversation is looked up by.
struct SessionName {
  uint64_t text = 0;     // hash of the tokens it has seen
  uint64_t setting = 0;  // hash of model, spec, context length and protected spans
  size_t n_tokens = 0;

  auto operator<=>(const SessionName&) const = default;
  std::string ToString() const;  // "0123456789abcdef-0123456789abcdef-42"
  static std::optional<SessionName> Parse(std::string_view text);
};

// The store cannot be reached at the moment. Who throws it has said so in the log, once.
class StoreGone : public Error {
 public:
  explicit StoreGone(const std::string& message) : Error(ErrorCode::kIo, message) {}
};

struct StoreUsage {
  size_t files = 0, bytes = 0;
  uint64_t removed = 0;  // to make room
};

// Thread-safe. Functions throw Error(kIo) where something cannot be read or written, StoreGone where nothing can.
class StoreBackend {
 public:
  using Use = std::function<void(std::span<const std::byte>)>;

  virtual ~StoreBackend() = default;
  // Whether even a question takes its time.
  virtual bool remote() const = 0;
  // Of one value, at most.
  virtual size_t MaxBytes() const = 0;
  // Numbers of tokens that stored conversations have, ascending; there may be some too many among them.
  virtual std::vector<size_t> Lengths() = 0;
  // For each name whether it has a value.
  virtual std::vector<bool> Has(std::span<const SessionName> names) = 0;
  // Hands the value to `use`, valid during the call only, and notes the use; false: there is none. What `use` throws
  // comes through.
  virtual bool Read(const SessionName& name, const Use& use) = 0;
  // Notes the use of a value; false: there is none.
  virtual bool Touch(const SessionName& name) = 0;
  // Replaces what is there; others may have to make room.
  virtual void Write(const SessionName& name, std::span<const std::byte> bytes) = 0;
  // What all values take, where that is known.
  virtual std::optional<StoreUsage> Usage() const = 0;
  // The value's place, for people.
  virtual std::string Where(const SessionName& name) const = 0;
};

}  // namespace lesskv
