// Loops that the compiler cannot leave rolled. In an anonymous namespace, so that each translation unit keeps its own
// copy, built with its own flags.
#pragma once

#include <cstddef>
#include <utility>

namespace lesskv::internal {
namespace {

// Calls f with 0, 1, ... kN - 1 as constants, so that arrays they index stay in registers whatever f holds.
template <size_t kN, typename F>
__attribute__((always_inline)) inline void Unrolled(F&& f) {
  [&]<size_t... kI>(std::index_sequence<kI...>) __attribute__((always_inline)) {
    (f(std::integral_constant<size_t, kI>{}), ...);
  }
  (std::make_index_sequence<kN>{});
}

}  // namespace
}  // namespace lesskv::internal
