#include "kernels/basic/basic.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/rng.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kLengths[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257, 1000};

class BasicTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ForceIsa(GetParam()); }
  void TearDown() override { ForceIsa(BestIsa()); }
};

// n random values, one float past an aligned address and with poison before and after.
struct Guarded {
  explicit Guarded(size_t n, Rng& rng, float scale = 1.0f) : storage(n + 2, 12345.0f), size(n) {
    for (size_t i = 0; i < n; ++i) data()[i] = rng.Normal() * scale;
  }
  float* data() { return storage.data() + 1; }
  float operator[](size_t i) const { return storage[i + 1]; }
  bool Intact() const { return storage.front() == 12345.0f && storage.back() == 12345.0f; }
  std::vector<float> storage;
  size_t size;
};

TEST_P(BasicTest, SumsAndProducts) {
  Rng rng(1);
  for (size_t n : kLengths) {
    Guarded a(n, rng), b(n, rng);
    double dot = 0, sum = 0, size = 0;
    float max = -kInfinity;
    for (size_t i = 0; i < n; ++i) {
      dot += static_cast<double>(a[i]) * b[i];
      size += std::fabs(static_cast<double>(a[i]) * b[i]);
      sum += a[i];
      max = std::max(max, a[i]);
    }
    EXPECT_NEAR(Dot(a.data(), b.data(), n), dot, 1e-6 * size) << n;
    EXPECT_NEAR(Sum(a.data(), n), sum, 1e-6 * static_cast<double>(n)) << n;
    EXPECT_EQ(Max(a.data(), n), max) << n;
  }
}

// Every size of tile and rest, strides of rows and columns, and the same bits whatever else is computed beside a sum.
TEST_P(BasicTest, SmallProducts) {
  Rng rng(3);
  for (const size_t m : {1, 3, 4, 9})
    for (const size_t n : {1, 5, 16, 20, 64, 131})
      for (const size_t k : {1, 7, 64}) {
        const Guarded a(m * k, rng), b(k * (n + 3), rng);
        Guarded c(m * (n + 1), rng), other(m * (n + 1), rng), one(1, rng);
        const float* at = a.storage.data() + 1;
        const float* bt = b.storage.data() + 1;
        const Guarded before = c;
        SmallProduct(m, n, k, at, k, 1, bt, n + 3, c.data(), n + 1);
        std::vector<float> transposed(m * k);
        for (size_t i = 0; i < m; ++i)
          for (size_t l = 0; l < k; ++l) transposed[l * m + i] = a[i * k + l];
        SmallProduct(m, n, k, transposed.data(), 1, m, bt, n + 3, other.data(), n + 1);
        for (size_t i = 0; i < m; ++i) {
          for (size_t j = 0; j < n; ++j) {
            double sum = 0, size = 0;
            for (size_t l = 0; l < k; ++l) {
              sum += static_cast<double>(a[i * k + l]) * b[l * (n + 3) + j];
              size += std::fabs(static_cast<double>(a[i * k + l]) * b[l * (n + 3) + j]);
            }
            ASSERT_NEAR(c[i * (n + 1) + j], sum, 1e-6 * size) << m << " " << n << " " << k;
            ASSERT_EQ(c[i * (n + 1) + j], other[i * (n + 1) + j]);
            SmallProduct(1, 1, k, at + i * k, k, 1, bt + j, n + 3, one.data(), 1);
            ASSERT_EQ(one[0], c[i * (n + 1) + j]);
          }
          ASSERT_EQ(c[i * (n + 1) + n], before[i * (n + 1) + n]);  // the gap between rows
        }
        EXPECT_TRUE(c.Intact());
      }
}

TEST_P(BasicTest, ElementwiseOperations) {
  Rng rng(2);
  for (size_t n : kLengths) {
    const Guarded a(n, rng), b(n, rng);
    Guarded add = a, scale = a, axpy = a;
    const float* y = b.storage.data() + 1;
    Add(add.data(), y, n);
    Scale(scale.data(), 0.37f, n);
    Axpy(axpy.data(), -1.5f, y, n);
    for (size_t i = 0; i < n; ++i) {
      EXPECT_EQ(add[i], a[i] + b[i]);
      EXPECT_EQ(scale[i], a[i] * 0.37f);
      EXPECT_NEAR(axpy[i], a[i] - 1.5f * b[i], 1e-6f);
    }
    EXPECT_TRUE(add.Intact() && scale.Intact() && axpy.Intact()) << n;
  }
}

