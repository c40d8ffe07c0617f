// The forward pass over the tokens of one step, which may belong to several sequences. Weight products run over the
// rows of all sequences together; attention is the cache's, which knows whose rows are whose.
//
// Layer by layer over the whole step, however long it is: a cache sees all tokens of a step in one layer before the
// next layer begins, so that no more than one layer's prompt is ever held in full. Everything else runs in tiles of
// kTileTokens rows. Work memory: 4 n (d_model + 2 q_dim + 2 kv_dim) bytes for n tokens, plus the tiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "kvcache/kv_cache.h"
#include "model/model.h"

namespace lesskv {

inline constexpr size_t kTileTokens = 512;
inline constexpr size_t kLogitsTile = 64;  // a vocabulary of 150 thousand then takes 37 MiB

// Buffers of the forward pass, grown to the largest step so far and reused. f32, row-major, rows in the order of the tokens.
struct ForwardWorkspace {
  AlignedVector<float> x;          // [n, d_model] the residual stream; after Forward the last layer's output, not normed
  AlignedVector<float> q, out;     // [n, q_dim]
  AlignedVector<float> k, v;       // [n, kv_dim]
  AlignedVector<float> h;          // [tile, d_model]
  AlignedVector<float> gate, up;   // [tile, d_ffn]
  AlignedVector<float> logits;     // [kLogitsTile, n_vocab]

  static size_t Bytes(const ModelConfig& config, size_t n_rows);
  // Throws Error kOutOfMemory when the buffers cannot be had.
  void Reserve(const ModelConfig& config, size_t n_rows);
};

// Called after each layer with its number (from 1); false stops.
using LayerHook = std::function<bool(size_t layers_done)>;
// Called after each tile of the products, where nothing of the step is half done.
using TileHook = std::function<void()>;

// Runs all layers over the step's tokens (ids below the embedding's rows); the result is workspace.x. Returns false when
// the hook stopped it. Throws what the cache throws, and Error kOutOfMemory.
//
// Products of few and of many rows add in other orders (FewTokens in linear.h). `lengths` empty: all rows of a step go
// together, which is fastest. Else the tokens of each sequence, in order: every row goes through the products it would
// go through alone, and the bits of a sequence do not depend on which others share the step.
bool Forward(const Model& model, std::span<const int32_t> tokens, KvCache& cache, ComputeType compute,
             ForwardWorkspace& workspace, std::span<const size_t> lengths = {},
             const LayerHook& hook = {}, const TileHook& pause = {});

// Logits of up to kLogitsTile rows of workspace.x, named by their indices: workspace.logits [rows.size(), n_vocab].
// Needs the x of a finished Forward.
const float* ComputeLogits(const Model& model, ForwardWorkspace& workspace, std::span<const size_t> rows,
                           ComputeType compute);

}  // namespace lesskv
