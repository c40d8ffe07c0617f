// Against numbers from the authors' own modules (golden/less of the shared test data): a prompt, then single steps, with
// the policy and the exact attention in double precision here and the state in LessResidual.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "format/safetensors.h"
#include "kvcache/residual/less.h"
#include "kvcache/residual/less_golden.h"

namespace lesskv {
namespace {

struct Golden {
  size_t n_heads, dim, rank, heavy, recent, prompt, steps;
  bool is_h2o;
  std::vector<float> q, k, v;
  Sidecar sidecar;
};

Golden LoadDecode(const SafetensorsFile& file) {
  const auto number = [&](const char* key) { return GoldenNumber(file, key); };
  return {.n_heads = number("n_heads"),
          .dim = number("head_dim"),
          .rank = number("rank"),
          .heavy = number("heavy"),
          .recent = number("recent"),
          .prompt = number("prompt"),
          .steps = number("steps"),
          .is_h2o = file.Metadata("policy") == "h2o",
          .q = file.Values<float>("q"),
          .k = file.Values<float>("k"),
          .v = file.Values<float>("v"),
          .sidecar = LessGoldenSidecar(file)};
}

// One head's cache: which tokens are resident, H2O's scores, the state.
struct Head {
  std::vector<char> kept;
  std::vector<double> score;
  std::vector<float> state;
};

class Decoder {
 public:
  Decoder(const Golden& golden, const Residual* less) : g_(golden), less_(less), heads_(golden.n_heads) {
    const size_t n = g_.prompt + g_.steps;
    for (Head& head : heads_) head = {std::vector<char>(n), std::vector<double>(n), {}};
    if (less_)
      for (Head& head : heads_) head.state.resize(less_->StateFloats());
  }

  // Attention of token t of head h over resident tokens and itself; its probabilities go to H2O's scores.
  std::vector<float> Attend(size_t t, size_t h) {
    Head& head = heads_[h];
    head.kept[t] = 1;
    std::vector<double> p(t + 1);
    double mass = 0;
    for (size_t j = 0; j <= t; ++j) mass += p[j] = head.kept[j] ? std::exp(Score(t, j, h)) : 0.0;
    std::vector<double> out(g_.dim);
    for (size_t j = 0; j <= t; ++j) {
      head.score[j] += p[j] / mass;
      for (size_t d = 0; d < g_.dim; ++d) out[d] += p[j] / mass * g_.v[(j * g_.n_heads + h) * g_.dim + d];
    }
    if (less_ && t >= g_.prompt) MergeState(t, h, std::log(mass), out);
    return std::vector<float>(out.begin(), out.end());
  }

  void Evict(size_t seen, size_t h) {
    if (seen <= g_.heavy + g_.recent) return;
    Head& head = heads_[h];
    std::vector<size_t> old;
    for (size_t j = 0; j < seen - g_.recent; ++j)
      if (head.kept[j]) old.push_back(j);
    if (g_.is_h2o)
      std::stable_sort(old.begin(), old.end(), [&](size_t a, size_t b) { return head.score[a] > head.score[b]; });
    std::vector<float> k, v;
    for (size_t i = g_.heavy; i < old.size(); ++i) {
      const size_t row = (old[i] * g_.n_heads + h) * g_.dim;
      k.insert(k.end(), &g_.k[row], &g_.k[row] + g_.dim);
      v.insert(v.end(), &g_.v[row], &g_.v[row] + g_.dim);
      head.kept[old[i]] = 0;
    }
    if (less_ && !k.empty())
      less_->Absorb(0, std::vector<EvictedRows>{{h, k.size() / g_.dim, k.data(), v.data(), head.state.data()}});
  }

  const Head& head(size_t h) const { return heads_[h]; }