TEST_P(BasicTest, RmsNorm) {
  const float x[3] = {1, 2, 2}, weight[3] = {1, 10, -1};
  float out[3];
  RmsNorm(x, weight, 0.0f, 3, out);  // mean square 3
  EXPECT_FLOAT_EQ(out[0], 1 / std::sqrt(3.0f));
  EXPECT_FLOAT_EQ(out[1], 20 / std::sqrt(3.0f));
  EXPECT_FLOAT_EQ(out[2], -2 / std::sqrt(3.0f));
  const float zero[3] = {};
  RmsNorm(zero, weight, 1e-5f, 3, out);
  EXPECT_EQ(out[1], 0.0f);
  Rng rng(3);
  for (size_t n : kLengths) {
    Guarded a(n, rng, 3), w(n, rng);
    double square = 0;
    for (size_t i = 0; i < n; ++i) square += static_cast<double>(a[i]) * a[i];
    const Guarded before = a;
    RmsNorm(a.data(), w.data(), 1e-5f, n, a.data());  // in place
    for (size_t i = 0; i < n; ++i) {
      const double expected = before[i] / std::sqrt(square / static_cast<double>(n) + 1e-5) * w[i];
      EXPECT_NEAR(a[i], expected, 2e-6 * std::fabs(expected) + 1e-9) << n;
    }
    EXPECT_TRUE(a.Intact());
  }
}

TEST_P(BasicTest, ExpIsAccurateAndTotal) {
  std::vector<float> x;
  for (float v = -87.0f; v < 88.7f; v += 0.0137f) x.push_back(v);
  std::vector<float> y = x;
  Exp(y.data(), y.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp(static_cast<double>(x[i]));
    EXPECT_NEAR(y[i] / expected, 1.0, 1e-6) << x[i];
  }
  std::vector<float> special = {0.0f, -kInfinity, kInfinity, NAN, -1e30f, 1e30f, -0.0f, -200.0f, 89.0f};
  Exp(special.data(), special.size());
  EXPECT_EQ(special[0], 1.0f);
  EXPECT_EQ(special[1], 0.0f);
  EXPECT_EQ(special[2], kInfinity);
  EXPECT_TRUE(std::isnan(special[3]));
  EXPECT_EQ(special[4], 0.0f);
  EXPECT_EQ(special[5], kInfinity);
  EXPECT_EQ(special[6], 1.0f);
  EXPECT_EQ(special[7], 0.0f);
  EXPECT_EQ(special[8], kInfinity);
}

TEST_P(BasicTest, LogSumExpIsThatOfDoubles) {
  Rng rng(4);
  for (size_t n : kLengths) {
    if (n == 0) continue;
    for (float scale : {1.0f, 30.0f, 1000.0f}) {
      Guarded x(n, rng, scale);
      double max = -1e30, sum = 0;
      for (size_t i = 0; i < n; ++i) max = std::max<double>(max, x[i]);
      for (size_t i = 0; i < n; ++i) sum += std::exp(x[i] - max);
      EXPECT_NEAR(LogSumExp(x.data(), n), max + std::log(sum), 1e-6 * (std::fabs(max) + 1));
    }
  }
}

TEST_P(BasicTest, LogSumExpOfMaskedAndEmptyRows) {
  std::vector<float> x(20, -kInfinity);
  x[18] = 5.0f;
  EXPECT_FLOAT_EQ(LogSumExp(x.data(), x.size()), 5.0f);
  const std::vector<float> none(20, -kInfinity);
  EXPECT_EQ(LogSumExp(none.data(), none.size()), -kInfinity);
  EXPECT_EQ(LogSumExp(none.data(), 0), -kInfinity);
}

