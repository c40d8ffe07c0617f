#include "kernels/linear/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/cpu.h"
#include "kernels/basic/guarded_bytes.h"
#include "kernels/quants/half.h"
#include "kernels/quants/quants.h"
#include "kernels/quants/random_row.h"

namespace lesskv {
namespace {

constexpr DType kTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16,   DType::kQ8_0,  DType::kQ4_0, DType::kQ4_1,
                            DType::kQ5_0, DType::kQ5_1, DType::kIQ4_NL, DType::kMXFP4, DType::kQ2_K, DType::kQ3_K,
                            DType::kQ4_K, DType::kQ5_K, DType::kQ6_K,   DType::kIQ4_XS};
constexpr size_t kTokenCounts[] = {1, 2, 3, 4, 5, 8, 9, 17, 33, 70};

// A matrix of random weights of a type, with the values its bytes stand for. The data starts 2 bytes past an aligned
// address: the kernels must not assume more.
struct Matrix {
  std::vector<char> bytes;
  std::vector<float> values;
  WeightView view;
};

Matrix MakeMatrix(DType type, size_t n_out, size_t n_in, Rng& rng) {
  Matrix m;
  const size_t row_bytes = RowBytes(type, n_in);
  m.bytes.resize(2 + n_out * row_bytes);
  m.values.resize(n_out * n_in);
  for (size_t o = 0; o < n_out; ++o) {
    RandomRow(type, n_in, rng, m.bytes.data() + 2 + o * row_bytes);
    DequantizeRow(type, m.bytes.data() + 2 + o * row_bytes, n_in, m.values.data() + o * n_in);
  }
  m.view = {type, n_out, n_in, m.bytes.data() + 2};
  return m;
}

std::vector<float> RandomVector(size_t n, Rng& rng) {
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

std::vector<float> Product(const Matrix& m, const std::vector<float>& x, size_t n_tokens) {
  std::vector<float> y(n_tokens * m.view.n_out);
  for (size_t t = 0; t < n_tokens; ++t) {
    for (size_t o = 0; o < m.view.n_out; ++o) {
      double sum = 0;
      for (size_t i = 0; i < m.view.n_in; ++i) {
        sum += static_cast<double>(x[t * m.view.n_in + i]) * m.values[o * m.view.n_in + i];
      }
      y[t * m.view.n_out + o] = static_cast<float>(sum);
    }
  }
  return y;
}

// memcmp takes no null pointers, not even for nothing.
bool SameBits(const float* a, const float* b, size_t n) { return n == 0 || std::memcmp(a, b, n * sizeof(float)) == 0; }

double NormalizedError(const std::vector<float>& expected, const std::vector<float>& found) {
  double error = 0, power = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(static_cast<double>(expected[i]) - found[i], 2);
    power += std::pow(static_cast<double>(expected[i]), 2);
  }
  return error / power;
}

std::vector<float> RunLinear(const WeightView& w, const std::vector<float>& x, size_t n_tokens, ComputeType compute) {
  std::vector<float> y(n_tokens * w.n_out, NAN);
  Linear(w, x.data(), w.n_in, n_tokens, y.data(), w.n_out, compute);
  return y;
}

class LinearTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ForceIsa(GetParam()); }
  void TearDown() override { ForceIsa(BestIsa()); }
};

// Sizes that leave a remainder in every loop, where the type's block allows.
std::vector<size_t> RowLengths(DType type) {
  const size_t block = Traits(type).block_elements;
  if (block == 256) return {256, 768};
  if (block == 32) return {32, 96, 160, 544};
  return {1, 7, 31, 33, 64, 131, 513};
}

TEST_P(LinearTest, Float32MatchesTheExactProduct) {
  Rng rng(1);
  for (DType type : kTypes) {
    for (size_t n_in : RowLengths(type)) {
      for (size_t n_out : {size_t{1}, size_t{37}}) {
        const Matrix m = MakeMatrix(type, n_out, n_in, rng);
        for (size_t n_tokens : kTokenCounts) {
          const std::vector<float> x = RandomVector(n_tokens * n_in, rng);
          const std::vector<float> y = RunLinear(m.view, x, n_tokens, ComputeType::kF32);
          EXPECT_LT(NormalizedError(Product(m, x, n_tokens), y), 1e-10)
              << Traits(type).name << " n_in " << n_in << " n_out " << n_out << " tokens " << n_tokens;
        }
      }
    }
  }
}

