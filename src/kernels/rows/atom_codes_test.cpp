// Matching pursuit: its residual laws, known residuals of random dictionaries, and every instruction set against a plain
// one in double.
#include "kernels/rows/atom_codes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "base/rng.h"
#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"

namespace lesskv {
namespace {

constexpr float kHalfStep = 1.0f / 2048;  // relative rounding of a half

struct Dictionary {
  size_t dim;
  std::vector<uint16_t> rows, lanes, own;

  Dictionary(size_t n, size_t d, size_t n_own = 0, uint64_t seed = 1) : dim(d) {
    Rng rng(seed);
    rows = RandomAtoms(n, rng);
    own = RandomAtoms(n_own, rng);
    lanes = AtomLanes(rows, dim);
  }
  std::vector<uint16_t> RandomAtoms(size_t n, Rng& rng) const {
    std::vector<uint16_t> atoms;
    for (size_t i = 0; i < n; ++i) {
      std::vector<float> x(dim);
      double square = 0;
      for (float& v : x) v = rng.Normal(), square += double(v) * v;
      for (float v : x) atoms.push_back(FloatToHalf(static_cast<float>(v / std::sqrt(square))));
    }
    return atoms;
  }
  Atoms View() const { return {dim, {rows.data(), lanes.data(), rows.size() / dim}, {own.data(), nullptr, own.size() / dim}}; }
  double Value(size_t i, size_t c) const { return HalfToFloat(View().Row(i)[c]); }
};

struct Codes {
  size_t pairs;
  std::vector<uint16_t> indices, coefficients;
  std::vector<float> residuals;

