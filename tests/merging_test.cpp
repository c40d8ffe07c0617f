// Rows that stand for others: merged ones (elastic, merge) and fitted ones (match), through the whole cache. The sharpest
// case can be computed by hand: with keys of zero every query weighs all tokens alike, so that a cache whose rows weigh as
// many tokens as they hold answers like the full one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "cache_harness.h"
#include "kernels/attention/attention.h"
#include "kvcache/policy_cache.h"
#include "kvcache/registry.h"
#include "kvcache/residual/merging.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

constexpr TinyShape kShape{2, 4, 2, 32};

Text KeysOfZero(uint64_t seed) {
  Text text = RandomText(kShape, 120, seed);
  for (auto& k : text.k) std::fill(k.begin(), k.end(), 0.0f);
  return text;
}

// Largest difference to the full cache's outputs over the steps from `first` on, relative.
double ErrorToFull(const std::string& spec, const std::vector<LifeStep>& life, const Text& text, size_t first) {
  const TempSidecar sidecar(kShape);
  SequenceCache cache(MakeConfig(spec, kShape, sidecar)), full(MakeConfig("full+f32", kShape, sidecar));
  double worst = 0;
  size_t seen = 0;
  for (const LifeStep& step : life) {
    const Outputs got = Live(cache, text, seen, step), want = Live(full, text, seen, step);
    for (size_t l = 0; l < kShape.n_layers && seen >= first; ++l) worst = std::max(worst, RelativeError(got[l], want[l]));
    seen += step.n;
  }
  return worst;
}

std::vector<LifeStep> PromptAnd(size_t n_prompt, size_t n_decode) {
  std::vector<LifeStep> life(n_decode, {1, StepKind::kDecode});
  life.insert(life.begin(), {n_prompt, StepKind::kPrompt});
  return life;
}

HeadRows Rows(std::vector<Position>& at, std::vector<float>& weights, size_t n) {
  for (size_t i = 0; i < n; ++i) at.push_back(Position(static_cast<int32_t>(i)));
  weights.assign(n, 1);
  HeadRows head;
  head.positions = at;
  head.weights = weights;
  return head;
}

// The specification's buckets: anchors 0, 3, 6, 7 of eight take {0, 1}, {2, 3, 4}, {5, 6}, {7}.
TEST(Merging, NearestRowsTakeAndTiesGoToTheEarlier) {
  std::vector<Position> at;
  std::vector<float> weights;
  const HeadRows head = Rows(at, weights, 8);
  std::vector<Departure> departures = {{1}, {2}, {4}, {5}};
  const auto all = [](uint32_t) { return true; };
  MergeIntoNearest(head, departures, all, all);
  std::vector<uint32_t> targets;
  for (const Departure& d : departures) {
    EXPECT_EQ(d.fate, Fate::kMerge);
    targets.push_back(d.target);
  }
  EXPECT_EQ(targets, (std::vector<uint32_t>{0, 3, 3, 6}));
  EXPECT_EQ(weights, (std::vector<float>{2, 1, 1, 3, 1, 1, 2, 1}));
  EXPECT_FLOAT_EQ(departures[0].share, 1 / 2.0f);
  EXPECT_FLOAT_EQ(departures[1].share, 1 / 3.0f);
  // What has merged before counts as many times.
  weights = {1, 4, 1, 2, 1, 1, 1, 1};
  departures = {{1}};
  MergeIntoNearest(head, departures, all, all);
  EXPECT_FLOAT_EQ(departures[0].share, 4 / 5.0f);
  EXPECT_FLOAT_EQ(weights[0], 5);
  // A tie between 2 and 4 goes to the earlier row; who may not take does not, and without takers nothing merges.
  departures = {{3}};
  MergeIntoNearest(head, departures, all, all);
  EXPECT_EQ(departures[0].target, 2u);
  departures = {{3}};
  MergeIntoNearest(head, departures, all, [](uint32_t r) { return r > 5; });
  EXPECT_EQ(departures[0].target, 6u);
  departures = {{3, Fate::kAbsorb}};
  MergeIntoNearest(head, departures, all, [](uint32_t) { return false; });
  EXPECT_EQ(departures[0].fate, Fate::kAbsorb);
}

