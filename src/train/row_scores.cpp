#include "train/row_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/rope.h"
#include "kvcache/sequence_cache.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

constexpr size_t kTileQueries = 64;

// Attends in full, a layer at a time, and scores the rows of the first copy by what the second one reads.
class ScoringCache final : public KvCache {
 public:
  ScoringCache(const Model& model, const CacheShape& shape, size_t n_copy, bool wants_inputs, RowScores& result)
      : model_(model), shape_(shape), n_copy_(n_copy), wants_inputs_(wants_inputs), result_(result) {}

  bool WantsInputs(size_t layer) const override { return wants_inputs_ && shape_.layers[layer].window == 0; }

  void ReadInputs(size_t, size_t first, size_t n, const float* x) override {
    if (first == 0) result_.inputs.emplace_back();
    const size_t end = std::min(first + n, n_copy_), width = shape_.input_width;
    if (first < end) result_.inputs.back().insert(result_.inputs.back().end(), x, x + (end - first) * width);
  }

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
      std::vector<float>& best = result_.scores.emplace_back(n_copy_, -std::numeric_limits<float>::infinity());
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
  bool wants_inputs_;
  RowScores& result_;
  std::vector<float> keys_, values_, queries_;  // of the present layer; values stay as they came
};

}  // namespace

RowScores MeasureRows(const Engine& engine, const std::vector<int32_t>& text, bool wants_inputs) {
  const Model& model = engine.model();
  std::vector<int32_t> twice = text;
  twice.insert(twice.end(), text.begin(), text.end());
  CacheShape shape = model.MakeCacheShape(twice.size(), engine.compute());
  shape.compute = ComputeType::kF32;
  ForwardWorkspace workspace;
  workspace.Reserve(model.config(), twice.size());
  RowScores result;
  ScoringCache cache(model, shape, text.size(), wants_inputs, result);
  Forward(model, twice, cache, engine.compute(), workspace);
  return result;
}

}  // namespace lesskv::train
