// Gradients of the blocked scan against (1) the authors' own backward pass and (2) finite differences of an independent
// double-precision masked form: every causal pair explicit, one normaliser, no state.
#include "train/less_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>

#include "base/rng.h"
#include "base/threads.h"
#include "format/safetensors.h"
#include "kvcache/residual/less.h"
#include "kvcache/residual/less_golden.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

double ExactGelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

// Attention over the tokens that query t still sees, in double: what a selector leaves behind. Fills exact_out,
// exact_lse and, over all tokens, target.
void FillExact(const SidecarShape& s, LessExample& e) {
  const size_t n = e.n_tokens, dim = s.head_dim, group = s.n_heads / s.n_kv_heads;
  e.exact_out.assign(n * s.n_heads * dim, 0.0f);
  e.target = e.exact_out;
  e.exact_lse.assign(n * s.n_heads, 0.0f);
  for (size_t t = 0; t < n; ++t) {
    for (size_t h = 0; h < s.n_heads; ++h) {
      std::vector<double> exact(dim), full(dim);
      double exact_mass = 0, full_mass = 0;
      for (size_t j = 0; j <= t; ++j) {
        double score = 0;
        for (size_t d = 0; d < dim; ++d)
          score += double(e.q[(t * s.n_heads + h) * dim + d]) * e.k[(j * s.n_kv_heads + h / group) * dim + d];
        const double p = std::exp(score / std::sqrt(double(dim)));
        const bool seen = e.leave[h / group * n + j] > static_cast<int32_t>(t);
        full_mass += p;
        if (seen) exact_mass += p;
        for (size_t d = 0; d < dim; ++d) {
          const double v = e.v[(j * s.n_kv_heads + h / group) * dim + d];
          full[d] += p * v;
          if (seen) exact[d] += p * v;
        }
      }
      for (size_t d = 0; d < dim; ++d) {
        e.target[(t * s.n_heads + h) * dim + d] = static_cast<float>(full[d] / full_mass);
        e.exact_out[(t * s.n_heads + h) * dim + d] = static_cast<float>(exact[d] / exact_mass);
      }
      e.exact_lse[t * s.n_heads + h] = static_cast<float>(std::log(exact_mass));
    }
  }
}

// ---------------------------------------------------------------------------------------------- the masked form

// Features of one row, from a flat double copy of the parameters.
std::vector<double> MaskedFeatures(const SidecarShape& s, bool is_psi, const double* p, const float* x) {
  const NetLayout at(s, is_psi);
  const bool is_exp = s.kind == FeatureKind::kExp;
  std::vector<double> p2(s.rank), out(s.rank), u(s.rank);
  for (size_t r = 0; r < s.rank && is_exp; ++r) p2[r] = p[at.b2 + r];
  for (size_t i = 0; i < s.hidden; ++i) {
    double sum = is_exp ? p[at.b1 + i] : 0;
    for (size_t d = 0; d < s.head_dim; ++d) sum += x[d] * p[at.w1 + d * s.hidden + i];
    for (size_t r = 0; r < s.rank; ++r) p2[r] += ExactGelu(sum) * p[at.w2 + i * s.rank + r];
  }
  for (size_t r = 0; r < s.rank; ++r) {
    if (is_exp) out[r] = std::exp(p2[r]);
    else if (!is_psi) out[r] = std::fabs(ExactGelu(p2[r]));
    else u[r] = std::fabs(p[at.d + r]) * ExactGelu(p2[r]);
  }
  if (is_exp || !is_psi) return out;
  for (size_t r = 0; r < s.rank; ++r) {
    double mixed = 0;
    for (size_t i = 0; i < s.rank; ++i) mixed += u[i] * p[at.x + i * s.rank + r];
    out[r] = std::fabs(u[r] + mixed * p[at.d2 + r]);
  }
  return out;
}

