// Prompt in, text out: the loop of prefill, sample, decode for one sequence.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

struct GenerateOptions {
  SamplerOptions sampler;
  size_t max_tokens = 0;           // 0: until the text or the context ends
  // Generation ends before the first of these texts, or at the control token whose text it is; not empty strings.
  std::vector<std::string> stops;
  bool prompt_was_generated = false;  // the prompt is the sequence's own last token: fed as decoding, not as a prompt
  const std::atomic<bool>* stop = nullptr;
  std::function<void(std::string_view)> on_text = {};  // as it becomes certain; always whole UTF-8 characters
  std::function<void(double)> on_prompt_progress = {};
};

enum class FinishReason {
  kLength,       // max_tokens
  kEndOfText,    // an end-of-generation token
  kStopString,   // one of `stops`
  kContext,      // the context is full
  kInterrupted,  // `stop` was set
};
std::string_view FinishName(FinishReason reason);  // "length", "end", "stop", "context", "interrupted"

struct GenerateResult {
  std::string text;
  size_t prompt_tokens = 0;
  size_t generated_tokens = 0;  // an end-of-generation token counts
  double prefill_seconds = 0;   // until the first token's logits were there
  double decode_seconds = 0;    // the decode steps, one fewer than generated tokens, and sampling
  FinishReason reason = FinishReason::kLength;
  int32_t last_token = -1;  // sampled last and not fed to the sequence; -1: none was sampled

  double PrefillTokensPerSecond() const;
  double DecodeTokensPerSecond() const;  // decode steps a second
};

// Reads `prompt` (at least one token) and generates. The last generated token is not fed to the sequence.
// Throws Error as Engine::Prefill does; a prompt that leaves no room in the context for one more token is refused.
GenerateResult Generate(Engine& engine, const Tokenizer& tokenizer, Sequence& sequence,
                        std::span<const int32_t> prompt, const GenerateOptions& options);

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

}  // namespace lesskv
