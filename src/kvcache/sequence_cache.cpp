#include "kvcache/sequence_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"
#include "kvcache/sequence_cache_impl.h"

namespace lesskv {
namespace {

// Queries (and keys) rotated and attended at a time: bounds the work memory of long steps.
constexpr size_t kTileQueries = 512;
// Evicted rows absorbed at a time, a head.
constexpr size_t kAbsorbRows = 512;

// Work memory of the calling thread, shared by all sequences: nothing in it outlives a call, except what Attend leaves
// for its own Commit.
struct Workspace {
  std::vector<float> rotated;                  // keys or queries of a tile
  std::vector<float> lse;                      // [n_kv_heads][n_tile, group]
  std::vector<float> residual_out, residual_lse;  // [n_tile, n_heads, head_dim], [n_tile, n_heads]
  std::vector<std::vector<float>> attention;  // a KV head: [n_rows]
  std::vector<int32_t> positions, read_positions;
  std::vector<LedgerSpill> spills;  // a KV head
  std::vector<LedgerRows> rows;     // a KV head
  VictimLists victims;
};

Workspace& Work() {
  thread_local Workspace workspace;
  return workspace;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------- lifecycle

void SequenceCache::Impl::Begin(size_t n_tokens, StepKind step_kind) {
  CHECK(!in_step, "a step is in progress");
  CHECK(n_tokens > 0);
  if (tokens_seen + n_tokens > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    Fail(ErrorCode::kInvalidArgument, "a sequence cannot have more than 2^31 - 1 tokens");
  std::vector<size_t> new_budgets = budgets;
  if (step_kind == StepKind::kPrompt) new_budgets = config->Budgets(tokens_seen + n_tokens);
  else if (budgets.empty()) new_budgets = config->Budgets(shape.ctx);

  const bool step_evicts = selector.Rows() > 0 && selector.Evicts(step_kind);
  store->Reserve({n_tokens, step_evicts, step_kind == StepKind::kPrompt, new_budgets});
  try {
    ReserveLedgers(n_tokens, step_evicts, new_budgets);
    if (StateFloats() > 0 && states.size() == 0)
      states = CountedBuffer(counter, ledgers.size() * StateFloats() * sizeof(float));
  } catch (...) {
    TakeBackRoom(budgets);
    throw;
  }
  previous_budgets = std::exchange(budgets, std::move(new_budgets));
  n_step = n_tokens;
  kind = step_kind;
  evicts = step_evicts;
  in_step = true;
}

void SequenceCache::Impl::ReserveLedgers(size_t n_tokens, bool step_evicts, const std::vector<size_t>& new_budgets) {
  if (selector.Rows() == 0) return;
  for (size_t i = 0; i < ledgers.size(); ++i) {
    const size_t all = ledgers[i].n_rows + n_tokens;
    ledgers[i].Reserve(counter, step_evicts ? std::max(ledgers[i].n_rows, std::min(all, new_budgets[i])) : all,
                       selector.Evicts(StepKind::kDecode) ? new_budgets[i] : 0, selector.KeepsScores());
  }
}

// Frees what Begin reserved; `old_budgets` are those of the step before.
void SequenceCache::Impl::TakeBackRoom(const std::vector<size_t>& old_budgets) {
  store->CancelStep();
  const bool fixed = selector.Evicts(StepKind::kDecode) && !old_budgets.empty();
  for (size_t i = 0; i < ledgers.size(); ++i)
    ledgers[i].Shrink(counter, fixed ? old_budgets[i] : 0, selector.KeepsScores());
  if (tokens_seen == 0) states = CountedBuffer();
}

void SequenceCache::Impl::End() {
  CHECK(in_step, "no step is in progress");
  store->EndStep();
  tokens_seen += n_step;
  in_step = false;
}

void SequenceCache::Impl::Cancel() {
  CHECK(in_step, "no step is in progress");
  budgets = std::move(previous_budgets);
  TakeBackRoom(budgets);
  in_step = false;
}

// ---------------------------------------------------------------------------------------------------------- attention

void SequenceCache::Impl::Append(size_t layer, const float* keys, const float* values) {
  Workspace& work = Work();
  const size_t stride = shape.n_kv_heads * shape.head_dim;
  for (size_t first = 0; first < n_step; first += kTileQueries) {
    const size_t n = std::min(kTileQueries, n_step - first);
    const float* tile = keys + first * stride;
    if (!selector.UsesCachePositions()) {
      work.rotated.assign(tile, tile + n * stride);
      work.positions.resize(n);
      for (size_t i = 0; i < n; ++i) work.positions[i] = static_cast<int32_t>(tokens_seen + first + i);
      RotateRows(shape.rope, work.rotated.data(), n, stride, shape.n_kv_heads, shape.head_dim, work.positions.data());
      tile = work.rotated.data();
    }
    store->Append(layer, first, n, tile, values + first * stride);
  }
}

void SequenceCache::Impl::Attend(size_t layer, const float* queries, float* out) {
  if (selector.UsesCachePositions()) ComputeReadPositions(layer);
  if (evicts && selector.Observes(kind).queries != Observation::Queries::kNone) {
    Work().attention.resize(shape.n_kv_heads);
    for (size_t h = 0; h < shape.n_kv_heads; ++h) {
      const size_t n = store->n_rows(layer, h) + n_step;
      if (n_step > kTileQueries) Work().attention[h].assign(n, 0.0f);  // tiles add to it
      else Work().attention[h].resize(n);                              // the only tile overwrites it
    }
  }
  const size_t stride = shape.n_heads * shape.head_dim;
  for (size_t first = 0; first < n_step; first += kTileQueries) {
    const size_t n = std::min(kTileQueries, n_step - first);
    AttendTile(layer, queries + first * stride, first, n, out + first * stride);
  }
  if (evicts) Commit(layer);
  else if (selector.Rows() > 0) {
    for (size_t h = 0; h < shape.n_kv_heads; ++h) Ledger(layer, h).AppendNew(tokens_seen, n_step);
  }
}

// Index of the first query of the step that the selector wants to see; n_step when it wants none.
size_t SequenceCache::Impl::FirstObserved() const {
  if (!evicts) return n_step;
  const Observation wanted = selector.Observes(kind);
  switch (wanted.queries) {
    case Observation::Queries::kNone: return n_step;
    case Observation::Queries::kAll: return 0;
    case Observation::Queries::kLast: return n_step - std::min(n_step, wanted.last);
  }
  CHECK(false, "unknown observation");
}

void SequenceCache::Impl::AttendTile(size_t layer, const float* queries, size_t first, size_t n, float* out) {
  Workspace& work = Work();
  const size_t stride = shape.n_heads * shape.head_dim;
  work.rotated.assign(queries, queries + n * stride);
  work.positions.resize(n);
  const bool relative = selector.UsesCachePositions();
  // Cache-relative: query i of the step reads at the position of its own key, behind the resident rows.
  const size_t base = relative ? store->n_rows(layer, 0) : tokens_seen;
  for (size_t i = 0; i < n; ++i) work.positions[i] = static_cast<int32_t>(base + first + i);
  RotateRows(shape.rope, work.rotated.data(), n, stride, shape.n_heads, shape.head_dim, work.positions.data());

  work.lse.resize(n * shape.n_heads);
  StoreQuery query;
  query.layer = layer;
  query.queries = work.rotated.data();
  query.first_query = first;
  query.n_queries = n;
  query.read_positions = relative ? work.read_positions.data() : nullptr;
  query.out = out;
  query.lse = work.lse.data();
  std::vector<float*> sums;
  const size_t first_observed = FirstObserved();
  if (first_observed < first + n)
    for (auto& attention : work.attention) sums.push_back(attention.data());
  if (n_step == 1) query.received = sums;
  store->Attend(query);
  if (n_step > 1 && !sums.empty())
    store->AddColumnSums(query, first_observed > first ? first_observed - first : 0, sums);
  if (ReadsState(layer)) MergeResidual(layer, work.rotated.data(), n, out);
}

// The rank by position of every resident row, then the step's own rows behind them.
void SequenceCache::Impl::ComputeReadPositions(size_t layer) {
  Workspace& work = Work();
  const HeadLedger& ledger = Ledger(layer, 0);  // all heads hold the same rows
  const std::span<const Position> positions = ledger.Positions();
  std::vector<uint32_t> order(positions.size());
  for (uint32_t r = 0; r < order.size(); ++r) order[r] = r;
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return ToInt(positions[a]) < ToInt(positions[b]); });
  work.read_positions.resize(positions.size() + n_step);
  for (uint32_t rank = 0; rank < order.size(); ++rank) work.read_positions[order[rank]] = static_cast<int32_t>(rank);
  for (size_t i = positions.size(); i < work.read_positions.size(); ++i)
    work.read_positions[i] = static_cast<int32_t>(i);
}

// Adds the residual state's part to `out` under one normaliser with the exact rows.
void SequenceCache::Impl::MergeResidual(size_t layer, const float* rotated, size_t n, float* out) {
  Workspace& work = Work();
  const size_t n_heads = shape.n_heads, d = shape.head_dim, group = shape.group();
  work.residual_out.resize(n * n_heads * d);
  work.residual_lse.resize(n * n_heads);
  std::vector<const float*> head_states;
  for (size_t h = 0; h < shape.n_kv_heads; ++h) head_states.push_back(State(layer, h));
  residual->Attend(layer, rotated, n, head_states, work.residual_out.data(), work.residual_lse.data());
  ParallelFor(n_heads, [&](size_t head) {
    const size_t h = head / group, g = head % group;
    for (size_t m = 0; m < n; ++m) {
      const size_t at = m * n_heads + head;
      Merge(out + at * d, &work.lse[(h * n + m) * group + g], &work.residual_out[at * d], work.residual_lse[at], d);
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- eviction

// Observes the layer, lets the selector choose, folds what leaves into the residual state, and closes the ranks.
void SequenceCache::Impl::Commit(size_t layer) {
  Workspace& work = Work();
  std::vector<HeadRows> heads;
  const LayerRows rows = GatherRows(layer, heads);
  work.victims.resize(shape.n_kv_heads);
  for (auto& list : work.victims) list.clear();
  selector.Choose(rows, work.victims);
  if (residual != nullptr) Absorb(layer, work.victims);
  const auto commit = [&](size_t h) {
    const auto& victims = work.victims[h];
    CHECK(victims.size() == heads[h].n_leaving(), "{} rows leave where {} must", victims.size(), heads[h].n_leaving());
    HeadLedger& ledger = Ledger(layer, h);
    const Compaction compaction = PlanCompaction(ledger.n_rows, n_step, victims);
    store->Commit(layer, h, compaction);
    ledger.Apply(compaction, work.rows[h]);
  };
  if (n_step > 1) return ParallelFor(shape.n_kv_heads, commit);
  for (size_t h = 0; h < shape.n_kv_heads; ++h) commit(h);  // a row each: less than waking a thread
}

LayerRows SequenceCache::Impl::GatherRows(size_t layer, std::vector<HeadRows>& heads) {
  Workspace& work = Work();
  const size_t n_kv = shape.n_kv_heads;
  heads.resize(n_kv);
  work.spills.resize(n_kv);
  work.rows.resize(n_kv);
  const bool observed = selector.Observes(kind).queries != Observation::Queries::kNone;
  for (size_t h = 0; h < n_kv; ++h) {
    work.rows[h] = Ledger(layer, h).Gather(tokens_seen, n_step, selector.KeepsScores(), work.spills[h]);
    heads[h].budget = budgets[layer * n_kv + h];
    heads[h].positions = work.rows[h].positions;
    heads[h].scores = work.rows[h].scores;
    if (observed) heads[h].attention = work.attention[h];
  }
  LayerRows rows;
  rows.layer = layer;
  rows.kind = kind;
  rows.group = shape.group();
  rows.tokens_seen = tokens_seen + n_step;
  rows.n_step = n_step;
  rows.n_observed_queries = n_step - FirstObserved();
  rows.protect = &config->protect_;
  rows.heads = heads;
  return rows;
}

void SequenceCache::Impl::Absorb(size_t layer, const VictimLists& victims) {
  size_t most = 0;
  for (const auto& list : victims) most = std::max(most, list.size());
  const size_t d = shape.head_dim;
  std::vector<std::vector<float>> keys(victims.size()), values(victims.size());
  for (size_t first = 0; first < most; first += kAbsorbRows) {
    std::vector<EvictedRows> evicted(victims.size());
    ParallelFor(victims.size(), [&](size_t h) {
      if (first >= victims[h].size()) return;
      const auto rows = std::span(victims[h]).subspan(first, std::min(kAbsorbRows, victims[h].size() - first));
      keys[h].resize(rows.size() * d);
      values[h].resize(rows.size() * d);
      store->ReadRows(layer, h, rows, keys[h].data(), values[h].data());
      evicted[h] = {h, rows.size(), keys[h].data(), values[h].data(), State(layer, h)};
    });
    std::erase_if(evicted, [](const EvictedRows& rows) { return rows.n_rows == 0; });
    residual->Absorb(layer, evicted);
    has_absorbed[layer] = 1;
  }
}

// --------------------------------------------------------------------------------------------------------------- plans

// A step that allocates and frees what a real one does, without memory or text: as many rows leave as must.
void SequenceCache::Impl::CountStep(size_t n_tokens, StepKind step_kind) {
  CHECK(counter.only_counts);
  Begin(n_tokens, step_kind);
  for (size_t i = 0; i < ledgers.size(); ++i) {
    if (!evicts) {
      if (selector.Rows() > 0) ledgers[i].AppendNew(tokens_seen, n_step);
      continue;
    }
    ledgers[i].n_rows = std::min(ledgers[i].n_rows + n_step, budgets[i]);
    store->Commit(i / shape.n_kv_heads, i % shape.n_kv_heads, {ledgers[i].n_rows, {}});
  }
  End();
}

CachePlan CacheConfig::Plan(size_t n_prompt, size_t n_decode) const {
  SequenceCache::Impl cache({std::shared_ptr<void>(), this});  // does not own the configuration
  cache.counter.only_counts = true;
  if (prefill_chunk_ == 0 && n_prompt > 0) cache.CountStep(n_prompt, StepKind::kPrompt);
  for (size_t done = 0; prefill_chunk_ > 0 && done < n_prompt; done += prefill_chunk_)
    cache.CountStep(std::min(prefill_chunk_, n_prompt - done), StepKind::kStream);
  CachePlan plan;
  plan.bytes_after_prompt = cache.counter.now;
  // Where every head's rows are bounded, the first decode step is like all others.
  const bool bounded = selector_->Rows() > 0 && selector_->Evicts(StepKind::kDecode);
  for (size_t done = 0; done < (bounded ? std::min<size_t>(n_decode, 1) : n_decode); ++done)
    cache.CountStep(1, StepKind::kDecode);
  plan.bytes_end = cache.counter.now;
  plan.bytes_peak = cache.counter.peak;
  size_t rows = cache.Rows();
  for (size_t i = 0; bounded && n_decode > 1 && i < cache.ledgers.size(); ++i) {
    const size_t held = cache.ledgers[i].n_rows;
    rows += std::min(held + n_decode - 1, std::max(held, cache.budgets[i])) - held;
  }
  plan.rows_end = static_cast<double>(rows) / static_cast<double>(cache.ledgers.size());
  return plan;
}

// ------------------------------------------------------------------------------------------------------ public surface

SequenceCache::SequenceCache(std::shared_ptr<const CacheConfig> config)
    : impl_(std::make_unique<Impl>(std::move(config))) {}
SequenceCache::SequenceCache(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SequenceCache::~SequenceCache() = default;

std::unique_ptr<SequenceCache> SequenceCache::Clone() const {
  CHECK(!impl_->in_step, "a cache cannot be cloned in the middle of a step");
  auto copy = std::make_unique<Impl>(impl_->config);
  copy->store = impl_->store->Clone(copy->counter);
  for (size_t i = 0; i < copy->ledgers.size(); ++i) copy->ledgers[i] = impl_->ledgers[i].Clone(copy->counter);
  copy->states = impl_->states.Clone(copy->counter);
  copy->has_absorbed = impl_->has_absorbed;
  copy->budgets = impl_->budgets;
  copy->tokens_seen = impl_->tokens_seen;
  return std::unique_ptr<SequenceCache>(new SequenceCache(std::move(copy)));
}

void SequenceCache::BeginStep(size_t n_tokens, StepKind kind) { impl_->Begin(n_tokens, kind); }
void SequenceCache::Append(size_t layer, const float* keys, const float* values) {
  impl_->Append(layer, keys, values);
}
void SequenceCache::Attend(size_t layer, const float* queries, float* out) { impl_->Attend(layer, queries, out); }
void SequenceCache::CancelStep() { impl_->Cancel(); }
void SequenceCache::EndStep() { impl_->End(); }

// No method of this build acts across layers at a prompt's end; those that cut do so layer by layer in Commit.
void SequenceCache::EndPrompt() { CHECK(!impl_->in_step, "a prompt cannot end in the middle of a step"); }

const CacheConfig& SequenceCache::config() const { return *impl_->config; }
size_t SequenceCache::tokens_seen() const { return impl_->tokens_seen; }

CacheStats SequenceCache::Stats() const {
  const CacheShape& shape = impl_->shape;
  CacheStats stats;
  stats.tokens_seen = impl_->tokens_seen;
  stats.tokens_resident = static_cast<double>(impl_->Rows()) / static_cast<double>(impl_->ledgers.size());
  stats.kv_bytes = impl_->counter.now;
  stats.kv_bytes_peak = impl_->counter.peak;
  stats.kv_bytes_full = stats.tokens_seen * shape.n_layers * shape.n_kv_heads * shape.head_dim * 2 * sizeof(uint16_t);
  return stats;
}

std::vector<Position> SequenceCache::ResidentPositions(size_t layer, size_t kv_head) const {
  std::vector<Position> positions;
  if (impl_->selector.Rows() == 0) {
    for (size_t i = 0; i < impl_->store->n_rows(layer, kv_head); ++i) positions.push_back(Position(static_cast<int32_t>(i)));
    return positions;
  }
  const auto held = impl_->Ledger(layer, kv_head).Positions();
  positions.assign(held.begin(), held.end());
  std::sort(positions.begin(), positions.end());
  return positions;
}

std::vector<std::byte> SequenceCache::Serialize() const {
  CHECK(!impl_->in_step, "a cache cannot be saved in the middle of a step");
  ByteWriter out;
  out.Put<uint64_t>(impl_->tokens_seen);
  out.Put<uint64_t>(impl_->budgets.size());
  for (size_t budget : impl_->budgets) out.Put<uint64_t>(budget);
  impl_->store->Save(out);
  for (const HeadLedger& ledger : impl_->ledgers) ledger.Save(out);
  out.Raw(impl_->has_absorbed.data(), impl_->has_absorbed.size());
  out.Put<uint64_t>(impl_->states.size());
  out.Raw(impl_->states.data(), impl_->states.size());
  return std::move(out.bytes);
}

// Budgets read from a file: some division of what the configuration allows, with room for what always stays.
void SequenceCache::Impl::CheckBudgets() const {
  const size_t n_protected = config->protect_.CountFrom(static_cast<int32_t>(selector.Sinks()));
  size_t total = 0, allowed = 0;
  for (size_t budget : config->Budgets(shape.ctx)) allowed += budget;
  for (size_t i = 0; i < budgets.size(); ++i) {
    const size_t own = std::max(selector.Window(budgets[i]), selector.Sinks());
    if (own + n_protected > budgets[i] || budgets[i] == 0)
      Fail(ErrorCode::kBadFile, "saved cache: a budget of {} rows does not hold the {} that always stay", budgets[i],
           own + n_protected);
    if (selector.KeepsOneSetALayer() && budgets[i] != budgets[i / shape.n_kv_heads * shape.n_kv_heads])
      Fail(ErrorCode::kBadFile, "saved cache: the heads of a layer have different budgets");
    total += budgets[i];
  }
  if (total != allowed)
    Fail(ErrorCode::kBadFile, "saved cache: budgets of {} rows in all where this spec has {}", total, allowed);
}

void SequenceCache::Impl::CheckSets() const {
  if (!selector.KeepsOneSetALayer()) return;
  for (size_t i = 0; i < ledgers.size(); ++i) {
    const auto first = ledgers[i / shape.n_kv_heads * shape.n_kv_heads].Positions(), own = ledgers[i].Positions();
    if (!std::equal(own.begin(), own.end(), first.begin(), first.end()))
      Fail(ErrorCode::kBadFile, "saved cache: the heads of a layer hold different tokens");
  }
}

void SequenceCache::Restore(const std::byte* data, size_t size) {
  auto fresh = std::make_unique<Impl>(impl_->config);
  ByteReader in{{data, size}};
  fresh->tokens_seen = in.Count(std::numeric_limits<int32_t>::max(), "the number of tokens seen");
  const size_t n_heads = fresh->ledgers.size();
  const size_t n_budgets = in.Count(n_heads, "the number of budgets");
  const bool bounded = fresh->selector.Rows() > 0;
  if (n_budgets != (bounded && fresh->tokens_seen > 0 ? n_heads : 0))
    Fail(ErrorCode::kBadFile, "saved cache: {} budgets do not fit this model and spec", n_budgets);
  for (size_t i = 0; i < n_budgets; ++i)
    fresh->budgets.push_back(in.Count(fresh->selector.Rows() * fresh->shape.n_layers, "a budget"));
  if (n_budgets > 0) fresh->CheckBudgets();
  const std::vector<size_t> none(n_heads, 0);
  fresh->store->Load(in, n_budgets == 0 ? none : fresh->budgets, fresh->tokens_seen);
  for (size_t i = 0; i < n_heads; ++i) {
    const size_t n_rows = fresh->store->n_rows(i / fresh->shape.n_kv_heads, i % fresh->shape.n_kv_heads);
    const size_t fixed = bounded && n_budgets > 0 && fresh->selector.Evicts(StepKind::kDecode) ? fresh->budgets[i] : 0;
    fresh->ledgers[i].Load(in, fresh->counter, bounded ? n_rows : 0, fixed, fresh->selector.KeepsScores(),
                           fresh->tokens_seen);
  }
  if (bounded) fresh->CheckSets();
  in.Raw(fresh->has_absorbed.data(), fresh->has_absorbed.size());
  const size_t state_bytes = n_heads * fresh->StateFloats() * sizeof(float);
  const size_t saved = in.Count(state_bytes, "the residual state's bytes");
  if (saved != (fresh->tokens_seen > 0 ? state_bytes : 0))
    Fail(ErrorCode::kBadFile, "saved cache: a residual state of another size");
  if (saved > 0) {
    fresh->states = CountedBuffer(fresh->counter, state_bytes);
    in.Raw(fresh->states.data(), state_bytes);
    for (float x : fresh->states.As<float>())
      if (!std::isfinite(x)) Fail(ErrorCode::kBadFile, "saved cache: the residual state has a value that is not finite");
  }
  if (!in.rest.empty()) Fail(ErrorCode::kBadFile, "saved cache: {} bytes too many", in.rest.size());
  impl_ = std::move(fresh);
}

}  // namespace lesskv
