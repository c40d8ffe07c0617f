#include "engine/generate.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/memory.h"

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
