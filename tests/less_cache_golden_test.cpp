// The whole cache against numbers from the authors' own modules (golden/less of the shared test data): the same tokens
// kept after the prompt and after each step, the same outputs, the same final state.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "cache_harness.h"
#include "format/safetensors.h"
#include "kvcache/residual/less_golden.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

struct Golden {
  TinyShape shape;
  size_t rank, heavy, recent, prompt, steps;
  std::string spec;
  Text text;
};

Golden Load(const SafetensorsFile& file) {
  const auto number = [&](const char* key) { return GoldenNumber(file, key); };
  Golden g;
  g.shape = {1, number("n_heads"), number("n_heads"), number("head_dim"), 4096};
  g.rank = number("rank");
  g.heavy = number("heavy");
  g.recent = number("recent");
  g.prompt = number("prompt");
  g.steps = number("steps");
  const bool is_h2o = file.Metadata("policy") == "h2o";
  g.spec = is_h2o ? fmt::format("h2o(heavy={}, recent={})+f32", g.heavy, g.recent)
                  : fmt::format("window({}, sinks={})+f32", g.heavy + g.recent, g.heavy);
  g.text = {g.prompt + g.steps, {file.Values<float>("q")}, {file.Values<float>("k")}, {file.Values<float>("v")}};
  return g;
}

class LessCacheGolden : public testing::TestWithParam<const char*> {
 protected:
  // Runs the prompt and the steps; kept sets and outputs against the file's.
  void Run(SequenceCache& cache, const SafetensorsFile& file, const Golden& g, const std::string& kind) {
    const auto want_out = file.Values<float>("out_" + kind);
    const auto want_kept = file.Values<uint8_t>("kept_" + kind);
    const size_t row = g.shape.n_heads * g.shape.head_dim, n = g.text.n;
    double worst = 0;
    for (size_t i = 0; i <= g.steps; ++i) {
      const size_t first = i == 0 ? 0 : g.prompt + i - 1, n_step = i == 0 ? g.prompt : 1;
      const auto out = Live(cache, g.text, first, {n_step, i == 0 ? StepKind::kPrompt : StepKind::kDecode})[0];
      for (size_t j = 0; j < out.size(); ++j)
        worst = std::max(worst, std::fabs(double(out[j]) - want_out[first * row + j]));
      for (size_t h = 0; h < g.shape.n_heads; ++h) {
        std::vector<int32_t> want;
        for (size_t j = 0; j < n; ++j)
          if (want_kept[(i * g.shape.n_heads + h) * n + j]) want.push_back(static_cast<int32_t>(j));
        ASSERT_EQ(Resident(cache, 0, h), want) << kind << ", step " << i << ", head " << h;
      }
    }
    EXPECT_LE(worst, 1e-4) << kind;
  }
};

TEST_P(LessCacheGolden, EqualsTheAuthorsModules) {
  const std::string path = SharedFile(std::string("golden/less/") + GetParam());
  if (path.empty()) GTEST_SKIP() << "no shared test data: golden/less/" << GetParam();
  const SafetensorsFile file = SafetensorsFile::Open(path);
  const Golden g = Load(file);
  const CacheShape shape = MakeCacheShape(g.shape, 0);  // the file's queries and keys are rotated already

  SequenceCache sparse(CacheConfig::Create(CacheSpec::Parse(g.spec), shape));
  Run(sparse, file, g, "sparse");

  const std::string maps =
      (std::filesystem::temp_directory_path() / fmt::format("lesskv-golden-{}.gguf", getpid())).string();
  WriteSidecar(maps, LessGoldenSidecar(file));
  for (const char* less : {"+less", "+less(clamp=true)"}) {
    SequenceCache cache(CacheConfig::Create(CacheSpec::Parse(g.spec + less), shape, {}, {maps, 0}));
    Run(cache, file, g, "less");
    // The states close a saved cache: per head H [rank, head_dim], then z [rank].
    const auto want_h = file.Values<float>("final_H"), want_z = file.Values<float>("final_z");
    const size_t h_size = g.rank * g.shape.head_dim, head_size = h_size + g.rank;
    std::vector<float> states(g.shape.n_heads * head_size);
    const auto bytes = cache.Serialize();
    std::memcpy(states.data(), bytes.data() + bytes.size() - states.size() * sizeof(float),
                states.size() * sizeof(float));
    for (size_t h = 0; h < g.shape.n_heads; ++h) {
      for (size_t i = 0; i < h_size; ++i) ASSERT_NEAR(states[h * head_size + i], want_h[h * h_size + i], 1e-4) << less;
      for (size_t r = 0; r < g.rank; ++r)
        ASSERT_NEAR(states[h * head_size + h_size + r], want_z[h * g.rank + r], 1e-4) << less;
    }
  }
  std::filesystem::remove(maps);
}

INSTANTIATE_TEST_SUITE_P(Files, LessCacheGolden,
                         testing::Values("decode_h2o.safetensors", "decode_h2o_short_prompt.safetensors",
                                         "decode_lambda.safetensors"),
                         [](const auto& golden) {
                           const std::string name = golden.param;
                           return name.substr(0, name.find('.'));
                         });

}  // namespace
}  // namespace lesskv
