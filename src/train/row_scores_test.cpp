// The measured scores against their definition, written out in double on what really passed a tiny model.
#include "train/row_scores.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>

#include "base/rng.h"
#include "format/gguf_writer.h"
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

// Where the copies lie behind these tokens.
struct Places {
  size_t first, second, n;
};

double Length(const float* x, size_t n) {
  double square = 0;
  for (size_t c = 0; c < n; ++c) square += double(x[c]) * double(x[c]);
  return std::sqrt(square);
}

// Of the rows of the first copy, for one query head: the largest s - lse - ln |x| of a query of the second.
std::vector<double> MostRead(const Recorder::Layer& layer, const LayerShape& s, size_t width, const Places& at, size_t head) {
  std::vector<double> most(at.n, -std::numeric_limits<double>::infinity());
  for (size_t j = at.second; j < at.second + at.n; ++j) {
    std::vector<double> scores(j + 1);
    double sum = 0;
    for (size_t i = 0; i <= j; ++i) {
      for (size_t c = 0; c < s.head_dim; ++c)
        scores[i] += double(layer.q[j * s.q_dim() + head * s.head_dim + c]) *
                     double(layer.k[i * s.kv_dim() + head / s.group() * s.head_dim + c]);
      scores[i] *= double(s.scale);
      sum += std::exp(scores[i]);
    }
    const double divisor = std::log(sum) + std::log(Length(&layer.x[j * width], width));
    for (size_t i = 0; i < at.n; ++i) most[i] = std::max(most[i], scores[at.first + i] - divisor);
  }
  return most;
}

constexpr const char* kModel = LESSKV_SOURCE_DIR "/tests/data/models/llama-gqa-tied.gguf";

// The model with one f32 tensor multiplied, and further metadata.
std::shared_ptr<const Model> Changed(const std::string& path, const std::string& tensor, float factor,
                                     const std::string& chat_template = "") {
  const auto model = Model::Load(path);
  GgufWriter writer;
  for (const auto& [key, value] : model->file().metadata()) writer.Add(key, value);
  if (!chat_template.empty()) writer.Add("tokenizer.chat_template", chat_template);
  std::vector<float> scaled;
  for (const GgufTensor& t : model->file().tensors()) {
    const auto ne = std::span(t.ne).first(t.n_dims);
    if (t.name != tensor) {
      writer.AddTensor(t.name, t.type, ne, t.data);
      continue;
    }
    scaled.resize(t.Elements());
    for (size_t r = 0; r < t.Rows(); ++r)
      DequantizeRow(t.type, t.data.data() + r * RowBytes(t.type, t.ne[0]), t.ne[0], &scaled[r * t.ne[0]]);
    for (float& w : scaled) w *= factor;
    writer.AddTensor(t.name, DType::kF32, ne, std::as_bytes(std::span(scaled)));
  }
  const std::string file = testing::TempDir() + "/row_scores.gguf";
  writer.Write(file);
  const auto changed = Model::Load(file, ModelLoading::kRead);
  std::filesystem::remove(file);
  return changed;
}

std::vector<int32_t> RandomTokens(const Model& model, size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<int32_t> text(n);
  for (int32_t& token : text) token = static_cast<int32_t>(rng.Below(model.config().n_vocab));
  return text;
}

// Two query heads, two queries of the second copy, three rows, by hand.
TEST(RowScores, ByHand) {
  const float weights[2][2][3] = {{{.1f, .5f, .02f}, {.3f, .05f, .01f}}, {{.04f, .2f, .4f}, {.02f, .1f, .08f}}};
  const float added[2][3] = {{1, .5f, 2}, {3, 1, .25f}}, inputs[2] = {2, 4};
  std::vector<float> scores(3, -std::numeric_limits<float>::infinity());
  for (size_t head = 0; head < 2; ++head)
    for (size_t j = 0; j < 2; ++j) {
      std::vector<float> log_weights, log_added;
      for (const float w : weights[head][j]) log_weights.push_back(LogLength(w));
      for (const float v : added[head]) log_added.push_back(LogLength(v));
      RaiseScores(log_weights, log_added, LogLength(inputs[j]), scores);
      const std::vector<float> once = scores;  // a head like this one changes nothing
      RaiseScores(log_weights, log_added, LogLength(inputs[j]), scores);
      EXPECT_EQ(scores, once);
    }
  const double logs[] = {-2.590267, -2.079442, -2.995732}, linear[] = {.075, .125, .05};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(scores[i], logs[i], 1e-6);
    EXPECT_NEAR(std::exp(scores[i]), linear[i], 1e-6);
  }
}

