// The algebra of LESS, on seeded random maps. What needs a whole cache is in tests/less_acceptance_test.cpp; numbers
// from the authors' modules are in less_golden_test.cpp.
#include "kvcache/residual/less.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

// States that lie apart, put side by side as a cache keeps them.
void AttendStates(const Residual& residual, size_t layer, const float* q, size_t n, const std::vector<const float*>& states,
                  float* out, float* lse) {
  std::vector<float> together;
  for (const float* state : states) together.insert(together.end(), state, state + residual.StateFloats());
  const ResidualQuery query{q, n, together.data(), out, lse};
  residual.Attend(layer, {&query, 1});
}

SidecarShape Shape(size_t heads, size_t kv_heads, size_t dim, size_t rank, size_t hidden, FeatureKind kind) {
  SidecarShape s;
  s.n_layers = 1;
  s.n_heads = heads;
  s.n_kv_heads = kv_heads;
  s.head_dim = dim;
  s.rank = rank;
  s.hidden = hidden;
  s.kind = kind;
  return s;
}

// Maps whose state has weight: trained-like scales instead of the warm start.
Sidecar RandomSidecar(const SidecarShape& shape, uint64_t seed, DType type = DType::kF32) {
  Sidecar sidecar = InitialSidecar(shape, seed);
  sidecar.matrix_type = type;
  Rng rng(seed + 1);
  for (LayerParams& p : sidecar.layers) {
    for (float& v : p.d) v = rng.UniformFloat(-2, 2);
    for (float& v : p.d2) v = rng.UniformFloat(-1, 1);
    for (NetParams* net : {&p.phi, &p.psi}) {
      for (float& v : net->b1) v = rng.UniformFloat(-1, 1);
      for (float& v : net->b2) v = rng.UniformFloat(-1, 1);
    }
  }
  return sidecar;
}

std::vector<float> RandomRows(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> rows(n);
  for (float& v : rows) v = rng.Normal();
  return rows;
}

double MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(static_cast<double>(a[i]) - b[i]));
  return worst;
}

std::unique_ptr<const Residual> Make(const Sidecar& sidecar, LessOptions options = {}) {
  const SidecarShape& s = sidecar.shape;
  const LayerShape layer{s.n_heads, s.n_kv_heads, s.head_dim, UsualScale(s.head_dim), nullptr, 0};
  return MakeLessResidual(options, std::vector<LayerShape>(s.n_layers, layer), FeatureMaps::Create(sidecar));
}

// phi or psi of the paper in double precision, psi unfolded: |u + (u X) d2|, u = |d| g.
std::vector<double> Features(const Sidecar& sidecar, bool is_phi, size_t head, const float* x) {
  const SidecarShape& s = sidecar.shape;
  const LayerParams& p = sidecar.layers[0];
  const NetParams& net = is_phi ? p.phi : p.psi;
  const bool is_exp = s.kind == FeatureKind::kExp;
  auto gelu = [](double v) { return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0))); };
  std::vector<double> g(s.rank);
  if (is_exp) for (size_t r = 0; r < s.rank; ++r) g[r] = net.b2[head * s.rank + r];
  for (size_t u = 0; u < s.hidden; ++u) {
    double sum = is_exp ? net.b1[head * s.hidden + u] : 0.0;
    for (size_t d = 0; d < s.head_dim; ++d) sum += double(x[d]) * net.w1[(head * s.head_dim + d) * s.hidden + u];
    for (size_t r = 0; r < s.rank; ++r) g[r] += gelu(sum) * net.w2[(head * s.hidden + u) * s.rank + r];
  }
  std::vector<double> f(s.rank), u(s.rank);
  for (size_t r = 0; r < s.rank; ++r) u[r] = is_exp ? std::exp(g[r]) : gelu(g[r]);
  if (is_exp) return u;
  if (is_phi) {
    for (size_t r = 0; r < s.rank; ++r) f[r] = std::fabs(u[r]);
    return f;
  }
  for (size_t r = 0; r < s.rank; ++r) u[r] *= std::fabs(double(p.d[head * s.rank + r]));
  for (size_t r = 0; r < s.rank; ++r) {
    double mixed = 0;
    for (size_t i = 0; i < s.rank; ++i) mixed += u[i] * p.x[(head * s.rank + i) * s.rank + r];
    f[r] = std::fabs(u[r] + mixed * p.d2[head * s.rank + r]);
  }
  return f;
}

