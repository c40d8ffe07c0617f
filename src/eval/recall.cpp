#include "eval/recall.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/check.h"
#include "base/error.h"
#include "base/rng.h"
#include "eval/metrics.h"
#include "eval/stopwatch.h"
#include "kernels/basic/basic.h"

namespace lesskv {
namespace {

struct Outcome {
  bool first_token = false;
  bool all = false;
};

// Prompts through the cache, then greedy answers as long as they are right.
class AnswerBatch {
 public:
  AnswerBatch(const EvalSetup& setup, const Subject& subject, std::span<const RecallSample> samples)
      : setup_(setup), samples_(samples), outcomes_(samples.size()), right_(samples.size(), 0) {
    for (size_t i = 0; i < samples.size(); ++i) sequences_.emplace_back(subject.config);
  }

  // Reads the prompts, or what stands before their questions, for all subjects of a group.
  static void ReadAll(std::span<AnswerBatch> batches, RecallOptions::Ask ask) {
    const EvalSetup& setup = batches[0].setup_;
    const bool asks = ask == RecallOptions::Ask::kWithPrompt;
    const Stopwatch watch;
    size_t n_tokens = 0;
    for (size_t i = 0; i < batches[0].samples_.size(); ++i) {
      const RecallSample& sample = batches[0].samples_[i];
      std::vector<Sequence*> sequences;
      for (AnswerBatch& batch : batches) sequences.push_back(&batch.sequences_[i]);
      const auto tokens = std::span(sample.prompt).first(asks ? sample.prompt.size() : sample.question);
      const PromptSink judge = [&](size_t s, std::span<const float> logits) { batches[s].Judge(i, logits); };
      ReadPrompt(setup, sequences, tokens, asks ? judge : PromptSink());
      n_tokens += tokens.size();
    }
    for (AnswerBatch& batch : batches) batch.cost_ += {n_tokens, watch.Seconds(), batches.size()};
  }

  // The prompts a few tokens at a time, evicting in between.
  void Stream(size_t step) {
    const Stopwatch watch;
    for (size_t begin = 0;; begin += step) {
      std::vector<StepItem> items;
      for (size_t i = 0; i < samples_.size(); ++i) {
        const std::span<const int32_t> prompt = samples_[i].prompt;
        if (begin >= prompt.size()) continue;
        const auto tokens = prompt.subspan(begin, std::min(step, prompt.size() - begin));
        const bool last = begin + tokens.size() == prompt.size();
        items.push_back({&sequences_[i], tokens, last ? LogitsRows::kLast : LogitsRows::kNone, i, StepKind::kStream});
        cost_.prompt_tokens += tokens.size();
      }
      if (items.empty()) break;
      setup_.engine->Step(items, [&](std::span<const LogitsRow> rows) {
        for (const LogitsRow& row : rows) Judge(row.tag, row.logits);
      });
      setup_.CheckStop();
    }
    for (Sequence& sequence : sequences_) sequence.cache().EndPrompt();
    cost_.prompt_seconds += watch.Seconds();
  }

  // Questions behind documents that were read without them.
  void AskAll() {
    const Stopwatch watch;
    for (size_t step = 0;; ++step) {
      std::vector<StepItem> items;
      for (size_t i = 0; i < samples_.size(); ++i) {
        const size_t at = samples_[i].question + step;
        if (at >= samples_[i].prompt.size()) continue;
        const bool last = at + 1 == samples_[i].prompt.size();
        items.push_back({&sequences_[i], {&samples_[i].prompt[at], 1}, last ? LogitsRows::kLast : LogitsRows::kNone, i});
      }
      if (items.empty()) break;
      setup_.engine->Decode(items, [&](std::span<const LogitsRow> rows) {
        for (const LogitsRow& row : rows) Judge(row.tag, row.logits);
      });
      cost_.tokens += items.size();
    }
    cost_.seconds += watch.Seconds();
  }

  void Answer() {
    const Stopwatch watch;
    for (;;) {
      std::vector<StepItem> items;
      for (size_t i = 0; i < samples_.size(); ++i) {
        if (right_[i] == kWrong || right_[i] >= samples_[i].answer.size()) continue;
        items.push_back({&sequences_[i], {&samples_[i].answer[right_[i] - 1], 1}, LogitsRows::kLast, i});
      }
      if (items.empty()) break;
      setup_.engine->Decode(items, [&](std::span<const LogitsRow> rows) {
        for (const LogitsRow& row : rows) Judge(row.tag, row.logits);
      });
      cost_.tokens += items.size();
    }
    cost_.seconds += watch.Seconds();
  }

