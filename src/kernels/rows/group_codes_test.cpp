// Codes in groups: the bounds that rounding allows, known errors on Gaussian rows, layout, and every instruction set
// against arithmetic in double on what is stored.
#include "kernels/rows/group_codes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/rng.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

GroupFormat Format(RowSide side, size_t bits, size_t group, size_t dim) { return {side, bits, group, dim}; }

std::vector<float> Random(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

// n rows [n, dim] in units of their own, n rounded up to whole units; behind them poison, as no kernel may need it.
struct Stored {
  GroupFormat format;
  std::vector<uint32_t> memory;
  std::vector<float> rows;

  Stored(const GroupFormat& f, const std::vector<float>& x) : format(f), rows(x) {
    const size_t n = x.size() / f.head_dim, n_units = (n + f.unit_rows() - 1) / f.unit_rows();
    memory.assign(n_units * UnitBytes(f) / 4, 0xffffffffu);
    rows.resize(n_units * f.unit_rows() * f.head_dim);
    for (size_t r = 0; r < n_units * f.unit_rows(); r += f.unit_rows()) {
      std::byte* unit = data() + r / f.unit_rows() * UnitBytes(f);
      if (f.side == RowSide::kKeys)
        WriteKeyUnit(f, unit, &rows[r * f.head_dim]);
      else
        for (size_t i = 0; i < kTileRows; ++i) WriteValueRow(f, unit, i, &rows[(r + i) * f.head_dim]);
    }
  }
  std::byte* data() { return reinterpret_cast<std::byte*>(memory.data()); }
  const std::byte* data() const { return reinterpret_cast<const std::byte*>(memory.data()); }

  // [n, dim]
  std::vector<float> Decoded(size_t first, size_t n) const {
    const size_t d = format.head_dim;
    std::vector<float> out(n * d), columns(n * d);
    if (format.side == RowSide::kValues) {
      ExpandValueUnits(format, data(), first, n, out.data(), d);
      return out;
    }
    ExpandKeyUnits(format, data(), first, n, columns.data(), n);
    for (size_t i = 0; i < n; ++i)
      for (size_t c = 0; c < d; ++c) out[i * d + c] = columns[c * n + i];
    return out;
  }
};

double Error(const std::vector<float>& x, const std::vector<float>& y) {
  double error = 0, power = 0;
  for (size_t i = 0; i < x.size(); ++i) error += std::pow(double(x[i]) - y[i], 2), power += std::pow(double(y[i]), 2);
  return error / power;
}

TEST(GroupCodes, BytesAreThoseOfThePaper) {
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
    for (const auto& [bits, group, want] :
         {std::tuple{2, 32, 3.0}, {2, 64, 2.5}, {3, 32, 4.0}, {3, 128, 3.25}, {4, 32, 5.0}, {4, 128, 4.25}}) {
      const GroupFormat f = Format(side, static_cast<size_t>(bits), static_cast<size_t>(group), 128);
      EXPECT_DOUBLE_EQ(static_cast<double>(UnitBytes(f)) * 8 / static_cast<double>(f.unit_rows() * 128), want);
    }
  EXPECT_EQ(UnitBytes(Format(RowSide::kKeys, 0, 64, 48)), 96u);
  EXPECT_FALSE(Supports(Format(RowSide::kValues, 0, 32, 64)));
  EXPECT_FALSE(Supports(Format(RowSide::kKeys, 1, 32, 64)));
  EXPECT_FALSE(Supports(Format(RowSide::kValues, 2, 32, 80)));
  EXPECT_FALSE(Supports(Format(RowSide::kValues, 2, 128, 64)));
  EXPECT_FALSE(Supports(Format(RowSide::kKeys, 2, 32, 72)));
  EXPECT_FALSE(Supports(Format(RowSide::kKeys, 5, 32, 64)));
  EXPECT_TRUE(Supports(Format(RowSide::kValues, 3, 16, 80)));
  EXPECT_TRUE(Supports(Format(RowSide::kKeys, 3, 256, 80)));
}

// |x - x^| <= s / 2 and what halves lose; the extremes of a group are next to exact.
TEST(GroupCodes, ErrorsStayWithinHalfAStep) {
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
    for (const size_t bits : {2, 3, 4})
      for (const size_t group : {16, 32, 64, 128}) {
        if (side == RowSide::kValues && group > 64) continue;
        const size_t d = 64, n = 128;
        std::vector<float> x = Random(n * d, bits + group);
        for (size_t i = 0; i < n; ++i) x[i * d + 3] *= 40, x[i * d + 5] -= 300;
        const Stored stored(Format(side, bits, group, d), x);
        const std::vector<float> y = stored.Decoded(0, n);
        for (size_t i = 0; i < n; ++i)
          for (size_t c = 0; c < d; ++c) {
            float low = x[i * d + c], high = low;
            const bool keys = side == RowSide::kKeys;
            for (size_t j = 0; j < group; ++j) {
              const float other = keys ? x[(i / group * group + j) * d + c] : x[i * d + c / group * group + j];
              low = std::min(low, other);
              high = std::max(high, other);
            }
            const double levels = static_cast<double>((1u << bits) - 1), step = (high - low) / levels;
            const double half_ulp = std::pow(2, -11) * (std::fabs(low) + levels * step) + std::pow(2, -25) * (levels + 1);
            ASSERT_LE(std::fabs(double(x[i * d + c]) - y[i * d + c]), step / 2 * 1.001 + half_ulp * 1.01) << i << " " << c;
          }
      }
}

// Mean square errors of Gaussian rows relative to their variance, known from arithmetic; and one channel far from zero
// costs its neighbours nothing where keys are coded a channel at a time.
TEST(GroupCodes, GaussianRowsLoseWhatIsKnown) {
  const size_t d = 128, n = 4096;
  const std::vector<float> x = Random(n * d, 3);
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
    for (const auto& [bits, group, want] :
         {std::tuple{size_t{2}, size_t{32}, 0.154}, {size_t{2}, size_t{64}, 0.202}, {size_t{2}, size_t{128}, 0.251},
          {size_t{3}, size_t{32}, 0.0280}, {size_t{3}, size_t{64}, 0.0369}, {size_t{3}, size_t{128}, 0.0456},
          {size_t{4}, size_t{32}, 0.0061}, {size_t{4}, size_t{64}, 0.0080}, {size_t{4}, size_t{128}, 0.0099}})
      EXPECT_NEAR(Error(Stored(Format(side, bits, group, d), x).Decoded(0, n), x), want, want * 0.03) << bits << " " << group;

  std::vector<float> shifted = x;
  for (size_t i = 0; i < n; ++i)
    for (size_t c = 0; c < 4; ++c) shifted[i * d + c] += c % 2 == 0 ? -20.0f : 20.0f;
  const auto mse = [&](RowSide side) {
    const std::vector<float> y = Stored(Format(side, 2, 32, d), shifted).Decoded(0, n);
    double error = 0;
    for (size_t i = 0; i < y.size(); ++i) error += std::pow(double(y[i]) - shifted[i], 2);
    return error / static_cast<double>(y.size());
  };
  EXPECT_NEAR(mse(RowSide::kKeys), 0.155, 0.01);
  EXPECT_GT(mse(RowSide::kValues), 10 * mse(RowSide::kKeys));
}

TEST(GroupCodes, ConstantGroupsAreExactAndNothingIsNaN) {
  const size_t d = 32;
  for (const float value : {0.0f, 0.75f, -1000.0f, 65504.0f, 1e-7f}) {
    const std::vector<float> x(32 * d, value);
    for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
      for (const size_t bits : {2, 3, 4})
        for (const float y : Stored(Format(side, bits, 32, d), x).Decoded(0, 32))
          ASSERT_NEAR(y, value, std::fabs(value) / 2048 + 1e-7);
  }
  // NaN makes its own group NaN and no other.
  std::vector<float> x = Random(32 * d, 1);
  x[7 * d + 9] = std::nanf("");
  const std::vector<float> y = Stored(Format(RowSide::kKeys, 2, 32, d), x).Decoded(0, 32);
  for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i % d == 9) << i;
}

