#include "kvcache/eviction.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/threads.h"
#include "kvcache/fit.h"
#include "kernels/basic/rope.h"

namespace lesskv {
namespace {

constexpr size_t kAbsorbRows = 512;   // evicted rows absorbed at a time, a head;
constexpr size_t kWaitingRows = 64;   // so few wait for those of other sequences

// Calls body(h) for the KV heads of a layer. One token a head is less work than waking a thread.
template <typename Body>
void ForHeads(const PolicyCache& cache, size_t layer, Body&& body) {
  const size_t n = cache.policy.heads.n_heads(layer);
  if (cache.step.n > 1) return ParallelFor(n, body);
  for (size_t h = 0; h < n; ++h) body(h);
}

// What a selector is told of a layer beside its heads' rows.
void DescribeLayer(const PolicyCache& cache, size_t layer, LayerStep& work) {
  const LayerPolicy& policy = cache.policy;
  LayerRows& rows = work.rows;
  rows = {};
  rows.layer = layer;
  rows.kind = cache.step.kind;
  rows.group = policy.layers[layer].group();
  rows.tokens_seen = cache.step.seen + cache.step.n;
  rows.n_step = cache.step.n;
  rows.window = policy.selector->Window(cache.budget_rows());
  rows.sinks = policy.selector->Sinks();
  rows.apart = policy.codec->traits().apart_rows;
  rows.votes_accumulate = policy.selector->votes() == Votes::kKept && !policy.selector->ReadsInputs();
  rows.protect = &policy.protect;
  rows.heads = work.heads;
}

// Rows as the selector sees them, before anything is observed.
void GatherRows(PolicyCache& cache, size_t layer, LayerStep& work) {
  const LayerPolicy& policy = cache.policy;
  const Votes votes = policy.selector->votes();
  const size_t n_kv = policy.heads.n_heads(layer);
  work.heads.assign(n_kv, {});
  if (cache.defers) work.votes.clear(), work.spills.clear();  // what waits, and is counted, is this layer's alone
  work.spills.resize(n_kv);
  work.ledger_rows.resize(n_kv);
  work.votes.resize(n_kv);
  if (policy.selector->ReadsInputs() && cache.input_scores.size() != n_kv * cache.step.n)
    Fail(ErrorCode::kInvalidArgument, "'{}' needs what enters layer {}, which was not read (KvCache::ReadInputs)", policy.name,
         policy.model_layers[layer]);
  const bool observed = cache.SelectorObserves().wanted(), measured = cache.BudgeterMeasures().wanted();
  for (size_t h = 0; h < n_kv; ++h) {
    HeadRows& head = work.heads[h];
    LedgerRows& rows = work.ledger_rows[h];
    rows = cache.Ledger(layer, h).Gather(cache.step.seen, cache.step.n, cache.columns(), !cache.decides_budgets, work.spills[h]);
    head.budget = cache.budgets[policy.heads(layer, h)];
    if (policy.bunches().rows > 1 && rows.positions.size() > head.budget)
      head.budget = policy.RowsThatStay(rows.positions.size(), head.budget);
    head.positions = rows.positions;
    head.votes = rows.votes;
    head.weights = rows.weights;
    if (policy.selector->ReadsInputs())
      std::copy_n(&cache.input_scores[h * cache.step.n], cache.step.n, rows.votes.end() - static_cast<ptrdiff_t>(cache.step.n));
    if (votes == Votes::kStep && (h == 0 || !policy.keeps_one_set())) {
      work.votes[h].resize(rows.positions.size());
      head.votes = work.votes[h];
    }
    if (observed) head.attention = work.attention[h];
    if (measured) head.measured = work.measured[h];
  }
  DescribeLayer(cache, layer, work);
}

// Calls body(h) for the heads that a selector decides on: one for all where the layer keeps one set.
template <typename Body>
void ForDecidingHeads(const PolicyCache& cache, size_t layer, Body&& body) {
  if (cache.policy.keeps_one_set()) return body(size_t{0});
  const size_t n = cache.policy.heads.n_heads(layer);
  ParallelFor(n, body);
}

void ClearVictims(const PolicyCache& cache, size_t layer, LayerStep& work) {
  work.victims.resize(cache.policy.heads.n_heads(layer));
  for (auto& list : work.victims) list.clear();
}

void ShareVictims(const PolicyCache& cache, LayerStep& work) {
  if (!cache.policy.keeps_one_set()) return;
  for (size_t h = 1; h < work.victims.size(); ++h) {
    CHECK(work.heads[h].budget == work.heads[0].budget, "heads of a layer that keeps one set have one budget");
    work.victims[h] = work.victims[0];
  }
}

// One KV head as its groups: what a selector sees that must choose whole ones. A group stands at its newest position; its
// vote is the sum of its rows'. Groups with a row that must stay are left out, and so are those that reach into the
// selector's own window: it counts groups here and could not tell. Where that leaves too few, because groups are coarse,
// the oldest ones of the window may leave.
struct GroupedHead {
  std::vector<uint32_t> numbers;
  std::vector<Position> positions;
  std::vector<float> votes;
  HeadRows head;

