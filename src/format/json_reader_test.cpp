#include "format/json_reader.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "format/safetensors.h"

namespace lesskv {
namespace {

using Json = nlohmann::json;

std::string Nested(size_t levels) { return std::string(levels, '[') + std::string(levels, ']'); }

TEST(JsonReader, WhatNestsTooDeepIsRefusedBeforeItIsRead) {
  EXPECT_FALSE(NestsTooDeep(Nested(kMostJsonLevels)));
  EXPECT_TRUE(NestsTooDeep(Nested(kMostJsonLevels + 1)));
  EXPECT_TRUE(NestsTooDeep(std::string(kMostJsonLevels + 1, '{')));
  EXPECT_FALSE(NestsTooDeep("[" + Nested(60) + "," + Nested(60) + "," + Nested(60) + "]"));
  // Brackets in texts are letters, behind an escaped quote, too.
  EXPECT_FALSE(NestsTooDeep(R"(["\")" + std::string(100, '[') + R"("])"));
  EXPECT_TRUE(NestsTooDeep(R"(["\\",)" + std::string(100, '[')));
  EXPECT_EQ(ParseJson(Nested(kMostJsonLevels)), Json::parse(Nested(kMostJsonLevels)));
  EXPECT_THROW(ParseJson(Nested(1000000)), Json::exception);
  EXPECT_THROW(ParseJson<nlohmann::ordered_json>(Nested(1000000)), nlohmann::ordered_json::exception);
}

TEST(JsonReader, ArraysAndObjectsAreCounted) {
  const JsonExtent extent = MeasureJson(R"({"a": [1, {}, "[{"], "b": [[]]})");
  EXPECT_EQ(extent.parts, 5u);
  EXPECT_EQ(extent.levels, 3u);
  EXPECT_EQ(MeasureJson("17").parts, 0u);
}

TEST(JsonReader, AHeaderOfSafetensorsMayNotNestEither) {
  const std::string header = "{\"__metadata__\":" + Nested(500000) + "}";
  std::vector<std::byte> file(8 + header.size());
  const uint64_t size = header.size();
  std::memcpy(file.data(), &size, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  try {
    SafetensorsFile::Parse(file, "f");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "f: the header is not valid JSON (nested deeper than 64 levels)");
  }
}

}  // namespace
}  // namespace lesskv
