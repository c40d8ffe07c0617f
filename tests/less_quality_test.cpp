// The bundled model with its bundled sidecar, through the code that serves users: at the same sparsity full < LESS <
// Baseline+ <= bare selector in perplexity, and LESS also beats the selector that spends the state's bytes on rows
// (rank 8 in float32: 2,080 bytes a head, 8 pairs of half-precision rows, 9 with scores counted).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "cache_harness.h"
#include "engine/engine.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

constexpr const char* kModel = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";
constexpr size_t kStep = 8;

// Mean negative log-likelihood of a window fed kStep tokens at a time.
double MeanNats(Engine& engine, const std::string& spec, std::span<const int32_t> tokens) {
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse(spec), tokens.size()));
  double sum = 0;
  size_t n = 0;
  for (size_t at = 0; at < tokens.size(); at += kStep) {
    const auto part = tokens.subspan(at, std::min(kStep, tokens.size() - at));
    engine.Step({{&sequence, part, LogitsRows::kAll, 0, StepKind::kStream}}, [&](std::span<const LogitsRow> tile) {
      for (const LogitsRow& row : tile) {
        const size_t next = at + row.row + 1;
        if (next >= tokens.size()) continue;
        const float top = *std::max_element(row.logits.begin(), row.logits.end());
        double mass = 0;
        for (float l : row.logits) mass += std::exp(static_cast<double>(l) - top);
        sum += std::log(mass) + top - row.logits[static_cast<size_t>(tokens[next])];
        ++n;
      }
    });
  }
  return sum / static_cast<double>(n);
}

TEST(LessQuality, OrderingOnTheBundledModel) {
  const std::string text_path = testing_support::SharedFile("data/text/tinyshakespeare.txt");
  if (text_path.empty()) GTEST_SKIP() << "no text at LESSKV_SHARED_DIR/data/text/tinyshakespeare.txt";
  ASSERT_TRUE(std::filesystem::exists(kModel));
  const auto model = Model::Load(kModel);
  Engine engine(model, {});
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  std::ifstream in(text_path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const size_t ctx = model->config().train_ctx;
  for (const std::string rows : {"2%", "5%"}) {
    double full = 0, less = 0, plus = 0, same_bytes = 0, bare = 0;
    for (size_t at : {size_t{100000}, size_t{600000}}) {
      std::vector<int32_t> tokens = tokenizer->Encode(text.substr(at, ctx * 8), tokenizer->add_bos(), false);
      ASSERT_GE(tokens.size(), ctx);
      tokens.resize(ctx);
      full += MeanNats(engine, "full", tokens);
      less += MeanNats(engine, "h2o(" + rows + ")+less", tokens);
      plus += MeanNats(engine, "h2o(" + rows + ", extra=4)", tokens);
      same_bytes += MeanNats(engine, "h2o(" + rows + ", extra=9)", tokens);
      bare += MeanNats(engine, "h2o(" + rows + ")", tokens);
    }
    EXPECT_LT(full, less) << rows;
    EXPECT_LT(less, plus) << rows;
    EXPECT_LT(less, same_bytes) << rows;
    // Of the nats that the bare selector loses, the jointly refined maps win back at least this share.
    const double won = (bare - less) / (bare - full);
    EXPECT_GT(won, rows == "2%" ? 0.30 : 0.18) << rows;
    EXPECT_LE(plus, bare + 0.005) << rows;  // four rows more: near the noise of two windows
  }
}

}  // namespace
}  // namespace lesskv