// Fitted groups lose less than those of extremes. Projected on the numbers (each group without its mean) little is
// missing; least squares alone would miss as much as they lose.
TEST(GroupCodes, FittedGroupsLoseLessAndDoNotShrink) {
  const size_t d = 128, n = 1024, group = 64;
  const std::vector<float> x = Random(n * d, 4);
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
    for (const auto& [bits, part] : {std::pair{size_t{2}, 0.62}, {size_t{3}, 0.83}, {size_t{4}, 0.93}}) {
      GroupFormat f = Format(side, bits, group, d);
      const double extremes = Error(Stored(f, x).Decoded(0, n), x);
      f.fit = GroupFit::kFitted;
      const std::vector<float> y = Stored(f, x).Decoded(0, n);
      const double error = Error(y, x);
      EXPECT_LE(error, part * extremes) << bits;
      double missing = 0, all = 0;
      for (size_t i = 0; i < n; ++i)
        for (size_t g = 0; g < d; g += group) {  // means of keys are next to 0
          double mean = 0;
          for (size_t c = g; c < g + group && side == RowSide::kValues; ++c) mean += x[i * d + c] / double(group);
          for (size_t c = g; c < g + group; ++c) {
            missing += (double(y[i * d + c]) - x[i * d + c]) * (x[i * d + c] - mean);
            all += std::pow(x[i * d + c] - mean, 2);
          }
        }
      EXPECT_LE(std::fabs(missing / all), 0.6 * error) << bits;
    }
}

