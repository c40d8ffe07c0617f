// Every selector, budget and LESS against the slow oracle: the same tokens, ties included, and the same outputs, in
// one-shot prompts, streams of several step sizes and decoding.
#include "kvcache/budget/pyramid.h"
#include "selector_oracle.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/threads.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

struct Case {
  const char* spec;
  OracleOptions options;
  bool less = false;
};

const Case kCases[] = {
    {"full+f32", {}},
    {"window(8, sinks=2)+f32", {.policy = Policy::kWindow, .rows = 8, .sinks = 2}},
    {"window(17, sinks=0)+f32", {.policy = Policy::kWindow, .rows = 17}},
    {"window(9, sinks=3, positions=cache)+f32",
     {.policy = Policy::kWindow, .rows = 9, .sinks = 3, .cache_positions = true}},
    {"window(12, sinks=4, extra=2)+f32+pyramid(4)",
     {.policy = Policy::kWindow, .rows = 14, .sinks = 4, .pyramid_beta = 4}},
    {"h2o(11)+f32", {.policy = Policy::kH2o, .rows = 11, .recent = 5}},
    {"h2o(5%)+f32", {.policy = Policy::kH2o, .rows = 12, .recent = 6}},
    {"h2o(10, extra=3)+f32", {.policy = Policy::kH2o, .rows = 13, .recent = 6}},
    {"h2o(heavy=17, recent=2)+f32", {.policy = Policy::kH2o, .rows = 19, .recent = 2}},
    {"h2o(heavy=0, recent=7)+f32", {.policy = Policy::kH2o, .rows = 7, .recent = 7}},
    {"h2o(heavy=9, recent=0)+f32", {.policy = Policy::kH2o, .rows = 9}},
    {"h2o(20)+pyramid(3)+f32", {.policy = Policy::kH2o, .rows = 20, .recent = 10, .pyramid_beta = 3}},
    {"tova(10)+f32", {.policy = Policy::kTova, .rows = 10}},
    {"tova(1)+f32", {.policy = Policy::kTova, .rows = 1}},
    {"tova(12)+pyramid+f32", {.policy = Policy::kTova, .rows = 12, .pyramid_beta = 20}},
    {"snapkv(16)+f32", {.policy = Policy::kSnapkv, .rows = 16, .window = 8}},
    {"snapkv(16, window=3, kernel=3)+f32", {.policy = Policy::kSnapkv, .rows = 16, .window = 3, .kernel = 3}},
    {"snapkv(12, window=5, kernel=1)+f32", {.policy = Policy::kSnapkv, .rows = 12, .window = 5, .kernel = 1}},
    {"snapkv(13, window=4, kernel=5, pool=avg)+f32",
     {.policy = Policy::kSnapkv, .rows = 13, .window = 4, .kernel = 5, .average = true}},
    {"snapkv(18, window=4)+pyramid(5)+f32", {.policy = Policy::kSnapkv, .rows = 18, .window = 4, .pyramid_beta = 5}},
    {"h2o(11)+less+f32", {.policy = Policy::kH2o, .rows = 11, .recent = 5}, true},
    {"window(8, sinks=2)+less+f32", {.policy = Policy::kWindow, .rows = 8, .sinks = 2}, true},
    {"tova(10)+less+f32", {.policy = Policy::kTova, .rows = 10}, true},
    {"snapkv(12, window=5)+less+f32", {.policy = Policy::kSnapkv, .rows = 12, .window = 5}, true},
};

struct Tally {
  size_t choices = 0, adopted = 0;
};

