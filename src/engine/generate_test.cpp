#include "engine/generate.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>

#include "base/error.h"
#include "base/memory.h"
#include "format/gguf_writer.h"

namespace lesskv {
namespace {

TEST(StopFilter, CutsAtTheFirstStopStringHoweverTheTextIsCut) {
  const std::string text = "one, two, three. END of it";
  for (size_t piece = 1; piece <= text.size(); ++piece) {
    StopFilter filter({"THE END", "END", "never"});
    std::string out;
    for (size_t i = 0; i < text.size(); i += piece) out += filter.Push(text.substr(i, piece));
    out += filter.Flush();
    EXPECT_EQ(out, "one, two, three. ") << "pieces of " << piece;
    EXPECT_TRUE(filter.stopped());
  }
}

TEST(StopFilter, HoldsBackOnlyWhatMayStillBecomeAStopString) {
  StopFilter filter({"abc"});
  EXPECT_EQ(filter.Push("xab"), "x");
  EXPECT_EQ(filter.Push("ab"), "ab");  // the held "ab" was text; the new one may begin a stop
  EXPECT_EQ(filter.Push("d"), "abd");
  EXPECT_EQ(filter.Push("a"), "");
  EXPECT_EQ(filter.Flush(), "a");
  EXPECT_FALSE(filter.stopped());
}

// A model that always says the token `says`: its layer adds nothing to the embeddings, which are all the same, and in
// the output matrix of `n_rows` rows that token's row alone is not zero.
std::shared_ptr<const Model> ModelThatSays(size_t says, size_t n_rows, const std::vector<std::string>& tokens) {
  constexpr size_t kWidth = 8;
  std::map<std::string, std::vector<float>> tensors;
  GgufWriter writer;
  const auto add = [&](const std::string& name, std::initializer_list<size_t> ne, float value) -> std::vector<float>& {
    size_t n = 1;
    for (const size_t extent : ne) n *= extent;
    auto& values = tensors.emplace(name, std::vector<float>(n, value)).first->second;
    writer.AddTensor(name, ne, values);
    return values;
  };
  writer.Add("general.architecture", "llama");
  for (const auto& [key, value] : std::map<std::string, uint32_t>{{"block_count", 1},
                                                                  {"context_length", 64},
                                                                  {"embedding_length", kWidth},
                                                                  {"feed_forward_length", kWidth},
                                                                  {"attention.head_count", 2}})
    writer.Add("llama." + key, value);
  writer.Add("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  writer.Add("tokenizer.ggml.model", "gpt2");
  writer.Add("tokenizer.ggml.pre", "gpt-2");
  writer.AddArray("tokenizer.ggml.tokens", tokens);
  std::vector<int32_t> types;
  for (const std::string& token : tokens)
    types.push_back(static_cast<int32_t>(token.size() > 1 ? TokenType::kControl : TokenType::kNormal));
  writer.AddArray("tokenizer.ggml.token_type", types);
  writer.AddArray("tokenizer.ggml.merges", std::vector<std::string>());
  add("token_embd.weight", {kWidth, n_rows}, 1);
  for (const char* name : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"})
    add(std::string(name) + ".weight", {kWidth}, 1);
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
    add("blk.0." + std::string(name) + ".weight", {kWidth, kWidth}, 0);
  auto& output = add("output.weight", {kWidth, n_rows}, 0);
  std::fill_n(output.begin() + static_cast<std::ptrdiff_t>(says * kWidth), kWidth, 1.0f);

  const std::string path = testing::TempDir() + "lesskv_generate_test.gguf";
  writer.Write(path);
  auto model = Model::Load(path, ModelLoading::kRead);
  std::filesystem::remove(path);
  return model;
}

GenerateResult Say(const std::shared_ptr<const Model>& model, const GenerateOptions& options) {
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  Engine engine(model, {.threads = 1, .compute = ComputeChoice::kF32});
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full")));
  return Generate(engine, *tokenizer, sequence, std::vector<int32_t>{0, 1}, options);
}

TEST(Generate, StopsAtAControlTokenThatIsNamed) {
  const auto model = ModelThatSays(2, 4, {"a", "b", "<|sep|>", "<|other|>"});
  const SamplerOptions greedy{.temperature = 0};
  const auto stopped = Say(model, {.sampler = greedy, .max_tokens = 5, .stops = {"<|other|>", "<|sep|>"}});
  EXPECT_EQ(FinishName(stopped.reason), "stop");
  EXPECT_EQ(stopped.generated_tokens, 1u);
  EXPECT_EQ(stopped.text, "");
  const auto unstopped = Say(model, {.sampler = greedy, .max_tokens = 5, .stops = {"<|other|>", "<|se"}});
  EXPECT_EQ(FinishName(unstopped.reason), "length") << "the text of a control token is not shown";
  EXPECT_EQ(unstopped.generated_tokens, 5u);
}

// The likeliest row is padding: it has no token, so it gets no logit and is never said.
TEST(Generate, RowsWithoutATokenAreNeverSaid) {
  const auto model = ModelThatSays(5, 6, {"a", "b", "c"});
  for (const float temperature : {0.0f, 5.0f}) {
    const GenerateResult result =
        Say(model, {.sampler = {.temperature = temperature, .top_k = 0, .top_p = 1, .min_p = 0}, .max_tokens = 30});
    EXPECT_EQ(result.generated_tokens, 30u);
    EXPECT_EQ(result.text.size(), 30u) << result.text;
  }
  Engine engine(model, {.threads = 1, .compute = ComputeChoice::kF32});
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full")));
  const std::vector<int32_t> known = {0, 2}, padding = {3};
  engine.Prefill({{&sequence, known, LogitsRows::kAll}}, [](std::span<const LogitsRow> rows) {
    for (const LogitsRow& row : rows) EXPECT_EQ(row.logits.size(), 3u);
  });
  EXPECT_THROW(engine.Decode({{&sequence, padding, LogitsRows::kLast}}), Error);
}

TEST(Memory, TooMuchIsRefusedWithBothNumbers) {
  ASSERT_TRUE(AvailableMemory().has_value());
  EXPECT_GT(*AvailableMemory(), size_t{1} << 20);
  RequireMemory(1, "nothing");
  try {
    RequireMemory(size_t{1} << 60, "a dream");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
    EXPECT_NE(std::string(error.what()).find("a dream needs 1.00 EiB"), std::string::npos) << error.what();
  }
}

TEST(Memory, BytesForPeople) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(1536), "1.50 KiB");
  EXPECT_EQ(HumanBytes(size_t{25} << 20), "25.0 MiB");
}

}  // namespace
}  // namespace lesskv