class LessKinds : public testing::TestWithParam<FeatureKind> {};
INSTANTIATE_TEST_SUITE_P(Features, LessKinds, testing::Values(FeatureKind::kGelu, FeatureKind::kExp),
                         [](const auto& kind) { return FeatureKindName(kind.param); });

// The folded psi is the unfolded one; every instruction set, odd widths, heads that differ.
TEST_P(LessKinds, MapsEqualTheDoublePrecisionFormula) {
  for (Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (size_t hidden : {1u, 24u, 64u, 130u}) {
      const SidecarShape s = Shape(4, 2, 18, 5, hidden, GetParam());
      const Sidecar sidecar = RandomSidecar(s, 7 + hidden);
      const auto maps = FeatureMaps::Create(sidecar);
      const size_t n = 7;
      const std::vector<float> x = RandomRows(n * 40, 3);
      std::vector<float> phi(n * s.rank), psi(n * s.rank);
      for (size_t head = 0; head < 4; ++head) {
        maps->Phi(0, head, x.data(), 40, n, phi.data());
        maps->Psi(0, head / 2, x.data(), 40, n, psi.data());
        for (size_t m = 0; m < n; ++m) {
          const auto want_phi = Features(sidecar, true, head, &x[m * 40]);
          const auto want_psi = Features(sidecar, false, head / 2, &x[m * 40]);
          for (size_t r = 0; r < s.rank; ++r) {
            EXPECT_NEAR(phi[m * s.rank + r], want_phi[r], 3e-6 * (1 + want_phi[r])) << IsaName(isa) << " " << hidden;
            EXPECT_NEAR(psi[m * s.rank + r], want_psi[r], 3e-6 * (1 + want_psi[r])) << IsaName(isa) << " " << hidden;
            EXPECT_GE(phi[m * s.rank + r], 0);
            EXPECT_GE(psi[m * s.rank + r], 0);
          }
        }
      }
    }
  }
  ForceIsa(BestIsa());
}

// A shift of the log-mass scales every psi and nothing else.
TEST_P(LessKinds, AShiftOfTheLogMassScalesPsi) {
  const SidecarShape s = Shape(2, 1, 16, 4, 24, GetParam());
  Sidecar sidecar = RandomSidecar(s, 5);
  const auto before = FeatureMaps::Create(sidecar);
  ShiftLogMass(sidecar, -0.7f);
  const auto after = FeatureMaps::Create(sidecar);
  const size_t n = 5;
  const std::vector<float> x = RandomRows(n * 16, 3);
  std::vector<float> was(n * s.rank), is(n * s.rank);
  before->Psi(0, 0, x.data(), 16, n, was.data());
  after->Psi(0, 0, x.data(), 16, n, is.data());
  for (size_t i = 0; i < was.size(); ++i) EXPECT_NEAR(is[i], was[i] * std::exp(-0.7f), 1e-5 * (1 + was[i]));
  before->Phi(0, 1, x.data(), 16, n, was.data());
  after->Phi(0, 1, x.data(), 16, n, is.data());
  EXPECT_EQ(is, was);
}

// Packing to bfloat16 and back loses nothing when the parameters are bfloat16 already.
TEST_P(LessKinds, Bf16MapsEqualFloatMapsOfRoundedParameters) {
  const SidecarShape s = Shape(2, 1, 16, 4, 100, GetParam());
  const std::string path = testing::TempDir() + "/bf16.less.gguf";
  WriteSidecar(path, RandomSidecar(s, 5, DType::kBF16));
  Sidecar rounded = ReadSidecar(path);
  const auto bf16 = FeatureMaps::Create(rounded);
  rounded.matrix_type = DType::kF32;
  const auto f32 = FeatureMaps::Create(rounded);
  EXPECT_LT(bf16->bytes(), f32->bytes() * 2 / 3);
  const std::vector<float> x = RandomRows(9 * 16, 1);
  std::vector<float> a(9 * 4), b(9 * 4);
  bf16->Phi(0, 1, x.data(), 16, 9, a.data());
  f32->Phi(0, 1, x.data(), 16, 9, b.data());
  EXPECT_EQ(a, b);
}