void Compare(const TinyShape& shape, const Case& c, const Text& text, const std::vector<LifeStep>& life, Tally& tally,
             std::vector<ProtectedSpan> protect = {}) {
  const TempSidecar sidecar(shape);
  OracleOptions options = c.options;
  if (c.less) options.less = &sidecar.sidecar();
  for (const ProtectedSpan& span : protect) options.protect.push_back({span.begin, span.end});
  SequenceCache cache(MakeConfig(c.spec, shape, sidecar, protect));
  OracleCache oracle(shape, options);
  size_t seen = 0;
  for (const LifeStep& step : life) {
    const Outputs got = Feed(cache, text, seen, step.n, step.kind);
    const auto want = oracle.Step(text, step.n, step.kind);
    seen += step.n;
    for (size_t l = 0; l < shape.n_layers; ++l) {
      const std::vector<float> want_floats(want[l].begin(), want[l].end());
      ASSERT_LE(RelativeError(got[l], want_floats), 1e-5) << "layer " << l << " after " << seen;
      for (size_t h = 0; h < shape.n_kv_heads; ++h) {
        ++tally.choices;
        const auto held = Resident(cache, l, h);
        if (held == oracle.Kept(l, h)) continue;
        ASSERT_TRUE(oracle.Ambiguous(l, h))
            << "layer " << l << ", head " << h << " after " << seen << ": holds " << testing::PrintToString(held)
            << ", should hold " << testing::PrintToString(oracle.Kept(l, h));
        oracle.Adopt(l, h, held);
        ++tally.adopted;
      }
    }
  }
}

std::vector<std::vector<LifeStep>> Lives() {
  std::vector<std::vector<LifeStep>> lives = {UsualLife()};
  for (size_t s : {1, 3, 8}) lives.push_back(std::vector<LifeStep>(64 / s, {s, StepKind::kStream}));
  lives.push_back(std::vector<LifeStep>(40, {1, StepKind::kDecode}));
  lives.push_back({{5, StepKind::kPrompt},
                   {1, StepKind::kDecode},
                   {30, StepKind::kPrompt},
                   {4, StepKind::kDecode},
                   {11, StepKind::kStream},
                   {1, StepKind::kPrompt},
                   {2, StepKind::kDecode}});
  lives.push_back({{16, StepKind::kPrompt}, {1, StepKind::kDecode}, {1, StepKind::kDecode}});
  return lives;
}

class SelectorOracle : public testing::Test {
 private:
  const ThreadPool pool_{1};
  const ThreadScope scope_{pool_};
};

TEST_F(SelectorOracle, SameTokensAndOutputs) {
  Tally tally;
  for (const TinyShape& shape : kTinyShapes)
    for (const Case& c : kCases) {
      const auto lives = Lives();
      for (size_t i = 0; i < lives.size(); ++i) {
        SCOPED_TRACE(testing::Message() << c.spec << ", " << shape.Name() << ", life " << i);
        Compare(shape, c, RandomText(shape, 110, 31 + i), lives[i], tally);
        if (HasFatalFailure()) return;
      }
    }
  EXPECT_GT(tally.choices, 20000u);
  EXPECT_LE(tally.adopted * 1000, tally.choices);
}

// Zero keys: attention is even, tova sees nothing but ties and snapkv hardly anything else.
TEST_F(SelectorOracle, TiesKeepTheLowerPosition) {
  Tally tally;
  for (const TinyShape& shape : kTinyShapes)
    for (const Case& c : kCases) {
      SCOPED_TRACE(testing::Message() << c.spec << ", " << shape.Name());
      Text text = RandomText(shape, 110, 41);
      // One key takes everything that is to be had, the others exactly nothing: ties at 0 for all who accumulate.
      for (size_t l = 0; l < shape.n_layers; ++l) {
        std::fill(text.k[l].begin(), text.k[l].end(), 0.0f);
        std::fill(text.q[l].begin(), text.q[l].end(), 0.0f);
        const size_t last = shape.head_dim - 1;  // a coordinate that odd head sizes do not rotate
        if (shape.head_dim % 2 == 0) continue;
        for (size_t t = 0; t < text.n; ++t)
          for (size_t h = 0; h < shape.n_heads; ++h) text.q[l][(t * shape.n_heads + h) * shape.head_dim + last] = 100;
        for (size_t h = 0; h < shape.n_kv_heads; ++h) text.k[l][h * shape.head_dim + last] = 100;
      }
      for (const auto& life : Lives()) {
        Compare(shape, c, text, life, tally);
        if (HasFatalFailure()) return;
      }
    }
}

