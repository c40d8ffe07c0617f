// The evaluations on the bundled model: properties that hold whatever the model has learned, and known values.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "eval/choices.h"
#include "eval/divergence.h"
#include "eval/heat_map.h"
#include "eval/match_bytes.h"
#include "eval/perplexity.h"
#include "eval/recall.h"
#include "eval/ruler.h"
#include "eval/summarize.h"
#include "eval/test_model.h"
#include "eval/window_batch.h"

namespace lesskv {
namespace {

using testing_support::Bundled;
using testing_support::kSampleText;

double Value(const Json& row, const std::string& key) { return row.at(key).get<double>(); }

Json PerplexityRow(const std::string& spec, const Protocol& protocol, size_t batch = 16, size_t windows = 4) {
  return EvaluatePerplexity(Bundled().Setup({spec}, 128, batch), {{kSampleText}, windows, protocol}).rows.at(0);
}

Json DivergenceRow(const std::string& spec, const Protocol& protocol) {
  return EvaluateDivergence(Bundled().Setup({spec}, 128), {{kSampleText}, 4, protocol}).rows.at(0);
}

constexpr Protocol kStream8{.mode = Protocol::Mode::kStream, .step = 8};
constexpr Protocol kStream1{.mode = Protocol::Mode::kStream, .step = 1};
constexpr Protocol kContinue{.mode = Protocol::Mode::kContinue, .prompt = 40};

// Logits computed one prompt at a time, without any of the evaluation's batching.
TEST(PerplexityTest, EqualsTheDefinition) {
  const Json row = PerplexityRow("full", kStream8);
  const std::string texts[] = {kSampleText};
  double nats = 0, bytes = 0;
  size_t tokens = 0;
  for (const TextWindow& window : ReadWindows(*Bundled().tokenizer, texts, 128, 2, 4)) {
    Sequence sequence(Bundled().engine.MakeCacheConfig(CacheSpec(), 128));
    Bundled().engine.Prefill({{&sequence, window.ids, LogitsRows::kAll}}, [&](std::span<const LogitsRow> rows) {
      for (const LogitsRow& logits : rows) {
        if (logits.row + 1 == window.ids.size()) continue;
        double sum = 0;
        for (const float logit : logits.logits) sum += std::exp(double{logit});
        nats += std::log(sum) - logits.logits[static_cast<size_t>(window.ids[logits.row + 1])];
        bytes += window.bytes[logits.row + 1];
        ++tokens;
      }
    });
  }
  EXPECT_EQ(row["tokens_scored"], tokens);
  EXPECT_NEAR(Value(row, "perplexity"), std::exp(nats / static_cast<double>(tokens)), 0.01);
  EXPECT_NEAR(Value(row, "bits_per_byte"), nats / bytes / std::log(2.0), 1e-3);
  EXPECT_NEAR(Value(row, "byte_perplexity"), std::exp(nats / bytes), 1e-3);
  EXPECT_GT(Value(row, "word_perplexity"), Value(row, "perplexity"));
}

// llama-perplexity: of windows of one context the tokens behind the first half and one, whatever feeds them.
TEST(PerplexityTest, LlamasProtocolScoresSecondHalves) {
  const std::string texts[] = {kSampleText};
  double nats = 0;
  size_t tokens = 0;
  for (const TextWindow& window : ReadWindows(*Bundled().tokenizer, texts, 128, 2, 3, /*llama=*/true)) {
    Sequence sequence(Bundled().engine.MakeCacheConfig(CacheSpec(), 128));
    Bundled().engine.Prefill({{&sequence, window.ids, LogitsRows::kAll}}, [&](std::span<const LogitsRow> rows) {
      for (const LogitsRow& logits : rows) {
        if (logits.row < 64 || logits.row + 1 == window.ids.size()) continue;
        nats += LogMass(logits.logits) - logits.logits[static_cast<size_t>(window.ids[logits.row + 1])];
        ++tokens;
      }
    });
  }
  ASSERT_EQ(tokens, 3u * 63);
  for (const Protocol& protocol : {Protocol{Protocol::Mode::kStream, 8, 0, true}, Protocol{Protocol::Mode::kStream, 50, 0, true},
                                   Protocol{Protocol::Mode::kContinue, 8, 64, true}, Protocol{Protocol::Mode::kContinue, 8, 40, true}}) {
    const Json row = PerplexityRow("full", protocol, 16, 3);
    EXPECT_EQ(row["tokens_scored"], tokens);
    EXPECT_EQ(row["protocol"], "llama");
    EXPECT_NEAR(Value(row, "perplexity"), std::exp(nats / static_cast<double>(tokens)), 0.01);
  }
  EXPECT_EQ(DivergenceRow("full", {Protocol::Mode::kStream, 8, 0, true})["kl_mean"], 0);
  EXPECT_THROW(PerplexityRow("full", {Protocol::Mode::kContinue, 8, 65, true}), Error);
}

TEST(PerplexityTest, BatchedWindowsEqualOneByOne) {
  for (const char* spec : {"full", "h2o(24)"}) {
    for (const Protocol& protocol : {kStream8, kContinue}) {
      const double together = Value(PerplexityRow(spec, protocol, 16), "perplexity");
      EXPECT_NEAR(Value(PerplexityRow(spec, protocol, 1), "perplexity"), together, 1e-4 * together) << spec;
    }
  }
}

TEST(PerplexityTest, SameSeedSameBits) {
  EXPECT_EQ(PerplexityRow("h2o(24)", kStream8)["perplexity"], PerplexityRow("h2o(24)", kStream8)["perplexity"]);
}

// A window's tokens behind the prompt see the same rows whether the prompt came at once or one by one.
TEST(PerplexityTest, ContinueEqualsTheTailOfAStreamForAWindow) {
  const std::string texts[] = {kSampleText};
  const auto windows = ReadWindows(*Bundled().tokenizer, texts, 128, 128, 2);
  const auto score = [&](const std::string& spec, const Protocol& protocol) {
    std::vector<double> nats;
    const auto config = Bundled().engine.MakeCacheConfig(CacheSpec::Parse(spec), 128);
    const EvalSetup setup = Bundled().Setup({spec}, 128);
    WindowBatch batch(setup, config, windows, protocol);
    const auto sink = [&](std::span<const ScoredRow> rows) {
      for (const ScoredRow& row : rows) {
        if (row.target <= kContinue.prompt) continue;
        nats.push_back(LogMass(row.logits) - row.logits[static_cast<size_t>(windows[row.window].ids[row.target])]);
      }
    };
    while (batch.Step(sink)) {
    }
    return nats;
  };
  const auto full_stream = score("full", kStream1), full_continue = score("full", kContinue);
  ASSERT_EQ(full_stream.size(), full_continue.size());
  ASSERT_EQ(full_stream.size(), 2 * (128 - 1 - kContinue.prompt));
  for (size_t i = 0; i < full_stream.size(); ++i) EXPECT_NEAR(full_stream[i], full_continue[i], 0.02) << i;
}

TEST(PerplexityTest, RowsCarryEverything) {
  const Json row = PerplexityRow("h2o(24)", kContinue);
  for (const char* key : {"model", "model_fingerprint", "kv_spec", "mode", "seed", "threads", "isa", "compute",
                          "version", "tokens_seen", "tokens_resident", "kv_bytes", "kv_bytes_peak", "kv_bytes_full",
                          "sidecar_bytes", "tokens_scored", "tokens_per_second", "prefill_tokens_per_second"}) {
    EXPECT_TRUE(row.contains(key)) << key;
  }
  EXPECT_EQ(row["tokens_seen"], 127);
  EXPECT_EQ(row["tokens_resident"], 24.0);
  EXPECT_EQ(row["mode"], "continue");
}

TEST(PerplexityTest, RefusesAProtocolThatScoresNothing) {
  const Protocol no_prompt{.mode = Protocol::Mode::kContinue},
      too_long{.mode = Protocol::Mode::kContinue, .prompt = 127};
  const Protocol no_step{.mode = Protocol::Mode::kStream, .step = 0};
  for (const Protocol& protocol : {no_prompt, too_long, no_step}) EXPECT_THROW(PerplexityRow("full", protocol), Error);
  EXPECT_THROW(ParseMode("both"), Error);
}

TEST(PerplexityTest, PairsAreNearFarOrNew) {
  using enum PairClass;
  const std::vector<int32_t> ids = {7, 8, 7, 8, 9, 9, 9, 1, 7, 8};
  EXPECT_EQ(ClassifyPairs(ids, 3),
            (std::vector<PairClass>{kNew, kNew, kNew, kNear, kNew, kNew, kNear, kNew, kNew, kFar}));
  EXPECT_EQ(ClassifyPairs(ids, 6).back(), kNear);
  EXPECT_EQ(ClassifyPairs(ids, 5).back(), kFar);
  EXPECT_TRUE(ClassifyPairs({}, 5).empty());
}

// The classes make up the whole, and a small cache loses where what is repeated has left it.
TEST(PerplexityTest, ByPairItShowsWhereTheLossLies) {
  const EvalSetup setup = Bundled().Setup({"full", "window(24)"}, 256);
  const Report report = EvaluatePerplexity(setup, {{kSampleText}, 4, kStream8, 32});
  for (const Json& row : report.rows) {
    double share = 0, nats = 0;
    for (const std::string name : {"pair_new", "pair_near", "pair_far"}) {
      share += Value(row, "share_" + name);
      nats += Value(row, "share_" + name) * std::log(Value(row, "perplexity_" + name));
    }
    EXPECT_NEAR(share, 1, 1e-12);
    EXPECT_NEAR(nats, std::log(Value(row, "perplexity")), 1e-9);
  }
  const auto lost = [&](const std::string& name) {
    return std::log(Value(report.rows[1], "perplexity_" + name) / Value(report.rows[0], "perplexity_" + name));
  };
  EXPECT_GT(lost("pair_far"), 0.3);
  EXPECT_GT(lost("pair_far"), 3 * lost("pair_near"));
  EXPECT_GT(lost("pair_far"), 3 * lost("pair_new"));
}

// Texts of 2 and 4 scored tokens: sums of nats 4 and 2, over 2 and 2 words and 6 and 12 bytes.
TEST(PerplexityTest, TalliesByHand) {
  PerplexityTally tally(/*pair_distance=*/2, /*block=*/2);
  const std::vector<double> nats = {1, 3}, others = {0.5, 0.5, 0.5, 0.5};
  tally.AddWindow({{1, 2, 3}, {0, 2, 4}, {0, 1, 1}}, 1, nats);
  tally.AddWindow({{1, 2, 1, 2, 3}, {0, 3, 3, 3, 3}, {0, 1, 0, 1, 0}}, 1, others);
  Json row;
  tally.AddTo(row);
  EXPECT_DOUBLE_EQ(Value(row, "perplexity"), std::exp(1.0));
  EXPECT_DOUBLE_EQ(Value(row, "perplexity_se"), std::exp(1.0) * 4 / 6);  // residuals 2 and -2
  EXPECT_DOUBLE_EQ(Value(row, "word_perplexity"), std::exp(1.5));
  EXPECT_DOUBLE_EQ(Value(row, "word_perplexity_se"), std::exp(1.5) * 2 / 4);  // 1 and -1
  EXPECT_DOUBLE_EQ(Value(row, "byte_perplexity"), std::exp(1.0 / 3));
  EXPECT_DOUBLE_EQ(Value(row, "bits_per_byte"), 1 / std::log(8.0));
  EXPECT_DOUBLE_EQ(Value(row, "bits_per_byte_se"), 4.0 / 18 / std::log(2.0));  // 2 and -2
  EXPECT_DOUBLE_EQ(Value(row, "perplexity_pair_new"), std::exp(1.1));
  EXPECT_DOUBLE_EQ(Value(row, "perplexity_pair_new_se"), std::exp(1.1) * 3.6 / 5);  // 1.8 and -1.8
  EXPECT_DOUBLE_EQ(Value(row, "share_pair_near"), 1.0 / 6);
  EXPECT_DOUBLE_EQ(Value(row, "perplexity_block_first"), std::exp(0.75));
  EXPECT_DOUBLE_EQ(Value(row, "perplexity_block_last"), std::exp(0.5));
  EXPECT_DOUBLE_EQ(Value(row, "perplexity_block_max"), std::exp(4.0 / 3));
}

// Blocks make up the whole; a mode that scores from the middle on has none before.
TEST(PerplexityTest, ByBlockItShowsWhereInTheTextTheLossLies) {
  const EvalSetup setup = Bundled().Setup({"window(24)"}, 256);
  for (const Protocol& protocol : {kStream8, Protocol{.mode = Protocol::Mode::kContinue, .prompt = 120}}) {
    const Json row = EvaluatePerplexity(setup, {{kSampleText}, 2, protocol, 0, 50}).rows[0];
    const Json& blocks = row.at("perplexity_by_block");
    ASSERT_EQ(blocks.size(), 6u);
    const bool is_stream = protocol.mode == Protocol::Mode::kStream;
    const size_t first = is_stream ? 1 : 121;
    double nats = 0, scored = 0;
    for (size_t b = 0; b < blocks.size(); ++b) {
      const size_t end = std::min<size_t>(256, (b + 1) * 50), begin = std::max(first, b * 50);
      if (begin >= end) {
        EXPECT_TRUE(std::isnan(blocks[b].get<double>())) << b;
        continue;
      }
      nats += static_cast<double>(end - begin) * std::log(blocks[b].get<double>());
      scored += static_cast<double>(end - begin);
    }
    EXPECT_NEAR(nats / scored, std::log(Value(row, "perplexity")), 1e-9);
    EXPECT_EQ(Value(row, "tokens_scored"), 2 * scored);
    EXPECT_EQ(Value(row, "perplexity_block_first"), blocks[is_stream ? 0 : 2].get<double>());
    EXPECT_EQ(Value(row, "perplexity_block_last"), blocks[5].get<double>());
    ASSERT_EQ(row.at("microseconds_by_block").size(), 6u);
    EXPECT_EQ(std::isnan(row.at("microseconds_by_block")[0].get<double>()), !is_stream);
    EXPECT_GT(row.at("microseconds_by_block")[5].get<double>(), 0);
  }
}

// The time of a block is that of its tokens, also while the shorter texts of a batch have ended.
TEST(PerplexityTest, BlocksOfTextsOfDifferentLengthsAreTimedWhereTheyLie) {
  const std::string short_text = testing::TempDir() + "/short_text.txt";
  std::ofstream(short_text) << "The sea was calm.";
  const std::string long_text = testing::TempDir() + "/long_text.txt";
  std::ofstream(long_text) << ReadTextFile(kSampleText).substr(0, 600);
  const Json row = EvaluatePerplexity(Bundled().Setup({"window(24)"}, 256),
                                      {{long_text, short_text, short_text, short_text}, 0, kStream8, 0, 20}).rows[0];
  EXPECT_EQ(row.at("microseconds_by_block").size(), row.at("perplexity_by_block").size());
  for (const Json& microseconds : row.at("microseconds_by_block")) EXPECT_GT(microseconds.get<double>(), 0);
}

TEST(PerplexityTest, StopsWhenAsked) {
  EvalSetup setup = Bundled().Setup({"full"}, 128);
  const std::atomic<bool> stop = true;
  setup.stop = &stop;
  EXPECT_THROW(EvaluatePerplexity(setup, {{kSampleText}, 4, kStream8}), Error);
}

// The figures that are known for this model and text: 4.81 with the full cache, 4.84, 5.03 and 5.64 with 4 sinks and
// 128, 64 and 16 recent tokens. They are those of about the first 40 windows of 512 tokens, one token a step.
TEST(PerplexityTest, KnownValuesOfStories) {
  const auto model = testing_support::SharedFile("data/models/stories260Ktok512.gguf");
  const auto text = testing_support::SharedFile("data/text/tinystories-sample.txt");
  if (!std::filesystem::exists(model) || !std::filesystem::exists(text)) GTEST_SKIP() << model << " is not there";
  const auto part =
      std::filesystem::temp_directory_path() / fmt::format("lesskv_eval_test_stories_{}.txt", ::getpid());
  std::ofstream(part) << ReadTextFile(text).substr(0, 45000);
  testing_support::OpenedModel stories(model);
  const EvalSetup setup = stories.Setup({"full", "window(132)", "window(68)", "window(20)"}, 512);
  const Report report = EvaluatePerplexity(setup, {{part}, 0, kStream1});
  const double known[] = {4.81, 4.84, 5.03, 5.64};
  for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(Value(report.rows[i], "perplexity") / known[i], 1, 0.015) << i;
  std::filesystem::remove(part);
}

TEST(DivergenceTest, OfTheFullCacheIsExactlyZero) {
  for (const Protocol& protocol : {kStream8, kContinue}) {
    const Json row = DivergenceRow("full", protocol);
    EXPECT_EQ(Value(row, "kl_mean"), 0);
    EXPECT_EQ(Value(row, "kl_max"), 0);
    EXPECT_EQ(Value(row, "same_top1"), 1);
    EXPECT_EQ(Value(row, "perplexity_ratio"), 1);
    EXPECT_EQ(Value(row, "perplexity_ratio_se"), 0);
  }
}

TEST(DivergenceTest, GrowsAsRowsAreTakenAwayAndAgreesWithPerplexity) {
  const Json many = DivergenceRow("window(64)", kStream8), few = DivergenceRow("window(8)", kStream8);
  EXPECT_GT(Value(many, "kl_mean"), 0);
  EXPECT_GT(Value(few, "kl_mean"), Value(many, "kl_mean"));
  EXPECT_LT(Value(few, "same_top1"), Value(many, "same_top1"));
  EXPECT_LT(Value(few, "kl_p95"), Value(few, "kl_p99"));
  EXPECT_LT(Value(few, "kl_p99"), Value(few, "kl_max"));
  EXPECT_NEAR(Value(few, "perplexity"), Value(PerplexityRow("window(8)", kStream8), "perplexity"), 1e-6);
  EXPECT_NEAR(Value(few, "perplexity_full"), Value(PerplexityRow("full", kStream8), "perplexity"), 1e-6);
  EXPECT_NEAR(Value(few, "perplexity_ratio"), Value(few, "perplexity") / Value(few, "perplexity_full"), 1e-9);
}

// Two texts together have the means, and the errors over texts, of what each has alone.
TEST(DivergenceTest, ErrorsAreOverTexts) {
  const std::string sample = ReadTextFile(kSampleText), folder = testing::TempDir();
  const std::vector<std::string> files = {folder + "/divergence_a.txt", folder + "/divergence_b.txt"};
  std::ofstream(files[0]) << sample.substr(0, 450);
  std::ofstream(files[1]) << sample.substr(1000, 300);
  const auto measure = [](const std::vector<std::string>& texts) {
    return EvaluateDivergence(Bundled().Setup({"window(8)"}, 256), {texts, 0, kStream8}).rows.at(0);
  };
  const Json both = measure(files);
  EXPECT_EQ(both["windows"], 2);
  ClusteredMean kl, same, log_ratio;
  for (const std::string& file : files) {
    const Json one = measure({file});
    const double n = Value(one, "tokens_scored");
    kl.Add(n * Value(one, "kl_mean"), static_cast<size_t>(n));
    same.Add(n * Value(one, "same_top1"), static_cast<size_t>(n));
    log_ratio.Add(n * std::log(Value(one, "perplexity_ratio")), static_cast<size_t>(n));
  }
  EXPECT_NEAR(Value(both, "kl_mean"), kl.Mean(), 1e-4);
  EXPECT_NEAR(Value(both, "kl_mean_se"), kl.StandardError(), 1e-4);
  EXPECT_NEAR(Value(both, "same_top1"), same.Mean(), 1e-9);
  EXPECT_NEAR(Value(both, "same_top1_se"), same.StandardError(), 1e-9);
  const double ratio = std::exp(log_ratio.Mean());
  EXPECT_GT(ratio, 1.1);
  EXPECT_NEAR(Value(both, "perplexity_ratio"), ratio, 1e-4);
  EXPECT_NEAR(Value(both, "perplexity_ratio_se"), ratio * log_ratio.StandardError(), 1e-4);
}

RecallOptions KeyWords() {
  RecallOptions options;
  options.kinds = {RecallKind::kKeyWord};
  options.lengths = {160};
  options.depths = {0.1, 0.9};
  options.samples = 6;
  return options;
}

// The bundled model answers nearly all of these; a cache that has lost the first half cannot.
TEST(RecallTest, SeesWhatACacheHasForgotten) {
  RecallOptions options = KeyWords();
  options.ask = RecallOptions::Ask::kAfterPrompt;
  const Report report = EvaluateRecall(Bundled().Setup({"full", "window(48)"}, 256), options);
  const auto full = report.rows[0]["accuracy_by_depth"], window = report.rows[1]["accuracy_by_depth"];
  EXPECT_GE(full[0], 0.6);
  EXPECT_GE(full[1], 0.6);
  EXPECT_EQ(window[0], 0.0);
  EXPECT_GE(window[1], 0.6);
  EXPECT_EQ(report.rows[0]["samples"], 12);
  EXPECT_GE(Value(report.rows[0], "first_token_accuracy"), Value(report.rows[0], "accuracy"));
}

// Who has forgotten a number may still guess how it begins.
TEST(RecallTest, TheFirstTokenIsJudgedByItself) {
  RecallOptions options = KeyWords();
  options.kinds = {RecallKind::kKeyNumber};
  const Json row = EvaluateRecall(Bundled().Setup({"window(48)"}, 256), options).rows.at(0);
  EXPECT_GT(Value(row, "first_token_accuracy"), Value(row, "accuracy"));
}

TEST(RecallTest, TheWaysOfAskingAgreeForTheFullCache) {
  RecallOptions with = KeyWords(), after = KeyWords(), stream = KeyWords();
  after.ask = RecallOptions::Ask::kAfterPrompt;
  stream.protocol = kStream8;
  const auto measure = [](const RecallOptions& options) {
    const Json row = EvaluateRecall(Bundled().Setup({"full"}, 256), options).rows.at(0);
    return std::pair(row["accuracy_by_depth"], row["tokens_seen"]);  // no token is read twice, none left out
  };
  EXPECT_EQ(measure(with), measure(after));
  EXPECT_EQ(measure(with), measure(stream));
}

TEST(RecallTest, RefusesLengthsAndDepthsThatCannotBe) {
  RecallOptions options = KeyWords();
  EXPECT_THROW(EvaluateRecall(Bundled().Setup({"full"}, 160), options), Error);
  options.depths = {1.5};
  EXPECT_THROW(EvaluateRecall(Bundled().Setup({"full"}, 256), options), Error);
}

// Subjects that read prompts alike read them together; that changes none of their numbers.
TEST(TogetherTest, EachSubjectIsAsItWouldBeAlone) {
  const std::vector<std::string> specs = {"h2o(24)", "full", "window(20)", "full+q8", "snapkv(24, window=8)",
                                          "window(20)+prefill(chunk=16)", "h2o(24)+q8"};
  const RulerOptions ruler{.kinds = {RulerKind::kSingle1, RulerKind::kVariables}, .length = 250, .samples = 2};
  const RecallOptions recall{.lengths = {120}, .depths = {0, 1}, .samples = 2};
  RecallOptions after = recall;
  after.ask = RecallOptions::Ask::kAfterPrompt;
  ChoicesOptions choices;
  choices.questions = ParseChoices(R"({"q": "The captain of the old ship looked out at the sea and saw", "choices": ["a whale.", "the moon."], "label": 0}
{"q": "When the long winter was over they went back to the", "choices": ["house by the river.", "of."], "label": 0})",
                                   "test");
  const auto all = [&](const std::vector<std::string>& which) {
    std::vector<std::vector<Json>> reports = {EvaluateDivergence(Bundled().Setup(which, 128), {{kSampleText}, 3, kContinue}).rows,
                                              EvaluatePerplexity(Bundled().Setup(which, 128), {{kSampleText}, 3, kContinue}).rows,
                                              EvaluateChoices(Bundled().Setup(which, 128), choices).rows,
                                              EvaluateRecall(Bundled().Setup(which, 160), recall).rows,
                                              EvaluateRecall(Bundled().Setup(which, 160), after).rows,
                                              EvaluateRuler(Bundled().Setup(which, 400), ruler).rows};
    return reports;
  };
  std::vector<std::vector<Json>> together = all(specs);
  for (size_t s = 0; s < specs.size(); ++s) {
    SCOPED_TRACE(specs[s]);
    std::vector<std::vector<Json>> alone = all({specs[s]});
    for (size_t r = 0; r < alone.size(); ++r) {
      Json &a = alone[r].at(0), b = together[r].at(s);
      EXPECT_EQ(b.contains("prefill_caches"), s != 5) << a.at("command");
      for (const char* key : {"tokens_per_second", "prefill_tokens_per_second", "prefill_caches", "average", "average_se", "tasks_averaged"}) {
        a.erase(key);
        b.erase(key);
      }
      EXPECT_EQ(a, b);
    }
  }
}

TEST(HeatMapTest, HasACellForEveryLengthAndDepth) {
  const Report report = EvaluateRecall(Bundled().Setup({"full", "window(48)"}, 256), KeyWords());
  const std::string svg = HeatMapSvg(report);
  size_t cells = 0;
  for (size_t at = svg.find("<rect x="); at != std::string::npos; at = svg.find("<rect x=", at + 1)) ++cells;
  EXPECT_EQ(cells, 4u);
  EXPECT_NE(svg.find("window(48)"), std::string::npos);
  EXPECT_EQ(svg.find("href"), std::string::npos);  // nothing outside the file
  EXPECT_THROW(WriteHeatMap("recall.png", report), Error);
}

TEST(ChoicesTest, PromptsOfTheThreeKinds) {
  const auto questions =
      ParseChoices(R"({"q": "It fell.", "asks_for": "cause", "choices": ["It broke.", "I ran."], "label": 0}
{"q": "Ann met Eve so _ smiled.", "choices": ["Ann", "Eve"], "label": 1}

{"q": "What is hot?", "choices": ["ice", "fire", "rain"], "label": 1})",
                   "test");
  ASSERT_EQ(questions.size(), 3u);
  EXPECT_EQ(questions[0].prompt, "It fell because");
  EXPECT_EQ(questions[0].continuations[1], " i ran.");
  EXPECT_EQ(questions[1].prompt, "Ann met Eve so");
  EXPECT_EQ(questions[1].continuations[1], " Eve smiled.");
  EXPECT_EQ(questions[2].prompt, "Question: What is hot?\nAnswer:");
  EXPECT_EQ(questions[2].label, 1u);
  EXPECT_THROW(ParseChoices("{\"q\": 1}", "test"), Error);
  const std::string nested = "{\"q\": " + std::string(200000, '[') + std::string(200000, ']') + "}";
  EXPECT_THROW(ParseChoices(nested, "test"), Error);
  EXPECT_THROW(ParseSummaryTasks(nested, "test"), Error);
  EXPECT_THROW(ParseChoices(R"({"q": "a", "choices": ["b", "c"], "label": 2})", "test"), Error);
  EXPECT_EQ(ParseChoices(R"({"q": "a", "choices": ["b", "c"], "label": 1.0})", "test")[0].label, 1u);
  for (const char* label : {"0.7", "-1", "true", "\"1\"", "1e99", "null"}) {
    const std::string line = fmt::format(R"({{"q": "a", "choices": ["b", "c"], "label": {}}})", label);
    EXPECT_THROW(ParseChoices(line, "test"), Error) << label;
  }
}

