#include "tokenizer/special_tokens.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>

namespace lesskv {
namespace {

// "a[5]b": plain text stays, a token is its id in brackets, fragments are separated by "|".
std::string Show(const SpecialTokenMatcher& matcher, std::string_view text) {
  std::string result;
  for (const TextFragment& fragment : matcher.Split(text)) {
    if (!result.empty()) result += "|";
    result += fragment.id >= 0 ? fmt::format("[{}]", fragment.id) : std::string(fragment.text);
  }
  return result;
}

TEST(SpecialTokens, TakesTheLongestFromTheLeft) {
  SpecialTokenMatcher matcher;
  matcher.Add("<a>", 1);
  matcher.Add("<a><b>", 2);
  matcher.Add("<b>c", 3);
  matcher.Add("<a>", 4);  // again: the first one counts
  EXPECT_EQ(Show(matcher, "x<a><b>cy"), "x|[2]|cy");
  EXPECT_EQ(Show(matcher, "<a><a><b>"), "[1]|[2]");
  EXPECT_EQ(Show(matcher, "<a><b"), "[1]|<b");
  EXPECT_EQ(Show(matcher, "<b>"), "<b>");
  EXPECT_EQ(Show(matcher, "<b>c<b>c"), "[3]|[3]");
}

TEST(SpecialTokens, PrefixesOfTokensAreText) {
  SpecialTokenMatcher matcher;
  matcher.Add("<<<>", 7);
  EXPECT_EQ(Show(matcher, "<<<<<>>"), "<<|[7]|>");
  EXPECT_EQ(Show(matcher, "<<<"), "<<<");
  EXPECT_EQ(Show(matcher, ""), "");
}

TEST(SpecialTokens, RunsOfSpacesAsUserDefinedTokens) {
  SpecialTokenMatcher matcher;
  matcher.Add("  ", 2);
  matcher.Add("    ", 4);
  EXPECT_EQ(Show(matcher, "a       b"), "a|[4]|[2]| b");
}

TEST(SpecialTokens, AnyByteMayOccur) {
  SpecialTokenMatcher matcher;
  matcher.Add(std::string_view("\0\xFF", 2), 9);
  const std::string text("a\0\xFFz", 4);
  EXPECT_EQ(Show(matcher, text), "a|[9]|z");
}

TEST(SpecialTokens, WithoutTokensTextIsOneFragment) { EXPECT_EQ(Show(SpecialTokenMatcher(), "a<s>b"), "a<s>b"); }

}  // namespace
}  // namespace lesskv