TEST(GroupCodes, FittedGroupsStayInRange) {
  const size_t d = 32;
  GroupFormat f = Format(RowSide::kValues, 2, 32, d);
  f.fit = GroupFit::kFitted;
  std::vector<float> x(16 * d, 0.75f);                                              // constant
  for (size_t c = 0; c < d; ++c) x[d + c] = c % 2 == 0 ? -65504.0f : 65504.0f;      // as wide as halves
  for (size_t c = 0; c < d; ++c) x[2 * d + c] = c == 9 ? 100.0f : 0.0f;             // one stands out
  for (size_t c = 0; c < d; ++c) x[3 * d + c] = c % 2 == 0 ? 1.0f : 1.0f + 1e-7f;   // narrower than a half's step
  x[4 * d + 3] = std::nanf("");
  const std::vector<float> y = Stored(f, x).Decoded(0, 16);
  for (size_t i = 0; i < 16 * d; ++i)
    if (i / d == 4)
      EXPECT_TRUE(std::isnan(y[i])) << i;
    else
      EXPECT_NEAR(y[i], x[i], std::fabs(x[i]) / 512 + 0.1) << i;
}

// Values enter one by one: each leaves the codes of those before it as they are.
TEST(GroupCodes, ValuesEnterOneByOne) {
  for (const size_t bits : {2, 3, 4}) {
    const GroupFormat f = Format(RowSide::kValues, bits, 16, 32);
    const Stored whole(f, Random(16 * 32, 5));
    std::vector<uint32_t> memory(UnitBytes(f) / 4, 0xdeadbeefu);
    auto* unit = reinterpret_cast<std::byte*>(memory.data());
    std::vector<float> before;
    for (size_t lane = 0; lane < 16; ++lane) {
      WriteValueRow(f, unit, lane, &whole.rows[lane * 32]);
      std::vector<float> now((lane + 1) * 32);
      ExpandValueUnits(f, unit, 0, lane + 1, now.data(), 32);
      EXPECT_TRUE(std::equal(before.begin(), before.end(), now.begin()));
      before = now;
    }
    EXPECT_TRUE(memory == whole.memory);
  }
}

class GroupCodesIsa : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ForceIsa(GetParam()); }
  void TearDown() override { ForceIsa(BestIsa()); }
};

struct Piece {
  size_t first, n;
};

