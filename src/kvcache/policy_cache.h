// One sequence's state of the layers of one policy: rows, who is where, residual states, budgets. What happens to it in
// a step is written apart: cache_batch.cpp attends, eviction.cpp observes, cuts and closes, cache_state.cpp saves.
// Internal to this folder.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvcache/cache_config.h"
#include "kvcache/ledger.h"

namespace lesskv {

// A step in progress.
struct StepInfo {
  size_t n = 0;     // its tokens
  size_t seen = 0;  // tokens before it
  StepKind kind = StepKind::kDecode;
};

// Rows of one head that are absorbed, read and rotated to their true positions.
struct AbsorbedRows {
  std::vector<float> keys, values, weights;
};

// What is known of one layer of one sequence between its attention and its close. Work memory, used again for the next
// layer; where layers wait for the model's budgets, one a layer.
struct LayerStep {
  std::vector<std::vector<int32_t>> read_positions;  // a KV head, or one for all; empty where keys are stored rotated
  std::vector<const int32_t*> read_pointers;         // a KV head
  std::vector<std::vector<float>> attention, measured;  // a KV head: what selector and budgeter observe
  std::vector<float> fit_queries;                       // FitRule: [at most n_queries, n_heads, head_dim], unrotated
  std::vector<std::vector<float>> votes;                // a KV head: Votes::kStep
  std::vector<LedgerSpill> spills;                      // a KV head
  std::vector<LedgerRows> ledger_rows;                  // a KV head
  std::vector<HeadRows> heads;
  LayerRows rows;
  VictimLists victims;
  std::vector<std::vector<Departure>> departures;  // a KV head
  std::vector<AbsorbedRows> absorbed;              // a KV head
  std::vector<EvictedRows> evicted;                // of these, what is to be absorbed before the layer closes
  CountedBytes counted;                            // of a layer that waits

  size_t Bytes() const;  // of votes, positions and queries
};

class PolicyCache {
 public:
  PolicyCache(const LayerPolicy& policy, ByteCounter& counter);
  std::unique_ptr<PolicyCache> Clone(ByteCounter& counter) const;

  // Reserves what the step can need in every layer; throws Error and changes nothing if it cannot be had.
  void Begin(const StepInfo& info);
  // Takes back a Begin before anything was appended.
  void Cancel();
  // After all layers of the step were closed. Deferred layers are cut here.
  void End();

  // Whether positions of rows are kept: where a token can leave at all.
  bool tracks() const { return tracks_; }
  size_t StateFloats() const { return policy.residual == nullptr ? 0 : policy.residual->StateFloats(); }
  float* State(size_t head) { return states.As<float>().data() + head * StateFloats(); }
  HeadLedger& Ledger(size_t layer, size_t kv_head) { return ledgers[policy.heads(layer, kv_head)]; }
  const HeadLedger& Ledger(size_t layer, size_t kv_head) const { return ledgers[policy.heads(layer, kv_head)]; }
  size_t Rows() const;  // of all heads
  // Whether every head holds all the rows that its budget allows.
  bool IsFull() const;
  LedgerColumns columns() const {
    return {policy.selector->votes() == Votes::kKept, policy.weights() != Weights::kNone};
  }
  // The growth law's rows that budgets divide.
  size_t budget_rows() const { return budget_rows_; }
  // What the selector, and the budgeter, observe of the step in progress.
  Observation SelectorObserves() const { return evicts ? policy.selector->Observes(step.kind) : Observation{}; }
  // How the residual fits rows in the step in progress.
  FitRule ResidualFits() const { return evicts && policy.residual != nullptr ? policy.residual->Fits(step.kind) : FitRule{}; }
  Observation BudgeterMeasures() const { return decides_budgets ? policy.budgeter->Measures() : Observation{}; }
  // Whether the step in progress, shorter than a bunch of rows, is fitted on queries that were kept (Bunches).
  bool FitsKeptQueries() const { return step.kind != StepKind::kPrompt && step.n < policy.bunches().rows; }
  // Those of the step's tokens [first, first + n) that later fits of a layer may need: rows [n, n_heads, head_dim],
  // unrotated.
  void KeepQueries(size_t layer, size_t first, size_t n, const float* rows);
  std::vector<float> KeptQueries(size_t layer) const;  // of the last bunch of tokens, in order
  size_t KeptQueryBytes() const;
  bool ReadsState(size_t layer) const;
  // Budgets decided during the step: of a layer, or, where all layers wait, of all of them.
  void SetBudgets(size_t first_layer, std::span<const size_t> new_budgets);
  // The same where nothing decides and the even ones stay: called before each layer is closed.
  void KeepBudgets(size_t layer);
  // Where the selector says how many rows stay: room for them, [n_kv_heads of the layer], before the layer is closed.
  void MakeRoom(size_t layer, std::span<const size_t> rows);
  // Rows beyond the budgets' and the resident ones' needs (KvStore::SlackBytes).
  size_t SlackBytes() const;
  // The room that a head's ledger has under these budgets ([heads], or none yet).
  LedgerRoom Room(const std::vector<size_t>& of, size_t head) const;
  // Budgets were restored: they hold until the growth law changes or a prompt comes, as where they were saved.
  void TakeRestoredBudgets(size_t tokens_seen);
  // The layers of a step of a plan, which has no text and no memory, between Begin and the store's EndStep: allocates and
  // frees what real ones do; as many rows leave as must, or as may where the `least` is asked for.
  void CountLayers(bool least);

  const LayerPolicy& policy;
  ByteCounter& counter;
  std::unique_ptr<KvStore> store;
  std::vector<HeadLedger> ledgers;    // [heads]
  CountedBuffer states;               // residual states, float [heads, StateFloats()]
  CountedBuffer kept_queries;         // f16, a layer after the other [Bunches::n_kept(), n_heads, head_dim]
  std::vector<uint8_t> has_absorbed;  // a layer: some state is not empty
  std::vector<size_t> budgets;        // [heads]; empty until a step evicts
  std::array<uint64_t, kFates> departed = {};  // rows that left, by fate
  FitStats fits;

  // The step in progress.
  StepInfo step;
  bool evicts = false;
  bool decides_budgets = false;  // during the step
  bool defers = false;           // at its end, for all layers
  std::vector<std::unique_ptr<LayerStep>> deferred;  // [n_layers]
  std::vector<float> input_scores;  // [n_kv_heads, n] of the layer that comes next: Selector::ReadsInputs

 private:
  std::vector<size_t> RowsLeft(size_t layer, bool least) const;
  void ReserveLedgers(const std::vector<size_t>& new_budgets, bool budgets_known);
  void TakeBackRoom(const std::vector<size_t>& old_budgets);

  // Work memory of the step, uncounted: given back, not only emptied.
  void FreeInputScores() { std::vector<float>().swap(input_scores); }
  size_t FitQueryFloats(size_t layer) const;
  size_t KeptQueryAt(size_t layer, size_t position) const;  // index in kept_queries

  bool tracks_ = false;
  bool bounded_ = false, packs_ = false, says_how_many_ = false;
  size_t budget_rows_ = 0;
  std::vector<size_t> previous_budgets_;
  size_t previous_budget_rows_ = 0;
};

}  // namespace lesskv
