#include "kernels/quants/quants.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "base/rng.h"
#include "kernels/quants/code_tables.h"
#include "kernels/quants/half.h"

namespace lesskv {
namespace {

constexpr DType kReadTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16,   DType::kQ8_0,  DType::kQ4_0, DType::kQ4_1,
                                DType::kQ5_0, DType::kQ5_1, DType::kIQ4_NL, DType::kMXFP4, DType::kQ2_K, DType::kQ3_K,
                                DType::kQ4_K, DType::kQ5_K, DType::kQ6_K,   DType::kIQ4_XS};
constexpr DType kWrittenTypes[] = {DType::kF32,    DType::kF16,  DType::kBF16, DType::kQ8_0,
                                   DType::kQ4_0,   DType::kQ4_1, DType::kQ5_0, DType::kQ5_1,
                                   DType::kIQ4_NL, DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

template <typename T>
std::vector<T> ReadVector(const std::string& name) {
  const std::string path = LESSKV_SOURCE_DIR "/tests/data/quants/" + name;
  std::ifstream in(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), {});
  EXPECT_FALSE(bytes.empty()) << path;
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

std::vector<float> Gaussian(size_t n, uint64_t seed, float scale = 1.0f) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& value : x) value = scale * rng.Normal();
  return x;
}

std::vector<float> RoundTrip(DType type, const std::vector<float>& x) {
  std::vector<std::byte> row(RowBytes(type, x.size()));
  QuantizeRow(type, x.data(), x.size(), row.data());
  std::vector<float> result(x.size());
  DequantizeRow(type, row.data(), x.size(), result.data());
  return result;
}

// Squared error over squared norm.
double RelativeError(const std::vector<float>& x, const std::vector<float>& y) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
    norm += static_cast<double>(x[i]) * x[i];
  }
  return error / norm;
}

TEST(Half, EveryHalfReturnsThroughFloat) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    if (std::isnan(value)) {
      EXPECT_TRUE((half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0);
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value))));
    } else {
      EXPECT_EQ(FloatToHalf(value), half);
    }
  }
  EXPECT_EQ(HalfToFloat(0x3c00), 1.0f);
  EXPECT_EQ(HalfToFloat(0xc000), -2.0f);
  EXPECT_EQ(HalfToFloat(0x0001), 0x1p-24f);
  EXPECT_EQ(HalfToFloat(0x7bff), 65504.0f);
}

// Between two neighbouring halves the nearer one is taken, in the middle the even one.
TEST(Half, RoundsToNearestEven) {
  for (uint16_t half = 0; half < 0x7bff; ++half) {
    const float low = HalfToFloat(half), high = HalfToFloat(static_cast<uint16_t>(half + 1));
    const float middle = low + (high - low) / 2;  // exact: a float has more fraction bits
    const uint16_t even = static_cast<uint16_t>(half + (half & 1));
    ASSERT_EQ(FloatToHalf(middle), even) << middle;
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 0.0f)), half) << middle;
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 1e9f)), half + 1) << middle;
    ASSERT_EQ(FloatToHalf(-middle), even | 0x8000) << middle;
  }
  EXPECT_EQ(FloatToHalf(65519.99f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToHalf(-std::numeric_limits<float>::infinity()), 0xfc00);
  EXPECT_EQ(FloatToHalf(std::numeric_limits<float>::denorm_min()), 0);
}

TEST(Bf16, RoundsToNearestEvenAndKeepsNan) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = Bf16ToFloat(static_cast<uint16_t>(bits));
    if (!std::isnan(value)) {
      ASSERT_EQ(FloatToBf16(value), bits);
    }
  }
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // halfway, even below
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);  // halfway, even above
  EXPECT_EQ(FloatToBf16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(std::bit_cast<float>(0x7f800001u)))));
}

class QuantVectors : public ::testing::TestWithParam<DType> {};

// `name` is a type, or a type and ".extreme".
void ExpectDecoded(DType type, const std::string& name) {
  const auto blocks = ReadVector<std::byte>(name + ".blocks");
  const auto expected = ReadVector<float>(name + ".values");
  ASSERT_EQ(blocks.size(), RowBytes(type, expected.size()));
  std::vector<float> values(expected.size());
  DequantizeRow(type, blocks.data(), values.size(), values.data());
  EXPECT_EQ(values, expected) << name;
}

