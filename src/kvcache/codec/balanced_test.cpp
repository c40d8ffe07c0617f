// What rows behind trained matrices must show, through the store: attention that is that of the decoded rows, the same codes
// however a text is cut into steps, exact first and newest rows, and the errors that the matrices are for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"
#include "kvcache/codec/kivi_subject.h"

namespace lesskv {
namespace {

// Matrices that differ by head; `skew` 0: the unit matrix.
std::shared_ptr<const KeyBases> Bases(size_t bits, size_t group, float skew) {
  SidecarBalance b;
  b.head_dim = kDim;
  b.n_kv_heads = {kKvHeads};
  Rng rng(11);
  for (size_t i = 0; i < kKvHeads * kDim * kDim; ++i)
    b.keys.push_back(FloatToHalf((i % (kDim * kDim) % (kDim + 1) == 0 ? 1.0f : 0.0f) + skew * rng.Normal()));
  std::vector<size_t> parts;
  for (const GroupFormat& part : BalancedParts(bits, group, kDim)) parts.push_back(part.head_dim);
  return KeyBases::Create(b, parts, "test");
}

KiviOptions Options(size_t k, size_t v, size_t group, size_t window, size_t sinks, float skew = 0.05f) {
  KiviOptions options{k, v, group, window, true};
  options.sinks = sinks;
  options.lags = true;
  options.bases = Bases(k, group, skew);
  return options;
}

const KiviOptions kOptions[] = {Options(2, 2, 16, 32, 4), Options(3, 2, 32, 20, 0), Options(4, 3, 64, 64, 9), Options(2, 4, 16, 1, 15)};

TEST(Balanced, PartsHaveTheBitsOnAverage) {
  for (const size_t d : {16, 32, 48, 64, 80, 96, 128, 256, 512})
    for (const size_t bits : {2, 3, 4}) {
      size_t channels = 0, all = 0, before = 5;
      for (const GroupFormat& part : BalancedParts(bits, 32, d)) {
        EXPECT_TRUE(Supports(part));
        EXPECT_LE(part.bits, before);
        before = part.bits;
        channels += part.head_dim;
        all += part.head_dim * part.bits;
      }
      EXPECT_EQ(channels, d);
      EXPECT_EQ(all, d * bits) << d;
    }
  const std::vector<GroupFormat> parts = BalancedParts(2, 64, 64);
  ASSERT_EQ(parts.size(), 3u);
  EXPECT_EQ(parts[0].head_dim, 16u);
  EXPECT_EQ(parts[2].bits, 0u);
}

// Keys times M and queries times its inverse give the scores of keys and queries; keys are taken back.
TEST(Balanced, BasesUndoThemselves) {
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    const auto bases = Bases(2, 16, 0.1f);
    const Rows rows(70);
    for (size_t h = 0; h < kKvHeads; ++h) {
      std::vector<float> keys(70 * kDim), z(70 * kDim), columns(kDim * 70), back(kDim * 72), q(kDim * 6), moved(kDim * 3);
      std::copy_n(rows.k.begin(), keys.size(), keys.begin());
      std::copy_n(rows.q.begin(), q.size(), q.begin());
      bases->ToBasis(0, h, 70, keys.data(), z.data());
      for (size_t i = 0; i < 70; ++i)
        for (size_t c = 0; c < kDim; ++c) columns[c * 70 + i] = z[i * kDim + c];
      bases->FromBasis(0, h, 70, columns.data(), 70, back.data(), 72);
      bases->Queries(0, h, 3, q.data() + 2, 6, moved.data());
      for (size_t i = 0; i < 70; ++i) {
        for (size_t c = 0; c < kDim; ++c) ASSERT_NEAR(back[c * 72 + i], keys[i * kDim + c], 1e-4) << IsaName(isa);
        for (size_t m = 0; m < 3; ++m) {
          double score = 0, want = 0;
          for (size_t c = 0; c < kDim; ++c) {
            score += double(moved[c * 3 + m]) * z[i * kDim + c];
            want += double(q[c * 6 + 2 + m]) * keys[i * kDim + c];
          }
          ASSERT_NEAR(score, want, 1e-3);
        }
      }
    }
  }
  ForceIsa(BestIsa());
}

// Each head of each layer has its own matrix: here 1, 2 and 3 times one that keeps lengths.
TEST(Balanced, BasesAreThoseOfTheirHead) {
  SidecarBalance b;
  b.head_dim = 16;
  b.n_kv_heads = {2, 1};
  for (size_t i = 0; i < 3 * 256; ++i) b.keys.push_back(FloatToHalf(i % 256 % 17 == 0 ? 1.0f + static_cast<float>(i / 256) : 0.0f));
  const auto bases = KeyBases::Create(b, {16}, "test");
  std::vector<float> key(16), z(16), q(16);
  key[3] = 1;
  float times = 1;
  for (const auto& [layer, head] : {std::pair<size_t, size_t>{0, 0}, {0, 1}, {1, 0}}) {
    bases->ToBasis(layer, head, 1, key.data(), z.data());
    bases->Queries(layer, head, 1, key.data(), 1, q.data());
    double of_key = 0, of_query = 0;
    for (size_t c = 0; c < 16; ++c) of_key += z[c] * z[c], of_query += q[c] * q[c];
    EXPECT_NEAR(of_key, times * times, 1e-5);
    EXPECT_NEAR(of_query, 1 / (times * times), 1e-5);
    ++times;
  }
}

TEST(Balanced, CodedRowsDependOnTheTokensSeenOnly) {
  for (const KiviOptions& options : kOptions) {
    const Rows rows(260);
    Subject one(options);
    for (size_t l = 1; l <= 250; ++l) {
      one.Step(rows, 1);
      const size_t keys = l < options.window ? 0 : (l - options.window) / options.group * options.group;
      ASSERT_EQ(one.kivi().coded_keys(0, 1), keys) << l;
      ASSERT_EQ(one.kivi().coded_values(0, 1), l - std::min(l, options.window)) << l;
      if (l != 1 && l != 33 && l != 48 && l != 129 && l != 250) continue;
      const std::vector<std::byte> saved = one.Saved();
      for (const size_t chunk : {l, size_t{7}, size_t{50}, size_t{64}}) {
        Subject other(options);
        while (other.seen < l) other.Step(rows, std::min(chunk, l - other.seen));
        EXPECT_TRUE(other.Saved() == saved) << l << " tokens in steps of " << chunk;
      }
    }
  }
}

// The first tokens and the window read as they came, in f16, whatever is coded; codes stay.
TEST(Balanced, FirstAndNewestRowsAreTheInputs) {
  for (const KiviOptions& options : kOptions) {
    const Rows rows(200);
    Subject subject(options);
    std::vector<float> keys_before, values_before;
    for (size_t l = 1; l <= 180; ++l) {
      subject.Step(rows, 1);
      const auto [keys, values] = subject.Read(1, l);
      const size_t coded_keys = subject.kivi().coded_keys(0, 1), coded_values = subject.kivi().coded_values(0, 1);
      for (size_t i = 0; i < l * kDim; ++i) {
        const size_t row = i / kDim, at = (row * kKvHeads + 1) * kDim + i % kDim;
        if (row < options.sinks || row >= coded_keys) {
          ASSERT_EQ(keys[i], HalfToFloat(FloatToHalf(rows.k[at]))) << l;
        }
        if (row < options.sinks || row >= coded_values) {
          ASSERT_EQ(values[i], HalfToFloat(FloatToHalf(rows.v[at]))) << l;
        }
      }
      ASSERT_TRUE(std::equal(keys_before.begin(), keys_before.end(), keys.begin()));
      ASSERT_TRUE(std::equal(values_before.begin(), values_before.end(), values.begin()));
      keys_before.assign(keys.begin(), keys.begin() + static_cast<ptrdiff_t>(coded_keys * kDim));
      values_before.assign(values.begin(), values.begin() + static_cast<ptrdiff_t>(coded_values * kDim));
    }
  }
}

// One query, up to four, and the tiles of longer steps; every instruction set.
TEST(Balanced, AttentionIsThatOfDecodedRows) {
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (const KiviOptions& options : kOptions) {
      const Rows rows(700);
      Subject subject(options);
      subject.Step(rows, 600);
      for (const size_t n : {1, 1, 3, 9}) {
        const size_t token = subject.seen;
        Subject copy(options);
        copy.store = subject.store->Clone(copy.counter);
        copy.seen = token;
        const std::vector<float> out = subject.Step(rows, n);
        std::vector<float> first(out.begin(), out.begin() + static_cast<ptrdiff_t>(kHeads * kDim));
        copy.store->Reserve({.n_step = 1, .budgets = {}});
        copy.store->Append(0, 0, 1, &rows.k[token * kKvHeads * kDim], &rows.v[token * kKvHeads * kDim]);
        // Codes of two bits are met by bytes (group_codes.h).
        const double most = options.value_bits == 2 ? 4e-4 : 1e-6;
        EXPECT_LE(Deviation(first, Exact(copy, rows, token, token + 1)), most) << IsaName(isa) << ", step of " << n;
      }
    }
  }
  ForceIsa(BestIsa());
}