// What the int8 path does to activations.
enum class Rounding {
  kBlocks,  // blocks of 32 to 127 steps of the largest
  kSpikes,  // the same, but for a 128th of a row's elements, the largest, which stay as they are
  kUnits,   // as blocks, whose largest is a multiple of a 40th of that of 256
};

std::vector<float> RoundToInt8(const std::vector<float>& x, size_t n_in, Rounding rounding) {
  std::vector<float> out = x;
  for (size_t row = 0; row < x.size(); row += n_in) {
    std::vector<size_t> order(n_in);
    for (size_t i = 0; i < n_in; ++i) order[i] = row + i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return std::fabs(x[a]) > std::fabs(x[b]); });
    order.resize(rounding == Rounding::kSpikes ? (n_in + 127) / 128 : 0);
    for (const size_t at : order) out[at] = 0;
    for (size_t b = row; b < row + n_in; b += 32) {
      float largest = 0;
      for (size_t i = b; i < b + 32; ++i) largest = std::max(largest, std::fabs(out[i]));
      if (rounding == Rounding::kUnits) {
        float most = 0;
        for (size_t i = 0; i < 256; ++i) most = std::max(most, std::fabs(x[row + (b - row) / 256 * 256 + i]));
        largest =
            most > 0 ? most / (127.0f * 40) * 127.0f * std::clamp(std::ceil(largest * (40 / most)), 1.0f, 40.0f) : 0;
      }
      const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
      for (size_t i = b; i < b + 32; ++i)
        out[i] = static_cast<float>(std::nearbyint(out[i] * inverse) * (largest / 127.0f));
    }
    for (const size_t at : order) out[at] = x[at];
  }
  return out;
}

// How the kernels of few tokens round, and those of more.
Rounding RoundingOf(Isa isa, DType type, bool few) {
  if (few && isa >= Isa::kAvx512) return Rounding::kBlocks;
  const bool has_units = isa == Isa::kAvx2 || isa == Isa::kAvxVnni;
  return few && has_units && Traits(type).block_elements == 256 ? Rounding::kUnits : Rounding::kSpikes;
}

// Activations as a trained model has them: one or two channels of each token far larger than the others.
std::vector<float> ActivationsWithOutliers(size_t n_tokens, size_t n_in, Rng& rng) {
  std::vector<float> x = RandomVector(n_tokens * n_in, rng);
  for (size_t t = 0; t < n_tokens; ++t) {
    x[t * n_in + (37 * t + 5) % n_in] = 60.0f;
    if (n_in > 128) x[t * n_in + (37 * t + 7) % n_in] = -20.0f;
  }
  return x;
}

TEST_P(LinearTest, FewTokensWithInt8ActivationsAreExactUpToSummation) {
  Rng rng(2);
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    for (size_t n_in : RowLengths(type)) {
      const Matrix m = MakeMatrix(type, 19, n_in, rng);
      for (size_t n_tokens = 1; n_tokens <= FewTokens(type, n_in, ComputeType::kBF16); ++n_tokens) {
        const std::vector<float> x = RandomVector(n_tokens * n_in, rng);
        const std::vector<float> y = RunLinear(m.view, x, n_tokens, ComputeType::kBF16);
        EXPECT_LT(NormalizedError(Product(m, RoundToInt8(x, n_in, RoundingOf(GetParam(), type, true)), n_tokens), y),
                  1e-11)
            << Traits(type).name << " n_in " << n_in << " tokens " << n_tokens;
        // Rounding to 127 steps of the largest of 32 normals: a relative error near 1/127 * 2.2 / sqrt(12).
        EXPECT_LT(NormalizedError(Product(m, x, n_tokens), y), 1e-4) << Traits(type).name;
      }
    }
  }
}

