#include "format/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <functional>

#include "base/rng.h"

namespace lesskv {
namespace {

std::vector<std::byte> File(std::string_view header, size_t data_bytes, uint64_t claimed_header_bytes) {
  std::vector<std::byte> bytes(8);
  std::memcpy(bytes.data(), &claimed_header_bytes, 8);
  const auto text = std::as_bytes(std::span(header));
  bytes.insert(bytes.end(), text.begin(), text.end());
  bytes.resize(bytes.size() + data_bytes);
  return bytes;
}

std::vector<std::byte> File(std::string_view header, size_t data_bytes) {
  return File(header, data_bytes, header.size());
}

std::string MessageOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

SafetensorsWriter Sample() {
  SafetensorsWriter writer;
  writer.AddMetadata("rank", "8");
  writer.Add("w", {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
  const std::vector<int64_t> ids = {-1, 1ll << 40};
  writer.Add("ids", SafetensorType::kI64, {2}, std::as_bytes(std::span(ids)));
  const std::vector<uint8_t> mask = {1, 0, 1};
  writer.Add("mask", SafetensorType::kBool, {3}, std::as_bytes(std::span(mask)));
  writer.Add("none", SafetensorType::kI32, {4, 0}, {});
  const std::vector<uint16_t> half = {0x3c00};
  writer.Add("half", SafetensorType::kF16, {}, std::as_bytes(std::span(half)));
  return writer;
}

TEST(Safetensors, WhatIsWrittenReturns) {
  const auto path = std::filesystem::temp_directory_path() / fmt::format("lesskv_{}.safetensors", ::getpid());
  Sample().Write(path.string());
  const SafetensorsFile file = SafetensorsFile::Open(path.string());
  std::filesystem::remove(path);
  EXPECT_EQ(file.tensors().size(), 5u);
  EXPECT_EQ(file.Metadata("rank"), "8");
  EXPECT_EQ(file.Values<float>("w", {{2, 3}}), (std::vector<float>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(file.Values<int64_t>("ids"), (std::vector<int64_t>{-1, 1ll << 40}));
  EXPECT_EQ(file.Values<uint8_t>("mask"), (std::vector<uint8_t>{1, 0, 1}));
  EXPECT_TRUE(file.Values<int32_t>("none", {{4, 0}}).empty());
  EXPECT_EQ(file.Values<uint16_t>("half", {std::vector<size_t>{}}), (std::vector<uint16_t>{0x3c00}));
}

TEST(Safetensors, WrongRequestsAreNamed) {
  const SafetensorsFile file = SafetensorsFile::Parse(Sample().Serialize(), "s");
  EXPECT_EQ(MessageOf([&] { file.Values<float>("absent"); }), "s has no tensor 'absent'");
  EXPECT_EQ(MessageOf([&] { file.Values<float>("ids"); }), "s: tensor 'ids' is stored as I64, expected another type");
  EXPECT_EQ(MessageOf([&] { file.Values<float>("w", {{3, 2}}); }), "s: tensor 'w' has shape [2, 3], expected [3, 2]");
  EXPECT_EQ(MessageOf([&] { file.Metadata("heavy"); }), "s has no metadata 'heavy'");
  SafetensorsWriter writer = Sample();
  EXPECT_NE(MessageOf([&] { writer.Add("w", {1}, std::vector<float>{1}); }).find("added twice"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.Add("v", {2}, std::vector<float>{1}); }).find("takes 8 bytes"), std::string::npos);
}

TEST(Safetensors, BrokenFilesAreRefused) {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  ASSERT_EQ(MessageOf([&] { SafetensorsFile::Parse(File(good, 8), "f"); }), "(no error)");
  const struct {
    const char* fragment;
    std::vector<std::byte> bytes;
  } kCases[] = {
      {"too few", std::vector<std::byte>(7)},
      {"a header of 18446744073709551615 bytes", File(good, 8, ~uint64_t{0})},
      {"a header of 63 bytes in 70", File(good, 8, 63)},
      {"not valid JSON", File(good, 8, good.size() - 1)},
      {"not valid JSON", File("", 0)},
      {"not valid JSON", File("\xff\xfe{}", 0)},
      {"not valid JSON", File(std::string(100000, '['), 0)},
      {"not a JSON object", File("[]", 0)},
      {"names 'a' twice", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1})", 1)},
      {"names 'shape' twice", File(R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", 1)},
      {"not an object", File(R"({"a":3})", 0)},
      {"no dtype", File(R"({"a":{"shape":[2],"data_offsets":[0,8]}})", 8)},
      {"no dtype", File(R"({"a":{"dtype":7,"shape":[2],"data_offsets":[0,8]}})", 8)},
      {"dtype 'F8_E4M3' is not supported", File(R"({"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}})", 2)},
      {"no array shape", File(R"({"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})", 8)},
      {"holds '-2'", File(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", 8)},
      {"holds '2.5'", File(R"({"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}})", 8)},
      {"overflows", File(R"({"a":{"dtype":"F32","shape":[9223372036854775807,3],"data_offsets":[0,8]}})", 8)},
      {"takes 12 bytes, data_offsets give 8", File(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8)},
      {"[8, 0] are not a range", File(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8)},
      {"[0, 8, 9] are not a range", File(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}})", 9)},
      {"in 7 bytes of data", File(good, 7)},
      {"1 bytes of data belong to no tensor", File(good, 9)},
      {"begins at data offset 4, expected 0", File(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8)},
      {"begins at data offset 0, expected 4",
       File(
           R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}})",
           8)},
      {"__metadata__ is not an object", File(R"({"__metadata__":[]})", 0)},
      {"__metadata__ 'k' is not a string", File(R"({"__metadata__":{"k":1}})", 0)},
  };
  for (const auto& [fragment, bytes] : kCases) {
    const std::string message = MessageOf([&, &damaged = bytes] { SafetensorsFile::Parse(damaged, "f"); });
    EXPECT_NE(message.find(fragment), std::string::npos) << fragment << " in: " << message;
  }
}

TEST(Safetensors, DamageNeverCrashes) {
  const std::vector<std::byte> whole = Sample().Serialize();
  for (size_t n = 0; n < whole.size(); ++n) {
    EXPECT_THROW(SafetensorsFile::Parse({whole.begin(), whole.begin() + static_cast<ptrdiff_t>(n)}, "cut"), Error) << n;
  }
  Rng rng(3);
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::byte> damaged = whole;
    damaged[rng.Below(damaged.size() - 47)] ^= static_cast<std::byte>(1u << rng.Below(8));
    try {
      const SafetensorsFile file = SafetensorsFile::Parse(std::move(damaged), "damaged");
      uint64_t sum = 0;
      for (const Safetensor& tensor : file.tensors())
        for (const std::byte b : tensor.data) sum += static_cast<uint64_t>(b);
      EXPECT_LE(sum, 255 * whole.size());
      ++accepted;
    } catch (const Error&) {
    }
  }
  EXPECT_GT(accepted, 50);
}

TEST(Safetensors, ReadsTheGoldenVectors) {
  const char* folder = std::getenv("LESSKV_SHARED_DIR");
  const std::string path = (folder != nullptr ? std::string(folder) : LESSKV_SOURCE_DIR "/../shared") +
                           "/golden/less/decode_h2o.safetensors";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is absent";
  const SafetensorsFile file = SafetensorsFile::Open(path);
  EXPECT_EQ(file.Metadata("policy"), "h2o");
  EXPECT_EQ(file.Values<float>("q", {{64, 4, 16}}).size(), 4096u);
  EXPECT_EQ(file.Values<uint8_t>("kept_less", {{25, 4, 64}}).size(), 6400u);
}

}  // namespace
}  // namespace lesskv
