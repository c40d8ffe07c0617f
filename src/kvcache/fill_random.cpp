// A cache at some depth without a prompt. Rows go through the store like those of real steps, kFillRows at a time, and
// what must leave at the end of a step leaves; only the choice of the rows that stay is random: the selector's sinks and
// window and the caller's protected tokens stay, the others are drawn from all positions in between (the newest ones where
// the selector goes by position alone).
#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/error.h"
#include "base/rng.h"
#include "kvcache/sequence_cache_impl.h"

namespace lesskv {
namespace {

constexpr size_t kFillRows = 512;   // rows of a step; fewer when the spec's chunk is smaller
constexpr size_t kPoolRows = 1024;  // distinct random rows: neither zero nor denormal, which is all that speed can see
constexpr size_t kAbsorbed = 64;    // tokens a head that are absorbed, at most

}  // namespace

// Fills the layers of one policy.
struct SequenceCache::RandomFill {
  RandomFill(PolicyCache& of, size_t chunk, size_t n, Rng& random) : part(of), policy(of.policy), n_tokens(n), rng(random) {
    kind = chunk == 0 ? StepKind::kPrompt : StepKind::kStream;
    if (chunk > 0) last_chunk = (n - 1) % chunk + 1;
    step_rows = chunk == 0 ? kFillRows : std::min(chunk, kFillRows);
    group = policy.codec->traits().group_rows;
    evicts = policy.selector->EvictsIn(kind);
    for (const LayerShape& layer : policy.layers) widest = std::max(widest, layer.kv_dim());
    for (std::vector<float>* pool : {&keys, &values}) {
      pool->resize((kPoolRows + kFillRows) * widest);
      for (float& x : *pool) x = rng.Normal();
    }
    ChooseTokens();
  }

  StepInfo Info(size_t n, size_t seen) const { return {n, seen, kind}; }
  size_t Budget(size_t head) const { return budgets[head]; }
  size_t Staying(size_t head) const { return evicts ? policy.RowsThatStay(n_tokens, Budget(head)) : n_tokens; }

  // Positions that stay, ascending, a head; the same for all heads of a layer where the selector keeps one set.
  void ChooseTokens() {
    if (evicts) {
      const Growth growth = policy.selector->After(kind, n_tokens);
      budgets = policy.Budgets(growth.rows, kind == StepKind::kPrompt ? n_tokens : policy.ctx);
    }
    // What leaves last leaves at the fill's end, so that each head has been as full as it would have been.
    const size_t together = std::max(group, policy.bunches().rows);
    for (size_t i = 0; i < policy.heads.size(); ++i)
      most_rows = std::max(most_rows, Staying(i) + (Staying(i) < n_tokens ? together : 0));
    if (!evicts) return;
    for (size_t i = 0; i < policy.heads.size(); ++i) {
      const bool first = i == policy.heads(policy.heads.LayerOf(i), 0);
      tokens.push_back(!first && policy.keeps_one_set() ? tokens.back() : ChooseTokens(i));
    }
  }

  bool Votes(const Selector& selector) const {
    return selector.Observes(StepKind::kDecode).wanted() || selector.Observes(kind).wanted() || selector.ReadsInputs();
  }

  // Whole groups where the codec has such: those with tokens that must stay, the newest ones, and any others.
  std::vector<Position> ChooseGroups(size_t head) {
    const Selector& selector = *policy.selector;
    const size_t n_groups = n_tokens / group, leave = (n_tokens - Staying(head)) / group;
    const size_t window = std::min(policy.codec->traits().window_rows, Budget(head) / 2);
    const auto stays = [&](size_t p) {
      return p < selector.Sinks() || p + window >= n_tokens || policy.protect.Contains(Position(static_cast<int32_t>(p)));
    };
    std::vector<size_t> others;
    for (size_t g = 0; g < n_groups; ++g) {
      bool may_leave = true;
      for (size_t p = g * group; p < (g + 1) * group; ++p) may_leave = may_leave && !stays(p);
      if (may_leave) others.push_back(g);
    }
    CHECK(leave <= others.size(), "{} groups must leave, {} may", leave, others.size());
    const bool by_position = !Votes(selector);
    std::vector<char> leaves(n_groups + 1);
    for (size_t i = 0, left = leave; i < others.size() && left > 0; ++i) {
      if (!by_position && rng.Below(others.size() - i) >= left) continue;
      leaves[others[i]] = 1;
      --left;
    }
    std::vector<Position> chosen;
    for (size_t p = 0; p < n_tokens; ++p)
      if (!leaves[p / group]) chosen.push_back(Position(static_cast<int32_t>(p)));
    return chosen;
  }

  std::vector<Position> ChooseTokens(size_t head) {
    if (group > 1) return ChooseGroups(head);
    const Selector& selector = *policy.selector;
    const size_t rows = Staying(head), sinks = selector.Sinks();
    const size_t recent = selector.Window(Budget(head)) - std::min(sinks, rows);
    std::vector<Position> chosen;
    const auto always = [&](size_t p) {
      return p < sinks || p + recent >= n_tokens || policy.protect.Contains(Position(static_cast<int32_t>(p)));
    };
    // Who sees nothing else knows positions only, and keeps the newest.
    const bool by_position = !Votes(selector);
    size_t may_stay = 0, must_stay = 0;
    for (size_t p = 0; p < n_tokens; ++p) ++(always(p) ? must_stay : may_stay);
    CHECK(must_stay <= rows, "{} tokens must stay in {} rows", must_stay, rows);
    size_t free_rows = rows - must_stay;
    for (size_t p = 0; p < n_tokens; ++p) {
      const bool drawn = by_position ? may_stay <= free_rows : may_stay > 0 && rng.Below(may_stay) < free_rows;
      const bool stays = always(p) || drawn;
      if (stays) chosen.push_back(Position(static_cast<int32_t>(p)));
      if (always(p)) continue;
      --may_stay;
      if (stays) --free_rows;
    }
    return chosen;
  }

