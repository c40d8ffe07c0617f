// What every evaluation needs: the engine, the caches under test, and the part of a result row that all commands share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/run_info.h"
#include "eval/report.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {

// One cache under test. Rivals that --match-bytes added say whose they are (match_bytes.h).
struct Subject {
  std::shared_ptr<const CacheConfig> config;
  std::string matched_to = {};  // kv_spec of the row whose rival this is; empty when the caller asked for it
  std::string match = {};       // "full", "bare selector", "rank/2 extra rows", "equal bytes"
};

// Shared by all evaluations; the engine and tokenizer outlive it.
struct EvalSetup {
  Engine* engine = nullptr;
  const Tokenizer* tokenizer = nullptr;
  size_t ctx = 0;
  uint64_t seed = 0;
  size_t batch = 16;  // texts that go through the engine together, at most
  size_t keep = 0;    // first tokens of every text that no cache lets go
  std::vector<Subject> subjects = {};
  const std::atomic<bool>* stop = nullptr;    // set from anywhere: the evaluation throws Error kRuntime
  std::function<void(double)> progress = {};  // share done, in [0, 1]

  // A cache of this evaluation: its context, its protected tokens.
  std::shared_ptr<const CacheConfig> MakeConfig(const CacheSpec& spec) const;

  void CheckStop() const;
  void Progress(size_t done, size_t total) const;

  // The subjects, by their indices, in groups that read prompts alike (CacheConfig::ReadsPromptsAs): AddPrompt reads a text
  // for all of a group at once.
  std::vector<std::vector<size_t>> PromptGroups() const;
  // Each subject by itself.
  std::vector<std::vector<size_t>> SingleGroups() const;

  // How many texts to run together so that the caches of one batch, one of every subject in the group a text, stay below
  // kBatchBytes by their plans.
  size_t BatchSize(std::span<const size_t> group, size_t n_prompt, size_t n_decode) const;
  static constexpr size_t kBatchBytes = size_t{1} << 30;
};

// The items of a Prefill by which sequences, one of each subject in a group, read the same tokens; their tags count from 0.
void AddPrompt(std::span<Sequence* const> sequences, std::span<const int32_t> tokens, LogitsRows logits,
               std::vector<StepItem>& items);
// Reads them. Where a sink is given it has what is predicted behind the last token, of each sequence.
using PromptSink = std::function<void(size_t sequence, std::span<const float> logits)>;
void ReadPrompt(const EvalSetup& setup, std::span<Sequence* const> sequences, std::span<const int32_t> tokens,
                const PromptSink& sink = {});

// How text meets the cache. Every row names it.
struct Protocol {
  enum class Mode {
    kStream,    // `step` tokens at a time, evicting in between
    kContinue,  // `prompt` tokens in one shot (or in the chunks of prefill(chunk=N)), then the decode path, one token a
                // step
  };
  Mode mode = Mode::kStream;
  size_t step = 8;
  size_t prompt = 0;
  // The windows and tokens of llama.cpp's llama-perplexity: the text, behind a BOS where the model wants one, in windows of
  // exactly one context (what is left over at the end is dropped), the first token of each replaced by BOS; scored are the
  // tokens behind the first half and one.
  bool llama_windows = false;
};

Protocol::Mode ParseMode(const std::string& text);  // "stream", "continue"; Error otherwise

// Tokens and seconds, prompts apart from the rest. Only the engine's steps are timed, not the scoring of their logits.
struct FeedCost {
  size_t prompt_tokens = 0;
  double prompt_seconds = 0;  // of all caches that read the prompts together
  size_t prompt_caches = 1;   // so many
  size_t tokens = 0;
  double seconds = 0;

  void operator+=(const FeedCost& other);
};

// A row's beginning: command, rival's mark, spec and run information (engine/run_info.h).
Json BeginRow(const EvalSetup& setup, const Subject& subject, std::string_view command);
void AddProtocol(Json& row, const Protocol& protocol);
// tokens_per_second and, where prompts were fed, prefill_tokens_per_second: sums over all sequences of a batch. The latter is
// that of the caches which read the prompts together, prefill_caches of them, where they are more than one.
void AddCost(Json& row, const FeedCost& cost);

// The columns that follow a table's measures: rows, bytes, speed. The ones before: cache and rival's mark.
void AppendCacheColumns(std::vector<Column>& columns);
std::vector<Column> SubjectColumns();

// Keeps the statistics of the sequence that has seen most tokens (of equals the first), and the highest peak of all.
class StatsTally {
 public:
  void Add(const CacheStats& stats);
  const CacheStats& stats() const { return stats_; }

 private:
  CacheStats stats_;
};

}  // namespace lesskv
