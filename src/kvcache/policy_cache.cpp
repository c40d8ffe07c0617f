#include "kvcache/policy_cache.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/checked.h"
#include "base/error.h"
#include "kernels/quants/half.h"
#include "kvcache/eviction.h"

namespace lesskv {

size_t LayerStep::Bytes() const {
  size_t bytes = fit_queries.size() * sizeof(float);
  for (const std::vector<float>& floats : votes) bytes += floats.size() * sizeof(float);
  for (const LedgerSpill& spill : spills)
    bytes += spill.positions.size() * sizeof(Position) + (spill.votes.size() + spill.weights.size()) * sizeof(float);
  return bytes;
}

PolicyCache::PolicyCache(const LayerPolicy& of, ByteCounter& count)
    : policy(of),
      counter(count),
      store(of.codec->MakeStore(count, of.store_shape())),
      ledgers(of.heads.size()),
      has_absorbed(of.layers.size()),
      tracks_(of.selector->Evicts()),
      bounded_(of.selector->Bounded()),
      packs_(of.store_shape().packs),
      says_how_many_(of.selector->SaysHowMany()) {}

std::unique_ptr<PolicyCache> PolicyCache::Clone(ByteCounter& into) const {
  auto copy = std::make_unique<PolicyCache>(policy, into);
  copy->store = store->Clone(into);
  for (size_t i = 0; i < ledgers.size(); ++i) copy->ledgers[i] = ledgers[i].Clone(into);
  copy->states = states.Clone(into);
  copy->kept_queries = kept_queries.Clone(into);
  copy->has_absorbed = has_absorbed;
  copy->budgets = budgets;
  copy->budget_rows_ = budget_rows_;
  copy->departed = departed;
  copy->fits = fits;
  return copy;
}

size_t PolicyCache::Rows() const {
  size_t rows = 0;
  for (size_t l = 0; l < policy.layers.size(); ++l)
    for (size_t h = 0; h < policy.heads.n_heads(l); ++h) rows += store->n_rows(l, h);
  return rows;
}

bool PolicyCache::IsFull() const {
  for (size_t i = 0; i < ledgers.size(); ++i)
    if (budgets.empty() || ledgers[i].n_rows < budgets[i]) return false;
  return true;
}

bool PolicyCache::ReadsState(size_t layer) const {
  if (StateFloats() == 0) return false;
  return has_absorbed[layer] || (policy.residual->ReadsEmptyState() && step.kind != StepKind::kPrompt && step.seen > 0);
}

void PolicyCache::Begin(const StepInfo& info) {
  const bool is_prompt = info.kind == StepKind::kPrompt;
  if (const std::string why = policy.budgeter->WhyNoStream(); info.kind == StepKind::kStream && !why.empty())
    Fail(ErrorCode::kInvalidArgument, "cache spec '{}': {}", policy.name, why);
  const Growth growth = policy.selector->After(info.kind, info.seen + info.n);
  std::vector<size_t> new_budgets = budgets;
  if (growth.evicts && (is_prompt || budgets.empty() || growth.rows != budget_rows_))
    new_budgets = policy.Budgets(growth.rows, is_prompt ? info.seen + info.n : policy.ctx);
  const AllocationScope scope = policy.budgeter->scope();
  const bool later = growth.evicts && is_prompt && scope != AllocationScope::kGiven;
  step = info;
  store->Reserve({info.n, growth.evicts, is_prompt, later && scope == AllocationScope::kModel, new_budgets,
                  later || says_how_many_});
  evicts = growth.evicts;
  decides_budgets = later;
  defers = later && scope == AllocationScope::kModel;
  try {
    ReserveLedgers(new_budgets, !later && !says_how_many_);
    if (StateFloats() > 0 && states.size() == 0)
      states = CountedBuffer(counter, policy.heads.size() * StateFloats() * sizeof(float));
    if (kept_queries.size() == 0 && KeptQueryBytes() > 0) kept_queries = CountedBuffer(counter, KeptQueryBytes());
    deferred.clear();
    if (defers) deferred.resize(policy.layers.size());
  } catch (...) {
    TakeBackRoom(budgets);
    throw;
  }
  previous_budget_rows_ = budget_rows_;
  if (growth.evicts) budget_rows_ = growth.rows;
  previous_budgets_ = std::exchange(budgets, std::move(new_budgets));
}

void PolicyCache::ReserveLedgers(const std::vector<size_t>& new_budgets, bool budgets_known) {
  if (!tracks_) return;
  std::vector<CountedBuffer> freed;  // together, so that a plan's peak does not depend on how rows were divided
  for (size_t i = 0; i < ledgers.size(); ++i) {
    const size_t held = ledgers[i].n_rows, all = held + step.n;
    size_t rows = all;
    if (evicts) rows = budgets_known ? std::max(held, std::min(all, new_budgets[i])) : held;
    ledgers[i].Reserve(counter, rows, budgets_known ? Room(new_budgets, i) : LedgerRoom{0, !bounded_},
                       columns(), packs_ ? &freed : nullptr);
  }
}

LedgerRoom PolicyCache::Room(const std::vector<size_t>& of, size_t head) const {
  return {!of.empty() && (bounded_ || packs_) ? of[head] : 0, !bounded_};
}

void PolicyCache::SetBudgets(size_t first_layer, std::span<const size_t> new_budgets) {
  store->SetBudgets(first_layer, new_budgets);
  const size_t first = policy.heads(first_layer, 0);
  for (size_t i = first; i < first + new_budgets.size(); ++i) {
    budgets[i] = new_budgets[i - first];
    const size_t held = ledgers[i].n_rows;
    ledgers[i].Reserve(counter, std::max(held, std::min(held + step.n, budgets[i])), Room(budgets, i),
                       columns());
  }
}

void PolicyCache::MakeRoom(size_t layer, std::span<const size_t> rows) {
  store->SetBudgets(layer, rows);
  for (size_t h = 0; h < rows.size(); ++h) Ledger(layer, h).Reserve(counter, rows[h], LedgerRoom{0, true}, columns());
}

size_t PolicyCache::SlackBytes() const {
  return store->SlackBytes(says_how_many_ ? std::span<const size_t>() : budgets);
}

void PolicyCache::KeepBudgets(size_t layer) {
  if (says_how_many_) return MakeRoom(layer, RowsLeft(layer, false));
  if (!decides_budgets || (defers && layer > 0)) return;
  const std::vector<size_t> even = budgets;
  const size_t n = defers ? even.size() : policy.heads.n_heads(layer);
  SetBudgets(layer, std::span(even).subspan(policy.heads(layer, 0), n));
}

void PolicyCache::TakeRestoredBudgets(size_t tokens_seen) {
  for (const StepKind kind : {StepKind::kPrompt, StepKind::kStream, StepKind::kDecode})
    if (const Growth growth = policy.selector->After(kind, tokens_seen); growth.evicts) budget_rows_ = growth.rows;
}

// Frees what Begin reserved; `old_budgets` are those of the step before.
void PolicyCache::TakeBackRoom(const std::vector<size_t>& old_budgets) {
  store->CancelStep();
  for (size_t i = 0; i < ledgers.size(); ++i)
    ledgers[i].Shrink(counter, Room(old_budgets, i), columns());
  if (step.seen == 0) states = CountedBuffer(), kept_queries = CountedBuffer();
}

void PolicyCache::Cancel() {
  budgets = std::move(previous_budgets_);
  budget_rows_ = previous_budget_rows_;
  FreeInputScores();
  TakeBackRoom(budgets);
}

void PolicyCache::End() {
  if (defers) CutDeferred(*this);
  store->EndStep();
  deferred.clear();
  FreeInputScores();
  // A head whose budget became smaller gives its room back.
  for (size_t i = 0; i < ledgers.size() && packs_ && evicts && step.kind == StepKind::kPrompt; ++i)
    ledgers[i].Shrink(counter, Room(budgets, i), columns());
}

size_t PolicyCache::FitQueryFloats(size_t layer) const {
  const size_t most = ResidualFits().n_queries;
  return most == 0 ? 0 : CeilDiv(step.n, CeilDiv(step.n, most)) * policy.layers[layer].q_dim();
}

size_t PolicyCache::KeptQueryBytes() const {
  size_t numbers = 0;
  for (const LayerShape& layer : policy.layers) numbers += policy.bunches().n_kept() * layer.q_dim();
  return numbers * sizeof(uint16_t);
}

// A position's place follows from the position: those of any bunch of tokens have places of their own.
size_t PolicyCache::KeptQueryAt(size_t layer, size_t position) const {
  const Bunches bunches = policy.bunches();
  size_t at = position / bunches.apart() % bunches.n_kept() * policy.layers[layer].q_dim();
  for (size_t l = 0; l < layer; ++l) at += bunches.n_kept() * policy.layers[l].q_dim();
  return at;
}

void PolicyCache::KeepQueries(size_t layer, size_t first, size_t n, const float* rows) {
  const Bunches bunches = policy.bunches();
  const size_t width = policy.layers[layer].q_dim(), end = step.seen + step.n;
  for (size_t i = 0; i < n; ++i) {
    const size_t position = step.seen + first + i;
    if (position % bunches.apart() != 0 || position + bunches.rows < end) continue;
    uint16_t* to = kept_queries.As<uint16_t>().data() + KeptQueryAt(layer, position);
    for (size_t c = 0; c < width; ++c) to[c] = FloatToHalf(rows[i * width + c]);
  }
}

std::vector<float> PolicyCache::KeptQueries(size_t layer) const {
  const Bunches bunches = policy.bunches();
  const size_t width = policy.layers[layer].q_dim(), end = step.seen + step.n;
  std::vector<float> queries;
  for (size_t position = end - std::min(end, bunches.rows); position < end; ++position) {
    if (position % bunches.apart() != 0) continue;
    const uint16_t* from = kept_queries.As<uint16_t>().data() + KeptQueryAt(layer, position);
    for (size_t c = 0; c < width; ++c) queries.push_back(HalfToFloat(from[c]));
  }
  return queries;
}

// Rows of a layer's heads after a step in which as many leave as must, or as may.
std::vector<size_t> PolicyCache::RowsLeft(size_t layer, bool least) const {
  std::vector<size_t> rows;
  for (size_t h = 0; h < policy.heads.n_heads(layer); ++h) {
    const size_t all = store->n_rows(layer, h) + step.n;
    rows.push_back(!evicts ? all
                   : least ? std::min(all, policy.RowsThatAlwaysStay(step.seen + step.n))
                           : policy.RowsThatStay(all, budgets[policy.heads(layer, h)]));
  }
  return rows;
}

void PolicyCache::CountLayers(bool least) {
  CHECK(counter.only_counts);
  CountedBytes waiting;
  if (defers) {
    const Votes votes = policy.selector->votes();
    size_t bytes = 0;
    for (size_t i = 0; i < ledgers.size(); ++i) {
      const bool first = i == policy.heads(policy.heads.LayerOf(i), 0);
      const bool has_votes = votes == Votes::kKept || (votes == Votes::kStep && (first || !policy.keeps_one_set()));
      const size_t n_columns = (has_votes ? 1 : 0) + (columns().weights ? 1 : 0);
      bytes += (ledgers[i].n_rows + step.n) * (sizeof(Position) + n_columns * sizeof(float));
    }
    for (size_t layer = 0; layer < policy.layers.size(); ++layer) bytes += FitQueryFloats(layer) * sizeof(float);
    waiting = CountedBytes(counter, bytes);
  }
  std::vector<Departure> leaving;
  for (size_t layer = 0; layer < policy.layers.size(); ++layer) {
    const std::vector<size_t> staying = RowsLeft(layer, least && says_how_many_);
    if (says_how_many_)
      MakeRoom(layer, staying);
    else
      KeepBudgets(layer);
    for (size_t h = 0; h < policy.heads.n_heads(layer); ++h) {
      HeadLedger& ledger = Ledger(layer, h);
      const size_t all = store->n_rows(layer, h) + step.n;
      leaving.clear();
      for (size_t row = staying[h]; row < all; ++row)
        leaving.push_back({static_cast<uint32_t>(row), Fate::kDrop});
      const SlotMap map = store->Close(layer, h, leaving);
      if (tracks_) ledger.n_rows = map.n_rows;
    }
  }
}

}  // namespace lesskv
