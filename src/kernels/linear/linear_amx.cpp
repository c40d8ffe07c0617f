// Products of bfloat16 pairs in the processor's matrix unit (AMX). Built with its own flags; see linear_avx512.cpp for the
// rules.
//
// The panel of unpacked rows is the left side of amx_tiles.h as it lies, a group of packed activations the right side.
// From its nearest cache a core of a Sapphire Rapids multiplies 3.7 TFLOP/s this way. Here both sides come from the
// second one, and the panel is a large share of it, because all packed activations pass by once a panel.
#if defined(__x86_64__)

#include "kernels/basic/amx_tiles.h"
#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

constexpr size_t kRowsAtOnce = 2 * kTileSide;
constexpr size_t kVectorsAtOnce = 2;
static_assert(kTokenLanes == kTileSide);

void TileBf16(const uint16_t* const* rows, size_t n_pairs, const uint16_t* group, size_t vectors, float* acc,
              bool first) {
  const TileScope tiles;
  const auto* weights = reinterpret_cast<const uint32_t*>(rows[0]);
  // 0 when there is one row only: the sums of the others are not used.
  const size_t stride = static_cast<size_t>(rows[1] - rows[0]) / 2, width = vectors * kTokenLanes;
  const auto* tokens = reinterpret_cast<const uint32_t*>(group);
  if (vectors == 1) {
    MultiplyTiles<true, false>(weights, stride, n_pairs, tokens, width, acc, width, !first);
  } else {
    MultiplyTiles<true, true>(weights, stride, n_pairs, tokens, width, acc, width, !first);
  }
}

}  // namespace

const LinearKernels& AmxLinearKernels() {
  static const LinearKernels kernels = [] {
    LinearKernels k = Avx512Bf16LinearKernels();
    k.tile_bf16 = TileBf16;
    k.shape_bf16 = {.group_vectors = kVectorsAtOnce, .rows = {kRowsAtOnce, kRowsAtOnce}, .row_step = kRowsAtOnce,
                    .panel_bytes = 1 << 20, .multiple = 2 * kTilePairs};
    k.few_float = 4;
    k.few_int8 = 8;
    return k;
  }();
  return kernels;
}

}  // namespace lesskv::internal

#endif  // defined(__x86_64__)
