#include "train/train_budgets.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <span>

#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/rope.h"
#include "kvcache/sequence_cache.h"
#include "train/crop_source.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

constexpr size_t kTileQueries = 64;

// Attends in full, a layer at a time, and scores the rows of the first copy by what the second one reads.
class ScoringCache final : public KvCache {
 public:
  ScoringCache(const Model& model, const CacheShape& shape, size_t n_copy, std::vector<std::vector<float>>& scores)
      : model_(model), shape_(shape), n_copy_(n_copy), scores_(scores) {}

  void Append(size_t layer, const float* keys, const float* values) override {
    const size_t n = 2 * n_copy_ * shape_.layers[layer].kv_dim();
    keys_.assign(keys, keys + n);
    values_.assign(values, values + n);
  }

  void Attend(size_t layer, const float* queries, float* out) override {
    CacheShape one = shape_;
    one.layers = {shape_.layers[layer]};
    SequenceCache full(CacheConfig::Create(CacheSpec::Parse("full+f32"), one));
    full.BeginStep(2 * n_copy_, StepKind::kPrompt);
    full.Append(0, keys_.data(), values_.data());
    full.Attend(0, queries, out);
    full.EndStep();
    if (shape_.layers[layer].window == 0) Score(layer, queries);
  }

 private:
  void Score(size_t layer, const float* queries) {
    const LayerShape& shape = shape_.layers[layer];
    const size_t n = 2 * n_copy_;
    queries_.assign(queries, queries + n * shape.q_dim());
    std::vector<int32_t> positions(n);
    std::iota(positions.begin(), positions.end(), 0);
    RotateRows(*shape.rope, queries_.data(), n, shape.q_dim(), shape.n_heads, shape.head_dim, positions.data());
    RotateRows(*shape.rope, keys_.data(), n, shape.kv_dim(), shape.n_kv_heads, shape.head_dim, positions.data());
    const std::vector<float> lengths = OutputLengths(layer);
    const double input = InputLength(layer);
    std::vector<std::vector<float>> by_head(shape.n_heads);
    ParallelFor(shape.n_heads, [&](size_t head) { by_head[head] = MostRead(shape, head); });
    for (size_t h = 0; h < shape.n_kv_heads; ++h) {
      std::vector<float>& best = scores_.emplace_back(n_copy_, -std::numeric_limits<float>::infinity());
      for (size_t head = h * shape.group(); head < (h + 1) * shape.group(); ++head)
        for (size_t i = 0; i < n_copy_; ++i)
          best[i] = std::max(best[i], by_head[head][i] + std::log(lengths[head * n_copy_ + i]) - static_cast<float>(input));
    }
  }

  // max over the second copy's queries of s - lse, for each row of the first. [n_copy]
  std::vector<float> MostRead(const LayerShape& shape, size_t head) const {
    const size_t n = 2 * n_copy_, h = head / shape.group(), d = shape.head_dim;
    std::vector<float> most(n_copy_, -std::numeric_limits<float>::infinity()), scores(kTileQueries * n);
    for (size_t first = n_copy_; first < n; first += kTileQueries) {
      const size_t count = std::min(kTileQueries, n - first), keys = first + count;
      Gemm(false, true, count, keys, d, &queries_[first * shape.q_dim() + head * d], shape.q_dim(), &keys_[h * d],
           shape.kv_dim(), scores.data(), keys, false);
      Scale(scores.data(), shape.scale, count * keys);
      for (size_t j = 0; j < count; ++j) {
        const float* row = &scores[j * keys];
        const float lse = LogSumExp(row, first + j + 1);
        for (size_t i = 0; i < n_copy_; ++i) most[i] = std::max(most[i], row[i] - lse);
      }
    }
    return most;
  }

  // |W_O^h v_i| for each query head and row of the first copy, [n_heads, n_copy].
  std::vector<float> OutputLengths(size_t layer) const {
    const LayerShape& shape = shape_.layers[layer];
    const WeightView& w = model_.layer(layer).attn_output;
    std::vector<float> identity(w.n_in * w.n_in), columns(w.n_in * w.n_out);
    for (size_t i = 0; i < w.n_in; ++i) identity[i * w.n_in + i] = 1;
    Linear(w, identity.data(), w.n_in, w.n_in, columns.data(), w.n_out, ComputeType::kF32);
    std::vector<float> lengths(shape.n_heads * n_copy_);
    ParallelFor(shape.n_heads, [&](size_t head) {
      const size_t d = shape.head_dim, h = head / shape.group();
      std::vector<float> added(n_copy_ * w.n_out);
      Gemm(false, false, n_copy_, w.n_out, d, &values_[h * d], shape.kv_dim(), &columns[head * d * w.n_out], w.n_out,
           added.data(), w.n_out, false);
      for (size_t i = 0; i < n_copy_; ++i) {
        const float* x = &added[i * w.n_out];
        lengths[head * n_copy_ + i] = std::sqrt(Dot(x, x, w.n_out));
      }
    });
    return lengths;
  }

  double InputLength(size_t layer) const {
    const std::vector<float>& w = model_.layer(layer).attn_norm.weight;
    const double square = w.empty() ? 1 : Dot(w.data(), w.data(), w.size());
    return 0.5 * std::log(std::max(square, 1e-30));
  }

  const Model& model_;
  CacheShape shape_;
  size_t n_copy_;
  std::vector<std::vector<float>>& scores_;
  std::vector<float> keys_, values_, queries_;  // of the present layer; values stay as they came
};

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

std::vector<std::vector<float>> MeasureRows(const Engine& engine, const std::vector<int32_t>& text) {
  const Model& model = engine.model();
  std::vector<int32_t> twice = text;
  twice.insert(twice.end(), text.begin(), text.end());
  CacheShape shape = model.MakeCacheShape(twice.size(), engine.compute());
  shape.compute = ComputeType::kF32;
  ForwardWorkspace workspace;
  workspace.Reserve(model.config(), twice.size());
  std::vector<std::vector<float>> scores;
  ScoringCache cache(model, shape, text.size(), scores);
  Forward(model, twice, cache, engine.compute(), workspace);
  return scores;
}

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
        SharesOf(MeasureRows(engine, crops.Crop(MixSeed(options.seed, s), options.tokens)), options.ratios);
    std::vector<float>& half = halves[s < (options.sequences + 1) / 2 ? 0 : 1];
    half.resize(shares.size());
    Add(half.data(), shares.data(), shares.size());
    progress(static_cast<double>(s + 1) / static_cast<double>(options.sequences));
  }
  halves[1].resize(halves[0].size());
  budgets.shares = halves[0];
  Add(budgets.shares.data(), halves[1].data(), halves[1].size());
  Scale(budgets.shares.data(), 1.0f / static_cast<float>(options.sequences), budgets.shares.size());
  for (float& share : budgets.shares) share = std::min(share, 1.0f);
  for (size_t r = 0; r < options.ratios.size(); ++r)
    report.correlation.push_back(Correlation(std::span(halves[0]).subspan(r * n_heads, n_heads),
                                             std::span(halves[1]).subspan(r * n_heads, n_heads)));
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace lesskv::train
