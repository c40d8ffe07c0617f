#include "engine/generate.h"

#include <algorithm>
#include <chrono>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {
namespace {

using Clock = std::chrono::steady_clock;
double Seconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

// Turns sampled tokens into text for the user, up to a stop string.
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, const GenerateOptions& options, bool at_start, std::string& text)
      : decoder_(tokenizer, true, at_start), filter_(options.stops), on_text_(options.on_text), text_(text) {}

  // False when a stop string was found.
  bool Push(int32_t token) {
    Emit(filter_.Push(decoder_.Push(token)));
    return !filter_.stopped();
  }

  void Finish() {
    Emit(filter_.Push(decoder_.Flush()));
    Emit(filter_.Flush());
  }

 private:
  void Emit(const std::string& piece) {
    if (piece.empty()) return;
    text_ += piece;
    if (on_text_) on_text_(piece);
  }

  StreamDecoder decoder_;
  StopFilter filter_;
  const std::function<void(std::string_view)>& on_text_;
  std::string& text_;
};

// Stop strings that are control tokens: these are not shown, so no stop string would be found in the text.
std::vector<int32_t> StopTokens(const Tokenizer& tokenizer, const std::vector<std::string>& stops) {
  std::vector<int32_t> tokens;
  for (const std::string& stop : stops)
    if (const auto token = tokenizer.FindControlToken(stop)) tokens.push_back(*token);
  return tokens;
}

}  // namespace

std::string_view FinishName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength: return "length";
    case FinishReason::kEndOfText: return "end";
    case FinishReason::kStopString: return "stop";
    case FinishReason::kContext: return "context";
    case FinishReason::kInterrupted: return "interrupted";
  }
  return "";
}

double GenerateResult::PrefillTokensPerSecond() const {
  return prefill_seconds > 0 ? static_cast<double>(prompt_tokens) / prefill_seconds : 0;
}

double GenerateResult::DecodeTokensPerSecond() const {
  return decode_seconds > 0 && generated_tokens > 1 ? static_cast<double>(generated_tokens - 1) / decode_seconds : 0;
}

GenerateResult Generate(Engine& engine, const Tokenizer& tokenizer, Sequence& sequence,
                        std::span<const int32_t> prompt, const GenerateOptions& options) {
  const size_t ctx = sequence.config().shape().ctx;
  const size_t seen = sequence.tokens().size();
  if (prompt.size() >= ctx - std::min(ctx, seen))
    Fail(ErrorCode::kInvalidArgument,
         "the prompt has {} tokens, which leaves no room in the context of {} tokens, of which {} are used",
         prompt.size(), ctx, seen);
  Sampler sampler(options.sampler);
  GenerateResult result;
  result.prompt_tokens = prompt.size();
  const auto stopped = [&] { return options.stop != nullptr && *options.stop; };

  std::vector<float> logits;
  const LogitsSink keep = [&](std::span<const LogitsRow> tile) {
    logits.assign(tile.back().logits.begin(), tile.back().logits.end());
  };
  const auto start = Clock::now();
  const StepItem item{&sequence, prompt, LogitsRows::kLast};
  const bool finished = options.prompt_was_generated
                            ? engine.Decode({item}, keep)
                            : engine.Prefill({item}, keep, {.stop = options.stop, .progress = options.on_prompt_progress});
  const auto prefilled = Clock::now();
  result.prefill_seconds = Seconds(start, prefilled);
  if (!finished) {
    result.reason = FinishReason::kInterrupted;
    return result;
  }

  TextStream stream(tokenizer, options, tokenizer.IsAtStart(sequence.tokens()), result.text);
  const std::vector<int32_t> stop_tokens = StopTokens(tokenizer, options.stops);
  for (;;) {
    const int32_t token = sampler.Sample(logits, sequence.tokens());
    result.last_token = token;
    ++result.generated_tokens;
    if (tokenizer.IsEndOfGeneration(token)) {
      result.reason = FinishReason::kEndOfText;
      break;
    }
    if (std::find(stop_tokens.begin(), stop_tokens.end(), token) != stop_tokens.end() || !stream.Push(token)) {
      result.reason = FinishReason::kStopString;
      break;
    }
    if (result.generated_tokens == options.max_tokens) break;
    if (stopped() || sequence.tokens().size() == ctx) {
      result.reason = stopped() ? FinishReason::kInterrupted : FinishReason::kContext;
      break;
    }
    engine.Decode({{&sequence, {&token, 1}, LogitsRows::kLast}}, keep);
  }
  result.decode_seconds = Seconds(prefilled, Clock::now());
  stream.Finish();
  return result;
}

std::string StopFilter::Push(std::string_view text) {
  if (stopped_) return {};
  held_ += text;
  size_t cut = std::string::npos;
  for (const std::string& stop : stops_) cut = std::min(cut, held_.find(stop));
  if (cut != std::string::npos) {
    stopped_ = true;
    held_.resize(cut);
    return std::exchange(held_, {});
  }
  size_t keep = 0;  // the longest end of the text with which a stop string begins
  for (const std::string& stop : stops_)
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n)
      if (held_.ends_with(std::string_view(stop).substr(0, n))) keep = n;
  std::string certain = held_.substr(0, held_.size() - keep);
  held_.erase(0, certain.size());
  return certain;
}

std::string StopFilter::Flush() { return std::exchange(held_, {}); }

}  // namespace lesskv