// Few and many tokens: whatever their number, only activations are rounded.
TEST_P(LinearTest, Int8RoundsActivationsOnly) {
  Rng rng(8);
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    for (size_t n_in : RowLengths(type)) {
      for (size_t n_out : {size_t{5}, size_t{37}}) {
        const Matrix m = MakeMatrix(type, n_out, n_in, rng);
        for (size_t n_tokens : {1, 2, 3, 4, 5, 6, 7, 8, 13, 17, 66, 71}) {
          const std::vector<float> x = ActivationsWithOutliers(n_tokens, n_in, rng);
          const std::vector<float> y = RunLinear(m.view, x, n_tokens, ComputeType::kInt8);
          const bool few = n_tokens <= FewTokens(type, n_in, ComputeType::kInt8);
          EXPECT_LT(NormalizedError(Product(m, RoundToInt8(x, n_in, RoundingOf(GetParam(), type, few)), n_tokens), y),
                    1e-11)
              << Traits(type).name << " n_in " << n_in << " n_out " << n_out << " tokens " << n_tokens;
        }
      }
    }
  }
}

// Activations are rounded to 127 steps of the largest of 32 normals, whose square is 6 on average: a squared error of
// 6 / 127^2 / 12 = 3.1e-5, whatever the type of the weights. Outliers would make the steps of their block 24 times as
// large; because they are taken out, they do not show.
TEST_P(LinearTest, Int8ErrorBesideFloat32) {
  Rng rng(10);
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    const Matrix m = MakeMatrix(type, 64, 512, rng);
    const auto error = [&](const std::vector<float>& x) {
      const std::vector<float> exact = RunLinear(m.view, x, 64, ComputeType::kF32);
      const std::vector<float> y = RunLinear(m.view, x, 64, ComputeType::kInt8);
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += std::pow(static_cast<double>(exact[i]) - y[i], 2);
      return sum;
    };
    const std::vector<float> x = RandomVector(64 * 512, rng);
    const std::vector<float> y = RunLinear(m.view, x, 64, ComputeType::kF32);
    double power = 0;
    for (const float v : y) power += static_cast<double>(v) * v;
    EXPECT_LT(error(x) / power, 4.5e-5) << Traits(type).name;
    EXPECT_GT(error(x) / power, 1e-5) << Traits(type).name << ": nothing was rounded";
    EXPECT_LT(error(ActivationsWithOutliers(64, 512, rng)) / power, 4.5e-5) << Traits(type).name;
  }
}

// The largest codes times the largest activations: sums of 16 bits must hold them. Byte 0x80 is the code -128 of Q8_0.
TEST_P(LinearTest, Int8HoldsTheLargestCodes) {
  Rng rng(9);
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    const size_t block_bytes = Traits(type).block_bytes, n_in = 512;
    for (const uint8_t code : {0x00, 0x7f, 0x80, 0xff}) {
      Matrix m = MakeMatrix(type, 19, n_in, rng);
      const size_t skip = type == DType::kMXFP4 ? 1 : 4;  // scales lie within the first or the last bytes
      for (size_t at = 2; at < m.bytes.size(); at += block_bytes) {
        const size_t end = at + block_bytes - (block_bytes > 64 ? 4 : 0);
        std::fill(m.bytes.begin() + static_cast<std::ptrdiff_t>(at + skip),
                  m.bytes.begin() + static_cast<std::ptrdiff_t>(end), static_cast<char>(code));
        if (type == DType::kQ6_K) std::fill_n(&m.bytes[at + 192], 16, static_cast<char>(0x80));  // scales of -128
      }
      for (size_t o = 0; o < 19; ++o)
        DequantizeRow(type, m.bytes.data() + 2 + o * RowBytes(type, n_in), n_in, m.values.data() + o * n_in);
      double most = 0;  // what a sum can be
      for (size_t i = 0; i < m.values.size(); ++i) most += std::fabs(m.values[i]);
      for (size_t n_tokens : {1, 3, 5, 20}) {
        std::vector<float> x(n_tokens * n_in, 1.0f);
        for (size_t i = 0; i < x.size(); ++i) {
          const size_t kind = i / n_in % 3;  // all one sign; or a lane's four another one than those around it
          if (kind == 1 || (kind == 2 && i % 16 >= 4)) x[i] = -1;
        }
        const std::vector<float> y = RunLinear(m.view, x, n_tokens, ComputeType::kInt8);
        const std::vector<float> expected = Product(m, x, n_tokens);
        for (size_t i = 0; i < y.size(); ++i) {
          ASSERT_NEAR(y[i], expected[i], 1e-6 * most) << Traits(type).name << " code " << static_cast<int>(code);
        }
      }
    }
  }
}