TEST(Merging, WeightedRowsHoldAllTokens) {
  const Text text = KeysOfZero(41);
  for (const std::string spec : {"window(9, sinks=2)+merge(weighted=true)+f32", "h2o(11)+merge(weighted=true)+f32",
                                 "tova(7)+merge(weighted=true, keys=unrotated)+f32",
                                 "window(9, sinks=2, positions=cache)+merge(weighted=true)+f32",
                                 "cascade(14, levels=3, sinks=2)+merge(weighted=true)+f32",
                                 "h2o(11)+merge(weighted=true)+f32+prefill(chunk=7)", "h2o(12)+pyramid+merge(weighted=true)+f32"}) {
    EXPECT_LT(ErrorToFull(spec, UsualLife(), text, 0), 2e-5) << spec;
  }
  EXPECT_GT(ErrorToFull("window(9, sinks=2)+merge+f32", UsualLife(), text, 0), 0.01);
  EXPECT_GT(ErrorToFull("window(9, sinks=2)+f32", UsualLife(), text, 0), 0.05);
  // A prompt's tokens are all in its anchors; later deletions are losses.
  for (const std::string spec : {"elastic(0.2, weighted=true)+f32", "elastic(0.2, weighted=true, keys=unrotated)+f32",
                                 "elastic(0.1, weighted=true, first=0, last=0)+f32",
                                 "elastic(0.2, weighted=true)+merge+f32"})
    EXPECT_LT(ErrorToFull(spec, PromptAnd(45, 1), text, 0), 2e-5) << spec;
  EXPECT_LT(ErrorToFull("elastic(0.2, weighted=true)+merge+f32", UsualLife(), text, 0), 2e-5);
  EXPECT_GT(ErrorToFull("elastic(0.2)+f32", PromptAnd(45, 1), text, 0), 0.01);
  EXPECT_GT(ErrorToFull("elastic(0.2, merge=off)+f32", PromptAnd(45, 1), text, 0), 0.01);
}

// Equal vectors are unchanged by merging, rotated or not where nothing turns; different keys are averaged.
TEST(Merging, KeysAreAveragedInTheSpaceTheyAreKeptIn) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 42);
  const auto run = [&](const std::string& spec) {
    SequenceCache cache(MakeConfig(spec, kShape, sidecar));
    Feed(cache, text, 0, 60, StepKind::kPrompt);
    return Feed(cache, text, 60, 1, StepKind::kDecode)[0];
  };
  EXPECT_GT(RelativeError(run("elastic(0.2)+f32"), run("elastic(0.2, keys=unrotated)+f32")), 1e-3);
  EXPECT_LT(RelativeError(run("elastic(1)+f32"), run("elastic(1, keys=unrotated)+f32")), 1e-5);
  EXPECT_GT(RelativeError(run("h2o(11)+merge+f32"), run("h2o(11)+merge(keys=unrotated)+f32")), 1e-3);
}

TEST(Elastic, RowsAreAShareOfTheTokens) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 43);
  for (const double gamma : {0.05, 0.2, 0.5, 0.9, 1.0}) {
    SCOPED_TRACE(gamma);
    SequenceCache cache(MakeConfig("elastic(" + std::to_string(gamma) + ")+f32", kShape, sidecar));
    Feed(cache, text, 0, 50, StepKind::kPrompt);
    const auto r = static_cast<size_t>(std::floor((1 - gamma) * 50 + 1e-9));
    for (const auto& held : AllResident(cache, kShape)) EXPECT_EQ(held.size(), std::max<size_t>(50 - r, 3));
    for (size_t n = 51; n <= 110; ++n) {
      const size_t before = Resident(cache, 0, 0).size();
      Feed(cache, text, n - 1, 1, StepKind::kDecode);
      for (size_t l = 0; l < kShape.n_layers; ++l)
        for (size_t h = 0; h < kShape.n_kv_heads; ++h) {
          const auto held = Resident(cache, l, h);
          EXPECT_EQ(held, Resident(cache, l, 0));
          EXPECT_GE(held.size(), before);
          EXPECT_EQ(held.back(), static_cast<int32_t>(n) - 1);
          if (50 - r >= 3) {
            EXPECT_LT(static_cast<double>(held.size()) - gamma * static_cast<double>(n), 1 + 1e-9);
          }
        }
    }
  }
}

// Rows before the fixed place never leave while decoding; behind it first the prompt's end is consumed, then what was
// generated, the oldest first. A second prompt's tokens are cut among themselves.
TEST(Elastic, DeletesAtOnePlace) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 44);
  for (const std::string place :
       {"distance=6", "at=14", "distance=0", "at=1000", "distance=1000", "distance=0, last=3"}) {
    SCOPED_TRACE(place);
    SequenceCache cache(MakeConfig("elastic(0.4, " + place + ")+f32", kShape, sidecar));
    Feed(cache, text, 0, 50, StepKind::kPrompt);
    std::vector<int32_t> want = Resident(cache, 1, 0);
    ASSERT_EQ(want.size(), 20u);
    const size_t p = place == "distance=6" || place == "at=14" ? 14 : place == "distance=1000" ? 1 : 19;
    for (size_t n = 51; n <= 90; ++n) {
      Feed(cache, text, n - 1, 1, StepKind::kDecode);
      want.push_back(static_cast<int32_t>(n) - 1);
      if (static_cast<double>(want.size()) - 0.4 * static_cast<double>(n) >= 1) want.erase(want.begin() + static_cast<ptrdiff_t>(p));
      ASSERT_EQ(Resident(cache, 1, 0), want) << n;
    }
    Feed(cache, text, 90, 20, StepKind::kPrompt);
    const auto held = Resident(cache, 1, 0);
    EXPECT_TRUE(std::equal(want.begin(), want.end(), held.begin()));
    EXPECT_EQ(held.size(), 44u);
    EXPECT_EQ(held.back(), 109);
  }
}

