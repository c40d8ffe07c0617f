#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <sstream>
#include <thread>

#include "format/gguf.h"
#include "tokenizer/test_data.h"

namespace lesskv {
namespace {

using Ids = std::vector<int32_t>;
using Texts = std::vector<std::string>;

std::string Stream(const Tokenizer& tokenizer, const Ids& ids, bool skip_special = true) {
  StreamDecoder decoder(tokenizer, skip_special, /*at_start=*/true);
  std::string text;
  for (const int32_t id : ids) {
    const std::string piece = decoder.Push(id);
    EXPECT_EQ(ReplaceInvalidUtf8(piece), piece) << "a streamed piece is not well-formed";
    text += piece;
  }
  return text + decoder.Flush();
}

// ---- By hand: a SentencePiece vocabulary of eleven tokens and two bytes -------------------------------------------

Vocabulary HandMade() {
  Vocabulary v;
  v.name = "hand-made";
  v.model = "llama";
  const auto add = [&](const char* text, float score, TokenType type) {
    v.tokens.emplace_back(text);
    v.scores.push_back(score);
    v.types.push_back(static_cast<int32_t>(type));
  };
  add("<unk>", 0, TokenType::kUnknown);       // 0
  add("<s>", 0, TokenType::kControl);         // 1
  add("</s>", 0, TokenType::kControl);        // 2
  add("<0x62>", 0, TokenType::kByte);         // 3: b
  add("<0xC3>", 0, TokenType::kByte);         // 4
  add("\u2581", -9, TokenType::kNormal);      // 5
  add("a", -8, TokenType::kNormal);           // 6
  add("aa", -2, TokenType::kNormal);          // 7
  add("\u2581a", -1, TokenType::kNormal);     // 8
  add("aaa", -3, TokenType::kNormal);         // 9
  add("</", -4, TokenType::kNormal);          // 10
  add("s>", -4, TokenType::kNormal);          // 11
  add("<tool>", 0, TokenType::kUserDefined);  // 12
  for (const char* c : {"<", "/", "s", ">"}) add(c, -10, TokenType::kNormal);
  return v;
}

TEST(SentencePiece, MergesTheBestScoreFirstThenTheLeftmost) {
  const auto t = Tokenizer::Create(HandMade());
  EXPECT_EQ(t->Encode("a", false, false), (Ids{8}));            // the space in front merges with it
  EXPECT_EQ(t->Encode("aaa", false, false), (Ids{8, 7}));       // -1 before -2
  EXPECT_EQ(t->Encode("aaaaa", false, false), (Ids{8, 7, 7}));  // aaa (-3) comes too late
  EXPECT_EQ(t->Encode("", false, false), Ids{});
  EXPECT_EQ(t->Encode(" ", false, false), (Ids{5, 5}));
  Vocabulary v = HandMade();
  v.tokens[12] = "!";
  EXPECT_EQ(Tokenizer::Create(v)->Encode("a", false, false), (Ids{8})) << "no piece is longer";
}

TEST(SentencePiece, FallsBackToBytesThenToUnknown) {
  const auto t = Tokenizer::Create(HandMade());
  EXPECT_EQ(t->Encode("ab", false, false), (Ids{8, 3}));
  EXPECT_EQ(t->Encode("a\u00E9", false, false), (Ids{8, 0}));  // C3 has a token, A9 has none
  EXPECT_EQ(t->Encode("a\xC3", false, false), (Ids{8, 4}));    // a damaged character, byte by byte
  EXPECT_EQ(t->Encode("a\xC3\xC3"
                      "b\xFF",
                      false, false),
            (Ids{8, 4, 4, 3, 0}));
  EXPECT_EQ(t->Decode(Ids{8, 4, 3}),
            "a\xC3"
            "b");
  EXPECT_EQ(Stream(*t, {8, 4, 3}),
            "a\xEF\xBF\xBD"
            "b");
}

TEST(SentencePiece, TextNeverBecomesAControlToken) {
  const auto t = Tokenizer::Create(HandMade());
  EXPECT_EQ(t->Encode("</s>", false, false), (Ids{5, 10, 11}));
  EXPECT_EQ(t->Encode("</s>", false, true), (Ids{2}));
  EXPECT_EQ(t->Encode("<unk>", false, true), (Ids{0}));
  Vocabulary v = HandMade();
  v.tokens[0] = "as>";
  EXPECT_EQ(Tokenizer::Create(v)->Encode("as>", false, false, /*at_start=*/false), (Ids{6, 11})) << "nor the unknown one";
}

TEST(SentencePiece, ASpaceComesBeforeTextAndBehindSpecialTokens) {
  Vocabulary v = HandMade();
  const auto t = Tokenizer::Create(v);
  EXPECT_EQ(t->Encode("a</s>a<tool>a", false, true), (Ids{8, 2, 8, 12, 8}));
  EXPECT_EQ(t->Decode(Ids{8, 2, 8, 12, 8}), "aa<tool>a");
  EXPECT_EQ(t->Decode(Ids{8, 2, 8, 12, 8}, false), "a</s>a<tool>a");
  v.add_space_prefix = false;
  const auto without = Tokenizer::Create(v);
  EXPECT_EQ(without->Encode("a a", false, true), (Ids{6, 8}));
  EXPECT_EQ(without->Decode(Ids{8, 6}), " aa");
}

// A later turn of a conversation: what is said goes on, unless a special token came last.
TEST(SentencePiece, TextBehindTextGetsNoSpace) {
  const auto t = Tokenizer::Create(HandMade());
  EXPECT_EQ(t->Encode("a", false, false, /*at_start=*/false), (Ids{6}));
  EXPECT_EQ(t->Encode("a</s>a", false, true, /*at_start=*/false), (Ids{6, 2, 8}));
  const std::vector<std::pair<Ids, bool>> expected = {{{}, true},      {{1}, true},     {{8}, false}, {{8, 2}, true},
                                                      {{2, 8}, false}, {{8, 12}, true}, {{3}, false}};
  for (const auto& [before, at_start] : expected)
    EXPECT_EQ(t->IsAtStart(before), at_start) << testing::PrintToString(before);
}

// Phi-3: "<|user|>\n" is one token.
TEST(SentencePiece, SpaceBehindSpecialTokensIsLeftOutWhereTheModelWantsThat) {
  Vocabulary v = HandMade();
  v.strips_behind_special = true;
  const auto t = Tokenizer::Create(v);
  EXPECT_EQ(t->Encode("<tool> \n\ta</s> ", false, true), (Ids{12, 8, 2}));
  EXPECT_EQ(t->Encode("<tool> \n\ta", false, false), (Ids{12, 8}));
  EXPECT_EQ(t->Encode("<s> a", false, true), (Ids{1, 5, 8})) << "not behind the token that begins a text";
  EXPECT_EQ(t->Encode("a </s>", false, true), (Ids{8, 5, 2})) << "not before a token";
  v.tokens[12] = "<|endoftext|>";
  EXPECT_EQ(Tokenizer::Create(v)->Encode("<|endoftext|> a", false, true), (Ids{12, 5, 8})) << "which begins a text, too";
}

TEST(SentencePiece, UserDefinedTokensAreFoundWithoutParsing) {
  const auto t = Tokenizer::Create(HandMade());
  EXPECT_EQ(t->Encode("<tool>a", false, false), (Ids{12, 8}));
}

TEST(Tokenizer, BosAndEosFollowTheFileThenTheDefault) {
  Vocabulary v = HandMade();
  EXPECT_EQ(Tokenizer::Create(v)->Encode("a", true, false), (Ids{1, 8}));
  EXPECT_EQ(Tokenizer::Create(v)->Encode("", true, false), (Ids{1}));
  v.add_bos = false;
  v.add_eos = true;
  EXPECT_EQ(Tokenizer::Create(v)->Encode("a", true, false), (Ids{8, 2}));
  EXPECT_EQ(Tokenizer::Create(v)->Encode("a", false, false), (Ids{8}));

  Vocabulary bpe = SmallBpe("gpt-2");
  bpe.bos = 1;
  EXPECT_FALSE(Tokenizer::Create(bpe)->add_bos());
  bpe.pre = "llama-bpe";
  EXPECT_TRUE(Tokenizer::Create(bpe)->add_bos());
  bpe.bos.reset();
  EXPECT_FALSE(Tokenizer::Create(bpe)->add_bos()) << "a default without a token adds nothing";
  EXPECT_EQ(Tokenizer::Create(bpe)->bos(), -1);
}

TEST(Tokenizer, KnowsWhatEndsAGeneration) {
  Vocabulary v = SmallBpe("smollm");  // 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>
  v.eos = 301;
  v.types[2] = static_cast<int32_t>(TokenType::kNormal);  // a common mistake in model files
  v.ends = {300};
  const auto t = Tokenizer::Create(v);
  EXPECT_EQ(t->eot(), 2);
  EXPECT_EQ(t->Type(2), TokenType::kControl);
  for (const int32_t id : {0, 2, 300, 301}) EXPECT_TRUE(t->IsEndOfGeneration(id)) << id;
  for (const int32_t id : {1, 3, -1, 299}) EXPECT_FALSE(t->IsEndOfGeneration(id)) << id;
}

TEST(Tokenizer, TextsThatEndAGeneration) {
  const auto ends = [](const char* text, TokenType type) {
    Vocabulary v = SmallBpe("gpt-2");
    v.tokens[1] = text;
    v.types[1] = static_cast<int32_t>(type);
    const auto t = Tokenizer::Create(v);
    const bool is_text = v.tokens[1] == "</s>";
    if (t->IsEndOfGeneration(1)) {
      EXPECT_EQ(t->Type(1), is_text ? type : TokenType::kControl) << text;
    }
    return t->IsEndOfGeneration(1);
  };
  for (const char* text : {"<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>", "<EOT>",
                           "_<EOT>", "\u2581<EOT>", "<|end_of_text|>", "<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>",
                           "<|file_sep|>", "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", "<|return|>", "<|call|>", "<|calls|>",
                           "<|flush|>", "<turn|>", "<|tool_response>", "[e~[", "</s>"}) {
    for (const TokenType type : {TokenType::kNormal, TokenType::kUserDefined, TokenType::kControl})
      EXPECT_TRUE(ends(text, type)) << text;
  }
  for (const char* text : {"<eos>", "[EOS]", "[EOT]", "<reponame>", "<fim_pad>", "[PAD]"}) {
    EXPECT_TRUE(ends(text, TokenType::kControl)) << text;
    EXPECT_FALSE(ends(text, TokenType::kUserDefined)) << text;
    EXPECT_FALSE(ends(text, TokenType::kNormal)) << text;
  }
  EXPECT_FALSE(ends("<|fim_prefix|>", TokenType::kControl));
  EXPECT_FALSE(ends("<|im_start|>", TokenType::kControl));
}

// In Qwen's and Gemma's vocabularies it is a tag of HTML: a model that writes it has ended, a text with it is a text.
TEST(Tokenizer, AnEndThatIsATextIsTokenizedAsOne) {
  Vocabulary v = SmallBpe("gpt-2");
  const Ids without = Tokenizer::Create(v)->Encode("ab</s>ab", false, true);
  v.tokens[1] = "</s>";
  for (const TokenType type : {TokenType::kNormal, TokenType::kUserDefined, TokenType::kControl}) {
    v.types[1] = static_cast<int32_t>(type);
    const auto t = Tokenizer::Create(v);
    EXPECT_TRUE(t->IsEndOfGeneration(1));
    const Ids plain = t->Encode("ab</s>ab", false, false), special = t->Encode("ab</s>ab", false, true);
    EXPECT_EQ(std::count(plain.begin(), plain.end(), 1), type == TokenType::kUserDefined ? 1 : 0);
    EXPECT_EQ(std::count(special.begin(), special.end(), 1), type == TokenType::kNormal ? 0 : 1);
    if (type == TokenType::kNormal) {
      EXPECT_EQ(special, without) << "no merge makes it";
    }
    EXPECT_EQ(t->Decode(special, false), "ab</s>ab");
  }
}

TEST(Tokenizer, TheMostSpecificEndOfATurnIsEot) {
  Vocabulary v = SmallBpe("gpt-2");
  EXPECT_EQ(Tokenizer::Create(v)->eot(), 2) << "<|im_end|>, not <|endoftext|>";
  v.tokens[1] = "<|eot_id|>";
  EXPECT_EQ(Tokenizer::Create(v)->eot(), 1);
  v.eot = 5;
  EXPECT_EQ(Tokenizer::Create(v)->eot(), 5);
  EXPECT_TRUE(Tokenizer::Create(v)->IsEndOfGeneration(5));
}

TEST(Tokenizer, FindsControlTokensByText) {
  const auto t = Tokenizer::Create(SmallBpe("gpt-2"));
  EXPECT_EQ(t->FindControlToken("<|im_start|>"), 1);
  for (const char* text : {"<tool>", "the", "<|im_start|> ", "<|im_start|><|im_start|>", ""})
    EXPECT_EQ(t->FindControlToken(text), std::nullopt) << text;
}

// ---- Vectors of independent implementations ------------------------------------------------------------------------

TEST(ByteBpe, MatchesTokenizers) {
  const auto& vectors = BpeVectors();
  const auto texts = vectors.at("texts").get<Texts>();
  const auto special_texts = vectors.at("special_texts").get<Texts>();
  for (const auto& [name, expected] : vectors.at("pre").items()) {
    if (!expected.contains("ids")) continue;  // pre_tokenizer_test.cpp looks at the pieces
    const auto t = Tokenizer::Create(SmallBpe(name));
    for (size_t i = 0; i < texts.size(); ++i) {
      const Ids ids = t->Encode(texts[i], false, true);
      EXPECT_EQ(ids, expected.at("ids")[i].get<Ids>()) << name << ", text " << i << ": " << texts[i];
      EXPECT_EQ(t->Decode(ids), texts[i]) << name;
      EXPECT_EQ(Stream(*t, ids), texts[i]) << name;
    }
    for (size_t i = 0; i < special_texts.size(); ++i) {
      const Ids ids = t->Encode(special_texts[i], false, true);
      EXPECT_EQ(ids, expected.at("special_ids")[i].get<Ids>()) << name << ": " << special_texts[i];
      EXPECT_EQ(t->Decode(ids, /*skip_special=*/false), special_texts[i]);
    }
  }
}

TEST(ByteBpe, WithoutParsingControlTokensAreText) {
  const auto t = Tokenizer::Create(SmallBpe("gpt-2"));
  const Ids ids = t->Encode("<|im_end|><tool>", false, false);
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 2), 0);
  EXPECT_EQ(t->Decode(ids), "<|im_end|><tool>");
  EXPECT_EQ(t->TokenBytes(ids.back()), "<tool>");
}

