// What the cache offers to methods, shown by methods from outside the library (test_methods.cpp, example_method.h), and
// models whose layers differ.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <memory>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "cache_harness.h"
#include "kvcache/cache_batch.h"
#include "kvcache/registry.h"
#include "test_methods.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

constexpr TinyShape kShape{3, 4, 2, 10};

class Seams : public testing::Test {
 protected:
  static void SetUpTestSuite() { RegisterTestMethods(); }

  std::shared_ptr<const CacheConfig> Config(const std::string& spec, std::vector<ProtectedSpan> protect = {}) {
    return MakeConfig(spec, kShape, sidecar_, std::move(protect));
  }
  // All outputs of the usual life, one after the other.
  static std::vector<float> Run(SequenceCache& cache, const Text& text, size_t first = 0) {
    std::vector<float> all;
    for (const LifeStep& step : UsualLife()) {
      for (const auto& layer : Live(cache, text, first, step)) all.insert(all.end(), layer.begin(), layer.end());
      first += step.n;
    }
    return all;
  }

  TempSidecar sidecar_{kShape};
  Text text_ = RandomText(kShape, 120, 3);
};

// A store of its own layout (keys unrotated, rows in the order of the text, keys and values cut apart) gives what rows
// of the library give, under every kind of selector, budget and residual.
TEST_F(Seams, AStoreOfAnotherLayoutAnswersAsRows) {
  for (const std::string spec : {"full", "h2o(12)", "tova(10)", "snapkv(14, window=4)", "window(12, sinks=2)",
                                 "window(12, sinks=2, positions=cache)", "h2o(12)+less", "h2o(12)+pyramid+less",
                                 "h2o(12)+prefill(chunk=7)", "window(12)+less+prefill(chunk=5)", "sample(12)",
                                 "cascade(14, levels=3, sinks=2)", "h2o(12)+merge(weighted=true, keys=unrotated)",
                                 "elastic(0.3, weighted=true, keys=unrotated)", "snapkv(14, window=4)+match(lambda=3)", "h2o(40)+match(every=16)"})
    for (const std::string codec : {"plain", "plain(rotated=true)"}) {
      SCOPED_TRACE(spec + "+" + codec);
      SequenceCache rows(Config(spec + "+f32")), plain(Config(spec + "+" + codec));
      EXPECT_LT(RelativeError(Run(plain, text_), Run(rows, text_)), 2e-5);
      EXPECT_EQ(AllResident(plain, kShape), AllResident(rows, kShape));
      const auto copy = plain.Clone();
      SequenceCache restored(Config(spec + "+" + codec));
      const auto bytes = plain.Serialize();
      restored.Restore(bytes.data(), bytes.size());
      const std::vector<float> next = Feed(plain, text_, 96, 5, StepKind::kDecode)[1];
      EXPECT_EQ(Feed(*copy, text_, 96, 5, StepKind::kDecode)[1], next);
      EXPECT_EQ(Feed(restored, text_, 96, 5, StepKind::kDecode)[1], next);
    }
}

// Codecs whose rows leave in groups: whole groups of neighbours leave, by their summed votes; protected tokens keep theirs.
TEST_F(Seams, RowsLeaveInGroups) {
  for (const std::string spec : {"h2o(16)", "sample(16)", "tova(16)", "window(16, sinks=2)", "h2o(16)+less"}) {
    SCOPED_TRACE(spec);
    SequenceCache cache(Config(spec + "+plain(group=4)", {{9, 10}}));
    size_t seen = 0;
    std::vector<std::vector<int32_t>> before(kShape.n_layers * kShape.n_kv_heads);
    for (const LifeStep& step : UsualLife()) {
      Live(cache, text_, seen, step);
      for (int32_t t = static_cast<int32_t>(seen); t < static_cast<int32_t>(seen + step.n); ++t)
        for (auto& head : before) head.push_back(t);
      seen += step.n;
      const auto now = AllResident(cache, kShape);
      for (size_t i = 0; i < now.size(); ++i) {
        EXPECT_LE(now[i].size(), 16u);
        EXPECT_GE(now[i].size(), std::min<size_t>(seen, 13));
        EXPECT_EQ(now[i].back(), static_cast<int32_t>(seen) - 1);  // the unfinished group is not chosen from
        if (seen > 9) {
          EXPECT_TRUE(std::binary_search(now[i].begin(), now[i].end(), 9));
        }
        // What left are whole groups of what was there, in its order.
        for (size_t g = 0; g + 4 <= before[i].size(); g += 4) {
          size_t stay = 0;
          for (size_t r = 0; r < 4; ++r) stay += std::binary_search(now[i].begin(), now[i].end(), before[i][g + r]);
          EXPECT_TRUE(stay == 0 || stay == 4) << "group " << g / 4;
        }
      }
      before = now;
    }
  }
  EXPECT_THROW(CacheSpec::Parse("cascade(16)+plain(group=4)"), Error);
  EXPECT_THROW(CacheSpec::Parse("elastic(0.5)+plain(group=4)"), Error);
  EXPECT_NO_THROW(CacheSpec::Parse("elastic(0.5)+plain"));
  // By hand: window(4) over groups of two drops the oldest pair as soon as a fifth row is there.
  SequenceCache cache(Config("window(4, sinks=0)+plain(group=2)"));
  for (size_t t = 0; t < 5; ++t) Feed(cache, text_, t, 1, StepKind::kDecode);
  EXPECT_EQ(Resident(cache, 0, 0), (std::vector<int32_t>{2, 3, 4}));
}