// A copied statement is likelier than a wrong one for any model that can copy.
TEST(ChoicesTest, TheLikelierContinuationWins) {
  ChoicesOptions options;
  options.source = "test";
  const std::string told = "The code of garden is 4821.\nThe code of river is 77.\n\nThe code of garden is";
  options.questions = {{told, {" 4821.\n", " 93516.\n"}, 0}, {told, {" horse.\n", " 4821.\n"}, 1}};
  const Json row = EvaluateChoices(Bundled().Setup({"full"}, 128), options).rows.at(0);
  EXPECT_EQ(Value(row, "accuracy"), 1);
  EXPECT_EQ(Value(row, "accuracy_normalised"), 1);
  EXPECT_EQ(row["questions"], 2);
  for (auto& question : options.questions) question.label = 1 - question.label;
  EXPECT_EQ(Value(EvaluateChoices(Bundled().Setup({"full"}, 128), options).rows.at(0), "accuracy"), 0);
}

TEST(ChoicesTest, LikelihoodsAreOfWholeContinuationsAndDividedByTheirBytes) {
  ChoicesOptions options;
  options.source = "test";
  const std::string told = "The code of garden is 4821.\nThe code of river is 77.\n\nThe code of garden is";
  options.questions = {{told, {" 4821 horse", " 4821."}, 1}};  // which differ in their last token
  EXPECT_EQ(Value(EvaluateChoices(Bundled().Setup({"full"}, 128), options).rows.at(0), "accuracy"), 1);
  // A beginning is likelier than the whole; by the byte what has been told before is.
  options.questions = {{told, {" #", " #\nThe code of garden is 4821.\nThe code of river is 77.\n"}, 0}};
  const Json row = EvaluateChoices(Bundled().Setup({"full"}, 128), options).rows.at(0);
  EXPECT_EQ(Value(row, "accuracy"), 1);
  EXPECT_EQ(Value(row, "accuracy_normalised"), 0);
}