TEST(LessKernels, GeluIsExactOverItsRange) {
  for (Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    // A map of one input, one hidden unit per sample: identity weights make p2 = GELU(x).
    std::vector<float> w1(64, 0.0f), w2(64, 0.0f);
    w1[0] = w2[0] = 1.0f;
    internal::PackedMap map;
    map.head_dim = map.n_tiles = map.rank = 1;
    map.w1 = w1.data();
    map.w2 = w2.data();
    for (float x : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-3f, -1e-3f, 0.5f, -0.5f, 1.0f, -1.0f, 2.5f, -2.5f, 4.0f, -4.0f, 6.0f,
                    -6.0f, 30.0f, -30.0f, 1e4f, -1e4f, 1e18f, -1e18f}) {
      float got = 0;
      internal::ActiveLessKernels().hidden_map(map, &x, 1, 1, &got);
      const double want = 0.5 * double(x) * std::erfc(-double(x) / std::sqrt(2.0));
      EXPECT_NEAR(got, want, 1e-6 * std::max(1.0, std::fabs(want))) << x << " " << IsaName(isa);
    }
  }
  ForceIsa(BestIsa());
}

// Any grouping and order of insertions gives the same state up to rounding.
TEST_P(LessKinds, BulkInsertionEqualsOneByOneInAnyOrder) {
  for (Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    const Sidecar sidecar = RandomSidecar(Shape(2, 2, 20, 9, 48, GetParam()), 11);
    const auto less = Make(sidecar);
    const size_t n = 150, dim = 20;
    const std::vector<float> k = RandomRows(n * dim, 1), v = RandomRows(n * dim, 2);
    std::vector<float> bulk(less->StateFloats()), single(less->StateFloats());
    less->Absorb(0, std::vector<EvictedRows>{{1, n, k.data(), v.data(), bulk.data()}});
    for (size_t i = 0; i < n; ++i) {
      const size_t j = (i * 61) % n;  // a permutation
      less->Absorb(0, std::vector<EvictedRows>{{1, 1, &k[j * dim], &v[j * dim], single.data()}});
    }
    double largest = 0;
    for (float x : bulk) largest = std::max(largest, std::fabs(double(x)));
    EXPECT_LT(MaxDifference(bulk, single), 1e-5 * largest) << IsaName(isa);
    EXPECT_GT(largest, 1);
  }
  ForceIsa(BestIsa());
}

// The state read by queries equals the sum over evicted pairs, for grouped heads, several queries, every instruction
// set.
TEST_P(LessKinds, ReadEqualsTheSumOverEvictedPairs) {
  for (Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    const SidecarShape s = Shape(6, 2, 12, 8, 33, GetParam());
    const Sidecar sidecar = RandomSidecar(s, 3);
    const auto less = Make(sidecar);
    const size_t n = 40, n_queries = 5, dim = s.head_dim;
    std::vector<std::vector<float>> states(2, std::vector<float>(less->StateFloats()));
    std::vector<float> k[2], v[2];
    for (size_t h = 0; h < 2; ++h) {
      k[h] = RandomRows(n * dim, 10 + h);
      v[h] = RandomRows(n * dim, 20 + h);
      less->Absorb(0, std::vector<EvictedRows>{{h, n, k[h].data(), v[h].data(), states[h].data()}});
    }
    const std::vector<float> q = RandomRows(n_queries * s.n_heads * dim, 30);
    std::vector<float> out(q.size()), lse(n_queries * s.n_heads);
    AttendStates(*less, 0, q.data(), n_queries, std::vector<const float*>{states[0].data(), states[1].data()}, out.data(),
                 lse.data());
    for (size_t row = 0; row < n_queries * s.n_heads; ++row) {
      const size_t head = row % s.n_heads, kv = head / 3;
      const auto phi = Features(sidecar, true, head, &q[row * dim]);
      std::vector<double> want(dim);
      double mass = 0;
      for (size_t j = 0; j < n; ++j) {
        const auto psi = Features(sidecar, false, kv, &k[kv][j * dim]);
        const double weight = std::inner_product(phi.begin(), phi.end(), psi.begin(), 0.0);
        mass += weight;
        for (size_t d = 0; d < dim; ++d) want[d] += weight * v[kv][j * dim + d];
      }
      EXPECT_NEAR(lse[row], std::log(mass), 1e-5) << IsaName(isa);
      for (size_t d = 0; d < dim; ++d) EXPECT_NEAR(out[row * dim + d], want[d] / mass, 2e-5) << IsaName(isa);
    }
  }
  ForceIsa(BestIsa());
}

