#include "engine/generate.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {
namespace {

using Clock = std::chrono::steady_clock;
double Seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

bool IsControl(const Tokenizer& tokenizer, int32_t token) { return tokenizer.Type(token) == TokenType::kControl; }

size_t CountCharacters(std::string_view utf8) {
  return static_cast<size_t>(std::ranges::count_if(utf8, [](char c) { return (c & 0xC0) != 0x80; }));
}

// How much of the text before the generated one the sampler looks at.
size_t LookBack(const SamplerOptions& options, size_t n_seen) {
  if (options.repeat_penalty == 1.0f) return 0;
  return options.repeat_last_n < 0 ? n_seen : std::min(n_seen, static_cast<size_t>(options.repeat_last_n));
}

// `n_further`: tokens, at least, that come behind the prompt.
void RequireRoom(const Sequence& sequence, size_t n_prompt, size_t n_further) {
  const size_t ctx = sequence.config().shape().ctx;
  const size_t seen = sequence.tokens().size();
  if (n_prompt + n_further > ctx - std::min(ctx, seen))
    Fail(ErrorCode::kInvalidArgument,
         "the prompt has {} tokens, which leaves no room in the context of {} tokens, of which {} are used", n_prompt,
         ctx, seen);
}

SamplerOptions WithoutEnds(SamplerOptions options, const Tokenizer& tokenizer) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int32_t token = 0; static_cast<size_t>(token) < tokenizer.size(); ++token)
    if (tokenizer.IsEndOfGeneration(token)) options.logit_bias.push_back({token, kNever});
  return options;
}

// Receives the logits of a step that wants one row.
LogitsSink KeepIn(std::vector<float>& logits) {
  return [&logits](std::span<const LogitsRow> tile) {
    logits.assign(tile.back().logits.begin(), tile.back().logits.end());
  };
}

// Takes text that a stop string hid out of a sequence: a copy from before it was fed is kept and gone back to.
class HiddenText {
 public:
  // Before the newest token of `generation` is fed.
  void BeforeFeeding(const Sequence& sequence, const Generation& generation) {
    const size_t n_fed = generation.tokens().size() - 1;
    if (generation.certain_tokens() > n_fed) {
      before_.reset();
    } else if (!before_) {
      before_ = sequence.Clone();
      n_fed_ = n_fed;
    }
  }

  // After a stop string: the sequence then has seen what was shown, but for the token that is returned.
  std::optional<int32_t> TakeBack(Engine& engine, Sequence& sequence, const Generation& generation) {
    if (before_) sequence = std::move(*before_);
    const std::vector<int32_t> shown = generation.ShownTokens(before_ ? n_fed_ : generation.tokens().size() - 1);
    if (shown.empty()) return std::nullopt;
    // A cut token may have become several, for which a full context has no room: the next turn is refused anyway.
    const size_t room = sequence.config().shape().ctx - sequence.tokens().size();
    const size_t n = std::min(shown.size() - 1, room);
    if (n > 0) engine.Decode({{&sequence, std::span(shown).first(n), LogitsRows::kNone}});
    return shown[n];
  }

 private:
  std::optional<Sequence> before_;
  size_t n_fed_ = 0;  // generated tokens that `before_` has seen
};

// Decodes until `generation` ends; `logits` are those of the prompt's last token.
void Decode(Engine& engine, Sequence& sequence, Generation& generation, std::vector<float>& logits,
            const GenerateOptions& options, GenerateResult& result) {
  const auto emit = [&](const std::string& text) {
    if (!text.empty() && options.on_text) options.on_text(text);
  };
  HiddenText hidden;
  for (;;) {
    const Generation::Output out = generation.Push(logits);
    emit(out.text);
    result.pending_token = out.token;
    if (out.finish) {
      result.reason = *out.finish;
      if (out.finish == FinishReason::kStopString && options.sequence_goes_on)
        result.pending_token = hidden.TakeBack(engine, sequence, generation);
      return;
    }
    if (options.stop != nullptr && *options.stop) {
      result.reason = FinishReason::kInterrupted;
      return emit(generation.Cancel());
    }
    if (options.sequence_goes_on) hidden.BeforeFeeding(sequence, generation);
    engine.Decode({{&sequence, {&out.token, 1}, LogitsRows::kLast}}, KeepIn(logits));
  }
}

}  // namespace

