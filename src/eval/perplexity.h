// How well text is predicted through a cache: perplexity per token, per word and per byte.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "eval/metrics.h"
#include "eval/setup.h"
#include "eval/text_windows.h"

namespace lesskv {

struct PerplexityOptions {
  std::vector<std::string> texts;  // files
  size_t max_windows = 0;          // 0: all; else evenly spaced over all texts
  Protocol protocol;
};

// Negative log-likelihoods (nats) of scored tokens, window by window, and what they are divided by. Standard errors
// are over windows.
class PerplexityTally {
 public:
  // nats[i] belongs to the window's token first_target + i.
  void AddWindow(const TextWindow& window, size_t first_target, std::span<const double> nats);

  // Keys: perplexity, perplexity_se, word_perplexity, word_perplexity_se, byte_perplexity, bits_per_byte,
  // bits_per_byte_se, tokens_scored, words_scored, bytes_scored, windows.
  void AddTo(Json& row) const;

 private:
  ClusteredMean per_token_, per_word_, per_byte_;
  size_t n_windows_ = 0;
};

// One row a subject. Throws Error for unreadable text, a protocol that scores nothing, or when it was stopped.
Report EvaluatePerplexity(const EvalSetup& setup, const PerplexityOptions& options);

}  // namespace lesskv
