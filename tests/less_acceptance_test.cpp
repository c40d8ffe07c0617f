// LESS through the whole cache: what an implementation must show. Maps, states and gradients alone are tested beside
// their sources, in residual/less_test.cpp and train/less_layer_test.cpp. The oracle here is the masked form in double
// precision: every causal pair explicit, under the visibility that the cache itself reports.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>

#include "cache_harness.h"
#include "kvcache/residual/less.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT: the harness is written for these tests

constexpr TinyShape kShape = {2, 4, 2, 10};

// phi or psi in double, from the parameters; psi unfolded.
std::vector<double> Features(const Sidecar& sidecar, size_t layer, bool is_psi, size_t head, const double* x) {
  const SidecarShape& s = sidecar.shape;
  const LayerParams& p = sidecar.layers[layer];
  const NetParams& net = is_psi ? p.psi : p.phi;
  auto gelu = [](double v) { return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0))); };
  std::vector<double> g(s.rank), f(s.rank);
  for (size_t u = 0; u < s.hidden; ++u) {
    double sum = 0;
    for (size_t d = 0; d < s.head_dim; ++d) sum += x[d] * net.w1[(head * s.head_dim + d) * s.hidden + u];
    for (size_t r = 0; r < s.rank; ++r) g[r] += gelu(sum) * net.w2[(head * s.hidden + u) * s.rank + r];
  }
  for (double& v : g) v = gelu(v);
  for (size_t r = 0; r < s.rank && is_psi; ++r) g[r] *= std::fabs(double(p.d[head * s.rank + r]));
  for (size_t r = 0; r < s.rank; ++r) {
    double mixed = 0;
    for (size_t i = 0; i < s.rank && is_psi; ++i) mixed += g[i] * p.x[(head * s.rank + i) * s.rank + r];
    f[r] = std::fabs(g[r] + (is_psi ? mixed * p.d2[head * s.rank + r] : 0.0));
  }
  return f;
}

// A text rotated to its positions, in double.
struct Rotated {
  std::vector<std::vector<double>> q, k;
};

Rotated Rotate(const Text& text) {
  const CacheShape shape = MakeCacheShape(kShape);
  std::vector<int32_t> positions(text.n);
  std::iota(positions.begin(), positions.end(), 0);
  Rotated r;
  for (size_t l = 0; l < kShape.n_layers; ++l) {
    std::vector<float> q = text.q[l], k = text.k[l];
    RotateRows(*shape.layers[0].rope, q.data(), text.n, kShape.n_heads * kShape.head_dim, kShape.n_heads, kShape.head_dim,
               positions.data());
    RotateRows(*shape.layers[0].rope, k.data(), text.n, kShape.n_kv_heads * kShape.head_dim, kShape.n_kv_heads, kShape.head_dim,
               positions.data());
    r.q.emplace_back(q.begin(), q.end());
    r.k.emplace_back(k.begin(), k.end());
  }
  return r;
}

enum class Kernel { kLearned, kExact };

// Output of query t of one layer; sees[kv_head][j] says which earlier tokens are exact. `weights` (may be null)
// receives the implied weights of head 0, which sum to 1.
std::vector<double> Masked(const Sidecar& sidecar, const Text& text, const Rotated& rotated, size_t layer, size_t t,
                           const std::vector<std::vector<char>>& sees, Kernel kernel,
                           std::vector<double>* weights = nullptr) {
  const size_t dim = kShape.head_dim, group = kShape.group();
  std::vector<double> out(kShape.n_heads * dim);
  for (size_t h = 0; h < kShape.n_heads; ++h) {
    const size_t kv = h / group;
    const double* q = &rotated.q[layer][(t * kShape.n_heads + h) * dim];
    const auto phi = Features(sidecar, layer, false, h, q);
    std::vector<double> w(t + 1);
    for (size_t j = 0; j <= t; ++j) {
      const double* k = &rotated.k[layer][(j * kShape.n_kv_heads + kv) * dim];
      if (sees[kv][j] || kernel == Kernel::kExact) {
        w[j] = std::exp(std::inner_product(q, q + dim, k, 0.0) / std::sqrt(double(dim)));
      } else {
        const auto psi = Features(sidecar, layer, true, kv, k);
        w[j] = std::inner_product(phi.begin(), phi.end(), psi.begin(), 0.0);
      }
    }
    const double mass = std::accumulate(w.begin(), w.end(), 0.0);
    for (size_t j = 0; j <= t; ++j)
      for (size_t d = 0; d < dim; ++d)
        out[h * dim + d] += w[j] / mass * text.v[layer][(j * kShape.n_kv_heads + kv) * dim + d];
    if (h == 0 && weights != nullptr)
      for (size_t j = 0; j <= t; ++j) weights->push_back(w[j] / mass);
  }
  return out;
}

