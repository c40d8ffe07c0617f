// The two fits of Attention Matching on problems that one can solve by hand (one channel, keys 0, ln 2, ln 4, values 1, 0, 3).
#include "kvcache/residual/attention_fit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "base/rng.h"

namespace lesskv {
namespace {

using Doubles = std::vector<double>;
constexpr double kTiny = 1e-12;  // a ridge that is none
const MassFit kFree{0, 0, 1e9};

const double kKeys[] = {0, std::log(2.0), std::log(4.0)};
const double kValues[] = {1, 0, 3};

double Exp(double q, size_t key) { return std::exp(q * kKeys[key]); }

// exp of the kept rows' scores and the block's masses, relative to the block's log-mass (or not at all).
struct Block {
  Doubles a, m, y;
  Block(const Doubles& queries, const std::vector<size_t>& kept, bool relative = true) {
    for (const double q : queries) {
      double mass = 0, out = 0;
      for (size_t j = 0; j < 3; ++j) mass += Exp(q, j), out += Exp(q, j) * kValues[j];
      for (const size_t j : kept) a.push_back(Exp(q, j) / (relative ? mass : 1));
      m.push_back(relative ? 1 : mass);
      y.push_back(out / mass);
    }
  }
};

Doubles Attention(const Doubles& a, const Doubles& w) {
  Doubles x = a;
  for (size_t q = 0; q < x.size(); q += w.size()) {
    double sum = 0;
    for (size_t j = 0; j < w.size(); ++j) sum += x[q + j] *= w[j];
    for (size_t j = 0; j < w.size(); ++j) x[q + j] /= sum;
  }
  return x;
}

void ExpectNear(const Doubles& a, const Doubles& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], tolerance) << i;
}

// Two queries and two rows are matched exactly, and a third query nearly.
TEST(AttentionFit, TwoRowsAnswerTwoQueriesExactly) {
  const Block block({0, 1}, {0, 2});
  const Doubles w = FitMass(block.a, block.m, 2, kFree);
  ExpectNear(w, {5.0 / 3, 4.0 / 3}, 1e-4);
  EXPECT_NEAR(std::log(w[0]), 0.510826, 1e-4);
  const Doubles exact = {5.0 / 3, 4.0 / 3}, x = Attention(block.a, exact);
  ExpectNear(x, {5.0 / 9, 4.0 / 9, 5.0 / 21, 16.0 / 21}, 1e-12);
  ExpectNear(block.y, {4.0 / 3, 13.0 / 7}, 1e-12);
  const Doubles c = FitValues(x, block.y, Doubles{1, 3}, 2, 1, kTiny);
  ExpectNear(c, {0.6, 2.25}, 1e-6);
  EXPECT_NEAR(OutputError(x, c, block.y, 2, 1), 0, 1e-12);
  const Block other({-1}, {0, 2}, false);
  EXPECT_NEAR(other.m[0], 1.75, 1e-12);
  EXPECT_NEAR(other.a[0] * w[0] + other.a[1] * w[1], 2, 1e-4);
  EXPECT_NEAR(OutputError(Attention(other.a, exact), c, Doubles{0.875}, 2, 1), 0, 1e-10);
}

// One shift a query for both sides; a shift for each gives other weights.
TEST(AttentionFit, BothSidesAreRelativeToOneNumber) {
  const MassFit any{0, -1e9, 1e9};
  const Block relative({0, 1}, {0, 1}), absolute({0, 1}, {0, 1}, false);
  ExpectNear(FitMass(relative.a, relative.m, 2, any), {-1, 4}, 1e-3);
  ExpectNear(FitMass(absolute.a, absolute.m, 2, any), {-1, 4}, 1e-3);
  ExpectNear(FitMass(Doubles{1, 1, 0.5, 1}, Doubles{3, 7.0 / 4}, 2, any), {2.5, 0.5}, 1e-3);
}

// Weights are drawn to what they were, all the way where nothing else pulls.
TEST(AttentionFit, RidgeDrawsToTheOldWeights) {
  const Block block({0, 1}, {0, 2});
  const Doubles old = {4, 0.5};
  ExpectNear(FitMass(block.a, block.m, 2, {1e9, 0, 1e9, old}), old, 1e-6);
  ExpectNear(FitMass(block.a, block.m, 2, {0, 0, 1e9, old}), {5.0 / 3, 4.0 / 3}, 1e-3);
  ExpectNear(FitMass({}, {}, 2, {0.03, 0, 1e9, old}), old, 0);
}

// Another common factor a query is another problem where nothing fits exactly.
TEST(AttentionFit, QueriesAreRelativeToTheBlocksMass) {
  Block block({0, 1, -1}, {0, 2});
  ExpectNear(FitMass(block.a, block.m, 2, kFree), {1.430341, 1.430341}, 1e-4);
  for (size_t q = 0; q < 3; ++q) {  // relative to the largest key
    const double query = q == 0 ? 0 : q == 1 ? 1 : -1, largest = std::max(Exp(query, 0), Exp(query, 2));
    const double mass = Exp(query, 0) + Exp(query, 1) + Exp(query, 2);
    block.a[2 * q] *= mass / largest, block.a[2 * q + 1] *= mass / largest, block.m[q] *= mass / largest;
  }
  ExpectNear(FitMass(block.a, block.m, 2, kFree), {1.456140, 1.456140}, 1e-4);
}

