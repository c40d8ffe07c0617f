// How far a prompt has been read; one that will take long is announced.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>

#include "common.h"

namespace lesskv {

// About how many seconds a prompt of very many tokens will take, for which even the first layer's end is long to wait;
// 0 for others. From two short ones of the same cache: reading n tokens after `seen` takes
// a n + b ((seen + n)^2 - seen^2).
double EstimatePrompt(Engine& engine, const std::shared_ptr<const CacheConfig>& config, size_t seen, size_t n,
                      const std::atomic<bool>* stop);

class PromptBar : public ProgressBar {
 public:
  // `seconds`: from EstimatePrompt.
  PromptBar(size_t n_tokens, double seconds) : ProgressBar(fmt::format("prompt of {} tokens", n_tokens), kLong) {
    Expect(seconds);
  }

 private:
  static constexpr double kLong = 60;  // seconds; what takes longer is announced
};

}  // namespace lesskv