// Doubling is exact, so the wrapper changes no bit.
TEST_F(Seams, ATermWrapsTheCodec) {
  for (const std::string spec : {"h2o(12)+f32", "full", "h2o(12)+less+bf16"}) {
    SequenceCache bare(Config(spec)), wrapped(Config(spec + "+scaled"));
    EXPECT_EQ(Run(wrapped, text_), Run(bare, text_)) << spec;
  }
  EXPECT_EQ(CacheSpec::Parse("scaled+f32+h2o(12)").ToString(), "h2o(12)+f32+scaled");
  EXPECT_THROW(CacheSpec::Parse("h2o(12)+average+scaled"), Error);
}

size_t TotalRows(const SequenceCache& cache) {
  size_t n = 0;
  for (const auto& head : AllResident(cache, kShape)) n += head.size();
  return n;
}

// Budgets of a layer, and of the model, that are known only when the prompt has been attended.
TEST_F(Seams, BudgetsAreDecidedLate) {
  for (const std::string budget : {"by_vote", "by_need"})
    for (const std::string spec : {"h2o(16)+f32", "snapkv(16, window=4)+less+f32", "h2o(16)+plain"}) {
      SCOPED_TRACE(spec + "+" + budget);
      SequenceCache late(Config(spec + "+" + budget)), uniform(Config(spec));
      const Outputs prompt = Feed(late, text_, 0, 45, StepKind::kPrompt);
      EXPECT_EQ(prompt, Feed(uniform, text_, 0, 45, StepKind::kPrompt));  // a prompt is attended in full
      EXPECT_EQ(TotalRows(late), 16 * kShape.n_layers * kShape.n_kv_heads);
      const auto held = AllResident(late, kShape);
      const auto [least, most] = std::minmax_element(held.begin(), held.end(), [](auto& a, auto& b) { return a.size() < b.size(); });
      EXPECT_LT(least->size(), 16u);
      EXPECT_GT(most->size(), 16u);
      const CacheStats stats = late.Stats();
      EXPECT_EQ(stats.tokens_resident + stats.tokens_dropped + stats.tokens_absorbed, 45);
      // All layers waited in full where the whole model decides; that is in the peak.
      if (budget == "by_need" && spec.find("plain") == std::string::npos) {
        EXPECT_GT(stats.kv_bytes_peak, kShape.n_layers * kShape.n_kv_heads * 45 * 2 * kShape.head_dim * sizeof(float));
      }
      for (size_t i = 45; i < 60; ++i) Feed(late, text_, i, 1, StepKind::kDecode);
      if (spec.find("snapkv") == std::string::npos) {
        EXPECT_EQ(TotalRows(late), 16 * kShape.n_layers * kShape.n_kv_heads);
      }
      const auto bytes = late.Serialize();
      SequenceCache restored(Config(spec + "+" + budget));
      restored.Restore(bytes.data(), bytes.size());
      const auto copy = late.Clone();
      const Outputs next = Feed(late, text_, 60, 30, StepKind::kPrompt);
      EXPECT_EQ(Feed(restored, text_, 60, 30, StepKind::kPrompt), next);
      EXPECT_EQ(Feed(*copy, text_, 60, 30, StepKind::kPrompt), next);
      EXPECT_EQ(AllResident(*copy, kShape), AllResident(late, kShape));
      EXPECT_EQ(restored.Stats().kv_bytes, late.Stats().kv_bytes);
    }
  EXPECT_THROW(CacheSpec::Parse("h2o(16)+by_need+prefill(chunk=8)"), Error);
}

