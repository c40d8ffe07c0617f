// Ada-KV (Feng et al., arXiv 2407.11550): heads of a layer share its rows. Every head keeps its window, what is
// protected, and its best floor * B candidates (B: the layer's mean budget); the rest of the layer's rows go to the best
// remaining candidates of all heads. Decided at a prompt's end.
//
// Ours: votes that accumulate are divided by the head's sum, since a head that lost rows earlier has lost their votes
// too; every head keeps a row; a head that is over its budget while decoding evicts one of its own.
#include "kvcache/budget/ada.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kvcache/budget/budgeter.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

struct Candidate {
  double score;
  uint32_t head;
  int32_t position;

  bool operator<(const Candidate& other) const {  // the better one first
    if (score != other.score) return score > other.score;
    return head != other.head ? head < other.head : position < other.position;
  }
};

// A head's rows that nothing but their votes can keep.
std::vector<Candidate> CandidatesOf(const LayerRows& layer, const HeadRows& head, uint32_t number) {
  double sum = 0;
  for (const float vote : head.votes) sum += std::isfinite(vote) ? static_cast<double>(vote) : 0.0;
  const double scale = layer.votes_accumulate && sum > 0 ? 1 / sum : 1;
  const auto recent = static_cast<int32_t>(layer.window - std::min(layer.window, layer.sinks));
  std::vector<Candidate> candidates;
  for (size_t r = 0; r < head.n_rows(); ++r) {
    const int32_t p = ToInt(head.positions[r]);
    const bool kept = p < static_cast<int32_t>(layer.sinks) || p >= static_cast<int32_t>(layer.tokens_seen) - recent ||
                      layer.protect->Contains(head.positions[r]);
    // Not-a-number is below every number here, too: scores may be logarithms, below 0.
    const double vote = std::isnan(head.votes[r]) ? -std::numeric_limits<double>::infinity() : static_cast<double>(head.votes[r]);
    if (!kept) candidates.push_back({vote * scale, number, p});
  }
  return candidates;
}

void SpreadEvenly(size_t rows, std::span<size_t> budgets) {
  for (size_t h = 0; h < budgets.size(); ++h) budgets[h] += rows / budgets.size() + (h < rows % budgets.size() ? 1 : 0);
}

class AdaBudgeter final : public Budgeter {
 public:
  AdaBudgeter(double floor, std::unique_ptr<const Budgeter> layers) : floor_(floor), layers_(std::move(layers)) {}

  AllocationScope scope() const override {
    return layers_->scope() == AllocationScope::kModel ? AllocationScope::kModel : AllocationScope::kLayer;
  }
  std::string artefact() const override { return layers_->artefact(); }
  size_t ArtefactBytes() const override { return layers_->ArtefactBytes(); }
  std::vector<size_t> Allocate(const BudgetRequest& request) const override { return layers_->Allocate(request); }
  Observation Measures() const override { return layers_->Measures(); }
  double Need(const LayerRows& layer) const override { return layers_->Need(layer); }

  void AllocateLayer(const LayerRows& layer, std::span<size_t> budgets) const override {
    DivideByVotes({&layer, 1}, floor_, budgets);
  }
  void AllocateModel(const BudgetRequest& request, std::span<const LayerRows> layers,
                     std::span<size_t> budgets) const override {
    layers_->AllocateModel(request, layers, budgets);
    size_t first = 0;
    for (const LayerRows& layer : layers) {
      DivideByVotes({&layer, 1}, floor_, budgets.subspan(first, layer.heads.size()));
      first += layer.heads.size();
    }
  }

 private:
  double floor_;
  std::unique_ptr<const Budgeter> layers_;
};

constexpr Parameter kParameters[] = {
    {.name = "floor", .kind = Parameter::Kind::kReal, .default_value = "0.2",
     .help = "share of the mean budget that every head keeps of its own rows", .min = 0, .max = 1, .positional = true},
};

}  // namespace

void DivideByVotes(std::span<const LayerRows> layers, double floor, std::span<size_t> budgets) {
  const size_t n = budgets.size(), total = std::accumulate(budgets.begin(), budgets.end(), size_t{0}), mean = total / n;
  bool leaving = false;
  size_t h = 0;
  for (const LayerRows& layer : layers)
    for (const HeadRows& head : layer.heads) leaving |= head.n_rows() > budgets[h++];
  if (!leaving || mean == 0) return;

  const LayerRows& any = layers[0];  // window, protected and separate rows are those of all layers
  const size_t staying = any.window + any.protect->CountFrom(static_cast<int32_t>(any.sinks));
  const size_t always = std::min(mean, std::max(staying, any.apart));
  const auto own = std::min(mean - always, static_cast<size_t>(floor * static_cast<double>(mean) + 1e-9));
  const size_t usual = std::max<size_t>(1, always + own);
  // A head that an earlier division left fewer rows than that cannot keep more; the others can.
  const auto least_of = [&](const HeadRows& head) { return std::min(usual, std::max({always, head.n_rows(), size_t{1}})); };
  size_t rest = total;
  for (const LayerRows& layer : layers)
    for (const HeadRows& head : layer.heads) rest -= least_of(head);
  std::vector<Candidate> all;
  uint32_t number = 0;
  for (const LayerRows& layer : layers)
    for (const HeadRows& head : layer.heads) {
      std::vector<Candidate> candidates = CandidatesOf(layer, head, number);
      const size_t kept = head.n_rows() - candidates.size(), least = least_of(head);
      const size_t taken = std::min(candidates.size(), least - std::min(least, kept));
      const size_t ranked = std::min(candidates.size(), taken + rest);
      std::partial_sort(candidates.begin(), candidates.begin() + static_cast<ptrdiff_t>(ranked), candidates.end());
      all.insert(all.end(), candidates.begin() + static_cast<ptrdiff_t>(taken),
                 candidates.begin() + static_cast<ptrdiff_t>(ranked));
      budgets[number++] = least;
    }
  const size_t best = std::min(rest, all.size());
  std::partial_sort(all.begin(), all.begin() + static_cast<ptrdiff_t>(best), all.end());
  for (size_t i = 0; i < best; ++i) ++budgets[all[i].head];
  SpreadEvenly(rest - best, budgets);
}

extern const Method kAdaMethod{
    .name = "ada",
    .stage = Stage::kShare,
    .summary = "heads of a layer share its rows by their votes, at a prompt's end",
    .reference = "arXiv 2407.11550",
    .parameters = kParameters,
    .traits = [](const Arguments&) {
          return MethodTraits{.needs_eviction = true, .acts_in_stream = false, .needs_votes_by_head = true};
        },
    .make_sharer = [](const Arguments& arguments, const MethodContext&, std::unique_ptr<const Budgeter> layers)
        -> std::unique_ptr<const Budgeter> {
          return std::make_unique<AdaBudgeter>(arguments.Real("floor"), std::move(layers));
        },
};

}  // namespace lesskv
