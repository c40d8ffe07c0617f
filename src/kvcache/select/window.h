// The selector of local layers, beside the method `window` (window.cpp).
#pragma once

#include <memory>

#include "kvcache/select/selector.h"

namespace lesskv {

// Keeps what a local layer of so many tokens may still read: the last window - 1 rows, at true positions, no sinks.
std::unique_ptr<const Selector> MakeLocalSelector(size_t window);

}  // namespace lesskv