TEST_P(BasicTest, SiluMul) {
  Rng rng(5);
  for (size_t n : kLengths) {
    Guarded gate(n, rng, 5), up(n, rng);
    const Guarded before = gate;
    SiluMul(gate.data(), up.data(), n);
    for (size_t i = 0; i < n; ++i) {
      const double expected = before[i] / (1 + std::exp(-static_cast<double>(before[i]))) * up[i];
      EXPECT_NEAR(gate[i], expected, 2e-6 * std::fabs(expected) + 1e-30);
    }
    EXPECT_TRUE(gate.Intact());
  }
  float extreme[3] = {-1000.0f, 1000.0f, 0.0f};
  const float ones[3] = {1, 1, 1};
  SiluMul(extreme, ones, 3);
  EXPECT_NEAR(extreme[0], 0.0f, 1e-30f);
  EXPECT_EQ(extreme[1], 1000.0f);
  EXPECT_EQ(extreme[2], 0.0f);
}

TEST_P(BasicTest, LayerNorm) {
  const float x[4] = {1, 3, 1, 3}, weight[4] = {1, 2, 1, 1}, bias[4] = {0, 5, 0, -1};
  float out[4];
  LayerNorm(x, weight, bias, 0.0f, 4, out);  // mean 2, variance 1
  EXPECT_EQ(std::vector<float>(out, out + 4), std::vector<float>({-1, 7, -1, 0}));
  Rng rng(6);
  for (size_t n : kLengths) {
    Guarded a(n, rng, 3), w(n, rng), b(n, rng);
    for (size_t i = 0; i < n; ++i) a.data()[i] += 2;
    double mean = 0, variance = 0;
    for (size_t i = 0; i < n; ++i) mean += double{a[i]} / static_cast<double>(n);
    for (size_t i = 0; i < n; ++i) variance += (a[i] - mean) * (a[i] - mean) / static_cast<double>(n);
    const Guarded before = a;
    LayerNorm(a.data(), w.data(), b.data(), 1e-5f, n, a.data());  // in place
    for (size_t i = 0; i < n; ++i)
      EXPECT_NEAR(a[i], (before[i] - mean) / std::sqrt(variance + 1e-5) * w[i] + b[i], 2e-5) << n;
    EXPECT_TRUE(a.Intact());
  }
}

TEST_P(BasicTest, Gelu) {
  Rng rng(7);
  for (size_t n : kLengths) {
    Guarded gate(n, rng, 3), up(n, rng);
    const Guarded before = gate;
    Guarded exact = gate;
    GeluTanhMul(gate.data(), up.data(), n);
    Gelu(exact.data(), n);
    for (size_t i = 0; i < n; ++i) {
      const double x = before[i], u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
      EXPECT_NEAR(gate[i], 0.5 * x * (1 + std::tanh(u)) * up[i], 2e-6 * std::fabs(x * up[i]) + 1e-30);
      EXPECT_NEAR(exact[i], 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))), 1e-6 * std::fabs(x) + 1e-30);
    }
    EXPECT_TRUE(gate.Intact() && exact.Intact());
  }
  float extreme[3] = {-1000.0f, 1000.0f, 0.0f};
  const float ones[3] = {1, 1, 1};
  GeluTanhMul(extreme, ones, 3);
  EXPECT_NEAR(extreme[0], 0.0f, 1e-30f);
  EXPECT_EQ(extreme[1], 1000.0f);
  EXPECT_EQ(extreme[2], 0.0f);
}

TEST_P(BasicTest, ArgMaxTakesTheFirstOfEqualsAndSkipsNaN) {
  for (size_t n : {1, 5, 16, 40, 130}) {
    std::vector<float> x(n, -3.0f);
    EXPECT_EQ(ArgMax(x.data(), n), 0u);
    x[n - 1] = 2.0f;
    EXPECT_EQ(ArgMax(x.data(), n), n - 1);
    x[n / 2] = 2.0f;
    EXPECT_EQ(ArgMax(x.data(), n), n / 2);
  }
  std::vector<float> x(40, NAN);
  EXPECT_EQ(ArgMax(x.data(), 40), 0u);
  x[33] = -kInfinity;
  EXPECT_EQ(ArgMax(x.data(), 40), 33u);
  x[7] = 1.0f;
  EXPECT_EQ(ArgMax(x.data(), 40), 7u);
}

