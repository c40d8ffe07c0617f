#include "eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"
#include "base/threads.h"
#include "eval/window_batch.h"

namespace lesskv {
namespace {

// Negative log-likelihoods of a batch's targets, [window][target - first].
using Nats = std::vector<std::vector<double>>;

Nats MakeNats(std::span<const TextWindow> windows, size_t first_target) {
  Nats nats(windows.size());
  for (size_t w = 0; w < windows.size(); ++w) nats[w].resize(windows[w].ids.size() - first_target, kNotANumber);
  return nats;
}

void Score(const EvalSetup& setup, const Subject& subject, std::span<const TextWindow> windows,
           const Protocol& protocol, PerplexityTally& tally, FeedCost& cost, StatsTally& stats) {
  WindowBatch batch(*setup.engine, subject.config, windows, protocol);
  const size_t first = batch.FirstTarget();
  Nats nats = MakeNats(windows, first);
  cost += WindowBatch::Run(setup, batch, [&](std::span<const ScoredRow> rows) {
    ParallelFor(rows.size(), [&](size_t i) {
      const ScoredRow& row = rows[i];
      const size_t token = static_cast<size_t>(windows[row.window].ids[row.target]);
      nats[row.window][row.target - first] = LogMass(row.logits) - row.logits[token];
    });
  });
  for (size_t w = 0; w < windows.size(); ++w) tally.AddWindow(windows[w], first, nats[w]);
  batch.AddStats(stats);
}

}  // namespace

void PerplexityTally::AddWindow(const TextWindow& window, size_t first_target, std::span<const double> nats) {
  CHECK(first_target + nats.size() == window.ids.size(), "{} scores for {} tokens", nats.size(), window.ids.size());
  double sum = 0;
  size_t words = 0, bytes = 0;
  for (size_t i = 0; i < nats.size(); ++i) {
    sum += nats[i];
    words += window.words[first_target + i];
    bytes += window.bytes[first_target + i];
  }
  per_token_.Add(sum, nats.size());
  per_word_.Add(sum, words);
  per_byte_.Add(sum, bytes);
  ++n_windows_;
}

void PerplexityTally::AddTo(Json& row) const {
  const double token = std::exp(per_token_.Mean()), word = std::exp(per_word_.Mean());
  row["perplexity"] = token;
  row["perplexity_se"] = token * per_token_.StandardError();
  row["word_perplexity"] = word;
  row["word_perplexity_se"] = word * per_word_.StandardError();
  row["byte_perplexity"] = std::exp(per_byte_.Mean());
  row["bits_per_byte"] = per_byte_.Mean() / std::numbers::ln2;
  row["bits_per_byte_se"] = per_byte_.StandardError() / std::numbers::ln2;
  row["tokens_scored"] = per_token_.count();
  row["words_scored"] = per_word_.count();
  row["bytes_scored"] = per_byte_.count();
  row["windows"] = n_windows_;
}

Report EvaluatePerplexity(const EvalSetup& setup, const PerplexityOptions& options) {
  CheckProtocol(options.protocol, setup.ctx);
  const std::vector<TextWindow> windows =
      ReadWindows(*setup.tokenizer, options.texts, setup.ctx, MinWindowLength(options.protocol), options.max_windows);
  const size_t n_batch = setup.BatchSize(options.protocol.prompt, setup.ctx - options.protocol.prompt);
  const size_t n_total = setup.subjects.size() * windows.size();
  size_t n_done = 0;
  Report report;
  for (const Subject& subject : setup.subjects) {
    PerplexityTally tally;
    FeedCost cost;
    StatsTally stats;
    for (size_t begin = 0; begin < windows.size(); begin += n_batch) {
      const auto batch = std::span(windows).subspan(begin, std::min(n_batch, windows.size() - begin));
      Score(setup, subject, batch, options.protocol, tally, cost, stats);
      setup.Progress(n_done += batch.size(), n_total);
    }
    Json row = BeginRow(setup, subject, "perplexity");
    AddProtocol(row, options.protocol);
    row["texts"] = options.texts;
    tally.AddTo(row);
    AddCacheStats(row, stats.stats(), *subject.config);
    AddCost(row, cost);
    report.rows.push_back(row);
  }
  report.columns = SubjectColumns();
  report.columns.push_back({"perplexity", "per token", Column::Style::kFixed, 3, "perplexity_se"});
  report.columns.push_back({"word_perplexity", "per word", Column::Style::kFixed, 2, "word_perplexity_se"});
  report.columns.push_back({"bits_per_byte", "bits/byte", Column::Style::kFixed, 4, "bits_per_byte_se"});
  AppendCacheColumns(report.columns);
  return report;
}

}  // namespace lesskv
