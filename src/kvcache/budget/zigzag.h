// ZigZagKV's layer budgets, apart from the budgeter for its tests.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace lesskv {

// Keys that hold a share `tau` of what was received, the largest first: between 1 and received.size() of them. The
// shares need not sum to 1.
size_t KeysThatHold(double tau, std::span<const float> received);

// Rows for each layer in proportion to `needs` [n_layers], no layer below `least` or `beta` * rows, none above its `most`
// [n_layers]; the sum is exactly n_layers * rows. Where needs say nothing (not finite, or all 0), and where `least` leaves
// nothing to divide, as even as `most` allows; where nothing must leave, what lacks to the sum is added evenly.
std::vector<size_t> ZigzagRows(std::span<const double> needs, size_t rows, size_t least, double beta,
                               std::span<const size_t> most);
// The same with one `most` for all.
std::vector<size_t> ZigzagRows(std::span<const double> needs, size_t rows, size_t least, double beta, size_t most);

}  // namespace lesskv
