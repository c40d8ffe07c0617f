// Random cache specs, made from what the registry says of its terms and their parameters: whatever can be combined,
// with values near both ends of their ranges, around what a text holds and beyond it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kvcache/cache_config.h"

namespace lesskv::testing_support {

// A term of the method, such as "window(7, sinks=2)"; its values are in their ranges, but may contradict each other.
std::string RandomTerm(const Method& method, size_t ctx, Rng& rng);

// A spec that parses, for a context of ctx tokens; whether a model takes it is another question.
CacheSpec RandomSpec(size_t ctx, Rng& rng);

// A spec's text with some characters, terms or values put out of place.
std::string Garbled(std::string spec, Rng& rng);

// A step, and whether a prompt ends with it.
struct Piece {
  size_t n;
  StepKind kind;
  bool ends = false;
};
using RandomLife = std::vector<Piece>;

// A prompt as the config has it read.
void AddPrompt(RandomLife& life, size_t n, const CacheConfig& config);
// Prompts, turns of a few tokens, generation and text that streams in, n_tokens in all at most.
RandomLife MakeLife(const CacheConfig& config, size_t n_tokens, Rng& rng);

bool Chance(double p, Rng& rng);

// The seeds that a test tries: [0, n), or those of the environment variable LESSKV_RANDOM_SPECS=FIRST:END.
struct Seeds {
  uint64_t first = 0, end = 0;
  explicit Seeds(uint64_t n);
};
// What is in work: printed where the program is aborted.
void NameSubject(const std::string& name);

}  // namespace lesskv::testing_support