std::vector<float> RoundToBf16(std::vector<float> x) {
  for (float& value : x) value = Bf16ToFloat(FloatToBf16(value));
  return x;
}

TEST_P(LinearTest, ManyTokensInBf16AreExactUpToSummation) {
  Rng rng(3);
  const bool rounds = GetParam() == Isa::kScalar || GetParam() >= Isa::kAvx512Bf16;
  for (DType type : kTypes) {
    for (size_t n_in : RowLengths(type)) {
      const Matrix m = MakeMatrix(type, 29, n_in, rng);
      Matrix rounded = m;
      if (rounds) rounded.values = RoundToBf16(m.values);
      const size_t least = FewTokens(type, n_in, ComputeType::kBF16) + 1;
      for (size_t n_tokens : {least, size_t{16}, size_t{17}, size_t{33}, size_t{49}, size_t{70}}) {
        const std::vector<float> x = RandomVector(n_tokens * n_in, rng);
        const std::vector<float> y = RunLinear(m.view, x, n_tokens, ComputeType::kBF16);
        EXPECT_LT(NormalizedError(Product(rounded, rounds ? RoundToBf16(x) : x, n_tokens), y), 1e-10)
            << Traits(type).name << " n_in " << n_in << " tokens " << n_tokens;
        EXPECT_LT(NormalizedError(Product(m, x, n_tokens), y), 3e-5) << Traits(type).name;
      }
    }
  }
}

// A row longer than a tile is deep, and more rows than a task takes.
TEST_P(LinearTest, LargeShapes) {
  Rng rng(4);
  const Matrix m = MakeMatrix(DType::kQ8_0, 131, 4640, rng);
  for (size_t n_tokens : {1, 6, 20, 530}) {
    const std::vector<float> x = RandomVector(n_tokens * m.view.n_in, rng);
    const std::vector<float> exact = Product(m, x, n_tokens);
    EXPECT_LT(NormalizedError(exact, RunLinear(m.view, x, n_tokens, ComputeType::kF32)), 1e-10);
    EXPECT_LT(NormalizedError(exact, RunLinear(m.view, x, n_tokens, ComputeType::kBF16)), 1e-4);
    EXPECT_LT(NormalizedError(exact, RunLinear(m.view, x, n_tokens, ComputeType::kInt8)), 1e-4);
  }
}

// The longest row of a kernel that keeps a row's scales, and a longer one, which takes panels.
TEST_P(LinearTest, RowsTooLongForFewTokens) {
  Rng rng(12);
  for (DType type : {DType::kQ4_0, DType::kQ6_K}) {
    for (size_t n_in : {size_t{32768}, size_t{33024}}) {
      const Matrix m = MakeMatrix(type, 3, n_in, rng);
      const std::vector<float> x = ActivationsWithOutliers(1, n_in, rng);
      const Rounding rounding = RoundingOf(GetParam(), type, FewTokens(type, n_in, ComputeType::kInt8) > 0);
      EXPECT_LT(
          NormalizedError(Product(m, RoundToInt8(x, n_in, rounding), 1), RunLinear(m.view, x, 1, ComputeType::kInt8)),
          1e-10)
          << Traits(type).name << " n_in " << n_in;
      EXPECT_LT(NormalizedError(Product(m, x, 1), RunLinear(m.view, x, 1, ComputeType::kBF16)), 1e-4);
    }
  }
}