// Shots stand before the questions and are not asked; what does not fit behind them is left out, and counted.
TEST(ChoicesTest, ShotsAndQuestionsThatDoNotFit) {
  ChoicesOptions options;
  options.source = "test";
  options.shots = 1;
  options.questions = {{"One and one is", {" two.", " nine and nine and nine."}, 0},
                       {"The sky is", {" blue.", " a stone."}, 0},
                       {"What came first of all the things on the table before us is", {" that.", " this."}, 0}};
  const auto n_tokens = [](const std::string& text) { return Bundled().tokenizer->Encode(text, false, false).size(); };
  const std::string before = "One and one is two.\n\n", asked = before + options.questions[1].prompt;
  const size_t prompt = n_tokens(asked), longest = 1 + n_tokens(before + options.questions[2].prompt + " that.");
  const auto measure = [&](size_t ctx) { return EvaluateChoices(Bundled().Setup({"full"}, ctx), options).rows.at(0); };
  const Json some = measure(longest - 1), all = measure(longest);
  EXPECT_EQ(some["questions"], 1);
  EXPECT_EQ(some["skipped"], 1);
  EXPECT_EQ(some["tokens_scored"], n_tokens(asked + " blue.") + n_tokens(asked + " a stone.") - 2 * prompt);
  EXPECT_EQ(all["questions"], 2);
  EXPECT_EQ(all["skipped"], 0);
}