// By hand: with keys of zero a query's output is the mean of the values it sees.
TEST_F(Seams, RowsAreMergedIntoRowsThatStay) {
  for (const std::string codec : {"f32", "plain", "plain(rotated=true)"}) {
    Text text = text_;
    for (auto& k : text.k) std::fill(k.begin(), k.end(), 0.0f);
    for (auto& v : text.v)
      for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i / (kShape.n_kv_heads * kShape.head_dim));
    SequenceCache cache(Config("window(3, sinks=1)+average+" + codec));
    const auto out = [&](size_t t) { return Feed(cache, text, t, 1, StepKind::kDecode)[2][7]; };
    EXPECT_FLOAT_EQ(out(0), 0);
    EXPECT_FLOAT_EQ(out(1), 0.5f);
    EXPECT_FLOAT_EQ(out(2), 1);
    EXPECT_FLOAT_EQ(out(3), 6 / 4.0f);             // then token 1 leaves: row 0 becomes (0 + 1) / 2
    EXPECT_FLOAT_EQ(out(4), (0.5f + 2 + 3 + 4) / 4);  // then token 2: (0.5 + 2) / 2
    EXPECT_FLOAT_EQ(out(5), (1.25f + 3 + 4 + 5) / 4);
    const CacheStats stats = cache.Stats();
    EXPECT_EQ(stats.tokens_merged, 3);
    EXPECT_EQ(stats.tokens_resident + stats.tokens_merged + stats.tokens_dropped, 6);
  }
}

// Rows that leave several sequences are absorbed together. Where that fails, it does for those of this residual alone.
TEST_F(Seams, WhatCannotBeAbsorbedLeavesOtherSequencesAlone) {
  constexpr size_t kTokens = 20;
  const auto less = Config("h2o(12)+less"), fails = Config("h2o(12)+fails");
  const std::shared_ptr<const CacheConfig> configs[] = {less, fails, Config("h2o(12)"), fails, less};
  std::vector<std::unique_ptr<SequenceCache>> caches;
  std::vector<SequenceCache*> pointers;
  Text text{0, {{}, {}, {}}, {{}, {}, {}}, {{}, {}, {}}};  // the same tokens for each
  for (const auto& config : configs) {
    for (const auto rows : {&Text::q, &Text::k, &Text::v})
      for (size_t l = 0; l < kShape.n_layers; ++l) {
        const std::vector<float>& from = (text_.*rows)[l];
        std::copy_n(from.begin(), from.size() / text_.n * kTokens, std::back_inserter((text.*rows)[l]));
      }
    text.n += kTokens;
    caches.push_back(std::make_unique<SequenceCache>(config));
    caches.back()->BeginStep(kTokens, StepKind::kPrompt);
    pointers.push_back(caches.back().get());
  }
  CacheBatch batch;
  batch.Start(pointers);
  const Outputs together = RunLayers(batch, kShape, text, 0, text.n);
  for (size_t i = 0; i < caches.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_EQ(batch.failure(i) != nullptr, configs[i] == fails);
    if (configs[i] == fails) continue;
    SequenceCache alone(configs[i]);
    const Outputs outputs = Feed(alone, text, 0, kTokens, StepKind::kPrompt);
    for (size_t l = 0; l < kShape.n_layers; ++l)
      EXPECT_TRUE(std::equal(outputs[l].begin(), outputs[l].end(), &together[l][i * outputs[l].size()]));
    caches[i]->EndStep();
    EXPECT_EQ(caches[i]->Serialize(), alone.Serialize());
  }
}