// Llama 3 has words as tokens that its merges do not lead to.
TEST(ByteBpe, AWholePieceIsItsTokenWhereMergesAreIgnored) {
  Vocabulary v = SmallBpe("llama-bpe");
  v.tokens.emplace_back("\u0120qzx");
  v.types.push_back(static_cast<int32_t>(TokenType::kNormal));
  const auto id = static_cast<int32_t>(v.tokens.size() - 1);
  EXPECT_EQ(Tokenizer::Create(v)->Encode(" qzx", false, false), (Ids{id}));
  EXPECT_NE(Tokenizer::Create(v)->Encode(" qzxy", false, false).at(0), id);
  Vocabulary control = v;
  control.types.back() = static_cast<int32_t>(TokenType::kControl);
  EXPECT_EQ(Tokenizer::Create(control)->Encode(" qzx", false, false).size(), 4u) << "text never becomes a control token";
  v.pre = "smaug-bpe";  // the same pattern, but merges decide
  EXPECT_EQ(Tokenizer::Create(v)->Encode(" qzx", false, false).size(), 4u);
}

TEST(ByteBpe, DamagedUtf8BecomesReplacementCharacters) {
  const auto t = Tokenizer::Create(SmallBpe("gpt-2"));
  for (const char* text : {"\xFF", "a\xE2\x82z", "\xF0\x9F", "\xED\xA0\x80", "\x80\x80 the"}) {
    EXPECT_EQ(t->Decode(t->Encode(text, false, true)), ReplaceInvalidUtf8(text));
  }
}