std::string_view FinishName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength:
      return "length";
    case FinishReason::kEndOfText:
      return "end";
    case FinishReason::kStopString:
      return "stop";
    case FinishReason::kContext:
      return "context";
    case FinishReason::kInterrupted:
      return "interrupted";
  }
  return "";
}

void Validate(const GenerationOptions& options, size_t n_tokens) {
  Validate(options.sampler);
  for (const TokenBias& bias : options.sampler.logit_bias)
    if (bias.token < 0 || static_cast<size_t>(bias.token) >= n_tokens)
      Fail(ErrorCode::kInvalidArgument, "--logit-bias: expected a token below {}, found {}", n_tokens, bias.token);
  for (const std::string& stop : options.stops)
    if (stop.empty()) Fail(ErrorCode::kInvalidArgument, "--stop: expected a text, found an empty one");
}

Generation::Generation(const Tokenizer& tokenizer, const GenerationOptions& options, std::span<const int32_t> seen,
                       size_t ctx)
    : tokenizer_(&tokenizer),
      max_tokens_(options.max_tokens),
      room_(ctx - std::min(ctx, seen.size())),
      at_start_(tokenizer.IsAtStart(seen)),
      sampler_(options.ignore_end ? WithoutEnds(options.sampler, tokenizer) : options.sampler),
      decoder_(tokenizer, true, at_start_),
      filter_(options.stops),
      logprobs_(options.logprobs),
      next_at_start_(at_start_) {
  Validate(options, tokenizer.size());
  for (const std::string& stop : options.stops)
    if (const auto token = tokenizer.FindControlToken(stop)) stop_tokens_.push_back(*token);
  const auto last = seen.last(LookBack(options.sampler, seen.size()));
  history_.assign(last.begin(), last.end());
  n_copied_ = history_.size();
}

Generation::Output Generation::Push(std::span<const float> logits) {
  CHECK(!finished_, "a text that has ended gets no further token");
  const auto known = logits.first(std::min(logits.size(), tokenizer_->size()));
  Output out;
  out.token = sampler_.Sample(known, history_);
  history_.push_back(out.token);
  if (logprobs_) Measure(known, out.token);
  if (!tokenizer_->IsEndOfGeneration(out.token)) {
    const std::string decoded = decoder_.Push(out.token);
    decoded_bytes_ += decoded.size();
    if (logprobs_) decoded_characters_ += CountCharacters(decoded);
    out.text = Show(filter_.Push(decoded));
  }
  text_ends_.push_back(decoded_bytes_ + (decoder_.unfinished() ? 1 : 0));
  out.finish = FinishAt(out.token);
  if (out.finish) out.text += Flush();
  if (logprobs_) {
    const size_t n_told = tokens().size() - unlisted_.size(), listed = ListedTokens();
    const auto end = unlisted_.begin() + static_cast<std::ptrdiff_t>(listed - std::min(listed, n_told));
    out.tokens.assign(std::make_move_iterator(unlisted_.begin()), std::make_move_iterator(end));
    unlisted_.erase(unlisted_.begin(), end);
  }
  return out;
}

void Generation::Measure(std::span<const float> logits, int32_t token) {
  unlisted_.push_back(MeasureToken(*tokenizer_, logits, token, *logprobs_, next_at_start_));
  unlisted_.back().offset = decoded_characters_;
  next_at_start_ = tokenizer_->IsAtStart({&token, 1});
}

