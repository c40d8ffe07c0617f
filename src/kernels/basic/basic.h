// Small vector operations on float32: norms, activations, sums, conversions. All are single-threaded, accept
// any length (0 included unless said otherwise) and any alignment, and run on the active instruction set (cpu.h);
// Isa::kScalar gives the plain reference loops. Sums are accumulated in float32 lanes, in an order fixed by the
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lesskv {

// out[i] = x[i] * weight[i] / sqrt(mean(x^2) + eps). out may be x.
void RmsNorm(const float* x, const float* weight, float eps, size_t n, float* out);

// out[i] = (x[i] - mean(x)) / sqrt(variance(x) + eps) * weight[i] + bias[i]. out may be x.
void LayerNorm(const float* x, const float* weight, const float* bias, float eps, size_t n, float* out);

// gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]: the SwiGLU product, in place.
void SiluMul(float* gate, const float* up, size_t n);

// gate[i] = gelu(gate[i]) * up[i], in place, with GELU's approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415).
void GeluTanhMul(float* gate, const float* up, size_t n);

// x[i] = gelu(x[i]) = x[i] (1 + erf(x[i] / sqrt(2))) / 2, in place. Plain loops on every instruction set.
void Gelu(float* x, size_t n);

// log(sum(exp(x[i]))), without overflow; -inf for n = 0 or when every entry is -inf.
float LogSumExp(const float* x, size_t n);

// x[i] = exp(x[i]), relative error below 1e-6 where the result is a normal number; 0 below about -104.
void Exp(float* x, size_t n);

float Dot(const float* a, const float* b, size_t n);
float Sum(const float* x, size_t n);
float Max(const float* x, size_t n);                     // of the entries that are not NaN; -inf when there are none
void Add(float* x, const float* y, size_t n);            // x += y
void Scale(float* x, float factor, size_t n);            // x *= factor
void Axpy(float* y, float a, const float* x, size_t n);  // y += a * x

// c[i * c_row + j] = sum over k of a[i * a_row + k * a_column] * b[k * b_row + j], for i < m and j < n: a product of small
// matrices, one of which lies in cache. Each sum is added up in the order of k, whatever m and n are. c may be neither a nor b.
void SmallProduct(size_t m, size_t n, size_t k, const float* a, size_t a_row, size_t a_column, const float* b, size_t b_row,
                  float* c, size_t c_row);

// Index of the largest value, the lowest one among equals; 0 when all are NaN. NaN never wins. n >= 1.
size_t ArgMax(const float* x, size_t n);

// Row of the lowest value among the rows at positions in [begin, end); of equal values the one at the highest position.
// NaN is below every number. n when no row lies there. values, positions [n]; positions are distinct.
size_t LowestRow(const float* values, const int32_t* positions, size_t n, int32_t begin, int32_t end);

// Halves as raw bits. Rounded to nearest even; NaN stays NaN; beyond the largest half becomes infinity.
void F32ToF16(const float* x, size_t n, uint16_t* out);
void F16ToF32(const uint16_t* x, size_t n, float* out);

}  // namespace lesskv
