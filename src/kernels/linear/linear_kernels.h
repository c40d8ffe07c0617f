// The inner loops of Linear, one table per instruction set. Each table lives in a translation unit with its own
// compiler flags; only pointers and sizes cross this header, and it defines no inline function, because the linker
// keeps one copy of an inline function and could pick the one the processor cannot run.
//
// Three ways to multiply:
//   Dot   few tokens: each row of weights is unpacked in registers and multiplied with every token.
//   Tile  many tokens: activations are packed once with the tokens side by side, `lanes` of them in a vector, so that a
//         weight is broadcast and needs no transposition: row-major rows, unpacked to float32 or bfloat16, serve as
//         they are. What is multiplied at once is a TileShape, chosen to fill the registers with accumulators.
//   Int8  many tokens, quantised weights: panels of 8-bit codes with the rows side by side, a token broadcast.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

namespace lesskv::internal {

inline constexpr size_t kKernelTokens = 8;     // most tokens of a Dot
inline constexpr size_t kTokenLanes = 16;      // tokens in a vector of packed activations
inline constexpr size_t kMaxGroupVectors = 4;  // vectors in a group
inline constexpr size_t kMaxTileRows = 32;
inline constexpr size_t kElementsOfSpike = 128;  // one element in so many is a spike
inline constexpr uint32_t kNoSpike = ~uint32_t{0};

// Activations as int8, for products with quantised rows. Element order inside a block of 256 (128 for blocks of 32) is
// private to the table that wrote it.
//
// A few channels of a trained model are far larger than the others, and the steps of their blocks so coarse that they
// make most of the error. So the n_spikes largest elements of a token (of equal ones the first) are taken out of their
// blocks and multiplied exactly. Behind the row's own n / 32 blocks stand as many that hold one spike each, at its place
// within 32; kernels of few tokens that take spikes otherwise, or none, say so.
struct Int8Activations {
  int8_t* q;        // [n_tokens, n_padded]
  int32_t* init;    // [n_tokens, n_padded / 4]: what accumulators start from, because stored codes are unsigned
  float* scale;     // [n_tokens, n_padded / 16]: one scale for each 32 codes; twice each for types with groups of 16
  float* sum;       // [n_tokens, n_padded / 16]: scale times the sum of 32 codes, for types with a minimum; of 16 codes
                    // for types with groups of 16
  uint32_t* spike;  // [n_tokens, n_padded / 32]: where in the row the spikes stood, ascending; then kNoSpike
  size_t n_spikes;  // 0 for tables that do not know of them
  size_t n_padded;  // n + 32 n_spikes, rounded up to 256; the padding is zero
};

// A block of consecutive rows of weights.
struct RowBlock {
  DType type;
  const uint8_t* rows;
  size_t row_bytes;
  size_t n_rows;
  size_t n;  // elements a row
};

struct TileShape {
  size_t group_vectors = 0;            // most vectors of tokens in a group; 0: the table has no such tile
  size_t rows[kMaxGroupVectors] = {};  // rows at once with a group of 1, 2, ... vectors
  size_t row_step = 24;                // rows of a panel are a multiple of it, and it of all `rows`
  size_t depth = 2048;                 // elements of a row multiplied before moving to the next rows
  size_t panel_bytes = 256 << 10;      // unpacked rows that all groups pass by: a share of the L2
  size_t multiple = 1;                 // rows must be a multiple of so many elements long
};

// A group of rows of weights as 8-bit codes, Int8Kernels::rows of them side by side: four codes of each, then the next
// four. Codes are unsigned unless the table multiplies signed ones.
struct Int8Panel {
  uint8_t* codes;  // [n / 4, rows, 4]
  float* scale;    // [n / 32 or n / 16, rows], as many as the type has scales
  float* minimum;  // the same, for types with a minimum
};

// Which part of a product with a group of rows: blocks of 32 elements, of all that a row has, and tokens.
struct Int8Range {
  size_t first_block, n_blocks, all_blocks, first_token, n_tokens;
  const uint8_t* ahead = nullptr;  // what is wanted next, of which block b may fetch its share, so many bytes at
  size_t ahead_bytes = 0;          // ahead + b * ahead_bytes
};

// Products of many tokens with quantised weights whose activations are rounded as in LinearKernels::quantize.
struct Int8Kernels {
  size_t rows;  // in a group
  // The rows of a block (at most `rows`; the last one stands for missing ones) to a panel.
  void (*unpack)(const RowBlock& block, const Int8Panel& out);
  // One token's row, in natural order; init and sum as the panels want them.
  void (*quantize)(DType type, const float* x, size_t n, size_t token, const Int8Activations& out);
  // y[t * y_stride + r] = the range's product of token first_token + t with row r, r < n_rows; added to what is there
  // unless the range begins with the first block.
  void (*multiply)(DType type, const Int8Panel& panel, size_t n_rows, const Int8Activations& x, const Int8Range& range,
                   float* y, size_t y_stride);
};

struct LinearKernels {
  // Rows to float32 / bfloat16 (as bits, rounded to nearest even), n elements each, rows out_stride elements apart.
  void (*unpack_f32)(const RowBlock& block, float* out, size_t out_stride);
  void (*unpack_bf16)(const RowBlock& block, uint16_t* out, size_t out_stride);

