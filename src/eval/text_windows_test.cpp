#include "eval/text_windows.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"
#include "eval/test_model.h"

namespace lesskv {
namespace {

using testing_support::Bundled;

template <typename T>
size_t Sum(const std::vector<T>& values) {
  return std::accumulate(values.begin(), values.end(), size_t{0});
}

TEST(TextWindowsTest, TokensKnowTheBytesAndWordsOfTheRawText) {
  const std::string text = "  Two  words,\nthen caf\xc3\xa9 \xe2\x80\x94 and\n\n4821 end ";
  const TokenizedText tokens = TokenizeText(*Bundled().tokenizer, text);
  EXPECT_EQ(Sum(tokens.bytes), text.size());
  EXPECT_EQ(Sum(tokens.words), 8u);
  EXPECT_EQ(tokens.bytes.size(), tokens.ids.size());
}

TEST(TextWindowsTest, SentencePiecesDummySpaceIsNoByteOfTheText) {
  const auto path = testing_support::SharedFile("data/models/stories260Ktok512.gguf");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  testing_support::OpenedModel stories(path);
  const std::string text = "Once upon a time, there was\na girl.";
  const TokenizedText tokens = TokenizeText(*stories.tokenizer, text);
  EXPECT_EQ(Sum(tokens.bytes), text.size());
  EXPECT_EQ(Sum(tokens.words), 8u);
}

// Every token of the text is scored in exactly one window, behind a BOS of no bytes.
TEST(TextWindowsTest, WindowsPartitionTheText) {
  const Tokenizer& tokenizer = *Bundled().tokenizer;
  ASSERT_TRUE(tokenizer.add_bos());
  const TokenizedText text = TokenizeText(tokenizer, ReadTextFile(testing_support::kSampleText));
  const auto windows = CutWindows(tokenizer, text, 100, 2);
  std::vector<int32_t> joined;
  size_t bytes = 0;
  for (const TextWindow& window : windows) {
    EXPECT_LE(window.ids.size(), 100u);
    EXPECT_EQ(window.ids[0], tokenizer.bos());
    EXPECT_EQ(window.bytes[0] + window.words[0], 0u);
    joined.insert(joined.end(), window.ids.begin() + 1, window.ids.end());
    bytes += Sum(window.bytes);
  }
  EXPECT_EQ(joined, text.ids);
  EXPECT_EQ(bytes, Sum(text.bytes));
  for (const TextWindow& window : CutWindows(tokenizer, text, 100, 100)) EXPECT_EQ(window.ids.size(), 100u);
}

// The n-th window is tokens n * 100 to n * 100 + 99 of BOS and the text, its first token replaced by BOS.
TEST(TextWindowsTest, LlamasWindowsAreWholeAndBeginWithBos) {
  const Tokenizer& tokenizer = *Bundled().tokenizer;
  const TokenizedText text = TokenizeText(tokenizer, ReadTextFile(testing_support::kSampleText));
  const auto windows = CutLlamaWindows(tokenizer, text, 100);
  ASSERT_EQ(windows.size(), (text.ids.size() + 1) / 100);
  for (size_t w = 0; w < windows.size(); ++w) {
    ASSERT_EQ(windows[w].ids.size(), 100u);
    EXPECT_EQ(windows[w].ids[0], tokenizer.bos());
    EXPECT_EQ(windows[w].bytes[0] + windows[w].words[0], 0u);
    for (size_t i = 1; i < 100; ++i) {
      EXPECT_EQ(windows[w].ids[i], text.ids[w * 100 + i - 1]);
      EXPECT_EQ(windows[w].bytes[i], text.bytes[w * 100 + i - 1]);
    }
  }
}

TEST(TextWindowsTest, ChosenWindowsAreEvenlySpaced) {
  EXPECT_EQ(EvenlySpaced(10, 4), (std::vector<size_t>{0, 2, 5, 7}));
  EXPECT_EQ(EvenlySpaced(2, 4), (std::vector<size_t>{0, 1}));
  const std::string texts[] = {testing_support::kSampleText};
  EXPECT_EQ(ReadWindows(*Bundled().tokenizer, texts, 64, 2, 3).size(), 3u);
}

TEST(TextWindowsTest, RefusesWhatCannotBeRead) {
  const std::string missing[] = {"/no/such/file.txt"};
  EXPECT_THROW(ReadWindows(*Bundled().tokenizer, missing, 64, 2, 0), Error);
  const std::string texts[] = {testing_support::kSampleText};
  EXPECT_THROW(ReadWindows(*Bundled().tokenizer, texts, 1, 2, 0), Error);
  EXPECT_THROW(ReadWindows(*Bundled().tokenizer, texts, 100000, 100000, 0), Error);
}

}  // namespace
}  // namespace lesskv