TEST(SummarizeTest, AgainstItselfIsOneAndAgainstOtherWordsZero) {
  SummarizeOptions options;
  options.tasks = ParseSummaryTasks(R"({"article": "Once upon a time", "summary_gt": "zzzz qqqq", "id": 3})", "test");
  options.source = "test";
  options.max_tokens = 24;
  const Json other = EvaluateSummaries(Bundled().Setup({"full"}, 128), options).rows.at(0);
  EXPECT_EQ(Value(other, "rouge1"), 0);
  EXPECT_EQ(other["against"], "reference");
  options.against = SummarizeOptions::Against::kFull;
  const Json self = EvaluateSummaries(Bundled().Setup({"full"}, 128), options).rows.at(0);
  EXPECT_EQ(Value(self, "rouge1"), 1);
  EXPECT_EQ(Value(self, "rouge_l"), 1);
  EXPECT_EQ(self["against"], "the full cache's continuation");
  options.max_tokens = 1;  // which the prompt predicts: nothing was decoded, so there is no speed
  const Json one = EvaluateSummaries(Bundled().Setup({"full"}, 128), options).rows.at(0);
  EXPECT_EQ(one["generated_tokens"], 1);
  EXPECT_EQ(Value(one, "tokens_per_second"), 0);
  options.max_tokens = 128;  // leaves no room for the prompt
  EXPECT_THROW(EvaluateSummaries(Bundled().Setup({"full"}, 128), options), Error);
  EXPECT_THROW(ParseSummaryTasks("{\"article\": \"x\"}", "test"), Error);
}

