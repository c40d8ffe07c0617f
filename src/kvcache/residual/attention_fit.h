// The two least-squares problems of Attention Matching (arXiv 2602.16284): what kept rows must weigh and hold so that on
// reference queries they answer as the whole block did. In double, sequential, in a fixed order. Matrices are row-major.
#pragma once

#include <cstddef>
#include <limits>
#include <span>
#include <vector>

namespace lesskv {

struct MassFit {
  double ridge = 0.03;  // towards weights of 1, relative to the mean square of a row's column
  double lowest = 0, highest = std::numeric_limits<double>::infinity();
  std::span<const double> towards = {};  // [n] weights other than 1 to draw to
};

// Weights w of n rows that minimise |A w - m|^2 + mu |w - t|^2, t = 1 or `towards`, mu = ridge |A|_F^2 / n,
// lowest <= w <= highest.
//   a [n_queries, n] exp of the kept rows' scores, m [n_queries] masses of the block, both relative to the same number a
//   query. Accelerated projected gradient from t until no bound-respecting direction descends by more than 1e-6 of
//   the largest A^T m, or 500 steps. Without queries it is t.
std::vector<double> FitMass(std::span<const double> a, std::span<const double> m, size_t n, const MassFit& fit);

// Values C of n rows that minimise |X C - Y|_F^2 + lambda |C - V|_F^2, lambda = ridge |X|_F^2 / n > 0: a row that no query
// reads keeps its value.
//   x [n_queries, n] attention of the kept rows, y [n_queries, dim] outputs of the block, v [n, dim] their values.
// The smaller of the two equal systems (n or n_queries unknowns) is solved by Cholesky.
std::vector<double> FitValues(std::span<const double> x, std::span<const double> y, std::span<const double> v,
                              size_t n, size_t dim, double ridge);

// |X C - Y|_F^2.
double OutputError(std::span<const double> x, std::span<const double> c, std::span<const double> y, size_t n, size_t dim);

// Solves S Z = B in place, S symmetric and positive definite [k, k] (its lower half is read), B [k, dim]. Overwrites S.
void SolveCholesky(std::vector<double>& s, std::vector<double>& b, size_t k, size_t dim);

}  // namespace lesskv
