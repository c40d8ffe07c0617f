// Products of bfloat16 pairs in the processor's matrix unit (AMX). Built with its own flags; see linear_avx512.cpp for the
// rules.
//
// A tile holds 16 rows of 64 bytes. TDPBF16PS adds to 16 x 16 float32 sums the product of 16 rows of weights (32
// values of each: a tile of the unpacked panel, as it lies) and 16 tokens (16 pairs of each: a tile of the packed
// activations, as they lie). Two tiles of weights and two of tokens give four products for four loads: 3.7 TFLOP/s on a
// core of a Sapphire Rapids when both come from its nearest cache. Here they come from the second one, and the panel is a
// large share of it, because all packed activations pass by once a panel.
#if defined(__x86_64__)

#include <immintrin.h>

#include "kernels/linear_kernels.h"

namespace lesskv::internal {
namespace {

constexpr size_t kTileSide = 16;       // rows of a tile; tokens beside each other
constexpr size_t kPairsAtOnce = 16;    // pairs along a row of a tile
constexpr size_t kRowsAtOnce = 2 * kTileSide;
constexpr size_t kVectorsAtOnce = 2;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sums are tiles 0 to 3, weights 4 and 5, tokens 6 and 7.
template <bool kTwoVectors>
void Multiply(const uint16_t* weights, size_t weight_stride, size_t n_pairs, const uint16_t* group, size_t width,
              float* acc, bool first) {
  const size_t acc_stride = width * sizeof(float), group_stride = width * 2 * sizeof(uint16_t);
  float* lower = acc + kTileSide * width;
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
    if (kTwoVectors) _tile_zero(1);
    if (kTwoVectors) _tile_zero(3);
  } else {
    _tile_loadd(0, acc, acc_stride);
    _tile_loadd(2, lower, acc_stride);
    if (kTwoVectors) _tile_loadd(1, acc + kTileSide, acc_stride);
    if (kTwoVectors) _tile_loadd(3, lower + kTileSide, acc_stride);
  }
  const uint16_t* lower_weights = weights + kTileSide * weight_stride;
  for (size_t i = 0; i < n_pairs; i += kPairsAtOnce) {
    _tile_loadd(4, weights + 2 * i, weight_stride * sizeof(uint16_t));
    _tile_loadd(6, group + i * width * 2, group_stride);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoVectors) _tile_loadd(7, group + i * width * 2 + 2 * kTileSide, group_stride);
    if (kTwoVectors) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower_weights + 2 * i, weight_stride * sizeof(uint16_t));
    _tile_dpbf16ps(2, 5, 6);
    if (kTwoVectors) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, acc, acc_stride);
  _tile_stored(2, lower, acc_stride);
  if (kTwoVectors) _tile_stored(1, acc + kTileSide, acc_stride);
  if (kTwoVectors) _tile_stored(3, lower + kTileSide, acc_stride);
}

void TileBf16(const uint16_t* const* rows, size_t n_pairs, const uint16_t* group, size_t vectors, float* acc,
              bool first) {
  static constexpr TileConfig kConfig;
  _tile_loadconfig(&kConfig);
  const auto stride = static_cast<size_t>(rows[1] - rows[0]);  // 0 when there is one row: the others' sums are not used
  const size_t width = vectors * kTokenLanes;
  if (vectors == 1) {
    Multiply<false>(rows[0], stride, n_pairs, group, width, acc, first);
  } else {
    Multiply<true>(rows[0], stride, n_pairs, group, width, acc, first);
  }
  _tile_release();
}

}  // namespace

const LinearKernels& AmxLinearKernels() {
  static const LinearKernels kernels = [] {
    LinearKernels k = Avx512Bf16LinearKernels();
    k.tile_bf16 = TileBf16;
    k.shape_bf16 = {.group_vectors = kVectorsAtOnce, .rows = {kRowsAtOnce, kRowsAtOnce}, .row_step = kRowsAtOnce,
                    .panel_bytes = 1 << 20, .multiple = 2 * kPairsAtOnce};
    return k;
  }();
  return kernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