// Also where the file names an unknown token, which is a control token in such vocabularies.
TEST(ByteBpe, AByteWithoutATokenIsLeftOut) {
  Vocabulary v = SmallBpe("gpt-2");
  const auto at = static_cast<size_t>(std::find(v.tokens.begin(), v.tokens.end(), "\u0100") - v.tokens.begin());
  ASSERT_LT(at, v.tokens.size());
  v.tokens[at] = "\u0100\u0100\u0100";
  v.unk = 0;
  const auto t = Tokenizer::Create(v);
  EXPECT_EQ(t->Decode(t->Encode(std::string("a\0b", 3), false, false), /*skip_special=*/false), "ab");
}

// By hand: a merge need not make a token. What it makes merges on, else the tokens of its bytes stand for it.
TEST(ByteBpe, AMergeMayMakeATextWithoutAToken) {
  Vocabulary v;
  v.name = "hand-made";
  v.model = "gpt2";
  v.pre = "gpt-2";
  v.tokens = {"a", "b", "c", "d", "bc", "abc", "cd"};
  v.merges = {"a b", "b c", "ab c", "c d"};  // there is no token ab
  const auto t = Tokenizer::Create(v);
  EXPECT_EQ(t->Encode("ab", false, false), (Ids{0, 1}));
  EXPECT_EQ(t->Encode("abc", false, false), (Ids{5}));
  EXPECT_EQ(t->Encode("abab", false, false), (Ids{0, 1, 0, 1}));
  EXPECT_EQ(t->Encode("bc", false, false), (Ids{4}));
  EXPECT_EQ(t->Encode("abcd", false, false), (Ids{5, 3})) << "a b and ab c come before c d";
  v.merges = {"a b", "d d"};
  EXPECT_EQ(Tokenizer::Create(v)->Encode("ddab", false, false), (Ids{3, 3, 0, 1})) << "neither dd nor ab";
  v.merges = {"a b", "x y"};
  EXPECT_EQ(Tokenizer::Create(v)->Encode("abc", false, false), (Ids{0, 1, 2}));
  v.types.assign(v.tokens.size(), static_cast<int32_t>(TokenType::kNormal));
  v.merges = {"c d"};
  for (const TokenType type : {TokenType::kControl, TokenType::kUnknown}) {
    v.types[6] = static_cast<int32_t>(type);
    EXPECT_EQ(Tokenizer::Create(v)->Encode("cd", false, false), (Ids{2, 3})) << "text never becomes such a token";
  }
}

