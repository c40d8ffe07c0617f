#include "server/running_text.h"

#include <algorithm>

#include "server/prefix_cache.h"

namespace lesskv {
namespace {

// The next piece of `left` tokens that are read in pieces of `most`.
size_t NextPiece(size_t left, size_t most) {
  if (most >= left) return left;
  const size_t rest = left - most;
  return rest < kShortestPiece && most >= 2 * kShortestPiece ? most - (kShortestPiece - rest) : most;
}

}  // namespace

bool SeesPromptWhole(const CacheConfig& config) { return config.prefill_chunk() == 0 && !NeverEvicts(config); }

bool RunningText::NeedsOwnStep(size_t step_tokens) const {
  const JobRequest& request = job->request();
  return !ended && in_prompt() && SeesPromptWhole(*request.config) && request.prompt.size() - fed > step_tokens;
}

StepItem RunningText::NextItem(size_t tag, size_t& budget) {
  StepItem item = {.sequence = &sequence,
                   .tokens = {&last_token, 1},
                   .logits = LogitsRows::kLast,
                   .tag = tag,
                   .kind = StepKind::kDecode,
                   .cancel = &job->cancelled()};
  next_fed = 0;
  if (!in_prompt()) return item;
  const JobRequest& request = job->request();
  const size_t left = request.prompt.size() - fed, chunk = request.config->prefill_chunk();
  const size_t until = shared > fed ? shared - fed : left;
  const bool whole = SeesPromptWhole(*request.config);
  next_fed = whole ? left : chunk != 0 ? std::min(until, chunk) : NextPiece(until, std::max<size_t>(budget, 1));
  budget -= std::min(budget, next_fed);
  item.tokens = std::span(request.prompt).subspan(fed, next_fed);
  item.logits = next_fed == left ? LogitsRows::kLast : LogitsRows::kNone;
  item.kind = whole ? StepKind::kPrompt : StepKind::kStream;
  return item;
}

}  // namespace lesskv
