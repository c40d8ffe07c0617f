#include "eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <unordered_map>

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

// Seconds that the tokens of a block took, from the cost so far after each step.
class BlockPace {
 public:
  explicit BlockPace(size_t block) : block_(block) {}
  // A batch of windows begins, whose prompts are not timed by blocks.
  void Begin() { before_ = {}; }
  // `fed`: tokens of the longest window so far.
  void Note(const FeedCost& cost, size_t fed) {
    if (block_ == 0) return;
    const size_t at = (fed - 1) / block_;  // of the step's last token
    if (blocks_.size() <= at) blocks_.resize(at + 1);
    blocks_[at].tokens += cost.tokens - before_.tokens;
    blocks_[at].seconds += cost.seconds - before_.seconds;
    before_ = cost;
  }
  void AddTo(Json& row) const {
    if (block_ == 0) return;
    for (const FeedCost& b : blocks_) row["microseconds_by_block"].push_back(b.tokens == 0 ? kNotANumber : 1e6 * b.seconds / static_cast<double>(b.tokens));
  }

 private:
  size_t block_;
  FeedCost before_;
  std::vector<FeedCost> blocks_;
};

// What is known of a subject.
struct SubjectTally {
  PerplexityTally scores;
  BlockPace pace;
  FeedCost cost;
  StatsTally stats;
};

void Score(const EvalSetup& setup, WindowBatch& batch, std::span<const TextWindow> windows, SubjectTally& tally) {
  tally.pace.Begin();
  const size_t first = batch.FirstTarget();
  Nats nats = MakeNats(windows, first);
  const ScoredSink score = [&](std::span<const ScoredRow> rows) {
    ParallelFor(rows.size(), [&](size_t i) {
      const ScoredRow& row = rows[i];
      const size_t token = static_cast<size_t>(windows[row.window].ids[row.target]);
      nats[row.window][row.target - first] = LogMass(row.logits) - row.logits[token];
    });
  };
  while (batch.Step(score)) {
    setup.CheckStop();
    tally.pace.Note(batch.cost(), batch.fed());
  }
  tally.cost += batch.cost();
  for (size_t w = 0; w < windows.size(); ++w) tally.scores.AddWindow(windows[w], first, nats[w]);
  batch.AddStats(tally.stats);
}

// All windows through a group of subjects, a batch of them at a time; says how many a subject has scored.
void RunGroup(const EvalSetup& setup, std::span<const size_t> group, std::span<const TextWindow> windows, const Protocol& protocol,
              std::span<SubjectTally> tallies, const std::function<void(size_t)>& scored) {
  const size_t n_batch = setup.BatchSize(group, protocol.prompt, setup.ctx - protocol.prompt);
  for (size_t begin = 0; begin < windows.size(); begin += n_batch) {
    const auto part = windows.subspan(begin, std::min(n_batch, windows.size() - begin));
    std::vector<WindowBatch> batches;
    std::vector<WindowBatch*> together;
    batches.reserve(group.size());
    for (const size_t s : group) together.push_back(&batches.emplace_back(setup, setup.subjects[s].config, part, protocol));
    if (protocol.mode == Protocol::Mode::kContinue) WindowBatch::ReadPrompts(together);
    for (size_t i = 0; i < group.size(); ++i) {
      Score(setup, batches[i], part, tallies[group[i]]);
      scored(part.size());
    }
  }
}

constexpr std::array<const char*, kPairClasses> kClassNames = {"pair_new", "pair_near", "pair_far"};

void AddPairColumns(std::vector<Column>& columns) {
  for (const std::string name : kClassNames) {
    columns.push_back({"share_" + name, name + ": of tokens", Column::Style::kPercent, 1});
    columns.push_back({"perplexity_" + name, "per token", Column::Style::kFixed, 3, "perplexity_" + name + "_se"});
  }
}

}  // namespace

std::vector<PairClass> ClassifyPairs(std::span<const int32_t> ids, size_t distance) {
  std::vector<PairClass> classes(ids.size(), PairClass::kNew);
  std::unordered_map<uint64_t, size_t> last;  // where a pair's second token stood
  for (size_t i = 1; i < ids.size(); ++i) {
    const uint64_t pair = uint64_t{static_cast<uint32_t>(ids[i - 1])} << 32 | static_cast<uint32_t>(ids[i]);
    const auto [at, is_new] = last.try_emplace(pair, i);
    if (!is_new) classes[i] = i - at->second <= distance ? PairClass::kNear : PairClass::kFar;
    at->second = i;
  }
  return classes;
}

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
  if (pair_distance_ > 0) AddPairs(window, first_target, nats);
  if (block_ > 0) AddBlocks(first_target, nats);
}