  // y[t * y_stride + r]; dot_int8 for n_tokens <= kKernelTokens.
  void (*dot_f32)(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride);
  void (*quantize)(DType type, const float* x, size_t n, size_t token, const Int8Activations& out);
  void (*dot_int8)(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride);

  // Packs one group: `n_tokens` rows of x (missing ones are zero) as [n][vectors][kTokenLanes] float32, or
  // [ceil(n / 2)][vectors][kTokenLanes][2] bfloat16.
  void (*pack_f32)(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, float* out);
  void (*pack_bf16)(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, uint16_t* out);

  // acc[r][vectors * kTokenLanes] (+)= rows[r][0, n) x group; adds to what acc holds unless `first`.
  // `rows` holds as many pointers as the shape has rows for `vectors`. They are equally far apart, but for the last rows
  // of a panel, which repeat its last one; behind it there is memory up to the row_step. For bfloat16 n counts pairs.
  void (*tile_f32)(const float* const* rows, size_t n, const float* group, size_t vectors, float* acc, bool first);
  void (*tile_bf16)(const uint16_t* const* rows, size_t n_pairs, const uint16_t* group, size_t vectors, float* acc,
                    bool first);
  TileShape shape_f32, shape_bf16;

  const Int8Kernels* int8 = nullptr;  // null: none
  bool dots_take_spikes = false;      // quantize and dot_int8 may, int8 always does

  // y[t * y_stride + r] = acc[r][t] for t < n_tokens, r < n_rows; rows of acc are `width` apart.
  void (*store)(const float* acc, size_t width, size_t n_rows, size_t n_tokens, float* y, size_t y_stride);

  // FewTokens of kBF16, for float and for quantised weights, and of kInt8 for those in blocks of 32 and of 256.
  size_t few_float = kKernelTokens, few_int8 = 12, few_panel = 4, few_panel_256 = 4;
  size_t longest_few_int8 = SIZE_MAX;  // elements of a quantised row; no token is few for longer ones
};

// Plain loops for tables that have no better one.
void ScalarPackF32(const float* x, size_t x_stride, size_t n_tokens, size_t n, size_t vectors, float* out);
void ScalarStore(const float* acc, size_t width, size_t n_rows, size_t n_tokens, float* y, size_t y_stride);

// Entries a level does not have are null: bfloat16 tiles below kAvx512Bf16 (the scalar ones exist, as the reference).
const LinearKernels& ScalarLinearKernels();
#if defined(__x86_64__)
const LinearKernels& Avx2LinearKernels();
const LinearKernels& AvxVnniLinearKernels();  // Avx2 but for many tokens in 8-bit numbers
const LinearKernels& Avx512LinearKernels();
const LinearKernels& Avx512Bf16LinearKernels();
const LinearKernels& AmxLinearKernels();

// Entries that have a translation unit of their own; of AVX2's those of rows in blocks of 256 elements another.
inline constexpr size_t kAvx2LongestDotInt8 = 32768;  // elements of a row
void Avx2QuantizeActivations(DType type, const float* x, size_t n, size_t token, const Int8Activations& out);
void Avx2DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride);
void Avx2QuantizeSuperBlocks(DType type, const float* x, size_t n, size_t token, const Int8Activations& out);
void Avx2DotSuperBlocks(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride);
void Avx512QuantizeActivations(DType type, const float* x, size_t n, size_t token, const Int8Activations& out);
void Avx512DotInt8(const RowBlock& block, const Int8Activations& x, size_t n_tokens, float* y, size_t y_stride);

const Int8Kernels& Avx2Int8Kernels();
const Int8Kernels& AvxVnniInt8Kernels();
const Int8Kernels& Avx512Int8Kernels();
#elif defined(__aarch64__)
const LinearKernels& NeonLinearKernels();
const LinearKernels& DotprodLinearKernels();  // the same but for products of 8-bit numbers
#endif

}  // namespace lesskv::internal