TEST_P(LessKinds, EmptyStateIsTheIdentityOfMerging) {
  const SidecarShape s = Shape(2, 1, 8, 4, 16, GetParam());
  const auto less = Make(RandomSidecar(s, 3));
  const std::vector<float> state(less->StateFloats()), q = RandomRows(3 * 16, 1);
  std::vector<float> out(q.size(), 5.0f), lse(6, 5.0f);
  AttendStates(*less, 0, q.data(), 3, std::vector<const float*>{state.data()}, out.data(), lse.data());
  for (float o : out) EXPECT_EQ(o, 0.0f);
  for (float l : lse) EXPECT_EQ(l, -std::numeric_limits<float>::infinity());
}

// A convex combination, so constant values come back, whatever the mass.
TEST_P(LessKinds, ConstantValuesComeBack) {
  const SidecarShape s = Shape(2, 1, 16, 8, 64, GetParam());
  const auto less = Make(RandomSidecar(s, 9));
  const std::vector<float> k = RandomRows(30 * 16, 1), v(30 * 16, -2.5f), q = RandomRows(4 * 32, 2);
  std::vector<float> state(less->StateFloats()), out(q.size()), lse(8);
  less->Absorb(0, std::vector<EvictedRows>{{0, 30, k.data(), v.data(), state.data()}});
  AttendStates(*less, 0, q.data(), 4, std::vector<const float*>{state.data()}, out.data(), lse.data());
  for (float o : out) EXPECT_NEAR(o, -2.5f, 1e-5);
}

// A merged row that leaves is as many tokens as were merged.
TEST(Less, WeightedRowsAreAbsorbedAsOften) {
  constexpr size_t kDim = 6, kRows = 70;
  const auto less = Make(RandomSidecar(Shape(2, 2, kDim, 5, 12, FeatureKind::kGelu), 91));
  const auto k = RandomRows(kRows * kDim, 92), v = RandomRows(kRows * kDim, 93);
  std::vector<float> weights(kRows, 1), weighted(less->StateFloats()), repeated(less->StateFloats());
  weights[3] = 4, weights[69] = 2;
  less->Absorb(0, std::vector<EvictedRows>{{1, kRows, k.data(), v.data(), weighted.data(), weights.data()}});
  for (size_t r = 0; r < kRows; ++r)
    for (float i = 0; i < weights[r]; ++i)
      less->Absorb(0, std::vector<EvictedRows>{{1, 1, &k[r * kDim], &v[r * kDim], repeated.data()}});
  EXPECT_LT(MaxDifference(weighted, repeated), 1e-4);
  std::vector<float> plain(less->StateFloats());
  less->Absorb(0, std::vector<EvictedRows>{{1, kRows, k.data(), v.data(), plain.data()}});
  EXPECT_GT(MaxDifference(weighted, plain), 1e-2);
}

// Relative to a centre c of the keys the log-mass of a query q is q.c more, and the output is the same: exponents that
// no feature could reach.
TEST(Less, ACenterOfTheKeysIsAddedToTheLogMass) {
  const SidecarShape s = Shape(4, 2, 20, 6, 48, FeatureKind::kExp);
  Sidecar sidecar = RandomSidecar(s, 5);
  const auto plain = Make(sidecar);
  sidecar.layers[0].center = RandomRows(s.n_kv_heads * s.head_dim, 8);
  for (float& c : sidecar.layers[0].center) c *= 100;
  const auto centered = Make(sidecar);
  const std::vector<float> keys = RandomRows(9 * s.head_dim, 1), values = RandomRows(9 * s.head_dim, 2), q = RandomRows(3 * s.n_heads * s.head_dim, 3);
  std::vector<float> state(s.n_kv_heads * plain->StateFloats());
  for (size_t h = 0; h < s.n_kv_heads; ++h) {
    const EvictedRows rows{h, 9, keys.data(), values.data(), state.data() + h * plain->StateFloats()};
    plain->Absorb(0, {&rows, 1});
  }
  auto read = [&](const Residual& residual, const float* states) {
    std::pair<std::vector<float>, std::vector<float>> result{std::vector<float>(q.size()), std::vector<float>(3 * s.n_heads)};
    const ResidualQuery query{q.data(), 3, states, result.first.data(), result.second.data()};
    residual.Attend(0, {&query, 1});
    return result;
  };
  const auto [want_out, want_lse] = read(*plain, state.data());
  const auto [out, lse] = read(*centered, state.data());
  EXPECT_EQ(out, want_out);
  for (size_t row = 0; row < lse.size(); ++row) {
    double offset = 0;
    for (size_t d = 0; d < s.head_dim; ++d)
      offset += double(q[row * s.head_dim + d]) * sidecar.layers[0].center[row % s.n_heads / 2 * s.head_dim + d];
    EXPECT_NEAR(lse[row] - want_lse[row], offset, 1e-4 * (1 + std::fabs(offset))) << row;
  }
  const std::vector<float> empty(state.size());
  for (const float mass : read(*centered, empty.data()).second) EXPECT_EQ(mass, -std::numeric_limits<float>::infinity());
}

