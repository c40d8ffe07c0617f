#include "eval/setup.h"

#include <algorithm>

#include "base/error.h"
#include "eval/metrics.h"

namespace lesskv {

std::shared_ptr<const CacheConfig> EvalSetup::MakeConfig(const CacheSpec& spec) const {
  std::vector<ProtectedSpan> spans;
  if (keep > 0) spans.push_back({0, static_cast<int32_t>(keep)});
  return engine->MakeCacheConfig(spec, ctx, std::move(spans));
}

void EvalSetup::CheckStop() const {
  if (stop != nullptr && *stop) Fail(ErrorCode::kRuntime, "interrupted before the evaluation was done");
}

void EvalSetup::Progress(size_t done, size_t total) const {
  if (progress && total > 0) progress(static_cast<double>(done) / static_cast<double>(total));
}

std::vector<std::vector<size_t>> EvalSetup::PromptGroups() const {
  std::vector<std::vector<size_t>> groups;
  for (size_t s = 0; s < subjects.size(); ++s) {
    const auto alike = [&](const std::vector<size_t>& group) {
      return subjects[s].config->ReadsPromptsAs(*subjects[group[0]].config);
    };
    const auto group = std::find_if(groups.begin(), groups.end(), alike);
    if (group == groups.end())
      groups.push_back({s});
    else
      group->push_back(s);
  }
  return groups;
}

std::vector<std::vector<size_t>> EvalSetup::SingleGroups() const {
  std::vector<std::vector<size_t>> groups;
  for (size_t s = 0; s < subjects.size(); ++s) groups.push_back({s});
  return groups;
}

size_t EvalSetup::BatchSize(std::span<const size_t> group, size_t n_prompt, size_t n_decode) const {
  size_t bytes = 1;
  for (const size_t s : group) bytes += subjects[s].config->Plan(n_prompt, n_decode).bytes_peak;
  return std::clamp(kBatchBytes / bytes, size_t{1}, std::max(batch, size_t{1}));
}

void AddPrompt(std::span<Sequence* const> sequences, std::span<const int32_t> tokens, LogitsRows logits,
               std::vector<StepItem>& items) {
  for (size_t i = 0; i < sequences.size(); ++i) {
    items.push_back({sequences[i], tokens, logits, i});
    if (i > 0) items.back().reads_with = sequences[0];
  }
}

void ReadPrompt(const EvalSetup& setup, std::span<Sequence* const> sequences, std::span<const int32_t> tokens,
                const PromptSink& sink) {
  std::vector<StepItem> items;
  AddPrompt(sequences, tokens, sink ? LogitsRows::kLast : LogitsRows::kNone, items);
  const LogitsSink each = [&](std::span<const LogitsRow> rows) {
    for (const LogitsRow& row : rows) sink(row.tag, row.logits);
  };
  setup.engine->Prefill(items, each, {.stop = setup.stop});
  setup.CheckStop();
}

Protocol::Mode ParseMode(const std::string& text) {
  if (text == "stream") return Protocol::Mode::kStream;
  if (text == "continue") return Protocol::Mode::kContinue;
  Fail(ErrorCode::kInvalidArgument, "--mode: expected stream or continue, found '{}'", text);
}

void FeedCost::operator+=(const FeedCost& other) {
  prompt_tokens += other.prompt_tokens;
  prompt_seconds += other.prompt_seconds;
  prompt_caches = std::max(prompt_caches, other.prompt_caches);
  tokens += other.tokens;
  seconds += other.seconds;
}

Json BeginRow(const EvalSetup& setup, const Subject& subject, std::string_view command) {
  Json row;
  row["command"] = command;
  AddRunInfo(row, *setup.engine, *subject.config, setup.seed);
  if (setup.keep > 0) row["keep"] = setup.keep;
  row["match"] = subject.match.empty() ? Json() : Json(subject.match);
  row["matched_to"] = subject.matched_to.empty() ? Json() : Json(subject.matched_to);
  return row;
}

void AddProtocol(Json& row, const Protocol& protocol) {
  const bool stream = protocol.mode == Protocol::Mode::kStream;
  row["mode"] = stream ? "stream" : "continue";
  row["step"] = stream ? protocol.step : 1;
  row["prompt"] = stream ? Json() : Json(protocol.prompt);
  if (protocol.llama_windows) row["protocol"] = "llama";
}

void AddCost(Json& row, const FeedCost& cost) {
  const auto rate = [](size_t tokens, double seconds) {
    return seconds > 0 ? static_cast<double>(tokens) / seconds : kNotANumber;
  };
  row["tokens_per_second"] = rate(cost.tokens, cost.seconds);
  row["prefill_tokens_per_second"] = rate(cost.prompt_tokens, cost.prompt_seconds);
  if (cost.prompt_caches > 1) row["prefill_caches"] = cost.prompt_caches;
}

std::vector<Column> SubjectColumns() { return {{"kv_spec", "cache"}, {"match", "rival at"}}; }

void AppendCacheColumns(std::vector<Column>& columns) {
  columns.push_back({"tokens_seen", "seen", Column::Style::kCount});
  columns.push_back({"tokens_resident", "resident", Column::Style::kCount, 1});
  columns.push_back({"kv_bytes", "bytes", Column::Style::kBytes});
  columns.push_back({"kv_bytes_peak", "peak", Column::Style::kBytes});
  columns.push_back({"kv_bytes_full", "full", Column::Style::kBytes});
  columns.push_back({"sidecar_bytes", "sidecar", Column::Style::kBytes});
  columns.push_back({"tokens_per_second", "tokens/s", Column::Style::kCount});
}

void StatsTally::Add(const CacheStats& stats) {
  const size_t peak = std::max(stats_.kv_bytes_peak, stats.kv_bytes_peak);
  if (stats.tokens_seen > stats_.tokens_seen) stats_ = stats;
  stats_.kv_bytes_peak = peak;
}

}  // namespace lesskv
