#include "eval/window_batch.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "eval/stopwatch.h"

namespace lesskv {
namespace {

// Prompts are fed in groups of about this many tokens: enough to share the weight products, without holding the work
// buffers of all of them.
constexpr size_t kPrefillTokens = 2048;

}  // namespace

WindowBatch::WindowBatch(const EvalSetup& setup, std::shared_ptr<const CacheConfig> config, std::span<const TextWindow> windows,
                         const Protocol& protocol)
    : setup_(setup), windows_(windows), protocol_(protocol) {
  for (const TextWindow& window : windows) {
    CHECK(window.ids.size() >= MinWindowLength(protocol), "a window of {} tokens", window.ids.size());
    sequences_.emplace_back(config);
  }
}

size_t WindowBatch::FirstTarget() const {
  if (protocol_.llama_windows) return windows_.front().ids.size() / 2 + 1;
  return protocol_.mode == Protocol::Mode::kStream ? 1 : protocol_.prompt + 1;
}

size_t WindowBatch::TokensPerStep() const { return protocol_.mode == Protocol::Mode::kStream ? protocol_.step : 1; }

size_t WindowBatch::fed() const {
  size_t longest = 0;
  for (const TextWindow& window : windows_) longest = std::max(longest, window.ids.size());
  return std::min(fed_, longest - 1);
}

void WindowBatch::ReadPrompts(std::span<WindowBatch* const> batches) {
  const EvalSetup& setup = batches[0]->setup_;
  const std::span<const TextWindow> windows = batches[0]->windows_;
  const size_t prompt = batches[0]->protocol_.prompt, at_once = std::max(size_t{1}, kPrefillTokens / prompt);
  const Stopwatch watch;
  std::vector<StepItem> items;
  for (size_t w = 0; w < windows.size(); ++w) {
    std::vector<Sequence*> sequences;
    for (WindowBatch* batch : batches) sequences.push_back(&batch->sequences_[w]);
    AddPrompt(sequences, std::span(windows[w].ids).first(prompt), LogitsRows::kNone, items);
    if ((w + 1) % at_once != 0 && w + 1 < windows.size()) continue;
    setup.engine->Prefill(items, {}, {.stop = setup.stop});
    setup.CheckStop();
    items.clear();
  }
  for (WindowBatch* batch : batches) {
    batch->fed_ = prompt;
    batch->cost_ += {windows.size() * prompt, watch.Seconds(), batches.size()};
  }
}

bool WindowBatch::Step(const ScoredSink& sink) {
  const bool stream = protocol_.mode == Protocol::Mode::kStream;
  WindowBatch* const self = this;
  if (!stream && fed_ == 0) ReadPrompts({&self, 1});
  const StepKind kind = stream ? StepKind::kStream : StepKind::kDecode;
  const size_t first = FirstTarget();
  std::vector<StepItem> items;
  size_t n_tokens = 0;
  for (size_t w = 0; w < windows_.size(); ++w) {
    const std::span<const int32_t> ids = windows_[w].ids;
    if (fed_ + 1 >= ids.size()) continue;
    const size_t n = std::min(TokensPerStep(), ids.size() - 1 - fed_);
    const bool is_scored = fed_ + n >= first;
    items.push_back({&sequences_[w], ids.subspan(fed_, n), is_scored ? LogitsRows::kAll : LogitsRows::kNone, w, kind});
    n_tokens += n;
  }
  if (items.empty()) {
    if (stream)
      for (Sequence& sequence : sequences_) sequence.cache().EndPrompt();
    return false;
  }

  double sink_seconds = 0;
  std::vector<ScoredRow> rows;
  const LogitsSink score = [&](std::span<const LogitsRow> tile) {
    const Stopwatch watch;
    rows.clear();
    for (const LogitsRow& row : tile)
      if (fed_ + row.row + 1 >= first) rows.push_back({row.tag, fed_ + row.row + 1, row.logits});
    sink(rows);
    sink_seconds += watch.Seconds();
  };
  const Stopwatch watch;
  setup_.engine->Step(items, score);
  cost_.seconds += watch.Seconds() - sink_seconds;
  cost_.tokens += n_tokens;
  fed_ += TokensPerStep();
  return true;
}

void WindowBatch::AddStats(StatsTally& tally) const {
  for (const Sequence& sequence : sequences_) tally.Add(sequence.Stats());
}

size_t MinWindowLength(const Protocol& protocol) {
  const size_t least = protocol.llama_windows ? 3 : 2;
  return protocol.mode == Protocol::Mode::kStream ? least : protocol.prompt + 2;
}

void CheckProtocol(const Protocol& protocol, size_t length) {
  const bool stream = protocol.mode == Protocol::Mode::kStream;
  if (stream && protocol.step == 0) Fail(ErrorCode::kInvalidArgument, "--step: expected 1 or more tokens, found 0");
  if (!stream && protocol.prompt == 0) {
    Fail(ErrorCode::kInvalidArgument, "--mode continue needs --prompt N, the tokens that are read before scoring");
  }
  if (protocol.llama_windows && !stream && protocol.prompt > length / 2)
    Fail(ErrorCode::kInvalidArgument, "--prompt: the windows of llama are scored from token {} on, found a prompt of {}",
         length / 2 + 1, protocol.prompt);
  if (MinWindowLength(protocol) > length) {
    Fail(ErrorCode::kInvalidArgument, "a context of {} tokens leaves nothing to score{}: at least {} are needed",
         length, stream ? "" : fmt::format(" behind a prompt of {}", protocol.prompt), MinWindowLength(protocol));
  }
}

}  // namespace lesskv