// Spikes at the edges of what a panel goes on with at once, side by side and equal, meet their weights once each.
TEST_P(LinearTest, SpikesAtEveryEdge) {
  Rng rng(11);
  const size_t n_in = 4608, n_tokens = 7;
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    const Matrix m = MakeMatrix(type, 37, n_in, rng);
    std::vector<float> x = RandomVector(n_tokens * n_in, rng);
    for (size_t t = 0; t < n_tokens; ++t) {
      for (size_t at : {0u, 1u, 31u, 32u, 1023u, 1024u, 1025u, 1026u, 2047u, 2048u, 3071u, 3072u, 4606u, 4607u})
        x[t * n_in + at] = (at + t) % 2 == 0 ? 40.0f : -40.0f;
    }
    for (const size_t n : {size_t{1}, size_t{4}, n_tokens}) {
      const std::vector<float> few(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(n * n_in));
      const Rounding rounding = RoundingOf(GetParam(), type, n <= FewTokens(type, n_in, ComputeType::kInt8));
      EXPECT_LT(NormalizedError(Product(m, RoundToInt8(few, n_in, rounding), n),
                                RunLinear(m.view, few, n, ComputeType::kInt8)),
                1e-11)
          << Traits(type).name << " tokens " << n;
    }
  }
}

// Rows with fewer values than spikes, whole blocks of spikes, and rows that are not numbers, beside one that is
// ordinary.
TEST_P(LinearTest, RowsOfFewValues) {
  Rng rng(12);
  const size_t n_in = 4352, n_tokens = 6;
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    const Matrix m = MakeMatrix(type, 19, n_in, rng);
    std::vector<float> x(n_tokens * n_in), before = RandomVector(n_tokens * n_in, rng);
    for (size_t t = 1; t <= n_tokens; ++t) before[t * n_in - 1] = 100;
    x[5] = 3, x[n_in - 1] = -2;                                                     // two values
    for (size_t i = 0; i < 32; ++i) x[n_in + 4320 + i] = i % 2 == 0 ? 1.0f : 2.0f;  // the last block alone
    for (size_t i = 0; i < 40; ++i) x[2 * n_in + i] = 5;                            // more than a block of equal ones
    for (size_t i = 0; i < n_in; ++i) x[3 * n_in + i] = rng.Normal();
    for (size_t i = 0; i < n_in; ++i) x[4 * n_in + i] = NAN;
    for (size_t i = 0; i < n_in; i += 7) x[5 * n_in + i] = i % 2 == 0 ? INFINITY : NAN;
    for (const bool few : {true, false}) {
      const size_t most = FewTokens(type, n_in, ComputeType::kInt8);
      const Rounding rounding = RoundingOf(GetParam(), type, few && most > 0);
      const std::vector<float> expected = Product(m, RoundToInt8({x.begin(), x.begin() + 4 * n_in}, n_in, rounding), 4);
      RunLinear(m.view, before, few ? 1 : n_tokens, ComputeType::kInt8);  // leaves its spikes in the work memory
      std::vector<float> y = few ? std::vector<float>() : RunLinear(m.view, x, n_tokens, ComputeType::kInt8);
      for (size_t t = 0; few && t < n_tokens; ++t) {
        const std::vector<float> one(&x[t * n_in], &x[t * n_in] + n_in);
        const std::vector<float> own = RunLinear(m.view, one, 1, ComputeType::kInt8);
        y.insert(y.end(), own.begin(), own.end());
      }
      if (!few && most >= n_tokens) continue;
      y.resize(expected.size());
      EXPECT_LT(NormalizedError(expected, y), 1e-11) << Traits(type).name << (few ? " alone" : " together");
    }
  }
}