// Sums of products, what they should be, and how far they may be from it.
struct Sums {
  double error = 0, power = 0;
  void Add(double found, double want, double size, double bound) {
    EXPECT_LE(std::fabs(found - want), bound + 1e-5 * size);
    error += (found - want) * (found - want);
    power += size * size;
  }
};

float Range(const float* x, size_t n, size_t stride) {
  float low = x[0], high = x[0];
  for (size_t i = 0; i < n; ++i) low = std::min(low, x[i * stride]), high = std::max(high, x[i * stride]);
  return high - low;
}

// Rounding moves each of n parts by no more than half of a 16,256th of the largest, times the largest code. Of two bits by
// half of a 127th times 1.5 (keys), a 254th times 3 (values).
TEST_P(GroupCodesIsa, ProductsAreThoseOfDecodedRows) {
  const bool rounds = GetParam() != Isa::kScalar;
  constexpr size_t kRows = 384;
  // Of a part's range: parts of the largest times codes, over the codes that a range has.
  const auto of_keys = [](size_t bits) { return bits == 2 ? 1.5 / 127 / 2 / 3 : 1.0 / 32512; };
  const auto of_weights = [](size_t bits) { return bits == 2 ? 1.0 / 254 : 1.0 / 32512; };
  for (const size_t bits : {2, 3, 4})
    for (const auto& [group, d] :
         {std::pair<size_t, size_t>{32, 64}, {16, 80}, {128, 80}, {64, 128}, {32, 32}, {256, 64}, {128, 512}})
      for (const size_t stacked : {1, 2, 3, 4, 7, 16}) {
        if (d == 512 && stacked > 4) continue;
        SCOPED_TRACE(testing::Message() << bits << " bits, group " << group << ", " << d << " channels, " << stacked);
        std::vector<float> x = Random(kRows * d, bits + d);
        const Stored values(Format(RowSide::kValues, bits, std::min(group, d), d), x);
        for (size_t i = 0; i < kRows; ++i) x[i * d + 1] *= 30;
        const Stored keys(Format(RowSide::kKeys, bits, group, d), x);
        const std::vector<float> k = keys.Decoded(0, kRows), v = values.Decoded(0, kRows), q = Random(stacked * d, 4);
        for (const auto& [first, n] : {Piece{0, 256}, {256, 128}, {0, 1}, {17, 3}, {5, 100}, {31, 33}, {127, 2}}) {
          SCOPED_TRACE(testing::Message() << "rows from " << first);
          const size_t stride = n + 16;
          std::vector<float> scores(stacked * stride, 777.0f);
          ScoreKeyUnits(keys.format, keys.data(), first, n, q.data(), stacked, scores.data(), stride);
          std::vector<float> weights = Random(stacked * stride, 9), out(stacked * (d + 16), 2.0f);
          for (float& w : weights) w = std::exp(w);
          AddValueUnits(values.format, values.data(), first, n, weights.data(), stride, stacked, out.data(), d + 16);
          Sums of_scores, of_values;
          for (size_t m = 0; m < stacked; ++m) {
            double bound = 0;
            for (size_t c = 0; c < d && rounds; ++c)
              bound = std::max(bound, double(d) * std::fabs(q[c * stacked + m]) * Range(&x[c], kRows, d));
            bound *= of_keys(bits) * 1.05;
            for (size_t i = 0; i < n; ++i) {
              double want = 0, size = 0;
              for (size_t c = 0; c < d; ++c) {
                const double part = double(q[c * stacked + m]) * k[(first + i) * d + c];
                want += part;
                size += std::fabs(part);
              }
              of_scores.Add(scores[m * stride + i], want, size, bound);
            }
            bound = 0;
            for (size_t i = 0; i < n && rounds; ++i)
              bound = std::max(bound, double(n) * weights[m * stride + i] * Range(&values.rows[(first + i) * d], d, 1));
            bound *= of_weights(bits) * 1.05;
            for (size_t c = 0; c < d; ++c) {
              double want = 2, size = 2;
              for (size_t i = 0; i < n; ++i) {
                const double part = double(weights[m * stride + i]) * v[(first + i) * d + c];
                want += part;
                size += std::fabs(part);
              }
              of_values.Add(out[m * (d + 16) + c], want, size, bound);
            }
            for (size_t i = n; i < stride; ++i) EXPECT_EQ(scores[m * stride + i], 777.0f);
            for (size_t c = d; c < d + 16; ++c) EXPECT_EQ(out[m * (d + 16) + c], 2.0f);
          }
          if (n == 256 && bits != 2) {
            EXPECT_LE(of_scores.error, 1e-7 * of_scores.power);
            EXPECT_LE(of_values.error, 1e-7 * of_values.power);
          }
        }
      }
}

