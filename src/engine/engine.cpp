#include "engine/engine.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"
#include "base/memory.h"

namespace lesskv {
namespace {

// Below this the question whether memory suffices is not worth asking at every step.
constexpr size_t kSmallWork = size_t{64} << 20;

size_t CountRows(std::span<const StepItem> items) {
  size_t n_rows = 0;
  for (const StepItem& item : items) n_rows += item.tokens.size();
  return n_rows;
}

void CheckItem(const StepItem& item, size_t n_vocab) {
  CHECK(item.sequence != nullptr);
  CHECK(!item.sequence->interrupted(), "a sequence whose step was stopped halfway cannot go on");
  if (item.tokens.empty()) Fail(ErrorCode::kInvalidArgument, "a step needs at least one token a sequence, found none");
  for (const int32_t token : item.tokens)
    if (token < 0 || static_cast<size_t>(token) >= n_vocab)
      Fail(ErrorCode::kInvalidArgument, "token {} is not in the vocabulary of {} tokens", token, n_vocab);
  const size_t seen = item.sequence->tokens().size();
  const size_t ctx = item.sequence->config().shape().ctx;
  if (item.tokens.size() > ctx - std::min(ctx, seen))
    Fail(ErrorCode::kInvalidArgument, "{} tokens do not fit the context of {} tokens, of which {} are used",
         item.tokens.size(), ctx, seen);
}

// Begins the step in every cache, or in none.
void BeginAll(std::span<const StepItem> items, StepKind kind) {
  size_t begun = 0;
  try {
    for (; begun < items.size(); ++begun)
      items[begun].sequence->cache().BeginStep(items[begun].tokens.size(), kind);
  } catch (...) {
    while (begun > 0) items[--begun].sequence->cache().CancelStep();
    throw;
  }
}

}  // namespace

ComputeChoice ParseComputeChoice(const std::string& text) {
  if (text == "auto") return ComputeChoice::kAuto;
  if (text == "f32") return ComputeChoice::kF32;
  if (text == "bf16") return ComputeChoice::kBF16;
  Fail(ErrorCode::kInvalidArgument, "--compute: expected auto, f32 or bf16, found \"{}\"", text);
}

Sequence::Sequence(std::shared_ptr<const CacheConfig> config)
    : cache_(std::make_unique<SequenceCache>(std::move(config))) {}

Sequence::Sequence(std::unique_ptr<SequenceCache> cache, std::vector<int32_t> tokens)
    : cache_(std::move(cache)), tokens_(std::move(tokens)) {
  if (cache_->tokens_seen() != tokens_.size())
    Fail(ErrorCode::kMismatch, "a cache that has seen {} tokens does not belong to a text of {}", cache_->tokens_seen(),
         tokens_.size());
}

Sequence Sequence::Clone() const {
  CHECK(!interrupted_);
  return Sequence(cache_->Clone(), tokens_);
}

Engine::Engine(std::shared_ptr<const Model> model, const EngineOptions& options) : model_(std::move(model)) {
  if (options.threads < 0 || options.threads > 1024)
    Fail(ErrorCode::kInvalidArgument, "--threads: expected 0 (all CPUs) to 1024, found {}", options.threads);
  SetThreads(options.threads);
  compute_ = options.compute == ComputeChoice::kAuto  ? AutoCompute()
             : options.compute == ComputeChoice::kF32 ? ComputeType::kF32
                                                      : ComputeType::kBF16;
}

std::shared_ptr<const CacheConfig> Engine::MakeCacheConfig(const CacheSpec& spec, size_t ctx,
                                                           std::vector<ProtectedSpan> protected_spans) const {
  const size_t n_ctx = ctx == 0 ? model_->config().train_ctx : ctx;
  return CacheConfig::Create(spec, model_->MakeCacheShape(n_ctx, compute_), std::move(protected_spans),
                             model_->Sidecar());
}

size_t Engine::WorkBytes(size_t n_rows) const {
  size_t product = 0;
  const LayerWeights& layer = model_->layer(0);
  for (const WeightView* w : {&layer.q, &layer.k, &layer.v, &layer.attn_output, &layer.ffn_gate,
                              &layer.ffn_up, &layer.ffn_down, &model_->output()})
    product = std::max(product, LinearWorkBytes(*w, n_rows, compute_));
  return ForwardWorkspace::Bytes(model_->config(), n_rows) + product;
}

void Engine::Reserve(size_t n_rows) {
  const size_t wanted = WorkBytes(n_rows);
  if (wanted > kSmallWork && n_rows > reserved_rows_)
    RequireMemory(wanted, fmt::format("work memory for a step of {} tokens", n_rows));
  workspace_.Reserve(model_->config(), n_rows);
  reserved_rows_ = std::max(reserved_rows_, n_rows);
}

bool Engine::Step(std::span<const StepItem> items, StepKind kind, const LogitsSink& sink, const StepControl& control) {
  return RunStep(items, kind, sink, control, {});
}

bool Engine::RunStep(std::span<const StepItem> items, StepKind kind, const LogitsSink& sink, const StepControl& control,
                     const Share& share) {
  const size_t n_rows = CountRows(items);
  for (const StepItem& item : items) CheckItem(item, model_->config().n_vocab);
  if (items.empty() || (control.stop != nullptr && *control.stop)) return items.empty();
  Reserve(n_rows);
  for (const StepItem& item : items) item.sequence->tokens_.reserve(item.sequence->tokens_.size() + item.tokens.size());
  std::vector<ForwardItem> forward_items;
  for (const StepItem& item : items) forward_items.push_back({&item.sequence->cache(), item.tokens});
  BeginAll(items, kind);

  const size_t n_layers = model_->config().n_layers;
  const auto after_layer = [&](size_t layers_done) {
    const double step_share = static_cast<double>(layers_done) / static_cast<double>(n_layers);
    if (control.progress) control.progress(share.done + share.step * step_share);
    return layers_done == n_layers || n_rows <= kStoppableRows || control.stop == nullptr || !*control.stop;
  };
  if (!Forward(*model_, forward_items, compute_, workspace_, after_layer)) {
    for (const StepItem& item : items) item.sequence->interrupted_ = true;
    return false;
  }
  for (const StepItem& item : items) {
    item.sequence->cache().EndStep();
    item.sequence->tokens_.insert(item.sequence->tokens_.end(), item.tokens.begin(), item.tokens.end());
  }
  if (sink) EmitLogits(items, sink, share.first_row);
  return true;
}

// Tiles go across items: the output matrix is read once for the tokens of many sequences.
void Engine::EmitLogits(std::span<const StepItem> items, const LogitsSink& sink, size_t row_offset) {
  const size_t n_vocab = model_->config().n_vocab;
  std::vector<LogitsRow> tile;
  std::vector<size_t> rows;
  const auto emit = [&] {
    if (tile.empty()) return;
    const float* logits = ComputeLogits(*model_, workspace_, rows, compute_);
    for (size_t i = 0; i < tile.size(); ++i) tile[i].logits = {logits + i * n_vocab, n_vocab};
    sink(tile);
    tile.clear();
    rows.clear();
  };
  size_t first = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const size_t n = items[i].tokens.size();
    const size_t begin = items[i].logits == LogitsRows::kAll ? 0 : items[i].logits == LogitsRows::kLast ? n - 1 : n;
    for (size_t row = begin; row < n; ++row) {
      tile.push_back({i, row_offset + row, {}});
      rows.push_back(first + row);
      if (tile.size() == kLogitsTile) emit();
    }
    first += n;
  }
  emit();
}

