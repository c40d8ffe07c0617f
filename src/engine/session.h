// Session files: a sequence's compressed cache with the text it has seen, to go on another day. docs/formats.md has the
// layout. The file is checksummed as a whole and names the model and the cache spec it belongs to.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace lesskv {

constexpr uint32_t kSessionVersion = 3;  // of the layout; 1: values of q8 and q4 lay row by row; 2: codes of kivi in pairs

struct Session {
  Sequence sequence;
  // Sampled, but not yet fed to the sequence: the next prompt begins with it. Nothing when the text ended otherwise.
  std::optional<int32_t> pending_token;
};

// Replaces the file as a whole, or leaves it as it was and throws Error(kIo).
void SaveSession(const std::string& path, const Engine& engine, const Sequence& sequence,
                 std::optional<int32_t> pending_token);

// Throws Error: kNotFound; kBadFile for a file that is damaged, truncated, no session at all or of another version;
// kMismatch, naming both sides, when it was made with another model, cache spec or context length. Protected
// spans are the session's own. ctx = 0: the trained context.
Session LoadSession(const std::string& path, const Engine& engine, const CacheSpec& spec, size_t ctx);

// The cache spec as sessions have it: without the folder of offloaded clusters, whose rows lie in the session itself.
std::string SessionSpec(const CacheConfig& config);

// The same bytes where they lie elsewhere than in a file. Errors name it `where`. `config` has the cache spec and the
// context length, and the trained parts: no sidecar is read.
std::vector<std::byte> SessionBytes(const Engine& engine, const Sequence& sequence,
                                    std::optional<int32_t> pending_token);
Session ParseSession(std::span<const std::byte> bytes, const std::string& where, const Engine& engine,
                     const CacheConfig& config);

}  // namespace lesskv
