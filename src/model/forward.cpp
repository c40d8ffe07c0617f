#include "model/forward.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <new>

#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/quants/quants.h"

namespace lesskv {
namespace {

void NormRow(const NormWeights& norm, float eps, const float* x, float* out) {
  const size_t d = norm.weight.size();
  if (norm.bias.empty())
    RmsNorm(x, norm.weight.data(), eps, d, out);
  else
    LayerNorm(x, norm.weight.data(), norm.bias.data(), eps, d, out);
}

// Rows of the norm's width; out may be x.
void NormRows(const float* x, const NormWeights& norm, float eps, size_t n, float* out) {
  const size_t d = norm.weight.size();
  ParallelFor(n, [&](size_t row) { NormRow(norm, eps, x + row * d, out + row * d); });
}

// Where the architecture has such a norm.
void NormInPlace(float* x, const NormWeights& norm, float eps, size_t n) {
  if (!norm.weight.empty()) NormRows(x, norm, eps, n, x);
}

// d values of a row; `up` is read where the activation is a gate.
void Activate(Activation activation, float* gate, const float* up, size_t d) {
  switch (activation) {
    case Activation::kSiluGate: return SiluMul(gate, up, d);
    case Activation::kGeluTanhGate: return GeluTanhMul(gate, up, d);
    case Activation::kGelu: return Gelu(gate, d);
  }
}

void AddRows(float* x, const float* y, size_t n, size_t d) {
  ParallelFor(n, [&](size_t row) { Add(x + row * d, y + row * d, d); });
}

// The forward pass of one step.
struct Pass {
  const Model& model;
  std::span<const int32_t> tokens;
  KvCache& cache;
  ComputeType compute;
  ForwardWorkspace& w;
  const ModelConfig& config;
  const TileHook& pause;
  std::vector<size_t> lengths = {};  // rows of each sequence, in tiles; empty: rows go together whatever their sequence
  std::span<const size_t> tile_lengths = {};  // of these, the ones of the tile in work

  void Embed() {
    const WeightView& table = model.token_embedding();
    const size_t row_bytes = RowBytes(table.type, table.n_in);
    float* x = w.x.data();
    for (const int32_t token : tokens) {
      CHECK(token >= 0 && static_cast<size_t>(token) < table.n_out, "token {} of {}", token, table.n_out);
      DequantizeRow(table.type, static_cast<const std::byte*>(table.data) + static_cast<size_t>(token) * row_bytes,
                    table.n_in, x);
      if (config.architecture.scaled_embedding)
        Scale(x, std::sqrt(static_cast<float>(table.n_in)), table.n_in);
      x += table.n_in;
    }
  }

  // One layer, as in the papers: x += Wo attention(Wq n(x), Wk n(x), Wv n(x)); x += Wd (silu(Wg n(x)) * Wu n(x)). In a
  // parallel layer both halves read the x that came in. Positions and rotation are the cache's.
  void Layer(size_t index) {
    const LayerWeights& l = model.layer(index);
    ForTiles([&](size_t row, size_t n) { QueriesKeysValues(index, row, n); });
    cache.Append(index, w.k.data(), w.v.data());
    cache.Attend(index, w.q.data(), w.out.data());
    ForTiles([&](size_t row, size_t n) {
      // What attention adds is ready by itself; so the half that still reads x goes first.
      if (config.architecture.parallel) FeedForward(l, row, n);
      AttentionOutput(l, row, n);
      if (!config.architecture.parallel) FeedForward(l, row, n);
    });
  }

 private:
  void QueriesKeysValues(size_t index, size_t row, size_t n) {
    const LayerWeights& l = model.layer(index);
    float *q = w.q.data() + row * l.q.n_out, *k = w.k.data() + row * l.k.n_out, *v = w.v.data() + row * l.v.n_out;
    NormRows(w.x.data() + row * config.d_model, l.attn_norm, config.norm_eps, n, w.h.data());
    if (cache.WantsInputs(index)) cache.ReadInputs(index, row, n, w.h.data());
    Products({{l.q, l.q_bias, q}, {l.k, l.k_bias, k}, {l.v, l.v_bias, v}}, w.h.data(), n);
    NormInPlace(q, l.q_norm, config.norm_eps, n * config.n_heads);
    NormInPlace(k, l.k_norm, config.norm_eps, n * config.n_kv_heads);
  }

  void AttentionOutput(const LayerWeights& l, size_t row, size_t n) {
    Products({{l.attn_output, l.attn_output_bias, w.h.data()}}, w.out.data() + row * l.q.n_out, n);
    NormInPlace(w.h.data(), l.post_attn_norm, config.norm_eps, n);
    AddRows(w.x.data() + row * config.d_model, w.h.data(), n, config.d_model);
  }

