// Products of activations with the weight matrices of a model file, read where they lie: the mapped, often quantised
// rows are never expanded as a whole. All paths are deterministic: an output value depends on its row of weights, its
// row of activations, the compute type, the instruction set, and on whether the call has more than FewTokens tokens, and
// on nothing else (not on the other tokens, nor on the number of threads).
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "base/dtype.h"

namespace lesskv {

// A weight matrix as it lies in the model file: [n_out, n_in], row-major blocks of `type`. `data` needs no alignment.
struct WeightView {
  DType type;
  size_t n_out;
  size_t n_in;
  const void* data;
};

// What may be rounded on the way to a product; sums are always float32.
//   kF32   nothing: weights dequantised to float32, activations float32. The reference arithmetic of the project.
//   kBF16  up to FewTokens tokens: activations of quantised weights rounded to int8 in blocks of 32 with a float32
//          scale, those of float weights stay float32. More tokens: weights and activations rounded to bfloat16; a
//          processor that cannot multiply bfloat16 pairs uses float32 instead.
//   kInt8  as kBF16, but with quantised weights activations are rounded to int8 whatever the number of tokens, and the
//          weights are not rounded at all.
// Where activations are rounded to int8, a token's largest n_in / 128 elements are not: they would make the steps of
// their blocks coarse. (The kernels of a few tokens with AVX-512 round all. So do AVX2's of weights in blocks of 256,
// where a scale is a multiple of a 40th of what the largest of 256 activations would have.)
enum class ComputeType { kF32, kBF16, kInt8 };

std::string_view ComputeTypeName(ComputeType compute);  // "f32", "bf16", "int8"

// What `--compute auto` means: kBF16 with AMX, kInt8 with all other instruction sets of x86 and ARM's dot products, kF32
// elsewhere.
ComputeType AutoCompute();

// Up to this many tokens a product reads each weight once for all of them and is bound by memory; beyond, tiles of the
// weights are unpacked into the cache and used for many tokens at once, bound by arithmetic. Measured (bench_linear)
// where the two meet, with the active instruction set.
size_t FewTokens(DType weights, size_t n_in, ComputeType compute);
inline constexpr size_t kMostFewTokens = 12;  // FewTokens is never more

// True for the types Linear takes: all weight types (quants.h).
bool IsLinearType(DType type);

// y[t, o] = sum over i of x[t, i] * w[o, i], for t < n_tokens and o < n_out.
//   x  [n_tokens, n_in] float32, rows x_stride floats apart
//   y  [n_tokens, n_out] float32, rows y_stride floats apart; overwritten; must not overlap x
// Runs on all threads (ParallelFor over blocks of rows). Thread-safe. Works in LinearWorkBytes of memory, kept for the
// next call.
void Linear(const WeightView& w, const float* x, size_t x_stride, size_t n_tokens, float* y, size_t y_stride,
            ComputeType compute);

// One of several matrices that the same activations are multiplied with, and where its products go.
struct LinearTerm {
  WeightView w;
  float* y;
  size_t y_stride;
};

// The same for each of the terms, all of one n_in, to the same bits: rounding the activations and the parallel region
// are shared by neighbours of one type.
void Linear(std::span<const LinearTerm> terms, const float* x, size_t x_stride, size_t n_tokens, ComputeType compute);

// The same for tokens of several texts, `lengths` of each in order, to the bits that a call for each text gives: texts
// go together as far as FewTokens lets them.
void Linear(std::span<const LinearTerm> terms, const float* x, size_t x_stride, std::span<const size_t> lengths,
            ComputeType compute);

// An upper bound of the work memory of a call, also of one with several matrices for the largest of them, with the
// threads and the instruction set that are active now: at most 512 packed tokens, and a panel of unpacked rows a
// thread.
size_t LinearWorkBytes(const WeightView& w, size_t n_tokens, ComputeType compute);

}  // namespace lesskv