// How many tokens, from the first on, are to be told.
size_t Generation::ListedTokens() const {
  const size_t certain = certain_tokens(), n = tokens().size();
  if (!finished_) return certain;
  if (!filter_.stopped()) return n - (EndsText(tokens().back()) ? 1 : 0);
  const bool cut = certain < n && (certain == 0 ? 0 : text_ends_[certain - 1]) < text_.size();  // some of it is shown
  return certain + (cut ? 1 : 0);
}

bool Generation::EndsText(int32_t token) const {
  return tokenizer_->IsEndOfGeneration(token) ||
         std::find(stop_tokens_.begin(), stop_tokens_.end(), token) != stop_tokens_.end();
}

std::optional<FinishReason> Generation::FinishAt(int32_t token) const {
  if (tokenizer_->IsEndOfGeneration(token)) return FinishReason::kEndOfText;
  if (EndsText(token) || filter_.stopped()) return FinishReason::kStopString;
  if (tokens().size() >= max_tokens_) return FinishReason::kLength;
  if (tokens().size() > room_) return FinishReason::kContext;
  return std::nullopt;
}

std::string Generation::Cancel() {
  CHECK(!finished_, "a text that has ended cannot be ended again");
  return Flush();
}

std::string Generation::Show(std::string piece) {
  text_ += piece;
  return piece;
}

std::string Generation::Flush() {
  finished_ = true;
  std::string rest = filter_.Push(decoder_.Flush());
  return Show(rest + filter_.Flush());
}

size_t Generation::certain_tokens() const {
  const auto end = std::upper_bound(text_ends_.begin(), text_ends_.end(), text_.size());
  return static_cast<size_t>(end - text_ends_.begin());
}

std::vector<int32_t> Generation::ShownTokens(size_t first) const {
  const size_t n = certain_tokens();
  CHECK(finished_ && first <= n, "token {} of {}", first, n);
  const auto whole = tokens().subspan(first, n - first);
  std::vector<int32_t> shown(whole.begin(), whole.end());
  if (!filter_.stopped()) return shown;
  const std::string cut = text_.substr(n == 0 ? 0 : text_ends_[n - 1]);
  const bool at_start = n == 0 ? at_start_ : IsControl(*tokenizer_, tokens()[n - 1]);
  const TextPiece piece{cut};
  const std::vector<int32_t> rest = tokenizer_->Encode({&piece, 1}, at_start);
  shown.insert(shown.end(), rest.begin(), rest.end());
  return shown;
}

double GenerateResult::PrefillTokensPerSecond() const {
  return prefill_seconds > 0 ? static_cast<double>(prompt_tokens) / prefill_seconds : 0;
}

double GenerateResult::DecodeTokensPerSecond() const {
  return decode_seconds > 0 && generated_tokens > 1 ? static_cast<double>(generated_tokens - 1) / decode_seconds : 0;
}

GenerateResult Generate(Engine& engine, const Tokenizer& tokenizer, Sequence& sequence, std::span<const int32_t> prompt,
                        const GenerateOptions& options) {
  RequireRoom(sequence, prompt.size(), options.max_tokens == 0 ? 0 : 1);
  Validate(options, tokenizer.size());
  GenerateResult result;
  result.prompt_tokens = prompt.size();
  std::vector<float> logits;
  const LogitsSink keep = KeepIn(logits);
  const auto start = Clock::now();
  const StepItem item{&sequence, prompt, LogitsRows::kLast};
  const bool finished =
      options.prompt_was_generated
          ? engine.Decode({item}, keep)
          : engine.Prefill({item}, keep, {.stop = options.stop, .progress = options.on_prompt_progress});
  const auto prefilled = Clock::now();
  result.prefill_seconds = Seconds(start, prefilled);
  if (!finished) {
    result.reason = FinishReason::kInterrupted;
    return result;
  }
  if (options.max_tokens == 0) return result;
  Generation generation(tokenizer, options, sequence.tokens(), sequence.config().shape().ctx);
  Decode(engine, sequence, generation, logits, options, result);
  result.decode_seconds = Seconds(prefilled, Clock::now());
  result.generated_tokens = generation.tokens().size();
  result.text = generation.text();
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