// A prompt of which nothing must leave has its fixed place all the same.
TEST(Elastic, DeletesAtOnePlaceAlsoBehindAShortPrompt) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 45);
  SequenceCache cache(MakeConfig("elastic(0.9, distance=3)+f32", kShape, sidecar));
  Feed(cache, text, 0, 9, StepKind::kPrompt);
  EXPECT_EQ(Resident(cache, 1, 0).size(), 9u);
  Feed(cache, text, 9, 1, StepKind::kDecode);
  EXPECT_EQ(Resident(cache, 1, 0), (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 7, 8, 9}));
}

// Anchors are the tokens with the most attention, summed over queries and the layer's heads; ties keep the lower position.
TEST(Elastic, AnchorsAreTrueRanks) {
  const CacheSpec spec = CacheSpec::Parse("elastic(0.5)");
  const Method& method = *FindMethod("elastic");
  const SidecarSource none;
  const auto selector = method.make_selector(Arguments(method.parameters, spec.terms()[0]), {{}, 100, ComputeType::kF32, none});
  std::vector<Position> at;
  std::vector<float> weights, votes(10), second_votes(10);
  HeadRows heads[2] = {Rows(at, weights, 10), {}};
  heads[1] = heads[0];
  const std::vector<float> a = {9, 1, 0, 3, 0, 5, 0, 1, 0, 1}, b = {1, 2, 0, 0, 0, 0, 4, 2, 0, 1};
  heads[0].attention = a, heads[0].votes = votes, heads[0].budget = 5;
  heads[1].attention = b, heads[1].votes = second_votes, heads[1].budget = 5;
  const ProtectedSet protect;
  LayerRows layer;
  layer.kind = StepKind::kPrompt;
  layer.group = 1;
  layer.tokens_seen = layer.n_step = 10;
  layer.protect = &protect;
  layer.heads = heads;
  std::vector<uint32_t> victims;
  selector->Observe(layer, 0);
  float sum = 0;
  for (const float vote : votes) sum += vote;
  EXPECT_FLOAT_EQ(sum, 30 / 2.0f);  // (20 + 10) over two query heads
  selector->Choose(layer, 0, victims);
  EXPECT_EQ(victims, (std::vector<uint32_t>{2, 3, 4, 7, 8}));  // 0 and 9 stay; 5, 6 lead; of 1, 3 and 7 the lowest
  std::vector<Departure> departures;
  for (const uint32_t row : victims) departures.push_back({row, Fate::kDrop});
  selector->Decide(layer, 0, departures);
  std::vector<uint32_t> targets;
  for (const Departure& departure : departures) targets.push_back(departure.target);
  EXPECT_EQ(targets, (std::vector<uint32_t>{1, 1, 5, 6, 6}));  // the first and the last are as they came
  const std::vector<float> equal(10, 1);
  heads[0].attention = heads[1].attention = equal;
  heads[0].budget = heads[1].budget = 3;
  std::fill(votes.begin(), votes.end(), 0.0f);
  victims.clear();
  selector->Observe(layer, 0);
  selector->Choose(layer, 0, victims);
  EXPECT_EQ(victims, (std::vector<uint32_t>{2, 3, 4, 5, 6, 7, 8}));
  EXPECT_THROW(CacheSpec::Parse("elastic"), Error);
  EXPECT_THROW(CacheSpec::Parse("elastic(0)"), Error);
  EXPECT_THROW(CacheSpec::Parse("elastic(1.5)"), Error);
  EXPECT_THROW(CacheSpec::Parse("elastic(0.5, at=3, distance=4)"), Error);
  EXPECT_THROW(CacheSpec::Parse("elastic(0.5)+prefill(chunk=8)"), Error);
  EXPECT_THROW(CacheSpec::Parse("elastic(0.5)+match"), Error);
  EXPECT_THROW(CacheSpec::Parse("cascade(12, positions=true)+match"), Error);
  EXPECT_THROW(CacheSpec::Parse("window(12, positions=cache)+match"), Error);
}

