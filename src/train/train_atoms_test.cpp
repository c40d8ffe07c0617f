// Dictionaries learn what vectors are made of, repeatably; the diversity's gradient against finite differences.
#include "train/train_atoms.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/rng.h"
#include "kernels/quants/half.h"
#include "kernels/rows/atom_codes.h"

namespace lesskv::train {
namespace {

// Sums of `pairs` of 24 hidden unit vectors, and a little noise.
std::vector<float> Planted(size_t n, size_t dim, size_t pairs, uint64_t seed) {
  Rng hidden(99), rng(seed);
  std::vector<float> atoms(24 * dim), x(n * dim);
  for (float& a : atoms) a = hidden.Normal() / std::sqrt(static_cast<float>(dim));
  for (size_t i = 0; i < n; ++i) {
    for (size_t c = 0; c < dim; ++c) x[i * dim + c] = 0.02f * rng.Normal();
    for (size_t g = 0; g < pairs; ++g) {
      const size_t atom = rng.Below(24);
      const float size = rng.Normal() * 3;
      for (size_t c = 0; c < dim; ++c) x[i * dim + c] += size * atoms[atom * dim + c];
    }
  }
  return x;
}

AtomOptions Options(size_t atoms = 32) {
  AtomOptions o;
  o.dim = 16;
  o.atoms = atoms;
  o.pairs = 3;
  o.batch = 64;
  o.epochs = 6;
  o.seed = 3;
  return o;
}

TrainedAtoms Train(const AtomOptions& o) { return TrainAtoms(Planted(1500, 16, 3, 1), o, [] {}); }

TEST(TrainAtoms, LearnsWhatVectorsAreMadeOf) {
  const TrainedAtoms trained = Train(Options());
  ASSERT_EQ(trained.atoms.size(), 32u * 16);
  for (size_t i = 0; i < 32; ++i) {
    double square = 0;
    for (size_t c = 0; c < 16; ++c) square += std::pow(HalfToFloat(trained.atoms[i * 16 + c]), 2);
    EXPECT_NEAR(std::sqrt(square), 1, 1e-3);
  }
  AtomOptions untrained = Options();
  untrained.rounds = untrained.epochs = 0;
  const double random = Train(untrained).error;
  EXPECT_LT(trained.start, 0.7 * random);
  EXPECT_LT(trained.error, 0.8 * trained.start);
  EXPECT_LT(trained.losses.back(), trained.losses.front());
  EXPECT_GE(trained.smallest_beta, 0);
  EXPECT_LE(trained.largest_beta, 1);
  EXPECT_LT(trained.smallest_beta, trained.largest_beta);
}

// All vectors but a few lie in one direction, which one atom holds: the other becomes the worst coded vector, the longest of
// those that it codes not at all.
TEST(TrainAtoms, AnAtomThatNothingUsesBecomesAVectorThatIsCodedBadly) {
  AtomOptions o = Options(2);
  o.pairs = 1;
  o.rounds = 1;
  o.epochs = 0;
  std::vector<float> x(400 * o.dim);
  for (size_t i = 0; i < 400; ++i) x[i * o.dim + (i % 50 == 7 ? 5 : i % 20 == 3 ? 9 : 2)] = i % 50 == 7 ? 4 : i % 20 == 3 ? 0.5f : 1;
  const TrainedAtoms trained = TrainAtoms(x, o, [] {});
  EXPECT_EQ(HalfToFloat(trained.atoms[2]), 1) << "the most used one first";
  EXPECT_EQ(HalfToFloat(trained.atoms[o.dim + 5]), 1);
}

TEST(TrainAtoms, TheMostUsedComeFirst) {
  const TrainedAtoms trained = Train(Options());
  const std::vector<float> x = Planted(1500, 16, 3, 1);
  const std::vector<uint16_t> lanes = AtomLanes(trained.atoms, 16);
  std::vector<uint16_t> indices(1500 * 3), coefficients(1500 * 3);
  EncodeAtoms({16, {trained.atoms.data(), lanes.data(), 32}, {}}, 3, x.data(), 1500, 16, indices.data(), coefficients.data(), nullptr);
  std::vector<size_t> uses(32);
  for (size_t g = 0; g < indices.size(); ++g) uses[indices[g]] += coefficients[g] != 0;
  for (size_t i = 8; i < 32; ++i) EXPECT_GT(uses[i - 8] * 11, uses[i] * 10) << i;  // a tenth of the vectors did not count
}

// Another vector in its place changes the atoms, but not where it is one of the tenth that only judges.
TEST(TrainAtoms, VectorsThatJudgeDoNotTrain) {
  AtomOptions o = Options(8);
  o.dim = 4;
  o.pairs = 1;
  o.batch = 16;
  o.rounds = 2;
  o.epochs = 1;
  Rng rng(6);
  std::vector<float> x(40 * o.dim);
  for (float& value : x) value = rng.Normal();
  const std::vector<uint16_t> atoms = TrainAtoms(x, o, [] {}).atoms;
  size_t n_judges = 0;
  for (size_t i = 0; i < 40; ++i) {
    std::vector<float> changed = x;
    std::swap(changed[i * o.dim], changed[i * o.dim + 1]);  // as long as before
    n_judges += TrainAtoms(changed, o, [] {}).atoms == atoms;
  }
  EXPECT_EQ(n_judges, 4u);
}

TEST(TrainAtoms, MoreAtomsAndPairsLeaveLess) {
  AtomOptions more_pairs = Options();
  more_pairs.pairs = 5;
  const double error = Train(Options()).error;
  EXPECT_LT(error, Train(Options(12)).error);
  EXPECT_LT(Train(more_pairs).error, error);
}

TEST(TrainAtoms, TheSameSeedGivesTheSameAtoms) {
  const TrainedAtoms a = Train(Options()), b = Train(Options());
  EXPECT_EQ(a.atoms, b.atoms);
  EXPECT_EQ(a.losses, b.losses);
  AtomOptions other = Options();
  other.seed = 4;
  EXPECT_NE(Train(other).atoms, a.atoms);
}

// More rows than one block of the product, so that blocks are joined.
TEST(TrainAtoms, GradientOfTheDiversity) {
  constexpr size_t kAtoms = 300, kDim = 5;
  Rng rng(8);
  std::vector<float> w(kAtoms * kDim), gradient, unused;
  for (float& x : w) x = rng.Normal() * 0.4f;
  const double value = Diversity(w, kDim, gradient);
  double by_hand = 0;
  for (size_t i = 0; i < kAtoms; ++i)
    for (size_t j = 0; j < kAtoms; ++j) {
      double dot = i == j ? -1 : 0;
      for (size_t c = 0; c < kDim; ++c) dot += double(w[i * kDim + c]) * w[j * kDim + c];
      by_hand += dot * dot;
    }
  EXPECT_NEAR(value, by_hand / kAtoms / kAtoms, 1e-5 * value);
  for (size_t at : {size_t{0}, size_t{7}, size_t{777}, w.size() - 1}) {
    const float step = 0.05f, before = w[at];
    w[at] = before + step;
    const double above = Diversity(w, kDim, unused);
    w[at] = before - step;
    const double below = Diversity(w, kDim, unused);
    w[at] = before;
    EXPECT_NEAR(gradient[at], (above - below) / (2 * step), 2e-2 * std::fabs(gradient[at]) + 2e-6) << at;
  }
}

}  // namespace
}  // namespace lesskv::train
