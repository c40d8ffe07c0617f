// Chooses the next token from logits. The order of the steps, their meaning and their defaults are llama.cpp's: repetition,
// frequency and presence penalties, top-k, top-p, min-p, temperature, draw. A temperature of 0 is greedy: the largest logit
// after the penalties, ties to the lower token id; the other steps then change nothing. Unlike llama.cpp's, the frequency
// and presence penalties are OpenAI's: they count the tokens that the sampler itself has chosen, all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/rng.h"

namespace lesskv {

struct TokenBias {
  int32_t token;
  float bias;  // added to its logit, before all else; in [-100, 100], or minus infinity: never chosen
};

struct SamplerOptions {
  float temperature = 0.8f;     // 0: greedy; logits are divided by it
  int top_k = 40;               // keep the k largest logits; 0: all
  float top_p = 0.95f;          // keep the smallest set of largest probabilities that reaches p; 1: all
  float min_p = 0.05f;          // keep probabilities of at least min_p times the largest; 0: all
  float repeat_penalty = 1.0f;  // of tokens seen lately, positive logits are divided by it, negative ones multiplied; 1: off
  int repeat_last_n = 64;       // how many last tokens count as lately; 0: none, -1: all
  // In [-2, 2], 0: off. Of a token that was chosen c > 0 times, c * frequency_penalty + presence_penalty is taken away.
  float frequency_penalty = 0;
  float presence_penalty = 0;
  uint64_t seed = 0;
  std::vector<TokenBias> logit_bias = {};  // tokens that logits do not have are passed over
};

// Throws Error kInvalidArgument naming the option, its range and the value: NaN, infinities and values out of range.
void Validate(const SamplerOptions& options);

class Sampler {
 public:
  // Validates the options.
  explicit Sampler(const SamplerOptions& options);

  // The next token. `history`: all tokens of the text so far, oldest first; used by the repetition penalty.
  // Throws Error kRuntime when a logit is NaN or the largest is no finite number.
  int32_t Sample(std::span<const float> logits, std::span<const int32_t> history);

 private:
  struct Candidate {
    int32_t token;
    float logit;
  };

  void PenaliseRepetition(std::span<const int32_t> history);
  void PenaliseChosen();
  int32_t Choose();
  void SortTo(size_t n);
  void KeepTopK();
  void KeepTopPAndMinP();
  int32_t Draw();

  SamplerOptions options_;
  Rng rng_;
  std::vector<Candidate> candidates_;
  size_t sorted_ = 0;  // so many of them, the first, are the largest, in order
  std::vector<int32_t> recent_;
  std::unordered_map<int32_t, uint32_t> chosen_;  // how often; only where a penalty asks
};

}  // namespace lesskv
