#include "kvcache/sequence_cache.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/error.h"
#include "kvcache/cache_batch.h"
#include "kvcache/codec/row_store.h"
#include "kvcache/sequence_cache_impl.h"

namespace lesskv {
namespace {

// A batch of one sequence, with the calling thread's work memory.
CacheBatch& OwnBatch() {
  thread_local CacheBatch batch;
  return batch;
}

// Bytes of a block of rows, of the layer that has the largest.
size_t LargestBlock(const LayerPolicy& policy) {
  const RowTypes& types = *policy.codec->row_types();
  size_t bytes = 0;
  for (const LayerShape& layer : policy.layers)
    bytes = std::max(bytes, RegionBytes({types.keys, RowSide::kKeys, layer.head_dim}, kBlockRows) +
                                RegionBytes({types.values, RowSide::kValues, layer.head_dim}, kBlockRows));
  return bytes;
}

template <typename Body>
void AsBatch(SequenceCache* cache, Body&& body) {
  CacheBatch& batch = OwnBatch();
  batch.Start({&cache, 1});
  body(batch);
  if (batch.failure(0)) std::rethrow_exception(batch.failure(0));
}

}  // namespace

void SequenceCache::Impl::Begin(size_t n_tokens, StepKind kind) {
  CHECK(!in_step, "a step is in progress");
  CHECK(n_tokens > 0);
  if (tokens_seen + n_tokens > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    Fail(ErrorCode::kInvalidArgument, "a sequence cannot have more than 2^31 - 1 tokens");
  step = {n_tokens, tokens_seen, kind};
  size_t begun = 0;
  try {
    for (; begun < parts.size(); ++begun) parts[begun]->Begin(step);
  } catch (...) {
    while (begun > 0) parts[--begun]->Cancel();
    throw;
  }
  in_step = true;
}

void SequenceCache::Impl::Cancel() {
  CHECK(in_step, "no step is in progress");
  for (auto& part : parts) part->Cancel();
  in_step = false;
}

void SequenceCache::Impl::End() {
  CHECK(in_step, "no step is in progress");
  for (auto& part : parts) part->End();
  tokens_seen += step.n;
  in_step = false;
}

SequenceCache::SequenceCache(std::shared_ptr<const CacheConfig> config)
    : impl_(std::make_unique<Impl>(std::move(config))) {}
SequenceCache::SequenceCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SequenceCache::~SequenceCache() = default;

std::unique_ptr<SequenceCache> SequenceCache::Clone() const { return Copy(false); }
std::unique_ptr<SequenceCache> SequenceCache::CloneApart() const { return Copy(true); }

std::unique_ptr<SequenceCache> SequenceCache::Copy(bool apart) const {
  CHECK(!impl_->in_step, "a cache cannot be cloned in the middle of a step");
  auto copy = std::make_unique<Impl>(impl_->config);
  copy->counter.apart = apart;
  for (size_t i = 0; i < copy->parts.size(); ++i) copy->parts[i] = impl_->parts[i]->Clone(copy->counter);
  copy->tokens_seen = impl_->tokens_seen;
  return std::unique_ptr<SequenceCache>(new SequenceCache(std::move(copy)));
}

std::vector<SharedPart> SequenceCache::ShareableParts() const {
  std::vector<SharedPart> parts;
  for (const auto& part : impl_->parts) part->store->AddShareable(parts);
  return parts;
}

void SequenceCache::BeginStep(size_t n_tokens, StepKind kind) { impl_->Begin(n_tokens, kind); }
void SequenceCache::CancelStep() { impl_->Cancel(); }
void SequenceCache::EndStep() { impl_->End(); }

bool SequenceCache::WantsInputs(size_t layer) const {
  const PolicyCache& part = *impl_->parts[impl_->config->place(layer).policy];
  return part.evicts && part.policy.selector->ReadsInputs();
}

void SequenceCache::ReadInputs(size_t layer, size_t first, size_t n, const float* x) {
  AsBatch(this, [&](CacheBatch& batch) { batch.ReadInputs(layer, first, n, x); });
}

void SequenceCache::Append(size_t layer, const float* keys, const float* values) {
  AsBatch(this, [&](CacheBatch& batch) { batch.Append(layer, keys, values); });
}

void SequenceCache::Attend(size_t layer, const float* queries, float* out) {
  AsBatch(this, [&](CacheBatch& batch) { batch.Attend(layer, queries, out); });
}

// Methods that cut at a prompt's end do so when its step ends; between the chunks of a prompt nothing waits.
void SequenceCache::EndPrompt() { CHECK(!impl_->in_step, "a prompt cannot end in the middle of a step"); }

const CacheConfig& SequenceCache::config() const { return *impl_->config; }
size_t SequenceCache::tokens_seen() const { return impl_->tokens_seen; }

CacheStats SequenceCache::Stats() const {
  const PolicyCache& global = impl_->global();
  const auto mean = [&](uint64_t n) {
    return static_cast<double>(n) / static_cast<double>(std::max<size_t>(global.policy.heads.size(), 1));
  };
  CacheStats stats;
  stats.tokens_seen = impl_->tokens_seen;
  stats.tokens_resident = mean(global.Rows());
  stats.tokens_dropped = mean(global.departed[static_cast<size_t>(Fate::kDrop)]);
  stats.tokens_absorbed = mean(global.departed[static_cast<size_t>(Fate::kAbsorb)]);
  stats.tokens_merged = mean(global.departed[static_cast<size_t>(Fate::kMerge)]);
  stats.tokens_offloaded = mean(global.departed[static_cast<size_t>(Fate::kOffload)]);
  stats.kv_bytes = impl_->counter.now;
  stats.kv_bytes_peak = impl_->counter.peak;
  for (const auto& part : impl_->parts) stats.kv_bytes_slack += part->SlackBytes();
  stats.kv_bytes_full = impl_->config->FullBytes(stats.tokens_seen);
  stats.recall = global.store->recall();
  stats.fits = global.fits;
  stats.tokens_resident -= mean(stats.recall.rows_offloaded);
  stats.tokens_offloaded += mean(stats.recall.rows_offloaded);
  return stats;
}

std::vector<Position> SequenceCache::ResidentPositions(size_t layer, size_t kv_head) const {
  const LayerPlace place = impl_->config->place(layer);
  const PolicyCache& part = *impl_->parts[place.policy];
  std::vector<Position> positions;
  if (!part.tracks()) {
    for (size_t i = 0; i < part.store->n_rows(place.layer, kv_head); ++i)
      positions.push_back(Position(static_cast<int32_t>(i)));
    return positions;
  }
  const auto held = part.Ledger(place.layer, kv_head).Positions();
  positions.assign(held.begin(), held.end());
  std::sort(positions.begin(), positions.end());
  return positions;
}

CachePlan CacheConfig::Plan(size_t n_prompt, size_t n_decode) const {
  CachePlan plan = Count(n_prompt, n_decode, false);
  const bool varies = global().selector->SaysHowMany();
  const CachePlan least = varies ? Count(n_prompt, n_decode, true) : plan;
  plan.bytes_end_least = least.bytes_end;
  plan.rows_end_least = least.rows_end;
  return plan;
}

size_t CacheConfig::SharedBytes(size_t n_tokens) const {
  if (!Budgets(1).empty()) return 0;
  SequenceCache::Impl cache({std::shared_ptr<void>(), this});
  cache.counter.only_counts = true;
  std::vector<SharedPart> parts;
  for (auto& part : cache.parts) {
    part->Begin({n_tokens, 0, StepKind::kStream});
    part->CountLayers(false);
    part->store->EndStep();
    part->store->AddShareable(parts);
  }
  return std::accumulate(parts.begin(), parts.end(), size_t{0},
                         [](size_t bytes, const SharedPart& part) { return bytes + part.bytes; });
}

// Steps that allocate and free what real ones do, without memory or text.
CachePlan CacheConfig::Count(size_t n_prompt, size_t n_decode, bool least) const {
  SequenceCache::Impl cache({std::shared_ptr<void>(), this});  // does not own the configuration
  cache.counter.only_counts = true;
  const auto count = [&](size_t n, StepKind kind) {
    for (auto& part : cache.parts) part->Begin({n, cache.tokens_seen, kind});
    for (auto& part : cache.parts) part->CountLayers(least);
    for (auto& part : cache.parts) part->store->EndStep();
    cache.tokens_seen += n;
  };
  if (prefill_chunk_ == 0 && n_prompt > 0) count(n_prompt, StepKind::kPrompt);
  for (size_t done = 0; prefill_chunk_ > 0 && done < n_prompt; done += prefill_chunk_)
    count(std::min(prefill_chunk_, n_prompt - done), StepKind::kStream);
  CachePlan plan;
  plan.bytes_after_prompt = cache.counter.now;
  // Where every head's rows are bounded and leave one by one, decode steps are alike once all heads are full, and what a
  // codec keeps apart is.
  const bool bounded = std::all_of(policies_.begin(), policies_.end(), [](const LayerPolicy& policy) {
    return policy.selector->Bounded() && policy.codec->traits().group_rows == 1 && policy.bunches().rows == 1;
  });
  const CodecTraits codec = cache.global().policy.codec->traits();
  size_t n_first = 0;
  for (size_t alike = 0; n_first < n_decode && !(bounded && alike > codec.apart_rows + codec.window_rows); ++n_first) {
    count(1, StepKind::kDecode);
    const bool full = std::all_of(cache.parts.begin(), cache.parts.end(), [](const auto& part) { return part->IsFull(); });
    alike = full ? alike + 1 : 0;
  }
  plan.bytes_end = cache.counter.now;
  plan.bytes_peak = cache.counter.peak;
  for (const auto& part : cache.parts) plan.bytes_slack += part->SlackBytes();
  const PolicyCache& global = cache.global();
  // Where rows come as the text asks, a head's ledger or last block may move to more room at another moment than here.
  if (global.policy.selector->SaysHowMany() && !global.ledgers.empty())
    plan.bytes_peak += std::max(global.ledgers[0].bytes(), LargestBlock(global.policy));
  size_t rows = global.Rows() - global.store->recall().rows_offloaded;
  for (size_t i = 0; n_decode > n_first && i < global.ledgers.size(); ++i) {
    const size_t held = global.ledgers[i].n_rows;
    rows += global.policy.RowsThatStay(held + n_decode - n_first, std::max(held, global.budgets[i])) - held;
  }
  cache.parts.resize(1);  // frees the local layers
  plan.bytes_local = plan.bytes_end - cache.counter.now;
  plan.rows_end = static_cast<double>(rows) / static_cast<double>(std::max<size_t>(global.policy.heads.size(), 1));
  return plan;
}

}  // namespace lesskv