// |d| scales psi, H, z and the mass; d = 0 is the bare selector exactly.
TEST(Less, ScaleOfPsiScalesTheStateExactly) {
  const SidecarShape s = Shape(2, 2, 16, 8, 32, FeatureKind::kGelu);
  Sidecar sidecar = RandomSidecar(s, 4);
  const auto one = Make(sidecar);
  for (float& d : sidecar.layers[0].d) d *= 4;
  const auto four = Make(sidecar);
  for (float& d : sidecar.layers[0].d) d = 0;
  const auto zero = Make(sidecar);
  const std::vector<float> k = RandomRows(20 * 16, 1), v = RandomRows(20 * 16, 2), q = RandomRows(32, 3);
  std::vector<float> a(one->StateFloats()), b(a.size()), c(a.size());
  one->Absorb(0, std::vector<EvictedRows>{{1, 20, k.data(), v.data(), a.data()}});
  four->Absorb(0, std::vector<EvictedRows>{{1, 20, k.data(), v.data(), b.data()}});
  zero->Absorb(0, std::vector<EvictedRows>{{1, 20, k.data(), v.data(), c.data()}});
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(b[i], 4 * a[i]);
    EXPECT_EQ(c[i], 0.0f);
  }
  std::vector<float> out(32), lse(2), lse4(2);
  AttendStates(*one, 0, q.data(), 1, std::vector<const float*>{a.data(), a.data()}, out.data(), lse.data());
  AttendStates(*four, 0, q.data(), 1, std::vector<const float*>{b.data(), b.data()}, out.data(), lse4.data());
  EXPECT_NEAR(lse4[0] - lse[0], std::log(4.0f), 1e-6);
  AttendStates(*zero, 0, q.data(), 1, std::vector<const float*>{c.data(), c.data()}, out.data(), lse.data());
  EXPECT_EQ(lse[0], -std::numeric_limits<float>::infinity());
}

size_t ParameterCount(const SidecarShape& shape) {
  const LayerParams p = InitialSidecar(shape, 1).layers[0];
  return p.phi.w1.size() + p.phi.w2.size() + p.phi.b1.size() + p.phi.b2.size() + p.psi.w1.size() + p.psi.w2.size() +
         p.psi.b1.size() + p.psi.b2.size() + p.d.size() + p.d2.size() + p.x.size();
}

// Scalars of state and parameters at the paper's shapes.
TEST(Less, StateAndParameterCountsOfThePaper) {
  EXPECT_EQ(32 * LessStateFloats(8, 128), 33024u);  // Llama 2 7B, a layer
  EXPECT_EQ(40 * LessStateFloats(8, 128), 41280u);  // 13B
  EXPECT_EQ(1 * LessStateFloats(8, 64), 520u);      // Falcon 7B
  EXPECT_EQ(ParameterCount(Shape(32, 32, 128, 8, 512, FeatureKind::kGelu)), 4459008u);
  EXPECT_EQ(ParameterCount(Shape(40, 40, 128, 8, 512, FeatureKind::kGelu)), 5573760u);
  EXPECT_EQ(ParameterCount(Shape(71, 1, 64, 8, 512, FeatureKind::kGelu)), 2654288u);
  EXPECT_EQ(ParameterCount(Shape(6, 2, 16, 4, 24, FeatureKind::kExp)), 4064u);
  for (size_t dim : {64u, 128u}) {
    const double pairs = double(LessStateFloats(8, dim)) / (2.0 * double(dim));
    EXPECT_GE(pairs, 4.03);
    EXPECT_LE(pairs, 4.0626);
  }
}

