// Hostile and unusual vocabularies, and reading them from a model file.
#include "tokenizer/vocabulary.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "format/gguf.h"
#include "format/gguf_writer.h"
#include "tokenizer/test_data.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

struct BrokenVocabulary {
  const char* name;
  const char* model;  // which small vocabulary is broken
  std::function<void(Vocabulary&)> damage;
  const char* message;  // part of what the refusal says
};

const BrokenVocabulary kBroken[] = {
    {"NoTokens", "llama",
     [](Vocabulary& v) {
       v.tokens.clear();
       v.scores.clear();
       v.types.clear();
     },
     "has no tokens"},
    {"UnknownModel", "llama", [](Vocabulary& v) { v.model = "bert"; }, "tokenizer.ggml.model is 'bert'"},
    {"FewerScores", "llama", [](Vocabulary& v) { v.scores.pop_back(); }, "tokens but"},
    {"MoreTypes", "llama", [](Vocabulary& v) { v.types.push_back(1); }, "token types"},
    {"MoreTokens", "gpt2", [](Vocabulary& v) { v.tokens.push_back("one more"); }, "token types"},
    {"NoScores", "llama", [](Vocabulary& v) { v.scores.clear(); }, "needs tokenizer.ggml.scores"},
    {"NanScore", "llama", [](Vocabulary& v) { v.scores[300] = std::numeric_limits<float>::quiet_NaN(); },
     "the score of token 300 is nan"},
    {"InfiniteScore", "llama", [](Vocabulary& v) { v.scores[300] = std::numeric_limits<float>::infinity(); },
     "the score of token 300 is inf"},
    {"UnknownType", "llama", [](Vocabulary& v) { v.types[5] = 7; }, "token 5 has type 7"},
    {"NegativeType", "gpt2", [](Vocabulary& v) { v.types[5] = -1; }, "token 5 has type -1"},
    {"ByteTokenOfAnotherForm", "llama", [](Vocabulary& v) { v.tokens[5] = "<0xG0>"; }, "token 5 is a byte"},
    {"DuplicateToken", "llama", [](Vocabulary& v) { v.tokens[400] = v.tokens[401]; },
     "tokens 400 and 401 have the same text"},
    {"DuplicateTokenBpe", "gpt2", [](Vocabulary& v) { v.tokens[401] = v.tokens[400]; },
     "tokens 400 and 401 have the same text"},
    {"BosOutOfRange", "llama", [](Vocabulary& v) { v.bos = 700; }, "beginning-of-sequence token is 700"},
    {"EosOutOfRange", "gpt2", [](Vocabulary& v) { v.eos = 4000000000u; }, "end-of-sequence token is 4000000000"},
    {"EotOutOfRange", "gpt2", [](Vocabulary& v) { v.eot = 100000; }, "end-of-turn"},
    {"EomOutOfRange", "gpt2", [](Vocabulary& v) { v.ends = {7, 100000}; }, "end-of-message"},
    {"UnkOutOfRange", "llama", [](Vocabulary& v) { v.unk = 100000; }, "unknown token is 100000"},
    {"BosWantedButAbsent", "gpt2", [](Vocabulary& v) { v.add_bos = true; }, "add_bos_token is set"},
    {"EosWantedButAbsent", "gpt2", [](Vocabulary& v) { v.add_eos = true; }, "add_eos_token is set"},
    {"ByteTokenMissingWithoutUnknown", "llama",
     [](Vocabulary& v) {
       v.types[0] = static_cast<int32_t>(TokenType::kControl);  // no unknown token any more
       v.types[3 + 0x41] = static_cast<int32_t>(TokenType::kNormal);
     },
     "neither a token <0x41>"},
    {"NoByteTokensAtAll", "gpt2",
     [](Vocabulary& v) {
       for (auto& token : v.tokens) token += "\u0120\u0120";
     },
     "no token for any single byte"},
    {"UnknownPreTokenizer", "gpt2", [](Vocabulary& v) { v.pre = "mystery"; }, "pre-tokenizer 'mystery'"},
    {"MergeWithoutSpace", "gpt2", [](Vocabulary& v) { v.merges[7] = "ab"; }, "merge 7 is 'ab'"},
    {"MergeEmpty", "gpt2", [](Vocabulary& v) { v.merges[7] = ""; }, "merge 7 is ''"},
    {"MergeOfNothing", "gpt2", [](Vocabulary& v) { v.merges[7] = " a"; }, "merge 7 is"},
    {"MergeWithNothing", "gpt2", [](Vocabulary& v) { v.merges[7] = "a "; }, "merge 7 is"},
    {"MergeOfThree", "gpt2", [](Vocabulary& v) { v.merges[7] = "a b c"; }, "merge 7 is"},
};

class BrokenVocabularyTest : public testing::TestWithParam<BrokenVocabulary> {};