// Squared errors of sums: what rounding adds and what the codes have lost.
struct Added {
  double rounding = 0, codes = 0;
  void Add(double found, double decoded, double exact) {
    rounding += (found - decoded) * (found - decoded);
    codes += (decoded - exact) * (decoded - exact);
  }
};

// With two bits queries and weights are rounded to a byte. On random rows that adds less than a 500th to the squared error
// of the codes, with a channel or a weight that dwarfs the others a 100th. (Without what is put back and carried on it is
// more than twice as much, and where many weights are small most of them are lost.)
TEST_P(GroupCodesIsa, AByteAddsLittleToWhatTwoBitsLose) {
  constexpr size_t kRows = 1024;
  for (const size_t d : {64, 128})
    for (const float factor : {1.0f, 30.0f}) {
      std::vector<float> x = Random(kRows * d, d);
      for (size_t i = 0; i < kRows; ++i) x[i * d + 3] *= factor;
      const Stored keys(Format(RowSide::kKeys, 2, 32, d), x);
      const std::vector<float> k = keys.Decoded(0, kRows), q = Random(4 * d, 4);
      std::vector<float> scores(4 * kRows);
      ScoreKeyUnits(keys.format, keys.data(), 0, kRows, q.data(), 4, scores.data(), kRows);
      Added added;
      for (size_t m = 0; m < 4; ++m)
        for (size_t i = 0; i < kRows; ++i) {
          double decoded = 0, exact = 0;
          for (size_t c = 0; c < d; ++c) {
            decoded += double(q[c * 4 + m]) * k[i * d + c];
            exact += double(q[c * 4 + m]) * x[i * d + c];
          }
          added.Add(scores[m * kRows + i], decoded, exact);
        }
      EXPECT_LE(added.rounding, (factor == 1 ? 0.001 : 0.01) * added.codes) << d << " channels, factor " << factor;
    }
  constexpr size_t d = 64;
  std::vector<float> x = Random(kRows * d, 5);
  for (size_t i = 0; i < kRows; ++i)
    for (size_t c = 0; c < d; ++c) x[i * d + c] += c % 2 == 0 ? 1.0f : -1.0f;  // what adds up over many rows
  const Stored values(Format(RowSide::kValues, 2, 32, d), x);
  const std::vector<float> v = values.Decoded(0, kRows);
  for (const float tail : {0.0f, 0.01f, 0.003f, 0.001f}) {  // times the largest of 128, or any weights
    std::vector<float> weights = Random(4 * kRows, 6), out(4 * d);
    for (size_t i = 0; i < 4 * kRows; ++i)
      weights[i] = tail == 0 ? std::exp(weights[i]) : i % 128 == 0 ? 1 : tail * std::exp(0.3f * weights[i]);
    AddValueUnits(values.format, values.data(), 0, kRows, weights.data(), kRows, 4, out.data(), d);
    Added added;
    for (size_t m = 0; m < 4; ++m)
      for (size_t c = 0; c < d; ++c) {
        double decoded = 0, exact = 0;
        for (size_t i = 0; i < kRows; ++i) {
          decoded += double(weights[m * kRows + i]) * v[i * d + c];
          exact += double(weights[m * kRows + i]) * x[i * d + c];
        }
        added.Add(out[m * d + c], decoded, exact);
      }
    EXPECT_LE(added.rounding, (tail == 0 ? 0.0012 : 0.01) * added.codes) << "tail " << tail;
  }
}