TEST(Less, ResultsDoNotDependOnThreadsOrNeighbours) {
  const SidecarShape s = Shape(4, 2, 64, 8, 128, FeatureKind::kExp);
  const auto less = Make(RandomSidecar(s, 6, DType::kBF16));
  const std::vector<float> k = RandomRows(70 * 64, 1), v = RandomRows(70 * 64, 2), q = RandomRows(70 * 256, 3);
  std::vector<float> outs[2], lses[2];
  for (int threads : {1, 2}) {
    const ThreadPool pool(threads);
    const ThreadScope scope(pool);
    std::vector<float> a(less->StateFloats()), b(less->StateFloats());
    less->Absorb(0, std::vector<EvictedRows>{{0, 70, k.data(), v.data(), a.data()}, {1, 3, v.data(), k.data(), b.data()}});
    outs[threads - 1].resize(q.size());
    lses[threads - 1].resize(70 * 4);
    AttendStates(*less, 0, q.data(), 70, std::vector<const float*>{a.data(), b.data()}, outs[threads - 1].data(),
                 lses[threads - 1].data());
  }
  EXPECT_EQ(outs[0], outs[1]);
  EXPECT_EQ(lses[0], lses[1]);
}

// Fewer and more rows than a map takes at once, with weights and without, in any order of heads.
TEST(Less, RowsOfManySequencesAreAbsorbedAsThoseOfEachAlone) {
  constexpr size_t kDim = 64, kSequences = 40;
  const SidecarShape s = Shape(4, 2, kDim, internal::kMaxRank, 128, FeatureKind::kGelu);
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    const auto less = Make(RandomSidecar(s, 6));
    const std::vector<float> keys = RandomRows(200 * kDim, 1), values = RandomRows(200 * kDim, 2);
    std::vector<float> weights(200, 1.0f);
    for (size_t i = 0; i < weights.size(); i += 3) weights[i] = 2.5f;
    std::vector<std::vector<float>> alone(kSequences, std::vector<float>(less->StateFloats())), together = alone;
    std::vector<EvictedRows> all;
    for (size_t i = 0; i < kSequences; ++i) {
      const size_t n = i % 9 == 4 ? 63 + i % 4 : 1 + i % 5, at = (7 * i) % 100;
      EvictedRows rows{i % 2, n, &keys[at * kDim], &values[at * kDim], alone[i].data(), i % 4 == 1 ? &weights[at] : nullptr};
      less->Absorb(0, {&rows, 1});
      rows.state = together[i].data();
      all.push_back(rows);
    }
    for (const int threads : {1, 3}) {
      const ThreadPool pool(threads);
      const ThreadScope scope(pool);
      for (std::vector<float>& state : together) std::fill(state.begin(), state.end(), 0.0f);
      less->Absorb(0, all);
      EXPECT_EQ(together, alone) << IsaName(isa);
    }
  }
  ForceIsa(BestIsa());
}

TEST(Less, HugeAndTinyKeysStayFinite) {
  for (FeatureKind kind : {FeatureKind::kGelu, FeatureKind::kExp}) {
    const SidecarShape s = Shape(1, 1, 16, 8, 32, kind);
    const auto less = Make(RandomSidecar(s, 2));
    for (float scale : {1e-20f, 1e4f}) {
      std::vector<float> k = RandomRows(16, 1), v = RandomRows(16, 2), q = RandomRows(16, 3);
      for (float& x : k) x *= scale;
      for (float& x : q) x *= scale;
      std::vector<float> state(less->StateFloats()), out(16), lse(1);
      less->Absorb(0, std::vector<EvictedRows>{{0, 1, k.data(), v.data(), state.data()}});
      AttendStates(*less, 0, q.data(), 1, std::vector<const float*>{state.data()}, out.data(), lse.data());
      for (size_t d = 0; d < 16; ++d) EXPECT_TRUE(std::isfinite(out[d]));
      EXPECT_FALSE(std::isnan(lse[0]));
    }
  }
}

TEST(Less, RefusesMapsOfAnotherShape) {
  const auto maps = FeatureMaps::Create(InitialSidecar(Shape(4, 2, 16, 4, 8, FeatureKind::kGelu), 1));
  try {
    const std::vector<LayerShape> layers = {{4, 2, 32, UsualScale(32), nullptr, 0}};
    MakeLessResidual({}, layers, maps);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kMismatch);
    EXPECT_NE(std::string(e.what()).find("2 KV heads of 16"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("2 KV heads of 32"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace lesskv
