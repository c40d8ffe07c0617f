// Rows of activations to 8 bits and spikes (Int8Activations), the same for the instruction sets that keep codes in
// natural order. Everything is in an anonymous namespace, so that each translation unit keeps its own copy, built with
// its own flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/linear/linear_kernels.h"

namespace lesskv::internal {
namespace {

// Each instruction set has its own: the largest size of 32 values; and 32 values rounded to 127 steps of the largest,
// the same numbers as the scalar reference's, whose scale it returns.
inline float LargestSize(const float* x);
inline float Quantize32(const float* x, int8_t* q);

// 32 elements but for those in `without`.
inline void CopyBlock(const float* x, uint32_t without, float out[32]) {
  for (size_t i = 0; i < 32; ++i) out[i] = (without >> i & 1) != 0 ? 0.0f : x[i];
}

// Where the first element of that size stands, which one of the n has; the last one where none is (NaN).
inline size_t FirstOfSize(const float* x, size_t n, float size) {
  size_t i = 0;
  while (i + 1 < n && __builtin_fabsf(x[i]) != size) ++i;
  return i;
}

inline float LargestOf(const float* sizes, size_t n) {
  float most[4] = {};  // one would wait for itself
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (size_t j = 0; j < 4; ++j) most[j] = sizes[i + j] > most[j] ? sizes[i + j] : most[j];
  }
  for (; i < n; ++i) most[0] = sizes[i] > most[0] ? sizes[i] : most[0];
  for (size_t j = 1; j < 4; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
  return most[0];
}

// Takes out the spikes of a row, its largest elements: where they stood, ascending, and in `taken` the bits of each
// block. `largest` is work space for a number a block, `run` for one of every 16 blocks, so that a spike is not looked
// for in all of a long row.
inline void TakeSpikes(const float* x, size_t n_blocks, size_t n_spikes, float* largest, float* run, uint32_t* taken,
                       uint32_t* spike) {
  constexpr size_t kRun = 16;
  const size_t n_runs = (n_blocks + kRun - 1) / kRun;
  const auto blocks = [&](size_t r) { return n_blocks - r * kRun < kRun ? n_blocks - r * kRun : kRun; };
  for (size_t b = 0; b < n_blocks; ++b) largest[b] = LargestSize(x + b * 32), taken[b] = 0;
  for (size_t r = 0; r < n_runs; ++r) run[r] = LargestOf(largest + r * kRun, blocks(r));
  for (size_t e = 0; e < n_spikes; ++e) {
    const size_t r = FirstOfSize(run, n_runs, LargestOf(run, n_runs));
    const size_t b = r * kRun + FirstOfSize(largest + r * kRun, blocks(r), run[r]);
    float block[32];
    CopyBlock(x + b * 32, taken[b], block);
    const size_t i = FirstOfSize(block, 32, largest[b]);
    taken[b] |= uint32_t{1} << i;
    block[i] = 0;
    largest[b] = LargestSize(block);
    run[r] = LargestOf(largest + r * kRun, blocks(r));
    size_t place = e;
    for (; place > 0 && spike[place - 1] > b * 32 + i; --place) spike[place] = spike[place - 1];
    spike[place] = static_cast<uint32_t>(b * 32 + i);
  }
  spike[n_spikes] = kNoSpike;
}

// Codes and scales of a token's row in natural order, and behind them those of its spikes. Returns the blocks of both.
inline size_t RoundRowToInt8(const float* x, size_t n, size_t token, const Int8Activations& out) {
  int8_t* q = out.q + token * out.n_padded;
  float* scale = out.scale + token * out.n_padded / 16;
  uint32_t* spike = out.spike + token * out.n_padded / 32;
  auto* taken = reinterpret_cast<uint32_t*>(out.init + token * out.n_padded / 4);  // written later, as is sum
  const size_t n_blocks = n / 32;
  TakeSpikes(x, n_blocks, out.n_spikes, scale, out.sum + token * out.n_padded / 16, taken, spike);
  for (size_t b = 0; b < n_blocks; ++b) {
    float block[32];
    if (taken[b] != 0) CopyBlock(x + b * 32, taken[b], block);
    scale[b] = Quantize32(taken[b] != 0 ? block : x + b * 32, q + b * 32);
  }
  for (size_t e = 0; e < out.n_spikes; ++e) {
    float block[32] = {};
    block[spike[e] % 32] = x[spike[e]];
    scale[n_blocks + e] = Quantize32(block, q + (n_blocks + e) * 32);
  }
  return n_blocks + out.n_spikes;
}

}  // namespace
}  // namespace lesskv::internal
