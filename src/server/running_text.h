// A text that takes part in steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/engine.h"
#include "engine/generate.h"
#include "kernels/linear/linear.h"  // kMostFewTokens
#include "server/job.h"

namespace lesskv {

// A few tokens at a time are multiplied with other roundings than many. So that a prompt gives the same wherever it is
// cut, no piece of it is so short where that can be helped.
inline constexpr size_t kShortestPiece = kMostFewTokens + 1;

// Whether the cache's method wants to see all of a prompt in one step.
bool SeesPromptWhole(const CacheConfig& config);

struct RunningText {
  std::shared_ptr<Job> job;
  size_t bytes;  // its cache at its largest; until the prompt is read, those of all choices together
  size_t each;   // a cache at its largest
  Sequence sequence;
  size_t places = 1;        // among the running texts; likewise
  size_t choice = 0;        // of the job
  size_t cached = 0;        // tokens of the prompt that the sequence had seen already
  size_t fed = 0;           // tokens of the prompt, these included
  size_t next_fed = 0;      // of which the step in work takes so many more
  size_t shared = 0;        // tokens of the prompt at which a copy is kept, for others that begin so; 0: nowhere
  size_t counted = 0;       // bytes of its cache that are counted with another running one (CacheMemory)
  CacheStats before = {};   // of the sequence, when the text began
  int32_t last_token = -1;  // sampled, not fed
  std::optional<Generation> generation = {};
  std::optional<Generation::Output> last = {};  // the text's end, not yet reported
  bool tries_again = false;                     // the last step found no room on the disk
  bool ended = false;

  bool in_prompt() const { return fed < job->request().prompt.size(); }
  // Whether all that is left of the prompt has to be read in one step, and is more than `step_tokens`.
  bool NeedsOwnStep(size_t step_tokens) const;
  // What the text has for a step: its last token, or a piece of its prompt, which is all of it where the cache's method
  // wants to see it whole, else what `budget` (tokens of prompts in this step) leaves. The item looks into this text.
  StepItem NextItem(size_t tag, size_t& budget);
};

using RunningTexts = std::vector<std::unique_ptr<RunningText>>;

}  // namespace lesskv