// Of two pairs whose ids have the same lower halves each has its own merge.
TEST(ByteBpe, IdsMayTakeMoreThan16Bits) {
  Vocabulary v;
  v.name = "hand-made";
  v.model = "gpt2";
  v.pre = "gpt-2";
  v.tokens = {"a", "b"};
  while (v.tokens.size() < 65537) v.tokens.push_back(fmt::format("a{}", v.tokens.size()));
  v.tokens.insert(v.tokens.end(), {"bb", "abb"});
  v.merges = {"b b", "a bb"};
  const auto t = Tokenizer::Create(v);
  EXPECT_EQ(t->Encode("bb", false, false), (Ids{65537}));
  EXPECT_EQ(t->Encode("abb", false, false), (Ids{65538}));
}

TEST(SentencePiece, MatchesSentencePiece) {
  const auto t = Tokenizer::Create(SmallSentencePiece());
  const auto texts = SentencePieceVectors().at("texts").get<Texts>();
  for (size_t i = 0; i < texts.size(); ++i) {
    const Ids ids = t->Encode(texts[i], false, false);
    EXPECT_EQ(ids, SentencePieceVectors().at("ids")[i].get<Ids>()) << "text " << i << ": " << texts[i];
    EXPECT_EQ(t->Decode(ids), texts[i]);
    EXPECT_EQ(Stream(*t, ids), texts[i]);
  }
}