  GroupedHead(const PolicyCache& cache, const HeadRows& rows, size_t n_grouped, size_t group) {
    const Selector& selector = *cache.policy.selector;
    const auto newest = [&](uint32_t g) {
      return *std::max_element(&rows.positions[g * group], &rows.positions[(g + 1) * group - 1] + 1);
    };
    const auto stays = [&](Position p) {
      return cache.policy.protect.Contains(p) || ToInt(p) < static_cast<int32_t>(selector.Sinks());
    };
    for (uint32_t g = 0; g < n_grouped / group; ++g)
      if (std::none_of(&rows.positions[g * group], &rows.positions[(g + 1) * group - 1] + 1, stays)) numbers.push_back(g);
    std::sort(numbers.begin(), numbers.end(), [&](uint32_t a, uint32_t b) { return newest(a) < newest(b); });
    const size_t recent = selector.Window(rows.budget) - std::min(selector.Sinks(), selector.Window(rows.budget));
    const auto window_from = static_cast<int32_t>(cache.step.seen + cache.step.n) - static_cast<int32_t>(recent);
    const auto old = std::partition_point(numbers.begin(), numbers.end(),
                                          [&](uint32_t g) { return ToInt(newest(g)) < window_from; });
    const size_t leaving = std::min(CeilDiv(rows.n_leaving(), group), numbers.size());
    numbers.resize(std::max(leaving, static_cast<size_t>(old - numbers.begin())));
    std::sort(numbers.begin(), numbers.end());
    for (const uint32_t g : numbers) {
      positions.push_back(newest(g));
      if (!rows.votes.empty())
        votes.push_back(std::accumulate(&rows.votes[g * group], &rows.votes[(g + 1) * group - 1] + 1, 0.0f));
    }
    head.budget = numbers.size() - leaving;
    head.positions = positions;
    head.votes = votes;
  }
};

// The rows that leave one head, after Observe.
void ChooseHead(const PolicyCache& cache, size_t layer, LayerStep& work, size_t h) {
  const Selector& selector = *cache.policy.selector;
  if (work.heads[h].n_leaving() == 0 && !selector.SaysHowMany()) return;
  const size_t group = cache.policy.codec->traits().group_rows;
  if (group == 1) return selector.Choose(work.rows, h, work.victims[h]);
  const GroupedHead grouped(cache, work.heads[h], cache.store->GroupedRows(layer, h), group);
  std::vector<uint32_t> groups(grouped.numbers.size());
  std::iota(groups.begin(), groups.end(), 0u);
  if (grouped.head.budget > 0 && grouped.head.n_leaving() > 0) {
    std::vector<HeadRows> heads(work.heads.size(), grouped.head);
    LayerRows rows = work.rows;
    rows.heads = heads;
    groups.clear();
    selector.Choose(rows, h, groups);
  }
  for (const uint32_t g : groups)
    for (size_t r = 0; r < group; ++r)
      work.victims[h].push_back(static_cast<uint32_t>(grouped.numbers[g] * group + r));
}

std::vector<size_t> LayerBudgets(const PolicyCache& cache, size_t layer) {
  std::vector<size_t> budgets;
  for (size_t h = 0; h < cache.policy.heads.n_heads(layer); ++h)
    budgets.push_back(cache.budgets[cache.policy.heads(layer, h)]);
  return budgets;
}

void TakeBudgets(LayerStep& work, std::span<const size_t> budgets) {
  for (size_t h = 0; h < budgets.size(); ++h) work.heads[h].budget = budgets[h];
}

// A budgeter only divides what there is.
void CheckSum(const std::vector<size_t>& before, const std::vector<size_t>& after) {
  const size_t was = std::accumulate(before.begin(), before.end(), size_t{0});
  const size_t is = std::accumulate(after.begin(), after.end(), size_t{0});
  CHECK(was == is, "a budgeter made {} rows of {}", is, was);
}

void Choose(PolicyCache& cache, size_t layer, LayerStep& work) {
  ClearVictims(cache, layer, work);
  ForDecidingHeads(cache, layer, [&](size_t h) { ChooseHead(cache, layer, work, h); });
  ShareVictims(cache, work);
}

// Room for what the selector leaves in each head.
void MakeRoom(PolicyCache& cache, size_t layer, const LayerStep& work) {
  std::vector<size_t> rows;
  for (size_t h = 0; h < work.victims.size(); ++h) rows.push_back(work.heads[h].n_rows() - work.victims[h].size());
  cache.MakeRoom(layer, rows);
}

// What the selector let go becomes departures, with the fate that the residual gives them.
void Decide(PolicyCache& cache, size_t layer, LayerStep& work) {
  const Residual* residual = cache.policy.residual.get();
  const Fate usual = cache.StateFloats() > 0 ? Fate::kAbsorb : Fate::kDrop;
  work.departures.resize(work.victims.size());
  for (size_t h = 0; h < work.victims.size(); ++h) {
    const HeadRows& head = work.heads[h];
    const size_t n = work.victims[h].size(), must = head.n_leaving();
    CHECK(n == must || (n > must && cache.policy.selector->SaysHowMany()) || cache.policy.codec->traits().group_rows > 1,
          "{} rows leave where {} must", n, must);
    work.departures[h].clear();
    for (const uint32_t row : work.victims[h]) work.departures[h].push_back({row, usual});
  }
  ForHeads(cache, layer, [&](size_t h) {
    if (work.departures[h].empty()) return;
    cache.policy.selector->Decide(work.rows, h, work.departures[h]);
    if (residual != nullptr) residual->Decide(work.rows, h, work.departures[h]);
  });
  for (const auto& list : work.departures)
    for (const Departure& departure : list) ++cache.departed[static_cast<size_t>(departure.fate)];
}

// Rows of a head, read and rotated to their true positions.
void ReadAbsorbed(const PolicyCache& cache, size_t layer, size_t h, std::span<const uint32_t> rows, const HeadRows& head,
                  AbsorbedRows& out) {
  const LayerShape& shape = cache.policy.layers[layer];
  out.keys.resize(rows.size() * shape.head_dim);
  out.values.resize(rows.size() * shape.head_dim);
  cache.store->ReadRows(layer, h, rows, out.keys.data(), out.values.data());
  out.weights.clear();
  for (size_t i = 0; i < rows.size() && !head.weights.empty(); ++i) out.weights.push_back(head.weights[rows[i]]);
  if (!cache.policy.unrotated_keys()) return;
  std::vector<int32_t> positions;
  for (const uint32_t row : rows) positions.push_back(ToInt(head.positions[row]));
  RotateRows(*shape.rope, out.keys.data(), rows.size(), shape.head_dim, 1, shape.head_dim, positions.data());
}

void AbsorbWaiting(PolicyCache& cache, size_t layer, LayerStep& work) {
  if (!work.evicted.empty()) cache.policy.residual->Absorb(layer, work.evicted);
  work.evicted.clear();
}

// Absorbs what leaves; the last few rows of each head are left to wait in work.evicted.
void Absorb(PolicyCache& cache, size_t layer, LayerStep& work) {
  const size_t n_kv = work.departures.size();
  std::vector<std::vector<uint32_t>> rows(n_kv);
  size_t most = 0;
  for (size_t h = 0; h < n_kv; ++h) {
    for (const Departure& departure : work.departures[h])
      if (departure.fate == Fate::kAbsorb) rows[h].push_back(departure.row);
    most = std::max(most, rows[h].size());
  }
  work.absorbed.resize(n_kv);
  for (size_t first = 0; first < most; first += kAbsorbRows) {
    work.evicted.assign(n_kv, {});
    ForHeads(cache, layer, [&](size_t h) {
      if (first >= rows[h].size()) return;
      const auto some = std::span(rows[h]).subspan(first, std::min(kAbsorbRows, rows[h].size() - first));
      AbsorbedRows& own = work.absorbed[h];
      ReadAbsorbed(cache, layer, h, some, work.heads[h], own);
      work.evicted[h] = {h, some.size(), own.keys.data(), own.values.data(), cache.State(cache.policy.heads(layer, h)),
                         own.weights.empty() ? nullptr : own.weights.data()};
    });
    std::erase_if(work.evicted, [](const EvictedRows& evicted) { return evicted.n_rows == 0; });
    cache.has_absorbed[layer] = 1;
    if (most - first > kWaitingRows) AbsorbWaiting(cache, layer, work);
  }
}

// What leaves of a layer whose rows were observed and whose victims are named.
void Cut(PolicyCache& cache, size_t layer, LayerStep& work) {
  Decide(cache, layer, work);
  if (cache.StateFloats() > 0) Absorb(cache, layer, work);
}

void CloseCut(PolicyCache& cache, size_t layer, LayerStep& work) {
  work.absorbed.clear();  // much of a long prompt
  FitKept(cache, layer, work);
  ForHeads(cache, layer, [&](size_t h) {
    const SlotMap map = cache.store->Close(layer, h, work.departures[h]);
    cache.Ledger(layer, h).Apply(map, work.ledger_rows[h]);
  });
}

void CloseWhole(PolicyCache& cache, size_t layer) {
  ForHeads(cache, layer, [&](size_t h) {
    cache.store->Close(layer, h, {});
    if (cache.tracks()) cache.Ledger(layer, h).AppendNew(cache.step.seen, cache.step.n);
  });
}

}  // namespace

void CutLayer(PolicyCache& cache, size_t layer, LayerStep& work) {
  work.evicted.clear();
  if (!cache.evicts) return;
  const Selector& selector = *cache.policy.selector;
  GatherRows(cache, layer, work);
  if (!cache.decides_budgets) {  // the usual case: observed and cut in one go
    ClearVictims(cache, layer, work);
    ForDecidingHeads(cache, layer, [&](size_t h) {
      selector.Observe(work.rows, h);
      ChooseHead(cache, layer, work, h);
    });
    ShareVictims(cache, work);
    if (selector.SaysHowMany()) MakeRoom(cache, layer, work);
    return Cut(cache, layer, work);
  }
  ForDecidingHeads(cache, layer, [&](size_t h) { selector.Observe(work.rows, h); });
  if (cache.BudgeterMeasures().wanted()) work.rows.need = cache.policy.budgeter->Need(work.rows);
  if (cache.defers) {
    work.measured.clear();  // only what they came to is kept
    work.attention.clear();
    for (HeadRows& head : work.heads) head.measured = head.attention = {};
    cache.deferred[layer] = std::make_unique<LayerStep>(std::exchange(work, {}));
    LayerStep& kept = *cache.deferred[layer];
    kept.rows.heads = kept.heads;
    kept.counted = CountedBytes(cache.counter, kept.Bytes());
    return;
  }
  const std::vector<size_t> before = LayerBudgets(cache, layer);
  std::vector<size_t> budgets = before;
  cache.policy.budgeter->AllocateLayer(work.rows, budgets);
  CheckSum(before, budgets);
  cache.SetBudgets(layer, budgets);
  TakeBudgets(work, budgets);
  Choose(cache, layer, work);
  Cut(cache, layer, work);
}

void CloseLayer(PolicyCache& cache, size_t layer, LayerStep& work) {
  if (!cache.evicts) return CloseWhole(cache, layer);
  if (!cache.defers) CloseCut(cache, layer, work);
}

void CutDeferred(PolicyCache& cache) {
  const LayerPolicy& policy = cache.policy;
  std::vector<LayerRows> layers;
  for (const auto& work : cache.deferred) layers.push_back(work->rows);
  std::vector<size_t> budgets = cache.budgets;
  policy.budgeter->AllocateModel(policy.Request(policy.selector->After(cache.step.kind, cache.step.seen + cache.step.n).rows,
                                                cache.step.seen + cache.step.n),
                                 layers, budgets);
  CheckSum(cache.budgets, budgets);
  cache.SetBudgets(0, budgets);
  for (size_t layer = 0; layer < policy.layers.size(); ++layer) {
    LayerStep& work = *cache.deferred[layer];
    TakeBudgets(work, {&budgets[policy.heads(layer, 0)], policy.heads.n_heads(layer)});
    Choose(cache, layer, work);
    Cut(cache, layer, work);
    AbsorbWaiting(cache, layer, work);
    CloseCut(cache, layer, work);
    cache.deferred[layer].reset();
  }
}

}  // namespace lesskv
