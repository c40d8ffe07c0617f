// One budget for all rows of the model: at a prompt's end the best votes of all layers and heads stay (KVzip, arXiv
// 2505.23416, keeps its scores' best rows so). Made for scores that can be compared between heads, such as kvzap's. What
// always stays (window, sinks, protected tokens) is charged to its head first; every head keeps a row.
#include "kvcache/budget/ada.h"
#include "kvcache/budget/budgeter.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

class PooledBudgeter final : public Budgeter {
 public:
  explicit PooledBudgeter(double floor) : floor_(floor) {}

  AllocationScope scope() const override { return AllocationScope::kModel; }
  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    return std::vector<size_t>(request.n_heads(), request.rows);
  }
  void AllocateModel(const BudgetRequest&, std::span<const LayerRows> layers, std::span<size_t> budgets) const override {
    DivideByVotes(layers, floor_, budgets);
  }

 private:
  double floor_;
};

constexpr Parameter kParameters[] = {
    {.name = "floor", .kind = Parameter::Kind::kReal, .default_value = "0",
     .help = "share of the mean budget that every head keeps of its own rows", .min = 0, .max = 1, .positional = true},
};

}  // namespace

extern const Method kPooledMethod{
    .name = "pooled",
    .stage = Stage::kBudget,
    .summary = "rows of all layers and heads compete by their votes, at a prompt's end; its layers wait in full until all are known",
    .reference = "arXiv 2505.23416",
    .parameters = kParameters,
    .traits = [](const Arguments&) {
          return MethodTraits{.needs_eviction = true, .acts_in_stream = false, .needs_votes_by_head = true};
        },
    .make_budgeter = [](const Arguments& arguments, const MethodContext&) -> std::unique_ptr<const Budgeter> {
      return std::make_unique<PooledBudgeter>(arguments.Real("floor"));
    },
};

}  // namespace lesskv