TEST_P(BrokenVocabularyTest, IsRefusedWithASentence) {
  const BrokenVocabulary& broken = GetParam();
  Vocabulary vocabulary = std::string_view(broken.model) == "llama" ? SmallSentencePiece() : SmallBpe("gpt-2");
  ASSERT_NO_THROW(Tokenizer::Create(vocabulary));
  broken.damage(vocabulary);
  const std::string message = ErrorOf([&] { Tokenizer::Create(std::move(vocabulary)); });
  EXPECT_NE(message.find(broken.message), std::string::npos) << message;
  EXPECT_EQ(message.find("small-"), 0u) << "the message begins with the file: " << message;
}

INSTANTIATE_TEST_SUITE_P(All, BrokenVocabularyTest, testing::ValuesIn(kBroken),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(Vocabulary, TokenCountsBeyondTheLimitAreRefused) {
  EXPECT_NO_THROW(CheckVocabularySizes("f", kMaxTokens, kMaxTokens, 0));
  EXPECT_THROW(CheckVocabularySizes("f", kMaxTokens + 1, 0, 0), Error);
  EXPECT_THROW(CheckVocabularySizes("f", (size_t{1} << 31) + 5, 0, 0), Error);
}

// Unusual, but usable: what becomes of it is defined.
TEST(Vocabulary, EmptyTokensAreKeptAndNeverProduced) {
  Vocabulary vocabulary = SmallSentencePiece();
  const auto whole = Tokenizer::Create(vocabulary)->Encode("the river", false, false);
  for (const size_t id : {size_t{500}, size_t{501}}) {
    ASSERT_EQ(std::count(whole.begin(), whole.end(), static_cast<int32_t>(id)), 0);
    vocabulary.tokens[id] = "";
  }
  const auto tokenizer = Tokenizer::Create(std::move(vocabulary));
  EXPECT_EQ(tokenizer->Encode("the river", false, false), whole);
  EXPECT_EQ(tokenizer->TokenBytes(500), "");
}

TEST(Vocabulary, OfAMergeListedTwiceTheFirstPlaceCounts) {
  Vocabulary vocabulary = SmallBpe("gpt-2");
  const auto expected = Tokenizer::Create(vocabulary)->Encode("the river and the barrels", false, false);
  for (size_t i = 0; i < 100; ++i) vocabulary.merges.push_back(vocabulary.merges[99 - i]);
  EXPECT_EQ(Tokenizer::Create(std::move(vocabulary))->Encode("the river and the barrels", false, false), expected);
}

TEST(Vocabulary, WithoutTypesTheUsualTextsAreBelieved) {
  Vocabulary vocabulary = SmallSentencePiece();
  const auto typed = Tokenizer::Create(vocabulary);
  vocabulary.types.clear();
  const auto untyped = Tokenizer::Create(std::move(vocabulary));
  for (int32_t id = 0; id < static_cast<int32_t>(typed->size()); ++id) ASSERT_EQ(untyped->Type(id), typed->Type(id));
  EXPECT_EQ(untyped->bos(), 1);
  EXPECT_EQ(untyped->eos(), 2);
  EXPECT_EQ(untyped->unk(), 0);
}

// The only hint that byte-level vocabularies give.
TEST(Vocabulary, WithoutTypesTokensThatAreNamedAreSpecial) {
  Vocabulary vocabulary = SmallBpe("gpt-2");
  vocabulary.types.clear();
  vocabulary.bos = 300;
  vocabulary.eos = 301;
  vocabulary.eot = 302;
  vocabulary.unk = 303;
  vocabulary.ends = {304};
  const auto tokenizer = Tokenizer::Create(std::move(vocabulary));
  for (const int32_t id : {300, 301, 302, 304}) EXPECT_EQ(tokenizer->Type(id), TokenType::kControl) << id;
  EXPECT_EQ(tokenizer->Type(303), TokenType::kUnknown);
  EXPECT_EQ(tokenizer->Type(305), TokenType::kNormal);
}

TEST(Vocabulary, ParsesByteTokens) {
  EXPECT_EQ(ParseByteToken("<0x0A>"), 10);
  EXPECT_EQ(ParseByteToken("<0xfF>"), 255);
  for (const auto text : {"<0x0A", "0x0A", "<0x0A>>", "<0X0A>", "<0x-1>", "<0x 1>", ""}) {
    EXPECT_EQ(ParseByteToken(text), std::nullopt) << text;
  }
}

GgufFile Serialized(const GgufWriter& writer) { return GgufFile::Parse(writer.Serialize(), "test.gguf"); }

TEST(LoadVocabulary, ReadsEveryField) {
  GgufWriter writer;
  writer.Add("tokenizer.ggml.model", "gpt2");
  writer.Add("tokenizer.ggml.pre", "smollm");
  writer.AddArray("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b", "ab", "<|im_end|>"});
  writer.AddArray("tokenizer.ggml.scores", std::vector<float>{0, 1, 2, 3});
  writer.AddArray("tokenizer.ggml.token_type", std::vector<int32_t>{1, 1, 1, 3});
  writer.AddArray("tokenizer.ggml.merges", std::vector<std::string>{"a b"});
  writer.Add("tokenizer.ggml.bos_token_id", uint32_t{3});
  writer.Add("tokenizer.ggml.eos_token_id", uint32_t{0xFFFFFFFF});
  writer.Add("tokenizer.ggml.eot_token_id", int32_t{-1});
  writer.Add("tokenizer.ggml.unknown_token_id", uint64_t{2});
  writer.Add("tokenizer.ggml.eom_token_id", uint32_t{1});
  writer.Add("tokenizer.ggml.fim_pad_token_id", int32_t{-1});
  writer.Add("tokenizer.ggml.fim_rep_token_id", uint32_t{0});
  writer.Add("tokenizer.ggml.fim_sep_token_id", uint32_t{2});
  writer.Add("tokenizer.ggml.add_bos_token", true);
  writer.Add("tokenizer.ggml.add_space_prefix", false);
  const Vocabulary v = LoadVocabulary(Serialized(writer));
  EXPECT_EQ(v.name, "test.gguf");
  EXPECT_EQ(v.model, "gpt2");
  EXPECT_EQ(v.pre, "smollm");
  EXPECT_EQ(v.tokens, (std::vector<std::string>{"a", "b", "ab", "<|im_end|>"}));
  EXPECT_EQ(v.scores, (std::vector<float>{0, 1, 2, 3}));
  EXPECT_EQ(v.types, (std::vector<int32_t>{1, 1, 1, 3}));
  EXPECT_EQ(v.merges, (std::vector<std::string>{"a b"}));
  EXPECT_EQ(v.bos, 3u);
  EXPECT_EQ(v.eos, std::nullopt);
  EXPECT_EQ(v.eot, std::nullopt);
  EXPECT_EQ(v.ends, (std::vector<uint32_t>{1, 0, 2}));
  EXPECT_EQ(v.unk, 2u);
  EXPECT_EQ(v.add_bos, true);
  EXPECT_EQ(v.add_eos, std::nullopt);
  EXPECT_EQ(v.add_space_prefix, false);
}

