// Every method and a dozen combinations on the bundled model, through the engine: what the contract suite holds on random
// numbers, on text that a real model reads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "format/safetensors.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

constexpr size_t kPrompt = 700;
constexpr size_t kDecoded = 16;

struct Bundled {
  std::shared_ptr<const Model> model = Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
  Engine engine{model, {.threads = 1}};
  std::vector<int32_t> tokens;

  Bundled() {
    std::ifstream file(LESSKV_SOURCE_DIR "/docs/sample.txt");
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    tokens = Tokenizer::Create(LoadVocabulary(model->file()))->Encode(text, true, false);
    tokens.resize(kPrompt + kDecoded);
  }
};

Bundled& Shared() {
  static Bundled bundled;
  return bundled;
}

using Logits = std::vector<float>;

LogitsSink KeepLast(Logits& logits) {
  return [&](std::span<const LogitsRow> tile) { logits.assign(tile.back().logits.begin(), tile.back().logits.end()); };
}

Logits Prompt(Sequence& sequence, size_t from = 0, size_t n = kPrompt) {
  Logits logits;
  Shared().engine.Prefill({{&sequence, std::span(Shared().tokens).subspan(from, n), LogitsRows::kLast}}, KeepLast(logits));
  return logits;
}

Logits DecodeOne(Sequence& sequence, size_t i) {
  Logits logits;
  Shared().engine.Decode({{&sequence, std::span(Shared().tokens).subspan(kPrompt + i, 1), LogitsRows::kLast}},
                         KeepLast(logits));
  return logits;
}

Logits DecodeAll(Sequence& sequence) {
  Logits logits;
  for (size_t i = 0; i < kDecoded; ++i) logits = DecodeOne(sequence, i);
  return logits;
}

class BundledModel : public testing::TestWithParam<const char*> {
 protected:
  std::shared_ptr<const CacheConfig> config_ = Shared().engine.MakeCacheConfig(CacheSpec::Parse(GetParam()));
};

TEST_P(BundledModel, LogitsAreFiniteAndBytesAreThosePlanned) {
  Sequence sequence(config_);
  Prompt(sequence);
  const CachePlan plan = config_->Plan(kPrompt, kDecoded);
  EXPECT_EQ(sequence.Stats().kv_bytes, plan.bytes_after_prompt);
  for (const float x : DecodeAll(sequence)) ASSERT_TRUE(std::isfinite(x));
  const CacheStats stats = sequence.Stats();
  EXPECT_EQ(stats.tokens_seen, kPrompt + kDecoded);
  EXPECT_EQ(stats.kv_bytes, plan.bytes_end);
  EXPECT_EQ(stats.kv_bytes_peak, plan.bytes_peak);
  EXPECT_DOUBLE_EQ(stats.tokens_resident, plan.rows_end);
}

TEST_P(BundledModel, InterleavedSequencesEqualEachAlone) {
  Sequence alone(config_), first(config_), second(config_);
  Prompt(alone);
  const Logits expected = DecodeAll(alone);
  Prompt(first);
  Prompt(second, 100, 500);
  Logits got;
  for (size_t i = 0; i < kDecoded; ++i) {
    got = DecodeOne(first, i);
    DecodeOne(second, kDecoded - 1 - i);
  }
  EXPECT_EQ(got, expected);
}

TEST_P(BundledModel, ClonedAndRestoredSequencesGoOnAsTheOriginal) {
  Sequence sequence(config_);
  Prompt(sequence);
  DecodeOne(sequence, 0);
  Sequence clone = sequence.Clone();
  const std::vector<std::byte> saved = sequence.cache().Serialize();
  auto cache = std::make_unique<SequenceCache>(config_);
  cache->Restore(saved.data(), saved.size());
  Sequence restored(std::move(cache), sequence.tokens());
  const Logits expected = DecodeAll(sequence);
  EXPECT_EQ(DecodeAll(clone), expected);
  EXPECT_EQ(DecodeAll(restored), expected);
}

INSTANTIATE_TEST_SUITE_P(
    Specs, BundledModel,
    testing::Values("full", "full+f32", "full+bf16", "full+q8", "full+q4", "window(5%)", "window(5%, positions=cache)",
                    "h2o(5%)", "tova(5%)", "snapkv(5%)", "h2o(5%)+pyramid", "snapkv(10%)+pyramid+q8", "h2o(5%)+less",
                    "window(5%)+less", "tova(5%)+less+q8", "snapkv(5%)+less", "h2o(5%)+pyramid+less+mix(k=q8, v=q4)",
                    "h2o(5%)+less+prefill(chunk=128)", "window(64)+bf16+prefill(chunk=100)"),
    [](const auto& test) {
      std::string name;
      for (const char c : std::string(test.param)) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
      return name;
    });

TEST(BundledModelFull, BudgetThatHoldsEverythingChangesNoBit) {
  Sequence full(Shared().engine.MakeCacheConfig(CacheSpec()));
  Prompt(full);
  const Logits expected = DecodeAll(full);
  for (const char* spec : {"h2o(1000)", "window(1000)", "tova(1000)", "snapkv(1000)", "h2o(1000)+less"}) {
    Sequence sequence(Shared().engine.MakeCacheConfig(CacheSpec::Parse(spec)));
    Prompt(sequence);
    EXPECT_EQ(DecodeAll(sequence), expected) << spec;
  }
}

TEST(BundledModelFull, EvictionChangesWhatTheModelSays) {
  Sequence full(Shared().engine.MakeCacheConfig(CacheSpec())), small(Shared().engine.MakeCacheConfig(CacheSpec::Parse("h2o(2%)")));
  EXPECT_EQ(Prompt(full), Prompt(small));  // a one-shot prompt is attended in full
  EXPECT_NE(DecodeAll(full), DecodeAll(small));
}

// The independent float64 forward pass of tools/reference_model/make_logits_golden.py over the same file.
TEST(BundledModelFull, LogitsEqualThoseOfTheIndependentImplementation) {
  const SafetensorsFile golden = SafetensorsFile::Open(LESSKV_SOURCE_DIR "/models/lesskv-small.logits.safetensors");
  const size_t n_vocab = Shared().model->config().n_vocab;
  const auto ids = golden.Values<int32_t>("ids", std::vector<size_t>{64});
  const auto argmax = golden.Values<int32_t>("argmax", std::vector<size_t>{64});
  const auto positions = golden.Values<int32_t>("positions", std::vector<size_t>{16});
  const auto expected = golden.Values<float>("logits", std::vector<size_t>{16, n_vocab});

  Engine engine(Shared().model, {.threads = 1, .compute = ComputeChoice::kF32});
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full+f32")));
  std::vector<Logits> got;
  engine.Prefill({{&sequence, ids, LogitsRows::kAll}}, [&](std::span<const LogitsRow> tile) {
    for (const LogitsRow& row : tile) got.emplace_back(row.logits.begin(), row.logits.end());
  });
  ASSERT_EQ(got.size(), ids.size());
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_EQ(std::max_element(got[i].begin(), got[i].end()) - got[i].begin(), argmax[i]) << i;
  const auto [low, high] = std::minmax_element(expected.begin(), expected.end());
  float worst = 0;
  for (size_t i = 0; i < positions.size(); ++i)
    for (size_t v = 0; v < n_vocab; ++v)
      worst = std::max(worst, std::abs(got[static_cast<size_t>(positions[i])][v] - expected[i * n_vocab + v]));
  EXPECT_LE(worst, 1e-3f * (*high - *low));
}

}  // namespace
}  // namespace lesskv