  // `seen` is what the step is told, so that its growth law and budgets are those of the whole fill.
  void Step(size_t done, size_t n) {
    part.Begin(Info(n, n_tokens - n));
    for (size_t layer = 0; layer < policy.layers.size(); ++layer) {
      const size_t at = rng.Below(kPoolRows) * policy.layers[layer].kv_dim();
      part.store->Append(layer, 0, n, keys.data() + at, values.data() + at);
      part.KeepBudgets(layer);
      for (size_t h = 0; h < policy.heads.n_heads(layer); ++h) CloseHead(layer, h, done, n);
    }
    part.store->EndStep();
  }

  // Rows of a head after a step that brings it to so many: in whole groups fewer than stay in the end.
  size_t StayingAfter(size_t head, size_t all) const {
    const size_t most = tokens[head].size();
    return all <= most ? all : most - ((most + group - all % group) % group);
  }

  // The step's first rows stay as long as the head has room; of groups the last ones that may leave do.
  void CloseHead(size_t layer, size_t h, size_t done, size_t n) {
    HeadLedger& ledger = part.Ledger(layer, h);
    if (!evicts) {
      part.store->Close(layer, h, {});
      if (part.tracks()) ledger.AppendNew(done, n);
      return;
    }
    const std::vector<Position>& staying = tokens[policy.heads(layer, h)];
    const size_t held = ledger.n_rows, all = held + n, stay = StayingAfter(policy.heads(layer, h), done + n);
    const size_t end = group > 1 ? part.store->GroupedRows(layer, h) : all;
    std::vector<Departure> leave;
    for (size_t i = end - (all - stay); i < end; ++i) leave.push_back({static_cast<uint32_t>(i), Fate::kDrop});
    LedgerSpill spill;
    const LedgerRows rows = ledger.Gather(0, n, part.columns(), !part.decides_budgets, spill);
    for (size_t i = 0, kept = 0; i < all; ++i)
      if (i < end - (all - stay) || i >= end) rows.positions[i] = staying[kept++];
    for (size_t i = held; i < rows.votes.size(); ++i) rows.votes[i] = rng.UniformFloat(0.01f, 1.0f);
    ledger.Apply(part.store->Close(layer, h, leave), rows);
  }

  void Absorb(size_t layer) {
    std::vector<EvictedRows> evicted;
    const size_t d = policy.layers[layer].head_dim;
    for (size_t h = 0; h < policy.heads.n_heads(layer); ++h) {
      const size_t head = policy.heads(layer, h), left = n_tokens - Staying(head);
      part.departed[static_cast<size_t>(part.StateFloats() > 0 ? Fate::kAbsorb : Fate::kDrop)] += left;
      if (left > 0 && part.StateFloats() > 0)
        evicted.push_back({h, std::min(left, kAbsorbed), keys.data() + rng.Below(kPoolRows) * d,
                           values.data() + rng.Below(kPoolRows) * d, part.State(head)});
    }
    if (evicted.empty()) return;
    policy.residual->Absorb(layer, evicted);
    part.has_absorbed[layer] = 1;
  }

  void Run() {
    for (size_t done = 0; done < most_rows; done += step_rows) Step(done, std::min(step_rows, most_rows - done));
    // A chunk's staging area stays until the next step; where a head keeps all, the last step was that chunk.
    const bool was_chunk = most_rows == n_tokens && (n_tokens - 1) % step_rows + 1 == last_chunk;
    if (evicts && kind == StepKind::kStream && !was_chunk) {
      part.store->Reserve({last_chunk, true, false, false, part.budgets, policy.selector->SaysHowMany()});
      part.store->EndStep();
    }
    for (size_t layer = 0; layer < policy.layers.size() && evicts; ++layer) Absorb(layer);
  }

  PolicyCache& part;
  const LayerPolicy& policy;
  size_t n_tokens;
  Rng& rng;
  StepKind kind;
  size_t last_chunk = 0, step_rows = 0, group = 1, widest = 0, most_rows = 0;
  bool evicts = false;
  std::vector<size_t> budgets;
  std::vector<float> keys, values;            // [kPoolRows + kFillRows, widest layer's n_kv_heads * head_dim]
  std::vector<std::vector<Position>> tokens;  // [heads]; empty when all stay
};

void SequenceCache::FillRandom(size_t n_tokens, uint64_t seed) {
  CHECK(!impl_->in_step && impl_->tokens_seen == 0 && n_tokens > 0, "only a new cache can be filled");
  const size_t ctx = impl_->config->shape().ctx;
  if (n_tokens > ctx) Fail(ErrorCode::kInvalidArgument, "{} tokens do not fit the context of {}", n_tokens, ctx);
  Rng rng(seed);
  for (auto& part : impl_->parts) RandomFill(*part, impl_->config->prefill_chunk(), n_tokens, rng).Run();
  impl_->tokens_seen = n_tokens;
}

}  // namespace lesskv