// With keys of zero the fit has an exact answer: the block's mean with the block's mass.
TEST(Match, KeptRowsAnswerForTheBlock) {
  const Text text = KeysOfZero(45);
  for (const std::string exact : {"match(mu=0, lambda=0.000001)"})
    for (const std::string spec : {"snapkv(14, window=4)+f32", "snapkv(14, window=4)+pyramid(2)+f32", "h2o(21)+f32"}) {
      const auto life = PromptAnd(60, spec[0] == 'h' ? 1 : 30);
      EXPECT_LT(ErrorToFull(spec + "+" + exact, life, text, 0), 1e-3) << spec;
      EXPECT_GT(ErrorToFull(spec, life, text, 0), 0.02) << spec;
    }
  // A second prompt fits what was fitted again.
  const std::vector<LifeStep> twice = {{60, StepKind::kPrompt}, {1, StepKind::kDecode}, {30, StepKind::kPrompt}, {1, StepKind::kDecode}};
  EXPECT_LT(ErrorToFull("snapkv(14, window=4)+f32+match(mu=0, lambda=0.000001)", twice, text, 0), 1e-3);
  // Chunks: each is fitted when enough leaves.
  EXPECT_LT(ErrorToFull("snapkv(14, window=4)+f32+match(mu=0, lambda=0.000001)+prefill(chunk=30)", PromptAnd(60, 20), text, 0), 1e-3);
  EXPECT_GT(ErrorToFull("snapkv(14, window=4)+f32+match(mu=0, lambda=0.000001)+prefill(chunk=10)", PromptAnd(60, 20), text, 0), 0.01);
}

double LogMass(const FitBlock& b, size_t q, size_t n, const float* weights, std::vector<double>& p) {
  p.resize(n);
  double sum = 0;
  for (size_t j = 0; j < n; ++j) {
    double s = 0;
    for (size_t c = 0; c < b.head_dim; ++c) s += double(b.queries[q * b.head_dim + c]) * double(b.keys[j * b.head_dim + c]);
    sum += p[j] = weights[j] * std::exp(double(b.scale) * s);
  }
  return sum;
}

// Where the pruned channels are zeros nothing is lost: selectors see the same attention, row for row, and keep the same
// tokens as without think, however the window's ring has turned.
void ExpectZeroChannelsChangeNothing(const std::vector<std::string>& specs, const std::string& think, size_t kept_channels,
                                     double bound) {
  Text text = RandomText(kShape, 120, 48);
  for (auto* side : {&text.q, &text.k})
    for (auto& layer : *side)
      for (size_t i = 0; i < layer.size(); ++i)
        if (i % kShape.head_dim >= kept_channels) layer[i] = 0;
  for (const std::string& spec : specs) {
    const auto live = [&](const std::string& of) {
      SequenceCache cache(CacheConfig::Create(CacheSpec::Parse(of), MakeCacheShape(kShape, 0), {}, {}));
      std::vector<Outputs> outputs;
      size_t seen = 0;
      for (const LifeStep& step : UsualLife()) {
        outputs.push_back(Live(cache, text, seen, step));
        seen += step.n;
      }
      return std::pair{outputs, AllResident(cache, kShape)};
    };
    const auto [whole, kept] = live(spec);
    const auto [narrow, kept_narrow] = live(spec + think);
    EXPECT_EQ(kept_narrow, kept) << spec;
    for (size_t i = 0; i < whole.size(); ++i)
      for (size_t l = 0; l < kShape.n_layers; ++l) EXPECT_LT(RelativeError(narrow[i][l], whole[i][l]), bound) << spec << " " << i;
  }
}

TEST(Think, ChannelsOfZerosChangeNothing) {
  ExpectZeroChannelsChangeNothing({"h2o(16)+f32", "tova(12)+f32", "snapkv(14, window=4)+f32", "h2o(16)+ada+f32",
                                   "h2o(16)+f32+prefill(chunk=7)", "window(12, sinks=2)+f32"},
                                  "+think(0.3, window=5)", 20, 1e-5);
  ExpectZeroChannelsChangeNothing({"h2o(48)+kivi(4, group=16, window=16)", "tova(40)+kivi(3, group=16, window=16)",
                                   "snapkv(40, window=4)+kivi(2, group=16, window=16)+prefill(chunk=20)"},
                                  "+think(0.5)", 16, 1e-4);  // weights of codes are rounded
}

// Every KV head is fitted to the queries of its own query heads: where those are the same at every position, a step that
// asks once more reads what the full cache says.
TEST(Match, HeadsAreFittedToTheirOwnQueries) {
  Text text = RandomText(kShape, 61, 47);
  for (auto& q : text.q)
    for (size_t t = 1; t < text.n; ++t) std::copy_n(q.data(), q.size() / text.n, q.data() + t * (q.size() / text.n));
  const auto last = [&](const std::string& spec) {
    SequenceCache cache(CacheConfig::Create(CacheSpec::Parse(spec), MakeCacheShape(kShape, 0), {}, {}));
    Feed(cache, text, 0, 60, StepKind::kPrompt);
    return Feed(cache, text, 60, 1, StepKind::kDecode);
  };
  const Outputs full = last("full+f32"), fitted = last("snapkv(14, window=4)+f32+match(mu=0, lambda=0.000001)");
  const Outputs dropped = last("snapkv(14, window=4)+f32");
  for (size_t l = 0; l < kShape.n_layers; ++l) {
    EXPECT_LT(RelativeError(fitted[l], full[l]), 0.02) << l;
    EXPECT_GT(RelativeError(dropped[l], full[l]), 0.1) << l;
  }
}

