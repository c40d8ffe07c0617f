#include "train/row_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/threads.h"
#include "chat/chat_template.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/rope.h"
#include "kvcache/kv_cache.h"
#include "train/full_layers.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

constexpr size_t kTileQueries = 64;

// Where the two copies lie in what the model reads.
struct Copies {
  size_t first = 0, second = 0, n = 0;

  size_t n_read() const { return second + n; }
};

// Attends in full, a layer at a time, and scores the rows of the first copy by what the second one reads.
class ScoringCache final : public KvCache {
 public:
  ScoringCache(const Model& model, const CacheShape& shape, const Copies& copies, bool wants_inputs, RowScores& result)
      : model_(model),
        shape_(shape),
        copies_(copies),
        full_(shape, copies.n_read()),
        wants_inputs_(wants_inputs),
        result_(result) {}

  bool WantsInputs(size_t layer) const override { return shape_.layers[layer].window == 0; }

  void ReadInputs(size_t, size_t first, size_t n, const float* x) override {
    if (first == 0) log_inputs_.clear();
    if (first == 0 && wants_inputs_) result_.inputs.emplace_back();
    const size_t width = shape_.input_width;
    for (size_t t = first; t < first + n; ++t, x += width) {
      if (t >= copies_.second) log_inputs_.push_back(LogLength(std::sqrt(Dot(x, x, width))));
      if (wants_inputs_ && t >= copies_.first && t < copies_.first + copies_.n)
        result_.inputs.back().insert(result_.inputs.back().end(), x, x + width);
    }
  }

  void Append(size_t layer, const float* keys, const float* values) override {
    const size_t n = copies_.n_read() * shape_.layers[layer].kv_dim();
    keys_.assign(keys, keys + n);
    values_.assign(values, values + n);
    full_.Append(layer, keys, values);
  }

  void Attend(size_t layer, const float* queries, float* out) override {
    full_.Attend(queries, out);
    if (shape_.layers[layer].window == 0) Score(layer, queries);
  }

 private:
  void Score(size_t layer, const float* queries) {
    const LayerShape& shape = shape_.layers[layer];
    const size_t n = copies_.n_read();
    queries_.assign(queries, queries + n * shape.q_dim());
    std::vector<int32_t> positions(n);
    std::iota(positions.begin(), positions.end(), 0);
    RotateRows(*shape.rope, queries_.data(), n, shape.q_dim(), shape.n_heads, shape.head_dim, positions.data());
    RotateRows(*shape.rope, keys_.data(), n, shape.kv_dim(), shape.n_kv_heads, shape.head_dim, positions.data());
    const std::vector<float> log_added = LogAdded(layer);
    std::vector<std::vector<float>> by_head(shape.n_heads);
    ParallelFor(shape.n_heads, [&](size_t head) {
      by_head[head] = ScoresOf(shape, head, std::span(log_added).subspan(head * copies_.n, copies_.n));
    });
    for (size_t h = 0; h < shape.n_kv_heads; ++h) {
      std::vector<float>& best = result_.scores.emplace_back(by_head[h * shape.group()]);
      for (size_t head = h * shape.group() + 1; head < (h + 1) * shape.group(); ++head)
        for (size_t i = 0; i < copies_.n; ++i) best[i] = std::max(best[i], by_head[head][i]);
    }
  }

  // What one query head's queries of the second copy give the rows of the first. [n]
  std::vector<float> ScoresOf(const LayerShape& shape, size_t head, std::span<const float> log_added) const {
    const size_t n = copies_.n_read(), h = head / shape.group(), d = shape.head_dim;
    std::vector<float> best(copies_.n, -std::numeric_limits<float>::infinity()), weights(kTileQueries * n);
    for (size_t first = copies_.second; first < n; first += kTileQueries) {
      const size_t count = std::min(kTileQueries, n - first), keys = first + count;
      Gemm(false, true, count, keys, d, &queries_[first * shape.q_dim() + head * d], shape.q_dim(), &keys_[h * d],
           shape.kv_dim(), weights.data(), keys, false);
      Scale(weights.data(), shape.scale, count * keys);
      for (size_t j = 0; j < count; ++j) {
        float* row = &weights[j * keys];
        const float lse = LogSumExp(row, first + j + 1);
        for (size_t i = 0; i < copies_.n; ++i) row[copies_.first + i] -= lse;
        RaiseScores({row + copies_.first, copies_.n}, log_added, log_inputs_[first + j - copies_.second], best);
      }
    }
    return best;
  }

