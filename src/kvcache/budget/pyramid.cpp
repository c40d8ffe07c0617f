// PyramidKV (Cai et al., arXiv 2406.02069): lower layers attend broadly and keep more rows, upper layers fewer.
//
// With m = B - w: the top layer gets min = m / beta, the bottom layer max = 2m - min; if max > n - w, max = n - w and
// min = 2m - max. Layer l of L keeps w + max - l (max - min) / (L - 1). Rounding so that the sum over layers is exactly
// L B (largest remainders first, lower layers first among equals) is ours.
#include "kvcache/budget/pyramid.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kvcache/budget/budgeter.h"
#include "kvcache/registry.h"

namespace lesskv {

std::vector<size_t> PyramidRows(size_t n_layers, size_t rows, size_t window, double beta, size_t n_tokens) {
  const std::vector<size_t> uniform(n_layers, rows);
  if (n_layers == 1 || rows <= window || n_tokens <= window) return uniform;
  const double m = static_cast<double>(rows - window);
  double smallest = m / beta, largest = 2 * m - smallest;
  const double room = static_cast<double>(n_tokens - window);
  if (largest > room) {
    largest = room;
    smallest = 2 * m - largest;
  }
  if (largest < smallest) return uniform;

  std::vector<size_t> result(n_layers);
  std::vector<double> remainder(n_layers);
  for (size_t l = 0; l < n_layers; ++l) {
    const double share = largest - static_cast<double>(l) * (largest - smallest) / static_cast<double>(n_layers - 1);
    // The small term keeps whole shares whole.
    const double whole = std::floor(share + 1e-9);
    result[l] = window + static_cast<size_t>(whole);
    remainder[l] = share - whole;
  }
  std::vector<size_t> order(n_layers);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainder[a] > remainder[b] + 1e-9; });
  const size_t total = std::accumulate(result.begin(), result.end(), size_t{0});
  for (size_t i = 0; i < n_layers * rows - total; ++i) ++result[order[i % n_layers]];
  return result;
}

namespace {

class PyramidBudgeter final : public Budgeter {
 public:
  explicit PyramidBudgeter(double beta) : beta_(beta) {}

  BudgetsDiffer differ() const override { return BudgetsDiffer::kBetweenLayers; }

  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    const std::vector<size_t> layers =
        PyramidRows(request.n_layers(), request.rows, request.window, beta_, request.n_tokens);
    std::vector<size_t> result;
    for (size_t l = 0; l < layers.size(); ++l) result.insert(result.end(), request.n_kv_heads[l], layers[l]);
    return result;
  }

 private:
  double beta_;
};

constexpr Parameter kParameters[] = {
    {.name = "beta", .kind = Parameter::Kind::kReal, .default_value = "20",
     .help = "the top layer's share is 1 / beta of the mean", .min = 1, .max = 1e6, .positional = true},
};

}  // namespace

extern const Method kPyramidMethod{
    .name = "pyramid",
    .stage = Stage::kBudget,
    .summary = "rows fall linearly from the bottom layer to the top one",
    .reference = "arXiv 2406.02069",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.needs_eviction = true}; },
    .make_budgeter = [](const Arguments& arguments, const MethodContext&) -> std::unique_ptr<const Budgeter> {
      return std::make_unique<PyramidBudgeter>(arguments.Real("beta"));
    },
};

}  // namespace lesskv