TEST_P(QuantVectors, DecodesAsTheIndependentImplementation) {
  const std::string name(Traits(GetParam()).name);
  ExpectDecoded(GetParam(), name);
  if (Traits(GetParam()).block_elements > 1) ExpectDecoded(GetParam(), name + ".extreme");
}

TEST_P(QuantVectors, EncodesAsTheIndependentImplementation) {
  const DType type = GetParam();
  // The vectors of these are random codes, not an encoding; MXFP4 is not written.
  if (Traits(type).block_elements == 256 || type == DType::kIQ4_NL || type == DType::kMXFP4) return;
  const auto input = ReadVector<float>("input");
  const auto expected = ReadVector<std::byte>(std::string(Traits(type).name) + ".blocks");
  std::vector<std::byte> blocks(RowBytes(type, input.size()));
  QuantizeRow(type, input.data(), input.size(), blocks.data());
  const size_t block_bytes = Traits(type).block_bytes;
  for (size_t i = 0; i < blocks.size(); ++i) {
    ASSERT_EQ(blocks[i], expected[i]) << "block " << i / block_bytes << ", byte " << i % block_bytes;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, QuantVectors, ::testing::ValuesIn(std::begin(kReadTypes) + 1, std::end(kReadTypes)),
                         [](const auto& test) { return std::string(Traits(test.param).name); });

TEST(Quants, ErrorOfGaussianWeightsIsWhatTheBitsAllow) {
  const std::vector<float> x = Gaussian(256 * 64, 1, 0.02f);
  // Measured on this row: F16 4.24e-8, BF16 2.74e-6, Q8_0 2.89e-5, Q4_0 7.33e-3, Q4_1 6.13e-3, Q5_0 1.81e-3, Q5_1
  // 1.43e-3, IQ4_NL 5.48e-3, Q4_K 4.90e-3, Q5_K 1.21e-3, Q6_K 2.96e-4. A halved step would quarter the number, a lost
  // bit quadruple it.
  const struct {
    DType type;
    double bound;
  } kBounds[] = {{DType::kF32, 0},       {DType::kF16, 4.7e-8},  {DType::kBF16, 3e-6},    {DType::kQ8_0, 3.2e-5},
                 {DType::kQ4_0, 8e-3},   {DType::kQ5_0, 2e-3},   {DType::kQ5_1, 1.6e-3},  {DType::kQ4_1, 6.7e-3},
                 {DType::kIQ4_NL, 6e-3}, {DType::kQ4_K, 5.3e-3}, {DType::kQ5_K, 1.35e-3}, {DType::kQ6_K, 3.25e-4}};
  for (const auto& [type, bound] : kBounds) {
    const double error = RelativeError(x, RoundTrip(type, x));
    RecordProperty(std::string(Traits(type).name), std::to_string(error));
    EXPECT_LE(error, bound) << Traits(type).name;
    EXPECT_GE(error, bound / 2) << Traits(type).name;
  }
}

// Each row of the code table, at any scale and sign, must return exactly: the search may not prefer another scale.
TEST(Quants, Iq4NlKeepsItsOwnCodes) {
  for (const float scale : {1.0f, -0.5f, 0.015625f, 512.0f}) {
    std::vector<float> x(32);
    for (size_t i = 0; i < 32; ++i) x[i] = scale * static_cast<float>(kIq4Codes[i * 5 % 16]);
    EXPECT_EQ(RoundTrip(DType::kIQ4_NL, x), x) << scale;
  }
}

// What a K format can express exactly must return exactly, so the search may not move away from a perfect answer.
TEST(Quants, KFormatsKeepWhatTheyCanExpress) {
  std::vector<float> x(256);
  for (size_t i = 0; i < 256; ++i) x[i] = static_cast<float>(i % 16) * 63.0f - 8.0f * 63.0f;
  EXPECT_LT(RelativeError(x, RoundTrip(DType::kQ4_K, x)), 1e-6);
  for (size_t i = 0; i < 256; ++i) x[i] = static_cast<float>(i % 32) * 63.0f - 16.0f * 63.0f;
  EXPECT_LT(RelativeError(x, RoundTrip(DType::kQ5_K, x)), 1e-6);
  for (size_t i = 0; i < 256; ++i) x[i] = (i % 16 == 7 ? 31.0f : 4.0f * static_cast<float>(i % 16) - 32.0f) * 128.0f;
  EXPECT_LT(RelativeError(x, RoundTrip(DType::kQ6_K, x)), 1e-6);
}

TEST(Quants, ZerosStayZeroAndConstantsStayConstant) {
  for (const DType type : kWrittenTypes) {
    for (const float constant : {0.0f, 1.0f, -3.0f, 1e-38f, 60000.0f}) {
      const std::vector<float> y = RoundTrip(type, std::vector<float>(256, constant));
      for (const float value : y) {
        EXPECT_EQ(value, y[0]) << Traits(type).name << " " << constant;
        // A K format stores a constant as a product of a half and a 6- or 8-bit number.
        EXPECT_NEAR(value, constant, std::fabs(constant) * 0.01 + 1e-7) << Traits(type).name;
      }
    }
  }
}

TEST(Quants, ExtremeBlocksStayFinite) {
  const float kLargest = std::numeric_limits<float>::max(), kTiny = std::numeric_limits<float>::denorm_min();
  std::vector<float> x = Gaussian(256, 3);
  for (const DType type : kWrittenTypes) {
    if (type == DType::kF16 || type == DType::kBF16) continue;  // infinity is the right answer there
    for (const auto& [a, b] :
         {std::pair{kLargest, 1.0f}, {-kLargest, 0.0f}, {1e9f, -1e9f}, {kTiny, 0.0f}, {1e-35f, -kTiny}}) {
      x[7] = a;
      x[200] = b;
      for (const float value : RoundTrip(type, x)) EXPECT_TRUE(std::isfinite(value)) << Traits(type).name << " " << a;
    }
  }
}

TEST(Quants, RandomBytesDecodeWithoutTrouble) {
  Rng rng(9);
  for (const DType type : kReadTypes) {
    std::vector<uint16_t> row(RowBytes(type, 256 * 8) / 2);
    for (uint16_t& word : row) word = static_cast<uint16_t>(rng.Next());
    std::vector<float> out(256 * 8 + 1, -7.0f);
    DequantizeRow(type, row.data(), 256 * 8, out.data());
    EXPECT_EQ(out.back(), -7.0f);
  }
}

TEST(Quants, ScalesPackBothWays) {
  Rng rng(11);
  for (int round = 0; round < 200; ++round) {
    uint8_t scales[8], minima[8], packed[12], scales_back[8], minima_back[8];
    for (int g = 0; g < 8; ++g) {
      scales[g] = static_cast<uint8_t>(rng.Below(64));
      minima[g] = static_cast<uint8_t>(rng.Below(64));
    }
    PackScales(scales, minima, packed);
    UnpackScales(packed, scales_back, minima_back);
    EXPECT_EQ(std::memcmp(scales, scales_back, 8), 0);
    EXPECT_EQ(std::memcmp(minima, minima_back, 8), 0);
  }
}

TEST(QuantsDeathTest, NotFiniteOrNotWholeBlocksIsOurMistake) {
  std::vector<float> x(32, 1.0f);
  std::vector<std::byte> row(64);
  EXPECT_DEATH(QuantizeRow(DType::kQ8_0, x.data(), 31, row.data()), "not whole Q8_0 blocks");
  x[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_DEATH(QuantizeRow(DType::kQ8_0, x.data(), 32, row.data()), "not finite");
  x[5] = std::numeric_limits<float>::infinity();
  EXPECT_DEATH(QuantizeRow(DType::kQ4_0, x.data(), 32, row.data()), "not finite");
  EXPECT_DEATH(DequantizeRow(DType::kI32, row.data(), 4, x.data()), "not a weight type");
  x.assign(256, 1.0f);
  row.resize(256);
  EXPECT_DEATH(QuantizeRow(DType::kIQ4_XS, x.data(), 256, row.data()), "IQ4_XS is read, not written");
}

}  // namespace
}  // namespace lesskv