  Codes(const Atoms& atoms, size_t p, const std::vector<float>& x, CoefficientType type = CoefficientType::kF16) : pairs(p) {
    const size_t n = x.size() / atoms.dim;
    indices.resize(n * p), coefficients.resize(n * p), residuals.resize(n);
    EncodeAtoms(atoms, p, x.data(), n, atoms.dim, indices.data(), coefficients.data(), residuals.data(), type);
  }
  double Coefficient(size_t at) const { return HalfToFloat(coefficients[at]); }
};

std::vector<float> Gaussian(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

double Norm(const std::vector<double>& x) {
  double square = 0;
  for (const double v : x) square += v * v;
  return std::sqrt(square);
}

// Every number there is comes back; others become the nearest, of two as near the one with an even mantissa.
TEST(E4m3, RoundsToTheNearest) {
  const auto number = [](int code) { return double(HalfToFloat(E4m3ToHalf(static_cast<uint8_t>(code)))); };
  EXPECT_EQ(number(0x7e), 448);
  EXPECT_EQ(number(0x38), 1);
  EXPECT_EQ(number(0x01), 0x1p-9);
  EXPECT_EQ(number(0x08), 0x1p-6);
  for (int code = 0; code < 0x7f; ++code) {
    EXPECT_EQ(FloatToE4m3(static_cast<float>(number(code))), code);
    EXPECT_EQ(FloatToE4m3(static_cast<float>(number(code | 0x80))), code | 0x80);
    EXPECT_EQ(number(code | 0x80), -number(code));
    if (code == 0x7e) continue;
    ASSERT_LT(number(code), number(code + 1));
    const double middle = (number(code) + number(code + 1)) / 2, small = middle / 4096;
    EXPECT_EQ(FloatToE4m3(static_cast<float>(middle - small)), code);
    EXPECT_EQ(FloatToE4m3(static_cast<float>(-middle - small)), (code + 1) | 0x80);
    EXPECT_EQ(FloatToE4m3(static_cast<float>(middle)), code + code % 2);
  }
  EXPECT_EQ(FloatToE4m3(1e9f), 0x7e);
  EXPECT_EQ(FloatToE4m3(-INFINITY), 0xfe);
  EXPECT_TRUE(std::isnan(HalfToFloat(E4m3ToHalf(FloatToE4m3(std::nanf(""))))));
}

class AtomCodes : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ForceIsa(GetParam()); }
  void TearDown() override { ForceIsa(BestIsa()); }
};
INSTANTIATE_TEST_SUITE_P(Isas, AtomCodes, testing::ValuesIn(AvailableIsas()),
                         [](const auto& isa) { return std::string(IsaName(isa.param)); });

// Followed in double on the atoms as stored: each pick is the best one but for rounding, its coefficient is its product
// with the residual, and what is then left obeys |R'|^2 = |R|^2 - c^2 + (c - rounded c)^2.
TEST_P(AtomCodes, ResidualLaws) {
  for (const auto& [n, dim, n_own] : {std::tuple<size_t, size_t, size_t>{100, 32, 0}, {37, 21, 5}, {64, 128, 16}, {5, 3, 0}, {0, 16, 9}}) {
    const Dictionary dictionary(n, dim, n_own);
    const Atoms atoms = dictionary.View();
    const std::vector<float> x = Gaussian(13 * dim, 2);
    const Codes codes(atoms, 8, x);
    for (size_t v = 0; v < 13; ++v) {
      std::vector<double> r(x.begin() + static_cast<ptrdiff_t>(v * dim), x.begin() + static_cast<ptrdiff_t>((v + 1) * dim));
      const double length = Norm(r);
      for (size_t g = 0; g < 8; ++g) {
        const size_t pick = codes.indices[v * 8 + g];
        ASSERT_LT(pick, atoms.size());
        double best = 0, product = 0, square = 0;
        for (size_t i = 0; i < atoms.size(); ++i) {
          double dot = 0;
          for (size_t c = 0; c < dim; ++c) dot += r[c] * dictionary.Value(i, c);
          best = std::max(best, std::fabs(dot));
          if (i == pick) product = dot;
        }
        for (size_t c = 0; c < dim; ++c) square += std::pow(dictionary.Value(pick, c), 2);
        ASSERT_NEAR(square, 1, 2e-3);  // atoms as halves
        if (Norm(r) <= 2e-6 * length) break;  // may have stopped
        ASSERT_GE(std::fabs(product), best - 1e-5 * length);
        const double c = codes.Coefficient(v * 8 + g), before = Norm(r);
        ASSERT_NEAR(c, product, std::fabs(product) * kHalfStep + 2e-6 * length);
        for (size_t k = 0; k < dim; ++k) r[k] -= c * dictionary.Value(pick, k);
        ASSERT_NEAR(std::pow(Norm(r), 2), before * before - 2 * c * product + c * c * square, 1e-9 * length * length);
        ASSERT_LE(Norm(r), before * 1.000001);
        if (g > 0) {
          ASSERT_NE(pick, codes.indices[v * 8 + g - 1]) << "the same atom twice running";
        }
        double left = 0;  // what the residual still has of the atom is rounding
        for (size_t k = 0; k < dim; ++k) left += r[k] * dictionary.Value(pick, k);
        ASSERT_LE(std::fabs(left), std::fabs(product) * (kHalfStep + 2e-3) + 1e-5 * length);
      }
      ASSERT_NEAR(codes.residuals[v], Norm(r) / length, 1e-5);
      std::vector<float> decoded(dim);
      DecodeAtoms(atoms, 8, &codes.indices[v * 8], &codes.coefficients[v * 8], 1, decoded.data(), dim);
      double error = 0;
      for (size_t c = 0; c < dim; ++c) error += std::pow(x[v * dim + c] - decoded[c], 2);
      ASSERT_NEAR(std::sqrt(error), Norm(r), 1e-5 * length);
    }
  }
}

// Codes of fewer pairs are the first ones of more; batches, strides and neighbours change nothing.
TEST_P(AtomCodes, AVectorsCodeIsItsOwn) {
  const Dictionary dictionary(70, 24, 6);
  const Atoms atoms = dictionary.View();
  const std::vector<float> x = Gaussian(20 * 24, 3);
  const Codes all(atoms, 7, x), fewer(atoms, 4, x);
  for (size_t v = 0; v < 20; ++v) {
    for (size_t g = 0; g < 4; ++g) {
      EXPECT_EQ(fewer.indices[v * 4 + g], all.indices[v * 7 + g]);
      EXPECT_EQ(fewer.coefficients[v * 4 + g], all.coefficients[v * 7 + g]);
    }
    const Codes one(atoms, 7, {x.begin() + static_cast<ptrdiff_t>(v * 24), x.begin() + static_cast<ptrdiff_t>((v + 1) * 24)});
    EXPECT_TRUE(std::equal(one.indices.begin(), one.indices.end(), all.indices.begin() + static_cast<ptrdiff_t>(v * 7)));
    EXPECT_TRUE(std::equal(one.coefficients.begin(), one.coefficients.end(), all.coefficients.begin() + static_cast<ptrdiff_t>(v * 7)));
  }
  EXPECT_LT(all.residuals[0], fewer.residuals[0]);
}

// A multiple of an atom is that atom; of equal ones the first; atoms that are appended leave earlier codes as they are.
TEST_P(AtomCodes, MultiplesTiesAndAppendedAtoms) {
  Dictionary dictionary(40, 32, 3);
  std::copy_n(dictionary.rows.begin() + 32 * 7, 32, dictionary.rows.begin() + 32 * 21);  // atom 21 is atom 7 again
  dictionary.lanes = AtomLanes(dictionary.rows, 32);
  for (const auto& [atom, want] : {std::pair<size_t, size_t>{0, 0}, {7, 7}, {21, 7}, {39, 39}, {41, 41}, {42, 42}})
    for (const float factor : {3.25f, -0.0371f, 900.0f}) {
      std::vector<float> x(32);
      for (size_t c = 0; c < 32; ++c) x[c] = factor * static_cast<float>(dictionary.Value(atom, c));
      const Codes codes(dictionary.View(), 1, x);
      EXPECT_EQ(codes.indices[0], want);
      EXPECT_NEAR(codes.Coefficient(0) / factor, 1, 1.0 / 1024);
      EXPECT_LE(codes.residuals[0], 1.0 / 1024);
      std::vector<float> before(32), after(32);
      DecodeAtoms(dictionary.View(), 1, codes.indices.data(), codes.coefficients.data(), 1, before.data(), 32);
      Dictionary longer = dictionary;
      longer.own.insert(longer.own.end(), 64, FloatToHalf(0.17f));
      DecodeAtoms(longer.View(), 1, codes.indices.data(), codes.coefficients.data(), 1, after.data(), 32);
      EXPECT_EQ(before, after);
    }
}

TEST_P(AtomCodes, ZerosHugeAndNotANumber) {
  const Dictionary dictionary(33, 16);
  const Codes zero(dictionary.View(), 4, std::vector<float>(16, 0.0f));
  EXPECT_EQ(zero.indices, std::vector<uint16_t>(4, 0));
  EXPECT_EQ(zero.coefficients, std::vector<uint16_t>(4, 0));
  EXPECT_EQ(zero.residuals[0], 0);
  std::vector<float> out(16, 1);
  DecodeAtoms(dictionary.View(), 4, zero.indices.data(), zero.coefficients.data(), 1, out.data(), 16);
  EXPECT_EQ(out, std::vector<float>(16, 0.0f));
  // One atom says it all: nothing remains for the other pairs.
  std::vector<float> exact(16);
  for (size_t c = 0; c < 16; ++c) exact[c] = 2 * static_cast<float>(dictionary.Value(5, c));
  const Codes one(dictionary.View(), 6, exact);
  EXPECT_EQ(one.indices[0], 5);
  EXPECT_LE(one.residuals[0], 1e-6);
  for (float size : {1e5f, 1e-12f}) {
    const Codes codes(dictionary.View(), 4, std::vector<float>(16, size));
    for (size_t g = 0; g < 4; ++g) EXPECT_TRUE(std::isfinite(codes.Coefficient(g))) << size;
  }
  std::vector<float> bad(16, 1.0f);
  bad[3] = std::nanf("");
  const Codes nan(dictionary.View(), 2, bad);
  EXPECT_LT(nan.indices[0], 33);
  EXPECT_TRUE(std::isnan(nan.Coefficient(0)));
}

// Mean residuals of Gaussian vectors over random unit atoms, measured apart: known to two hundredths.
TEST_P(AtomCodes, KnownResidualsOfRandomDictionaries) {
  const bool scalar = GetParam() == Isa::kScalar;
  const Dictionary dictionary(1024, 128);
  const std::vector<float> x = Gaussian((scalar ? 12 : 96) * 128, 4);
  for (const auto& [pairs, want] : {std::pair<size_t, double>{4, .849}, {8, .735}, {16, .564}}) {
    const Codes codes(dictionary.View(), pairs, x);
    double mean = 0;
    for (const float r : codes.residuals) mean += r / static_cast<double>(codes.residuals.size());
    EXPECT_NEAR(mean, want, .02) << pairs;
  }
}

// Rounded to 8 bits as they are found: each pick has the nearest such number, later ones make up for part of the rounding.
TEST_P(AtomCodes, CoefficientsOfEightBits) {
  const Dictionary dictionary(200, 32);
  const Atoms atoms = dictionary.View();
  const std::vector<float> x = Gaussian(30 * 32, 3);
  const Codes halves(atoms, 8, x), bytes(atoms, 8, x, CoefficientType::kE4m3);
  double error = 0, error_of_halves = 0;
  for (size_t v = 0; v < 30; ++v) {
    std::vector<double> r(x.begin() + static_cast<ptrdiff_t>(v * 32), x.begin() + static_cast<ptrdiff_t>(v * 32 + 32));
    const double length = Norm(r);
    for (size_t g = 0; g < 8; ++g) {
      const double c = bytes.Coefficient(v * 8 + g), before = Norm(r);
      double dot = 0;
      for (size_t i = 0; i < 32; ++i) dot += r[i] * dictionary.Value(bytes.indices[v * 8 + g], i);
      for (size_t i = 0; i < 32; ++i) r[i] -= c * dictionary.Value(bytes.indices[v * 8 + g], i);
      EXPECT_EQ(E4m3ToHalf(FloatToE4m3(static_cast<float>(c))), bytes.coefficients[v * 8 + g]);
      EXPECT_LE(std::fabs(c - dot), std::fabs(dot) / 16 * 1.001);
      EXPECT_LT(Norm(r), before);
    }
    EXPECT_NEAR(bytes.residuals[v], Norm(r) / length, 1e-4);
    error += bytes.residuals[v], error_of_halves += halves.residuals[v];
  }
  EXPECT_GT(error, error_of_halves);
  EXPECT_LT(error, 1.05 * error_of_halves);
}

// Coefficients solved for anew on the same atoms never do worse than the pursuit's own.
TEST_P(AtomCodes, LeastSquaresOnTheSameAtomsIsNoWorse) {
  const Dictionary dictionary(50, 20);
  const std::vector<float> x = Gaussian(30 * 20, 6);
  const Codes codes(dictionary.View(), 5, x);
  for (size_t v = 0; v < 30; ++v) {
    // Gram-Schmidt over the chosen atoms.
    std::vector<double> r(x.begin() + static_cast<ptrdiff_t>(v * 20), x.begin() + static_cast<ptrdiff_t>((v + 1) * 20));
    const double length = Norm(r);
    std::vector<std::vector<double>> basis;
    for (size_t g = 0; g < 5; ++g) {
      std::vector<double> b(20);
      for (size_t c = 0; c < 20; ++c) b[c] = dictionary.Value(codes.indices[v * 5 + g], c);
      for (const auto& other : basis) {
        double dot = 0;
        for (size_t c = 0; c < 20; ++c) dot += b[c] * other[c];
        for (size_t c = 0; c < 20; ++c) b[c] -= dot * other[c];
      }
      const double norm = Norm(b);
      if (norm < 1e-6) continue;
      for (double& c : b) c /= norm;
      double dot = 0;
      for (size_t c = 0; c < 20; ++c) dot += r[c] * b[c];
      for (size_t c = 0; c < 20; ++c) r[c] -= dot * b[c];
      basis.push_back(b);
    }
    EXPECT_LE(Norm(r) / length, codes.residuals[v] + 1e-6);
  }
}

// Values may be summed up as weights of atoms first and multiplied once: the same sums.
TEST_P(AtomCodes, ScatteredWeightsGiveTheSameSums) {
  const Dictionary dictionary(60, 32);
  const std::vector<float> x = Gaussian(40 * 32, 7);
  const Codes codes(dictionary.View(), 4, x);
  std::vector<float> decoded(40 * 32);
  DecodeAtoms(dictionary.View(), 4, codes.indices.data(), codes.coefficients.data(), 40, decoded.data(), 32);
  std::vector<double> by_atom(60), restored(32), scattered(32);
  for (size_t v = 0; v < 40; ++v) {
    const double weight = 1.0 / static_cast<double>(v + 1);
    for (size_t c = 0; c < 32; ++c) restored[c] += weight * decoded[v * 32 + c];
    for (size_t g = 0; g < 4; ++g) by_atom[codes.indices[v * 4 + g]] += weight * codes.Coefficient(v * 4 + g);
  }
  for (size_t i = 0; i < 60; ++i)
    for (size_t c = 0; c < 32; ++c) scattered[c] += by_atom[i] * dictionary.Value(i, c);
  for (size_t c = 0; c < 32; ++c) EXPECT_NEAR(restored[c], scattered[c], 1e-5);
}

}  // namespace
}  // namespace lesskv
