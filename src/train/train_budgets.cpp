#include "train/train_budgets.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <span>

#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "train/crop_source.h"
#include "train/row_scores.h"

namespace lesskv::train {
namespace {

double Correlation(std::span<const float> a, std::span<const float> b) {
  const auto n = static_cast<double>(a.size());
  const double mean_a = std::accumulate(a.begin(), a.end(), 0.0) / n, mean_b = std::accumulate(b.begin(), b.end(), 0.0) / n;
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += (a[i] - mean_a) * (b[i] - mean_b);
    aa += (a[i] - mean_a) * (a[i] - mean_a);
    bb += (b[i] - mean_b) * (b[i] - mean_b);
  }
  return ab / std::sqrt(aa * bb);
}

void Validate(const TrainBudgetsOptions& options) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) Fail(ErrorCode::kInvalidArgument, "train budgets: {}", what);
  };
  require(options.sequences >= 1, "--sequences must be at least 1");
  require(options.tokens >= 16, "--tokens must be at least 16");
  require(!options.ratios.empty(), "at least one ratio is needed");
}

}  // namespace

std::vector<float> SharesOf(const std::vector<std::vector<float>>& scores, const std::vector<float>& ratios) {
  struct Row {
    float score;
    uint32_t head;
  };
  std::vector<Row> rows;
  const size_t n_rows = scores[0].size() - std::min(kSinkRows, scores[0].size());
  for (uint32_t h = 0; h < scores.size(); ++h)
    for (size_t i = scores[h].size() - n_rows; i < scores[h].size(); ++i) rows.push_back({scores[h][i], h});
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.score > b.score; });
  std::vector<float> shares(ratios.size() * scores.size());
  for (size_t r = 0; r < ratios.size(); ++r) {
    const auto best = static_cast<size_t>(std::lround(ratios[r] * static_cast<double>(rows.size())));
    for (size_t i = 0; i < best; ++i) shares[r * scores.size() + rows[i].head] += 1.0f / static_cast<float>(n_rows);
  }
  for (float& share : shares) share = std::min(share, 1.0f);
  return shares;
}

TrainBudgetsReport TrainBudgets(const Engine& engine, const Tokenizer& tokenizer, const TrainBudgetsOptions& options,
                                const std::function<void(double done)>& progress, const std::atomic<bool>* stop) {
  Validate(options);
  const auto start = std::chrono::steady_clock::now();
  const CropSource crops(tokenizer, options.texts);
  const RepeatFrame frame = MakeRepeatFrame(engine.model(), tokenizer);
  const ThreadScope threads(engine.threads());
  TrainBudgetsReport report;
  SidecarBudgets& budgets = report.budgets;
  const CacheShape shape = engine.model().MakeCacheShape(2 * options.tokens, engine.compute());
  for (const LayerShape& layer : shape.layers)
    if (layer.window == 0) budgets.n_kv_heads.push_back(layer.n_kv_heads);
  budgets.ratios = options.ratios;
  budgets.tokens = options.sequences * options.tokens;
  const size_t n_heads = budgets.n_heads();
  if (n_heads == 0) Fail(ErrorCode::kInvalidArgument, "train budgets: the model has no global layers");
  std::vector<float> halves[2];
  for (size_t s = 0; s < options.sequences; ++s) {
    if (stop != nullptr && *stop) Fail(ErrorCode::kRuntime, "stopped");
    const std::vector<float> shares =
        SharesOf(MeasureRows(engine, crops.Crop(MixSeed(options.seed, s), options.tokens, false), frame).scores, options.ratios);
    std::vector<float>& half = halves[s < (options.sequences + 1) / 2 ? 0 : 1];
    half.resize(shares.size());
    Add(half.data(), shares.data(), shares.size());
    progress(static_cast<double>(s + 1) / static_cast<double>(options.sequences));
  }
  halves[1].resize(halves[0].size());
  budgets.shares = halves[0];
  Add(budgets.shares.data(), halves[1].data(), halves[1].size());
  Scale(budgets.shares.data(), 1.0f / static_cast<float>(options.sequences), budgets.shares.size());
  for (size_t r = 0; r < options.ratios.size(); ++r)
    report.correlation.push_back(Correlation(std::span(halves[0]).subspan(r * n_heads, n_heads),
                                             std::span(halves[1]).subspan(r * n_heads, n_heads)));
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace lesskv::train