// Clamping the unbounded solution is not the bounded one.
TEST(AttentionFit, BoundsAreRespectedAtTheOptimum) {
  const Doubles a = {1, 1, 1, 2, 1, 3}, m = {3, 2, 1.5};
  ExpectNear(FitMass(a, m, 2, {0, -1e9, 1e9}), {3.666667, -0.75}, 1e-3);
  const Doubles w = FitMass(a, m, 2, kFree);
  ExpectNear(w, {2.166667, 0}, 1e-4);
  double error = 0;
  for (size_t q = 0; q < 3; ++q) error += std::pow(a[2 * q] * w[0] + a[2 * q + 1] * w[1] - m[q], 2);
  EXPECT_NEAR(error, 1.166667, 1e-4);
}

// Equal keys, and rows that are all kept.
TEST(AttentionFit, EqualKeysAndWholeBlocks) {
  const Doubles fifth(4, 0.2), ones(4, 1.0);
  ExpectNear(FitMass(fifth, ones, 1, kFree), {5}, 1e-4);
  ExpectNear(FitValues(ones, Doubles(4, 2.5), Doubles{1}, 1, 1, kTiny), {2.5}, 1e-6);
  const Block whole({0, 1, -1, 2}, {0, 1, 2});
  const Doubles w = FitMass(whole.a, whole.m, 3, {});
  ExpectNear(w, {1, 1, 1}, 1e-6);
  ExpectNear(FitValues(Attention(whole.a, w), whole.y, Doubles{1, 0, 3}, 3, 1, 0.3), {1, 0, 3}, 1e-6);
}

// The ridge is centred on the values themselves.
TEST(AttentionFit, RidgeDrawsToTheOldValues) {
  const Doubles x = {0.25, 0.75}, v = {2, 4}, y = {5};
  const double squares = 0.625 / 2;  // |X|^2 / n: a ridge relative to it
  ExpectNear(FitValues(x, y, v, 2, 1, 1e-10), {2.6, 5.8}, 1e-6);
  const Doubles c = FitValues(x, y, v, 2, 1, 0.1 / squares);
  ExpectNear(c, {2.517241, 5.551724}, 1e-6);
  EXPECT_NEAR(0.25 * c[0] + 0.75 * c[1], 4.793103, 1e-6);
}

struct Random {
  size_t rows, n, dim;
  Doubles x, y, v;
  Random(size_t r, size_t k, size_t d, uint64_t seed) : rows(r), n(k), dim(d) {
    Rng rng(seed);
    for (size_t i = 0; i < r * k; ++i) x.push_back(rng.UniformFloat(0, 1));
    for (size_t i = 0; i < r * d; ++i) y.push_back(rng.Normal());
    for (size_t i = 0; i < k * d; ++i) v.push_back(rng.Normal());
  }
};

// Both systems give one answer; the fit is never worse than none, and better with a smaller ridge; a row
// that no query reads keeps its value.
TEST(AttentionFit, PrimalAndDualAgree) {
  for (const auto& [rows, n] : {std::pair<size_t, size_t>{9, 9}, {12, 5}, {5, 12}, {1, 7}, {40, 1}}) {
    Random p(rows, n, 3, rows * 100 + n);
    if (n > 2)
      for (size_t q = 0; q < rows; ++q) p.x[q * n + 1] = 0;
    double before = OutputError(p.x, p.v, p.y, n, 3);
    for (const double ridge : {3.0, 0.3, 0.003}) {
      const Doubles c = FitValues(p.x, p.y, p.v, n, 3, ridge);
      const double error = OutputError(p.x, c, p.y, n, 3);
      EXPECT_LT(error, before);
      before = error;
      if (n > 2) ExpectNear({c[3], c[4], c[5]}, {p.v[3], p.v[4], p.v[5]}, 1e-9);
      // The other system: queries without weight, or rows without readers, change which one is smaller and nothing else.
      Doubles x = p.x, y = p.y, v = p.v;
      const bool primal = rows >= n;
      const size_t wide = primal ? rows + 1 : n, tall = primal ? rows : n + 1;
      Doubles grown(tall * wide);
      for (size_t q = 0; q < rows; ++q)
        for (size_t i = 0; i < n; ++i) grown[q * wide + i] = p.x[q * n + i];
      y.resize(tall * 3);
      v.resize(wide * 3);
      Doubles same = FitValues(grown, y, v, wide, 3, ridge * static_cast<double>(wide) / static_cast<double>(n));
      same.resize(c.size());
      ExpectNear(same, c, 1e-9);
    }
  }
}

// The order of the queries does not matter.
TEST(AttentionFit, QueriesMayComeInAnyOrder) {
  Random p(20, 6, 2, 5);
  const Doubles ones(20, 1.0), w = FitMass(p.x, ones, 6, {}), c = FitValues(p.x, p.y, p.v, 6, 2, 0.3);
  Doubles x(p.x.size()), y(p.y.size());
  for (size_t q = 0; q < 20; ++q) {
    const size_t to = (q * 7) % 20;
    std::copy_n(&p.x[q * 6], 6, &x[to * 6]);
    std::copy_n(&p.y[q * 2], 2, &y[to * 2]);
  }
  ExpectNear(FitMass(x, ones, 6, {}), w, 1e-9);
  ExpectNear(FitValues(x, y, p.v, 6, 2, 0.3), c, 1e-9);
}

TEST(AttentionFit, NothingToFit) {
  ExpectNear(FitMass({}, {}, 2, {}), {1, 1}, 0);
  ExpectNear(FitValues({}, {}, Doubles{1, 2}, 2, 1, 0.3), {1, 2}, 0);
  ExpectNear(FitMass(Doubles{0, 0}, Doubles{1}, 2, {}), {1, 1}, 0);  // nobody is read
}

}  // namespace
}  // namespace lesskv
