// From logits to text. `Generation` is what one request samples and says, token by token; whoever runs the steps drives
// it: `Generate`, the loop of prefill and decode for one sequence, or a scheduler with many sequences a step.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "engine/logprobs.h"
#include "engine/sampler.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

enum class FinishReason {
  kLength,       // max_tokens
  kEndOfText,    // an end-of-generation token
  kStopString,   // one of `stops`
  kContext,      // the context is full
  kInterrupted,  // `stop` was set
};
std::string_view FinishName(FinishReason reason);  // "length", "end", "stop", "context", "interrupted"

// Cuts a stream of text at the first stop string, holding back only what may still become one.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // What may be printed after `text` was added. After a stop string was found: nothing more.
  std::string Push(std::string_view text);
  std::string Flush();  // what was held back and turned out to be text
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

struct GenerationOptions {
  SamplerOptions sampler;
  static constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();
  size_t max_tokens = kNoLimit;    // kNoLimit: until the text or the context ends
  // Generation ends before the first of these texts, or at the control token whose text it is; not empty strings.
  std::vector<std::string> stops;
  bool ignore_end = false;  // tokens that end a generation are never chosen: only limits and `stops` end it
  // With each token come its log-probability and those of so many likeliest; nothing: they cost nothing either.
  std::optional<size_t> logprobs = {};
};

// Throws Error kInvalidArgument for sampler options out of range, for empty stop strings and for biases of tokens that
// a vocabulary of `n_tokens` does not have.
void Validate(const GenerationOptions& options, size_t n_tokens = GenerationOptions::kNoLimit);

// One text being generated, of one token at least. Calls no engine, keeps no logits, may be moved; the tokenizer must outlive it.
class Generation {
 public:
  struct Output {
    int32_t token = -1;                  // to be fed to the sequence unless `finish` is set
    std::string text;                    // what became certain, in whole UTF-8 characters; with `finish`: all the rest
    std::optional<FinishReason> finish;  // not kInterrupted, which only the caller knows of
    // With `logprobs`, the tokens whose text became certain, in order; with `finish` all the rest. Tokens that a stop
    // string hid altogether are left out, and so is a token that ended the text.
    std::vector<GeneratedToken> tokens = {};
  };

  // `seen`: the tokens that the sequence has seen when the first logits come, the prompt included. Of these it copies
  // what the repetition penalty looks back on. `ctx`: how many tokens the sequence can see.
  // Throws Error as Validate does.
  Generation(const Tokenizer& tokenizer, const GenerationOptions& options, std::span<const int32_t> seen, size_t ctx);

  // Samples the token that follows. `logits`: of the sequence's last token; ids beyond the tokenizer's, which pad some
  // models' vocabularies, are never chosen. Not after `finish` or Cancel (CHECK). Throws Error as Sampler::Sample does.
  Output Push(std::span<const float> logits);

  // Ends the text from outside. Returns what was held back.
  std::string Cancel();

  std::span<const int32_t> tokens() const { return std::span(history_).subspan(n_copied_); }  // all sampled
  const std::string& text() const { return text_; }  // all that Push and Cancel returned

  // How many tokens, from the first on, are shown whole for certain: of those behind them a stop string may yet hide a
  // part, or has hidden it.
  size_t certain_tokens() const;

  // After the end: the tokens that read as what was shown from token `first` <= certain_tokens() on. These are the
  // sampled ones; where a stop string cut one, the tokens of its shown part stand in its place.
  std::vector<int32_t> ShownTokens(size_t first) const;

 private:
  std::string Show(std::string piece);
  std::string Flush();
  bool EndsText(int32_t token) const;
  void Measure(std::span<const float> logits, int32_t token);
  size_t ListedTokens() const;
  std::optional<FinishReason> FinishAt(int32_t token) const;

  const Tokenizer* tokenizer_;
  size_t max_tokens_;
  size_t room_;                   // tokens that still fit the context behind `seen`
  bool at_start_;                 // the text begins behind nothing but special tokens
  std::vector<int32_t> history_;  // the end of `seen`, then the sampled tokens
  size_t n_copied_;               // from `seen`
  std::vector<int32_t> stop_tokens_;  // of `stops`, those that are control tokens: they have no text to be found in
  Sampler sampler_;
  StreamDecoder decoder_;
  StopFilter filter_;
  size_t decoded_bytes_ = 0;       // of text, whatever became of it
  std::vector<size_t> text_ends_;  // of each token, in decoded bytes; one more while its last character is unfinished
  std::string text_;
  bool finished_ = false;
  std::optional<size_t> logprobs_;
  std::vector<GeneratedToken> unlisted_;  // those that Output::tokens has not had yet
  size_t decoded_characters_ = 0;         // whole ones; counted with logprobs only, as the next one is
  bool next_at_start_;
};

struct GenerateOptions : GenerationOptions {
  bool prompt_was_generated = false;  // the prompt is the sequence's own last token: fed as decoding, not as a prompt
  // The sequence will be continued, so it must hold nothing that a stop string hid. What left a cache does not come
  // back: while text is held back because a stop string may be beginning, a copy of the sequence is kept.
  bool sequence_goes_on = false;
  const std::atomic<bool>* stop = nullptr;
  std::function<void(std::string_view)> on_text = {};  // as it becomes certain; always whole UTF-8 characters
  std::function<void(double)> on_prompt_progress = {};
};

struct GenerateResult {
  std::string text;
  size_t prompt_tokens = 0;
  size_t generated_tokens = 0;  // an end-of-generation token counts
  double prefill_seconds = 0;   // until the first token's logits were there
  double decode_seconds = 0;    // the decode steps, one fewer than generated tokens, and sampling
  FinishReason reason = FinishReason::kLength;
  std::optional<int32_t>
      pending_token;  // belongs to the text but was not fed to the sequence: the next prompt begins with it

  double PrefillTokensPerSecond() const;
  double DecodeTokensPerSecond() const;  // decode steps a second
};

// Reads `prompt` (at least one token) and generates; with max_tokens = 0 it only reads. The last generated token is not
// fed to the sequence.
// Throws Error as Engine::Prefill does; a prompt that the context does not hold is refused, and so is one that leaves
// no room for one more token where any is to be generated.
GenerateResult Generate(Engine& engine, const Tokenizer& tokenizer, Sequence& sequence, std::span<const int32_t> prompt,
                        const GenerateOptions& options);

}  // namespace lesskv
