#include "eval/ruler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "base/rng.h"
#include "engine/generate.h"
#include "eval/metrics.h"
#include "eval/stopwatch.h"

namespace lesskv {
namespace {

// Documents that one subject has read, questions and answers of all together.
class RulerBatch {
 public:
  RulerBatch(const EvalSetup& setup, const Subject& subject, std::span<const RulerSample> samples)
      : setup_(setup), samples_(samples), scores_(samples.size(), 0), next_(samples.size()) {
    for (size_t i = 0; i < samples.size(); ++i) sequences_.emplace_back(subject.config);
  }

  // Reads the documents, and the questions where they are part of the prompt, for all subjects of a group.
  static void ReadAll(std::span<RulerBatch> batches, RecallOptions::Ask ask, size_t max_tokens) {
    const EvalSetup& setup = batches[0].setup_;
    const bool asks = ask == RecallOptions::Ask::kWithPrompt;
    const Stopwatch watch;
    size_t n_tokens = 0;
    for (size_t i = 0; i < batches[0].samples_.size(); ++i) {
      const RulerSample& sample = batches[0].samples_[i];
      std::vector<int32_t> seen = sample.document_ids;
      seen.insert(seen.end(), sample.question_ids.begin(), sample.question_ids.end());
      GenerationOptions options;
      options.sampler.temperature = 0;
      options.max_tokens = max_tokens;
      for (RulerBatch& batch : batches) batch.generations_.emplace_back(*setup.tokenizer, options, seen, setup.ctx);
      std::vector<Sequence*> sequences;
      for (RulerBatch& batch : batches) sequences.push_back(&batch.sequences_[i]);
      const PromptSink take = [&](size_t s, std::span<const float> logits) { batches[s].Take(i, logits); };
      ReadPrompt(setup, sequences, asks ? seen : sample.document_ids, asks ? take : PromptSink());
      n_tokens += asks ? seen.size() : sample.document_ids.size();
    }
    for (RulerBatch& batch : batches) batch.cost_ += {n_tokens, watch.Seconds(), batches.size()};
  }

  void Answer(RecallOptions::Ask ask) {
    if (ask == RecallOptions::Ask::kAfterPrompt) AskAll();
    while (Step()) setup_.CheckStop();
  }

  const std::vector<double>& scores() const { return scores_; }
  const FeedCost& cost() const { return cost_; }
  const std::vector<Sequence>& sequences() const { return sequences_; }

 private:
  void Take(size_t i, std::span<const float> logits) {
    const Generation::Output output = generations_[i].Push(logits);
    scores_[i] = RulerScore(samples_[i], generations_[i].text());
    next_[i] = output.finish || scores_[i] == 1 ? std::nullopt : std::optional(output.token);
  }

  void Decode(const std::vector<StepItem>& items) {
    const Stopwatch watch;
    setup_.engine->Decode(items, [&](std::span<const LogitsRow> rows) {
      for (const LogitsRow& row : rows) Take(row.tag, row.logits);
    });
    cost_.tokens += items.size();
    cost_.seconds += watch.Seconds();
  }

  void AskAll() {
    for (size_t at = 0;; ++at) {
      std::vector<StepItem> items;
      for (size_t i = 0; i < samples_.size(); ++i) {
        const std::vector<int32_t>& question = samples_[i].question_ids;
        if (at >= question.size()) continue;
        items.push_back({&sequences_[i], {&question[at], 1}, at + 1 == question.size() ? LogitsRows::kLast : LogitsRows::kNone, i});
      }
      if (items.empty()) return;
      Decode(items);
    }
  }

  bool Step() {
    std::vector<StepItem> items;
    std::vector<int32_t> tokens(samples_.size());
    for (size_t i = 0; i < samples_.size(); ++i) {
      if (!next_[i]) continue;
      tokens[i] = *next_[i];
      items.push_back({&sequences_[i], {&tokens[i], 1}, LogitsRows::kLast, i});
    }
    if (items.empty()) return false;
    Decode(items);
    return true;
  }