// What the kernels read behind a row's end does not count, not even where it is no number.
TEST_P(LinearTest, RowsDoNotSeeTheirNeighbours) {
  Rng rng(14);
  for (DType type : kTypes) {
    if (Traits(type).block_elements == 1) continue;
    for (const size_t n_in : RowLengths(type)) {
      Matrix m = MakeMatrix(type, 5, n_in, rng);
      const std::vector<float> x = RandomVector(20 * n_in, rng);
      for (const size_t n_tokens : {1, 2, 3, 4, 20}) {
        const std::vector<float> before = RunLinear(m.view, x, n_tokens, ComputeType::kInt8);
        Matrix broken = m;
        broken.view.data = broken.bytes.data() + 2;
        std::memset(broken.bytes.data() + 2 + RowBytes(type, n_in), 0xff, 2 * RowBytes(type, n_in));
        const std::vector<float> after = RunLinear(broken.view, x, n_tokens, ComputeType::kInt8);
        for (size_t t = 0; t < n_tokens; ++t)
          for (const size_t o : {0, 3, 4})
            ASSERT_EQ(before[t * 5 + o], after[t * 5 + o]) << Traits(type).name << ' ' << n_in << ", row " << o;
      }
    }
  }
}

// Matrices of the same activations: to the bits of each alone, whatever their types and sizes.
TEST_P(LinearTest, MatricesTogetherHaveTheBitsOfEachAlone) {
  Rng rng(13);
  std::vector<Matrix> matrices;
  for (const auto& [type, n_out] : {std::pair{DType::kQ4_K, size_t{70}},
                                    {DType::kQ4_K, size_t{9}},
                                    {DType::kQ6_K, size_t{33}},
                                    {DType::kF16, size_t{1}},
                                    {DType::kF16, size_t{0}},
                                    {DType::kF16, size_t{130}}})
    matrices.push_back(MakeMatrix(type, n_out, 512, rng));
  const std::vector<float> x = RandomVector(530 * 512, rng);
  for (const ComputeType compute : {ComputeType::kF32, ComputeType::kBF16, ComputeType::kInt8}) {
    for (const size_t n_tokens : {1, 3, 13, 530}) {
      std::vector<std::vector<float>> found;
      std::vector<LinearTerm> terms;
      for (const Matrix& m : matrices) {
        found.emplace_back(n_tokens * (m.view.n_out + 2), -77.0f);
        terms.push_back({m.view, found.back().data(), m.view.n_out + 2});
      }
      Linear(terms, x.data(), 512, n_tokens, compute);
      for (size_t i = 0; i < matrices.size(); ++i) {
        const size_t n_out = matrices[i].view.n_out;
        const std::vector<float> alone = RunLinear(matrices[i].view, x, n_tokens, compute);
        for (size_t t = 0; t < n_tokens; ++t) {
          ASSERT_TRUE(SameBits(&found[i][t * (n_out + 2)], alone.data() + t * n_out, n_out))
              << ComputeTypeName(compute) << ", " << n_tokens << " tokens, matrix " << i;
          EXPECT_EQ(found[i][t * (n_out + 2) + n_out], -77.0f);
        }
      }
    }
  }
}

// Texts of few tokens and of many beside each other, also of none.
TEST_P(LinearTest, TextsTogetherHaveTheBitsOfEachAlone) {
  Rng rng(14);
  const Matrix matrices[] = {MakeMatrix(DType::kQ4_K, 40, 512, rng), MakeMatrix(DType::kF16, 9, 512, rng)};
  const size_t lengths[] = {1, 2, 1, 0, 30, 1, 12, 13, 3, 1, 1, 1, 4, 14, 20, 5};
  const size_t n_tokens = std::accumulate(std::begin(lengths), std::end(lengths), size_t{0});
  const std::vector<float> x = RandomVector(n_tokens * 512, rng);
  for (const ComputeType compute : {ComputeType::kF32, ComputeType::kBF16, ComputeType::kInt8}) {
    std::vector<float> found[2];
    std::vector<LinearTerm> terms;
    for (size_t i = 0; i < 2; ++i) {
      found[i].resize(n_tokens * matrices[i].view.n_out);
      terms.push_back({matrices[i].view, found[i].data(), matrices[i].view.n_out});
    }
    Linear(terms, x.data(), 512, lengths, compute);
    for (size_t i = 0; i < 2; ++i) {
      const size_t n_out = matrices[i].view.n_out;
      size_t first = 0;
      for (const size_t length : lengths) {
        std::vector<float> alone(length * n_out);
        Linear(matrices[i].view, &x[first * 512], 512, length, alone.data(), n_out, compute);
        ASSERT_TRUE(SameBits(&found[i][first * n_out], alone.data(), length * n_out))
            << ComputeTypeName(compute) << ", matrix " << i << ", " << length << " tokens from " << first;
        first += length;
      }
    }
  }
}

