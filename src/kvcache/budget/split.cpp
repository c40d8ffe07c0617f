// A static division of the budget over all heads of a model, learned once on text (`lesskv train budgets`).
//
// Heads differ far more than texts do: a few of a model's heads read all over the text, most a short window. How many of
// its rows a head needs hardly depends on the text, so it can be measured beforehand, and then serves every selector,
// also while text streams in, and without layers that wait for each other.
#include "kvcache/budget/split.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "kvcache/budget/zigzag.h"
#include "kvcache/registry.h"
#include "kvcache/residual/find_sidecar.h"

namespace lesskv {
namespace {

class SplitBudgeter final : public Budgeter {
 public:
  SplitBudgeter(std::shared_ptr<const SidecarBudgets> budgets, size_t floor, std::string artefact)
      : budgets_(std::move(budgets)), floor_(floor), artefact_(std::move(artefact)) {}

  std::string artefact() const override { return artefact_; }
  size_t ArtefactBytes() const override { return (budgets_->shares.size() + budgets_->ratios.size()) * sizeof(float); }
  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    return SplitRows(*budgets_, request, floor_);
  }

 private:
  std::shared_ptr<const SidecarBudgets> budgets_;
  size_t floor_;
  std::string artefact_;
};

void CheckHeads(const SidecarBudgets& budgets, const MethodContext& context, const std::string& path) {
  std::vector<size_t> heads;
  for (const LayerShape& layer : context.layers) heads.push_back(layer.n_kv_heads);
  if (heads != budgets.n_kv_heads)
    Fail(ErrorCode::kMismatch, "{}: budgets for {} heads in {} layers, but the model has {} in {} (global ones)", path,
         budgets.n_heads(), budgets.n_kv_heads.size(), std::accumulate(heads.begin(), heads.end(), size_t{0}),
         heads.size());
}

std::unique_ptr<const Budgeter> Make(const Arguments& arguments, const MethodContext& context) {
  // Local layers have no budgets of this kind.
  const FoundSidecar found = FindSidecar(arguments, context.sidecar, "split", "budgets", "budgets");
  auto budgets = ShareTrained<SidecarBudgets>(found, context.sidecar, "split", [&](const Sidecar& sidecar) {
    if (sidecar.budgets.empty())
      Fail(ErrorCode::kNotFound, "{}: holds no budgets (train them with 'lesskv train budgets')", found.path);
    CheckHeads(sidecar.budgets, context, found.path);
    return std::make_shared<const SidecarBudgets>(sidecar.budgets);
  });
  return std::make_unique<SplitBudgeter>(std::move(budgets), arguments.Count("floor"), found.fingerprint);
}

constexpr Parameter kParameters[] = {
    {.name = "floor", .kind = Parameter::Kind::kCount, .default_value = "32",
     .help = "rows that every head keeps, at most half of the mean budget", .positional = true},
    {.name = "file", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the sidecar with the trained budgets; when not given it is found as that of less"},
    {.name = "sidecar", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the fingerprint that the sidecar must have, 16 hexadecimal digits"},
};

}  // namespace

std::vector<double> SharesAt(const SidecarBudgets& budgets, double ratio) {
  const size_t n = budgets.n_heads(), last = budgets.ratios.size() - 1;
  const auto after = static_cast<size_t>(std::upper_bound(budgets.ratios.begin(), budgets.ratios.end(), ratio) -
                                         budgets.ratios.begin());
  const double low = after == 0 ? 0 : budgets.ratios[after - 1], high = after > last ? 1 : budgets.ratios[after];
  const double part = std::clamp((ratio - low) / (high - low), 0.0, 1.0);
  std::vector<double> shares(n);
  for (size_t h = 0; h < n; ++h) {
    const double at_low = after == 0 ? 0 : budgets.shares[(after - 1) * n + h];
    const double at_high = after > last ? 1 : budgets.shares[after * n + h];
    shares[h] = at_low + part * (at_high - at_low);
  }
  return shares;
}

std::vector<size_t> SplitRows(const SidecarBudgets& budgets, const BudgetRequest& request, size_t floor) {
  if (request.rows >= request.n_tokens) return std::vector<size_t>(request.n_heads(), request.rows);
  const size_t least = std::max(request.smallest, std::min(floor, request.rows / 2));
  const size_t room = request.n_tokens - std::min(least, request.n_tokens - 1);
  const double ratio = static_cast<double>(request.rows - std::min(least, request.rows)) / static_cast<double>(room);
  const std::vector<double> shares = SharesAt(budgets, ratio);
  if (!request.one_budget_a_layer) return ZigzagRows(shares, request.rows, least, 0, request.n_tokens);
  std::vector<double> layers;  // means of their heads
  for (size_t l = 0, first = 0; l < request.n_layers(); first += request.n_kv_heads[l++]) {
    const auto begin = shares.begin() + static_cast<ptrdiff_t>(first);
    const size_t heads = request.n_kv_heads[l];
    layers.push_back(std::accumulate(begin, begin + static_cast<ptrdiff_t>(heads), 0.0) / static_cast<double>(heads));
  }
  const std::vector<size_t> rows = ZigzagRows(layers, request.rows, least, 0, request.n_tokens);
  std::vector<size_t> result;
  for (size_t l = 0; l < rows.size(); ++l) result.insert(result.end(), request.n_kv_heads[l], rows[l]);
  return result;
}

extern const Method kSplitMethod{
    .name = "split",
    .stage = Stage::kBudget,
    .summary = "rows are divided over all heads of the model as measured on text beforehand",
    .reference = "arXiv 2505.23416, 2601.07891 (the measure)",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.needs_eviction = true, .reads_sidecar = true}; },
    .make_budgeter = Make,
};

}  // namespace lesskv
