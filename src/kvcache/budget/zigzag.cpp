// ZigZagKV (arXiv 2412.09036): layers whose attention is spread out keep more rows.
//
//   MBA(l, h) = least number of keys that hold tau of what the last queries gave, averaged over them, query head h
//   need(l)   = mean of MBA over the query heads
//   B(l)      = b + (B - b) L need(l) / sum of needs,  b = max(beta B, what every head must hold)
//
// A layer never gets more rows than it holds when the prompt ends (all tokens, or, where an earlier prompt was cut, what that
// left it and the new ones): what is cut there goes to the others by the same rule. Rounding is ours: floors, then the largest remainders, the lower layer first among equals. Attention is used as it is, the window's
// own columns included, and never averaged over a group before keys are counted.
#include "kvcache/budget/zigzag.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "kvcache/budget/budgeter.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

// Shares of the layers, real numbers: those that would exceed their most stand at it.
std::vector<double> Shares(std::span<const double> needs, double total, double floor, std::span<const size_t> most) {
  const size_t n = needs.size();
  std::vector<double> shares(n);
  std::vector<bool> fixed(n, false);
  for (bool again = true; again;) {
    again = false;
    double sum = 0, left = total, active = 0;
    for (size_t l = 0; l < n; ++l) {
      if (fixed[l]) left -= static_cast<double>(most[l]);
      else sum += needs[l], ++active;
    }
    for (size_t l = 0; l < n; ++l) {
      if (fixed[l]) continue;
      shares[l] = sum > 0 ? floor + (left - floor * active) * needs[l] / sum : left / active;
      if (shares[l] > static_cast<double>(most[l])) again = true;
    }
    for (size_t l = 0; l < n; ++l)
      if (!fixed[l] && shares[l] > static_cast<double>(most[l])) shares[l] = static_cast<double>(most[l]), fixed[l] = true;
  }
  return shares;
}

class ZigzagBudgeter final : public Budgeter {
 public:
  ZigzagBudgeter(double tau, double beta, size_t window) : tau_(tau), beta_(beta), window_(window) {}

  BudgetsDiffer differ() const override { return BudgetsDiffer::kBetweenLayers; }
  AllocationScope scope() const override { return AllocationScope::kModel; }
  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    return std::vector<size_t>(request.n_heads(), request.rows);
  }
  Observation Measures() const override {
    return {.queries = Observation::Queries::kLast, .last = window_, .by_query_head = true};
  }

  double Need(const LayerRows& layer) const override {
    double keys = 0, heads = 0;
    for (const HeadRows& head : layer.heads)
      for (size_t g = 0; g < layer.group; ++g, ++heads)
        keys += static_cast<double>(KeysThatHold(tau_, head.measured.subspan(g * head.n_rows(), head.n_rows())));
    return keys / heads;
  }

  void AllocateModel(const BudgetRequest& request, std::span<const LayerRows> layers,
                     std::span<size_t> budgets) const override {
    std::vector<double> needs;
    std::vector<size_t> most;  // of a layer whose heads differ their mean, which a share term divides
    for (const LayerRows& layer : layers) {
      needs.push_back(layer.need);
      size_t held = 0;
      for (const HeadRows& head : layer.heads) held += head.n_rows();
      most.push_back(std::max(held / layer.heads.size(), request.least()));
    }
    const std::vector<size_t> rows = ZigzagRows(needs, request.rows, request.least(), beta_, most);
    for (size_t l = 0, head = 0; l < rows.size(); ++l)
      for (size_t h = 0; h < request.n_kv_heads[l]; ++h) budgets[head++] = rows[l];
  }

 private:
  double tau_, beta_;
  size_t window_;
};

constexpr Parameter kParameters[] = {
    {.name = "beta", .kind = Parameter::Kind::kReal, .default_value = "0.2",
     .help = "every layer keeps this share of the mean", .min = 0, .max = 1, .positional = true},
    {.name = "tau", .kind = Parameter::Kind::kReal, .default_value = "0.9",
     .help = "share of the attention that a layer's rows should hold", .min = 0, .max = 1},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "32", .help = "last tokens whose attention counts",
     .min = 1, .max = 4096},
};

}  // namespace

size_t KeysThatHold(double tau, std::span<const float> received) {
  constexpr double kTie = 1e-6;  // even attention adds up to tau only nearly
  std::vector<float> sorted;
  for (const float a : received)
    if (std::isfinite(a)) sorted.push_back(a);
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  const double all = std::accumulate(sorted.begin(), sorted.end(), 0.0);
  double sum = 0;
  size_t keys = 0;
  while (keys < sorted.size() && (keys == 0 || sum < (tau - kTie) * all)) sum += sorted[keys++];
  return std::max<size_t>(keys, 1);
}

std::vector<size_t> ZigzagRows(std::span<const double> needs, size_t rows, size_t least, double beta, size_t most) {
  return ZigzagRows(needs, rows, least, beta, std::vector<size_t>(needs.size(), most));
}

std::vector<size_t> ZigzagRows(std::span<const double> needs, size_t rows, size_t least, double beta,
                               std::span<const size_t> most) {
  const size_t n = needs.size(), all = std::accumulate(most.begin(), most.end(), size_t{0});
  std::vector<size_t> result(n, rows);
  if (*std::max_element(most.begin(), most.end()) <= rows) return result;
  if (all <= n * rows) {
    for (size_t l = 0; l < n; ++l) result[l] = most[l] + (n * rows - all) / n + (l < (n * rows - all) % n ? 1 : 0);
    return result;
  }
  const double mean = static_cast<double>(rows), floor = std::min(mean, std::max(beta * mean, static_cast<double>(least)));
  double sum = 0;
  for (const double need : needs) sum += need;
  const std::vector<double> even(n, 1.0);
  const std::vector<double> shares =
      Shares(std::isfinite(sum) && sum > 0 ? needs : even, mean * static_cast<double>(n), floor, most);
  std::vector<double> remainder(n);
  for (size_t l = 0; l < n; ++l) {
    const double whole = std::floor(shares[l] + 1e-9);  // the small term keeps whole shares whole
    result[l] = static_cast<size_t>(whole);
    remainder[l] = shares[l] - whole;
  }
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainder[a] > remainder[b] + 1e-9; });
  size_t left = n * rows - std::accumulate(result.begin(), result.end(), size_t{0});
  for (size_t i = 0; left > 0; ++i) {
    if (result[order[i % n]] >= most[order[i % n]]) continue;
    ++result[order[i % n]];
    --left;
  }
  return result;
}

extern const Method kZigzagMethod{
    .name = "zigzag",
    .stage = Stage::kBudget,
    .summary = "layers whose attention is spread out keep more rows; a prompt's layers wait in full until all are known",
    .reference = "arXiv 2412.09036",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.needs_eviction = true, .acts_in_stream = false}; },
    .make_budgeter = [](const Arguments& arguments, const MethodContext&) -> std::unique_ptr<const Budgeter> {
      return std::make_unique<ZigzagBudgeter>(arguments.Real("tau"), arguments.Real("beta"), arguments.Count("window"));
    },
};

}  // namespace lesskv
