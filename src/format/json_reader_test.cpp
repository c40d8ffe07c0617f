#include "format/json_reader.h"

#include <gtest/gtest.h>

#include <functional>

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

TEST(JsonReader, NumbersThatDoNotFitAreNamedWithTheirField) {
  const Json object = Json::parse(R"({"count": 4294967296, "most": 4294967295, "none": null, "inner": {"deep": {"x": "y"}}})");
  const JsonReader reader(object, "f");
  EXPECT_EQ(reader.Count("most"), 4294967295u);
  EXPECT_FALSE(reader.Has("none"));
  const auto refusal = [](const std::function<void()>& read) -> std::string {
    try {
      read();
    } catch (const FieldError& error) {
      return error.field() + " | " + error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal([&] { reader.Count("count"); }), "count | f: count: expected a count, found '4294967296'");
  EXPECT_EQ(refusal([&] { reader.Object("inner").Object("deep").Real("x"); }),
            "inner.deep.x | f: inner: deep: x: expected a number, found '\"y\"'");
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