// The method of docs/kv-cache.md keeps what every method keeps.
TEST_F(Seams, AMethodFromOutsideIsAMethod) {
  EXPECT_EQ(CacheSpec::Parse("less+sample(5%, recent=4)").ToString(), "sample(5%)+less");
  EXPECT_THROW(CacheSpec::Parse("sample"), Error);
  const auto config = Config("sample(12)+less+f32+pyramid(2)", {{5, 7}});
  SequenceCache cache(config);
  Run(cache, text_);
  for (const auto& held : AllResident(cache, kShape)) {
    EXPECT_TRUE(std::binary_search(held.begin(), held.end(), 5));
    EXPECT_TRUE(std::binary_search(held.begin(), held.end(), 6));
    EXPECT_TRUE(std::binary_search(held.begin(), held.end(), 94));
  }
  EXPECT_EQ(TotalRows(cache), 12 * kShape.n_layers * kShape.n_kv_heads);
  EXPECT_EQ(config->Plan(45, 20).bytes_end > 0, true);
}

// Exact attention of a layer in double, a query seeing the last `window` tokens (0: all before it).
std::vector<double> Exact(const LayerShape& shape, const Text& text, size_t layer, size_t query, size_t window) {
  const size_t d = shape.head_dim;
  std::vector<float> q(text.q[layer].begin() + static_cast<ptrdiff_t>(query * shape.q_dim()),
                       text.q[layer].begin() + static_cast<ptrdiff_t>((query + 1) * shape.q_dim()));
  const int32_t at = static_cast<int32_t>(query);
  RotateRows(*shape.rope, q.data(), 1, shape.q_dim(), shape.n_heads, d, &at);
  std::vector<double> out(shape.q_dim());
  const size_t first = window == 0 || query + 1 < window ? 0 : query + 1 - window;
  for (size_t head = 0; head < shape.n_heads; ++head) {
    const size_t h = head / shape.group();
    std::vector<double> p;
    for (size_t j = first; j <= query; ++j) {
      std::vector<float> k(&text.k[layer][(j * shape.n_kv_heads + h) * d], &text.k[layer][(j * shape.n_kv_heads + h) * d] + d);
      const int32_t position = static_cast<int32_t>(j);
      RotateRows(*shape.rope, k.data(), 1, d, 1, d, &position);
      double score = 0;
      for (size_t c = 0; c < d; ++c) score += double(q[head * d + c]) * k[c];
      p.push_back(std::exp(score * shape.scale));
    }
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (size_t j = first; j <= query; ++j)
      for (size_t c = 0; c < d; ++c)
        out[head * d + c] += p[j - first] / sum * text.v[layer][(j * shape.n_kv_heads + h) * d + c];
  }
  return out;
}

// Layers 0 and 2 are local with a rope of their own; layer 1 is global.
CacheShape MixedShape(size_t window) {
  CacheShape shape = MakeCacheShape(kShape);
  const auto rope = std::make_shared<RopeTable>(RopeConfig{.n_dims = 10, .base = 7.0, .frequency_factors = {}});
  for (const size_t local : {size_t{0}, size_t{2}}) {
    shape.layers[local].window = window;
    shape.layers[local].rope = rope;
    shape.layers[local].scale = 0.2f;
  }
  return shape;
}

TEST_F(Seams, LocalLayersSeeTheirWindowAndKeepNoMore) {
  for (const size_t window : {1, 2, 9, 50})
    for (const std::string spec : {"full+f32", "h2o(200)+f32", "full+f32+prefill(chunk=7)", "full+plain"}) {
      SCOPED_TRACE(testing::Message() << spec << ", window " << window);
      const CacheShape shape = MixedShape(window);
      SequenceCache cache(CacheConfig::Create(CacheSpec::Parse(spec), shape));
      size_t seen = 0;
      for (const LifeStep& step : UsualLife()) {
        const Outputs out = Live(cache, text_, seen, step);
        for (size_t layer = 0; layer < 3; ++layer)
          for (size_t i = 0; i < step.n; ++i) {
            const std::vector<double> want = Exact(shape.layers[layer], text_, layer, seen + i, shape.layers[layer].window);
            for (size_t c = 0; c < want.size(); ++c)
              ASSERT_NEAR(out[layer][i * want.size() + c], want[c], 2e-5) << "layer " << layer << ", token " << seen + i;
          }
        seen += step.n;
        for (size_t h = 0; h < kShape.n_kv_heads; ++h) {
          EXPECT_EQ(Resident(cache, 1, h).size(), seen);
          EXPECT_EQ(Resident(cache, 2, h).size(), std::min(seen, std::max<size_t>(window, 2) - 1));
        }
        EXPECT_EQ(cache.Stats().tokens_resident, static_cast<double>(seen));  // local layers are not in it
        EXPECT_EQ(cache.Stats().kv_bytes_full,
                  (seen + 2 * std::min(seen, window)) * kShape.n_kv_heads * kShape.head_dim * 2 * 2);
      }
    }
}

