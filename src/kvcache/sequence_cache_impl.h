// What a SequenceCache is made of. Included by its own source files only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvcache/codec/row_store.h"
#include "kvcache/ledger.h"
#include "kvcache/residual/residual.h"
#include "kvcache/select/selector.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {

struct SequenceCache::Impl {
  explicit Impl(std::shared_ptr<const CacheConfig> c)
      : config(std::move(c)),
        shape(config->shape()),
        selector(*config->selector_),
        residual(config->residual_.get()) {
    const RowStoreOptions options{config->row_types_, selector.Rows() == 0 || !selector.Evicts(StepKind::kDecode)};
    store = std::make_unique<RowStore>(counter, shape, options);
    ledgers.resize(shape.n_layers * shape.n_kv_heads);
    has_absorbed.assign(shape.n_layers, 0);
  }

  ByteCounter counter;  // first: outlives everything that is counted
  std::shared_ptr<const CacheConfig> config;
  const CacheShape& shape;
  const Selector& selector;
  const Residual* residual;
  std::unique_ptr<KvStore> store;
  std::vector<HeadLedger> ledgers;  // [n_layers, n_kv_heads]
  CountedBuffer states;             // residual states, float [n_layers, n_kv_heads, StateFloats()]
  std::vector<uint8_t> has_absorbed;  // a layer: some state is not empty
  std::vector<size_t> budgets;      // [n_layers, n_kv_heads]; empty when nothing ever leaves
  size_t tokens_seen = 0;

  // The step in progress.
  bool in_step = false;
  size_t n_step = 0;
  StepKind kind = StepKind::kDecode;
  bool evicts = false;
  std::vector<size_t> previous_budgets;  // what CancelStep goes back to

  HeadLedger& Ledger(size_t layer, size_t h) { return ledgers[layer * shape.n_kv_heads + h]; }
  size_t Rows() const {
    size_t rows = 0;
    for (size_t i = 0; i < ledgers.size(); ++i) rows += store->n_rows(i / shape.n_kv_heads, i % shape.n_kv_heads);
    return rows;
  }
  size_t StateFloats() const { return residual == nullptr ? 0 : residual->StateFloats(); }
  float* State(size_t layer, size_t h) {
    return states.As<float>().data() + (layer * shape.n_kv_heads + h) * StateFloats();
  }

  void Begin(size_t n_tokens, StepKind step_kind);
  void Append(size_t layer, const float* keys, const float* values);
  void Attend(size_t layer, const float* queries, float* out);
  void AttendTile(size_t layer, const float* queries, size_t first, size_t n, float* out);
  size_t FirstObserved() const;
  void ComputeReadPositions(size_t layer);
  bool ReadsState(size_t layer) const {
    if (residual == nullptr) return false;
    return has_absorbed[layer] || (residual->ReadsEmptyState() && kind != StepKind::kPrompt && tokens_seen > 0);
  }
  void MergeResidual(size_t layer, const float* rotated, size_t n, float* out);
  void Commit(size_t layer);
  LayerRows GatherRows(size_t layer, std::vector<HeadRows>& heads);
  void Absorb(size_t layer, const VictimLists& victims);
  void ReserveLedgers(size_t n_tokens, bool step_evicts, const std::vector<size_t>& new_budgets);
  void TakeBackRoom(const std::vector<size_t>& old_budgets);
  void End();
  void Cancel();
  void CheckBudgets() const;
  void CheckSets() const;
  void CountStep(size_t n_tokens, StepKind step_kind);

  // fill_random.cpp
  struct RandomFill;
  void FillRandom(size_t n_tokens, uint64_t seed);
};

}  // namespace lesskv
