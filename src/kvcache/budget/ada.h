// Ada-KV's division of one layer's rows among its heads, apart from the budgeter for its tests.
#pragma once

#include <cstddef>
#include <span>

#include "kvcache/select/selector.h"

namespace lesskv {

// Changes `budgets` [n_kv_heads], whose sum stays. `floor` in [0, 1]: the share of a mean budget that every head keeps
// of its own candidates. Nothing changes where no row must leave.
void DivideByVotes(const LayerRows& layer, double floor, std::span<size_t> budgets);

}  // namespace lesskv