  // ln |W_O^h v_i| for each query head and row of the first copy, [n_heads, n].
  std::vector<float> LogAdded(size_t layer) const {
    const LayerShape& shape = shape_.layers[layer];
    const WeightView& w = model_.layer(layer).attn_output;
    std::vector<float> identity(w.n_in * w.n_in), columns(w.n_in * w.n_out);
    for (size_t i = 0; i < w.n_in; ++i) identity[i * w.n_in + i] = 1;
    Linear(w, identity.data(), w.n_in, w.n_in, columns.data(), w.n_out, ComputeType::kF32);
    std::vector<float> lengths(shape.n_heads * copies_.n);
    ParallelFor(shape.n_heads, [&](size_t head) {
      const size_t d = shape.head_dim, h = head / shape.group();
      std::vector<float> added(copies_.n * w.n_out);
      Gemm(false, false, copies_.n, w.n_out, d, &values_[copies_.first * shape.kv_dim() + h * d], shape.kv_dim(), &columns[head * d * w.n_out], w.n_out,
           added.data(), w.n_out, false);
      for (size_t i = 0; i < copies_.n; ++i) {
        const float* x = &added[i * w.n_out];
        lengths[head * copies_.n + i] = LogLength(std::sqrt(Dot(x, x, w.n_out)));
      }
    });
    return lengths;
  }

  const Model& model_;
  CacheShape shape_;
  Copies copies_;
  FullLayers full_;
  bool wants_inputs_;
  RowScores& result_;
  std::vector<float> keys_, values_, queries_;  // of the present layer; values stay as they came
  std::vector<float> log_inputs_;               // likewise, of the second copy
};

}  // namespace

void RaiseScores(std::span<const float> log_weights, std::span<const float> log_added, float log_input,
                 std::span<float> scores) {
  for (size_t i = 0; i < scores.size(); ++i)
    scores[i] = std::max(scores[i], log_weights[i] + log_added[i] - log_input);
}

float LogLength(float length) { return std::log(std::max(length, std::numeric_limits<float>::min())); }

RepeatFrame MakeRepeatFrame(const Model& model, const Tokenizer& tokenizer) {
  constexpr const char* kKey = "tokenizer.chat_template";
  const std::string jinja = model.file().Find(kKey) == nullptr ? "" : model.file().Get<std::string>(kKey);
  if (!RecogniseChatFormat(jinja)) {
    RepeatFrame frame{{}, tokenizer.Encode("\n", false, false, false)};
    if (tokenizer.add_bos()) frame.before.push_back(tokenizer.bos());
    return frame;
  }
  const ChatTemplate chat = ChatTemplate::Choose("", jinja, tokenizer, model.file().name());
  // The text itself is tokens already: the question is cut where it stands.
  const std::string text = "\x01", asked = text + "\n\nRepeat the previous context exactly.";
  const ChatMessage question{ChatRole::kUser, asked};
  std::vector<ChatPiece> before = chat.Render({&question, 1}), between;
  const auto own = std::find_if(before.begin(), before.end(), [&](const ChatPiece& piece) {
    return piece.kind == ChatPiece::Kind::kUser;
  });
  between.push_back({ChatPiece::Kind::kUser, own->text.substr(own->text.find(text) + text.size())});
  between.insert(between.end(), own + 1, before.end());
  before.erase(own, before.end());
  return {EncodeChat(tokenizer, before, {}).ids,
          EncodeChat(tokenizer, between, {.begins_text = false, .at_start = false}).ids};
}

RowScores MeasureRows(const Engine& engine, const std::vector<int32_t>& text, const RepeatFrame& frame,
                      bool wants_inputs) {
  const Model& model = engine.model();
  const Copies copies{frame.before.size(), frame.before.size() + text.size() + frame.between.size(), text.size()};
  std::vector<int32_t> read;
  for (const std::vector<int32_t>* part : {&frame.before, &text, &frame.between, &text})
    read.insert(read.end(), part->begin(), part->end());
  CacheShape shape = model.MakeCacheShape(read.size(), engine.compute());
  shape.compute = ComputeType::kF32;
  ForwardWorkspace workspace;
  workspace.Reserve(model.config(), read.size());
  RowScores result;
  ScoringCache cache(model, shape, copies, wants_inputs, result);
  Forward(model, read, cache, engine.compute(), workspace);
  return result;
}

}  // namespace lesskv::train