TEST_P(BasicTest, LowestRowInARangeOfPositions) {
  const float nan = std::nanf("");
  const auto lowest = [](std::vector<float> values, std::vector<int32_t> positions, int32_t begin, int32_t end) {
    return LowestRow(values.data(), positions.data(), values.size(), begin, end);
  };
  EXPECT_EQ(lowest({}, {}, 0, 9), 0u);
  EXPECT_EQ(lowest({5}, {3}, 0, 3), 1u);
  EXPECT_EQ(lowest({5}, {3}, 3, 4), 0u);
  EXPECT_EQ(lowest({2, 1, 1, 1, 0}, {4, 7, 9, 8, 10}, 0, 10), 2u);  // of equals the highest position
  EXPECT_EQ(lowest({2, nan, 1}, {0, 1, 2}, 0, 3), 1u);
  EXPECT_EQ(lowest({nan, nan, -1}, {1, 0, 2}, 0, 3), 0u);
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(lowest({inf, 0, inf}, {0, 7, 1}, 0, 5), 2u);  // infinite values are values
  Rng rng(5);
  for (size_t n : {15, 16, 17, 100, 1000}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<float> values(n);
      std::vector<int32_t> positions(n);
      for (size_t i = 0; i < n; ++i) {
        values[i] = static_cast<float>(rng.Below(round < 10 ? 5 : 1000));
        positions[i] = static_cast<int32_t>(i * 7919 % n);
        if (n == 100 || n == 1000) positions[i] = static_cast<int32_t>(i * 7 % n);
      }
      const int32_t begin = static_cast<int32_t>(rng.Below(n)), end = static_cast<int32_t>(rng.Below(n + 1));
      size_t expected = n;
      for (size_t i = 0; i < n; ++i) {
        if (positions[i] < begin || positions[i] >= end) continue;
        if (expected == n || values[i] < values[expected] ||
            (values[i] == values[expected] && positions[i] > positions[expected]))
          expected = i;
      }
      EXPECT_EQ(lowest(values, positions, begin, end), expected) << n;
    }
  }
}

TEST_P(BasicTest, HalfRoundsToNearestEvenAndBack) {
  const std::vector<std::pair<float, uint16_t>> cases = {
      {1.0f, 0x3c00},        {-2.0f, 0xc000},       {65504.0f, 0x7bff},  {65519.9f, 0x7bff},
      {65520.0f, 0x7c00},    {1e30f, 0x7c00},       {-1e30f, 0xfc00},    {0x1p-14f, 0x0400},
      {0x1p-24f, 0x0001},    {0x1p-25f, 0},         {0x1.8p-24f, 2},     {-0.0f, 0x8000},
      {1.00048828f, 0x3c00}, {1.00146484f, 0x3c02}, {kInfinity, 0x7c00}, {0.0f, 0}};
  std::vector<float> x;
  for (const auto& [value, bits] : cases) x.push_back(value);
  std::vector<uint16_t> half(x.size());
  F32ToF16(x.data(), x.size(), half.data());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(half[i], cases[i].second) << x[i];
  // Every half value survives the way to float and back.
  std::vector<uint16_t> all(1 << 16), again(1 << 16);
  std::vector<float> values(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  F16ToF32(all.data(), all.size(), values.data());
  F32ToF16(values.data(), values.size(), again.data());
  for (size_t i = 0; i < all.size(); ++i) {
    if ((i & 0x7c00) == 0x7c00 && (i & 0x3ff) != 0) {
      EXPECT_TRUE(std::isnan(values[i])) << i;
      EXPECT_TRUE((again[i] & 0x7c00) == 0x7c00 && (again[i] & 0x3ff) != 0) << i;
    } else {
      EXPECT_EQ(again[i], all[i]);
    }
  }
  EXPECT_EQ(values[0x3555], 0x1.554p-2f);
}

TEST_P(BasicTest, ConversionsWriteExactlyTheirElements) {
  Rng rng(6);
  for (size_t n : kLengths) {
    Guarded x(n, rng);
    std::vector<uint16_t> half(n + 2, 777);
    F32ToF16(x.data(), n, half.data() + 1);
    EXPECT_TRUE(half[0] == 777 && half[n + 1] == 777) << n;
    Guarded a(n, rng);
    F16ToF32(half.data() + 1, n, a.data());
    EXPECT_TRUE(a.Intact());
    for (size_t i = 0; i < n; ++i) EXPECT_NEAR(a[i], x[i], std::fabs(x[i]) * 0x1p-11f + 0x1p-25f);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, BasicTest, testing::ValuesIn(AvailableIsas()),
                         [](const auto& test) { return std::string(IsaName(test.param)); });

}  // namespace
}  // namespace lesskv
