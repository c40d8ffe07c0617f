#include "prompt_bar.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace lesskv {
namespace {

constexpr size_t kManyTokens = 65536;

}  // namespace

double EstimatePrompt(Engine& engine, const std::shared_ptr<const CacheConfig>& config, size_t seen, size_t n,
                      const std::atomic<bool>* stop) {
  if (n < kManyTokens) return 0;
  const auto seconds_each = [&](size_t n_probe) {
    Sequence probe(config);
    const std::vector<int32_t> tokens(n_probe);
    const auto start = std::chrono::steady_clock::now();
    engine.Prefill({{&probe, tokens, LogitsRows::kNone}}, {}, {.stop = stop});
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
           static_cast<double>(n_probe);
  };
  constexpr size_t kShort = 512, kLonger = 2048;
  seconds_each(kShort);  // warms up
  double few = seconds_each(kShort), many = seconds_each(kLonger);
  for (int again = 0; again < 2; ++again) {  // the least of three: on a busy machine one that waited would hide what grows
    few = std::min(few, seconds_each(kShort));
    many = std::min(many, seconds_each(kLonger));
  }
  const double b = std::max(0.0, (many - few) / static_cast<double>(kLonger - kShort));
  const double a = std::max(0.0, few - b * static_cast<double>(kShort));
  const auto before = static_cast<double>(seen), added = static_cast<double>(n);
  return a * added + b * added * (2 * before + added);
}

}  // namespace lesskv
