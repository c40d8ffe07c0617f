#include "tokenizer/utf8.h"

#include <gtest/gtest.h>

#include "tokenizer/test_data.h"

namespace lesskv {
namespace {

constexpr const char* kFffd = "\xEF\xBF\xBD";

TEST(Utf8, KnowsTheBordersOfEveryLength) {
  struct Case {
    const char* text;
    size_t bytes;
  };
  const Case cases[] = {
      {"\x7F", 1},
      {"\x80", 0},
      {"\xBF", 0},
      {"\xC0\x80", 0},
      {"\xC1\xBF", 0},
      {"\xC2\x80", 2},
      {"\xDF\xBF", 2},
      {"\xDF\x7F", 0},
      {"\xE0\x9F\xBF", 0},  // overlong
      {"\xE0\xA0\x80", 3},
      {"\xED\x9F\xBF", 3},
      {"\xED\xA0\x80", 0},  // surrogate
      {"\xEE\x80\x80", 3},
      {"\xEF\xBF\xBF", 3},
      {"\xF0\x8F\xBF\xBF", 0},  // overlong
      {"\xF0\x90\x80\x80", 4},
      {"\xF4\x8F\xBF\xBF", 4},
      {"\xF4\x90\x80\x80", 0},  // beyond U+10FFFF
      {"\xF5\x80\x80\x80", 0},
      {"\xFF", 0},
      {"\xE2\x82", 0},
      {"\xF0\x9F\x98", 0},
  };
  for (const auto& [text, bytes] : cases) EXPECT_EQ(Utf8CharBytes(text, 0), bytes) << testing::PrintToString(text);
}

TEST(Utf8, ReplacesEachInvalidByte) {
  const std::string f = kFffd;
  EXPECT_EQ(ReplaceInvalidUtf8("a\xFFz"), "a" + f + "z");
  EXPECT_EQ(ReplaceInvalidUtf8("\xE2\x82 \xE2\x82\xAC"), f + f + " \xE2\x82\xAC");
  EXPECT_EQ(ReplaceInvalidUtf8("\xED\xA0\x80"), f + f + f);
  EXPECT_EQ(ReplaceInvalidUtf8("\xC0\xAF"), f + f);
  EXPECT_EQ(ReplaceInvalidUtf8(""), "");
}

TEST(Utf8, TailIsWhatMoreBytesCouldComplete) {
  EXPECT_EQ(IncompleteUtf8Tail(""), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("abc"), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("ab\xE2"), 1u);
  EXPECT_EQ(IncompleteUtf8Tail("ab\xE2\x82"), 2u);
  EXPECT_EQ(IncompleteUtf8Tail("ab\xE2\x82\xAC"), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("\xF0\x9F\x98"), 3u);
  EXPECT_EQ(IncompleteUtf8Tail("\xF0\x9F\x98\x80"), 0u);
  EXPECT_EQ(IncompleteUtf8Tail("\xED\xA0"), 0u);      // can only become a surrogate
  EXPECT_EQ(IncompleteUtf8Tail("\xF4\x90"), 0u);      // can only become something beyond U+10FFFF
  EXPECT_EQ(IncompleteUtf8Tail("\x82\x82\x82"), 0u);  // continues nothing
  EXPECT_EQ(IncompleteUtf8Tail("\xFF"), 0u);
}

TEST(Utf8, EveryCodePointIsOneCharacter) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    std::string text;
    AppendUtf8(c, text);
    ASSERT_EQ(Utf8CharBytes(text, 0), text.size()) << static_cast<uint32_t>(c);
    for (size_t n = 1; n < text.size(); ++n) {
      ASSERT_EQ(IncompleteUtf8Tail(std::string_view(text).substr(0, n)), n) << static_cast<uint32_t>(c);
    }
  }
}

TEST(Utf8, ReplacedTextIsWellFormedAndStays) {
  Rng rng(1);
  for (int i = 0; i < 2000; ++i) {
    const std::string text = ReplaceInvalidUtf8(RandomBytes(rng, 40));
    for (size_t pos = 0; pos < text.size(); pos += Utf8CharBytes(text, pos)) ASSERT_GT(Utf8CharBytes(text, pos), 0u);
    ASSERT_EQ(ReplaceInvalidUtf8(text), text);
  }
}

}  // namespace
}  // namespace lesskv
