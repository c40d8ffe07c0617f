// The forward pass alone, with attention as plain as it can be written, against logits of an independent
// implementation (tools/golden/make_logits_golden.py).
#include "model/forward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/basic/basic.h"

namespace lesskv {
namespace {

std::string ModelPath(const std::string& name) { return std::string(LESSKV_SOURCE_DIR) + "/tests/data/models/" + name; }

// Keeps everything in f32 and attends one query and one head at a time.
class PlainCache final : public KvCache {
 public:
  explicit PlainCache(const Model& model, size_t ctx = 128)
      : shape_(model.MakeCacheShape(ctx, ComputeType::kF32)),
        keys_(shape_.n_layers()),
        values_(keys_.size()) {}

  void Append(size_t layer, const float* keys, const float* values) override {
    const LayerShape& c = shape_.layers[layer];
    const size_t n = step_tokens_, seen = keys_[layer].size() / c.kv_dim();
    std::vector<float> rotated(keys, keys + n * c.kv_dim());
    Rotate(c, rotated, n, c.n_kv_heads, seen);
    keys_[layer].insert(keys_[layer].end(), rotated.begin(), rotated.end());
    values_[layer].insert(values_[layer].end(), values, values + n * c.kv_dim());
  }

  void Attend(size_t layer, const float* queries, float* out) override {
    const LayerShape& c = shape_.layers[layer];
    const size_t n = step_tokens_, past = keys_[layer].size() / c.kv_dim() - n;
    std::vector<float> q(queries, queries + n * c.q_dim());
    Rotate(c, q, n, c.n_heads, past);
    for (size_t m = 0; m < n; ++m)
      for (size_t h = 0; h < c.n_heads; ++h)
        AttendOne(layer, h, past + m, &q[m * c.q_dim() + h * c.head_dim], out + m * c.q_dim() + h * c.head_dim);
  }

  void SetStep(size_t n_tokens) { step_tokens_ = n_tokens; }

