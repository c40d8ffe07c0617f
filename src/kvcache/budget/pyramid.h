// PyramidKV's layer budgets, apart from the budgeter for its tests.
#pragma once

#include <cstddef>
#include <vector>

namespace lesskv {

// Rows per KV head for each of `n_layers` layers (0 = bottom), falling linearly; the sum is exactly n_layers * rows.
// `window` rows are in every layer; `beta` is how many times smaller the top layer's share is; `n_tokens` caps a layer.
std::vector<size_t> PyramidRows(size_t n_layers, size_t rows, size_t window, double beta, size_t n_tokens);

}  // namespace lesskv