// A block of the rows that a test names, and what `match` with these arguments makes of those that stay.
struct OwnBlock {
  std::vector<float> keys, values, queries, weights;
  std::vector<FitBlock> blocks{1};

  OwnBlock(size_t d, std::vector<float> k, std::vector<float> v, std::vector<float> q, size_t n_kept)
      : keys(std::move(k)), values(std::move(v)), queries(std::move(q)), weights(keys.size() / d, 1) {
    FitBlock& b = blocks[0];
    b.n_rows = weights.size(), b.n_kept = n_kept, b.head_dim = d, b.n_queries = queries.size() / d;
    b.keys = keys.data(), b.values = values.data(), b.weights = weights.data(), b.queries = queries.data();
    b.kept_weights.assign(n_kept, 1);
    b.kept_values.assign(values.begin(), values.begin() + static_cast<ptrdiff_t>(n_kept * d));
  }
  const FitBlock& Fitted(const std::string& term) {
    const CacheSpec spec = CacheSpec::Parse("h2o(8)+" + term);
    const Method& method = *FindMethod("match");
    const SidecarSource none;
    method.make_residual(Arguments(method.parameters, *spec.Find("match")), {{}, 100, ComputeType::kF32, none})
        .residual->Fit(blocks);
    EXPECT_TRUE(blocks[0].fitted);
    return blocks[0];
  }
};

void ExpectNear(const std::vector<float>& a, const std::vector<double>& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], tolerance) << i;
}

constexpr char kExact[] = "match(mu=0, lambda=0.000001)";

// The specification's rows of one channel: keys 0, ln 2, ln 4, values 1, 0, 3; those that stay first.
TEST(Match, RowsOfOneChannelAreFittedAsByHand) {
  const float ln2 = std::log(2.0f), ln4 = std::log(4.0f);
  // Two queries are answered exactly, also beside a row of logit 1 and value 5.
  OwnBlock block(1, {0, ln4, ln2}, {1, 3, 0}, {0, 1}, 2);
  const FitBlock& fit = block.Fitted(kExact);
  ExpectNear(fit.kept_weights, {5.0 / 3, 4.0 / 3}, 1e-3);
  ExpectNear(fit.kept_values, {0.6, 2.25}, 1e-3);
  const auto beside = [&](float w0, float w1) {  // at q = 1
    const float other = 5;
    float lse = std::log(w0 + 4 * w1), out = (w0 * fit.kept_values[0] + 4 * w1 * fit.kept_values[1]) / (w0 + 4 * w1);
    Merge(&out, &lse, &other, 1, 1);
    return out;
  };
  EXPECT_NEAR(beside(fit.kept_weights[0], fit.kept_weights[1]), 2.736225, 1e-3);
  EXPECT_NEAR(beside(1, 1), 3.004737, 1e-3);
  // Masses are relative to the block's own, not to the largest kept key's or the largest of all.
  OwnBlock three(1, {0, ln4, ln2}, {1, 3, 0}, {0, 1, -1}, 2);
  ExpectNear(three.Fitted("match(mu=0)").kept_weights, {1.430341, 1.430341}, 1e-4);
}

TEST(Match, WeightsOrValuesMayStayAsTheyAre) {
  const float ln2 = std::log(2.0f), ln4 = std::log(4.0f);
  OwnBlock weights(1, {0, ln4, ln2}, {1, 3, 0}, {0, 1}, 2), values = weights;
  const FitBlock& weighed = weights.Fitted("match(values=off, mu=0)");
  EXPECT_EQ(weighed.kept_values, (std::vector<float>{1, 3}));
  EXPECT_GT(weighed.kept_weights[0], 1.2f);
  const FitBlock& replaced = values.Fitted("match(weights=off, lambda=0.000001)");
  EXPECT_EQ(replaced.kept_weights, (std::vector<float>{1, 1}));
  EXPECT_LT(replaced.kept_values[0], 0.9f);
}

// The first tokens and the newest, which a selector always keeps, are no part of a fit: their weights stay 1.
TEST(Match, WhatAlwaysStaysIsNotFitted) {
  const TempSidecar sidecar(kShape);
  SequenceCache cache(MakeConfig("window(12, sinks=3)+match+f32", kShape, sidecar));
  Feed(cache, RandomText(kShape, 40, 63), 0, 40, StepKind::kPrompt);
  const std::vector<std::byte> bytes = cache.Serialize();
  std::vector<int32_t> positions(12);
  std::vector<float> weights(12);  // of the last head, before a byte a layer and the length of no states
  const std::byte* const end = bytes.data() + bytes.size() - sizeof(uint64_t) - kShape.n_layers;
  std::memcpy(weights.data(), end - 12 * sizeof(float), 12 * sizeof(float));
  std::memcpy(positions.data(), end - 2 * 12 * sizeof(float), 12 * sizeof(float));
  EXPECT_EQ(*std::max_element(positions.begin(), positions.end()), 39);
  for (size_t r = 0; r < 12; ++r) EXPECT_EQ(weights[r] == 1, positions[r] < 3 || positions[r] == 39) << positions[r];
}

