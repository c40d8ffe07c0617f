#include "eval/summarize.h"

#include <algorithm>

#include "base/error.h"
#include "engine/generate.h"
#include "eval/json_lines.h"
#include "eval/metrics.h"
#include "eval/rouge.h"
#include "eval/text_windows.h"
#include "format/json_reader.h"

namespace lesskv {
namespace {

struct Prompt {
  std::vector<int32_t> ids;
  const SummaryTask* task;
};

std::vector<Prompt> ReadPrompts(const EvalSetup& setup, const SummarizeOptions& options, size_t& skipped) {
  if (options.tasks.empty()) Fail(ErrorCode::kInvalidArgument, "{}: no articles in it", options.source);
  std::vector<Prompt> prompts;
  const size_t limit = options.limit == 0 ? options.tasks.size() : options.limit;
  for (const size_t i : EvenlySpaced(options.tasks.size(), limit)) {
    const SummaryTask& task = options.tasks[i];
    std::vector<int32_t> ids = setup.tokenizer->Encode(task.article, false, false);
    if (setup.tokenizer->add_bos()) ids.insert(ids.begin(), setup.tokenizer->bos());
    if (ids.empty() || ids.size() + options.max_tokens > setup.ctx) {
      ++skipped;
    } else {
      prompts.push_back({std::move(ids), &task});
    }
  }
  if (prompts.empty()) {
    Fail(ErrorCode::kInvalidArgument, "{}: no prompt leaves room for {} tokens in a context of {}", options.source,
         options.max_tokens, setup.ctx);
  }
  return prompts;
}

std::string Write(const EvalSetup& setup, const SummarizeOptions& options, Sequence& sequence, const Prompt& prompt,
                  FeedCost& cost, size_t& generated) {
  GenerateOptions generate;
  generate.sampler = options.sampler;
  generate.sampler.seed = setup.seed;
  generate.max_tokens = options.max_tokens;
  generate.stops = options.stops;
  generate.stop = setup.stop;
  const GenerateResult result = Generate(*setup.engine, *setup.tokenizer, sequence, prompt.ids, generate);
  cost.prompt_tokens += result.prompt_tokens;
  cost.prompt_seconds += result.prefill_seconds;
  cost.tokens += result.generated_tokens - std::min<size_t>(result.generated_tokens, 1);  // the prompt predicts the first
  generated += result.generated_tokens;
  cost.seconds += result.decode_seconds;
  setup.CheckStop();
  return result.text;
}

Json MakeRow(const EvalSetup& setup, const SummarizeOptions& options, const Subject& subject,
             std::span<const Prompt> prompts, std::span<const std::string> references, size_t& done) {
  ClusteredMean rouge1, rouge2, rouge_l;
  FeedCost cost;
  size_t generated = 0;
  StatsTally stats;
  for (size_t i = 0; i < prompts.size(); ++i) {
    Sequence sequence(subject.config);
    const RougeScores scores = Rouge(Write(setup, options, sequence, prompts[i], cost, generated), references[i]);
    rouge1.AddOne(scores.rouge1);
    rouge2.AddOne(scores.rouge2);
    rouge_l.AddOne(scores.rouge_l);
    stats.Add(sequence.Stats());
    setup.Progress(++done, prompts.size() * setup.subjects.size());
  }
  const bool full = options.against == SummarizeOptions::Against::kFull;
  Json row = BeginRow(setup, subject, "summarize");
  AddProtocol(row, {.mode = Protocol::Mode::kContinue});
  row["prompt"] = nullptr;  // each article's own
  row["file"] = options.source;
  row["against"] = full ? "the full cache's continuation" : "reference";
  row["prompts"] = prompts.size();
  row["temperature"] = options.sampler.temperature;
  for (const auto& [key, mean] : {std::pair("rouge1", &rouge1), {"rouge2", &rouge2}, {"rouge_l", &rouge_l}}) {
    row[key] = mean->Mean();
    row[std::string(key) + "_se"] = mean->StandardError();
  }
  row["tokens_scored"] = generated;
  row["generated_tokens"] = generated;
  AddCacheStats(row, stats.stats(), *subject.config);
  AddCost(row, cost);
  return row;
}

}  // namespace

std::vector<SummaryTask> ParseSummaryTasks(std::string_view json_lines, const std::string& name) {
  std::vector<SummaryTask> tasks;
  ReadJsonLines(json_lines, name, "an object with the texts article and summary_gt",
                [&](std::string_view line, const std::string&) {
                  const Json record = ParseJson<Json>(line);
                  tasks.push_back({record.at("article"), record.at("summary_gt")});
                });
  return tasks;
}

Report EvaluateSummaries(const EvalSetup& setup, const SummarizeOptions& options) {
  if (options.max_tokens == 0) Fail(ErrorCode::kInvalidArgument, "-n: expected 1 or more tokens, found 0");
  size_t skipped = 0;
  const std::vector<Prompt> prompts = ReadPrompts(setup, options, skipped);
  const bool full = options.against == SummarizeOptions::Against::kFull;
  std::vector<std::string> references;
  const auto full_config = setup.engine->MakeCacheConfig(CacheSpec(), setup.ctx);
  for (const Prompt& prompt : prompts) {
    FeedCost unused;
    size_t untold = 0;
    Sequence sequence(full_config);
    references.push_back(full ? Write(setup, options, sequence, prompt, unused, untold) : prompt.task->summary);
  }
  Report report;
  size_t done = 0;
  for (const Subject& subject : setup.subjects) {
    report.rows.push_back(MakeRow(setup, options, subject, prompts, references, done));
    report.rows.back()["skipped"] = skipped;
  }
  report.columns = SubjectColumns();
  report.columns.push_back({"prompts", "prompts", Column::Style::kCount});
  report.columns.push_back({"rouge1", "ROUGE-1", Column::Style::kPercent, 2, "rouge1_se"});
  report.columns.push_back({"rouge2", "ROUGE-2", Column::Style::kPercent, 2, "rouge2_se"});
  report.columns.push_back({"rouge_l", "ROUGE-L", Column::Style::kPercent, 2, "rouge_l_se"});
  AppendCacheColumns(report.columns);
  report.notes.push_back(fmt::format("ROUGE F1 x 100 against {}",
                                     full ? "the full cache's own continuation" : "the file's reference summaries"));
  if (skipped > 0)
    report.notes.push_back(fmt::format("{} prompts are too long for the context and were left out", skipped));
  return report;
}

}  // namespace lesskv
