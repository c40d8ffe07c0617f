#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "base/error.h"

namespace lesskv {
namespace {

// Everything off: the distribution is the softmax itself.
SamplerOptions Plain(float temperature = 1) {
  return {.temperature = temperature, .top_k = 0, .top_p = 1, .min_p = 0, .repeat_penalty = 1, .seed = 3};
}

std::vector<float> LogitsOf(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

std::map<int32_t, double> Shares(const SamplerOptions& options, const std::vector<float>& logits, int n = 20000) {
  Sampler sampler(options);
  std::map<int32_t, double> shares;
  for (int i = 0; i < n; ++i) shares[sampler.Sample(logits, {})] += 1.0 / n;
  return shares;
}

TEST(Sampler, GreedyTakesTheLargestAndTheLowerTokenOfEquals) {
  Sampler sampler(Plain(0));
  EXPECT_EQ(sampler.Sample(std::vector<float>{1, 3, 2}, {}), 1);
  EXPECT_EQ(sampler.Sample(std::vector<float>{1, 3, 3}, {}), 1);
  EXPECT_EQ(sampler.Sample(std::vector<float>{-INFINITY, -3, -2}, {}), 2);
}

TEST(Sampler, DrawsFollowTheProbabilities) {
  auto shares = Shares(Plain(), LogitsOf({0.5, 0.3, 0.2}));
  EXPECT_NEAR(shares[0], 0.5, 0.015);
  EXPECT_NEAR(shares[1], 0.3, 0.015);
  shares = Shares(Plain(0.5f), LogitsOf({0.5, 0.3, 0.2}));  // squared: 25 : 9 : 4
  EXPECT_NEAR(shares[0], 25.0 / 38, 0.015);
  EXPECT_NEAR(shares[2], 4.0 / 38, 0.015);
}

TEST(Sampler, EachCutKeepsWhatItSays) {
  const auto logits = LogitsOf({0.1, 0.4, 0.2, 0.3});
  SamplerOptions options = Plain();
  options.top_k = 2;
  auto shares = Shares(options, logits);
  EXPECT_EQ(shares.size(), 2u);
  EXPECT_NEAR(shares[1], 4.0 / 7, 0.015);
  options = Plain();
  options.top_p = 0.65f;  // 0.4 does not reach it, 0.4 + 0.3 does
  EXPECT_EQ(Shares(options, logits).size(), 2u);
  options.top_p = 0.75f;
  EXPECT_EQ(Shares(options, logits).size(), 3u);
  options.top_p = 0;  // one token always stays
  EXPECT_EQ(Shares(options, logits).size(), 1u);
  options = Plain();
  options.min_p = 0.45f;  // 0.2 / 0.4 stays, 0.1 / 0.4 goes
  EXPECT_EQ(Shares(options, logits).size(), 3u);
  options.min_p = 1;  // the likeliest, and its equals
  EXPECT_EQ(Shares(options, std::vector<float>{1, 2, 0, 2}).size(), 2u);
}

TEST(Sampler, RepetitionPenaltyWeakensSeenTokensOnceAndOnlyInsideItsWindow) {
  SamplerOptions options = Plain(0);
  options.repeat_penalty = 2;
  options.repeat_last_n = 2;
  const std::vector<float> logits = {4, 3, -1, -1.5f};
  EXPECT_EQ(Sampler(options).Sample(logits, std::vector<int32_t>{0, 0}), 1);     // 4 / 2 < 3
  EXPECT_EQ(Sampler(options).Sample(std::vector<float>{4, 1.5f}, std::vector<int32_t>{0, 0}), 0);  // divided once
  EXPECT_EQ(Sampler(options).Sample(logits, std::vector<int32_t>{0, 3, 3}), 0);  // token 0 is out of the window
  EXPECT_EQ(Sampler(options).Sample(logits, std::vector<int32_t>{0, 1, 1}), 0);
  EXPECT_EQ(Sampler(options).Sample(logits, std::vector<int32_t>{0, 1}), 0);  // 2 against 1.5
  options.repeat_last_n = -1;
  EXPECT_EQ(Sampler(options).Sample(std::vector<float>{-1, -1.5f}, std::vector<int32_t>{0, 1, 1}), 0);  // -2 : -3
  EXPECT_EQ(Sampler(options).Sample(std::vector<float>{-1, -1.5f}, std::vector<int32_t>{0}), 1);        // -2 : -1.5
}

// Tokens 0, 1, 2 with logits 4, 3, 0: each choice takes 1 (count) * 0.75 + (once) 0.5 away.
TEST(Sampler, FrequencyAndPresencePenaltiesWeakenWhatWasChosen) {
  SamplerOptions options = Plain(0);
  options.frequency_penalty = 0.75f;
  options.presence_penalty = 0.5f;
  Sampler sampler(options);
  const std::vector<float> logits = {4, 3, 0};
  std::vector<int32_t> chosen;
  for (int i = 0; i < 7; ++i) chosen.push_back(sampler.Sample(logits, std::vector<int32_t>{1, 1, 1, 1}));
  // 0: 4, 2.75, 2, 1.25, 0.5, -0.25; 1: 3, 1.75, 1, 0.25
  EXPECT_EQ(chosen, (std::vector<int32_t>{0, 1, 0, 0, 1, 0, 1}));
}

TEST(Sampler, EachOfThePenaltiesIsItsOwnAndMayStrengthen) {
  const std::vector<float> logits = {2, 1.5f, 0};
  const auto chosen = [&](float frequency, float presence) {
    SamplerOptions options = Plain(0);
    options.frequency_penalty = frequency;
    options.presence_penalty = presence;
    Sampler sampler(options);
    std::vector<int32_t> tokens;
    for (int i = 0; i < 5; ++i) tokens.push_back(sampler.Sample(logits, {}));
    return tokens;
  };
  EXPECT_EQ(chosen(0, 0), (std::vector<int32_t>{0, 0, 0, 0, 0}));
  EXPECT_EQ(chosen(0, 0.75f), (std::vector<int32_t>{0, 1, 0, 0, 0}));  // both are weakened, once
  EXPECT_EQ(chosen(0.75f, 0), (std::vector<int32_t>{0, 1, 0, 1, 0}));  // 2, 1.25, 0.5, ..; 1.5, 0.75, 0
  EXPECT_EQ(chosen(-0.75f, -0.5f), (std::vector<int32_t>{0, 0, 0, 0, 0}));
}

// The first draw leaves one of two equals weakened by 2 ln 2 = 1.386, so that it comes in a fifth of the second draws.
TEST(Sampler, PenaltiesChangeTheProbabilitiesOfDraws) {
  SamplerOptions options = Plain();
  options.presence_penalty = static_cast<float>(std::log(4.0));
  double again = 0;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    options.seed = static_cast<uint64_t>(i);
    Sampler sampler(options);
    const std::vector<float> equal = {1, 1};
    const int32_t first = sampler.Sample(equal, {});
    again += sampler.Sample(equal, {}) == first ? 1.0 / kDraws : 0;
  }
  EXPECT_NEAR(again, 0.2, 0.01);
}

TEST(Sampler, BiasesAreAddedBeforeAllElse) {
  const std::vector<float> logits = {2, 1, 0};
  const auto chosen = [&](std::vector<TokenBias> biases) {
    SamplerOptions options = Plain(0);
    options.repeat_penalty = 4;
    options.logit_bias = std::move(biases);
    return Sampler(options).Sample(logits, std::vector<int32_t>{2});
  };
  EXPECT_EQ(chosen({}), 0);
  EXPECT_EQ(chosen({{0, -1.5f}}), 1);
  EXPECT_EQ(chosen({{0, -100}, {1, -100}}), 2);
  EXPECT_EQ(chosen({{2, 7.5f}}), 0);   // 7.5 / 4 < 2: the penalty is of the biased logit
  EXPECT_EQ(chosen({{2, 8.5f}}), 2);
  EXPECT_EQ(chosen({{3, 100}, {-1, 100}}), 0);
}

// Only as much of a vocabulary is put in order as a draw asks for: what comes out is what all of it in order gives.
TEST(Sampler, DrawsAreThoseOfTheWholeOrder) {
  constexpr size_t kVocab = 3000;
  Rng rng(11);
  std::vector<float> logits;
  for (size_t i = 0; i < kVocab; ++i) logits.push_back(static_cast<float>(rng.Below(40)) / 4);  // many are equal
  struct Cuts {
    float temperature;
    int top_k;
    float top_p, min_p;
  };
  std::set<int32_t> seen;
  for (const Cuts& cuts : std::vector<Cuts>{{1, 0, 1, 0}, {0.2f, 0, 1, 0}, {50, 0, 1, 0}, {1, 100, 1, 0}, {1, 2000, 1, 0},
                                            {1, 0, 0.5f, 0}, {1, 0, 0.99f, 0}, {1, 0, 1, 0.01f}, {2, 500, 0.7f, 0.2f}}) {
    std::vector<std::pair<float, int32_t>> order;
    for (size_t i = 0; i < kVocab; ++i) order.emplace_back(-logits[i], static_cast<int32_t>(i));
    std::sort(order.begin(), order.end());
    if (cuts.top_k > 0) order.resize(static_cast<size_t>(cuts.top_k));
    double total = 0, sum = 0;
    const auto weight = [&](size_t i) { return std::exp(static_cast<double>(order[0].first - order[i].first)); };
    for (size_t i = 0; i < order.size(); ++i) total += weight(i);
    size_t keep = 0;
    while (keep < order.size() && (keep == 0 || (weight(keep) >= cuts.min_p && sum < cuts.top_p * total)))
      sum += weight(keep++);
    total = 0;
    for (size_t i = 0; i < keep; ++i) total += std::pow(weight(i), 1 / cuts.temperature);
    for (uint64_t seed = 0; seed < 100; ++seed) {
      double left = Rng(seed).Uniform() * total;
      size_t i = 0;
      while (left >= 0 && i < keep) left -= std::pow(weight(i++), 1 / cuts.temperature);
      Sampler sampler({.temperature = cuts.temperature,
                       .top_k = cuts.top_k,
                       .top_p = cuts.top_p,
                       .min_p = cuts.min_p,
                       .seed = seed});
      ASSERT_EQ(sampler.Sample(logits, {}), order[i - 1].second) << cuts.temperature << " " << seed;
      seen.insert(order[i - 1].second);
    }
  }
  EXPECT_GT(seen.size(), 300u);
}

TEST(Sampler, SeedFixesTheText) {
  const auto logits = LogitsOf({0.25, 0.25, 0.25, 0.25});
  const auto text = [&](uint64_t seed) {
    SamplerOptions options = Plain();
    options.seed = seed;
    Sampler sampler(options);
    std::vector<int32_t> tokens;
    for (int i = 0; i < 30; ++i) tokens.push_back(sampler.Sample(logits, tokens));
    return tokens;
  };
  EXPECT_EQ(text(5), text(5));
  EXPECT_NE(text(5), text(6));
}

TEST(Sampler, OptionsOutOfRangeAreRefusedByName) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto refusal = [](auto change) -> std::string {
    SamplerOptions options;
    change(options);
    try {
      Validate(options);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(refusal([&](auto& o) { o.temperature = nan; }).find("--temp"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.temperature = -1; }).find("--temp"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.temperature = INFINITY; }).find("--temp"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.top_p = 1.5f; }).find("--top-p"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.min_p = nan; }).find("--min-p"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.top_k = -1; }).find("--top-k"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.repeat_penalty = 0; }).find("--repeat-penalty"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.repeat_last_n = -2; }).find("--repeat-last-n"), std::string::npos);
  for (const float bad : {-2.01f, 2.01f, nan, INFINITY}) {
    EXPECT_NE(refusal([&](auto& o) { o.frequency_penalty = bad; }).find("--frequency-penalty"), std::string::npos);
    EXPECT_NE(refusal([&](auto& o) { o.presence_penalty = bad; }).find("--presence-penalty"), std::string::npos);
  }
  EXPECT_NE(refusal([&](auto& o) { o.logit_bias = {{1, nan}}; }).find("--logit-bias"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.logit_bias = {{1, 0}, {2, -101}}; }).find("--logit-bias"), std::string::npos);
  EXPECT_NE(refusal([&](auto& o) { o.logit_bias = {{1, INFINITY}}; }).find("--logit-bias"), std::string::npos);
  EXPECT_EQ(refusal([](auto& o) { o.logit_bias = {{1, -INFINITY}}; }), "");
  EXPECT_EQ(refusal([](auto& o) { o.frequency_penalty = o.presence_penalty = -2; }), "");
  EXPECT_EQ(refusal([](auto&) {}), "");
}

TEST(Sampler, DamagedLogitsAreAnErrorNotACrash) {
  EXPECT_THROW(Sampler(Plain(0)).Sample(std::vector<float>{NAN, NAN}, {}), Error);
  EXPECT_THROW(Sampler(Plain(0)).Sample(std::vector<float>{1, NAN, 2}, {}), Error);
  EXPECT_THROW(Sampler(Plain(0)).Sample(std::vector<float>{1, INFINITY}, {}), Error);
  EXPECT_THROW(Sampler(Plain(1)).Sample(std::vector<float>{INFINITY, 1}, {}), Error);
  EXPECT_EQ(Sampler(Plain(1)).Sample(std::vector<float>{-INFINITY, 1}, {}), 1);
  SamplerOptions never = Plain(0);
  never.logit_bias = {{0, -INFINITY}};
  EXPECT_THROW(Sampler(never).Sample(std::vector<float>{INFINITY, 1}, {}), Error);
  EXPECT_EQ(Sampler(never).Sample(std::vector<float>{3, 1}, {}), 1);
}

}  // namespace
}  // namespace lesskv