// New values are stored as the codec stores values.
TEST(Match, ValuesAreFittedBehindATransform) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 60, 64);
  const auto run = [&](const char* spec) {
    SequenceCache cache(MakeConfig(spec, kShape, sidecar));
    Feed(cache, text, 0, 50, StepKind::kPrompt);
    return Feed(cache, text, 50, 1, StepKind::kDecode)[1];
  };
  EXPECT_LT(RelativeError(run("window(12)+match+q8(rotate=true)"), run("window(12)+match+f32")), 0.05);
}

// What is added to all logits of a query changes nothing, nor does the order of a group's queries.
TEST(Match, OnlyDifferencesOfLogitsMatter) {
  Rng rng(49);
  const size_t d = 4, n = 30, n_queries = 50;
  std::vector<float> keys(n * d), values(n * d), queries(n_queries * d), shifted, turned(n_queries * d);
  for (auto* x : {&keys, &values, &queries})
    for (float& f : *x) f = rng.Normal();
  for (size_t i = 0; i < keys.size(); ++i) shifted.push_back(keys[i] + (i % d == 1 ? 3.0f : 0.5f));
  for (size_t q = 0; q < n_queries; ++q) std::copy_n(&queries[q * d], d, &turned[(q * 7 % n_queries) * d]);
  OwnBlock plain(d, keys, values, queries, 12), constants(d, shifted, values, queries, 12), order(d, keys, values, turned, 12);
  const FitBlock& want = plain.Fitted("match");
  for (OwnBlock* other : {&constants, &order}) {
    const FitBlock& got = other->Fitted("match");
    EXPECT_LT(RelativeError(got.kept_weights, want.kept_weights), 1e-4);
    EXPECT_LT(RelativeError(got.kept_values, want.kept_values), 1e-4);
  }
}

TEST(Match, HeadsOfAGroupMayComeInAnyOrder) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 64, 50);
  const auto swapped = [](std::vector<float> x) {  // heads 0 and 1, 2 and 3
    for (size_t i = 0; i < x.size(); i += 2 * kShape.head_dim)
      std::swap_ranges(&x[i], &x[i] + kShape.head_dim, &x[i] + kShape.head_dim);
    return x;
  };
  Text other = text;
  for (auto& q : other.q) q = swapped(q);
  const auto run = [&](const Text& of) {
    SequenceCache cache(MakeConfig("snapkv(14, window=4)+match+f32", kShape, sidecar));
    Feed(cache, of, 0, 60, StepKind::kPrompt);
    return Feed(cache, of, 60, 4, StepKind::kDecode);
  };
  const Outputs a = run(text), b = run(other);
  for (size_t l = 0; l < kShape.n_layers; ++l) EXPECT_LT(RelativeError(swapped(b[l]), a[l]), 1e-4) << l;
}

// Four bytes a row beside what its codec takes, in heads that have room for a newcomer.
TEST(Match, AWeightTakesFourBytes) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 60, 51);
  const auto bytes = [&](const std::string& spec) {
    SequenceCache cache(MakeConfig(spec, kShape, sidecar));
    Feed(cache, text, 0, 60, StepKind::kPrompt);
    return cache.Stats().kv_bytes;
  };
  for (const size_t rows : {8u, 16u, 40u})
    EXPECT_EQ(bytes("h2o(" + std::to_string(rows) + ")+match") - bytes("h2o(" + std::to_string(rows) + ")"),
              kShape.n_layers * kShape.n_kv_heads * (rows + 1) * 4);
}

// Each head is fitted once a prompt; one that is asked not-a-number stays as it was.
// Of a prompt's queries every n-th is fitted, the last one among them: with one, no other counts.
TEST(Match, TheLastQueryIsAmongThoseThatAreFitted) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 62);
  Text other = text;
  for (auto& q : other.q) std::fill_n(q.begin(), 39 * kShape.n_heads * kShape.head_dim, 0.25f);
  const auto saved = [&](const Text& from) {
    SequenceCache cache(MakeConfig("window(12)+match(queries=1)+f32", kShape, sidecar));
    Feed(cache, from, 0, 40, StepKind::kPrompt);
    EXPECT_GT(cache.Stats().fits.taken, 0u);
    return cache.Serialize();
  };
  EXPECT_EQ(saved(text), saved(other));
  std::fill(other.q[1].begin() + 39 * kShape.n_heads * kShape.head_dim, other.q[1].end(), 0.25f);
  EXPECT_NE(saved(text), saved(other));
}

