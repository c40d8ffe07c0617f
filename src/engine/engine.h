// Runs a model over sequences: prompts in one step or in chunks, generation one token at a time, several sequences a
// step, each with its own cache. The weight products of a step are shared by all its sequences.
//
//   auto model = Model::Load("model.gguf");
//   Engine engine(model, {.threads = 2});
//   auto config = engine.MakeCacheConfig(CacheSpec::Parse("h2o(5%)"), 4096);
//   Sequence sequence(config);
//   engine.Prefill({{&sequence, tokens, LogitsRows::kLast}}, sink);     // one-shot or chunked, as the spec says
//   engine.Decode({{&sequence, {&token, 1}, LogitsRows::kLast}}, sink);
//
// Engines have threads of their own and do not disturb each other. One engine is not thread safe: one step at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/threads.h"
#include "kvcache/cache_batch.h"
#include "kvcache/sequence_cache.h"
#include "model/forward.h"
#include "model/model.h"

namespace lesskv {

enum class ComputeChoice { kAuto, kF32, kBF16, kInt8 };
ComputeChoice ParseComputeChoice(const std::string& text);  // "auto", "f32", "bf16", "int8"; Error otherwise

struct EngineOptions {
  int threads = 0;                              // 0: all CPUs
  ComputeChoice compute = ComputeChoice::kAuto;  // auto: AutoCompute in linear.h
  // A sequence's bits do not depend on which others share its steps. Costs speed in steps of many short sequences: their
  // products then go a few rows at a time.
  bool batch_invariant = false;
};

// One text in progress: its cache and the tokens it has seen. Everything that changes while text is processed.
class Sequence {
 public:
  explicit Sequence(std::shared_ptr<const CacheConfig> config);
  // Continues a stored text: `cache` has seen exactly `tokens`.
  Sequence(std::unique_ptr<SequenceCache> cache, std::vector<int32_t> tokens);
  Sequence(Sequence&&) = default;
  Sequence& operator=(Sequence&&) = default;
  Sequence Clone() const;

  const std::vector<int32_t>& tokens() const { return tokens_; }  // all seen, in order
  const CacheConfig& config() const { return cache_->config(); }
  SequenceCache& cache() { return *cache_; }
  const SequenceCache& cache() const { return *cache_; }
  CacheStats Stats() const { return cache_->Stats(); }

  // A step that ended halfway (stopped, cancelled, out of memory) leaves the sequence unusable; it can only be
  // destroyed.
  bool interrupted() const { return interrupted_; }

 private:
  friend class Engine;
  std::unique_ptr<SequenceCache> cache_;
  std::vector<int32_t> tokens_;
  bool interrupted_ = false;
};

// For which of an item's tokens logits are computed.
enum class LogitsRows { kNone, kLast, kAll };

struct StepItem {
  Sequence* sequence = nullptr;
  std::span<const int32_t> tokens;  // at least one
  LogitsRows logits = LogitsRows::kNone;
  size_t tag = 0;  // the caller's own; comes back with logits and failures
  StepKind kind = StepKind::kDecode;  // Prefill and Decode set it
  const std::atomic<bool>* cancel = nullptr;  // set from anywhere: the sequence leaves the step after the layer in work
  // The sequence of an earlier item of a Prefill with the same tokens: the model reads them once, for both. Both sequences
  // are new, and their caches read prompts alike (CacheConfig::ReadsPromptsAs); each then holds what it would hold alone,
  // bit for bit. Comparisons of caches read a text so; what fails or is cancelled there fails here.
  const Sequence* reads_with = nullptr;
};

// The items of a step: any list of them, also a braced one.
class StepItems : public std::span<const StepItem> {
 public:
  StepItems(std::initializer_list<StepItem> items) : std::span<const StepItem>(items.begin(), items.size()) {}
  StepItems(const std::vector<StepItem>& items) : std::span<const StepItem>(items) {}
};

// The logits of one token, valid during the sink's call only.
struct LogitsRow {
  size_t tag;                     // of the StepItem
  size_t row;                     // index of the token in StepItem::tokens
  std::span<const float> logits;  // [n_vocab]
};

// Receives rows in order of (step, item, row), a tile of rows a call, on the calling thread (ParallelFor may be used).
using LogitsSink = std::function<void(std::span<const LogitsRow> tile)>;

struct StepControl {
  const std::atomic<bool>* stop = nullptr;         // set from anywhere to stop early
  std::function<void(double done)> progress = {};  // share done of the call, in (0, 1]
  // With it a failure of one item (its own mistake, memory for its cache, cancelled) is reported here and the others go
  // on. Without it a failure before anything has changed is thrown at once, and a later one when the others are done.
  std::function<void(size_t tag, const Error& error)> on_failure = {};
  // Called in the middle of a step, after each tile of kTileTokens tokens: other steps may be run there, of sequences
  // that are not in this one, so that they need not wait for a long prompt that has to be read in one step. The bits of
  // neither change. Throws nothing.
  std::function<void()> pause = {};
};

class Engine {
 public:
  explicit Engine(std::shared_ptr<const Model> model, const EngineOptions& options = {});

  const Model& model() const { return *model_; }
  std::shared_ptr<const Model> shared_model() const { return model_; }
  ComputeType compute() const { return compute_; }
  const ThreadPool& threads() const { return threads_; }

  // A cache configuration for this model. `ctx` = 0: the trained context.
  std::shared_ptr<const CacheConfig> MakeCacheConfig(const CacheSpec& spec, size_t ctx = 0,
                                                     std::vector<ProtectedSpan> protected_spans = {}) const;

  // Feeds every item's tokens to its sequence in one step; kinds may differ (prompt chunks beside generated tokens).
  // Throws Error, with nothing changed, when an item cannot be (a token outside the vocabulary, a full context, a
  // sequence that is twice in the step or interrupted) or a cache or the work buffers do not fit memory. An item that
  // fails or is cancelled later leaves its sequence interrupted() and the others as they would be without it. Returns
  // false when stopped: between the layers of a step of more than kStoppableRows tokens (all its sequences are then
  // interrupted()).
  bool Step(StepItems items, const LogitsSink& sink = {}, const StepControl& control = {});

  // A whole prompt (or turn) for every item, then EndPrompt: in one step (kPrompt), or, where the sequence's spec says
  // so (CacheConfig::prefill_chunk), N tokens a step (kStream). A stop between chunks leaves the sequences sound, with the chunks so
  // far seen and the prompt not ended.
  bool Prefill(StepItems items, const LogitsSink& sink = {}, const StepControl& control = {});

  // A step of kind kDecode: generated tokens, or text scored as if it had been generated.
  bool Decode(StepItems items, const LogitsSink& sink = {}, const StepControl& control = {});

  // Bytes of work buffers of a step over n_rows tokens, caches not included.
  size_t WorkBytes(size_t n_rows) const;

  static constexpr size_t kStoppableRows = 512;

 private:
  class StepRun;  // one step from its checks to its logits (step_run.h)
  friend class StepRun;

  bool PrefillAll(StepItems items, const LogitsSink& sink, const StepControl& control);
  void Reserve(size_t n_rows);
  void RequirePrefillMemory(StepItems items) const;

  // What a step works in.
  struct Work {
    ForwardWorkspace workspace = {};
    std::unique_ptr<CacheBatch> batch = std::make_unique<CacheBatch>();
    size_t reserved_rows = 0;
  };

  ThreadPool threads_;
  std::shared_ptr<const Model> model_;
  ComputeType compute_;
  bool batch_invariant_;
  Work work_;
  std::optional<Work> in_pause_;  // of the steps that are run in the middle of another
};

}  // namespace lesskv
