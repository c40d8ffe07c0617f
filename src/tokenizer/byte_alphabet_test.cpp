#include "tokenizer/byte_alphabet.h"

#include <gtest/gtest.h>

namespace lesskv {
namespace {

TEST(ByteAlphabet, HasTheKnownLetters) {
  EXPECT_EQ(ByteToAlphabet('A'), "A");
  EXPECT_EQ(ByteToAlphabet(' '), "\u0120");
  EXPECT_EQ(ByteToAlphabet('\n'), "\u010A");
  EXPECT_EQ(ByteToAlphabet(0x00), "\u0100");
  EXPECT_EQ(ByteToAlphabet(0x7F), "\u0121");
  EXPECT_EQ(ByteToAlphabet(0xAD), "\u0143");  // the soft hyphen is the last substitute
  EXPECT_EQ(ByteToAlphabet(0xAC), "\u00AC");
  EXPECT_EQ(ByteToAlphabet(0xFF), "\u00FF");
}

TEST(ByteAlphabet, ReadsBackEveryByte) {
  for (int byte = 0; byte < 256; ++byte) {
    const auto bytes = AlphabetToBytes(ByteToAlphabet(static_cast<uint8_t>(byte)));
    ASSERT_TRUE(bytes.has_value());
    EXPECT_EQ(*bytes, std::string(1, static_cast<char>(byte)));
  }
}

TEST(ByteAlphabet, RefusesOtherCharacters) {
  EXPECT_EQ(AlphabetToBytes(""), "");
  EXPECT_EQ(AlphabetToBytes("\u0120the"), " the");
  EXPECT_EQ(AlphabetToBytes("a b"), std::nullopt);     // a plain space is no letter
  EXPECT_EQ(AlphabetToBytes("\u0144"), std::nullopt);  // one beyond the last
  EXPECT_EQ(AlphabetToBytes("\uFF5C"), std::nullopt);
  EXPECT_EQ(AlphabetToBytes("a\xFF"), std::nullopt);  // not UTF-8
}

}  // namespace
}  // namespace lesskv
