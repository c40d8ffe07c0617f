// Rows of activations to 8 bits and spikes (Int8Activations), the same for the instruction sets that keep codes in
// natural order. Everything is in an anonymous namespace, so that each translation unit keeps its own copy, built with
// its own flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// Each instruction set has its own, of 32 values: the largest size of those that are not in `without`; the ones of that
// size; and their codes, rounded to 127 steps of the largest, the same numbers as the scalar reference's.
inline float LargestSize(const float* x, uint32_t without);
inline uint32_t OfSize(const float* x, float size);
inline void Quantize32(const float* x, float largest, int8_t* q);

// Takes the first element that is not taken yet.
inline void TakeFirst(uint32_t* taken) {
  while (*taken == ~uint32_t{0}) ++taken;
  *taken |= *taken + 1;
}

inline size_t FirstOf(uint32_t bits) { return static_cast<size_t>(__builtin_ctz(bits)); }

// Takes out the spikes of a row, its largest elements: where they stood, ascending, and in `taken` the bits of each
// block. `largest` becomes the largest size of what is left of each block; it and `taken` have room for whole runs of 32
// blocks, of which `run` has the largest sizes, so that a spike is not looked for in all of a long row.
inline void TakeSpikes(const float* x, size_t n_blocks, size_t n_spikes, float* largest, float* run, uint32_t* taken,
                       uint32_t* spike) {
  const size_t n_runs = (n_blocks + 31) / 32;
  for (size_t b = 0; b < n_runs * 32; ++b) largest[b] = b < n_blocks ? LargestSize(x + b * 32, 0) : 0, taken[b] = 0;
  for (size_t r = 0; r < n_runs; ++r) run[r] = LargestSize(largest + r * 32, 0);
  for (size_t e = 0; e < n_spikes; ++e) {
    size_t r = 0;
    for (size_t other = 1; other < n_runs; ++other) r = run[other] > run[r] ? other : r;
    const uint32_t blocks = OfSize(largest + r * 32, run[r]) | uint32_t{1} << 31;
    const size_t b = r * 32 + FirstOf(blocks);
    const uint32_t elements = b < n_blocks ? OfSize(x + b * 32, largest[b]) & ~taken[b] : 0;
    if (elements == 0) {  // only zeros are left, or NaN: any will do
      TakeFirst(taken);
      continue;
    }
    taken[b] |= elements & -elements;
    const float left = LargestSize(x + b * 32, taken[b]);
    const float others = LargestSize(largest + r * 32, uint32_t{1} << b % 32);
    largest[b] = left;
    run[r] = left > others ? left : others;
  }
  size_t e = 0;
  for (size_t b = 0; b < n_blocks; ++b) {
    for (uint32_t bits = taken[b]; bits != 0; bits &= bits - 1)
      spike[e++] = static_cast<uint32_t>(b * 32 + static_cast<size_t>(__builtin_ctz(bits)));
  }
  spike[n_spikes] = kNoSpike;
}

// Codes and scales of a token's row in natural order, and behind them those of its spikes. Returns the blocks of both.
inline size_t RoundRowToInt8(const float* x, size_t n, size_t token, const Int8Activations& out) {
  int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  uint32_t* spike = out.spike + token * out.n_padded / 32;
  const size_t n_blocks = n / 32;
  auto* taken = reinterpret_cast<uint32_t*>(out.init + token * out.n_padded / 4);  // written later, as is sum
  auto* largest = reinterpret_cast<float*>(taken + (n_blocks + 31) / 32 * 32);
  TakeSpikes(x, n_blocks, out.n_spikes, largest, out.sum + token * out.n_padded / 16, taken, spike);
  for (size_t b = 0; b < n_blocks; ++b) {
    Quantize32(x + b * 32, largest[b], q + b * 32);
    scale[b] = largest[b] / 127.0f;
  }
  for (size_t e = 0; e < out.n_spikes; ++e) {
    const float value = x[spike[e]];
    int8_t* own = q + (n_blocks + e) * 32;
    __builtin_memset(own, 0, 32);
    own[spike[e] % 32] = static_cast<int8_t>(value > 0 ? 127 : value < 0 ? -127 : 0);
    scale[n_blocks + e] = __builtin_fabsf(value) / 127.0f;
    q[spike[e]] = 0;
  }
  return n_blocks + out.n_spikes;
}

}  // namespace
}  // namespace lesskv::internal