TEST(Match, FitsAreCounted) {
  const TempSidecar sidecar(kShape);
  Text text = RandomText(kShape, 100, 52);
  SequenceCache cache(MakeConfig("snapkv(14, window=4)+match+f32", kShape, sidecar)), plain(MakeConfig("h2o(14)+f32", kShape, sidecar));
  Feed(cache, text, 0, 60, StepKind::kPrompt);
  EXPECT_EQ(cache.Stats().fits.taken, 4u);
  EXPECT_EQ(cache.Stats().fits.refused, 0u);
  for (size_t t = 60; t < 100; ++t) text.q[1][(t * kShape.n_heads + 2) * kShape.head_dim] = std::nanf("");
  Feed(cache, text, 60, 40, StepKind::kPrompt);
  EXPECT_EQ(cache.Stats().fits.taken, 7u);
  EXPECT_EQ(cache.Clone()->Stats().fits.refused, 1u);
  Feed(plain, text, 0, 60, StepKind::kPrompt);
  EXPECT_EQ(plain.Stats().fits.taken + plain.Stats().fits.refused, 0u);
}

// Steps of fewer than 16 tokens let fewer rows leave than a fit needs: they are plain eviction, unless rows leave in
// bunches. Those have an exact answer with keys of zero, however the text comes.
TEST(Match, RowsThatLeaveInBunchesAreFittedWhileTextStreamsIn) {
  const Text text = KeysOfZero(53);
  const TempSidecar sidecar(kShape);
  for (const auto& [n, kind] : {std::pair{size_t{1}, StepKind::kDecode}, {8, StepKind::kStream}, {15, StepKind::kStream}}) {
    SCOPED_TRACE(n);
    const std::vector<LifeStep> life(120 / n, {n, kind});
    const auto fits = [&](const std::string& spec) {
      SequenceCache cache(MakeConfig(spec, kShape, sidecar));
      for (size_t seen = 0; seen + n <= 120; seen += n) Feed(cache, text, seen, n, kind);
      return cache.Stats().fits.taken;
    };
    EXPECT_GT(ErrorToFull("h2o(40)+f32", life, text, 0), 0.02);
    EXPECT_EQ(ErrorToFull(std::string("h2o(40)+f32+") + kExact, life, text, 0), ErrorToFull("h2o(40)+f32", life, text, 0));
    EXPECT_EQ(fits(std::string("h2o(40)+f32+") + kExact), 0u);
    for (const std::string select : {"h2o(40)", "tova(40)", "h2o(40)+pyramid(2)"}) {
      const std::string spec = select + "+f32+match(mu=0, lambda=0.000001, every=16)";
      EXPECT_LT(ErrorToFull(spec, life, text, 0), 1e-3) << spec;
      EXPECT_GE(fits(spec), 16u) << spec;
    }
  }
  EXPECT_LT(ErrorToFull("h2o(40)+f32+match(mu=0, lambda=0.000001, every=16)", UsualLife(), text, 0), 1e-3);
}

// A head never holds more than its budget, and sixteen rows leave it when it must let one go.
TEST(Match, BunchesStayWithinTheBudget) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 54);
  SequenceCache cache(MakeConfig("h2o(40)+match(every=16)+f32", kShape, sidecar));
  Feed(cache, text, 0, 39, StepKind::kPrompt);
  size_t rows = 39;
  for (size_t t = 39; t < 120; ++t) {
    Feed(cache, text, t, 1, StepKind::kDecode);
    rows = rows < 40 ? rows + 1 : 25;
    for (const auto& held : AllResident(cache, kShape)) ASSERT_EQ(held.size(), rows) << t;
  }
  for (const char* refused : {"h2o(40)+match(every=15)", "kvzap(threshold=0, window=5)+match(every=16)", "h2o(40)+ada+match(every=16)",
                              "h2o(40)+zigzag+match(every=16)"})
    EXPECT_THROW(CacheSpec::Parse(refused), Error) << refused;
  EXPECT_NO_THROW(CacheSpec::Parse("kvzap(threshold=0, window=5)+match"));
  EXPECT_NO_THROW(MakeConfig("snapkv(20, window=4)+match(every=16)", kShape, sidecar));
  for (const char* refused : {"h2o(15)+match(every=16)", "snapkv(15, window=4)+match(every=16)"})
    EXPECT_THROW(MakeConfig(refused, kShape, sidecar), Error) << refused;
  EXPECT_THROW(MakeConfig("snapkv(20, window=4)+match(every=16)", kShape, sidecar, {{9, 11}}), Error);
}