double MaskedLoss(const SidecarShape& s, const std::vector<double>& parameters, const LessExample& e,
                  const std::vector<float>& metric) {
  const size_t n = e.n_tokens, dim = s.head_dim, q_dim = s.n_heads * dim, group = s.n_heads / s.n_kv_heads;
  const NetLayout phi_at(s, false), psi_at(s, true);
  double loss = 0;
  for (size_t t = e.first_scored; t < n; ++t) {
    std::vector<double> difference(q_dim);
    for (size_t h = 0; h < s.n_heads; ++h) {
      const size_t kv = h / group;
      const auto phi = MaskedFeatures(s, false, &parameters[h * phi_at.total], &e.q[(t * s.n_heads + h) * dim]);
      double mass = 0;
      std::vector<double> sum(dim);
      for (size_t j = 0; j <= t; ++j) {
        const float* k = &e.k[(j * s.n_kv_heads + kv) * dim];
        double weight = 0;
        if (e.leave[kv * n + j] > static_cast<int32_t>(t)) {
          for (size_t d = 0; d < dim; ++d) weight += double(e.q[(t * s.n_heads + h) * dim + d]) * k[d];
          weight = std::exp(weight / std::sqrt(double(dim)));
        } else {
          const auto psi =
              MaskedFeatures(s, true, &parameters[s.n_heads * phi_at.total + kv * psi_at.total], k);
          for (size_t r = 0; r < s.rank; ++r) weight += phi[r] * psi[r];
        }
        mass += weight;
        for (size_t d = 0; d < dim; ++d) sum[d] += weight * e.v[(j * s.n_kv_heads + kv) * dim + d];
      }
      for (size_t d = 0; d < dim; ++d) difference[h * dim + d] = sum[d] / mass - e.target[(t * s.n_heads + h) * dim + d];
    }
    for (size_t i = 0; i < q_dim; ++i)
      for (size_t j = 0; j < q_dim; ++j) loss += difference[i] * metric[i * q_dim + j] * difference[j];
  }
  return loss / static_cast<double>(n - e.first_scored);
}

struct Problem {
  SidecarShape shape;
  LessExample example;
  LayerParams parameters;
  std::vector<float> metric;
};

// A random layer with grouped heads whose tokens leave at random times, in bunches and alone.
Problem RandomProblem(FeatureKind kind, uint64_t seed) {
  Problem p;
  p.shape.n_layers = 1;
  p.shape.n_heads = 4;
  p.shape.n_kv_heads = 2;
  p.shape.head_dim = 6;
  p.shape.rank = 3;
  p.shape.hidden = 5;
  p.shape.kind = kind;
  Rng rng(seed);
  LessExample& e = p.example;
  e.n_tokens = 24;
  e.first_scored = 7;
  auto fill = [&](std::vector<float>& x, size_t n) {
    x.resize(n);
    for (float& v : x) v = rng.Normal();
  };
  fill(e.q, e.n_tokens * 4 * 6);
  fill(e.k, e.n_tokens * 2 * 6);
  fill(e.v, e.n_tokens * 2 * 6);
  for (size_t i = 0; i < 2 * e.n_tokens; ++i) {
    const size_t j = i % e.n_tokens;
    const int32_t leave = static_cast<int32_t>(std::max<uint64_t>(j + 1, 4 + 4 * rng.Below(8)));
    e.leave.push_back(std::min<int32_t>(leave, 24));
  }
  FillExact(p.shape, e);
  p.parameters = InitialSidecar(p.shape, seed).layers[0];
  for (float& v : p.parameters.d) v = rng.UniformFloat(-2, 2);
  for (float& v : p.parameters.d2) v = rng.UniformFloat(-1, 1);
  for (NetParams* net : {&p.parameters.phi, &p.parameters.psi}) {
    for (float& v : net->b1) v = rng.UniformFloat(-1, 1);
    for (float& v : net->b2) v = rng.UniformFloat(-1, 1);
  }
  std::vector<float> w;
  fill(w, 24 * 24);
  p.metric.assign(24 * 24, 0.0f);
  Gemm(true, false, 24, 24, 24, w.data(), 24, w.data(), 24, p.metric.data(), 24, false);
  return p;
}

class LessLayerKinds : public testing::TestWithParam<FeatureKind> {};
INSTANTIATE_TEST_SUITE_P(Features, LessLayerKinds, testing::Values(FeatureKind::kGelu, FeatureKind::kExp),
                         [](const auto& kind) { return FeatureKindName(kind.param); });

