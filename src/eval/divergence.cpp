#include "eval/divergence.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "base/check.h"
#include "base/threads.h"
#include "eval/metrics.h"
#include "eval/perplexity.h"
#include "eval/window_batch.h"
#include "kernels/basic/basic.h"

namespace lesskv {
namespace {

// The reference logits of one step are at most about this many bytes.
constexpr size_t kReferenceBytes = size_t{256} << 20;

// The full cache's predictions of one step, and its likelihoods of all tokens of the batch.
class Reference {
 public:
  Reference(size_t n_windows, size_t tokens_per_step, size_t n_vocab)
      : tokens_per_step_(tokens_per_step), n_vocab_(n_vocab), rows_(n_windows * tokens_per_step) {
    logits_.resize(rows_.size() * n_vocab);
    probabilities_.resize(rows_.size() * n_vocab);
  }

  static size_t RowBytes(size_t n_vocab) { return 2 * n_vocab * sizeof(float); }

  void Store(const ScoredRow& row) {
    const size_t at = Index(row);
    std::copy(row.logits.begin(), row.logits.end(), logits_.begin() + static_cast<std::ptrdiff_t>(at * n_vocab_));
    rows_[at] = {row.target, LogMass(row.logits)};
    float* p = &probabilities_[at * n_vocab_];
    for (size_t i = 0; i < n_vocab_; ++i) p[i] = static_cast<float>(row.logits[i] - rows_[at].log_mass);
    Exp(p, n_vocab_);
  }

  ReferenceDistribution Of(const ScoredRow& row) const {
    const size_t at = Index(row);
    CHECK(rows_[at].target == row.target, "the cache is at token {}, the reference at {}", row.target,
          rows_[at].target);
    return {std::span(logits_).subspan(at * n_vocab_, n_vocab_),
            std::span(probabilities_).subspan(at * n_vocab_, n_vocab_), rows_[at].log_mass};
  }

 private:
  struct Row {
    size_t target = 0;
    double log_mass = 0;
  };

  size_t Index(const ScoredRow& row) const { return row.window * tokens_per_step_ + row.target % tokens_per_step_; }

  size_t tokens_per_step_, n_vocab_;
  std::vector<Row> rows_;
  std::vector<float> logits_, probabilities_;  // [row, n_vocab]
};

// What one token's prediction is.
struct TokenScore {
  double nats = kNotANumber;
  double full_nats = kNotANumber;
  double kl = kNotANumber;
  bool same_top1 = false;
};

TokenScore Compare(const Reference& reference, const ScoredRow& row, size_t token) {
  const ReferenceDistribution full = reference.Of(row);
  const double log_mass = LogMass(row.logits);
  return {.nats = log_mass - row.logits[token],
          .full_nats = full.log_mass - full.logits[token],
          .kl = KlDivergence(full, row.logits, log_mass),
          .same_top1 = ArgMax(full.logits.data(), full.logits.size()) == ArgMax(row.logits.data(), row.logits.size())};
}

// Everything gathered about one subject.
class DivergenceTally {
 public:
  void AddWindow(const TextWindow& window, size_t first_target, std::span<const TokenScore> scores) {
    std::vector<double> nats, full_nats;
    double kl = 0, same = 0, difference = 0;
    for (const TokenScore& score : scores) {
      nats.push_back(score.nats);
      full_nats.push_back(score.full_nats);
      all_kl_.push_back(score.kl);
      kl += score.kl;
      same += score.same_top1;
      difference += score.nats - score.full_nats;
    }
    perplexity_.AddWindow(window, first_target, nats);
    kl_.Add(kl, scores.size());
    same_top1_.Add(same, scores.size());
    log_ratio_.Add(difference, scores.size());
    for (const double value : full_nats) full_sum_ += value;
  }

  void AddTo(Json& row) const {
    perplexity_.AddTo(row);
    row["kl_mean"] = kl_.Mean();
    row["kl_mean_se"] = kl_.StandardError();
    row["kl_p95"] = Percentile(all_kl_, 95);
    row["kl_p99"] = Percentile(all_kl_, 99);
    row["kl_max"] = Percentile(all_kl_, 100);
    row["same_top1"] = same_top1_.Mean();
    row["same_top1_se"] = same_top1_.StandardError();
    const double ratio = std::exp(log_ratio_.Mean());
    row["perplexity_full"] = std::exp(full_sum_ / static_cast<double>(kl_.count()));
    row["perplexity_ratio"] = ratio;
    row["perplexity_ratio_se"] = ratio * log_ratio_.StandardError();
  }

  FeedCost cost;
  StatsTally stats;