std::vector<std::vector<std::vector<char>>> Seen(const SequenceCache& cache, size_t n) {
  std::vector<std::vector<std::vector<char>>> sees(
      kShape.n_layers, std::vector<std::vector<char>>(kShape.n_kv_heads, std::vector<char>(n)));
  for (size_t l = 0; l < kShape.n_layers; ++l)
    for (size_t h = 0; h < kShape.n_kv_heads; ++h)
      for (int32_t p : Resident(cache, l, h)) sees[l][h][static_cast<size_t>(p)] = 1;
  return sees;
}

// The states lie at the end of the serialized cache: [n_layers, n_kv_heads, rank (head_dim + 1)] floats.
std::vector<float> States(const SequenceCache& cache, size_t rank) {
  const std::vector<std::byte> bytes = cache.Serialize();
  std::vector<float> states(kShape.n_layers * kShape.n_kv_heads * LessStateFloats(rank, kShape.head_dim));
  std::memcpy(states.data(), bytes.data() + bytes.size() - states.size() * 4, states.size() * 4);
  return states;
}

const char* const kPolicies[] = {"h2o(12)+f32", "window(12, sinks=3)+f32", "tova(12)+f32", "h2o(heavy=9, recent=3)+f32"};

// A prompt, then single tokens, against the masked form with the cache's own visibility.
TEST(LessAcceptance, DecodeEqualsTheMaskedFormStepByStep) {
  const TempSidecar sidecar(kShape);
  const size_t n = 60, prompt = 35;
  const Text text = RandomText(kShape, n, 5);
  const Rotated rotated = Rotate(text);
  for (const std::string policy : kPolicies) {
    SequenceCache cache(MakeConfig(policy + "+less", kShape, sidecar));
    SequenceCache full(MakeConfig("full+f32", kShape, sidecar));
    // The prompt itself is attended in full.
    EXPECT_EQ(Feed(cache, text, 0, prompt, StepKind::kPrompt), Feed(full, text, 0, prompt, StepKind::kPrompt)) << policy;
    cache.EndPrompt();
    double error = 0, largest = 0;
    for (size_t t = prompt; t < n; ++t) {
      auto sees = Seen(cache, n);
      for (auto& layer : sees)
        for (auto& head : layer) head[t] = 1;
      // The prompt's end leaves 12 rows, every step evicts one, so a query attends 12 and itself.
      for (size_t l = 0; l < kShape.n_layers; ++l)
        for (size_t h = 0; h < kShape.n_kv_heads; ++h) EXPECT_EQ(Resident(cache, l, h).size(), 12u) << policy;
      const Outputs outputs = Feed(cache, text, t, 1, StepKind::kDecode);
      for (size_t l = 0; l < kShape.n_layers; ++l) {
        std::vector<double> weights;
        const auto want = Masked(sidecar.sidecar(), text, rotated, l, t, sees[l], Kernel::kLearned, &weights);
        for (size_t i = 0; i < want.size(); ++i) {
          error = std::max(error, std::fabs(outputs[l][i] - want[i]));
          largest = std::max(largest, std::fabs(want[i]));
        }
        // Weights that are nonnegative and sum to one.
        EXPECT_NEAR(std::accumulate(weights.begin(), weights.end(), 0.0), 1.0, 1e-12);
        EXPECT_GE(*std::min_element(weights.begin(), weights.end()), 0.0);
      }
      // Nobody returns.
      const auto after = Seen(cache, n);
      for (size_t l = 0; l < kShape.n_layers; ++l)
        for (size_t h = 0; h < kShape.n_kv_heads; ++h)
          for (size_t j = 0; j < t; ++j) EXPECT_LE(after[l][h][j], sees[l][h][j]) << policy;
    }
    EXPECT_LE(error, 2e-5 * largest) << policy;
    // z and H are the sums over what is no longer resident.
    const std::vector<float> states = States(cache, 8);
    const auto sees = Seen(cache, n);
    for (size_t l = 0; l < kShape.n_layers; ++l) {
      for (size_t h = 0; h < kShape.n_kv_heads; ++h) {
        std::vector<double> want(LessStateFloats(8, kShape.head_dim));
        for (size_t j = 0; j < n; ++j) {
          if (sees[l][h][j]) continue;
          const size_t row = (j * kShape.n_kv_heads + h) * kShape.head_dim;
          const auto psi = Features(sidecar.sidecar(), l, true, h, &rotated.k[l][row]);
          for (size_t r = 0; r < 8; ++r) {
            want[8 * kShape.head_dim + r] += psi[r];
            for (size_t d = 0; d < kShape.head_dim; ++d) want[r * kShape.head_dim + d] += psi[r] * text.v[l][row + d];
          }
        }
        const float* got = &states[(l * kShape.n_kv_heads + h) * want.size()];
        const double scale = *std::max_element(want.begin(), want.end());
        for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-5 * scale) << policy;
      }
    }
  }
}

