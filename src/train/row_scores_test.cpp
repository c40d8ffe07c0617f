// The measured scores against their definition, written out in double on what really passed a tiny model.
#include "train/row_scores.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/rng.h"
#include "kernels/basic/rope.h"
#include "kernels/quants/quants.h"
#include "kvcache/sequence_cache.h"

namespace lesskv::train {
namespace {

// Full attention that keeps a layer's rotated queries and keys, and its values and inputs.
class Recorder final : public KvCache {
 public:
  struct Layer {
    std::vector<float> q, k, v, x;
  };

  Recorder(const CacheShape& shape, size_t n)
      : shape_(shape), n_(n), full_(CacheConfig::Create(CacheSpec::Parse("full+f32"), shape)), layers(shape.n_layers()) {
    full_.BeginStep(n, StepKind::kPrompt);
  }
  bool WantsInputs(size_t) const override { return true; }
  void ReadInputs(size_t layer, size_t, size_t n, const float* x) override {
    layers[layer].x.insert(layers[layer].x.end(), x, x + n * shape_.input_width);
  }
  void Append(size_t layer, const float* keys, const float* values) override {
    const LayerShape& s = shape_.layers[layer];
    layers[layer].k.assign(keys, keys + n_ * s.kv_dim());
    layers[layer].v.assign(values, values + n_ * s.kv_dim());
    Rotate(s, layers[layer].k, s.kv_dim(), s.n_kv_heads);
    full_.Append(layer, keys, values);
  }
  void Attend(size_t layer, const float* queries, float* out) override {
    const LayerShape& s = shape_.layers[layer];
    layers[layer].q.assign(queries, queries + n_ * s.q_dim());
    Rotate(s, layers[layer].q, s.q_dim(), s.n_heads);
    full_.Attend(layer, queries, out);
  }

 private:
  void Rotate(const LayerShape& s, std::vector<float>& x, size_t stride, size_t heads) const {
    std::vector<int32_t> positions(n_);
    std::iota(positions.begin(), positions.end(), 0);
    RotateRows(*s.rope, x.data(), n_, stride, heads, s.head_dim, positions.data());
  }

  CacheShape shape_;
  size_t n_;
  SequenceCache full_;

 public:
  std::vector<Layer> layers;
};

// |W_O^h v| of a query head.
double AddedLength(const WeightView& w, size_t head, size_t d, const float* v) {
  double square = 0;
  std::vector<float> row(w.n_in);
  for (size_t o = 0; o < w.n_out; ++o) {
    DequantizeRow(w.type, static_cast<const std::byte*>(w.data) + o * RowBytes(w.type, w.n_in), w.n_in, row.data());
    double sum = 0;
    for (size_t c = 0; c < d; ++c) sum += double(row[head * d + c]) * double(v[c]);
    square += sum * sum;
  }
  return std::sqrt(square);
}

// Of the rows of the first n tokens, for one query head: the largest s - lse of a query of the second n.
std::vector<double> MostRead(const Recorder::Layer& layer, const LayerShape& s, size_t n, size_t head) {
  std::vector<double> most(n, -std::numeric_limits<double>::infinity());
  for (size_t j = n; j < 2 * n; ++j) {
    std::vector<double> scores(j + 1);
    double sum = 0;
    for (size_t i = 0; i <= j; ++i) {
      for (size_t c = 0; c < s.head_dim; ++c)
        scores[i] += double(layer.q[j * s.q_dim() + head * s.head_dim + c]) *
                     double(layer.k[i * s.kv_dim() + head / s.group() * s.head_dim + c]);
      scores[i] *= double(s.scale);
      sum += std::exp(scores[i]);
    }
    for (size_t i = 0; i < n; ++i) most[i] = std::max(most[i], scores[i] - std::log(sum));
  }
  return most;
}

TEST(RowScores, AreWhatTheSecondCopyReads) {
  const auto model = Model::Load(LESSKV_SOURCE_DIR "/tests/data/models/llama-gqa-tied.gguf");
  const Engine engine(model, {.compute = ComputeChoice::kF32});
  Rng rng(8);
  std::vector<int32_t> text(23);
  for (int32_t& token : text) token = static_cast<int32_t>(rng.Below(model->config().n_vocab));
  const size_t n = text.size();
  const RowScores measured = MeasureRows(engine, text, true);
  EXPECT_TRUE(MeasureRows(engine, text).inputs.empty());

  std::vector<int32_t> twice = text;
  twice.insert(twice.end(), text.begin(), text.end());
  const CacheShape shape = model->MakeCacheShape(2 * n, ComputeType::kF32);
  Recorder recorder(shape, 2 * n);
  ForwardWorkspace workspace;
  Forward(*model, twice, recorder, ComputeType::kF32, workspace);
  size_t row = 0;
  for (size_t l = 0; l < shape.n_layers(); ++l) {
    const LayerShape& s = shape.layers[l];
    ASSERT_GT(s.group(), 1u);
    const Recorder::Layer& layer = recorder.layers[l];
    EXPECT_EQ(measured.inputs[l], std::vector<float>(layer.x.begin(), layer.x.begin() + static_cast<ptrdiff_t>(n * shape.input_width)));
    double norm = 0;
    for (const float w : model->layer(l).attn_norm.weight) norm += double(w) * double(w);
    for (size_t h = 0; h < s.n_kv_heads; ++h, ++row)
      for (size_t i = 0; i < n; ++i) {
        double expected = -std::numeric_limits<double>::infinity();
        for (size_t head = h * s.group(); head < (h + 1) * s.group(); ++head)
          expected = std::max(expected, MostRead(layer, s, n, head)[i] - 0.5 * std::log(norm) +
                                            std::log(AddedLength(model->layer(l).attn_output, head, s.head_dim,
                                                                 &layer.v[i * s.kv_dim() + h * s.head_dim])));
        EXPECT_NEAR(measured.scores[row][i], expected, 1e-3) << l << " " << h << " " << i;
      }
  }
  EXPECT_EQ(row, measured.scores.size());
}

}  // namespace
}  // namespace lesskv::train
