// Loops of the feature-map training that are neither matrix products nor the cache's own kernels.
#pragma once

#include <cstddef>

namespace lesskv::train {

// C (+)= op(A) op(B), row-major float32, op(A) [m, k], op(B) [k, n], leading dimensions in floats. Serial inside a
// ParallelFor, else on all threads.
void Gemm(bool transpose_a, bool transpose_b, size_t m, size_t n, size_t k, const float* a, size_t lda, const float* b,
          size_t ldb, float* c, size_t ldc, bool accumulate);

// For n pre-activations p: act = GELU(p) and slope = GELU'(p), exact (erf) form. `act` may be p.
void GeluWithSlope(const float* p, size_t n, float* act, float* slope);
void Gelu(const float* p, size_t n, float* act);

void Multiply(float* x, const float* y, size_t n);  // x *= y

// x[i, j] += bias[j] for x [rows, n].
void AddBias(float* x, const float* bias, size_t rows, size_t n);
// sums[j] += the column sums of x [rows, n].
void AddColumnSums(const float* x, size_t rows, size_t n, float* sums);

// out[r] = h[r, :] . x for h [rank, dim].
void RowDots(const float* h, const float* x, size_t rank, size_t dim, float* out);

// h[r, :] += a[r] * x for h [rank, dim].
void AddOuter(const float* a, const float* x, size_t rank, size_t dim, float* h);

// One Adam step (Kingma and Ba 2015; bias corrections already in `rate` and `epsilon`):
// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= rate m / (sqrt(v) + epsilon).
struct AdamStep {
  float rate, beta1, beta2, epsilon;
};
void Adam(const AdamStep& step, const float* gradient, size_t n, float* parameters, float* m, float* v);

}  // namespace lesskv::train
