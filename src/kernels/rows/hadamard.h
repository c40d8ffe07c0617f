// The orthonormal Walsh-Hadamard transform, in blocks: it spreads a channel that stands out over its whole block, so
// that low-bit rows lose less. The matrix of a block of n channels is H[i, j] = (-1)^popcount(i & j) / sqrt(n); it is
// symmetric and its own inverse, so the same function transforms and takes back.
#pragma once

#include <cstddef>

namespace lesskv {

// The largest power of two that divides dim >= 1: the whole of 64 or 128 channels, 32 of 96, 16 of 80, 1 of odd sizes.
size_t HadamardBlock(size_t dim);

// Transforms each whole block of x in place: n floats, a multiple of `block`, a power of two (1: nothing happens).
// n log2(block) additions; the same bits on every instruction set. Single-threaded.
void Hadamard(float* x, size_t n, size_t block);

}  // namespace lesskv