 private:
  double Score(size_t t, size_t j, size_t h) const {
    double sum = 0;
    for (size_t d = 0; d < g_.dim; ++d)
      sum += double(g_.q[(t * g_.n_heads + h) * g_.dim + d]) * g_.k[(j * g_.n_heads + h) * g_.dim + d];
    return sum / std::sqrt(double(g_.dim));
  }

  void MergeState(size_t t, size_t h, double lse, std::vector<double>& out) const {
    std::vector<float> states;
    for (const Head& head : heads_) states.insert(states.end(), head.state.begin(), head.state.end());
    std::vector<float> state_out(g_.n_heads * g_.dim), state_lse(g_.n_heads);
    const ResidualQuery query{&g_.q[t * g_.n_heads * g_.dim], 1, states.data(), state_out.data(), state_lse.data()};
    less_->Attend(0, {&query, 1});
    const double gate = 1 / (1 + std::exp(double(state_lse[h]) - lse));
    for (size_t d = 0; d < g_.dim; ++d) out[d] = gate * out[d] + (1 - gate) * state_out[h * g_.dim + d];
  }

  const Golden& g_;
  const Residual* less_;
  std::vector<Head> heads_;
};

std::vector<LayerShape> OneLayer(size_t n_heads, size_t dim) { return {{n_heads, n_heads, dim, UsualScale(dim), nullptr, 0}}; }

class LessGolden : public testing::TestWithParam<std::tuple<const char*, bool>> {};

// Outputs within 1e-4, kept sets identical, final H and z within 1e-4, with and without the reference's clamps.
TEST_P(LessGolden, DecodeEqualsTheAuthorsModules) {
  const auto [name, clamp] = GetParam();
  const std::string path = LessGoldenPath(name);
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no golden vectors at " << path;
  const SafetensorsFile file = SafetensorsFile::Open(path);
  const Golden g = LoadDecode(file);
  const auto less = MakeLessResidual({clamp}, OneLayer(g.n_heads, g.dim), FeatureMaps::Create(g.sidecar));
  for (const Residual* residual : {static_cast<const Residual*>(nullptr), less.get()}) {
    const auto want_out = file.Values<float>(residual ? "out_less" : "out_sparse");
    const auto want_kept = file.Values<uint8_t>(residual ? "kept_less" : "kept_sparse");
    Decoder decoder(g, residual);
    double worst = 0;
    const size_t n = g.prompt + g.steps;
    for (size_t t = 0; t < n; ++t) {
      for (size_t h = 0; h < g.n_heads; ++h) {
        const std::vector<float> out = decoder.Attend(t, h);
        for (size_t d = 0; d < g.dim; ++d)
          worst = std::max(worst, std::fabs(double(out[d]) - want_out[(t * g.n_heads + h) * g.dim + d]));
        if (t + 1 < g.prompt) continue;
        decoder.Evict(t + 1, h);
        for (size_t j = 0; j < n; ++j)
          ASSERT_EQ(decoder.head(h).kept[j], want_kept[((t + 1 - g.prompt) * g.n_heads + h) * n + j])
              << "step " << t << " head " << h << " token " << j;
      }
    }
    EXPECT_LE(worst, 1e-4);
    if (!residual) continue;
    const auto want_h = file.Values<float>("final_H"), want_z = file.Values<float>("final_z");
    for (size_t h = 0; h < g.n_heads; ++h) {
      const std::vector<float>& state = decoder.head(h).state;
      for (size_t i = 0; i < g.rank * g.dim; ++i) EXPECT_NEAR(state[i], want_h[h * g.rank * g.dim + i], 1e-4);
      for (size_t r = 0; r < g.rank; ++r) EXPECT_NEAR(state[g.rank * g.dim + r], want_z[h * g.rank + r], 1e-4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Files, LessGolden,
                         testing::Combine(testing::Values("decode_h2o.safetensors", "decode_h2o_short_prompt.safetensors",
                                                          "decode_lambda.safetensors"),
                                          testing::Bool()));

}  // namespace
}  // namespace lesskv
