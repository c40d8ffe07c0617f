// How many rows each (layer, KV head) may keep. A budgeter divides the selector's rows among layers and heads; the total
// over all layers and heads is what `uniform` would give. Immutable and shared.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "kvcache/select/selector.h"

namespace lesskv {

struct BudgetRequest {
  std::vector<size_t> n_kv_heads;  // of each layer
  size_t rows = 0;      // the selector's rows per KV head, B
  size_t window = 0;    // rows of them that the selector always keeps, w
  size_t n_tokens = 0;  // the prompt's length; the context length while text streams in
  size_t n_protected = 0;  // tokens that always stay beside the window, in every head
  bool one_budget_a_layer = false;  // the selector keeps one set of tokens a layer: its heads must be equal

  size_t smallest = 1;  // the smallest budget that a head can have: the window shrinks with it
  size_t apart = 0;     // rows that the codec keeps apart: no head may get fewer by a division at the prompt's end

  // Rows that every head must have where its window shall not shrink, nor what the codec keeps apart.
  size_t least() const { return window + n_protected > apart ? window + n_protected : apart; }

  size_t n_layers() const { return n_kv_heads.size(); }
  size_t n_heads() const {
    size_t n = 0;
    for (const size_t heads : n_kv_heads) n += heads;
    return n;
  }
};

// When a one-shot prompt's budgets are decided.
enum class AllocationScope {
  kGiven,  // before the prompt, from its length alone
  kLayer,  // at the end of each layer, from its rows' votes: heads of a layer share
  kModel,  // when all layers are known: they wait in full until then
};

// Between what budgets may differ.
enum class BudgetsDiffer { kNowhere, kBetweenLayers, kBetweenHeads };

class Budgeter {
 public:
  virtual ~Budgeter() = default;

  virtual BudgetsDiffer differ() const { return BudgetsDiffer::kBetweenHeads; }
  // The trained artefact it reads: its fingerprint; empty: none.
  virtual std::string artefact() const { return {}; }
  virtual size_t ArtefactBytes() const { return 0; }

  // Rows a head, [heads] layer by layer. kGiven: the budgets. The others: what they start from (and what a text that
  // streams in, or is decoded without a prompt, is held to).
  virtual std::vector<size_t> Allocate(const BudgetRequest& request) const = 0;

  virtual AllocationScope scope() const { return AllocationScope::kGiven; }
  // Why it cannot say what a text that streams in may keep; empty: it can.
  virtual std::string WhyNoStream() const { return {}; }

  // What it wants to see of a prompt beside the selector: HeadRows::measured.
  virtual Observation Measures() const { return {}; }
  // kModel: what a layer needs, from `measured`; kept as LayerRows::need.
  virtual double Need(const LayerRows&) const { return 0; }

  // kLayer: changes `budgets` [n_kv_heads] of the layer, after its rows were observed. Their sum must stay.
  virtual void AllocateLayer(const LayerRows&, std::span<size_t> /*budgets*/) const {}
  // kModel: changes `budgets` [heads] of all layers, each observed. Their sum must stay.
  virtual void AllocateModel(const BudgetRequest&, std::span<const LayerRows> /*layers*/,
                             std::span<size_t> /*budgets*/) const {}
};

}  // namespace lesskv