TEST_F(SelectorOracle, ProtectedTokensAreChosenAround) {
  Tally tally;
  for (const TinyShape& shape : kTinyShapes)
    for (const Case& c : kCases) {
      if (c.options.rows < 10 || c.options.pyramid_beta > 0) continue;
      SCOPED_TRACE(testing::Message() << c.spec << ", " << shape.Name());
      for (const auto& life : {UsualLife(), std::vector<LifeStep>(21, {3, StepKind::kStream})}) {
        Compare(shape, c, RandomText(shape, 110, 43), life, tally, {{3, 5}, {20, 22}});
        if (HasFatalFailure()) return;
      }
    }
}

// Longer than a tile of queries, so that what is observed crosses tiles.
TEST_F(SelectorOracle, LongPromptsCrossTiles) {
  const TinyShape shape{1, 2, 1, 5, 1200};
  Tally tally;
  for (const Case& c : {Case{"h2o(60)+f32", {.policy = Policy::kH2o, .rows = 60, .recent = 30}},
                        Case{"snapkv(64)+less+f32", {.policy = Policy::kSnapkv, .rows = 64, .window = 32}, true},
                        Case{"tova(50)+f32", {.policy = Policy::kTova, .rows = 50}},
                        Case{"window(50)+less+f32", {.policy = Policy::kWindow, .rows = 50, .sinks = 4}, true}})
    for (const size_t n : {511, 512, 513, 530, 1100}) {
      SCOPED_TRACE(testing::Message() << c.spec << ", " << n);
      Compare(shape, c, RandomText(shape, n + 20, n),
              {{n, StepKind::kPrompt}, {1, StepKind::kDecode}, {9, StepKind::kStream}, {1, StepKind::kDecode}}, tally);
    }
}

// Layers alike have even budgets, also when they wait for each other's uncertainty, and lose nothing meanwhile.
TEST_F(SelectorOracle, EvenLayersThatWait) {
  Tally tally;
  for (const TinyShape& shape : kTinyShapes)
    for (const Case& c : {Case{"h2o(12)+zigzag+less+f32", {.policy = Policy::kH2o, .rows = 12, .recent = 6}, true},
                          Case{"snapkv(16)+zigzag+less+f32", {.policy = Policy::kSnapkv, .rows = 16, .window = 8}, true}}) {
      SCOPED_TRACE(testing::Message() << c.spec << ", " << shape.Name());
      Text text = RandomText(shape, 110, 47);
      for (size_t l = 1; l < shape.n_layers; ++l) text.k[l] = text.k[0], text.v[l] = text.v[0], text.q[l] = text.q[0];
      Compare(shape, c, text, {{60, StepKind::kPrompt}, {1, StepKind::kDecode}, {7, StepKind::kPrompt}, {1, StepKind::kDecode}},
              tally);
    }
}

// base-policies: worked examples.
TEST_F(SelectorOracle, WindowByHand) {
  const TinyShape& shape = kTinyShapes[1];
  const TempSidecar sidecar(shape);
  SequenceCache cache(MakeConfig("window(8, sinks=2)+f32", shape, sidecar));
  const Text text = RandomText(shape, 20, 5);
  for (size_t i = 0; i < 20; ++i) Feed(cache, text, i, 1, StepKind::kDecode);
  EXPECT_EQ(Resident(cache, 2, 1), (std::vector<int32_t>{0, 1, 14, 15, 16, 17, 18, 19}));
}

// The library's shares against the formula, over many shapes.
TEST_F(SelectorOracle, PyramidShares) {
  EXPECT_EQ(OraclePyramid(3, 108, 8, 20, 100000), (std::vector<size_t>{8 + 195, 8 + 100, 8 + 5}));
  for (size_t n_layers : {1, 2, 3, 7, 32})
    for (size_t rows : {9, 20, 100, 1024})
      for (size_t window : {0, 4, 8})
        for (double beta : {1.0, 2.5, 20.0})
          for (size_t n : {10, 60, 150, 5000})
            EXPECT_EQ(PyramidRows(n_layers, rows, window, beta, n), OraclePyramid(n_layers, rows, window, beta, n))
                << n_layers << " layers of " << rows << ", window " << window << ", beta " << beta << ", n " << n;
}

}  // namespace
}  // namespace lesskv
