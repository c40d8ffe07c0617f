// Vectors as sums of a few atoms of a dictionary (CSR, arXiv 2412.11741, section "Encoder"): matching pursuit, and the
// sum it stands for.
//
// A code of `pairs` (index, coefficient) pairs: indices 16 bits, coefficients signed f16, or numbers of 8 bits
// (CoefficientType). Each step takes the atom that the residual R has most in common with, c = <R, D_i>, rounds c and
// subtracts the rounded one, so that later atoms absorb the rounding: |R'|^2 = |R|^2 - c^2 + (c - rounded c)^2 for unit
// atoms. Codes are sums: an atom may come twice. The first k pairs do not depend on how many follow. A vector's code
// depends on it and the dictionary alone, not on which others are encoded with it; instruction sets may differ where two
// atoms fit equally well but for rounding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace lesskv {

inline constexpr size_t kMostAtomChannels = 512;
inline constexpr size_t kMostAtoms = 65536;

// kE4m3: a sign, 4 bits of exponent and 3 of mantissa, as in the OCP's 8-bit floats: up to 448, down to 2^-9. f16 has
// them all, so that encoding gives and decoding takes halves of either type.
enum class CoefficientType : uint8_t { kF16, kE4m3 };

// The nearest one, ties to the even mantissa; beyond the range the largest; NaN is NaN.
uint8_t FloatToE4m3(float x);
uint16_t E4m3ToHalf(uint8_t code);

// Some atoms of a dictionary, f16.
struct AtomPart {
  const uint16_t* rows = nullptr;   // [n, dim]
  const uint16_t* lanes = nullptr;  // the same as [ceil(n / 16)][dim][16], the last ones padded with zeros; null: not kept
  size_t n = 0;
};

// The atoms that indices name: first those that all sequences share, then a sequence's own.
struct Atoms {
  size_t dim = 0;
  AtomPart shared, own;

  size_t size() const { return shared.n + own.n; }
  const uint16_t* Row(size_t i) const {
    return i < shared.n ? shared.rows + i * dim : own.rows + (i - shared.n) * dim;
  }
};

// Atoms as tiles of 16, in which the search is faster; [ceil(n / 16)][dim][16].
std::vector<uint16_t> AtomLanes(std::span<const uint16_t> rows, size_t dim);

// Encodes vectors x[i * x_stride .. + dim), i < n, to indices and coefficients [n, pairs]. A residual that is down to
// 1e-6 of the vector, or a vector of zeros, leaves the other pairs (0, 0). Ties: the lowest index. What overflows becomes
// the largest coefficient; NaN gives NaN.
//   residuals  [n] or null: |R| / |x| at the end, 0 for a vector of zeros
void EncodeAtoms(const Atoms& atoms, size_t pairs, const float* x, size_t n, size_t x_stride, uint16_t* indices,
                 uint16_t* coefficients, float* residuals, CoefficientType type = CoefficientType::kF16);

// out[i * out_stride .. + dim) = sum over the pairs of code i, in order, of coefficient times atom.
void DecodeAtoms(const Atoms& atoms, size_t pairs, const uint16_t* indices, const uint16_t* coefficients, size_t n,
                 float* out, size_t out_stride);

}  // namespace lesskv
