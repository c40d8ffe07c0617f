// What a transformer layer knows of the cache: it appends unrotated keys and values and attends with unrotated queries.
// Everything else (rotation, storage, eviction, recurrence) is the cache's own business; the model names no method.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lesskv {

// A token's place in the text, counted from 0 over all tokens seen. Not where its bytes are: see Slot.
enum class Position : int32_t {};
// A row's place in the storage of one (layer, KV head). After the first eviction slots and positions differ.
enum class Slot : uint32_t {};

constexpr int32_t ToInt(Position position) { return static_cast<int32_t>(position); }
constexpr uint32_t ToInt(Slot slot) { return static_cast<uint32_t>(slot); }

// What the engine says of a step when it begins one.
enum class StepKind {
  kPrompt,  // a whole prompt in one step (one-shot prefill): attended in full, every method cuts at its end
  kStream,  // a chunk of text that streams in: attended against what is left, then cut (prefill(chunk), eval --mode stream)
  kDecode,  // generated tokens, or tokens scored as if they had been generated
};

// All sequences of a step at once: n is the number of tokens of the whole step, one sequence after the other.
class KvCache {
 public:
  virtual ~KvCache() = default;

  // Whether some method wants to see what enters a layer's key projection (after its norm), and, where it does, those
  // inputs before the layer's Append: x [n, width], row-major, of the step's tokens [first, first + n), in order. Not kept.
  virtual bool WantsInputs(size_t /*layer*/) const { return false; }
  virtual void ReadInputs(size_t /*layer*/, size_t /*first*/, size_t /*n*/, const float* /*x*/) {}

  // Once a layer, layers in increasing order:
  // keys, values [n, n_kv_heads, head_dim], row-major, unrotated, for the n new tokens in order. Copied before return.
  virtual void Append(size_t layer, const float* keys, const float* values) = 0;

  // After Append of the same layer. queries [n, n_heads, head_dim], unrotated; out [n, n_heads, head_dim] receives the
  // attention output before the output projection. Query head h reads KV head h / (n_heads / n_kv_heads).
  virtual void Attend(size_t layer, const float* queries, float* out) = 0;
};

}  // namespace lesskv