TEST(LoadVocabulary, ModelsNamedPhi3StripBehindSpecialTokens) {
  const std::vector<std::pair<const char*, bool>> names = {{"Phi-3 Mini", true}, {"my Phi3", true}, {"Phi 4", false}};
  for (const auto& [name, strips] : names) {
    GgufWriter writer;
    writer.Add("general.name", name);
    writer.Add("tokenizer.ggml.model", "llama");
    writer.AddArray("tokenizer.ggml.tokens", std::vector<std::string>{"a"});
    EXPECT_EQ(LoadVocabulary(Serialized(writer)).strips_behind_special, strips) << name;
  }
}

TEST(LoadVocabulary, RefusesWhatIsMissingOrOfAnotherType) {
  const auto load = [](const std::function<void(GgufWriter&)>& fill) {
    GgufWriter writer;
    fill(writer);
    return ErrorOf([&] { LoadVocabulary(Serialized(writer)); });
  };
  EXPECT_NE(load([](GgufWriter&) {}).find("tokenizer.ggml.model"), std::string::npos);
  EXPECT_NE(load([](GgufWriter& w) { w.Add("tokenizer.ggml.model", "llama"); }).find("tokenizer.ggml.tokens"),
            std::string::npos);
  const auto with_tokens = [&](const std::function<void(GgufWriter&)>& fill) {
    return load([&](GgufWriter& w) {
      w.Add("tokenizer.ggml.model", "gpt2");
      w.AddArray("tokenizer.ggml.tokens", std::vector<std::string>{"a"});
      fill(w);
    });
  };
  EXPECT_NE(with_tokens([](GgufWriter&) {}).find("tokenizer.ggml.merges"), std::string::npos);
  const auto with_merges = [&](const std::function<void(GgufWriter&)>& fill) {
    return with_tokens([&](GgufWriter& w) {
      w.AddArray("tokenizer.ggml.merges", std::vector<std::string>{});
      fill(w);
    });
  };
  EXPECT_NE(with_merges([](GgufWriter& w) { w.Add("tokenizer.ggml.scores", "none"); }).find("tokenizer.ggml.scores"),
            std::string::npos);
  EXPECT_NE(with_merges([](GgufWriter& w) { w.Add("tokenizer.ggml.bos_token_id", int32_t{-2}); }).find("bos_token_id"),
            std::string::npos);
  EXPECT_NE(
      with_merges([](GgufWriter& w) { w.Add("tokenizer.ggml.bos_token_id", uint64_t{1} << 40); }).find("bos_token_id"),
      std::string::npos);
  EXPECT_NE(with_merges([](GgufWriter& w) { w.Add("tokenizer.ggml.add_bos_token", int32_t{1}); }).find("add_bos_token"),
            std::string::npos);
}

}  // namespace
}  // namespace lesskv