// A saved and loaded store, and a copy, go on in the same way, at every stage of the first rows.
TEST(Balanced, SavedAndClonedStoresGoOn) {
  for (const KiviOptions& options : kOptions)
    for (const size_t first : {3, 34, 40, 150}) {
      const Rows rows(300);
      Subject whole(options), copy(options), loaded(options);
      whole.Step(rows, first);
      const std::vector<std::byte> saved = whole.Saved();
      ByteReader in{{}};
      in.rest = saved;
      loaded.store->Load(in, std::vector<size_t>(kKvHeads), first);
      EXPECT_TRUE(in.rest.empty());
      copy.store = whole.store->Clone(copy.counter);
      copy.seen = loaded.seen = first;
      for (const size_t n : {1, 20, 1, 60, 1}) {
        const std::vector<float> want = whole.Step(rows, n);
        EXPECT_EQ(copy.Step(rows, n), want);
        EXPECT_EQ(loaded.Step(rows, n), want);
      }
      EXPECT_TRUE(loaded.Saved() == whole.Saved());
      EXPECT_EQ(loaded.counter.now, whole.counter.now);
    }
}

// Each part of a coded key is as near to the key, in the basis, as its bits allow (errors of 64 normal numbers between
// extremes, relative: 0.21 with 2 bits, 0.0086 with 4), whatever the first tokens are, which are exact.
TEST(Balanced, PartsAreCodedWithTheirBits) {
  for (const size_t bits : {2, 3, 4}) {
    const KiviOptions options = Options(bits, 4, 64, 64, 4);
    Rows rows(400);
    for (size_t i = 0; i < 4 * kKvHeads * kDim; ++i) rows.k[i] *= 100;
    Subject subject(options);
    subject.Step(rows, 400);
    const size_t n = subject.kivi().coded_keys(0, 1);
    ASSERT_EQ(n, 320u);
    const std::vector<float> keys = subject.Read(1, n).first;
    std::vector<float> want(n * kDim), coded(n * kDim), exact(n * kDim);
    for (size_t i = 0; i < n * kDim; ++i) want[i] = rows.k[(i / kDim * kKvHeads + 1) * kDim + i % kDim];
    options.bases->ToBasis(0, 1, n, keys.data(), coded.data());
    options.bases->ToBasis(0, 1, n, want.data(), exact.data());
    size_t first = 0;
    for (const GroupFormat& part : BalancedParts(bits, 64, kDim)) {
      double error = 0, power = 0;
      for (size_t row = 4; row < n; ++row)
        for (size_t c = first; c < first + part.head_dim; ++c) {
          error += std::pow(double(coded[row * kDim + c]) - exact[row * kDim + c], 2);
          power += std::pow(double(exact[row * kDim + c]), 2);
        }
      const double expected = part.bits == 0 ? 1.0 : part.bits == 2 ? 0.21 : 0.0086;
      EXPECT_NEAR(error / power / expected, 1, 0.3) << bits << " bits, part of " << part.bits;
      first += part.head_dim;
    }
  }
}