 private:
  static void Rotate(const LayerShape& c, std::vector<float>& x, size_t n, size_t n_heads, size_t first) {
    std::vector<int32_t> positions(n);
    for (size_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(first + i);
    RotateRows(*c.rope, x.data(), n, n_heads * c.head_dim, n_heads, c.head_dim, positions.data());
  }

  void AttendOne(size_t layer, size_t head, size_t position, const float* q, float* out) const {
    const LayerShape& c = shape_.layers[layer];
    const size_t d = c.head_dim, offset = head / c.group() * d;
    const size_t first = c.window == 0 || position < c.window ? 0 : position + 1 - c.window;
    std::vector<double> p(position + 1);
    double total = 0;
    for (size_t r = first; r <= position; ++r) {
      double score = 0;
      for (size_t i = 0; i < d; ++i) score += double{q[i]} * keys_[layer][r * c.kv_dim() + offset + i];
      total += p[r] = std::exp(score * c.scale);
    }
    for (size_t i = 0; i < d; ++i) {
      double sum = 0;
      for (size_t r = first; r <= position; ++r) sum += p[r] * values_[layer][r * c.kv_dim() + offset + i];
      out[i] = static_cast<float>(sum / total);
    }
  }

  CacheShape shape_;
  std::vector<std::vector<float>> keys_, values_;
  size_t step_tokens_ = 0;
};

std::vector<float> Floats(const GgufTensor& tensor) {
  std::vector<float> values(tensor.Elements());
  std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
  return values;
}

// Runs the text in one step in a context of ctx tokens and compares all logits.
void ExpectLogits(const Model& model, size_t ctx, std::span<const int32_t> tokens, const std::vector<float>& want) {
  PlainCache cache(model, ctx);
  cache.SetStep(tokens.size());
  ForwardWorkspace workspace;
  ASSERT_TRUE(Forward(model, tokens, cache, ComputeType::kF32, workspace));
  std::vector<size_t> rows(tokens.size());
  std::iota(rows.begin(), rows.end(), size_t{0});
  const float* got = ComputeLogits(model, workspace, rows, ComputeType::kF32);

  const auto [low, high] = std::minmax_element(want.begin(), want.end());
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) worst = std::max(worst, std::abs(double{got[i]} - want[i]));
  EXPECT_LE(worst, 1e-5 * (*high - *low));  // the promise is 1e-3; float32 sums of this length need no more than this
  const size_t n_vocab = model.config().n_vocab;
  for (size_t t = 0; t < tokens.size(); ++t)
    EXPECT_EQ(ArgMax(got + t * n_vocab, n_vocab), ArgMax(&want[t * n_vocab], n_vocab)) << "position " << t;
}

class ForwardGolden : public testing::TestWithParam<const char*> {};

TEST_P(ForwardGolden, LogitsMatchTheIndependentImplementation) {
  const auto model = Model::Load(ModelPath(std::string(GetParam()) + ".gguf"));
  const auto expected = GgufFile::Open(ModelPath(std::string(GetParam()) + ".expected.gguf"));
  const GgufTensor* token_tensor = expected.FindTensor("tokens");
  const GgufTensor* logit_tensor = expected.FindTensor("logits");
  ASSERT_TRUE(token_tensor != nullptr && logit_tensor != nullptr);
  std::vector<int32_t> tokens(token_tensor->Elements());
  std::memcpy(tokens.data(), token_tensor->data.data(), token_tensor->data.size());
  ExpectLogits(*model, model->config().train_ctx, tokens, Floats(*logit_tensor));
  if (const GgufTensor* short_logits = expected.FindTensor("short_logits")) {
    const size_t ctx = model->config().original_ctx;  // the longest that takes the short factors
    ExpectLogits(*model, ctx, std::span(tokens).first(ctx), Floats(*short_logits));
  }
}

INSTANTIATE_TEST_SUITE_P(Models, ForwardGolden,
                         testing::Values("llama-gqa-tied", "llama-mha-untied", "llama-rope-scaled", "llama-yarn",
                                         "qwen2-bias", "qwen3-qk-norm", "gemma3-local", "phi3-longrope", "falcon-mqa",
                                         "falcon-two-norms", "smollm3-nope"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// A step of more than one tile of 512 rows is two steps of less; also where rows keep to their own sequence.
TEST(Forward, TilesChangeNothing) {
  const auto model = Model::Load(ModelPath("llama-gqa-tied.gguf"));
  const size_t n_vocab = model->config().n_vocab;
  std::vector<int32_t> tokens(700);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * i % n_vocab);
  const auto logits = [&](std::initializer_list<size_t> steps, const std::vector<size_t>& rows, std::span<const size_t> lengths) {
    PlainCache cache(*model, tokens.size());
    ForwardWorkspace workspace;
    size_t done = 0;
    for (const size_t n : steps) {
      cache.SetStep(n);
      EXPECT_TRUE(Forward(*model, std::span(tokens).subspan(done, n), cache, ComputeType::kF32, workspace, lengths));
      done += n;
    }
    const float* const all = ComputeLogits(*model, workspace, rows, ComputeType::kF32);
    return std::vector<float>(all, all + rows.size() * n_vocab);
  };
  const std::vector<float> want = logits({400, 300}, {50, 112, 299}, {});
  const size_t lengths[] = {tokens.size()};
  for (const std::vector<float>& got : {logits({700}, {450, 512, 699}, {}), logits({700}, {450, 512, 699}, lengths)})
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-4 * (1 + std::abs(want[i]))) << i;
}

TEST(ForwardWorkspace, BytesAreThoseOfItsBuffers) {
  const auto model = Model::Load(ModelPath("llama-gqa-tied.gguf"));
  for (const size_t n : {size_t{1}, size_t{100}, size_t{700}}) {
    ForwardWorkspace w;
    w.Reserve(model->config(), n);
    size_t floats = 0;
    for (const auto* buffer : {&w.x, &w.q, &w.out, &w.k, &w.v, &w.h, &w.gate, &w.up, &w.logits}) floats += buffer->size();
    EXPECT_EQ(ForwardWorkspace::Bytes(model->config(), n), floats * sizeof(float)) << n;
  }
}

TEST(Forward, StopsAfterTheLayerWhoseHookSaysSo) {
  const auto model = Model::Load(ModelPath("qwen2-bias.gguf"));
  PlainCache cache(*model);
  const std::vector<int32_t> tokens = {1, 2, 3};
  cache.SetStep(tokens.size());
  ForwardWorkspace workspace;
  size_t layers = 0;
  EXPECT_FALSE(Forward(*model, tokens, cache, ComputeType::kF32, workspace, {}, [&](size_t done) {
    layers = done;
    return done < 2;
  }));
  EXPECT_EQ(layers, 2u);
}

}  // namespace
}  // namespace lesskv