// With nothing evicted the bits are those of the full cache.
TEST(LessAcceptance, NothingEvictedIsTheFullCacheBitForBit) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 40, 6);
  SequenceCache less(MakeConfig("h2o(40)+f32+less", kShape, sidecar)), full(MakeConfig("full+f32", kShape, sidecar));
  EXPECT_EQ(Feed(less, text, 0, 20, StepKind::kPrompt), Feed(full, text, 0, 20, StepKind::kPrompt));
  for (size_t t = 20; t < 40; ++t)
    EXPECT_EQ(Feed(less, text, t, 1, StepKind::kDecode), Feed(full, text, t, 1, StepKind::kDecode));
}

Outputs StreamAll(const std::string& spec, const Text& text, const SidecarSource& source) {
  SequenceCache cache(CacheConfig::Create(CacheSpec::Parse(spec), MakeCacheShape(kShape), {}, source));
  Outputs all(kShape.n_layers);
  for (size_t t = 0; t < text.n; t += 4) {
    const Outputs part = Feed(cache, text, t, std::min<size_t>(4, text.n - t), StepKind::kStream);
    for (size_t l = 0; l < part.size(); ++l) all[l].insert(all[l].end(), part[l].begin(), part[l].end());
  }
  return all;
}

// psi = 0 is the bare selector, bit for bit; small scales come close to it.
TEST(LessAcceptance, NoMassIsTheBareSelector) {
  const TempSidecar original(kShape);
  const Text text = RandomText(kShape, 50, 7);
  const std::string path = testing::TempDir() + "/scaled.less.gguf";
  const Outputs bare = StreamAll("h2o(12)+f32", text, {});
  double last = 1e9;
  for (float scale : {1.0f, 1e-2f, 1e-4f, 0.0f}) {
    Sidecar sidecar = original.sidecar();
    for (LayerParams& layer : sidecar.layers)
      for (float& d : layer.d) d *= scale;
    WriteSidecar(path, sidecar);
    const Outputs less = StreamAll("h2o(12)+f32+less", text, {path, 0});
    const double distance = RelativeError(less[1], bare[1]);
    EXPECT_LT(distance, last) << scale;
    last = distance > 0 ? distance : last;
    if (scale == 0) {
      EXPECT_EQ(less, bare);
    }
  }
}

// Were the kernel exact, the mask would not matter.
TEST(LessAcceptance, ExactKernelGivesFullAttentionWhateverTheMask) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 30, 8);
  const Rotated rotated = Rotate(text);
  std::vector<std::vector<char>> all(2, std::vector<char>(30, 1)), some(2, std::vector<char>(30, 0));
  for (auto& head : some) head[29] = head[3] = 1;
  EXPECT_EQ(Masked(sidecar.sidecar(), text, rotated, 0, 29, some, Kernel::kExact),
            Masked(sidecar.sidecar(), text, rotated, 0, 29, all, Kernel::kLearned));
  EXPECT_NE(Masked(sidecar.sidecar(), text, rotated, 0, 29, some, Kernel::kLearned),
            Masked(sidecar.sidecar(), text, rotated, 0, 29, all, Kernel::kLearned));
}

// Values that are all the same come back, whatever was evicted.
TEST(LessAcceptance, ConstantValuesComeBack) {
  const TempSidecar sidecar(kShape);
  Text text = RandomText(kShape, 48, 9);
  for (auto& v : text.v) std::fill(v.begin(), v.end(), 3.25f);
  for (const std::string policy : kPolicies)
    for (const auto& layer : StreamAll(policy + "+less", text, sidecar.source()))
      for (float o : layer) ASSERT_NEAR(o, 3.25f, 1e-5) << policy;
}