// When the group of the first rows leaves, they leave with it.
TEST(Balanced, FirstRowsLeaveWithTheirGroup) {
  const Rows rows(100);
  Subject subject(Options(4, 4, 16, 16, 4));
  subject.Step(rows, 80);
  const auto [keys, values] = subject.Read(0, 80);
  const std::vector<size_t> budgets(kKvHeads, 64);
  subject.store->Reserve({.n_step = 1, .evicts = true, .budgets = budgets});
  subject.store->Append(0, 0, 1, &rows.k[80 * kKvHeads * kDim], &rows.v[80 * kKvHeads * kDim]);
  std::vector<Departure> leaving(16);
  for (uint32_t i = 0; i < 16; ++i) leaving[i].row = i;
  for (size_t h = 0; h < kKvHeads; ++h) subject.store->Close(0, h, leaving);
  subject.store->EndStep();
  const auto [keys_after, values_after] = subject.Read(0, 65);
  EXPECT_TRUE(std::equal(keys_after.begin(), keys_after.begin() + 48 * kDim, keys.begin() + 16 * kDim));
  EXPECT_TRUE(std::equal(values_after.begin(), values_after.begin() + 48 * kDim, values.begin() + 16 * kDim));
}

// Where the first group leaves before more values are coded, those of the rows that take its place are the exact ones.
TEST(Balanced, FirstValuesAreThoseOfTheRowsThatStay) {
  const Rows rows(100);
  Subject subject(Options(4, 4, 16, 16, 4));
  subject.Step(rows, 32);
  std::vector<Departure> leaving(16);
  for (uint32_t i = 0; i < 16; ++i) leaving[i].row = i;
  for (size_t gone = 16, seen = 32; seen < 90; ++seen) {
    const std::vector<size_t> budgets(kKvHeads, 32);
    subject.store->Reserve({.n_step = 1, .evicts = true, .budgets = budgets});
    subject.store->Append(0, 0, 1, &rows.k[seen * kKvHeads * kDim], &rows.v[seen * kKvHeads * kDim]);
    const bool leaves = seen + 1 - (gone - 16) > 32;
    for (size_t h = 0; h < kKvHeads; ++h) subject.store->Close(0, h, std::span(leaving).first(leaves ? 16 : 0));
    subject.store->EndStep();
    if (!leaves) continue;
    const auto [keys, values] = subject.Read(0, seen + 1 - gone);
    for (size_t row = 0; row < seen + 1 - gone; ++row) {
      double error = 0, power = 0;
      for (size_t c = 0; c < kDim; ++c) {
        const float want = rows.v[(gone + row) * kKvHeads * kDim + c];
        error += std::pow(double(values[row * kDim + c]) - want, 2), power += double(want) * want;
      }
      EXPECT_LT(error, (row < 1 ? 1e-6 : 0.02) * power) << row << " of " << seen + 1 - gone;
    }
    gone += 16;
  }
}

