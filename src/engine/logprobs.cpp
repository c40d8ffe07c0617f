#include "engine/logprobs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lesskv {
namespace {

double LogSumExp(std::span<const float> logits) {
  const double max = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

std::vector<int32_t> Likeliest(std::span<const float> logits, size_t n) {
  std::vector<int32_t> ids(n == 0 ? 0 : logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto larger = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  };
  const size_t kept = std::min(n, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(kept), ids.end(), larger);
  ids.resize(kept);
  return ids;
}

}  // namespace

GeneratedToken MeasureToken(const Tokenizer& tokenizer, std::span<const float> logits, int32_t token,
                            size_t n_likeliest, bool at_start) {
  const double all = LogSumExp(logits);
  const auto measure = [&](int32_t id) {
    TokenLogprob result{id, static_cast<double>(logits[static_cast<size_t>(id)]) - all, "", false};
    bool start = at_start;
    tokenizer.AppendText(id, true, start, result.text);
    if (!result.text.empty()) return result;
    start = at_start;
    tokenizer.AppendText(id, false, start, result.text);
    result.special = !result.text.empty();
    return result;
  };
  GeneratedToken result{measure(token), 0, {}};
  for (const int32_t id : Likeliest(logits, n_likeliest)) result.likeliest.push_back(measure(id));
  return result;
}

}  // namespace lesskv