// The scan equals the masked form, in value and in every parameter's derivative.
TEST_P(LessLayerKinds, LossAndGradientEqualTheMaskedForm) {
  for (uint64_t seed : {1, 2, 3}) {
    const Problem p = RandomProblem(GetParam(), seed);
    const LessLayer layer(p.shape, p.parameters, p.metric);
    std::vector<float> gradient;
    const LessExample* batch[] = {&p.example};
    const double loss = layer.LossAndGradient(batch, {}, gradient);
    std::vector<double> at(layer.parameters().begin(), layer.parameters().end());
    EXPECT_NEAR(loss, MaskedLoss(p.shape, at, p.example, p.metric), 1e-5 * loss);
    double error = 0, norm = 0;
    for (size_t i = 0; i < at.size(); ++i) {
      const double step = 1e-5, kept = at[i];
      at[i] = kept + step;
      const double above = MaskedLoss(p.shape, at, p.example, p.metric);
      at[i] = kept - step;
      const double below = MaskedLoss(p.shape, at, p.example, p.metric);
      at[i] = kept;
      const double want = (above - below) / (2 * step);
      error += (gradient[i] - want) * (gradient[i] - want);
      norm += want * want;
      EXPECT_NEAR(gradient[i], want, 1e-3 * std::fabs(want) + 2e-5 * loss) << i;
    }
    EXPECT_LT(std::sqrt(error / norm), 1e-4);
  }
}

TEST_P(LessLayerKinds, BatchesAverageAndThreadsDoNotMatter) {
  const Problem a = RandomProblem(GetParam(), 1), b = RandomProblem(GetParam(), 2);
  const LessLayer layer(a.shape, a.parameters, a.metric);
  const LessExample* both[] = {&a.example, &b.example};
  std::vector<float> g[2], ga, gb;
  double loss[2];
  for (int threads : {1, 2}) {
    const ThreadPool pool(threads);
    const ThreadScope scope(pool);
    loss[threads - 1] = layer.LossAndGradient(both, {0.3f, 9}, g[threads - 1]);
  }
  EXPECT_EQ(loss[0], loss[1]);
  EXPECT_EQ(g[0], g[1]);
  const double joint = layer.LossAndGradient(both, {}, g[0]);
  const double la = layer.LossAndGradient(std::span(both, 1), {}, ga);
  const double lb = layer.LossAndGradient(std::span(both + 1, 1), {}, gb);
  EXPECT_NEAR(joint, (la + lb) / 2, 1e-6 * joint);  // both score as many positions
  for (size_t i = 0; i < ga.size(); ++i) EXPECT_NEAR(g[0][i], (ga[i] + gb[i]) / 2, 1e-5 * (1 + std::fabs(ga[i])));
}

// What lies before the first scored position has no part in the loss.
TEST_P(LessLayerKinds, EarlyPositionsDoNotCount) {
  Problem p = RandomProblem(GetParam(), 4);
  const LessLayer layer(p.shape, p.parameters, p.metric);
  const LessExample* batch[] = {&p.example};
  std::vector<float> before, after;
  const double loss = layer.LossAndGradient(batch, {}, before);
  for (size_t i = 0; i < p.example.first_scored * 24; ++i) p.example.target[i] += 100;
  EXPECT_EQ(loss, layer.LossAndGradient(batch, {}, after));
  EXPECT_EQ(before, after);
}

// What training computes is what the cache will compute: the same state and outputs as LessResidual.
TEST_P(LessLayerKinds, OutputEqualsTheResidualOfTheCache) {
  const Problem p = RandomProblem(GetParam(), 5);
  const LessExample& e = p.example;
  const LessLayer layer(p.shape, p.parameters, p.metric);
  Sidecar sidecar;
  sidecar.shape = p.shape;
  sidecar.matrix_type = DType::kF32;
  sidecar.layers = {layer.Export()};
  const std::vector<LayerShape> layers = {{4, 2, 6, UsualScale(6), nullptr, 0}};
  const auto less = MakeLessResidual({}, layers, FeatureMaps::Create(sidecar));
  const std::vector<float> output = layer.Output(e);
  std::vector<std::vector<float>> states(2, std::vector<float>(less->StateFloats()));
  for (size_t t = 0; t < e.n_tokens; ++t) {
    for (size_t h = 0; h < 2; ++h)
      for (size_t j = 0; j < e.n_tokens; ++j)
        if (e.leave[h * e.n_tokens + j] == static_cast<int32_t>(t))
          less->Absorb(0, std::vector<EvictedRows>{
                              {h, 1, &e.k[(j * 2 + h) * 6], &e.v[(j * 2 + h) * 6], states[h].data()}});
    if (t < e.first_scored) continue;
    std::vector<float> out(24), lse(4);
    std::vector<float> together = states[0];
    together.insert(together.end(), states[1].begin(), states[1].end());
    const ResidualQuery query{&e.q[t * 24], 1, together.data(), out.data(), lse.data()};
    less->Attend(0, {&query, 1});
    for (size_t h = 0; h < 4; ++h) {
      const double gate = 1 / (1 + std::exp(double(lse[h]) - e.exact_lse[t * 4 + h]));
      for (size_t d = 0; d < 6; ++d) {
        const size_t i = (t * 4 + h) * 6 + d;
        EXPECT_NEAR(output[i], gate * e.exact_out[i] + (1 - gate) * out[h * 6 + d], 1e-5);
      }
    }
  }
}