// Keys whose power, and what queries ask of them, lies in few directions that no channel is: the balanced matrix halves
// what is lost at the same bytes, and most of it at two bits.
TEST(Balanced, ErrorsOfScoresAreSmallerAtTheSameBytes) {
  Rng rng(5);
  const auto bases = [&] {
    SidecarBalance b;
    b.head_dim = kDim;
    b.n_kv_heads = {kKvHeads};
    for (size_t i = 0; i < kKvHeads * kDim * kDim; ++i)
      b.keys.push_back(FloatToHalf((i % (kDim * kDim) % (kDim + 1) == 0 ? 1.0f : 0.0f) + 0.15f * rng.Normal()));
    return b;
  }();
  std::vector<size_t> parts;
  for (const GroupFormat& part : BalancedParts(2, 32, kDim)) parts.push_back(part.head_dim);
  KiviOptions balanced{2, 2, 32, 32, true}, plain = balanced;
  balanced.bases = KeyBases::Create(bases, parts, "test");
  // Coordinates of power 2^-c behind the matrix; keys are what they are taken back to.
  Rows rows(600);
  std::vector<float> z(kDim * 600), out(kDim * 600);
  for (size_t h = 0; h < kKvHeads; ++h) {
    for (size_t c = 0; c < kDim; ++c)
      for (size_t i = 0; i < 600; ++i) z[c * 600 + i] = rng.Normal() * std::pow(0.75f, static_cast<float>(c / 16 * 8));
    balanced.bases->FromBasis(0, h, 600, z.data(), 600, out.data(), 600);
    for (size_t i = 0; i < 600; ++i)
      for (size_t c = 0; c < kDim; ++c) rows.k[(i * kKvHeads + h) * kDim + c] = out[c * 600 + i];
  }
  const auto lost = [&](const KiviOptions& options) {
    Subject subject(options);
    subject.Step(rows, 600);
    double error = 0;
    const std::vector<float> keys = subject.Read(1, 512).first;
    for (size_t i = 0; i < 512; ++i) {
      std::vector<float> delta(kDim), moved(kDim);
      for (size_t c = 0; c < kDim; ++c) delta[c] = keys[i * kDim + c] - rows.k[(i * kKvHeads + 1) * kDim + c];
      balanced.bases->ToBasis(0, 1, 1, delta.data(), moved.data());  // queries have the power of the coordinates
      for (size_t c = 0; c < kDim; ++c) error += std::pow(moved[c] * std::pow(0.75, static_cast<double>(c / 16 * 8)), 2);
    }
    return std::pair{error, subject.counter.now};
  };
  const auto [with, with_bytes] = lost(balanced);
  const auto [without, without_bytes] = lost(plain);
  EXPECT_LE(with, 0.4 * without);
  EXPECT_LE(with_bytes, without_bytes);
}

}  // namespace
}  // namespace lesskv
