// Summaries: what a model writes behind an article, compared with a reference by ROUGE.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "engine/sampler.h"
#include "eval/setup.h"

namespace lesskv {

struct SummaryTask {
  std::string article;  // the whole prompt, instructions and examples included
  std::string summary;  // reference
};

// Reads JSON lines with "article" and "summary_gt"; other keys are ignored, empty lines skipped. Throws Error naming
// the line that is damaged.
std::vector<SummaryTask> ParseSummaryTasks(std::string_view json_lines, const std::string& name);

struct SummarizeOptions {
  enum class Against {
    kReference,  // the file's summary_gt
    kFull,       // what the full f16 cache writes for the same prompt with the same seed
  };
  std::vector<SummaryTask> tasks;
  std::string source;  // file name, for the row
  size_t max_tokens = 128;
  size_t limit = 0;  // prompts, evenly spaced; 0: all
  Against against = Against::kReference;
  SamplerOptions sampler = {.temperature = 0, .top_k = 0, .top_p = 1, .min_p = 0};  // the seed is the setup's
  std::vector<std::string> stops = {"###"};
};

// One row a subject: rouge1, rouge2, rouge_l (F1, 0 to 1, each with _se over prompts), against, prompts, skipped (those
// that leave no room for max_tokens in the context), generated_tokens.
Report EvaluateSummaries(const EvalSetup& setup, const SummarizeOptions& options);

}  // namespace lesskv