// Long prompts are attended in tiles, each of which sees the window before it.
TEST_F(Seams, LocalLayersOfLongPromptsSeeTheirWindow) {
  CacheShape shape = MixedShape(9);
  shape.ctx = 600;
  const Text text = RandomText(kShape, 600, 5);
  SequenceCache cache(CacheConfig::Create(CacheSpec::Parse("full+f32"), shape));
  const Outputs out = Feed(cache, text, 0, 600, StepKind::kPrompt);
  for (const size_t query : {511, 512, 515, 521, 599}) {
    const std::vector<double> want = Exact(shape.layers[2], text, 2, query, 9);
    for (size_t c = 0; c < want.size(); ++c) ASSERT_NEAR(out[2][query * want.size() + c], want[c], 2e-5) << query;
  }
}

// More rows than are absorbed at a time, from keys that are stored unrotated: each at its own position.
TEST_F(Seams, WhatLeavesALongPromptIsAbsorbedWhereItStood) {
  TinyShape shape = kShape;
  shape.ctx = 1200;
  const Text text = RandomText(shape, 1100, 6);
  const auto state = [&](const std::string& spec) {
    const auto config = MakeConfig(spec, shape, sidecar_);
    SequenceCache cache(config);
    Feed(cache, text, 0, 1100, StepKind::kPrompt);
    std::vector<float> floats(config->global().heads.size() * config->global().residual->StateFloats());
    const std::vector<std::byte> bytes = cache.Serialize();  // which states end
    const size_t n = floats.size() * sizeof(float);
    std::memcpy(floats.data(), bytes.data() + bytes.size() - n, n);
    return floats;
  };
  EXPECT_LT(RelativeError(state("window(9)+less+plain"), state("window(9)+less+f32")), 1e-5);
}

// What a spec says is about the global layers: there nothing changes when local ones stand beside them.
TEST_F(Seams, LocalLayersAreExemptFromTheSpec) {
  const CacheShape mixed = MixedShape(9);
  CacheShape global = mixed;
  global.layers = {mixed.layers[1]};
  TinyShape one = kShape;
  one.n_layers = 1;
  const TempSidecar maps(one);
  Text alone = text_;
  for (auto* x : {&alone.q, &alone.k, &alone.v}) *x = {(*x)[1]};
  for (const std::string spec : {"h2o(12)+less", "tova(12)+pyramid", "snapkv(14, window=4)", "window(12)+prefill(chunk=7)",
                                 "h2o(12)+zigzag+ada", "snapkv(14, window=4)+pooled", "kvzap(12)", "kvzap(12, scope=layer)", "h2o(12)+split(3)",
                                 "cluster(14, sinks=3, size=4, every=9, add=3, skip=0)"}) {
    SCOPED_TRACE(spec);
    const auto config = CacheConfig::Create(CacheSpec::Parse(spec), mixed, {}, maps.source());
    SequenceCache a(config), b(CacheConfig::Create(CacheSpec::Parse(spec), global, {}, maps.source()));
    size_t seen = 0;
    for (const LifeStep& step : UsualLife()) {
      EXPECT_EQ(Live(a, text_, seen, step)[1], Live(b, alone, seen, step)[0]);
      seen += step.n;
    }
    EXPECT_EQ(Resident(a, 1, 0), Resident(b, 0, 0));
    EXPECT_EQ(a.Stats().tokens_resident, b.Stats().tokens_resident);
    const auto bytes = a.Serialize();
    SequenceCache restored(config);
    restored.Restore(bytes.data(), bytes.size());
    EXPECT_EQ(Feed(restored, text_, seen, 4, StepKind::kDecode), Feed(a, text_, seen, 4, StepKind::kDecode));
    const CachePlan plan = config->Plan(45, 20);
    SequenceCache planned(config);
    Live(planned, text_, 0, {45, StepKind::kPrompt});
    for (size_t i = 0; i < 20; ++i) Feed(planned, text_, 45 + i, 1, StepKind::kDecode);
    EXPECT_EQ(plan.bytes_end, planned.Stats().kv_bytes);
    EXPECT_EQ(plan.bytes_peak, planned.Stats().kv_bytes_peak);
  }
}

}  // namespace
}  // namespace lesskv