// ---- Properties ----------------------------------------------------------------------------------------------------

TEST(Tokenizer, DecodingUndoesEncoding) {
  Rng rng(3);
  for (const char* pre : {"gpt-2", "llama-bpe", "default"}) {
    const auto t = Tokenizer::Create(SmallBpe(pre));
    for (int i = 0; i < 300; ++i) {
      const std::string text = RandomText(rng, 80);
      const Ids ids = t->Encode(text, true, true);
      ASSERT_EQ(t->Decode(ids), text) << pre;
      ASSERT_EQ(Stream(*t, ids), text) << pre;
    }
  }
}

// SentencePiece keeps even damaged bytes; only U+2581 itself cannot be told from a space.
TEST(Tokenizer, SentencePieceKeepsEveryByte) {
  Rng rng(4);
  const auto t = Tokenizer::Create(SmallSentencePiece());
  for (int i = 0; i < 1000; ++i) {
    const std::string text = i % 2 == 0 ? RandomText(rng, 80) : RandomBytes(rng, 80);
    if (text.find("\u2581") != std::string::npos) continue;
    const Ids ids = t->Encode(text, true, false);
    ASSERT_EQ(t->Decode(ids), text);
    ASSERT_EQ(Stream(*t, ids), ReplaceInvalidUtf8(text));
  }
}

