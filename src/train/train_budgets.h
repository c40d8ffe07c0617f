// lesskv train budgets: how many rows each KV head of a model needs, measured on text.
//
// Rows are scored by what the model reads when it repeats the text (row_scores.h).
// The best rows of the whole model, a share `ratio` of all, then tell how many each head has among them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "kvcache/residual/sidecar.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

struct TrainBudgetsOptions {
  std::vector<std::string> texts;  // files
  size_t sequences = 8;            // texts of `tokens` tokens each
  size_t tokens = 1024;            // the model sees twice as many
  std::vector<float> ratios = {0.01f, 0.02f, 0.05f, 0.1f, 0.2f, 0.4f, 0.7f};
  uint64_t seed = 0;
};

struct TrainBudgetsReport {
  SidecarBudgets budgets;
  // Of the shares at each ratio between the first and the second half of the texts: Pearson's; not a number where heads
  // are all alike or there is one text.
  std::vector<double> correlation;
  double seconds = 0;
};

// [ratios, heads]: the share of each head's rows among the best of all; ties: the lower head, then the earlier row. The
// first kSinkRows rows of a head (row_scores.h) do not take part.
std::vector<float> SharesOf(const std::vector<std::vector<float>>& scores, const std::vector<float>& ratios);

// Throws Error for options that make no sense and for texts too short; `stop` set: Error kRuntime between texts.
TrainBudgetsReport TrainBudgets(const Engine& engine, const Tokenizer& tokenizer, const TrainBudgetsOptions& options,
                                const std::function<void(double done)>& progress, const std::atomic<bool>* stop = nullptr);

}  // namespace lesskv::train
