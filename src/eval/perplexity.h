// How well text is predicted through a cache: perplexity per token, per word and per byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
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
  size_t pair_distance = 0;  // > 0: tokens are told apart by PairClass too
  size_t block = 0;          // > 0: also by blocks of so many tokens of a window
};

// What a cache could remember of the token at `target`: whether the pair of the token before it and itself has occurred
// in the window already, which an induction head looks up. kNear: the last time at most `distance` tokens ago; kFar:
// only farther back; kNew: never.
enum class PairClass : uint8_t { kNew, kNear, kFar };
inline constexpr size_t kPairClasses = 3;
std::vector<PairClass> ClassifyPairs(std::span<const int32_t> ids, size_t distance);  // [ids]; the first token is kNew


// Negative log-likelihoods (nats) of scored tokens, window by window, and what they are divided by. Standard errors
// are over windows.
class PerplexityTally {
 public:
  explicit PerplexityTally(size_t pair_distance = 0, size_t block = 0) : pair_distance_(pair_distance), block_(block) {}

  // nats[i] belongs to the window's token first_target + i.
  void AddWindow(const TextWindow& window, size_t first_target, std::span<const double> nats);

  // Keys: perplexity, perplexity_se, word_perplexity, word_perplexity_se, byte_perplexity, bits_per_byte,
  // bits_per_byte_se, tokens_scored, words_scored, bytes_scored, windows; with a pair distance also
  // perplexity_CLASS, perplexity_CLASS_se and share_CLASS for pair_new, pair_near and pair_far; with a block
  // block_tokens, perplexity_by_block (of all windows' tokens at these places), and perplexity_block_first, _last, _max.
  void AddTo(Json& row) const;

 private:
  void AddPairs(const TextWindow& window, size_t first_target, std::span<const double> nats);
  void AddBlocks(size_t first_target, std::span<const double> nats);
  void AddPairsTo(Json& row) const;
  void AddBlocksTo(Json& row) const;

  size_t pair_distance_, block_;
  std::vector<ClusteredMean> per_block_;
  ClusteredMean per_token_, per_word_, per_byte_;
  std::array<ClusteredMean, kPairClasses> per_class_;
  size_t n_windows_ = 0;
};

// One row a subject. Throws Error for unreadable text, a protocol that scores nothing, or when it was stopped.
Report EvaluatePerplexity(const EvalSetup& setup, const PerplexityOptions& options);

}  // namespace lesskv
