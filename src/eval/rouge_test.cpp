#include "eval/rouge.h"

#include <gtest/gtest.h>

namespace lesskv {
namespace {

TEST(RougeTest, WordsAreLowerCaseLettersAndDigits) {
  EXPECT_EQ(RougeWords("The cat's 2 HATS -- caf\xc3\xa9!"),
            (std::vector<std::string>{"the", "cat", "s", "2", "hats", "caf"}));
  EXPECT_TRUE(RougeWords(" .,\n").empty());
}

TEST(RougeTest, EqualTextsScoreOne) {
  const RougeScores scores = Rouge("A small, old house.", "a small old HOUSE");
  EXPECT_EQ(scores.rouge1, 1);
  EXPECT_EQ(scores.rouge2, 1);
  EXPECT_EQ(scores.rouge_l, 1);
}

// text: the cat sat on the mat (6 words, 5 pairs); reference: the cat lay on a mat (6, 5).
// Words shared: the (once: clipped), cat, on, mat = 4 -> 8/12. Pairs shared: "the cat" -> 2/10.
// Longest common subsequence: the cat on mat = 4 -> 8/12.
TEST(RougeTest, ByHand) {
  const RougeScores scores = Rouge("The cat sat on the mat.", "The cat lay on a mat.");
  EXPECT_DOUBLE_EQ(scores.rouge1, 8.0 / 12);
  EXPECT_DOUBLE_EQ(scores.rouge2, 2.0 / 10);
  EXPECT_DOUBLE_EQ(scores.rouge_l, 8.0 / 12);
}

// The same words in another order: all words, no pair, and a subsequence of one.
TEST(RougeTest, OrderMattersForPairsAndSubsequences) {
  const RougeScores scores = Rouge("three two one", "one two three");
  EXPECT_EQ(scores.rouge1, 1);
  EXPECT_EQ(scores.rouge2, 0);
  EXPECT_DOUBLE_EQ(scores.rouge_l, 2.0 / 6);
}

// Precision 2/2 and recall 2/4: F1 = 2 * 2 / (2 + 4).
TEST(RougeTest, LengthsDiffer) {
  EXPECT_DOUBLE_EQ(Rouge("big dog", "the big brown dog").rouge1, 4.0 / 6);
  EXPECT_EQ(Rouge("big dog", "the big brown dog").rouge2, 0);
}

TEST(RougeTest, EmptyTextsScoreZero) {
  EXPECT_EQ(Rouge("", "words here").rouge1, 0);
  EXPECT_EQ(Rouge("words", "").rouge_l, 0);
  EXPECT_EQ(Rouge("one", "one").rouge2, 0);  // no pair in either
}

}  // namespace
}  // namespace lesskv
