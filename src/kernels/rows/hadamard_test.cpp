#include "kernels/rows/hadamard.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/rng.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

class HadamardTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ForceIsa(GetParam()); }
  void TearDown() override { ForceIsa(BestIsa()); }
};

std::vector<float> Random(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

// The definition, in double.
std::vector<double> ByMatrix(const std::vector<float>& x, size_t block) {
  std::vector<double> out(x.size(), 0.0);
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t first = i / block * block;
    for (size_t j = 0; j < block; ++j) {
      const bool minus = std::popcount((i - first) & j) % 2 != 0;
      out[i] += (minus ? -1.0 : 1.0) * x[first + j] / std::sqrt(static_cast<double>(block));
    }
  }
  return out;
}

TEST(HadamardBlock, IsTheLargestPowerOfTwoThatDivides) {
  for (const auto& [dim, block] : {std::pair<size_t, size_t>{1, 1}, {33, 1}, {64, 64}, {128, 128}, {96, 32}, {80, 16}, {2, 2}})
    EXPECT_EQ(HadamardBlock(dim), block) << dim;
}

TEST_P(HadamardTest, ByHand) {
  float pair[] = {3, 1};
  Hadamard(pair, 2, 2);
  EXPECT_FLOAT_EQ(pair[0], 4 / std::sqrt(2.0f));
  EXPECT_FLOAT_EQ(pair[1], 2 / std::sqrt(2.0f));
  // One channel that stands out is spread over its block; other blocks stay as they are.
  float spread[] = {0, 8, 0, 0, 0, 0, 0, 0};
  Hadamard(spread, 8, 4);
  const float want[] = {4, -4, 4, -4, 0, 0, 0, 0};
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(spread[i], want[i]) << i;
}

// Every block size, numbers of blocks that fill no vector, an odd address; what lies behind stays as it was.
TEST_P(HadamardTest, EqualsTheMatrixAndTheScalarLoop) {
  for (size_t block = 1; block <= 512; block *= 2) {
    for (size_t n_blocks : {0, 1, 2, 3, 5, 17}) {
      SCOPED_TRACE(testing::Message() << n_blocks << " blocks of " << block);
      const size_t n = n_blocks * block;
      const std::vector<float> x = Random(n, 1 + block);
      std::vector<float> memory(n + 2, 7.0f), scalar = x;
      float* y = memory.data() + 1;
      std::copy(x.begin(), x.end(), y);
      Hadamard(y, n, block);
      EXPECT_EQ(memory.front(), 7.0f);
      EXPECT_EQ(memory.back(), 7.0f);
      const std::vector<double> want = ByMatrix(x, block);
      for (size_t i = 0; i < n; ++i) EXPECT_NEAR(y[i], want[i], 3e-6) << i;
      ForceIsa(Isa::kScalar);
      Hadamard(scalar.data(), n, block);
      ForceIsa(GetParam());
      EXPECT_TRUE(n == 0 || std::memcmp(y, scalar.data(), n * sizeof(float)) == 0);
    }
  }
}

TEST_P(HadamardTest, KeepsInnerProductsAndIsItsOwnInverse) {
  for (size_t dim : {2, 32, 64, 80, 96, 128, 256}) {
    SCOPED_TRACE(dim);
    const std::vector<float> a = Random(dim, 5), b = Random(dim, 6);
    std::vector<float> ha = a, hb = b;
    Hadamard(ha.data(), dim, HadamardBlock(dim));
    Hadamard(hb.data(), dim, HadamardBlock(dim));
    double before = 0, after = 0;
    for (size_t i = 0; i < dim; ++i) {
      before += double(a[i]) * b[i];
      after += double(ha[i]) * hb[i];
    }
    EXPECT_NEAR(after, before, 1e-5);
    Hadamard(ha.data(), dim, HadamardBlock(dim));
    for (size_t i = 0; i < dim; ++i) EXPECT_NEAR(ha[i], a[i], 2e-6) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, HadamardTest, testing::ValuesIn(AvailableIsas()),
                         [](const auto& test) { return std::string(IsaName(test.param)); });

}  // namespace
}  // namespace lesskv
