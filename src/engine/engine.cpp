#include "engine/engine.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "base/memory.h"
#include "engine/step_run.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

// Below this the question whether memory suffices is not worth asking at every step.
constexpr size_t kSmallWork = size_t{64} << 20;

ComputeType Resolve(ComputeChoice choice) {
  switch (choice) {
    case ComputeChoice::kAuto: return AutoCompute();
    case ComputeChoice::kF32: return ComputeType::kF32;
    case ComputeChoice::kBF16: return ComputeType::kBF16;
    case ComputeChoice::kInt8: return ComputeType::kInt8;
  }
  return ComputeType::kF32;
}

}  // namespace

ComputeChoice ParseComputeChoice(const std::string& text) {
  if (text == "auto") return ComputeChoice::kAuto;
  if (text == "f32") return ComputeChoice::kF32;
  if (text == "bf16") return ComputeChoice::kBF16;
  if (text == "int8") return ComputeChoice::kInt8;
  Fail(ErrorCode::kInvalidArgument, "--compute: expected auto, f32, bf16 or int8, found \"{}\"", text);
}

Sequence::Sequence(std::shared_ptr<const CacheConfig> config)
    : cache_(std::make_unique<SequenceCache>(std::move(config))) {
  // Room that is not touched takes no memory; growing would, as a vector grows into new room and leaves holes behind.
  constexpr size_t kMaxRoom = size_t{1} << 20;
  tokens_.reserve(std::min(cache_->config().shape().ctx, kMaxRoom));
}

Sequence::Sequence(std::unique_ptr<SequenceCache> cache, std::vector<int32_t> tokens)
    : cache_(std::move(cache)), tokens_(std::move(tokens)) {
  if (cache_->tokens_seen() != tokens_.size())
    Fail(ErrorCode::kMismatch, "a cache that has seen {} tokens does not belong to a text of {}", cache_->tokens_seen(),
         tokens_.size());
}

Sequence Sequence::Clone() const {
  if (interrupted_) Fail(ErrorCode::kInvalidArgument, "a sequence whose step ended halfway cannot be copied");
  return Sequence(cache_->Clone(), tokens_);
}

Engine::Engine(std::shared_ptr<const Model> model, const EngineOptions& options)
    : threads_(options.threads),
      model_(std::move(model)),
      batch_invariant_(options.batch_invariant) {
  ActiveIsa();  // what LESSKV_ISA asks for in vain is refused here, not in the middle of a step
  compute_ = Resolve(options.compute);
}

std::shared_ptr<const CacheConfig> Engine::MakeCacheConfig(const CacheSpec& spec, size_t ctx,
                                                           std::vector<ProtectedSpan> protected_spans) const {
  const size_t n_ctx = ctx == 0 ? model_->config().train_ctx : ctx;
  return CacheConfig::Create(spec, model_->MakeCacheShape(n_ctx, compute_), std::move(protected_spans),
                             model_->Sidecar());
}

size_t Engine::WorkBytes(size_t n_rows) const {
  const ThreadScope scope(threads_);
  size_t product = 0;
  const LayerWeights& layer = model_->layer(0);
  for (const WeightView* w : {&layer.q, &layer.k, &layer.v, &layer.attn_output, &layer.ffn_gate,
                              &layer.ffn_up, &layer.ffn_down, &model_->output()})
    if (w->n_out > 0) product = std::max(product, LinearWorkBytes(*w, n_rows, compute_));
  return ForwardWorkspace::Bytes(model_->config(), n_rows) + product;
}

void Engine::Reserve(size_t n_rows) {
  const size_t wanted = WorkBytes(n_rows);
  if (wanted > kSmallWork && n_rows > work_.reserved_rows)
    RequireMemory(wanted, fmt::format("work memory for a step of {} tokens", n_rows));
  work_.workspace.Reserve(model_->config(), n_rows);
  work_.reserved_rows = std::max(work_.reserved_rows, n_rows);
}

namespace {

// Runs a call on the engine's threads. What the caller gets to see when memory for the engine's own lists cannot be had
// is an Error, too.
template <typename Body>
bool OnThreads(const ThreadPool& threads, Body&& body) {
  const ThreadScope scope(threads);
  try {
    return body();
  } catch (const std::bad_alloc&) {
    Fail(ErrorCode::kOutOfMemory, "memory that a step needs cannot be had");
  }
}

// A prompt on its way, in one step or in chunks.
struct Prompt {
  const StepItem* item;
  size_t chunk;  // 0: one step
  size_t fed = 0;