// Of the last 20 tokens those of every fourth position, of each layer its own, rounded to two bytes a number.
TEST(Match, QueriesOfTheLastTokensAreKept) {
  const TempSidecar sidecar(kShape);
  const Text text = RandomText(kShape, 120, 55);
  const size_t width = kShape.n_heads * kShape.head_dim;
  const auto config = MakeConfig("h2o(40)+match(queries=5, every=20)", kShape, sidecar);
  ByteCounter counter;
  PolicyCache part(config->global(), counter);
  part.Begin({45, 0, StepKind::kPrompt});
  EXPECT_EQ(part.KeptQueryBytes(), kShape.n_layers * 5 * width * 2);
  EXPECT_EQ(part.kept_queries.size(), part.KeptQueryBytes());
  for (size_t seen = 0; seen < 120;) {
    const size_t n = seen == 0 ? 45 : std::min<size_t>(seen % 7 + 1, 120 - seen);
    part.step = {n, seen, seen == 0 ? StepKind::kPrompt : StepKind::kStream};
    for (size_t l = 0; l < kShape.n_layers; ++l)
      for (size_t first = 0; first < n; first += 30)  // in tiles
        part.KeepQueries(l, first, std::min<size_t>(30, n - first), &text.q[l][(seen + first) * width]);
    seen += n;
    for (size_t l = 0; l < kShape.n_layers; ++l) {
      std::vector<float> want;
      for (size_t p = seen - 20; p < seen; ++p)
        if (p % 4 == 0) want.insert(want.end(), &text.q[l][p * width], &text.q[l][p * width] + width);
      ASSERT_EQ(want.size(), 5 * width);
      ASSERT_EQ(part.KeptQueries(l).size(), want.size());
      ASSERT_LT(RelativeError(part.KeptQueries(l), want), 1e-3) << seen;
    }
  }
}

// On the queries it was fitted to a fit is never worse than none, in mass and in output, whatever rows and queries are.
TEST(Match, AFitIsNeverWorseThanNoneOnItsQueries) {
  const CacheSpec spec = CacheSpec::Parse("h2o(8)+match");
  const Method& method = *FindMethod("match");
  const SidecarSource none;
  const auto made = method.make_residual(Arguments(method.parameters, *spec.Find("match")), {{}, 100, ComputeType::kF32, none});
  Rng rng(46);
  size_t better = 0;
  for (int round = 0; round < 60; ++round) {
    const size_t d = 1 + rng.Below(12), n = 2 + rng.Below(60), kept = 1 + rng.Below(n - 1), n_queries = 1 + rng.Below(70);
    const float scale = round % 3 == 0 ? 4.0f : round % 3 == 1 ? 1.0f : 0.1f;
    std::vector<float> keys(n * d), values(n * d), weights(n, 1), queries(n_queries * d);
    for (float& x : keys) x = rng.Normal() * scale;
    for (float& x : values) x = rng.Normal();
    for (float& x : queries) x = rng.Normal();
    if (round % 4 == 0)
      for (float& w : weights) w = rng.UniformFloat(0.2f, 3.0f);
    std::vector<FitBlock> blocks(1);
    FitBlock& b = blocks[0];
    b.n_rows = n, b.n_kept = kept, b.head_dim = d, b.scale = 1, b.n_queries = n_queries;
    b.keys = keys.data(), b.values = values.data(), b.weights = weights.data(), b.queries = queries.data();
    b.kept_weights.assign(weights.begin(), weights.begin() + static_cast<ptrdiff_t>(kept));
    b.kept_values.assign(values.begin(), values.begin() + static_cast<ptrdiff_t>(kept * d));
    made.residual->Fit(blocks);
    double mass_error[2] = {}, out_error[2] = {};
    for (size_t q = 0; q < n_queries; ++q) {
      std::vector<double> all, some;
      const double mass = LogMass(b, q, n, weights.data(), all);
      for (const int fitted : {0, 1}) {
        const float* w = fitted ? b.kept_weights.data() : weights.data();
        const float* v = fitted ? b.kept_values.data() : values.data();
        const double own = LogMass(b, q, kept, w, some);
        mass_error[fitted] += std::pow(own / mass - 1, 2);
        for (size_t c = 0; c < d; ++c) {
          double difference = 0;
          for (size_t j = 0; j < n; ++j) difference += all[j] / mass * double(values[j * d + c]);
          for (size_t j = 0; j < kept; ++j) difference -= some[j] / own * double(v[j * d + c]);
          out_error[fitted] += difference * difference;
        }
      }
    }
    EXPECT_LE(mass_error[1], mass_error[0] * (1 + 1e-4) + 1e-9) << round;
    EXPECT_LE(out_error[1], out_error[0] * (1 + 1e-4) + 1e-9) << round;
    better += b.fitted && out_error[1] < 0.9 * out_error[0];
  }
  EXPECT_GT(better, 40u);
}

}  // namespace
}  // namespace lesskv