  const std::vector<Outcome>& outcomes() const { return outcomes_; }
  const FeedCost& cost() const { return cost_; }
  const std::vector<Sequence>& sequences() const { return sequences_; }

 private:
  // Judges a sample's next token by the logits that predict it.
  void Judge(size_t sample, std::span<const float> logits) {
    const std::vector<int32_t>& answer = samples_[sample].answer;
    LogMass(logits);  // throws where they are not numbers
    const bool right = ArgMax(logits.data(), logits.size()) == static_cast<size_t>(answer[right_[sample]]);
    if (right_[sample] == 0) outcomes_[sample].first_token = right;
    right_[sample] = right ? right_[sample] + 1 : kWrong;
    outcomes_[sample].all = right_[sample] == answer.size();
  }

  static constexpr size_t kWrong = SIZE_MAX;

  const EvalSetup& setup_;
  std::span<const RecallSample> samples_;
  std::vector<Sequence> sequences_;
  std::vector<Outcome> outcomes_;
  std::vector<size_t> right_;  // answer tokens that were right so far, or kWrong
  FeedCost cost_;
};

// The questions of one kind and length: [depth][sample] in one list, the depth changing slowest.
std::vector<RecallSample> MakeSamples(const RecallTasks& tasks, const RecallOptions& options, RecallKind kind,
                                      size_t length, uint64_t seed) {
  std::vector<RecallSample> samples;
  for (size_t d = 0; d < options.depths.size(); ++d) {
    for (size_t i = 0; i < options.samples; ++i) {
      // Every question has a seed of its own; sums of odd multiples keep neighbouring ones apart.
      const uint64_t own = Rng(seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(kind) * 1000003 + length * 10007 +
                               d * 101 + i * 0x632be59bd9b4e019u)
                               .Next();
      samples.push_back(tasks.Make(kind, length, options.depths[d], own));
    }
  }
  return samples;
}

void CheckOptions(const EvalSetup& setup, RecallOptions& options) {
  if (options.lengths.empty()) options.lengths = {setup.ctx - std::min(setup.ctx, RecallOptions::kAnswerRoom)};
  for (const size_t length : options.lengths) {
    if (length == 0 || length + RecallOptions::kAnswerRoom > setup.ctx) {
      Fail(ErrorCode::kInvalidArgument,
           "--length: a prompt of {} tokens and {} for the answer do not fit a context of {}", length,
           RecallOptions::kAnswerRoom, setup.ctx);
    }
  }
  for (const double depth : options.depths) {
    if (!(depth >= 0 && depth <= 1)) {
      Fail(ErrorCode::kInvalidArgument, "--depths: expected numbers from 0 to 1, found {}", depth);
    }
  }
  if (options.samples == 0 || options.depths.empty() || options.kinds.empty()) {
    Fail(ErrorCode::kInvalidArgument, "recall needs at least one task, depth and sample");
  }
  if (options.protocol.mode == Protocol::Mode::kStream && options.protocol.step == 0) {
    Fail(ErrorCode::kInvalidArgument, "--step: expected 1 or more tokens, found 0");
  }
}

// What is known of a subject.
struct RecallTally {
  std::vector<Outcome> outcomes;
  FeedCost cost;
  StatsTally stats;
};

// Samples of one length through a group of subjects, a batch of them at a time.
void RunGroup(const EvalSetup& setup, const RecallOptions& options, size_t length, std::span<const size_t> group,
              std::span<const RecallSample> samples, std::span<RecallTally> tallies) {
  const size_t n_batch = setup.BatchSize(group, length, RecallOptions::kAnswerRoom);
  const bool streams = options.protocol.mode == Protocol::Mode::kStream;
  for (size_t begin = 0; begin < samples.size(); begin += n_batch) {
    std::vector<AnswerBatch> batches;
    for (const size_t s : group)
      batches.emplace_back(setup, setup.subjects[s], samples.subspan(begin, std::min(n_batch, samples.size() - begin)));
    if (!streams) AnswerBatch::ReadAll(batches, options.ask);
    for (size_t i = 0; i < group.size(); ++i) {
      AnswerBatch& batch = batches[i];
      if (streams) batch.Stream(options.protocol.step);
      else if (options.ask == RecallOptions::Ask::kAfterPrompt) batch.AskAll();
      batch.Answer();
      RecallTally& tally = tallies[group[i]];
      tally.outcomes.insert(tally.outcomes.end(), batch.outcomes().begin(), batch.outcomes().end());
      tally.cost += batch.cost();
      for (const Sequence& sequence : batch.sequences()) tally.stats.Add(sequence.Stats());
    }
  }
}

Json MakeRow(const EvalSetup& setup, const Subject& subject, const RecallOptions& options, RecallKind kind,
             size_t length, const RecallTally& tally) {
  const std::vector<Outcome>& outcomes = tally.outcomes;
  ClusteredMean all, first;
  std::vector<double> by_depth(options.depths.size(), 0);
  for (size_t i = 0; i < outcomes.size(); ++i) {
    all.AddOne(outcomes[i].all);
    first.AddOne(outcomes[i].first_token);
    by_depth[i / options.samples] += outcomes[i].all / static_cast<double>(options.samples);
  }
  Json row = BeginRow(setup, subject, "recall");
  AddProtocol(row, options.protocol);
  row["prompt"] = nullptr;  // its length is the row's own
  const bool stream = options.protocol.mode == Protocol::Mode::kStream;
  row["ask"] = stream ? Json() : Json(options.ask == RecallOptions::Ask::kWithPrompt ? "with" : "after");
  row["task"] = Name(kind);
  row["length"] = length;
  row["samples"] = outcomes.size();
  row["accuracy"] = all.Mean();
  row["accuracy_se"] = all.StandardError();
  row["first_token_accuracy"] = first.Mean();
  row["depths"] = options.depths;
  row["accuracy_by_depth"] = by_depth;
  row["tokens_scored"] = outcomes.size();
  AddCacheStats(row, tally.stats.stats(), *subject.config);
  AddCost(row, tally.cost);
  return row;
}

}  // namespace

Report EvaluateRecall(const EvalSetup& setup, const RecallOptions& given) {
  RecallOptions options = given;
  CheckOptions(setup, options);
  std::vector<std::string> words = options.words;
  if (words.empty()) words.assign(EvalWords().begin(), EvalWords().end());
  const RecallTasks tasks(*setup.tokenizer, words, options.text);

  Report report;
  const bool streams = options.protocol.mode == Protocol::Mode::kStream;
  const std::vector<std::vector<size_t>> groups = streams ? setup.SingleGroups() : setup.PromptGroups();
  size_t done = 0;
  const size_t total = options.kinds.size() * options.lengths.size() * setup.subjects.size();
  for (const RecallKind kind : options.kinds) {
    for (const size_t length : options.lengths) {
      const std::vector<RecallSample> samples = MakeSamples(tasks, options, kind, length, setup.seed);
      std::vector<RecallTally> tallies(setup.subjects.size());
      for (const std::vector<size_t>& group : groups) {
        RunGroup(setup, options, length, group, samples, tallies);
        setup.Progress(done += group.size(), total);
      }
      for (size_t s = 0; s < tallies.size(); ++s)
        report.rows.push_back(MakeRow(setup, setup.subjects[s], options, kind, length, tallies[s]));
    }
  }
  report.columns = SubjectColumns();
  report.columns.push_back({"task", "task"});
  report.columns.push_back({"length", "length", Column::Style::kCount});
  report.columns.push_back({"accuracy", "right %", Column::Style::kPercent, 1, "accuracy_se"});
  report.columns.push_back({"first_token_accuracy", "first token %", Column::Style::kPercent, 1});
  report.columns.push_back({"accuracy_by_depth", "by depth %", Column::Style::kPercent});
  AppendCacheColumns(report.columns);
  std::string depths;
  for (const double depth : options.depths) depths += fmt::format("{}{}", depths.empty() ? "" : " ", depth);
  report.notes.push_back(fmt::format("by depth: the answer stands at {} of the prompt (0: first); {} questions each",
                                     depths, options.samples));
  return report;
}

}  // namespace lesskv