  void FeedForward(const LayerWeights& l, size_t row, size_t n) {
    const Architecture& a = config.architecture;
    const size_t d = config.d_ffn;
    float* x = w.x.data() + row * config.d_model;
    NormRows(x, l.ffn_norm, config.norm_eps, n, w.h.data());
    if (a.gated()) {
      Products({{l.ffn_gate, l.ffn_gate_bias, w.gate.data()}, {l.ffn_up, l.ffn_up_bias, w.up.data()}}, w.h.data(), n);
    } else {
      Products({{l.ffn_up, l.ffn_up_bias, w.gate.data()}}, w.h.data(), n);
    }
    ParallelFor(n, [&](size_t i) { Activate(a.activation, w.gate.data() + i * d, w.up.data() + i * d, d); });
    Products({{l.ffn_down, l.ffn_down_bias, w.h.data()}}, w.gate.data(), n);
    NormInPlace(w.h.data(), l.post_ffn_norm, config.norm_eps, n);
    AddRows(x, w.h.data(), n, config.d_model);
  }

  struct Term {
    const WeightView& weights;
    const std::vector<float>& bias;
    float* y;  // [n, out]
  };

  // y = x [n, in] W^T + bias, all dense, of each term, for the n rows of a tile.
  void Products(std::initializer_list<Term> terms, const float* x, size_t n) const {
    constexpr size_t kMostTerms = 3;
    CHECK(terms.size() <= kMostTerms, "{} products at once", terms.size());
    LinearTerm products[kMostTerms];
    std::ranges::transform(terms, products, [](const Term& t) { return LinearTerm{t.weights, t.y, t.weights.n_out}; });
    const std::span<const LinearTerm> all(products, terms.size());
    const size_t in = terms.begin()->weights.n_in;
    if (lengths.empty())
      Linear(all, x, in, n, compute);
    else
      Linear(all, x, in, tile_lengths, compute);
    for (const Term& t : terms) {
      const size_t out = t.weights.n_out;
      if (!t.bias.empty()) ParallelFor(n, [&](size_t row) { Add(t.y + row * out, t.bias.data(), out); });
    }
  }

  template <typename Body>
  void ForTiles(Body&& body) {
    for (size_t row = 0; row < tokens.size() && lengths.empty(); row += kTileTokens) {
      body(row, std::min(kTileTokens, tokens.size() - row));
      if (pause) pause();
    }
    for (size_t i = 0, row = 0; i < lengths.size();) {  // whole texts, as many as fit
      const size_t first = i;
      size_t n = 0;
      while (i < lengths.size() && n + lengths[i] <= kTileTokens) n += lengths[i++];
      tile_lengths = std::span(lengths).subspan(first, i - first);
      body(row, n);
      if (pause) pause();
      row += n;
    }
  }
};

}  // namespace

size_t ForwardWorkspace::Bytes(const ModelConfig& c, size_t n_rows) {
  const size_t tile = std::min(n_rows, kTileTokens);
  return sizeof(float) * (n_rows * (c.d_model + 2 * c.q_dim() + 2 * c.kv_dim()) +
                          tile * (c.d_model + 2 * c.d_ffn) + std::min(tile, kLogitsTile) * c.n_vocab);
}

void ForwardWorkspace::Reserve(const ModelConfig& c, size_t n_rows) {
  const size_t tile = std::min(n_rows, kTileTokens);
  const auto grow = [](AlignedVector<float>& buffer, size_t size) {
    if (buffer.size() >= size) return;
    AlignedVector<float>().swap(buffer);  // the old content is not needed: free it before asking for more
    buffer.resize(size);
  };
  try {
    grow(x, n_rows * c.d_model);
    grow(q, n_rows * c.q_dim());
    grow(out, n_rows * c.q_dim());
    grow(k, n_rows * c.kv_dim());
    grow(v, n_rows * c.kv_dim());
    grow(h, tile * c.d_model);
    grow(gate, tile * c.d_ffn);
    grow(up, tile * c.d_ffn);
    grow(logits, std::min(tile, kLogitsTile) * c.n_vocab);
  } catch (const std::bad_alloc&) {
    Fail(ErrorCode::kOutOfMemory, "a step of {} tokens needs {} bytes of work memory, which cannot be had", n_rows,
         Bytes(c, n_rows));
  }
}

bool Forward(const Model& model, std::span<const int32_t> tokens, KvCache& cache, ComputeType compute,
             ForwardWorkspace& workspace, std::span<const size_t> lengths, const LayerHook& hook,
             const TileHook& pause) {
  workspace.Reserve(model.config(), tokens.size());
  Pass pass{model, tokens, cache, compute, workspace, model.config(), pause};
  for (const size_t length : lengths)
    for (size_t done = 0; done < length; done += kTileTokens)
      pass.lengths.push_back(std::min(kTileTokens, length - done));
  pass.Embed();
  for (size_t layer = 0; layer < model.config().n_layers; ++layer) {
    pass.Layer(layer);
    if (hook && !hook(layer + 1)) return false;
  }
  return true;
}

const float* ComputeLogits(const Model& model, ForwardWorkspace& workspace, std::span<const size_t> rows,
                           ComputeType compute) {
  CHECK(rows.size() <= kLogitsTile);
  const size_t d_model = model.config().d_model;
  ParallelFor(rows.size(), [&](size_t i) {
    NormRow(model.output_norm(), model.config().norm_eps, workspace.x.data() + rows[i] * d_model,
            workspace.h.data() + i * d_model);
  });
  Linear(model.output(), workspace.h.data(), d_model, rows.size(), workspace.logits.data(), model.config().n_vocab,
         compute);
  return workspace.logits.data();
}

}  // namespace lesskv
