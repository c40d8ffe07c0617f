// How many rows each (layer, KV head) may keep. A budgeter divides the selector's rows among layers and heads; the total
// over all layers and heads is what `uniform` would give. Immutable and shared.
#pragma once

#include <cstddef>
#include <vector>

namespace lesskv {

struct BudgetRequest {
  size_t n_layers = 0;
  size_t n_kv_heads = 0;
  size_t rows = 0;      // the selector's rows per KV head, B
  size_t window = 0;    // rows of them that the selector always keeps, w
  size_t n_tokens = 0;  // the prompt's length; the context length while text streams in
};

class Budgeter {
 public:
  virtual ~Budgeter() = default;

  // Rows [n_layers, n_kv_heads], row-major. Decided when a one-shot prompt begins, and for streams at the start.
  virtual std::vector<size_t> Allocate(const BudgetRequest& request) const = 0;
};

}  // namespace lesskv