bool Engine::Prefill(std::span<const StepItem> items, const LogitsSink& sink, const StepControl& control) {
  if (items.empty()) return true;
  size_t longest = 0;
  for (const StepItem& item : items) {
    CheckItem(item, model_->config().n_vocab);
    longest = std::max(longest, item.tokens.size());
  }
  const size_t chunk = items[0].sequence->config().prefill_chunk();
  for (const StepItem& item : items)
    CHECK(item.sequence->config().prefill_chunk() == chunk, "all sequences of a prefill have the same chunk");
  RequirePrefillMemory(items, chunk);
  const bool done = chunk == 0 ? RunStep(items, StepKind::kPrompt, sink, control, {})
                               : PrefillChunks(items, chunk, longest, sink, control);
  if (!done) return false;
  for (const StepItem& item : items) item.sequence->cache().EndPrompt();
  if (reserved_rows_ > kTileTokens) {  // a prompt's work memory is not kept while tokens are generated
    workspace_ = {};
    reserved_rows_ = 0;
  }
  return true;
}

// Refuses a prompt that cannot fit before it has begun: work memory of the largest step, and what new caches reach.
void Engine::RequirePrefillMemory(std::span<const StepItem> items, size_t chunk) const {
  size_t work_rows = 0, prompt_tokens = 0, cache_bytes = 0;
  for (const StepItem& item : items) {
    const size_t n = item.tokens.size();
    prompt_tokens += n;
    work_rows += chunk == 0 ? n : std::min(n, chunk);
    if (item.sequence->tokens().empty()) cache_bytes += item.sequence->config().Plan(n, 0).bytes_peak;
  }
  const size_t work_bytes = work_rows > reserved_rows_ ? WorkBytes(work_rows) : 0;
  if (work_bytes + cache_bytes <= kSmallWork) return;
  RequireMemory(work_bytes + cache_bytes,
                fmt::format("a prompt of {} tokens ({} of work memory, {} of cache; prefill(chunk=N) bounds the work)",
                            prompt_tokens, HumanBytes(work_bytes), HumanBytes(cache_bytes)));
}

bool Engine::PrefillChunks(std::span<const StepItem> items, size_t chunk, size_t longest, const LogitsSink& sink,
                           const StepControl& control) {
  for (size_t first = 0; first < longest; first += chunk) {
    std::vector<StepItem> step;
    std::vector<size_t> origin;  // of each step item: its index in items
    for (size_t i = 0; i < items.size(); ++i) {
      StepItem item = items[i];
      if (first >= item.tokens.size()) continue;
      const bool last = item.tokens.size() - first <= chunk;
      item.tokens = item.tokens.subspan(first, std::min(chunk, item.tokens.size() - first));
      if (item.logits == LogitsRows::kLast && !last) item.logits = LogitsRows::kNone;
      step.push_back(item);
      origin.push_back(i);
    }
    const LogitsSink renumbered = [&](std::span<const LogitsRow> tile) {
      std::vector<LogitsRow> rows(tile.begin(), tile.end());
      for (LogitsRow& row : rows) row.item = origin[row.item];
      sink(rows);
    };
    const double total = static_cast<double>(longest);
    const Share share{.done = static_cast<double>(first) / total,
                      .step = static_cast<double>(std::min(chunk, longest - first)) / total,
                      .first_row = first};
    if (!RunStep(step, StepKind::kStream, sink ? renumbered : LogitsSink(), control, share)) return false;
  }
  return true;
}

}  // namespace lesskv
