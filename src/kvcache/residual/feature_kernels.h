// The inner loops of LESS, one table per instruction set: fused feature maps, and reading and writing the state.
#pragma once

#include <cstddef>

namespace lesskv::internal {

inline constexpr size_t kHiddenTile = 64;  // hidden units a tile of packed weights; hidden widths are padded to it
inline constexpr size_t kMaxRank = 64;
inline constexpr size_t kQueryBlock = 4;   // inputs that share one pass over the weights

// One head's map up to the second product: p2 = GELU(x w1 + b1) w2.
//
// Packed weights: tile after tile of 64 hidden units; a row of a tile is 64 floats, or, for bfloat16, 32 words: word i
// holds units i (low half) and i + 32 (high half), so that a shift and a mask give both without a permutation,
// whatever the vector length.
struct PackedMap {
  size_t head_dim = 0;
  size_t n_tiles = 0;
  size_t rank = 0;
  bool is_bf16 = false;
  const void* w1 = nullptr;   // [n_tiles, head_dim, row]
  const void* w2 = nullptr;   // [n_tiles, rank, row]: transposed, so that both products stream
  const float* b1 = nullptr;  // [n_tiles * 64] or null
};

struct LessKernels {
  // p2 [n, rank] for x [n, head_dim] with rows x_stride floats apart. The hidden layer exists only as one tile of
  // kQueryBlock inputs.
  void (*hidden_map)(const PackedMap& map, const float* x, size_t x_stride, size_t n, float* p2);

  // H [rank, head_dim] += psi^T v; z [rank] += column sums of psi. psi [n, rank], v [n, head_dim].
  void (*absorb)(const float* psi, const float* v, size_t n, size_t rank, size_t head_dim, float* h, float* z);

  // numerator [head_dim] = phi H; returns phi . z.
  float (*read)(const float* phi, const float* h, const float* z, size_t rank, size_t head_dim, float* numerator);
};

const LessKernels& ScalarLessKernels();  // the reference: std::erf, plain loops
const LessKernels& ActiveLessKernels();  // for ActiveIsa()

}  // namespace lesskv::internal