TEST(MatchBytesTest, RivalsTakeAtMostTheBytesAndNearlyAllOfThem) {
  EvalSetup setup = Bundled().Setup({"h2o(64)+q8"}, 512);
  AddRivals(setup, 0, 512);
  ASSERT_EQ(setup.subjects.size(), 4u);  // full, the subject, window, h2o
  EXPECT_EQ(setup.subjects[0].config->spec().ToString(), "full");
  const auto bytes = [](const Subject& s) { return static_cast<double>(s.config->Plan(0, 512).bytes_end); };
  for (size_t i = 2; i < 4; ++i) {
    EXPECT_EQ(setup.subjects[i].match, "equal bytes");
    EXPECT_EQ(setup.subjects[i].matched_to, setup.subjects[1].config->spec().ToString());
    EXPECT_LE(bytes(setup.subjects[i]), bytes(setup.subjects[1]));
    EXPECT_GE(bytes(setup.subjects[i]), 0.95 * bytes(setup.subjects[1]));
  }
}

TEST(MatchBytesTest, LessMeetsItsSelectorThreeTimes) {
  if (!std::filesystem::exists(LESSKV_SOURCE_DIR "/models/lesskv-small.less.gguf")) GTEST_SKIP() << "no sidecar";
  EvalSetup setup = Bundled().Setup({"h2o(64, extra=2)+less"}, 512);
  AddRivals(setup, 0, 512);
  ASSERT_EQ(setup.subjects.size(), 5u);
  const auto spec = [&](size_t i) { return setup.subjects[i].config->spec().ToString(); };
  EXPECT_EQ(setup.subjects[2].match, "bare selector");
  EXPECT_EQ(setup.subjects[2].matched_to, setup.subjects[1].config->spec_text());
  EXPECT_EQ(spec(2), "h2o(64, extra=2)");
  EXPECT_EQ(setup.subjects[3].match, "rank/2 extra rows");  // rank 8
  EXPECT_EQ(spec(3), "h2o(64, extra=6)");
  EXPECT_EQ(setup.subjects[4].match, "equal bytes");
  // The state is 8 * 65 floats, a row 2 * 64 halves and its share of positions and scores: 7 or 8 rows at least.
  EXPECT_GE(setup.subjects[4].config->Plan(0, 512).rows_end, 66 + 7);
}

TEST(MatchBytesTest, NothingIsAddedTwice) {
  EvalSetup setup = Bundled().Setup({"full", "h2o(64)"}, 512);
  AddRivals(setup, 0, 512);
  ASSERT_EQ(setup.subjects.size(), 3u);  // h2o's rival is window, not itself
  EXPECT_TRUE(setup.subjects[2].config->spec().ToString().starts_with("window("));
}

TEST(MatchBytesTest, RivalsReadAPromptInTheSameBlocks) {
  for (const auto& [n_prompt, blocks] : {std::pair<size_t, bool>{400, true}, {32, false}, {0, false}}) {
    EvalSetup setup = Bundled().Setup({"cascade(64, block=32)"}, 512);
    AddRivals(setup, n_prompt, 512 - n_prompt);
    ASSERT_EQ(setup.subjects.size(), 4u);  // full, the subject, window, h2o
    for (size_t i = 2; i < 4; ++i)
      EXPECT_EQ(setup.subjects[i].config->spec().ToString().ends_with(")+prefill(chunk=32)"), blocks) << n_prompt;
  }
}

}  // namespace
}  // namespace lesskv
