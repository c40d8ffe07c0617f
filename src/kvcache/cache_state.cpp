// A cache's state as bytes: what a session file holds between its header and its checksum. docs/formats.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/error.h"
#include "kvcache/sequence_cache_impl.h"

namespace lesskv {
namespace {

void SavePart(const PolicyCache& part, ByteWriter& out) {
  out.Put<uint64_t>(part.budgets.size());
  for (const size_t budget : part.budgets) out.Put<uint64_t>(budget);
  for (const uint64_t n : part.departed) out.Put<uint64_t>(n);
  part.store->Save(out);
  for (const HeadLedger& ledger : part.ledgers) ledger.Save(out);
  out.Raw(part.has_absorbed.data(), part.has_absorbed.size());
  out.Put<uint64_t>(part.states.size());
  out.Raw(part.states.data(), part.states.size());
  out.Raw(part.kept_queries.data(), part.kept_queries.size());
}

// Budgets read from a file: some division of what the configuration allows, with room for what always stays.
void CheckBudgets(const PolicyCache& part, size_t tokens_seen) {
  const LayerPolicy& policy = part.policy;
  const Selector& selector = *policy.selector;
  const size_t n_protected = policy.protect.CountFrom(static_cast<int32_t>(selector.Sinks()));
  for (size_t i = 0; i < part.budgets.size(); ++i) {
    const size_t behind_sinks = selector.Sinks() > 0 ? selector.Sinks() + 1 : 0;
    const size_t own = std::min(std::max(selector.Window(part.budgets[i]), behind_sinks), policy.ctx);
    if (own + n_protected > part.budgets[i])
      Fail(ErrorCode::kBadFile, "saved cache: a budget of {} rows does not hold the {} that always stay",
           part.budgets[i], own + n_protected);
    const size_t first = policy.heads(policy.heads.LayerOf(i), 0);
    if (policy.keeps_one_set() && part.budgets[i] != part.budgets[first])
      Fail(ErrorCode::kBadFile, "saved cache: the heads of a layer have different budgets");
  }
  const auto sum = [](const std::vector<size_t>& rows) { return std::accumulate(rows.begin(), rows.end(), size_t{0}); };
  size_t most = 0;  // the growth law's largest so far
  for (const StepKind kind : {StepKind::kPrompt, StepKind::kStream, StepKind::kDecode})
    if (const Growth growth = selector.After(kind, tokens_seen); growth.evicts)
      most = std::max(most, sum(policy.Budgets(growth.rows, policy.ctx)));
  if (selector.Bounded() ? sum(part.budgets) != most : sum(part.budgets) > most)
    Fail(ErrorCode::kBadFile, "saved cache: budgets of {} rows in all where this spec has {}", sum(part.budgets), most);
}

void CheckSets(const PolicyCache& part) {
  if (!part.policy.keeps_one_set()) return;
  const HeadTable& heads = part.policy.heads;
  for (size_t i = 0; i < heads.size(); ++i) {
    const auto first = part.ledgers[heads(heads.LayerOf(i), 0)].Positions(), own = part.ledgers[i].Positions();
    if (!std::equal(own.begin(), own.end(), first.begin(), first.end()))
      Fail(ErrorCode::kBadFile, "saved cache: the heads of a layer hold different tokens");
  }
}

// Where rows leave in groups, those of a group are neighbours in the text.
void CheckGroups(const PolicyCache& part) {
  const size_t group = part.policy.codec->traits().group_rows;
  for (size_t i = 0; i < part.ledgers.size() && group > 1; ++i) {
    const std::span<const Position> held = part.ledgers[i].Positions();
    for (size_t r = 0; r < held.size(); ++r) {
      const size_t in_group = r % group, position = static_cast<size_t>(ToInt(held[r]));
      const bool next = in_group > 0 ? position == static_cast<size_t>(ToInt(held[r - 1])) + 1
                                     : position % group == 0 && (r == 0 || held[r - 1] < held[r]);
      if (!next) Fail(ErrorCode::kBadFile, "saved cache: a head's tokens are not whole groups of {}", group);
    }
  }
}

void LoadBudgets(PolicyCache& part, ByteReader& in, size_t tokens_seen) {
  const size_t n_heads = part.policy.heads.size();
  const size_t n_budgets = in.Count(n_heads, "the number of budgets");
  const bool may_have = part.tracks() && tokens_seen > 0;
  const bool must_have = may_have && part.policy.selector->Bounded();
  if (n_budgets != n_heads ? n_budgets != 0 || must_have : !may_have && n_heads > 0)
    Fail(ErrorCode::kBadFile, "saved cache: {} budgets do not fit this model and spec", n_budgets);
  for (size_t i = 0; i < n_budgets; ++i) part.budgets.push_back(in.Count(part.policy.ctx * n_heads, "a budget"));
  if (n_budgets == 0) return;
  CheckBudgets(part, tokens_seen);
  part.TakeRestoredBudgets(tokens_seen);
}

void LoadStates(PolicyCache& part, ByteReader& in, size_t tokens_seen) {
  in.Raw(part.has_absorbed.data(), part.has_absorbed.size());
  const size_t state_bytes = part.policy.heads.size() * part.StateFloats() * sizeof(float);
  const size_t saved = in.Count(state_bytes, "the residual state's bytes");
  if (saved != (tokens_seen > 0 ? state_bytes : 0))
    Fail(ErrorCode::kBadFile, "saved cache: a residual state of another size");
  if (saved == 0) return;
  part.states = CountedBuffer(part.counter, state_bytes);
  in.Raw(part.states.data(), state_bytes);
  for (const float x : part.states.As<float>())
    if (!std::isfinite(x)) Fail(ErrorCode::kBadFile, "saved cache: the residual state has a value that is not finite");
}

void LoadPart(PolicyCache& part, ByteReader& in, size_t tokens_seen) {
  const HeadTable& heads = part.policy.heads;
  LoadBudgets(part, in, tokens_seen);
  for (uint64_t& n : part.departed) n = in.Count(tokens_seen * heads.size(), "the number of tokens that left");
  part.store->Load(in, part.budgets.empty() ? std::vector<size_t>(heads.size()) : part.budgets, tokens_seen);
  for (size_t layer = 0; layer < heads.n_layers(); ++layer)
    for (size_t h = 0; h < heads.n_heads(layer); ++h)
      part.Ledger(layer, h).Load(in, part.counter, part.tracks() ? part.store->n_rows(layer, h) : 0,
                                 part.Room(part.budgets, heads(layer, h)),
                                 part.tracks() ? part.columns() : LedgerColumns{}, tokens_seen);
  if (part.tracks()) CheckSets(part), CheckGroups(part);
  LoadStates(part, in, tokens_seen);
  if (tokens_seen > 0 && part.KeptQueryBytes() > 0) {
    part.kept_queries = CountedBuffer(part.counter, part.KeptQueryBytes());
    in.Raw(part.kept_queries.data(), part.kept_queries.size());
  }
  const uint64_t left = std::accumulate(part.departed.begin(), part.departed.end(), uint64_t{0});
  if (part.Rows() + left != tokens_seen * heads.size())
    Fail(ErrorCode::kBadFile, "saved cache: {} rows and {} that left are not the tokens seen by {} heads, {}",
         part.Rows(), left, heads.size(), tokens_seen * heads.size());
}

}  // namespace

std::vector<std::byte> SequenceCache::Serialize() const {
  CHECK(!impl_->in_step, "a cache cannot be saved in the middle of a step");
  ByteWriter out;
  out.Put<uint64_t>(impl_->tokens_seen);
  for (const auto& part : impl_->parts) SavePart(*part, out);
  return std::move(out.bytes);
}

void SequenceCache::Restore(const std::byte* data, size_t size) {
  auto fresh = std::make_unique<Impl>(impl_->config);
  ByteReader in{{data, size}};
  fresh->tokens_seen = in.Count(std::numeric_limits<int32_t>::max(), "the number of tokens seen");
  for (auto& part : fresh->parts) LoadPart(*part, in, fresh->tokens_seen);
  if (!in.rest.empty()) Fail(ErrorCode::kBadFile, "saved cache: {} bytes too many", in.rest.size());
  impl_ = std::move(fresh);
}

}  // namespace lesskv
