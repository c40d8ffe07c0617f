#include "train/train_kvzap.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>

#include "base/checked.h"
#include "base/error.h"
#include "base/threads.h"
#include "train/crop_source.h"
#include "train/ridge.h"
#include "train/row_scores.h"

namespace lesskv::train {
namespace {

constexpr size_t kFolds = 5;
constexpr size_t kQuantileRows = 4096;  // inputs of a layer, from all texts alike, whose scores are sorted
constexpr double kLambdas[] = {1e-5, 1e-4, 1e-3, 1e-2, 1e-1};

// One layer: sums a fold.
using Folds = std::vector<RidgeSums>;

RidgeSums AllBut(const Folds& folds, size_t left_out) {
  RidgeSums sums(folds[0].width, folds[0].n_targets);
  for (size_t f = 0; f < folds.size(); ++f)
    if (f != left_out) sums.Add(folds[f]);
  return sums;
}

struct LayerFit {
  RidgeFit fit;
  double lambda = 0;
  std::vector<double> r2;  // a head, mean over the texts left out
};

LayerFit FitLayer(const Folds& folds) {
  LayerFit best;
  double least = std::numeric_limits<double>::infinity();
  for (const double lambda : kLambdas) {
    double error = 0;
    std::vector<double> r2(folds[0].n_targets);
    for (size_t f = 0; f < folds.size(); ++f) {
      const RidgeFit fit = FitRidge(AllBut(folds, f), lambda);
      for (const double e : MeanSquaredError(fit, folds[f])) error += e;
      const std::vector<double> own = SquaredCorrelation(fit, folds[f]);
      for (size_t t = 0; t < r2.size(); ++t) r2[t] += own[t] / static_cast<double>(folds.size());
    }
    if (error >= least) continue;
    least = error;
    best.lambda = lambda;
    best.r2 = std::move(r2);
  }
  best.fit = FitRidge(AllBut(folds, folds.size()), best.lambda);
  return best;
}

void Validate(const TrainKvzapOptions& options) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) Fail(ErrorCode::kInvalidArgument, "train kvzap: {}", what);
  };
  require(options.sequences >= 2, "--sequences must be at least 2, of which some are left out");
  require(options.tokens >= 16, "--tokens must be at least 16");
}

// Adds a text to its fold, all layers side by side. The first rows, which always stay, would only mislead.
void AddText(const RowScores& text, const std::vector<size_t>& n_kv_heads, size_t fold, std::vector<Folds>& layers) {
  std::vector<size_t> first(n_kv_heads.size());
  std::exclusive_scan(n_kv_heads.begin(), n_kv_heads.end(), first.begin(), size_t{0});
  ParallelFor(layers.size(), [&](size_t l) {
    RidgeSums& sums = layers[l][fold];
    std::vector<const float*> targets;
    for (size_t h = 0; h < n_kv_heads[l]; ++h) targets.push_back(text.scores[first[l] + h].data() + kSinkRows);
    sums.Add(text.inputs[l].data() + kSinkRows * sums.width, targets, text.scores[first[l]].size() - kSinkRows);
  });
}

// Keeps every step-th input behind the first rows.
void KeepInputs(const RowScores& text, size_t width, size_t step, std::vector<std::vector<float>>& kept) {
  for (size_t l = 0; l < kept.size(); ++l) {
    const std::vector<float>& inputs = text.inputs[l];
    for (size_t at = kSinkRows * width; at < inputs.size(); at += step * width)
      kept[l].insert(kept[l].end(), inputs.begin() + static_cast<ptrdiff_t>(at), inputs.begin() + static_cast<ptrdiff_t>(at + width));
  }
}

// The 1, 2, ... 99 % quantiles of what a fit predicts, a target after the other.
std::vector<float> Quantiles(const RidgeFit& fit, std::span<const float> inputs) {
  const size_t n_targets = fit.bias.size(), width = fit.weight.size() / n_targets, n = inputs.size() / width;
  std::vector<float> quantiles, scores(n);
  for (size_t t = 0; t < n_targets; ++t) {
    for (size_t i = 0; i < n; ++i)
      scores[i] = static_cast<float>(std::inner_product(&fit.weight[t * width], &fit.weight[t * width] + width,
                                                        &inputs[i * width], fit.bias[t]));
    std::sort(scores.begin(), scores.end());
    for (size_t q = 1; q <= SidecarScores::kQuantiles; ++q)
      quantiles.push_back(scores[std::min(n - 1, n * q / (SidecarScores::kQuantiles + 1))]);
  }
  return quantiles;
}

}  // namespace

TrainKvzapReport TrainKvzap(const Engine& engine, const Tokenizer& tokenizer, const TrainKvzapOptions& options,
                            const std::function<void(double done)>& progress, const std::atomic<bool>* stop) {
  Validate(options);
  const auto start = std::chrono::steady_clock::now();
  const CropSource crops(tokenizer, options.texts);
  const RepeatFrame frame = MakeRepeatFrame(engine.model(), tokenizer);
  const ThreadScope threads(engine.threads());
  TrainKvzapReport report;
  SidecarScores& scores = report.scores;
  const CacheShape shape = engine.model().MakeCacheShape(2 * options.tokens, engine.compute());
  for (const LayerShape& layer : shape.layers)
    if (layer.window == 0) scores.n_kv_heads.push_back(layer.n_kv_heads);
  if (scores.n_kv_heads.empty()) Fail(ErrorCode::kInvalidArgument, "train kvzap: the model has no global layers");
  scores.width = shape.input_width;
  scores.tokens = options.sequences * options.tokens;
  std::vector<Folds> layers;
  for (const size_t heads : scores.n_kv_heads)
    layers.emplace_back(std::min(kFolds, options.sequences), RidgeSums(scores.width, heads));
  std::vector<std::vector<float>> kept(layers.size());
  const size_t step = CeilDiv(scores.tokens, kQuantileRows);
  for (size_t s = 0; s < options.sequences; ++s) {
    if (stop != nullptr && *stop) Fail(ErrorCode::kRuntime, "stopped");
    const RowScores text = MeasureRows(engine, crops.Crop(MixSeed(options.seed, s), options.tokens, false), frame, true);
    AddText(text, scores.n_kv_heads, s % layers[0].size(), layers);
    KeepInputs(text, scores.width, step, kept);
    progress(static_cast<double>(s + 1) / static_cast<double>(options.sequences));
  }
  std::vector<LayerFit> fits(layers.size());
  std::vector<std::vector<float>> quantiles(layers.size());
  ParallelFor(layers.size(), [&](size_t l) {
    fits[l] = FitLayer(layers[l]);
    quantiles[l] = Quantiles(fits[l].fit, kept[l]);
  });
  for (const std::vector<float>& layer : quantiles) scores.quantiles.insert(scores.quantiles.end(), layer.begin(), layer.end());
  for (const LayerFit& layer : fits) {
    scores.weight.insert(scores.weight.end(), layer.fit.weight.begin(), layer.fit.weight.end());
    scores.bias.insert(scores.bias.end(), layer.fit.bias.begin(), layer.fit.bias.end());
    scores.r2.insert(scores.r2.end(), layer.r2.begin(), layer.r2.end());
    report.lambda.push_back(layer.lambda);
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace lesskv::train