  size_t left() const { return item->tokens.size() - fed; }
  StepItem Next() const {
    StepItem next = *item;
    next.kind = chunk == 0 ? StepKind::kPrompt : StepKind::kStream;
    next.tokens = item->tokens.subspan(fed, chunk == 0 ? left() : std::min(chunk, left()));
    if (next.logits == LogitsRows::kLast && next.tokens.size() < left()) next.logits = LogitsRows::kNone;
    return next;
  }
};

size_t ChunkOf(const StepItem& item) {
  return item.sequence == nullptr ? 0 : item.sequence->config().prefill_chunk();
}

}  // namespace

bool Engine::Step(StepItems items, const LogitsSink& sink, const StepControl& control) {
  return OnThreads(threads_, [&] {
    StepRun run(*this, sink, control);
    for (const StepItem& item : items) run.Add(item);
    return run.Run();
  });
}

bool Engine::Decode(StepItems items, const LogitsSink& sink, const StepControl& control) {
  return OnThreads(threads_, [&] {
    StepRun run(*this, sink, control);
    for (StepItem item : items) {
      item.kind = StepKind::kDecode;
      run.Add(item);
    }
    return run.Run();
  });
}

bool Engine::Prefill(StepItems items, const LogitsSink& sink, const StepControl& control) {
  return OnThreads(threads_, [&] { return PrefillAll(items, sink, control); });
}

bool Engine::PrefillAll(StepItems items, const LogitsSink& sink, const StepControl& control) {
  RequirePrefillMemory(items);
  std::vector<Prompt> prompts;
  double longest = 1;  // in steps of tokens, for the progress report
  for (const StepItem& item : items) {
    prompts.push_back({&item, ChunkOf(item)});
    longest = std::max(longest, static_cast<double>(item.tokens.size()));
  }
  double done = 0;
  while (!prompts.empty()) {
    StepRun run(*this, sink, control);
    size_t most = 0;
    for (const Prompt& prompt : prompts) {
      run.Add(prompt.Next(), prompt.item->tokens, prompt.fed);
      most = std::max(most, prompt.Next().tokens.size());
    }
    const double share = std::min(1 - done, static_cast<double>(most) / longest);
    if (!run.Run(done, share)) return false;
    done += share;
    std::vector<Prompt> unfinished;
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (!run.finished(i)) continue;
      prompts[i].fed += prompts[i].Next().tokens.size();
      if (prompts[i].left() == 0)
        prompts[i].item->sequence->cache().EndPrompt();
      else
        unfinished.push_back(prompts[i]);
    }
    prompts = std::move(unfinished);
  }
  if (work_.reserved_rows > kTileTokens) work_ = {};  // a prompt's work memory is not kept while tokens are generated
  return true;
}

// Refuses prompts that cannot fit before they have begun: work memory of the largest step, and what new caches reach.
void Engine::RequirePrefillMemory(StepItems items) const {
  size_t prompt_tokens = 0, work_rows = 0, cache_bytes = 0;
  for (const StepItem& item : items) {
    if (item.sequence == nullptr) continue;  // refused by the step itself
    const size_t n = item.tokens.size(), chunk = ChunkOf(item);
    if (item.reads_with == nullptr) {
      prompt_tokens += n;
      work_rows += chunk == 0 ? n : std::min(n, chunk);
    }
    if (item.sequence->tokens().empty()) cache_bytes += item.sequence->config().Plan(n, 0).bytes_peak;
  }
  const size_t work_bytes = work_rows > work_.reserved_rows ? WorkBytes(work_rows) : 0;
  if (work_bytes + cache_bytes <= kSmallWork) return;
  RequireMemory(work_bytes + cache_bytes,
                fmt::format("a prompt of {} tokens ({} of work memory, {} of cache; prefill(chunk=N) bounds the work)",
                            prompt_tokens, HumanBytes(work_bytes), HumanBytes(cache_bytes)));
}

}  // namespace lesskv
