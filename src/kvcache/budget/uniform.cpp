// The same rows for every layer and head.
#include "kvcache/budget/budgeter.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

class UniformBudgeter final : public Budgeter {
 public:
  BudgetsDiffer differ() const override { return BudgetsDiffer::kNowhere; }

  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    return std::vector<size_t>(request.n_heads(), request.rows);
  }
};

}  // namespace

extern const Method kUniformMethod{
    .name = "uniform",
    .stage = Stage::kBudget,
    .summary = "every layer and head keeps the same number of rows",
    .reference = "",
    .make_budgeter = [](const Arguments&, const MethodContext&) -> std::unique_ptr<const Budgeter> {
      return std::make_unique<UniformBudgeter>();
    },
};

}  // namespace lesskv