// One seed is one mask, in the loss and in its gradient: along the gradient the loss rises by the gradient's square.
TEST_P(LessLayerKinds, DropoutHasItsGradientAndIsReproducible) {
  const Problem p = RandomProblem(GetParam(), 6);
  LessLayer layer(p.shape, p.parameters, p.metric);
  const LessExample* batch[] = {&p.example};
  std::vector<float> a, b, c;
  const double once = layer.LossAndGradient(batch, {0.3f, 1}, a);
  EXPECT_EQ(once, layer.LossAndGradient(batch, {0.3f, 1}, b));
  EXPECT_EQ(a, b);
  EXPECT_NE(once, layer.LossAndGradient(batch, {0.3f, 2}, c));
  double square = 0;
  for (const float g : a) square += double(g) * g;
  const std::vector<float> at = layer.parameters();
  const auto along = [&](double step) {
    for (size_t i = 0; i < at.size(); ++i) layer.parameters()[i] = static_cast<float>(at[i] + step * a[i] / std::sqrt(square));
    return layer.LossAndGradient(batch, {0.3f, 1}, b);
  };
  EXPECT_NEAR((along(1e-3) - along(-1e-3)) / 2e-3, std::sqrt(square), 1e-2 * std::sqrt(square));
}

// -------------------------------------------------------------------------------------------------- golden gradients

class LessLayerGolden : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Files, LessLayerGolden, testing::Values("masked_h2o.safetensors", "masked_lambda.safetensors"));

void ExpectClose(const std::vector<float>& got, const std::vector<float>& want, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
    norm += double(want[i]) * want[i];
  }
  EXPECT_GT(norm, 0) << what;
  EXPECT_LE(std::sqrt(error / norm), tolerance) << what;
}

// In masked_lambda.safetensors the reference gradients of B1 and B2 hold numbers of 1e34 to 1e36, which no gradient of
// its loss (0.01) can be: the authors' backward pass went wrong there. Its loss, its outputs and all other gradients
// are sound. For such a tensor every eighth derivative is compared with central differences of the masked form.
bool IsBroken(const std::vector<float>& gradient) {
  return std::any_of(gradient.begin(), gradient.end(), [](float g) { return !(std::fabs(g) < 1e20f); });
}

void ExpectDifferences(const SidecarShape& s, const LessLayer& layer, const std::vector<float>& gradient,
                       std::span<const LessExample* const> batch, const std::vector<float>& metric, size_t first,
                       size_t end) {
  std::vector<double> at(layer.parameters().begin(), layer.parameters().end());
  auto loss = [&] {
    double sum = 0;
    for (const LessExample* e : batch) sum += MaskedLoss(s, at, *e, metric);
    return sum / static_cast<double>(batch.size());
  };
  double error = 0, norm = 0;
  for (size_t i = first; i < end; i += 8) {
    const double kept = at[i];
    at[i] = kept + 1e-5;
    const double above = loss();
    at[i] = kept - 1e-5;
    const double want = (above - loss()) / 2e-5;
    at[i] = kept;
    error += (gradient[i] - want) * (gradient[i] - want);
    norm += want * want;
  }
  EXPECT_GT(norm, 0);
  EXPECT_LE(std::sqrt(error / norm), 1e-3);
}