// Scores have the same bits in any piece, sums of values in whole blocks of 128 rows; what is read next changes nothing.
TEST_P(GroupCodesIsa, CutsChangeNoBits) {
  constexpr size_t kRows = 256, d = 80;
  for (const size_t bits : {2, 3, 4})
    for (const size_t stacked : {1, 4}) {
      SCOPED_TRACE(testing::Message() << bits << " bits, " << stacked);
      const Stored keys(Format(RowSide::kKeys, bits, 32, d), Random(kRows * d, bits));
      const Stored values(Format(RowSide::kValues, bits, 16, d), Random(kRows * d, bits + 9));
      const std::vector<float> q = Random(stacked * d, 1);
      std::vector<float> whole(stacked * kRows), cut(stacked * kRows), sum(stacked * d), sum_of_cut(stacked * d);
      ScoreKeyUnits(keys.format, keys.data(), 0, kRows, q.data(), stacked, whole.data(), kRows);
      for (const auto& [first, n] : {Piece{0, 5}, {5, 60}, {65, 31}, {96, 160}})
        ScoreKeyUnits(keys.format, keys.data(), first, n, q.data(), stacked, &cut[first], kRows, values.data());
      EXPECT_TRUE(whole == cut);
      for (float& w : whole) w = std::exp(w / 8);
      AddValueUnits(values.format, values.data(), 0, kRows, whole.data(), kRows, stacked, sum.data(), d);
      for (const size_t first : {0, 128})
        AddValueUnits(values.format, values.data(), first, 128, &whole[first], kRows, stacked, sum_of_cut.data(), d,
                      keys.data());
      EXPECT_TRUE(sum == sum_of_cut);
    }
}

// Whole numbers add up without overflow where every code and every query or weight is the largest, in its high part (1) as
// in its low one (just below 1).
TEST_P(GroupCodesIsa, TheLargestSumsFit) {
  constexpr size_t kRows = 128;
  for (const size_t bits : {2, 3, 4})
    for (const size_t d : {64, 512}) {
      SCOPED_TRACE(testing::Message() << bits << " bits, " << d << " channels");
      std::vector<float> x(kRows * d, 1.0f);
      for (size_t i = 0; i < kRows; i += 32) std::fill_n(&x[i * d], d, -1.0f);  // a group's minimum; codes of 0
      for (size_t i = 0; i < kRows; ++i)
        for (size_t c = 0; c < d; c += 32) x[i * d + c] = -1.0f;
      const Stored keys(Format(RowSide::kKeys, bits, 32, d), x), values(Format(RowSide::kValues, bits, 32, d), x);
      const std::vector<float> k = keys.Decoded(0, kRows), v = values.Decoded(0, kRows);
      std::vector<float> q(2 * d), weights(2 * kRows), scores(2 * kRows), out(2 * d);
      for (size_t c = 0; c < d; ++c) q[c * 2] = 1, q[c * 2 + 1] = c < 2 ? 1 : 16255.0f / 16256;
      for (size_t i = 0; i < kRows; ++i) weights[i] = 1, weights[kRows + i] = i < 2 ? 1 : 16255.0f / 16256;
      ScoreKeyUnits(keys.format, keys.data(), 0, kRows, q.data(), 2, scores.data(), kRows);
      AddValueUnits(values.format, values.data(), 0, kRows, weights.data(), kRows, 2, out.data(), d);
      for (size_t m = 0; m < 2; ++m) {
        for (size_t i = 0; i < kRows; ++i) {
          double want = 0;
          for (size_t c = 0; c < d; ++c) want += double(q[c * 2 + m]) * k[i * d + c];
          EXPECT_NEAR(scores[m * kRows + i], want, 1e-3 * double(d)) << i;
        }
        for (size_t c = 0; c < d; ++c) {
          double want = 0;
          for (size_t i = 0; i < kRows; ++i) want += double(weights[m * kRows + i]) * v[i * d + c];
          EXPECT_NEAR(out[m * d + c], want, 1e-3 * double(kRows)) << c;
        }
      }
    }
}

