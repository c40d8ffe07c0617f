// Division of rows among heads by their votes, of one layer (Ada-KV) or of several.
#pragma once

#include <cstddef>
#include <span>

#include "kvcache/select/selector.h"

namespace lesskv {

// Changes `budgets` [heads of the layers], whose sum stays: heads of all these layers compete. `floor` in [0, 1]: the share of a mean budget that every head keeps
// of its own candidates. Nothing changes where no row must leave.
void DivideByVotes(std::span<const LayerRows> layers, double floor, std::span<size_t> budgets);

}  // namespace lesskv