// An output depends on its own row and token only: not on the other tokens of the call, nor on the threads.
TEST_P(LinearTest, SameBitsWhateverTheCompanyAndTheThreads) {
  Rng rng(5);
  for (DType type : kTypes) {
    const size_t n_in = RowLengths(type).back();
    const Matrix m = MakeMatrix(type, 101, n_in, rng);
    const std::vector<float> x = RandomVector(70 * n_in, rng);
    for (ComputeType compute : {ComputeType::kF32, ComputeType::kBF16, ComputeType::kInt8}) {
      const ThreadPool one(1), two(2);
      const ThreadScope alone(one);
      const size_t most_few = FewTokens(type, n_in, compute);
      const std::vector<float> few = RunLinear(m.view, x, most_few, compute);
      const std::vector<float> many = RunLinear(m.view, x, 70, compute);
      const ThreadScope together(two);
      for (size_t n : {size_t{1}, std::min(size_t{2}, most_few), std::min(size_t{3}, most_few), most_few}) {
        const std::vector<float> y = RunLinear(m.view, x, n, compute);
        EXPECT_TRUE(SameBits(y.data(), few.data(), y.size())) << Traits(type).name << ' ' << n;
      }
      for (size_t n : {most_few + 1, size_t{16}, size_t{31}, size_t{40}, size_t{64}, size_t{70}}) {
        const std::vector<float> y = RunLinear(m.view, x, n, compute);
        EXPECT_TRUE(SameBits(y.data(), many.data(), y.size())) << Traits(type).name << ' ' << n;
      }
    }
  }
}

TEST_P(LinearTest, StridesAreRespectedAndNothingElseIsWritten) {
  Rng rng(6);
  const Matrix m = MakeMatrix(DType::kQ4_K, 5, 256, rng);
  for (size_t n_tokens : {3, 20}) {
    const std::vector<float> x = RandomVector(n_tokens * 300, rng);
    std::vector<float> dense, y(n_tokens * 9, -77.0f);
    for (size_t t = 0; t < n_tokens; ++t) dense.insert(dense.end(), &x[t * 300], &x[t * 300 + 256]);
    for (const ComputeType compute : {ComputeType::kF32, ComputeType::kInt8}) {
      Linear(m.view, x.data(), 300, n_tokens, y.data(), 9, compute);
      const std::vector<float> expected = RunLinear(m.view, dense, n_tokens, compute);
      for (size_t t = 0; t < n_tokens; ++t) {
        for (size_t o = 0; o < 9; ++o) EXPECT_EQ(y[t * 9 + o], o < 5 ? expected[t * 5 + o] : -77.0f);
      }
    }
  }
}