 private:
  PerplexityTally perplexity_;
  ClusteredMean kl_, same_top1_, log_ratio_;
  std::vector<double> all_kl_;
  double full_sum_ = 0;
};

// The prompts of all, each group of subjects at once; the reference with the first group that reads as it does.
void ReadPrompts(const EvalSetup& setup, const std::shared_ptr<const CacheConfig>& full, WindowBatch& reference, std::span<WindowBatch> batches) {
  bool read = false;
  for (const std::vector<size_t>& group : setup.PromptGroups()) {
    std::vector<WindowBatch*> together;
    for (const size_t s : group) together.push_back(&batches[s]);
    if (!read && setup.subjects[group[0]].config->ReadsPromptsAs(*full)) {
      together.push_back(&reference);
      read = true;
    }
    WindowBatch::ReadPrompts(together);
  }
}

// Scores of a batch, [window][target - first].
using Scores = std::vector<std::vector<TokenScore>>;

void RunBatch(const EvalSetup& setup, const std::shared_ptr<const CacheConfig>& full,
              std::span<const TextWindow> windows, const Protocol& protocol, std::span<DivergenceTally> tallies) {
  WindowBatch reference_batch(setup, full, windows, protocol);
  Reference reference(windows.size(), reference_batch.TokensPerStep(), setup.engine->model().config().n_vocab);
  const size_t first = reference_batch.FirstTarget();
  std::vector<WindowBatch> batches;
  std::vector<Scores> scores(setup.subjects.size(), Scores(windows.size()));
  for (size_t s = 0; s < setup.subjects.size(); ++s) {
    batches.emplace_back(setup, setup.subjects[s].config, windows, protocol);
    for (size_t w = 0; w < windows.size(); ++w) scores[s][w].resize(windows[w].ids.size() - first);
  }

  if (protocol.mode == Protocol::Mode::kContinue) ReadPrompts(setup, full, reference_batch, batches);
  const auto store = [&](std::span<const ScoredRow> rows) {
    ParallelFor(rows.size(), [&](size_t i) { reference.Store(rows[i]); });
  };
  while (reference_batch.Step(store)) {
    for (size_t s = 0; s < batches.size(); ++s) {
      const bool stepped = batches[s].Step([&](std::span<const ScoredRow> rows) {
        ParallelFor(rows.size(), [&](size_t i) {
          const ScoredRow& row = rows[i];
          const auto token = static_cast<size_t>(windows[row.window].ids[row.target]);
          scores[s][row.window][row.target - first] = Compare(reference, row, token);
        });
      });
      CHECK(stepped);
    }
    setup.CheckStop();
  }
  for (size_t s = 0; s < batches.size(); ++s) {
    for (size_t w = 0; w < windows.size(); ++w) tallies[s].AddWindow(windows[w], first, scores[s][w]);
    tallies[s].cost += batches[s].cost();
    batches[s].AddStats(tallies[s].stats);
  }
}

std::vector<Column> Columns() {
  std::vector<Column> columns = SubjectColumns();
  columns.push_back({"kl_mean", "KL mean", Column::Style::kFixed, 4, "kl_mean_se"});
  columns.push_back({"kl_p95", "95 %", Column::Style::kFixed, 3});
  columns.push_back({"kl_p99", "99 %", Column::Style::kFixed, 3});
  columns.push_back({"kl_max", "max", Column::Style::kFixed, 2});
  columns.push_back({"same_top1", "same top-1 %", Column::Style::kPercent, 1});
  columns.push_back({"perplexity", "perplexity", Column::Style::kFixed, 3});
  columns.push_back({"perplexity_ratio", "ratio to full", Column::Style::kFixed, 4, "perplexity_ratio_se"});
  AppendCacheColumns(columns);
  return columns;
}

// Texts a batch: bounded by the caches of all subjects together (they run in lockstep) and by the reference logits.
size_t LockstepBatch(const EvalSetup& setup, const Protocol& protocol) {
  const size_t row_bytes = Reference::RowBytes(setup.engine->model().config().n_vocab);
  const size_t step = protocol.mode == Protocol::Mode::kStream ? protocol.step : 1;
  const size_t by_logits = std::max(size_t{1}, kReferenceBytes / (row_bytes * step));
  size_t bytes = 1;
  for (const Subject& subject : setup.subjects) {
    bytes += subject.config->Plan(protocol.prompt, setup.ctx - protocol.prompt).bytes_peak;
  }
  return std::clamp(std::min(by_logits, EvalSetup::kBatchBytes / bytes), size_t{1}, std::max(setup.batch, size_t{1}));
}

}  // namespace

Report EvaluateDivergence(const EvalSetup& setup, const DivergenceOptions& options) {
  CheckProtocol(options.protocol, setup.ctx);
  const std::vector<TextWindow> windows =
      ReadWindows(*setup.tokenizer, options.texts, setup.ctx, MinWindowLength(options.protocol), options.max_windows,
                  options.protocol.llama_windows);
  const std::shared_ptr<const CacheConfig> full = setup.engine->MakeCacheConfig(CacheSpec(), setup.ctx);
  const size_t n_batch = LockstepBatch(setup, options.protocol);
  std::vector<DivergenceTally> tallies(setup.subjects.size());
  for (size_t begin = 0; begin < windows.size(); begin += n_batch) {
    const auto batch = std::span(windows).subspan(begin, std::min(n_batch, windows.size() - begin));
    RunBatch(setup, full, batch, options.protocol, tallies);
    setup.Progress(begin + batch.size(), windows.size());
  }
  Report report;
  report.columns = Columns();
  for (size_t s = 0; s < setup.subjects.size(); ++s) {
    Json row = BeginRow(setup, setup.subjects[s], "divergence");
    AddProtocol(row, options.protocol);
    row["texts"] = options.texts;
    tallies[s].AddTo(row);
    AddCacheStats(row, tallies[s].stats.stats(), *setup.subjects[s].config);
    AddCost(row, tallies[s].cost);
    report.rows.push_back(row);
  }
  return report;
}

}  // namespace lesskv