  const EvalSetup& setup_;
  std::span<const RulerSample> samples_;
  std::vector<Sequence> sequences_;
  std::vector<Generation> generations_;
  std::vector<double> scores_;
  std::vector<std::optional<int32_t>> next_;  // what is to be fed; nothing when a text has ended
  FeedCost cost_;
};

// Scores of one subject, [kinds][samples].
using Scores = std::vector<std::vector<double>>;

// What is known of a subject.
struct RulerTally {
  Scores scores;
  FeedCost cost;
  StatsTally stats;
};

// Samples of one kind through a group of subjects, a batch of them at a time; says how many answers a batch has given.
void RunGroup(const EvalSetup& setup, const RulerOptions& options, size_t kind, std::span<const size_t> group,
              std::span<const RulerSample> samples, std::span<RulerTally> tallies, const std::function<void(size_t)>& answered) {
  const size_t n_batch = setup.BatchSize(group, options.length, RulerOptions::kAnswerRoom);
  for (size_t begin = 0; begin < samples.size(); begin += n_batch) {
    std::vector<RulerBatch> batches;
    for (const size_t s : group)
      batches.emplace_back(setup, setup.subjects[s], samples.subspan(begin, std::min(n_batch, samples.size() - begin)));
    RulerBatch::ReadAll(batches, options.ask, AnswerTokens(options.kinds[kind]));
    for (size_t i = 0; i < group.size(); ++i) {
      batches[i].Answer(options.ask);
      RulerTally& tally = tallies[group[i]];
      tally.scores[kind].insert(tally.scores[kind].end(), batches[i].scores().begin(), batches[i].scores().end());
      tally.cost += batches[i].cost();
      for (const Sequence& sequence : batches[i].sequences()) tally.stats.Add(sequence.Stats());
      answered(batches[i].scores().size());
    }
  }
}

ClusteredMean MeanOf(std::span<const double> scores) {
  ClusteredMean mean;
  for (const double score : scores) mean.AddOne(score);
  return mean;
}

std::vector<size_t> TasksToAverage(const EvalSetup& setup, const std::vector<RulerTally>& tallies, size_t n_kinds) {
  const auto is_full = [](const Subject& s) { return s.config->spec_text() == "full"; };
  const auto full = std::find_if(setup.subjects.begin(), setup.subjects.end(), is_full);
  std::vector<size_t> tasks;
  for (size_t k = 0; k < n_kinds; ++k)
    if (full == setup.subjects.end() || MeanOf(tallies[static_cast<size_t>(full - setup.subjects.begin())].scores[k]).Mean() >= 0.5)
      tasks.push_back(k);
  return tasks;
}

void AddScores(Json& row, const RulerOptions& options, const Scores& scores, std::span<const size_t> averaged) {
  for (size_t k = 0; k < scores.size(); ++k) {
    const ClusteredMean mean = MeanOf(scores[k]);
    row[fmt::format("score_{}", Name(options.kinds[k]))] = mean.Mean();
    row[fmt::format("score_{}_se", Name(options.kinds[k]))] = mean.StandardError();
  }
  row["tasks_averaged"] = Json::array();
  // Tasks are given, not drawn: how they differ is no error of their average.
  double sum = 0, variance = 0;
  for (const size_t k : averaged) {
    const ClusteredMean mean = MeanOf(scores[k]);
    row["tasks_averaged"].push_back(Name(options.kinds[k]));
    sum += mean.Mean();
    variance += mean.StandardError() * mean.StandardError();
  }
  const auto n = static_cast<double>(averaged.size());
  row["average"] = averaged.empty() ? kNotANumber : sum / n;
  row["average_se"] = averaged.empty() ? kNotANumber : std::sqrt(variance) / n;
}

void CheckOptions(const EvalSetup& setup, RulerOptions& options) {
  if (options.length == 0) options.length = setup.ctx - std::min(setup.ctx, RulerOptions::kAnswerRoom);
  if (options.kinds.empty() || options.samples == 0) Fail(ErrorCode::kInvalidArgument, "RULER needs at least one task and sample");
  size_t answer = 0;
  for (const RulerKind kind : options.kinds) answer = std::max(answer, AnswerTokens(kind));
  if (options.length == 0 || options.length + answer > setup.ctx)
    Fail(ErrorCode::kInvalidArgument, "--length: {} tokens of document and question and {} for the answer do not fit a context of {}", options.length,
         answer, setup.ctx);
}

// The documents of one task, which are the same whatever others are asked for.
std::vector<RulerSample> Samples(const RulerTasks& tasks, const RulerOptions& options, RulerKind kind, uint64_t seed) {
  std::vector<RulerSample> samples;
  for (size_t i = 0; i < options.samples; ++i)
    samples.push_back(
        tasks.Make(kind, options.length, Rng(seed * 1000003 + static_cast<uint64_t>(kind) * 10007 + i).Next()));
  return samples;
}

std::vector<Column> Columns(std::span<const RulerKind> kinds) {
  std::vector<Column> columns = SubjectColumns();
  columns.push_back({"average", "average %", Column::Style::kPercent, 1, "average_se"});
  for (const RulerKind kind : kinds)
    columns.push_back(
        {fmt::format("score_{}", Name(kind)), fmt::format("{} %", Name(kind)), Column::Style::kPercent, 0});
  AppendCacheColumns(columns);
  return columns;
}

}  // namespace

Report EvaluateRuler(const EvalSetup& setup, const RulerOptions& given) {
  RulerOptions options = given;
  CheckOptions(setup, options);
  const RulerTasks tasks(*setup.tokenizer, options.text, options.questions);
  std::vector<RulerTally> tallies(setup.subjects.size());
  for (RulerTally& tally : tallies) tally.scores.resize(options.kinds.size());
  const std::vector<std::vector<size_t>> groups = setup.PromptGroups();
  const size_t total = options.kinds.size() * setup.subjects.size() * options.samples;
  size_t done = 0;
  const auto answered = [&](size_t n) { setup.Progress(done += n, total); };
  for (size_t k = 0; k < options.kinds.size(); ++k) {
    const std::vector<RulerSample> samples = Samples(tasks, options, options.kinds[k], setup.seed);
    for (const std::vector<size_t>& group : groups) RunGroup(setup, options, k, group, samples, tallies, answered);
  }
  const std::vector<size_t> averaged = TasksToAverage(setup, tallies, options.kinds.size());
  Report report;
  for (size_t s = 0; s < setup.subjects.size(); ++s) {
    Json& row = report.rows.emplace_back(BeginRow(setup, setup.subjects[s], "ruler"));
    AddProtocol(row, {.mode = Protocol::Mode::kContinue});
    row["prompt"] = nullptr;  // each document's own
    row["ask"] = options.ask == RecallOptions::Ask::kWithPrompt ? "with" : "after";
    row["length"] = options.length;
    row["samples"] = options.samples;
    AddScores(row, options, tallies[s].scores, averaged);
    row["tokens_scored"] = tallies[s].cost.tokens;
    AddCacheStats(row, tallies[s].stats.stats(), *setup.subjects[s].config);
    AddCost(row, tallies[s].cost);
  }
  report.columns = Columns(options.kinds);
  report.notes.push_back(fmt::format("{} documents a task; averaged are {} tasks{}", options.samples, averaged.size(),
                                     averaged.size() < options.kinds.size() ? ": the full cache does not reach half of the others" : ""));
  return report;
}

}  // namespace lesskv
