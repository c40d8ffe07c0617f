// A budget divided among all heads of a model as it was measured on text, apart from the budgeter for its tests.
#pragma once

#include <cstddef>
#include <vector>

#include "kvcache/budget/budgeter.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {

// The share of its rows that each head keeps where `ratio` of all rows may stay: between the measured ratios along
// straight lines, which end at nothing for 0 and at all rows for 1.
std::vector<double> SharesAt(const SidecarBudgets& budgets, double ratio);

// Rows of each head: `floor` rows (fewer where half of a small budget is less; more where what always stays needs them)
// and the rest by shares. No head has more than n_tokens; the sum is exactly heads * rows.
std::vector<size_t> SplitRows(const SidecarBudgets& budgets, const BudgetRequest& request, size_t floor);

}  // namespace lesskv