// A row decodes to the same bits wherever a call begins, on every instruction set.
TEST_P(GroupCodesIsa, RowsDecodeAlikeInAnyPiece) {
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues})
    for (const size_t bits : {2, 3, 4}) {
      const Stored stored(Format(side, bits, 32, 64), Random(96 * 64, 6));
      const std::vector<float> all = stored.Decoded(0, 96);
      ForceIsa(Isa::kScalar);
      EXPECT_LE(Error(stored.Decoded(0, 96), all), 1e-13);
      ForceIsa(GetParam());
      for (const auto& [first, n] : {Piece{1, 5}, {16, 48}, {31, 34}, {95, 1}}) {
        const std::vector<float> part = stored.Decoded(first, n);
        EXPECT_LE(Error(part, {all.begin() + static_cast<ptrdiff_t>(first * 64), all.begin() + static_cast<ptrdiff_t>((first + n) * 64)}), 1e-13);
      }
    }
}

// A query that is not a number gives none; whatever else is in the step stays.
TEST_P(GroupCodesIsa, NaNStaysWhereItIs) {
  const size_t d = 32;
  const Stored keys(Format(RowSide::kKeys, 2, 32, d), Random(32 * d, 1));
  std::vector<float> q = Random(2 * d, 2), scores(2 * 32);
  q[3 * 2 + 1] = std::nanf("");
  ScoreKeyUnits(keys.format, keys.data(), 0, 32, q.data(), 2, scores.data(), 32);
  for (size_t i = 0; i < 32; ++i) {
    EXPECT_TRUE(std::isfinite(scores[i]));
    EXPECT_TRUE(std::isnan(scores[32 + i]));
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, GroupCodesIsa, testing::ValuesIn(AvailableIsas()),
                         [](const auto& isa) { return std::string(IsaName(isa.param)); });

// Keys without bits are the mean of their group, rounded to f16, and score as that, however they are cut.
TEST(GroupCodes, KeysWithoutBitsAreMeans) {
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    const GroupFormat f = Format(RowSide::kKeys, 0, 32, 48);
    const size_t n = 96;
    const Stored stored(f, Random(n * 48, 41));
    const std::vector<float> decoded = stored.Decoded(0, n), q = Random(48 * 5, 42);
    for (size_t r = 0; r < n; ++r)
      for (size_t c = 0; c < 48; ++c) {
        double mean = 0;
        for (size_t i = r / 32 * 32; i < r / 32 * 32 + 32; ++i) mean += stored.rows[i * 48 + c] / 32;
        ASSERT_NEAR(decoded[r * 48 + c], mean, 1e-3 * std::fabs(mean) + 1e-6);
      }
    EXPECT_EQ(stored.Decoded(30, 7), std::vector<float>(decoded.begin() + 30 * 48, decoded.begin() + 37 * 48));
    std::vector<float> scores(5 * 100, -1), part(5 * 100, -1);
    ScoreKeyUnits(f, stored.data(), 0, n, q.data(), 5, scores.data(), 100);
    ScoreKeyUnits(f, stored.data(), 17, 50, q.data(), 5, part.data(), 100);
    for (size_t m = 0; m < 5; ++m) {
      for (size_t r = 0; r < n; ++r) {
        double want = 0;
        for (size_t c = 0; c < 48; ++c) want += double(q[c * 5 + m]) * decoded[r * 48 + c];
        ASSERT_NEAR(scores[m * 100 + r], want, 1e-5);
      }
      for (size_t i = 0; i < 50; ++i) ASSERT_EQ(part[m * 100 + i], scores[m * 100 + 17 + i]);
      ASSERT_EQ(scores[m * 100 + n], -1);
      ASSERT_EQ(part[m * 100 + 50], -1);
    }
  }
  ForceIsa(BestIsa());
}

}  // namespace
}  // namespace lesskv
