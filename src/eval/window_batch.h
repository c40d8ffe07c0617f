// Feeds several windows of text through sequences of one configuration, together, a step at a time, and hands out the
// logits by which each token is scored. Perplexity and divergence are loops over this.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "engine/engine.h"
#include "eval/setup.h"
#include "eval/text_windows.h"

namespace lesskv {

// The logits that predict ids[target] of a window. Valid during the sink's call only.
struct ScoredRow {
  size_t window;  // index into the batch's windows
  size_t target;  // index into the window's ids
  std::span<const float> logits;
};

// Called with a tile of rows at a time, on the calling thread.
using ScoredSink = std::function<void(std::span<const ScoredRow>)>;

class WindowBatch {
 public:
  // The setup and the windows must outlive the batch. In mode `continue` every window has more than prompt + 1 tokens (CHECK).
  WindowBatch(const EvalSetup& setup, std::shared_ptr<const CacheConfig> config, std::span<const TextWindow> windows,
              const Protocol& protocol);

  // The next step of every window that is not done; false when there was none left. Scored are, each once, in mode
  // `stream` the targets 1, 2, ... (of llama's windows those behind the first half and one); in mode `continue` those after prompt: the token at prompt is predicted by the
  // prompt's exact attention, not through the compressed cache, and is left out.
  bool Step(const ScoredSink& sink);

  // Mode `continue`: reads the prompts for batches of the same windows, one of each subject in a group, together. Each
  // reads its own at its first Step otherwise.
  static void ReadPrompts(std::span<WindowBatch* const> batches);

  size_t FirstTarget() const;
  size_t TokensPerStep() const;
  size_t fed() const;  // tokens of the longest window so far
  const FeedCost& cost() const { return cost_; }
  void AddStats(StatsTally& tally) const;

 private:
  const EvalSetup& setup_;
  std::span<const TextWindow> windows_;
  Protocol protocol_;
  std::vector<Sequence> sequences_;
  size_t fed_ = 0;  // tokens of every window that have been fed; the last token of a window never is
  FeedCost cost_;
};

// Windows must have at least this many tokens for something to be scored.
size_t MinWindowLength(const Protocol& protocol);

// Throws Error for a step of 0, or a prompt that leaves nothing to score within `length` tokens.
void CheckProtocol(const Protocol& protocol, size_t length);

}  // namespace lesskv