// Whatever remains of rows, tokens and elements: nothing is read behind the matrix or the tokens, and of the results
// only the matrix's own columns are written.
TEST_P(LinearTest, NothingBesideTheOperandsIsTouched) {
  constexpr float kUntouched = -77;
  constexpr size_t kMore = 3;  // columns that are not the matrix's
  const ThreadPool one(1);
  const ThreadScope scope(one);
  Rng rng(13);
  for (DType type : kTypes) {
    for (const size_t n_in : {RowLengths(type).front(), RowLengths(type).back()}) {
      for (const size_t n_out : {1, 2, 3, 5, 6, 7, 33, 130}) {
        const Matrix m = MakeMatrix(type, n_out, n_in, rng);
        const size_t bytes = m.bytes.size() - 2;
        const GuardedBytes weights(bytes);
        std::memcpy(weights.data(), m.view.data, bytes);
        const WeightView view{type, n_out, n_in, weights.data()};
        for (const size_t n_tokens : {1, 2, 3, 4, 5, 8, 9, 17, 33}) {
          const std::vector<float> x = RandomVector(n_tokens * n_in, rng);
          const size_t stride = n_out + kMore, n_results = (n_tokens - 1) * stride + n_out;
          const GuardedBytes tokens(x.size() * sizeof(float)), results(n_results * sizeof(float));
          std::copy(x.begin(), x.end(), tokens.As<float>());
          float* const y = results.As<float>();
          for (const ComputeType compute : {ComputeType::kF32, ComputeType::kBF16, ComputeType::kInt8}) {
            SCOPED_TRACE(testing::Message() << Traits(type).name << ", " << n_out << " rows of " << n_in << ", "
                                            << n_tokens << " tokens, compute type " << static_cast<int>(compute));
            std::fill_n(y, n_results, kUntouched);
            Linear(view, tokens.As<float>(), n_in, n_tokens, y, stride, compute);
            const std::vector<float> expected = RunLinear(m.view, x, n_tokens, compute);
            for (size_t i = 0; i < n_results; ++i)
              ASSERT_EQ(y[i], i % stride < n_out ? expected[i / stride * n_out + i % stride] : kUntouched) << i;
          }
        }
      }
    }
  }
}

// Ones and twos: a result one can compute by hand, through every type that holds them exactly.
TEST_P(LinearTest, ByHand) {
  std::vector<float> w(2 * 256), x(256 * 10, 1.0f);
  for (size_t i = 0; i < 256; ++i) w[i] = 1.0f, w[256 + i] = i % 2 == 0 ? 2.0f : -2.0f;
  x[0] = 3.0f;
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    std::vector<char> bytes(2 * RowBytes(type, 256));
    for (size_t o = 0; o < 2; ++o) QuantizeRow(type, &w[o * 256], 256, bytes.data() + o * RowBytes(type, 256));
    for (size_t n_tokens : {1, 10}) {
      for (ComputeType compute : {ComputeType::kF32, ComputeType::kBF16}) {
        const std::vector<float> y = RunLinear({type, 2, 256, bytes.data()}, x, n_tokens, compute);
        EXPECT_EQ(y[0], 258.0f);  // 255 ones and a three
        EXPECT_EQ(y[1], 4.0f);    // 2 * 3 - 2 and pairs that cancel
        if (n_tokens > 1) {
          EXPECT_EQ(y[2], 256.0f);
          EXPECT_EQ(y[3], 0.0f);
        }
      }
    }
  }
}

TEST_P(LinearTest, ZeroActivationsGiveZero) {
  Rng rng(7);
  for (DType type : kTypes) {
    const Matrix m = MakeMatrix(type, 3, 256, rng);
    for (size_t n_tokens : {1, 9}) {
      for (const ComputeType compute : {ComputeType::kBF16, ComputeType::kInt8}) {
        for (float v : RunLinear(m.view, std::vector<float>(256 * n_tokens), n_tokens, compute)) {
          EXPECT_EQ(v, 0.0f) << Traits(type).name;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, LinearTest, testing::ValuesIn(AvailableIsas()),
                         [](const auto& test) { return std::string(IsaName(test.param)); });

TEST(Cpu, NamesRoundTripAndUnknownOnesAreRefused) {
  for (Isa isa : AvailableIsas()) EXPECT_EQ(ParseIsa(IsaName(isa)), isa);
  EXPECT_THROW(ParseIsa("mmx"), Error);
  EXPECT_THROW(ParseIsa(""), Error);
  ForceIsa(Isa::kScalar);
  EXPECT_EQ(IsaName(), "scalar");
  EXPECT_EQ(AutoCompute(), ComputeType::kF32);
  ForceIsa(BestIsa());
}

TEST(Cpu, LevelsOfOtherArchitecturesAreRefused) {
#if defined(__aarch64__)
  const Isa others[] = {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};
#else
  const Isa others[] = {Isa::kNeon, Isa::kDotprod};
#endif
  for (const Isa isa : others) EXPECT_THROW(ForceIsa(isa), Error) << IsaName(isa);
}

}  // namespace
}  // namespace lesskv