TEST(RowScores, AreWhatTheSecondCopyReads) {
  const auto model = Model::Load(kModel);
  const Engine engine(model, {.compute = ComputeChoice::kF32});
  constexpr size_t kLength = 260;  // several tiles of queries, and read in two of the model's
  const std::vector<int32_t> text = RandomTokens(*model, kLength, 8);
  const RepeatFrame frame{{3, 5, 7}, {9, 11}};
  const Places at{3, 3 + kLength + 2, kLength};
  const RowScores measured = MeasureRows(engine, text, frame, true);
  EXPECT_TRUE(MeasureRows(engine, text, frame).inputs.empty());

  std::vector<int32_t> read = frame.before;
  read.insert(read.end(), text.begin(), text.end());
  read.insert(read.end(), frame.between.begin(), frame.between.end());
  read.insert(read.end(), text.begin(), text.end());
  const CacheShape shape = model->MakeCacheShape(read.size(), ComputeType::kF32);
  const size_t width = shape.input_width;
  Recorder recorder(shape, read.size());
  ForwardWorkspace workspace;
  Forward(*model, read, recorder, ComputeType::kF32, workspace);
  size_t row = 0;
  double least = 1e9, most = 0;
  for (size_t l = 0; l < shape.n_layers(); ++l) {
    const LayerShape& s = shape.layers[l];
    ASSERT_GT(s.group(), 1u);
    const Recorder::Layer& layer = recorder.layers[l];
    const auto first = layer.x.begin() + static_cast<ptrdiff_t>(at.first * width);
    EXPECT_EQ(measured.inputs[l], std::vector<float>(first, first + static_cast<ptrdiff_t>(at.n * width)));
    for (size_t j = 0; j < at.n; ++j) {
      least = std::min(least, Length(&layer.x[(at.second + j) * width], width));
      most = std::max(most, Length(&layer.x[(at.second + j) * width], width));
    }
    for (size_t h = 0; h < s.n_kv_heads; ++h, ++row) {
      std::vector<double> expected(at.n, -std::numeric_limits<double>::infinity());
      for (size_t head = h * s.group(); head < (h + 1) * s.group(); ++head) {
        const std::vector<double> most_read = MostRead(layer, s, width, at, head);
        for (size_t i = 0; i < at.n; ++i)
          expected[i] = std::max(expected[i], most_read[i] + std::log(AddedLength(model->layer(l).attn_output, head, s.head_dim,
                                                                                  &layer.v[(at.first + i) * s.kv_dim() + h * s.head_dim])));
      }
      for (size_t i = 0; i < at.n; ++i) EXPECT_NEAR(measured.scores[row][i], expected[i], 2e-4) << l << " " << h << " " << i;
    }
  }
  EXPECT_EQ(row, measured.scores.size());
  EXPECT_GT(most, 1.01 * least);  // queries' inputs differ in length, or their place in the maximum would not matter
}

// A layer's scores are of its own output projection: twice of it is ln 2 more in every head, and none of it is finite.
TEST(RowScores, FollowTheOutputProjection) {
  const auto model = Model::Load(kModel);
  const size_t last = model->config().n_layers - 1;
  const std::string tensor = fmt::format("blk.{}.attn_output.weight", last);
  const std::vector<int32_t> text = RandomTokens(*model, 19, 9);
  const auto measure = [&](const std::shared_ptr<const Model>& of) {
    return MeasureRows(Engine(of, {.compute = ComputeChoice::kF32}), text, {{}, {4}}).scores;
  };
  const auto usual = measure(Changed(kModel, tensor, 1)), twice = measure(Changed(kModel, tensor, 2));
  const auto none = measure(Changed(kModel, tensor, 0));
  const size_t n_heads = model->layer(last).k.n_out / model->config().head_dim;
  for (size_t head = 0; head < usual.size(); ++head)
    for (size_t i = 0; i < text.size(); ++i) {
      const bool own = head + n_heads >= usual.size();
      EXPECT_NEAR(twice[head][i], usual[head][i] + (own ? std::log(2.0f) : 0.0f), 1e-5);
      EXPECT_TRUE(std::isfinite(none[head][i]));
      EXPECT_EQ(none[head][i] < usual[head][i] - 10, own);
    }
}

// Layers that see a window only have no rows to choose from. One of the seven is global, with one KV head.
TEST(RowScores, AreOfGlobalLayersOnly) {
  const auto model = Model::Load(LESSKV_SOURCE_DIR "/tests/data/models/gemma3-local.gguf");
  const RowScores rows =
      MeasureRows(Engine(model, {.compute = ComputeChoice::kF32}), RandomTokens(*model, 30, 4), {{1}, {2}}, true);
  ASSERT_EQ(rows.scores.size(), 1u);
  ASSERT_EQ(rows.inputs.size(), 1u);
  EXPECT_EQ(rows.inputs[0].size(), 30 * model->config().d_model);
}

// With a chat template the model is asked for the text and answers with it; the marks are the template's.
TEST(RowScores, TheTextIsRepeatedAsTheModelWouldBeAsked) {
  const std::string path = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";
  const auto plain = Model::Load(path);
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(plain->file()));
  const auto text = [&](const std::vector<int32_t>& ids) { return tokenizer->Decode(ids, false); };
  ASSERT_TRUE(tokenizer->add_bos());
  EXPECT_EQ(MakeRepeatFrame(*plain, *tokenizer).before, std::vector<int32_t>{tokenizer->bos()});
  EXPECT_EQ(text(MakeRepeatFrame(*plain, *tokenizer).between), "\n");
  const auto chat = Changed(path, "", 1,
                            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
                            "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
                            "}}{% endif %}");
  const RepeatFrame frame = MakeRepeatFrame(*chat, *tokenizer);
  EXPECT_EQ(frame.before[0], tokenizer->bos());
  EXPECT_EQ(std::count(frame.before.begin(), frame.before.end(), tokenizer->bos()), 1);
  EXPECT_TRUE(text(frame.before).ends_with("<|im_start|>user\n")) << text(frame.before);
  EXPECT_EQ(text(frame.between),
            "\n\nRepeat the previous context exactly.<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace
}  // namespace lesskv::train