// The authors' clamps: a prompt is ordinary attention; afterwards even an empty state has a mass of 1e-6 and no value.
TEST(LessAcceptance, ClampsActAfterThePromptEvenOnAnEmptyState) {
  const TempSidecar sidecar(kShape);
  const CacheShape shape = MakeCacheShape(kShape, 0);  // no rotation: every score is the same
  Text text = RandomText(kShape, 9, 12);
  const float score = -13;
  for (size_t l = 0; l < kShape.n_layers; ++l) {
    std::fill(text.k[l].begin(), text.k[l].end(), 1.0f);
    std::fill(text.q[l].begin(), text.q[l].end(), score / std::sqrt(static_cast<float>(kShape.head_dim)));
    std::fill(text.v[l].begin(), text.v[l].end(), 2.0f);
  }
  auto make = [&](const std::string& less) {
    return CacheConfig::Create(CacheSpec::Parse("h2o(20)+f32" + less), shape, {}, sidecar.source());
  };
  SequenceCache plain(make("+less")), clamped(make("+less(clamp=true)"));
  EXPECT_EQ(Feed(clamped, text, 0, 8, StepKind::kPrompt), Feed(plain, text, 0, 8, StepKind::kPrompt));
  const Outputs a = Feed(plain, text, 8, 1, StepKind::kDecode), b = Feed(clamped, text, 8, 1, StepKind::kDecode);
  const double mass = 9 * std::exp(static_cast<double>(score)), share = mass / (mass + 1e-6);
  ASSERT_LT(share, 0.96);
  for (size_t l = 0; l < kShape.n_layers; ++l) {
    for (size_t i = 0; i < a[l].size(); ++i) {
      EXPECT_NEAR(a[l][i], 2.0, 1e-5);
      EXPECT_NEAR(b[l][i], 2.0 * share, 1e-4);
    }
  }
}

// Budgets as fractions of the context; Baseline+ has rank / 2 rows more.
TEST(LessAcceptance, BudgetsOfThePaper) {
  auto rows = [](const std::string& spec, size_t ctx) {
    TinyShape shape = kShape;
    shape.ctx = ctx;
    return CacheConfig::Create(CacheSpec::Parse(spec), MakeCacheShape(shape))->Budgets(ctx).front();
  };
  EXPECT_EQ(rows("h2o(5%)", 4096), 204u);
  EXPECT_EQ(rows("h2o(2%)", 4096), 80u);
  EXPECT_EQ(rows("h2o(5%)", 2048), 102u);
  EXPECT_EQ(rows("h2o(10%)", 2048), 204u);
  EXPECT_EQ(rows("h2o(5%, extra=4)", 4096), 208u);
  EXPECT_EQ(rows("window(204, sinks=4)", 4096), 204u);
}

// Bytes stay as the text grows; two texts in turn are as each alone.
TEST(LessAcceptance, StateIsConstantAndNeighboursDoNotMatter) {
  const TempSidecar sidecar(kShape);
  const Text a = RandomText(kShape, 80, 10), b = RandomText(kShape, 80, 11);
  const auto config = MakeConfig("h2o(12)+f32+less", kShape, sidecar);
  SequenceCache one(config), two(config), alone(config);
  size_t bytes = 0;
  for (size_t t = 0; t < 80; ++t) {
    const Outputs out = Feed(one, a, t, 1, StepKind::kStream);
    Feed(two, b, t, 1, StepKind::kStream);
    EXPECT_EQ(out, Feed(alone, a, t, 1, StepKind::kStream));
    if (t == 20) bytes = one.Stats().kv_bytes;
    if (t > 20) {
      EXPECT_EQ(one.Stats().kv_bytes, bytes);
    }
  }
  SequenceCache bare(MakeConfig("h2o(12)+f32", kShape, sidecar));
  for (size_t t = 0; t < 80; ++t) Feed(bare, a, t, 1, StepKind::kStream);
  const size_t state = kShape.n_layers * kShape.n_kv_heads * LessStateFloats(8, kShape.head_dim) * sizeof(float);
  EXPECT_GE(bytes, bare.Stats().kv_bytes + state);
  EXPECT_LT(bytes, bare.Stats().kv_bytes + state + 256);  // alignment
}

}  // namespace
}  // namespace lesskv
