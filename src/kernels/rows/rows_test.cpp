#include "kernels/rows/rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/rng.h"
#include "kernels/quants/half.h"

namespace lesskv {
namespace {

constexpr RowType kTypes[] = {RowType::kF32, RowType::kF16, RowType::kBF16, RowType::kQ8, RowType::kQ4};
constexpr RowSide kSides[] = {RowSide::kKeys, RowSide::kValues};

std::vector<float> RandomRows(size_t n, size_t dim, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n * dim);
  for (float& v : x) v = rng.Normal();
  return x;
}

template <typename F>
void ForEachFormat(F f) {
  for (RowType type : kTypes) {
    for (RowSide side : kSides) {
      for (size_t dim : {1, 20, 32, 33, 64, 80, 96, 128}) {
        if (!Supports(type, dim)) continue;
        SCOPED_TRACE(std::string(Name(type)) + (side == RowSide::kKeys ? " keys " : " values ") + std::to_string(dim));
        f(RowFormat{type, side, dim});
      }
    }
  }
}

// What a type makes of one row, written down from its definition.
std::vector<float> Expected(RowType type, const float* x, size_t dim) {
  std::vector<float> y(x, x + dim);
  for (size_t i = 0; i < dim; ++i) {
    if (type == RowType::kF16) y[i] = HalfToFloat(FloatToHalf(x[i]));
    if (type == RowType::kBF16) y[i] = Bf16ToFloat(FloatToBf16(x[i]));
  }
  if (type != RowType::kQ8 && type != RowType::kQ4) return y;
  for (size_t b = 0; b < dim; b += 32) {
    float extreme = 0;
    for (size_t i = b; i < b + 32; ++i) {
      if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    }
    const float d = type == RowType::kQ8 ? std::fabs(extreme) / 127 : extreme / -8;
    for (size_t i = b; i < b + 32; ++i) {
      const float inverse = d != 0 ? 1 / d : 0;
      const float code =
          type == RowType::kQ8 ? std::round(x[i] * inverse) : std::floor(std::min(x[i] * inverse + 8.5f, 15.0f)) - 8;
      y[i] = code * HalfToFloat(FloatToHalf(d));
    }
  }
  return y;
}

TEST(Rows, Names) {
  EXPECT_EQ(Name(RowType::kF32), "f32");
  EXPECT_EQ(Name(RowType::kQ4), "q4");
  EXPECT_TRUE(Supports(RowType::kF16, 1));
  EXPECT_FALSE(Supports(RowType::kF16, 0));
  EXPECT_FALSE(Supports(RowType::kQ8, 80));
  EXPECT_TRUE(Supports(RowType::kQ4, 96));
}

TEST(Rows, BytesOfARegion) {
  EXPECT_EQ(RegionBytes({RowType::kF16, RowSide::kKeys, 64}, 32), 32u * 64 * 2);
  EXPECT_EQ(RegionBytes({RowType::kF16, RowSide::kValues, 64}, 32), 32u * 64 * 2);
  EXPECT_EQ(RegionBytes({RowType::kQ8, RowSide::kKeys, 64}, 32), 32u * 68);    // 34 bytes a block of 32
  EXPECT_EQ(RegionBytes({RowType::kQ4, RowSide::kValues, 64}, 32), 32u * 36);  // 18 bytes a block of 32
  EXPECT_EQ(RegionBytes({RowType::kF32, RowSide::kValues, 33}, 16), 2176u);    // 16 * 33 * 4 + 64, rounded up to 64
}

TEST(Rows, ReadGivesWhatWasWritten) {
  ForEachFormat([](const RowFormat& format) {
    constexpr size_t kRows = 37, kCapacity = 48, kFirst = 5;
    const std::vector<float> x = RandomRows(kRows, format.head_dim, format.head_dim);
    std::vector<std::byte> region(RegionBytes(format, kCapacity));
    WriteRows(format, region.data(), kFirst, kRows, x.data(), format.head_dim);
    std::vector<float> y(kRows * (format.head_dim + 3), 77);
    ReadRows(format, region.data(), kFirst, kRows, y.data(), format.head_dim + 3);
    for (size_t r = 0; r < kRows; ++r) {
      const std::vector<float> expected = Expected(format.type, &x[r * format.head_dim], format.head_dim);
      for (size_t c = 0; c < format.head_dim; ++c) ASSERT_EQ(y[r * (format.head_dim + 3) + c], expected[c]);
      ASSERT_EQ(y[r * (format.head_dim + 3) + format.head_dim], 77);
    }
  });
}

TEST(Rows, WritingOneRowLeavesTheOthersAlone) {
  ForEachFormat([](const RowFormat& format) {
    const size_t dim = format.head_dim;
    const std::vector<float> x = RandomRows(32, dim, 1), other = RandomRows(1, dim, 2);
    std::vector<std::byte> region(RegionBytes(format, 32));
    WriteRows(format, region.data(), 0, 32, x.data(), dim);
    std::vector<float> before(32 * dim), after(32 * dim);
    ReadRows(format, region.data(), 0, 32, before.data(), dim);
    WriteRows(format, region.data(), 19, 1, other.data(), dim);
    ReadRows(format, region.data(), 0, 32, after.data(), dim);
    for (size_t i = 0; i < 32 * dim; ++i) {
      if (i / dim != 19) {
        ASSERT_EQ(before[i], after[i]);
      }
    }
    const std::vector<float> expected = Expected(format.type, other.data(), dim);
    for (size_t c = 0; c < dim; ++c) ASSERT_EQ(after[19 * dim + c], expected[c]);
  });
}

TEST(Rows, CopyIsBitExactAndTouchesOneRow) {
  ForEachFormat([](const RowFormat& format) {
    const size_t dim = format.head_dim;
    const std::vector<float> x = RandomRows(32, dim, 3), y = RandomRows(48, dim, 4);
    std::vector<std::byte> from(RegionBytes(format, 32)), to(RegionBytes(format, 48)), expected(to.size());
    WriteRows(format, from.data(), 0, 32, x.data(), dim);
    WriteRows(format, to.data(), 0, 48, y.data(), dim);
    expected = to;
    WriteRows(format, expected.data(), 40, 1, &x[7 * dim], dim);  // the same encoder gives the same bits
    CopyRow(format, from.data(), 7, to.data(), 40);
    EXPECT_EQ(std::memcmp(to.data(), expected.data(), to.size()), 0);
    WriteRows(format, expected.data(), 3, 1, &x[7 * dim], dim);
    CopyRow(format, to.data(), 40, to.data(), 3);  // inside one region
    EXPECT_EQ(std::memcmp(to.data(), expected.data(), to.size()), 0);
  });
}

TEST(Rows, WritingTogetherOrOneByOneIsTheSame) {
  ForEachFormat([](const RowFormat& format) {
    const size_t dim = format.head_dim;
    const std::vector<float> x = RandomRows(45, dim, 5);
    std::vector<std::byte> together(RegionBytes(format, 64)), single(together.size());
    WriteRows(format, together.data(), 9, 45, x.data(), dim);
    for (size_t i = 0; i < 45; ++i) WriteRows(format, single.data(), 9 + i, 1, &x[i * dim], dim);
    EXPECT_EQ(std::memcmp(together.data(), single.data(), together.size()), 0);
  });
}

TEST(Rows, HugeValuesBecomeTheLargestHalf) {
  const RowFormat format = {RowType::kF16, RowSide::kKeys, 4};
  const float x[4] = {1e6f, -1e30f, 65519.0f, INFINITY};
  std::vector<std::byte> region(RegionBytes(format, 16));
  WriteRows(format, region.data(), 0, 1, x, 4);
  float y[4];
  ReadRows(format, region.data(), 0, 1, y, 4);
  EXPECT_EQ(y[0], 65504.0f);
  EXPECT_EQ(y[1], -65504.0f);
  EXPECT_EQ(y[2], 65504.0f);
  EXPECT_EQ(y[3], INFINITY);
}

// The largest magnitude is met exactly, up to the f16 scale; all others within half a step (a whole one for q4, whose
// codes reach 7 on the other side).
TEST(Rows, QuantisationStaysWithinItsStep) {
  for (RowType type : {RowType::kQ8, RowType::kQ4}) {
    const RowFormat format = {type, RowSide::kValues, 64};
    const std::vector<float> x = RandomRows(16, 64, 6);
    std::vector<std::byte> region(RegionBytes(format, 16));
    WriteRows(format, region.data(), 0, 16, x.data(), 64);
    std::vector<float> y(16 * 64);
    ReadRows(format, region.data(), 0, 16, y.data(), 64);
    for (size_t b = 0; b < x.size(); b += 32) {
      float largest = 0;
      for (size_t i = b; i < b + 32; ++i) largest = std::max(largest, std::fabs(x[i]));
      const float bound = type == RowType::kQ8 ? largest / 127 * 0.6f : largest / 8 * 1.01f;
      for (size_t i = b; i < b + 32; ++i) {
        EXPECT_NEAR(x[i], y[i], bound);
        if (std::fabs(x[i]) == largest) {
          EXPECT_NEAR(x[i], y[i], largest * 0x1p-10f);
        }
      }
    }
  }
}

TEST(Rows, ZeroRowsStayZero) {
  ForEachFormat([](const RowFormat& format) {
    const std::vector<float> x(format.head_dim);
    std::vector<std::byte> region(RegionBytes(format, 16), std::byte{0xab});
    WriteRows(format, region.data(), 2, 1, x.data(), format.head_dim);
    std::vector<float> y(format.head_dim, 1);
    ReadRows(format, region.data(), 2, 1, y.data(), format.head_dim);
    for (float v : y) EXPECT_EQ(v, 0.0f);
  });
}

}  // namespace
}  // namespace lesskv