TEST(Tokenizer, RandomBytesGiveIdsInRange) {
  Rng rng(5);
  for (const auto& vocabulary : {SmallSentencePiece(), SmallBpe("llama-bpe"), SmallBpe("falcon"), SmallBpe("smollm")}) {
    const auto t = Tokenizer::Create(vocabulary);
    for (int i = 0; i < 1000; ++i) {
      const std::string text = RandomBytes(rng, 60);
      for (const int32_t id : t->Encode(text, true, true)) {
        ASSERT_TRUE(id >= 0 && static_cast<size_t>(id) < t->size());
      }
    }
  }
}

// Ids that no text encodes to, as a model may well generate them.
TEST(Tokenizer, StreamingRandomIdsEqualsDecodingThemWhole) {
  Rng rng(6);
  for (const auto& vocabulary : {SmallSentencePiece(), SmallBpe("gpt-2")}) {
    const auto t = Tokenizer::Create(vocabulary);
    for (int i = 0; i < 2000; ++i) {
      Ids ids(rng.Below(30));
      // The first 300 ids hold the bytes and special tokens; they are the hard ones.
      for (int32_t& id : ids) id = static_cast<int32_t>(rng.Below(rng.Below(2) == 0 ? 300 : t->size()));
      const bool skip_special = rng.Below(2) == 0;
      ASSERT_EQ(Stream(*t, ids, skip_special), ReplaceInvalidUtf8(t->Decode(ids, skip_special)));
    }
  }
}

TEST(StreamDecoder, HoldsACharacterBackUntilItIsWhole) {
  const auto t = Tokenizer::Create(SmallSentencePiece());
  const auto byte = [](int value) { return 3 + value; };  // <0x00> is token 3
  ASSERT_EQ(t->TokenBytes(byte(0xF0)), "\xF0");
  StreamDecoder decoder(*t, true, true);
  EXPECT_EQ(decoder.Push(byte(0xF0)), "");
  EXPECT_EQ(decoder.Push(byte(0x9F)), "");
  EXPECT_EQ(decoder.Push(byte(0x99)), "");
  EXPECT_EQ(decoder.Push(byte(0x82)), "\U0001F642");
  EXPECT_EQ(decoder.Push(byte(0xE2)), "");
  EXPECT_EQ(decoder.Push(byte('x')), "\xEF\xBF\xBDx");  // what was held back can no longer become a character
  EXPECT_EQ(decoder.Push(byte(0xE2)), "");
  EXPECT_EQ(decoder.Push(byte(0x82)), "");
  EXPECT_EQ(decoder.Flush(), "\xEF\xBF\xBD\xEF\xBF\xBD");
  EXPECT_EQ(decoder.Flush(), "");
}

TEST(StreamDecoder, AContinuationKeepsItsSpace) {
  const auto t = Tokenizer::Create(HandMade());
  EXPECT_EQ(StreamDecoder(*t, true, /*at_start=*/false).Push(8), " a");
  EXPECT_EQ(StreamDecoder(*t, true, /*at_start=*/true).Push(8), "a");
}

TEST(Tokenizer, EncodesFromSeveralThreads) {
  const auto t = Tokenizer::Create(SmallBpe("llama-bpe"));
  const auto texts = BpeVectors().at("texts").get<Texts>();
  std::vector<std::vector<Ids>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      for (const auto& text : texts) result.push_back(t->Encode(text, true, true));
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_EQ(result, results[0]);
}

// A megabyte without a place to cut it: quadratic merging would take hours here, and time out.
TEST(Tokenizer, AMegabyteWithoutSpacesIsFine) {
  Rng rng(7);
  std::string text(1 << 20, 'a');
  for (size_t i = text.size() / 2; i < text.size(); ++i) text[i] = static_cast<char>('a' + rng.Below(26));
  for (const auto& vocabulary : {SmallSentencePiece(), SmallBpe("gpt-2")}) {
    const auto t = Tokenizer::Create(vocabulary);
    EXPECT_EQ(t->Decode(t->Encode(text, false, true)), text);
  }
}

