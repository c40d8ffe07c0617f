#include "tokenizer/pre_tokenizer.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tokenizer/test_data.h"

namespace lesskv {
namespace {

using Pieces = std::vector<std::string>;

Pieces Split(std::string_view name, std::string_view text) {
  const auto pieces = PreTokenizer::ForName(name, "test").Split(text);
  return {pieces.begin(), pieces.end()};
}

// The pieces that the `tokenizers` package cuts (tools/golden/make_tokenizer_vectors.py).
TEST(PreTokenizer, CutsAsTokenizersDoes) {
  const auto& vectors = BpeVectors();
  for (const auto& [name, expected] : vectors.at("pre").items()) {
    const auto pre_tokenizer = PreTokenizer::ForName(name, "test");
    for (size_t i = 0; i < vectors.at("texts").size(); ++i) {
      const auto text = vectors.at("texts")[i].get<std::string>();
      const auto pieces = pre_tokenizer.Split(text);
      EXPECT_EQ(Pieces(pieces.begin(), pieces.end()), expected.at("pieces")[i].get<Pieces>())
          << name << ", text " << i << ": " << vectors.at("texts")[i].dump();
    }
  }
}

TEST(PreTokenizer, FamiliesDifferWhereTheyShould) {
  EXPECT_EQ(Split("gpt-2", "in 1867"), (Pieces{"in", " 1867"}));
  EXPECT_EQ(Split("llama-bpe", "in 1867"), (Pieces{"in", " ", "186", "7"}));
  EXPECT_EQ(Split("qwen2", "in 1867"), (Pieces{"in", " ", "1", "8", "6", "7"}));
  EXPECT_EQ(Split("smollm", "in 1867"), (Pieces{"in", " ", "1", "8", "6", "7"}));
  EXPECT_EQ(Split("falcon", "in 1867"), (Pieces{"in", " ", "186", "7"}));
  EXPECT_EQ(Split("falcon", "in 18"), (Pieces{"in", " 18"}));
  EXPECT_EQ(Split("default", "in 18"), (Pieces{"in", " ", "18"}));
  EXPECT_EQ(Split("llama-bpe", "DON'T\n\nx"), (Pieces{"DON", "'T", "\n\n", "x"}));
  EXPECT_EQ(Split("gpt-2", "DON'T\n\nx"), (Pieces{"DON", "'", "T", "\n", "\n", "x"}));
}

// U+180E was a space until Unicode 6.3, and PCRE2's \s still holds it.
TEST(PreTokenizer, SpacesAreThoseOfUnicode) {
  EXPECT_EQ(Split("gpt-2", "a \u180Eb"), (Pieces{"a", " \u180E", "b"}));
  EXPECT_EQ(Split("gpt-2", "a\u3000\u0085b"), (Pieces{"a", "\u3000", "\u0085", "b"}));
}

TEST(PreTokenizer, EveryNameWorksAndLosesNothing) {
  Rng rng(2);
  const auto names = PreTokenizer::Names();
  EXPECT_GE(names.size(), 20u);
  for (const auto name : names) {
    const auto pre_tokenizer = PreTokenizer::ForName(name, "test");
    for (int i = 0; i < 200; ++i) {
      const std::string text = RandomText(rng, 60);
      std::string joined;
      for (const auto piece : pre_tokenizer.Split(text)) {
        ASSERT_FALSE(piece.empty());
        joined += piece;
      }
      ASSERT_EQ(joined, text) << name;
    }
  }
}

TEST(PreTokenizer, AliasesShareAFamily) {
  const auto family = [](std::string_view name) { return PreTokenizer::ForName(name, "test").family(); };
  EXPECT_EQ(family(""), "default");
  EXPECT_EQ(family("llama-v3"), "llama-bpe");
  EXPECT_EQ(family("olmo"), "gpt-2");
  EXPECT_EQ(family("starcoder"), "smollm");
  EXPECT_EQ(family("deepseek-r1-qwen"), "qwen2");
  EXPECT_EQ(family("hunyuan-dense"), "deepseek-v3");
}

// The vectors of tokenizers cover every family, so that no name is silently another.
TEST(PreTokenizer, EveryFamilyHasVectors) {
  for (const auto name : PreTokenizer::Names()) {
    const auto family = PreTokenizer::ForName(name, "test").family();
    EXPECT_TRUE(BpeVectors().at("pre").contains(family)) << name << " is of the family " << family;
  }
}

// Llama 3 looks whole pieces up before merging and begins with BOS; another model with its pattern need not.
TEST(PreTokenizer, DefaultsBelongToTheNameNotToThePattern) {
  EXPECT_TRUE(PreTokenizer::ForName("llama-bpe", "test").ignore_merges());
  EXPECT_TRUE(PreTokenizer::ForName("llama-bpe", "test").adds_bos());
  EXPECT_TRUE(PreTokenizer::ForName("tekken", "test").adds_bos());
  EXPECT_TRUE(PreTokenizer::ForName("minicpm5", "test").ignore_merges());
  EXPECT_FALSE(PreTokenizer::ForName("minicpm5", "test").adds_bos());
  EXPECT_FALSE(PreTokenizer::ForName("smaug-bpe", "test").ignore_merges());
  EXPECT_FALSE(PreTokenizer::ForName("qwen2", "test").adds_bos());
}

TEST(PreTokenizer, RefusesAnUnknownNameByName) {
  const std::string message = ErrorOf([] { PreTokenizer::ForName("no-such-one", "model.gguf"); });
  EXPECT_NE(message.find("model.gguf"), std::string::npos) << message;
  EXPECT_NE(message.find("no-such-one"), std::string::npos) << message;
  EXPECT_NE(message.find("smollm"), std::string::npos) << message;
}

// Patterns that are known, but of no model that can be run, are refused like others, not taken for the default.
TEST(PreTokenizer, RefusesNamesWithoutAPattern) {
  for (const char* name : {"superbpe", "kimi-k2", "afmoe", "bloom", "gemma4", "exaone-moe"})
    EXPECT_NE(ErrorOf([&] { PreTokenizer::ForName(name, "f"); }).find(name), std::string::npos);
}

// A million characters that one alternative takes whole, and long runs of other kinds: neither a match limit nor
// quadratic time.
TEST(PreTokenizer, LongRunsAreFine) {
  constexpr size_t kLength = 1 << 20;
  EXPECT_EQ(Split("gpt-2", std::string(kLength, ' ') + "x"), (Pieces{std::string(kLength - 1, ' '), " x"}));
  for (const auto& [name, unused] : BpeVectors().at("pre").items()) {
    EXPECT_EQ(Split(name, std::string(kLength, 'X')).size(), 1u) << name;
    for (const std::string part : {" ", "\n", "1", "!", "'s", "\u4E2D", "a\u0301", " \n", "aB", " a"}) {
      std::string text;
      while (text.size() < kLength / 16) text += part;
      text += "\u4E2D";
      size_t n_bytes = 0;
      for (const std::string& piece : Split(name, text)) n_bytes += piece.size();
      EXPECT_EQ(n_bytes, text.size()) << name << ", many of " << part;
    }
  }
}

}  // namespace
}  // namespace lesskv
