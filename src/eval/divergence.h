// How far a cache's predictions are from the full cache's, token by token on the same text.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "eval/setup.h"

namespace lesskv {

struct DivergenceOptions {
  std::vector<std::string> texts;  // files
  size_t max_windows = 0;          // 0: all; else evenly spaced over all texts
  Protocol protocol;
};

// One row a subject: the keys of perplexity, and kl_mean (with kl_mean_se), kl_p95, kl_p99, kl_max in nats, KL(full ||
// cache); same_top1 (with _se), the share of tokens with the same likeliest next token; perplexity_full,
// perplexity_ratio (with _se, of paired differences), perplexity over the full cache's.
//
// The reference is the full f16 cache in the same run: it and all subjects go through a batch of windows in lockstep,
// the same step shapes for all, and only the reference logits of one step are held.
Report EvaluateDivergence(const EvalSetup& setup, const DivergenceOptions& options);

}  // namespace lesskv