TEST_P(LessLayerGolden, LossAndGradientsEqualTheAuthorsBackwardPass) {
  const std::string path = LessGoldenPath(GetParam());
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no golden vectors at " << path;
  const SafetensorsFile file = SafetensorsFile::Open(path);
  const Sidecar sidecar = LessGoldenSidecar(file);
  const SidecarShape& s = sidecar.shape;
  const LayerParams& p = sidecar.layers[0];
  const auto number = [&](const char* key) { return GoldenNumber(file, key); };
  const size_t n = number("seq"), batch_size = number("batch"), q_dim = s.n_heads * s.head_dim;
  const auto q = file.Values<float>("q"), k = file.Values<float>("k"), v = file.Values<float>("v");
  const auto visible = file.Values<uint8_t>("visible");
  std::vector<LessExample> examples(batch_size);
  std::vector<const LessExample*> batch;
  for (size_t b = 0; b < batch_size; ++b) {
    LessExample& e = examples[b];
    e.n_tokens = n;
    e.first_scored = number("heavy") + number("recent");
    auto slice = [&](const std::vector<float>& x) {
      return std::vector<float>(x.begin() + b * n * q_dim, x.begin() + (b + 1) * n * q_dim);
    };
    e.q = slice(q);
    e.k = slice(k);
    e.v = slice(v);
    for (size_t h = 0; h < s.n_heads; ++h) {
      for (size_t j = 0; j < n; ++j) {
        auto sees = [&](size_t t) { return visible[((b * s.n_heads + h) * n + t) * n + j] != 0; };
        size_t t = j;
        while (t < n && sees(t)) ++t;
        e.leave.push_back(static_cast<int32_t>(t));
        for (; t < n; ++t) ASSERT_FALSE(sees(t)) << "token " << j << " returns at " << t;
      }
    }
    FillExact(s, e);
    batch.push_back(&e);
  }
  const auto w_o = file.Values<float>("w_o");
  std::vector<float> metric(q_dim * q_dim);
  Gemm(true, false, q_dim, q_dim, q_dim, w_o.data(), q_dim, w_o.data(), q_dim, metric.data(), q_dim, false);
  for (float& m : metric) m /= static_cast<float>(q_dim);
  const LessLayer layer(s, p, metric);
  std::vector<float> gradient;
  const double loss = layer.LossAndGradient(batch, {}, gradient);
  const double want_loss = file.Values<float>("loss")[0];
  EXPECT_NEAR(loss, want_loss, 1e-3 * want_loss);
  const auto want_out = file.Values<float>("attn_out");
  for (size_t b = 0; b < batch_size; ++b) {
    const std::vector<float> output = layer.Output(examples[b]);
    for (size_t i = examples[b].first_scored * q_dim; i < n * q_dim; ++i)
      ASSERT_NEAR(output[i], want_out[b * n * q_dim + i], 1e-4);
  }
  LessLayer as_gradient(s, p, metric);  // reuses Export to cut the flat gradient into tensors
  as_gradient.parameters() = gradient;
  const LayerParams g = as_gradient.Export();
  ExpectClose(g.phi.w1, file.Values<float>("grad_kernel_q_mat1"), 1e-3, "A1");
  ExpectClose(g.phi.w2, file.Values<float>("grad_kernel_q_mat2"), 1e-3, "A2");
  const auto want_b1 = file.Values<float>("grad_kernel_k_mat1"), want_b2 = file.Values<float>("grad_kernel_k_mat2");
  if (IsBroken(want_b1) || IsBroken(want_b2)) {
    const NetLayout phi_at(s, false), psi_at(s, true);
    for (size_t h = 0; h < s.n_heads; ++h) {
      const size_t net = s.n_heads * phi_at.total + h * psi_at.total;
      ExpectDifferences(s, layer, gradient, batch, metric, net + psi_at.w1, net + psi_at.b1);
    }
  } else {
    ExpectClose(g.psi.w1, want_b1, 1e-3, "B1");
    ExpectClose(g.psi.w2, want_b2, 1e-3, "B2");
  }
  ExpectClose(g.d, file.Values<float>("grad_scalingD"), 1e-3, "d");
  ExpectClose(g.d2, file.Values<float>("grad_scalingD2"), 1e-3, "d2");
  ExpectClose(g.x, file.Values<float>("grad_interaction_k"), 1e-3, "X");
}

}  // namespace
}  // namespace lesskv::train
