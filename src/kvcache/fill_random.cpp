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

struct SequenceCache::Impl::RandomFill {
  RandomFill(Impl& of, size_t n, uint64_t seed) : cache(of), n_tokens(n), rng(seed) {
    const size_t chunk = cache.config->prefill_chunk();
    kind = chunk == 0 ? StepKind::kPrompt : StepKind::kStream;
    if (chunk > 0) last_chunk = (n - 1) % chunk + 1;
    step_rows = chunk == 0 ? kFillRows : std::min(chunk, kFillRows);
    evicts = cache.selector.Rows() > 0 && cache.selector.Evicts(kind);
    cache.budgets = cache.config->Budgets(kind == StepKind::kPrompt ? n : cache.shape.ctx);
    stride = cache.shape.n_kv_heads * cache.shape.head_dim;
    for (std::vector<float>* pool : {&keys, &values}) {
      pool->resize((kPoolRows + kFillRows) * stride);
      for (float& x : *pool) x = rng.Normal();
    }
    ChooseTokens();
  }

  size_t Staying(size_t head) const { return evicts ? std::min(n_tokens, cache.budgets[head]) : n_tokens; }

  // Positions that stay, ascending, a head; the same for all heads of a layer where the selector keeps one set.
  void ChooseTokens() {
    for (size_t i = 0; i < cache.ledgers.size(); ++i) most_rows = std::max(most_rows, Staying(i));
    if (!evicts) return;
    for (size_t i = 0; i < cache.ledgers.size(); ++i) {
      const bool first = i % cache.shape.n_kv_heads == 0;
      tokens.push_back(!first && cache.selector.KeepsOneSetALayer() ? tokens.back() : ChooseTokens(i));
    }
  }

  std::vector<Position> ChooseTokens(size_t head) {
    const size_t rows = Staying(head), sinks = cache.selector.Sinks();
    const size_t recent = cache.selector.Window(cache.budgets[head]) - std::min(sinks, rows);
    std::vector<Position> chosen;
    const auto always = [&](size_t p) {
      return p < sinks || p + recent >= n_tokens || cache.config->protect_.Contains(Position(static_cast<int32_t>(p)));
    };
    // Who observes nothing knows positions only, and keeps the newest.
    const bool by_position = cache.selector.Observes(StepKind::kDecode).queries == Observation::Queries::kNone &&
                             cache.selector.Observes(kind).queries == Observation::Queries::kNone;
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

  void Step(size_t done, size_t n) {
    cache.store->Reserve({n, evicts, kind == StepKind::kPrompt, cache.budgets});
    cache.ReserveLedgers(n, evicts, cache.budgets);
    for (size_t layer = 0; layer < cache.shape.n_layers; ++layer) {
      const size_t at = rng.Below(kPoolRows) * stride;
      cache.store->Append(layer, 0, n, keys.data() + at, values.data() + at);
      for (size_t h = 0; h < cache.shape.n_kv_heads; ++h) CommitHead(layer, h, done, n);
    }
    cache.store->EndStep();
  }

  // The step's first rows stay as long as the head has room.
  void CommitHead(size_t layer, size_t h, size_t done, size_t n) {
    HeadLedger& ledger = cache.Ledger(layer, h);
    if (!evicts) {
      if (cache.selector.Rows() > 0) ledger.AppendNew(done, n);
      return;
    }
    const size_t head = layer * cache.shape.n_kv_heads + h, held = ledger.n_rows;
    const size_t stay = std::min(n, tokens[head].size() - held);
    std::vector<uint32_t> leave;
    for (size_t i = stay; i < n; ++i) leave.push_back(static_cast<uint32_t>(held + i));
    LedgerSpill spill;
    const LedgerRows rows = ledger.Gather(0, n, cache.selector.KeepsScores(), spill);
    std::copy_n(tokens[head].begin() + static_cast<ptrdiff_t>(held), stay,
                rows.positions.begin() + static_cast<ptrdiff_t>(held));
    for (size_t i = held; i < rows.scores.size(); ++i) rows.scores[i] = rng.UniformFloat(0.01f, 1.0f);
    const Compaction compaction = PlanCompaction(held, n, leave);
    cache.store->Commit(layer, h, compaction);
    ledger.Apply(compaction, rows);
  }

  void Absorb(size_t layer) {
    std::vector<EvictedRows> evicted;
    const size_t d = cache.shape.head_dim;
    for (size_t h = 0; h < cache.shape.n_kv_heads; ++h) {
      const size_t left = n_tokens - Staying(layer * cache.shape.n_kv_heads + h);
      if (left > 0)
        evicted.push_back({h, std::min(left, kAbsorbed), keys.data() + rng.Below(kPoolRows) * d,
                           values.data() + rng.Below(kPoolRows) * d, cache.State(layer, h)});
    }
    if (evicted.empty()) return;
    cache.residual->Absorb(layer, evicted);
    cache.has_absorbed[layer] = 1;
  }

  void Run() {
    if (cache.StateFloats() > 0)
      cache.states = CountedBuffer(cache.counter, cache.ledgers.size() * cache.StateFloats() * sizeof(float));
    for (size_t done = 0; done < most_rows; done += step_rows) Step(done, std::min(step_rows, most_rows - done));
    if (evicts && kind == StepKind::kStream) {  // a chunk's staging area stays until the next step
      cache.store->Reserve({last_chunk, true, false, cache.budgets});
      cache.store->EndStep();
    }
    for (size_t layer = 0; layer < cache.shape.n_layers && evicts && cache.residual != nullptr; ++layer) Absorb(layer);
    cache.tokens_seen = n_tokens;
  }

  Impl& cache;
  size_t n_tokens;
  Rng rng;
  StepKind kind;
  size_t last_chunk = 0, step_rows = 0, stride = 0, most_rows = 0;
  bool evicts = false;
  std::vector<float> keys, values;            // [kPoolRows + kFillRows, n_kv_heads, head_dim]
  std::vector<std::vector<Position>> tokens;  // [n_layers * n_kv_heads]; empty when all stay
};

void SequenceCache::Impl::FillRandom(size_t n_tokens, uint64_t seed) {
  CHECK(!in_step && tokens_seen == 0 && n_tokens > 0, "only a new cache can be filled");
  if (n_tokens > shape.ctx)
    Fail(ErrorCode::kInvalidArgument, "{} tokens do not fit the context of {}", n_tokens, shape.ctx);
  RandomFill(*this, n_tokens, seed).Run();
}

void SequenceCache::FillRandom(size_t n_tokens, uint64_t seed) { impl_->FillRandom(n_tokens, seed); }

}  // namespace lesskv