void PerplexityTally::AddPairs(const TextWindow& window, size_t first_target, std::span<const double> nats) {
  const std::vector<PairClass> classes = ClassifyPairs(window.ids, pair_distance_);
  std::array<double, kPairClasses> sums = {};
  std::array<size_t, kPairClasses> counts = {};
  for (size_t i = 0; i < nats.size(); ++i) {
    const auto c = static_cast<size_t>(classes[first_target + i]);
    sums[c] += nats[i];
    ++counts[c];
  }
  for (size_t c = 0; c < kPairClasses; ++c) per_class_[c].Add(sums[c], counts[c]);
}

void PerplexityTally::AddBlocks(size_t first_target, std::span<const double> nats) {
  for (size_t begin = 0; begin < nats.size();) {
    const size_t block = (first_target + begin) / block_;
    const size_t end = std::min(nats.size(), (block + 1) * block_ - first_target);
    if (per_block_.size() <= block) per_block_.resize(block + 1);
    per_block_[block].Add(std::accumulate(nats.begin() + static_cast<std::ptrdiff_t>(begin), nats.begin() + static_cast<std::ptrdiff_t>(end), 0.0),
                          end - begin);
    begin = end;
  }
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
  if (pair_distance_ > 0) AddPairsTo(row);
  if (block_ > 0) AddBlocksTo(row);
}

void PerplexityTally::AddPairsTo(Json& row) const {
  row["pair_distance"] = pair_distance_;
  for (size_t c = 0; c < kPairClasses; ++c) {
    const std::string name = kClassNames[c];
    const double perplexity = std::exp(per_class_[c].Mean());
    row["share_" + name] = static_cast<double>(per_class_[c].count()) / static_cast<double>(per_token_.count());
    row["perplexity_" + name] = perplexity;
    row["perplexity_" + name + "_se"] = perplexity * per_class_[c].StandardError();
  }
}

void PerplexityTally::AddBlocksTo(Json& row) const {
  row["block_tokens"] = block_;
  double first = kNotANumber, last = kNotANumber, most = kNotANumber;
  for (const ClusteredMean& block : per_block_) {
    const double perplexity = block.count() == 0 ? kNotANumber : std::exp(block.Mean());  // before the first scored token: none
    row["perplexity_by_block"].push_back(perplexity);
    if (block.count() == 0) continue;
    if (std::isnan(first)) first = perplexity;
    last = perplexity;
    most = std::fmax(most, perplexity);
  }
  row["perplexity_block_first"] = first;
  row["perplexity_block_last"] = last;
  row["perplexity_block_max"] = most;
}

Report EvaluatePerplexity(const EvalSetup& setup, const PerplexityOptions& options) {
  CheckProtocol(options.protocol, setup.ctx);
  const std::vector<TextWindow> windows =
      ReadWindows(*setup.tokenizer, options.texts, setup.ctx, MinWindowLength(options.protocol), options.max_windows,
                  options.protocol.llama_windows);
  std::vector<SubjectTally> tallies(setup.subjects.size(), {PerplexityTally(options.pair_distance, options.block), BlockPace(options.block), {}, {}});
  const bool streams = options.protocol.mode == Protocol::Mode::kStream;
  size_t n_done = 0;
  for (const std::vector<size_t>& group : streams ? setup.SingleGroups() : setup.PromptGroups())
    RunGroup(setup, group, windows, options.protocol, tallies,
             [&](size_t n) { setup.Progress(n_done += n, setup.subjects.size() * windows.size()); });
  Report report;
  for (size_t s = 0; s < tallies.size(); ++s) {
    Json row = BeginRow(setup, setup.subjects[s], "perplexity");
    AddProtocol(row, options.protocol);
    row["texts"] = options.texts;
    tallies[s].scores.AddTo(row);
    tallies[s].pace.AddTo(row);
    AddCacheStats(row, tallies[s].stats.stats(), *setup.subjects[s].config);
    AddCost(row, tallies[s].cost);
    report.rows.push_back(row);
  }
  report.columns = SubjectColumns();
  report.columns.push_back({"perplexity", "per token", Column::Style::kFixed, 3, "perplexity_se"});
  report.columns.push_back({"word_perplexity", "per word", Column::Style::kFixed, 2, "word_perplexity_se"});
  report.columns.push_back({"bits_per_byte", "bits/byte", Column::Style::kFixed, 4, "bits_per_byte_se"});
  if (options.pair_distance > 0) AddPairColumns(report.columns);
  if (options.block > 0)
    for (const std::string which : {"first", "last", "max"})
      report.columns.push_back({"perplexity_block_" + which, which + " block", Column::Style::kFixed, 3});
  AppendCacheColumns(report.columns);
  return report;
}

}  // namespace lesskv
