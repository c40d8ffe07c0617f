// How likely a generated token was, and what might have come in its place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace lesskv {

struct TokenLogprob {
  int32_t token = -1;
  double logprob = 0;    // natural logarithm of its probability; -infinity: impossible
  std::string text;      // what it adds to the text where it stands, perhaps a part of a character; else its name
  bool special = false;  // it has a name only, and adds nothing
};

struct GeneratedToken : TokenLogprob {
  size_t offset = 0;                   // characters of the generated text that were whole before it
  std::vector<TokenLogprob> likeliest;  // the largest first, of equals the lower id
};

// Probabilities are the model's own: the softmax of the logits at temperature 1, whatever a sampler makes of them.
//   logits    [n_vocab], the largest of them finite
//   at_start  nothing, or a special token, comes before (Tokenizer::IsAtStart)
// `offset` is left to the caller.
GeneratedToken MeasureToken(const Tokenizer& tokenizer, std::span<const float> logits, int32_t token,
                            size_t n_likeliest, bool at_start);

}  // namespace lesskv