TEST(Tokenizer, RefusesATextThatIsTooLong) {
  const auto t = Tokenizer::Create(HandMade());
  // Only the length is looked at before the refusal; the view's bytes beyond the first do not exist.
  const std::string_view too_long("a", kMaxTextBytes);
  EXPECT_NE(ErrorOf([&] { t->Encode(too_long, true, true); }).find("too long"), std::string::npos);
}

// ---- Vocabularies that lie beside the checkout ---------------------------------------------------------------------

std::string ReadWhole(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

class SharedVocabulary : public testing::TestWithParam<const char*> {};

// llama.cpp's own vectors: each text is closed by a line "__ggml_vocab_test__", ids one text a line.
TEST_P(SharedVocabulary, MatchesLlamaCpp) {
  const auto path = SharedFile("tokenizers") / (std::string("ggml-vocab-") + GetParam() + ".gguf");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  const auto t = Tokenizer::Create(LoadVocabulary(GgufFile::Open(path.string())));
  const std::string input = ReadWhole(path.string() + ".inp");
  std::istringstream output(ReadWhole(path.string() + ".out"));

  const std::string separator = "\n__ggml_vocab_test__\n";
  size_t n_texts = 0;
  size_t begin = 0;
  for (size_t end; (end = input.find(separator, begin)) != std::string::npos;
       begin = end + separator.size(), ++n_texts) {
    std::string line;
    ASSERT_TRUE(std::getline(output, line)) << "more texts than lines of ids";
    std::istringstream numbers(line);
    const Ids expected{std::istream_iterator<int32_t>(numbers), {}};
    const std::string text = input.substr(begin, end - begin);
    const Ids ids = t->Encode(text, false, false);
    EXPECT_EQ(ids, expected) << testing::PrintToString(text);
    EXPECT_EQ(t->Decode(ids), text);
  }
  EXPECT_GE(n_texts, 40u);
}

INSTANTIATE_TEST_SUITE_P(All, SharedVocabulary, testing::Values("llama-spm", "gpt-2"), [](const auto& test) {
  std::string name = test.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

void ExpectVectors(const Tokenizer& tokenizer, const nlohmann::json& expected,
                   const std::set<std::string>& lossy = {}) {
  const auto texts = BpeVectors().at("texts").get<Texts>();
  for (size_t i = 0; i < texts.size(); ++i) {
    const Ids ids = tokenizer.Encode(texts[i], false, true);
    EXPECT_EQ(ids, expected[i].get<Ids>()) << "text " << i << ": " << texts[i];
    if (!lossy.contains(texts[i])) {
      EXPECT_EQ(tokenizer.Decode(ids), texts[i]);
    }
  }
}

TEST(SharedTokenizerJson, SmolLm2) {
  const auto path = SharedFile("tokenizers/smollm2_tokenizer.json");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  const auto json = ReadJson(path);
  Vocabulary v;
  v.name = "smollm2";
  v.model = "gpt2";
  v.pre = "smollm";
  const auto& tokens = json.at("model").at("vocab");
  v.tokens.resize(tokens.size());
  for (const auto& [text, id] : tokens.items()) v.tokens.at(id.get<size_t>()) = text;
  v.types.assign(v.tokens.size(), static_cast<int32_t>(TokenType::kNormal));
  for (const auto& added : json.at("added_tokens")) {
    v.types.at(added.at("id").get<size_t>()) = static_cast<int32_t>(TokenType::kControl);
  }
  for (const auto& merge : json.at("model").at("merges")) v.merges.push_back(merge.get<std::string>());
  // It has no tokens for some control characters, so one text does not come back whole.
  ExpectVectors(*Tokenizer::Create(std::move(v)), BpeVectors().at("shared").at("smollm2_tokenizer.json"),
                {std::string("\0\x01\x1c\x1f\x7f\xc2\x80\xc2\x9f", 9)});
}

TEST(SharedTokenizerJson, GptNeoX) {
  const auto path = SharedFile("tokenizers/ggml-vocab-gpt-neox.gguf");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  Vocabulary v = LoadVocabulary(GgufFile::Open(path.string()));
  EXPECT_EQ(v.pre, "") << "this file is older than the key";
  v.pre = "gpt-neox";
  ExpectVectors(*Tokenizer::Create(std::move(v)), BpeVectors().at("shared").at("gpt_neox_20B_tokenizer.json"));
}

}  // namespace
}  // namespace lesskv
