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
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"
#include "kvcache/sequence_cache.h"
#include "model/forward.h"
#include "model/model.h"

namespace lesskv {

enum class ComputeChoice { kAuto, kF32, kBF16 };
ComputeChoice ParseComputeChoice(const std::string& text);  // "auto", "f32", "bf16"; Error otherwise

struct EngineOptions {
  int threads = 0;                              // 0: all CPUs
  ComputeChoice compute = ComputeChoice::kAuto;  // auto: bf16 where the CPU multiplies bf16 pairs, else f32
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

  // A step that was stopped halfway (StepControl::stop) leaves the sequence unusable; it can only be destroyed.
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
};

// The logits of one token, valid during the sink's call only.
struct LogitsRow {
  size_t item;                    // index of the StepItem
  size_t row;                     // index of the token in StepItem::tokens
  std::span<const float> logits;  // [n_vocab]
};

// Receives rows in order of (step, item, row), a tile of rows a call, on the calling thread (ParallelFor may be used).
using LogitsSink = std::function<void(std::span<const LogitsRow> tile)>;

struct StepControl {
  const std::atomic<bool>* stop = nullptr;         // set from anywhere to stop early
  std::function<void(double done)> progress = {};  // share done of the call, in (0, 1]
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

  // Feeds every item's tokens to its sequence in one step. Sequences are distinct; their kinds of step are the same.
  // Throws Error, with nothing changed, when a token is not in the vocabulary, the context is exceeded or a cache or
  // the work buffers do not fit memory. Returns false when stopped: between the layers of a step of more than
  // kStoppableRows tokens (its sequences are then interrupted()).
  bool Step(std::span<const StepItem> items, StepKind kind, const LogitsSink& sink = {},
            const StepControl& control = {});

  // A whole prompt (or turn) for every item, then EndPrompt: in one step (kPrompt), or, when the sequences' spec says
  // prefill(chunk=N), N tokens of every item a step (kStream). All items need the same chunk. A stop between chunks
  // leaves the sequences sound, with the chunks so far seen and the prompt not ended.
  bool Prefill(std::span<const StepItem> items, const LogitsSink& sink = {}, const StepControl& control = {});

  // One step of kind kDecode: generated tokens, or text scored as if it had been generated.
  bool Decode(std::span<const StepItem> items, const LogitsSink& sink = {}) {
    return Step(items, StepKind::kDecode, sink);
  }

  // For calls with a braced list of items.
  bool Step(std::initializer_list<StepItem> items, StepKind kind, const LogitsSink& sink = {},
            const StepControl& control = {}) {
    return Step(std::span(items.begin(), items.size()), kind, sink, control);
  }
  bool Prefill(std::initializer_list<StepItem> items, const LogitsSink& sink = {}, const StepControl& control = {}) {
    return Prefill(std::span(items.begin(), items.size()), sink, control);
  }
  bool Decode(std::initializer_list<StepItem> items, const LogitsSink& sink = {}) {
    return Decode(std::span(items.begin(), items.size()), sink);
  }

  // Bytes of work buffers of a step over n_rows tokens, caches not included.
  size_t WorkBytes(size_t n_rows) const;

  static constexpr size_t kStoppableRows = 512;

 private:
  // Where a step stands in a longer call: what was done before, how much this step is, the rows before it.
  struct Share {
    double done = 0;
    double step = 1;
    size_t first_row = 0;
  };

  void Reserve(size_t n_rows);
  void RequirePrefillMemory(std::span<const StepItem> items, size_t chunk) const;
  bool RunStep(std::span<const StepItem> items, StepKind kind, const LogitsSink& sink, const StepControl& control,
               const Share& share);
  bool PrefillChunks(std::span<const StepItem> items, size_t chunk, size_t longest, const LogitsSink& sink,
                     const StepControl& control);
  void EmitLogits(std::span<const StepItem> items, const LogitsSink& sink, size_t row_offset);

  ThreadPool threads_;
  std::shared_ptr<const Model> model_;
  ComputeType compute_;
  ForwardWorkspace workspace_;
  size_t reserved_rows_ = 0;
};

}  // namespace lesskv
