#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>

#include "base/error.h"
#include "base/rng.h"
#include "kvcache/cache_batch.h"
#include "kvcache/registry.h"
#include "kvcache/residual/sidecar.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

// Two layers of two KV heads of 8; inputs of 3. Head h of layer l scores input h + l: the third does not count.
class Kvzap : public testing::Test {
 protected:
  void SetUp() override {
    path_ = testing::TempDir() + "/kvzap_" + testing::UnitTest::GetInstance()->current_test_info()->name() + ".less.gguf";
    SidecarScores& s = sidecar_.scores;
    s.n_kv_heads = {2, 2};
    s.width = 3;
    s.weight = {1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1};
    s.bias = {0, 0, 0, 5};
    s.r2 = {.5f, .5f, .5f, .5f};
    s.tokens = 8;
    sidecar_.model_fingerprint = 0x1234;
    WriteSidecar(path_, sidecar_);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::shared_ptr<const CacheConfig> Config(const std::string& spec, size_t width = 3, uint64_t fingerprint = 0x1234) {
    CacheShape shape = CacheShape::Uniform(2, 2, 2, 8, 200, {.n_dims = 8, .frequency_factors = {}});
    shape.input_width = width;
    return CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, {path_, fingerprint, 0});
  }

  // Two layers of one KV head, which scores the input's first or second number; `quantiles` [2, 99] or none.
  std::shared_ptr<const CacheConfig> OneHeadALayer(const std::string& spec, size_t ctx, std::vector<float> quantiles = {}) {
    SidecarScores& s = sidecar_.scores;
    s.n_kv_heads = {1, 1};
    s.weight = {1, 0, 0, 0, 1, 0};
    s.bias = {0, 0};
    s.r2 = {.5f, .5f};
    s.quantiles = std::move(quantiles);
    WriteSidecar(path_, sidecar_);
    CacheShape shape = CacheShape::Uniform(2, 1, 1, 8, ctx, {.n_dims = 8, .frequency_factors = {}});
    shape.input_width = 3;
    return CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, {path_, 0x1234, 0});
  }

  using Heads = std::vector<std::vector<int32_t>>;

  // Feeds inputs [n][3] in steps of these sizes; what head h of layer l then holds. `check` sees it after every step.
  static Heads Held(std::shared_ptr<const CacheConfig> config, const std::vector<float>& x,
                    const std::vector<size_t>& steps, StepKind kind,
                    const std::function<void(size_t seen, const Heads&)>& check = nullptr) {
    SequenceCache cache(std::move(config));
    size_t seen = 0;
    Heads held;
    for (const size_t n : steps) {
      cache.BeginStep(n, kind);
      const std::vector<float> zeros(n * 16);
      std::vector<float> out(n * 16);
      for (size_t layer = 0; layer < 2; ++layer) {
        EXPECT_TRUE(cache.WantsInputs(layer));
        // In two pieces, as a model's tiles come.
        cache.ReadInputs(layer, 0, n / 2, &x[seen * 3]);
        cache.ReadInputs(layer, n / 2, n - n / 2, &x[(seen + n / 2) * 3]);
        cache.Append(layer, zeros.data(), zeros.data());
        cache.Attend(layer, zeros.data(), out.data());
      }
      cache.EndStep();
      seen += n;
      held.clear();
      for (size_t layer = 0; layer < 2; ++layer)
        for (size_t h = 0; h < cache.config().shape().layers[layer].n_kv_heads; ++h) {
          held.emplace_back();
          for (const Position p : cache.ResidentPositions(layer, h)) held.back().push_back(ToInt(p));
        }
      if (check) check(seen, held);
    }
    return held;
  }

  // What head h of layer l gives a token.
  float Score(const std::vector<float>& x, size_t token, size_t head) const {
    float score = sidecar_.scores.bias[head];
    for (size_t c = 0; c < 3; ++c) score += sidecar_.scores.weight[head * 3 + c] * x[token * 3 + c];
    return score;
  }

  static std::string Refusal(const std::function<void()>& make) {
    try {
      make();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  Sidecar sidecar_;
  std::string path_;
};

using Rows = std::vector<std::vector<int32_t>>;

// Eight tokens; column c of the input is what heads of score c rank them by.
const std::vector<float> kInputs = {-3, 1, 0, -5, 2, 0, -4, 3, 0, -7, 4, 0, -2, 5, 0, -9, 6, 0, -8, 7, 0, -1, 8, 0};

TEST_F(Kvzap, TheBestScoresStayHoweverTheTextComes) {
  const Rows expected = {{0, 2, 4, 5, 6, 7}, {2, 3, 4, 5, 6, 7}, {2, 3, 4, 5, 6, 7}, {0, 1, 2, 5, 6, 7}};
  for (const std::vector<size_t>& steps : {std::vector<size_t>{8}, {4, 4}, {1, 1, 1, 1, 1, 1, 1, 1}, {7, 1}, {3, 5}})
    for (const StepKind kind : {StepKind::kPrompt, StepKind::kStream, StepKind::kDecode})
      EXPECT_EQ(Held(Config("kvzap(6, scope=head, window=3, sinks=0)+f32"), kInputs, steps, kind), expected) << steps.size();
}

// Two sequences in one step, whose tokens come in tiles that cross the border between them: each as alone.
TEST_F(Kvzap, SequencesOfAStepGetTheirOwnInputs) {
  SequenceCache a(Config("kvzap(6, scope=head, window=3, sinks=0)+f32")), b(Config("kvzap(5, scope=head, window=1, sinks=0)+f32"));
  std::vector<float> x(kInputs.begin(), kInputs.begin() + 5 * 3);
  x.insert(x.end(), kInputs.begin(), kInputs.end());  // five tokens of a, eight of b
  a.BeginStep(5, StepKind::kPrompt);
  b.BeginStep(8, StepKind::kPrompt);
  CacheBatch batch;
  SequenceCache* const caches[] = {&a, &b};
  batch.Start(caches);
  const std::vector<float> zeros(13 * 16);
  std::vector<float> out(13 * 16);
  for (size_t layer = 0; layer < 2; ++layer) {
    EXPECT_TRUE(batch.WantsInputs(layer));
    batch.ReadInputs(layer, 0, 3, x.data());
    batch.ReadInputs(layer, 3, 6, &x[3 * 3]);
    batch.ReadInputs(layer, 9, 4, &x[9 * 3]);
    batch.Append(layer, zeros.data(), zeros.data());
    batch.Attend(layer, zeros.data(), out.data());
  }
  a.EndStep();
  b.EndStep();
  const auto held = [](const SequenceCache& cache, size_t layer, size_t h) {
    std::vector<int32_t> positions;
    for (const Position p : cache.ResidentPositions(layer, h)) positions.push_back(ToInt(p));
    return positions;
  };
  EXPECT_EQ(held(a, 0, 0), (std::vector<int32_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(held(b, 0, 0), (std::vector<int32_t>{0, 1, 2, 4, 7}));
  EXPECT_EQ(held(b, 0, 1), (std::vector<int32_t>{3, 4, 5, 6, 7}));
  EXPECT_FALSE(batch.failure(0) || batch.failure(1));
}

TEST_F(Kvzap, SinksStayWhateverTheirScore) {
  EXPECT_EQ(Held(Config("kvzap(5, scope=head, window=1, sinks=2)+f32"), kInputs, {8}, StepKind::kPrompt)[1],
            (std::vector<int32_t>{0, 1, 5, 6, 7}));
}

// 4 x 4 rows, of which each head keeps its newest; the last head's scores are 5, the first's below 0: of the 12 others
// the best are the last head's 7 and 5 of the two that count to 8.
TEST_F(Kvzap, RowsGoToTheBestScoresOfTheModel) {
  for (const char* spec : {"kvzap(4, window=1, sinks=0)+f32", "kvzap(4, window=1, sinks=0)+pooled+f32"}) {
    const Rows held = Held(Config(spec), kInputs, {8}, StepKind::kPrompt);
    EXPECT_EQ(held[0], (std::vector<int32_t>{7}));
    // Scores 7, 6 and 5 of the second and third head, and the last head's seven fives, the lower heads first among equals.
    EXPECT_EQ(held[1], (std::vector<int32_t>{4, 5, 6, 7}));
    EXPECT_EQ(held[2], (std::vector<int32_t>{4, 5, 6, 7}));
    EXPECT_EQ(held[3], (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 7}));
  }
}

// 8 rows a layer: of the first the second head's scores are all the better; of the other 7 and 6, and of the fives one of
// its first head and three of its second.
TEST_F(Kvzap, RowsGoToTheBestScoresOfALayer) {
  EXPECT_EQ(Held(Config("kvzap(4, scope=layer, window=1, sinks=0)+f32"), kInputs, {8}, StepKind::kPrompt),
            (Rows{{7}, {1, 2, 3, 4, 5, 6, 7}, {4, 5, 6, 7}, {0, 1, 2, 7}}));
}

// Scores of a layer that rise by as much everywhere, as by twice its output projection, change nothing inside it: only what
// layers take from each other.
TEST_F(Kvzap, WhatALayerAddsEverywhereCountsBetweenLayersAlone) {
  Rng rng(6);
  std::vector<float> x(40 * 3);
  for (float& value : x) value = rng.Normal();
  const auto held = [&](const char* scope, float more) {
    sidecar_.scores.bias = {0, 0.25f, more, 0.5f + more};
    WriteSidecar(path_, sidecar_);
    return Held(Config(fmt::format("kvzap(9, scope={}, window=2, sinks=1)+f32", scope)), x, {40}, StepKind::kPrompt);
  };
  for (const char* scope : {"head", "layer"}) EXPECT_EQ(held(scope, std::log(2.0f)), held(scope, 0)) << scope;
  const Rows before = held("model", 0), after = held("model", std::log(2.0f));
  const auto of_first_layer = [](const Rows& rows) { return rows[0].size() + rows[1].size(); };
  EXPECT_LT(of_first_layer(after), of_first_layer(before));
}

// Two layers of one head, four rows in all; the layers' own best two, where they are as good, and three of one layer.
TEST_F(Kvzap, ScopesByHand) {
  const std::vector<float> even = {.9f, .8f, 0, .5f, .2f, 0, .1f, .7f, 0, .3f, .05f, 0};
  const std::vector<float> uneven = {.9f, .1f, 0, .8f, .2f, 0, .7f, .3f, 0, .6f, .4f, 0};
  const auto held = [&](const char* spec, const std::vector<float>& x) {
    return Held(OneHeadALayer(spec, 200), x, {4}, StepKind::kPrompt);
  };
  EXPECT_EQ(held("kvzap(2, window=0, sinks=0)", even), (Rows{{0, 1}, {0, 2}}));
  EXPECT_EQ(held("kvzap(2, window=0, sinks=0)", uneven), (Rows{{0, 1, 2}, {3}}));
  for (const char* apart : {"kvzap(2, scope=layer, window=0, sinks=0)", "kvzap(2, scope=head, window=0, sinks=0)",
                            "kvzap(2, window=0, sinks=0)+uniform"})
    EXPECT_EQ(held(apart, uneven), (Rows{{0, 1}, {2, 3}})) << apart;
}

// Scores of one head were even between 0 and 1, of the other between .5 and 1.5: of all, half reach .75, a quarter of the
// first head's and three quarters of the other's. Half of 100 rows a head, beside the one that always stays, are 25 and 75.
TEST_F(Kvzap, AStreamIsHeldToWhatTheQuantilesSay) {
  std::vector<float> quantiles;
  for (const float from : {0.0f, 0.5f})
    for (int q = 1; q <= 99; ++q) quantiles.push_back(from + 0.01f * static_cast<float>(q));
  Rng rng(4);
  std::vector<float> x(101 * 3);
  for (float& value : x) value = rng.Normal();
  const auto rows = [&](const char* spec, const std::vector<size_t>& steps, StepKind kind, std::vector<float> q, size_t ctx = 101) {
    std::vector<size_t> n;
    for (const auto& head : Held(OneHeadALayer(spec, ctx, std::move(q)), x, steps, kind)) n.push_back(head.size());
    return n;
  };
  const std::vector<size_t> chunks = {30, 30, 30, 11}, one = {101};
  using Sizes = std::vector<size_t>;
  for (const StepKind kind : {StepKind::kStream, StepKind::kDecode})
    EXPECT_EQ(rows("kvzap(51, window=1, sinks=0)", chunks, kind, quantiles), (Sizes{26, 76}));
  EXPECT_EQ(rows("kvzap(51, scope=layer, window=1, sinks=0)", chunks, StepKind::kStream, quantiles), (Sizes{51, 51}));
  EXPECT_EQ(rows("kvzap(51, scope=head, window=1, sinks=0)", chunks, StepKind::kStream, quantiles), (Sizes{51, 51}));
  // Of few rows of a long context: those that the best fiftieth of the other head's scores are, a hundredth of all.
  EXPECT_EQ(rows("kvzap(13, window=1, sinks=0)", chunks, StepKind::kStream, quantiles, 5000), (Sizes{1, 25}));
  // A prompt in one step is divided by its own scores, which are alike here.
  const Sizes own = rows("kvzap(51, window=1, sinks=0)", one, StepKind::kPrompt, quantiles);
  EXPECT_EQ(own[0] + own[1], 102u);
  EXPECT_NEAR(static_cast<double>(own[0]), 51, 15);
  EXPECT_EQ(own, rows("kvzap(51, window=1, sinks=0)", one, StepKind::kPrompt, {}));
  // They were read, and a file without them is refused where they are needed alone.
  EXPECT_EQ(ReadSidecar(path_).scores, sidecar_.scores);
  const auto made = [&](const char* spec) { return Refusal([&] { OneHeadALayer(spec, 101); }); };
  EXPECT_NE(made("kvzap(51)+prefill(chunk=8)").find("holds no quantiles"), std::string::npos) << made("kvzap(51)+prefill(chunk=8)");
  EXPECT_NE(Refusal([&] { rows("kvzap(51)", chunks, StepKind::kStream, {}); }).find("holds no quantiles"), std::string::npos);
  EXPECT_EQ(made("kvzap(51, scope=head)+prefill(chunk=8)"), "");
  EXPECT_EQ(made("kvzap(51)+split+prefill(chunk=8)").find("quantiles"), std::string::npos);
  std::swap(quantiles[3], quantiles[4]);
  EXPECT_NE(Refusal([&] { OneHeadALayer("kvzap(51)", 101, quantiles); }).find("must ascend"), std::string::npos);
}

// Each layer by its own heads' quantiles: what the first head of one lacks the second head of the other does.
TEST_F(Kvzap, AStreamsLayersHaveQuantilesOfTheirOwn) {
  for (const float from : {0.0f, 0.5f, 0.5f, 0.0f})
    for (int q = 1; q <= 99; ++q) sidecar_.scores.quantiles.push_back(from + 0.01f * static_cast<float>(q));
  WriteSidecar(path_, sidecar_);
  const std::vector<float> x(150 * 3);
  const Rows held = Held(Config("kvzap(41, scope=layer, window=1, sinks=0)"), x, {50, 100}, StepKind::kStream);
  EXPECT_LT(held[0].size(), 10u);
  EXPECT_EQ(held[0].size() + held[1].size(), 82u);
  EXPECT_EQ(held[2].size(), held[1].size());
  EXPECT_EQ(held[3].size(), held[0].size());
}

// A quarter of the rows is the window where none is given.
TEST_F(Kvzap, AWindowThatIsNotGivenIsAQuarter) {
  EXPECT_EQ(Held(Config("kvzap(6, scope=head, sinks=0)+f32"), kInputs, {8}, StepKind::kPrompt)[0],
            (std::vector<int32_t>{0, 1, 2, 3, 4, 7}));
}

TEST_F(Kvzap, AScopeDividesWhereNothingElseDoes) {
  const auto refused = [&](const char* spec, const char* why) {
    const std::string message = Refusal([&] { CacheSpec::Parse(spec); });
    EXPECT_NE(message.find(why), std::string::npos) << spec << ": " << message;
  };
  refused("kvzap(40)+kivi(4)", "divides rows at the end of a prompt");
  refused("kvzap(40)+csr", "divides rows at the end of a prompt");
  refused("kvzap(40, scope=layer)+ada", "divides its rows itself");
  refused("kvzap(40, scope=layer)+uniform", "divides its rows itself");
  refused("kvzap(threshold=-4, scope=head)", "of which a threshold knows none");
  refused("kvzap(40, scope=all)", "one of: model layer head");
  for (const char* spec : {"kvzap(40)+uniform", "kvzap(40, scope=head)+kivi(4)", "kvzap(40)+split+kivi(4)", "kvzap(40, scope=layer)",
                           "kvzap(40)+prefill(chunk=16)"})
    EXPECT_EQ(CacheSpec::Parse(spec).ToString(), spec);
  EXPECT_EQ(CacheSpec::Parse("kvzap(40, scope=model)").ToString(), "kvzap(40)");
  EXPECT_EQ(CacheSpec::Parse("h2o(40)+uniform").ToString(), "h2o(40)");
}

const std::vector<std::vector<size_t>> kFeedings = {{8}, {4, 4}, {1, 1, 1, 1, 1, 1, 1, 1}, {7, 1}, {3, 5}};
constexpr StepKind kKinds[] = {StepKind::kPrompt, StepKind::kStream, StepKind::kDecode};

// By hand: a score that equals the threshold stays, and heads hold as many rows as reach it.
TEST_F(Kvzap, AThresholdKeepsWhatReachesIt) {
  for (const std::vector<size_t>& steps : kFeedings)
    for (const StepKind kind : kKinds) {
      EXPECT_EQ(Held(Config("kvzap(threshold=-4, window=3, sinks=0)+f32"), kInputs, steps, kind)[0],
                (std::vector<int32_t>{0, 2, 4, 5, 6, 7}));
      EXPECT_EQ(Held(Config("kvzap(threshold=4, window=3, sinks=0)+f32"), kInputs, steps, kind),
                (Rows{{5, 6, 7}, {3, 4, 5, 6, 7}, {3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}}));
    }
}

// After t tokens: the sinks, the window and what reaches the threshold, whatever the steps; protected tokens, too.
TEST_F(Kvzap, AThresholdKeepsTheSameWhateverTheSteps) {
  Rng rng(5);
  std::vector<float> x(60 * 3);
  for (float& value : x) value = rng.Normal();
  const auto feed = [&](const char* spec, float threshold, size_t sinks, size_t window, std::vector<ProtectedSpan> protect) {
    SCOPED_TRACE(spec);
    CacheShape shape = CacheShape::Uniform(2, 2, 2, 8, 200, {.n_dims = 8, .frequency_factors = {}});
    shape.input_width = 3;
    const auto config = CacheConfig::Create(CacheSpec::Parse(spec), shape, protect, {path_, 0x1234, 0});
    const ProtectedSet always(protect);
    const auto check = [&](size_t seen, const Heads& held) {
      for (size_t head = 0; head < 4; ++head) {
        std::vector<int32_t> want;
        for (size_t t = 0; t < seen; ++t)
          if (t < sinks || t + window >= seen || Score(x, t, head) >= threshold ||
              always.Contains(Position(static_cast<int32_t>(t))))
            want.push_back(static_cast<int32_t>(t));
        ASSERT_EQ(held[head], want) << "head " << head << " after " << seen;
      }
    };
    const std::vector<size_t> ones(60, 1);
    for (const std::vector<size_t>& steps : {std::vector<size_t>{60}, {16, 16, 16, 12}, {45, 1, 1, 1, 7, 5}, {1, 2, 57}, ones})
      for (const StepKind kind : kKinds) Held(config, x, steps, kind, check);
  };
  feed("kvzap(threshold=0.25, window=5, sinks=2)+f32", .25f, 2, 5, {});
  feed("kvzap(threshold=-0.5, window=0, sinks=0)", -.5f, 0, 0, {});
  feed("kvzap(threshold=0.25, window=17)+bf16", .25f, 4, 17, {});
  feed("kvzap(threshold=1, window=3, sinks=0)+f32", 1, 0, 3, {{7, 9}, {30, 31}});
  feed("kvzap(threshold=0.25)", .25f, 4, 128, {});
}

// What reaches the threshold competes for the most rows as for a fixed number.
TEST_F(Kvzap, AThresholdKeepsAtMostItsMax) {
  for (const std::vector<size_t>& steps : kFeedings)
    for (const StepKind kind : kKinds) {
      EXPECT_EQ(Held(Config("kvzap(threshold=-100, max=6, window=3, sinks=0)+f32"), kInputs, steps, kind),
                Held(Config("kvzap(6, scope=head, window=3, sinks=0)+f32"), kInputs, steps, kind));
      EXPECT_EQ(Held(Config("kvzap(threshold=4, max=6, window=3, sinks=0)+f32"), kInputs, steps, kind),
                (Rows{{5, 6, 7}, {3, 4, 5, 6, 7}, {3, 4, 5, 6, 7}, {0, 1, 2, 5, 6, 7}}));
      // Two of the second head's scores are below the threshold, and more must leave.
      EXPECT_EQ(Held(Config("kvzap(threshold=2.5, max=4, window=1, sinks=0)+f32"), kInputs, steps, kind),
                (Rows{{7}, {4, 5, 6, 7}, {4, 5, 6, 7}, {0, 1, 2, 7}}));
    }
}

TEST_F(Kvzap, NotANumberReachesNoThreshold) {
  std::vector<float> inputs = kInputs;
  inputs[0] = inputs[4 * 3 + 1] = std::numeric_limits<float>::quiet_NaN();
  for (const std::vector<size_t>& steps : kFeedings) {
    const Rows held = Held(Config("kvzap(threshold=-4, window=3, sinks=0)+f32"), inputs, steps, StepKind::kStream);
    EXPECT_EQ(held[0], (std::vector<int32_t>{2, 5, 6, 7}));
    EXPECT_EQ(held[1], (std::vector<int32_t>{1, 2, 3, 5, 6, 7}));
  }
}

TEST_F(Kvzap, AThresholdIsInsteadOfRowsAndDividesThemItself) {
  const auto refused = [&](const char* spec, const char* why) {
    const std::string message = Refusal([&] { Config(spec); });
    EXPECT_NE(message.find(why), std::string::npos) << spec << ": " << message;
  };
  refused("kvzap", "needs its rows");
  refused("kvzap(6, threshold=-4)", "not both");
  refused("kvzap(6, max=9)", "bounds what a threshold keeps");
  refused("kvzap(threshold=-4, max=9, window=5)", "must exceed");
  refused("kvzap(threshold=x)", "must be a number");
  for (const char* divides : {"ada", "pooled", "pyramid", "zigzag", "split"})
    refused(fmt::format("kvzap(threshold=-4)+{}", divides).c_str(), "says itself how many rows");
  for (const char* codec : {"kivi(4)", "csr", "think(0.4)", "q8+recent(4)"})
    refused(fmt::format("kvzap(threshold=-4)+{}", codec).c_str(), "known only when they are chosen");
  // Only where it is given: a fixed number is divided as before.
  EXPECT_NO_THROW(CacheSpec::Parse("kvzap(40)+ada"));
  EXPECT_EQ(CacheSpec::Parse("kvzap(window=9, threshold=-4.50, max=20%)").ToString(),
            "kvzap(threshold=-4.5, max=20%, window=9)");
}

// The most is every token, or max; the least what always stays.
TEST_F(Kvzap, PlansOfAThresholdAreARange) {
  const CachePlan plan = Config("kvzap(threshold=0, window=30)")->Plan(100, 10);
  EXPECT_EQ(plan.rows_end, 110);
  EXPECT_EQ(plan.rows_end_least, 34);
  EXPECT_LT(plan.bytes_end_least, plan.bytes_end);
  const CachePlan capped = Config("kvzap(threshold=0, max=50, window=30)")->Plan(100, 10);
  EXPECT_EQ(capped.rows_end, 50);
  EXPECT_EQ(capped.rows_end_least, 34);
  const CachePlan few = Config("kvzap(threshold=0, window=30)")->Plan(20, 3);
  EXPECT_EQ(few.rows_end_least, 23);
  EXPECT_EQ(few.bytes_end_least, few.bytes_end);
  const auto with_span = [&](ProtectedSpan span) {
    return Config("kvzap(threshold=0, window=30)")->WithProtected({span})->Plan(100, 10).rows_end_least;
  };
  EXPECT_EQ(with_span({50, 53}), 37);
  EXPECT_EQ(with_span({2, 6}), 36);  // two of them are sinks
  EXPECT_EQ(with_span({78, 84}), 36);  // four lie in the window
}

// A cache that is filled without a text holds the most that a text could leave.
TEST_F(Kvzap, FilledWithoutATextAThresholdKeepsTheMost) {
  for (const char* spec : {"kvzap(threshold=-1, window=30)", "kvzap(threshold=-1, max=50)+prefill(chunk=16)"})
    for (const size_t n : {20, 150}) {
      SCOPED_TRACE(fmt::format("{} at {}", spec, n));
      const auto config = Config(spec);
      SequenceCache cache(config), restored(config);
      cache.FillRandom(n, 1);
      const CachePlan plan = config->Plan(n, 0);
      EXPECT_EQ(cache.Stats().kv_bytes, plan.bytes_after_prompt);
      EXPECT_LE(cache.Stats().kv_bytes_peak, plan.bytes_peak);
      EXPECT_EQ(cache.Stats().tokens_resident, plan.rows_end);
      const std::vector<std::byte> saved = cache.Serialize();
      restored.Restore(saved.data(), saved.size());
      EXPECT_EQ(restored.Serialize(), saved);
    }
}

TEST_F(Kvzap, ScoresAreASidecarAndBelongToAModel) {
  const Sidecar read = ReadSidecar(path_);
  EXPECT_EQ(read.scores, sidecar_.scores);
  EXPECT_FALSE(read.has_maps());
  const auto config = Config("kvzap(6, window=1)");
  EXPECT_EQ(config->sidecar_bytes(), 16 * sizeof(float));
  // With the fingerprint behind what has no name, so that it can be read again.
  EXPECT_NE(config->spec_text().find("kvzap(6, sidecar=\""), std::string::npos) << config->spec_text();
  EXPECT_NO_THROW(CacheSpec::Parse(config->spec_text()));
  EXPECT_NE(Refusal([&] { Config("kvzap(6, window=1)", 4); }).find("width 3"), std::string::npos);
  EXPECT_NE(Refusal([&] { Config("kvzap(6, window=1)", 0); }).find("without its model"), std::string::npos);
  EXPECT_NE(Refusal([&] { Config("kvzap(6, window=1)", 3, 0x99); }).find("belongs to the model"), std::string::npos);
  EXPECT_NE(Refusal([&] { Config("kvzap(6, window=2)"); }).find("must exceed"), std::string::npos);
  CacheShape shape = CacheShape::Uniform(3, 2, 2, 8, 200, {.n_dims = 8, .frequency_factors = {}});
  shape.input_width = 3;
  const auto three = [&] { CacheConfig::Create(CacheSpec::Parse("kvzap(6, window=1)"), shape, {}, {path_, 0x1234, 0}); };
  EXPECT_NE(Refusal(three).find("2 global layers of width 3, but the model has 3"), std::string::npos) << Refusal(three);
  sidecar_.scores.weight.resize(9);
  EXPECT_ANY_THROW({ WriteSidecar(path_, sidecar_); ReadSidecar(path_); });
}

}  // namespace
}  // namespace lesskv
