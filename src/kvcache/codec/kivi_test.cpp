// What KIVI must show, through the store: which rows are coded after how many tokens, the same codes however a text is
// cut into steps, exact rows as they came, and attention that is that of the decoded rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/error.h"
#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"
#include "kvcache/codec/kivi_subject.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

TEST(Kivi, CodedRowsDependOnTheTokensSeenOnly) {
  for (const KiviOptions& options : {KiviOptions{2, 2, 16, 48}, {3, 3, 16, 48}, {3, 2, 48, 48, true}}) {
    const Rows rows(200);
    Subject one(options);
    for (size_t l = 1; l <= 150; ++l) {
      one.Step(rows, 1);
      for (size_t h = 0; h < kKvHeads; ++h) {
        ASSERT_EQ(one.kivi().coded_keys(0, h), l / 48 * 48) << l;
        ASSERT_EQ(one.kivi().coded_values(0, h), l > 48 ? l - 48 : 0) << l;
      }
      if (l != 1 && l != 47 && l != 48 && l != 49 && l != 96 && l != 131) continue;
      const std::vector<std::byte> saved = one.Saved();
      for (const size_t chunk : {l, size_t{7}, size_t{50}, size_t{64}}) {
        Subject other(options);
        while (other.seen < l) other.Step(rows, std::min(chunk, l - other.seen));
        EXPECT_TRUE(other.Saved() == saved) << l << " tokens in steps of " << chunk;
        EXPECT_EQ(other.counter.now > 0, true);
      }
    }
  }
}

void ExpectExactRowsAndCodesStay(const KiviOptions& options) {
  const Rows rows(120);
  Subject subject(options);
  std::vector<float> before_keys, before_values;
  for (size_t l = 1; l <= 100; ++l) {
    subject.Step(rows, 1);
    const auto [keys, values] = subject.Read(1, l);
    const size_t coded_keys = subject.kivi().coded_keys(0, 1), coded_values = subject.kivi().coded_values(0, 1);
    for (size_t i = 0; i < l * kDim; ++i) {
      const size_t at = (i / kDim * kKvHeads + 1) * kDim + i % kDim;
      if (i >= coded_keys * kDim) {
        ASSERT_EQ(keys[i], HalfToFloat(FloatToHalf(rows.k[at]))) << l;
      }
      if (i >= coded_values * kDim) {
        ASSERT_EQ(values[i], HalfToFloat(FloatToHalf(rows.v[at]))) << l;
      }
    }
    // What was coded reads as it did.
    ASSERT_TRUE(std::equal(before_keys.begin(), before_keys.end(), keys.begin()));
    ASSERT_TRUE(std::equal(before_values.begin(), before_values.end(), values.begin()));
    before_keys.assign(keys.begin(), keys.begin() + static_cast<ptrdiff_t>(coded_keys * kDim));
    before_values.assign(values.begin(), values.begin() + static_cast<ptrdiff_t>(coded_values * kDim));
  }
}

TEST(Kivi, ExactRowsAreTheInputsAndCodesStay) {
  ExpectExactRowsAndCodesStay({2, 4, 16, 32});
  ExpectExactRowsAndCodesStay({3, 3, 16, 32, true});
  ExpectExactRowsAndCodesStay({2, 4, 16, 32, false, 0.5});
}

// One query, up to four, and the tiles of longer steps; every instruction set; where nothing is coded yet, the bits of
// f16 rows.
TEST(Kivi, AttentionIsThatOfDecodedRows) {
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (const KiviOptions& options :
         {KiviOptions{2, 2, 16, 32}, {4, 4, 32, 64}, {4, 2, 16, 48}, {3, 3, 32, 64}, {3, 2, 128, 128, true},
          {4, 2, 32, 64, false, 0.5}, {2, 3, 16, 48, true, 0.5}, {3, 2, 128, 128, false, 0.6}}) {
      const Rows rows(700);
      Subject subject(options), f16(RowType::kF16);
      subject.Step(rows, 600);
      const auto [keys, values] = subject.Read(0, 600);
      for (const size_t n : {1, 1, 3, 9}) {
        // A query of the step sees the rows before the step as they are stored, and the step's own exactly: compare its
        // first query, for which nothing else is coded in between.
        const size_t token = subject.seen;
        Subject copy(options);
        ByteReader in{{}};
        const std::vector<std::byte> saved = subject.Saved();
        in.rest = saved;
        copy.store->Load(in, std::vector<size_t>(kKvHeads), token);
        copy.seen = token;
        const std::vector<float> out = subject.Step(rows, n);
        std::vector<float> first(out.begin(), out.begin() + static_cast<ptrdiff_t>(kHeads * kDim));
        copy.store->Reserve({.n_step = 1, .budgets = {}});
        copy.store->Append(0, 0, 1, &rows.k[token * kKvHeads * kDim], &rows.v[token * kKvHeads * kDim]);
        // Up to four queries meet codes of two bits with a byte a number, which err a thousand times as much as these.
        const bool bytes = n <= 4 && isa != Isa::kScalar && std::min(options.key_bits, options.value_bits) == 2;
        EXPECT_LE(Deviation(first, Exact(copy, rows, token, token + 1)), bytes ? 4e-4 : 1e-6)
            << IsaName(isa) << ", step of " << n;
      }
      Subject brief(options);
      for (size_t i = 0; i < options.window; ++i) EXPECT_EQ(brief.Step(rows, 1), f16.Step(rows, 1)) << i;
      EXPECT_NE(brief.Step(rows, 1), f16.Step(rows, 1));
    }
  }
  ForceIsa(BestIsa());
}

TEST(Kivi, GroupedEqualsRepeatedHeads) {
  const KiviOptions options{2, 2, 16, 32};
  const Rows grouped(150, 4, 2);
  Rows repeated(150, 4, 4);
  repeated.q = grouped.q;
  for (size_t t = 0; t < 150; ++t)
    for (size_t h = 0; h < 4; ++h)
      for (size_t c = 0; c < kDim; ++c) {
        repeated.k[(t * 4 + h) * kDim + c] = grouped.k[(t * 2 + h / 2) * kDim + c];
        repeated.v[(t * 4 + h) * kDim + c] = grouped.v[(t * 2 + h / 2) * kDim + c];
      }
  Subject a(options, Shape(4, 2)), b(options, Shape(4, 4));
  a.Step(grouped, 120), b.Step(repeated, 120);
  for (size_t i = 0; i < 20; ++i) {
    const std::vector<float> x = a.Step(grouped, 1), y = b.Step(repeated, 1);
    EXPECT_LE(Deviation(x, {y.begin(), y.end()}), 1e-10);
  }
}

// Channels that stand out do not cost the others their precision behind the transform, at the same bytes.
TEST(Kivi, RotatedValuesLoseLess) {
  Rows rows(300);
  for (size_t i = 3; i < rows.v.size(); i += kDim) rows.v[i] += 12;
  const auto lost = [&](bool rotate, size_t bits) {
    Subject subject(KiviOptions{4, bits, 32, 32, rotate});
    subject.Step(rows, 300);
    const std::vector<float> values = subject.Read(1, 256).second;
    double error = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      const double e = values[i] - rows.v[(i / kDim * kKvHeads + 1) * kDim + i % kDim];
      error += e * e / static_cast<double>(values.size());
    }
    return std::pair{error, subject.counter.now};
  };
  for (const size_t bits : {2, 3, 4}) {
    const auto [plain, plain_bytes] = lost(false, bits);
    const auto [rotated, rotated_bytes] = lost(true, bits);
    EXPECT_LE(rotated, 0.5 * plain) << bits;
    EXPECT_EQ(rotated_bytes, plain_bytes);
  }
}

// The bits of a code and two halves a group, of keys `group` tokens and of values at most a head's channels, beside the
// window.
TEST(Kivi, BytesAreThoseOfTheRows) {
  struct Case {
    KiviOptions options;
    double key_bits, value_bits;
  };
  const Rows rows(2048);
  for (const Case& c : {Case{{2, 2, 32, 128}, 3, 3}, {{3, 3, 32, 128}, 4, 4}, {{3, 2, 128, 128}, 3.25, 3}}) {
    Subject subject(c.options);
    subject.Step(rows, 2047);
    subject.Step(rows, 1);
    const auto bytes = [](size_t n, double bits) { return static_cast<size_t>(static_cast<double>(n * kDim) * bits / 8); };
    const size_t window = 128 * kDim * 2 * 2, staging = 16 * kDim * 2 * 2;
    EXPECT_EQ(subject.counter.now - subject.store->SlackBytes({}),  // the last 128 values are in the window
              kKvHeads * (bytes(2048, c.key_bits) + bytes(2048 - 128, c.value_bits) + window + staging));
    subject.store->Reserve({.n_step = 1, .budgets = {}});
    const size_t block = bytes(256, c.key_bits + c.value_bits), coded = 2048 / 256 * block;
    EXPECT_GE(subject.counter.now, kKvHeads * (coded + window + staging));
    EXPECT_LE(subject.counter.now, kKvHeads * (coded + block + window + staging));  // room for the next group
    const std::vector<size_t> budgets(kKvHeads, 2048);
    EXPECT_LT(subject.store->SlackBytes(budgets), subject.store->SlackBytes({}));
  }
}

// ---- Keys that lack channels (think)

// The channels of the largest |Q_j K_j^T|_F, from the outer product itself: queries [first_query, last_query) and keys
// [0, n_keys) of a head.
std::vector<uint16_t> Largest(const Rows& rows, size_t h, size_t first_query, size_t last_query, size_t n_keys, size_t n) {
  std::vector<double> scores(kDim);
  for (size_t c = 0; c < kDim; ++c)
    for (size_t t = first_query; t < last_query; ++t)
      for (size_t g = 0; g < kHeads / kKvHeads; ++g)
        for (size_t k = 0; k < n_keys; ++k)
          scores[c] += std::pow(double(rows.q[(t * kHeads + h * 2 + g) * kDim + c]) *
                                    HalfToFloat(FloatToHalf(rows.k[(k * kKvHeads + h) * kDim + c])), 2);
  std::vector<uint16_t> order(kDim);
  std::iota(order.begin(), order.end(), uint16_t{0});
  std::sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return scores[a] > scores[b]; });
  order.resize(n);
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<uint16_t> Kept(Subject& subject, size_t h) {
  const auto kept = subject.kivi().kept_channels(0, h);
  return {kept.begin(), kept.end()};
}

void ZeroOtherChannels(Rows& rows, size_t h, const std::vector<uint16_t>& kept) {
  for (size_t i = 0; i < rows.k.size(); ++i)
    if (i / kDim % kKvHeads == h && !std::binary_search(kept.begin(), kept.end(), i % kDim)) rows.k[i] = 0;
}

// By the last queries and the keys that are coded, when the first are; then no more. Keys of the window do not count,
// here by far the largest, nor do queries before the last ones.
TEST(KiviWithThink, ChannelsAreChosenByTheKeysThatAreCoded) {
  Rows rows(400);
  for (size_t t = 96; t < 100; ++t)
    for (size_t i = 0; i < kKvHeads * kDim; ++i) rows.k[t * kKvHeads * kDim + i] *= i % kDim < 16 ? 0.1f : 90.0f;
  for (size_t i = 0; i < kHeads * kDim; ++i) rows.q[67 * kHeads * kDim + i] *= i % kDim < 16 ? 90.0f : 0.1f;
  for (const double pruned : {0.25, 0.5, 0.6}) {
    Subject subject({2, 2, 16, 48, false, pruned});
    subject.Step(rows, 100);
    for (size_t h = 0; h < kKvHeads; ++h)
      EXPECT_EQ(Kept(subject, h), Largest(rows, h, 68, 100, 96, pruned == 0.25 ? 32 : 16)) << pruned;
    if (pruned > 0.3) {
      EXPECT_NE(Kept(subject, 0), Kept(subject, 1));
    }
    const std::vector<uint16_t> chosen = Kept(subject, 1);
    for (const size_t n : {1, 40, 1, 100, 7}) subject.Step(rows, n);
    EXPECT_EQ(Kept(subject, 1), chosen);
    EXPECT_EQ(subject.kivi().coded_keys(0, 1), 240u);
    EXPECT_EQ(subject.kivi().coded_values(0, 1), 249u - 48);
  }
  // Token by token: all queries until then.
  Subject subject({2, 2, 16, 32, false, 0.5});
  for (size_t i = 0; i < 31; ++i) subject.Step(rows, 1);
  EXPECT_TRUE(Kept(subject, 0).empty());
  subject.Step(rows, 1);
  EXPECT_EQ(Kept(subject, 0), Largest(rows, 0, 0, 32, 32, 16));
}

// Codes are those of keys whose other channels are zeros, values those of kivi; and so are scores where the keys are zeros
// there anyway.
TEST(KiviWithThink, EqualsKiviOfZeroedKeys) {
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (const KiviOptions& options : {KiviOptions{2, 2, 16, 32}, {4, 2, 32, 64}, {3, 3, 64, 64, true}}) {
      SCOPED_TRACE(testing::Message() << IsaName(isa) << ", " << options.key_bits << " bits");
      KiviOptions pruned = options;
      pruned.pruned = 0.5;
      Rows rows(500), zeroed = rows;
      Subject think(pruned), kivi(options);
      think.Step(rows, 150);
      for (size_t h = 0; h < kKvHeads; ++h) ZeroOtherChannels(zeroed, h, Kept(think, h));
      kivi.Step(zeroed, 150);
      for (const size_t n : {1, 90, 5, 64}) {
        think.Step(rows, n), kivi.Step(zeroed, n);
        for (size_t h = 0; h < kKvHeads; ++h) {
          const auto [keys, values] = think.Read(h, think.kivi().coded_keys(0, h));
          const auto [want_keys, want_values] = kivi.Read(h, kivi.kivi().coded_keys(0, h));
          EXPECT_EQ(keys, want_keys);
          EXPECT_EQ(values, want_values);
        }
      }
      Subject other(pruned), other_kivi(options);
      for (const size_t n : {150, 1, 2, 1, 3, 4, 40, 1, 9}) {
        const std::vector<float> want = other_kivi.Step(zeroed, n);
        // A score's last bit can turn the rounding of a weight.
        EXPECT_LE(Deviation(other.Step(zeroed, n), {want.begin(), want.end()}), 1e-9) << n;
      }
      EXPECT_EQ(Kept(other, 1), Kept(think, 1));
    }
  }
  ForceIsa(BestIsa());
}

// The bits of f16 rows while nothing is coded, of a prompt always.
TEST(KiviWithThink, NothingIsPrunedBeforeTheWindowIsFull) {
  const Rows rows(200);
  Subject think({4, 4, 32, 64, false, 0.5}), f16(RowType::kF16);
  EXPECT_EQ(think.Step(rows, 60), f16.Step(rows, 60));
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(think.Step(rows, 1), f16.Step(rows, 1));
  EXPECT_NE(think.Step(rows, 1), f16.Step(rows, 1));
  Subject long_think({2, 2, 32, 64, false, 0.5}), long_f16(RowType::kF16);
  EXPECT_EQ(long_think.Step(rows, 190), long_f16.Step(rows, 190));
}

// Once the channels are chosen what is coded depends on the tokens alone; a saved and loaded store, or a copy, goes on in
// the same way, from before the choice and from behind it.
TEST(KiviWithThink, StepsBehindTheChoiceDoNotMatter) {
  const KiviOptions options{2, 4, 16, 48, false, 0.5};
  const Rows rows(300);
  Subject one(options);
  one.Step(rows, 70), one.Step(rows, 200);
  for (const size_t chunk : {1, 7, 50}) {
    Subject other(options);
    other.Step(rows, 70);
    while (other.seen < 270) other.Step(rows, std::min(chunk, 270 - other.seen));
    EXPECT_TRUE(other.Saved() == one.Saved()) << chunk;
  }
  for (const size_t first : {40, 70}) {
    Subject whole(options), copy(options), loaded(options);
    whole.Step(rows, first);
    const std::vector<std::byte> saved = whole.Saved();
    ByteReader in{{}};
    in.rest = saved;
    loaded.store->Load(in, std::vector<size_t>(kKvHeads), first);
    EXPECT_TRUE(in.rest.empty());
    copy.store = whole.store->Clone(copy.counter);
    copy.seen = loaded.seen = first;
    EXPECT_EQ(copy.counter.now, whole.counter.now);
    for (Subject* subject : {&whole, &loaded}) {  // without the staging area of the last step
      subject->store->Reserve({.n_step = 1, .budgets = {}});
      subject->store->CancelStep();
    }
    EXPECT_EQ(loaded.counter.now, whole.counter.now);
    for (const size_t n : {1, 20, 1, 60, 1}) {
      const std::vector<float> want = whole.Step(rows, n);
      EXPECT_EQ(copy.Step(rows, n), want);
      EXPECT_EQ(loaded.Step(rows, n), want);
      EXPECT_EQ(Kept(loaded, 1), Kept(whole, 1));
    }
    EXPECT_TRUE(loaded.Saved() == whole.Saved());
    EXPECT_EQ(loaded.counter.now, whole.counter.now);
  }
}

// Less by the codes, scales and minima of the channels that coded keys lack; more by the lists of those they have.
TEST(KiviWithThink, BytesAreThoseOfTheKeptChannels) {
  const Rows rows(2048);
  for (const size_t bits : {2, 3, 4}) {
    KiviOptions options{bits, 2, 32, 128};
    Subject kivi(options);
    options.pruned = 0.5;
    Subject think(options);
    kivi.Step(rows, 2048), think.Step(rows, 2048);
    const size_t channels = kKvHeads * 16;
    EXPECT_EQ(kivi.counter.now - think.counter.now, 2048 * channels * (bits + 1) / 8 - channels * sizeof(uint16_t));
  }
}

// What left before keys are coded has no say.
TEST(KiviWithThink, KeysThatLeftDoNotCount) {
  Rows rows(64);
  for (size_t t = 16; t < 32; ++t)
    for (size_t i = 0; i < kKvHeads * kDim; ++i) rows.k[t * kKvHeads * kDim + i] *= i % kDim < 20 ? 50.0f : 0.1f;
  Subject subject({2, 2, 16, 16, false, 0.5});
  const std::vector<size_t> budgets(kKvHeads, 48);
  subject.store->Reserve({.n_step = 64, .evicts = true, .is_prompt = true, .budgets = budgets});
  subject.store->Append(0, 0, 64, rows.k.data(), rows.v.data());
  std::vector<float> out(64 * kHeads * kDim), lse(64 * kHeads);
  subject.store->Observe({.queries = rows.q.data(), .n_queries = 64, .out = out.data(), .lse = lse.data()});
  std::vector<Departure> leaving;
  for (uint32_t row = 16; row < 32; ++row) leaving.push_back({row, Fate::kDrop});
  for (size_t h = 0; h < kKvHeads; ++h) EXPECT_EQ(subject.store->Close(0, h, leaving).n_rows, 48u);
  subject.store->EndStep();
  Rows kept = rows;
  kept.k.erase(kept.k.begin() + 16 * kKvHeads * kDim, kept.k.begin() + 32 * kKvHeads * kDim);
  for (size_t h = 0; h < kKvHeads; ++h) EXPECT_EQ(Kept(subject, h), Largest(kept, h, 32, 64, 48, 16));
}

std::shared_ptr<const CacheConfig> Config(const std::string& spec, size_t ctx = 240, std::vector<ProtectedSpan> protect = {}) {
  return CacheConfig::Create(CacheSpec::Parse(spec),
                             CacheShape::Uniform(1, kHeads, kKvHeads, kDim, ctx, {.n_dims = kDim, .frequency_factors = {}}),
                             std::move(protect));
}

void Create(const std::string& spec, size_t head_dim) {
  CacheConfig::Create(CacheSpec::Parse(spec), CacheShape::Uniform(1, kHeads, kKvHeads, head_dim, 240,
                                                                  {.n_dims = head_dim, .frequency_factors = {}}));
}

std::string Refusal(const std::string& spec, size_t head_dim) {
  try {
    Create(spec, head_dim);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(KiviWithThink, RefusesWhatCannotWork) {
  for (const char* spec : {"think+kivi", "full+think(0.4)+kivi(2)", "h2o(50%)+think(0.5)+kivi(4)", "think+kivi(k=4, v=2, window=64, rotate=true)",
                           "think(0.5)+kivi(group=64)+prefill(chunk=64)"})
    EXPECT_EQ(Refusal(spec, 64), "") << spec;
  for (const auto& [spec, why] : {std::pair<const char*, const char*>{"think(window=64)+kivi", "has an exact window itself"},
                                  {"think(generated=full)+kivi", "would keep what is generated whole"},
                                  {"think(0.2)+kivi", "keep a multiple of 16 channels, and this model's heads have 64"},
                                  {"h2o(80)+less+think(0.5)+kivi", "does not give back whole keys"},
                                  {"window(80, positions=cache)+think(0.5)+kivi", "re-numbers positions"}})
    EXPECT_NE(Refusal(spec, 64).find(why), std::string::npos) << spec << ": " << Refusal(spec, 64);
  // A plan counts what is had: 48 of 64 channels, 16 less a key.
  const auto bytes = [](const std::string& spec) {
    return CacheConfig::Create(CacheSpec::Parse(spec), CacheShape::Uniform(3, kHeads, kKvHeads, 64, 4096, {.n_dims = 64, .frequency_factors = {}}))
        ->Plan(2000, 48)
        .bytes_end;
  };
  EXPECT_EQ(bytes("kivi") - bytes("think+kivi"), 3 * kKvHeads * (2048 * 16 * 3 / 8 - 48 * sizeof(uint16_t)));
}

TEST(Kivi, RefusesWhatCannotWork) {
  EXPECT_EQ(CacheSpec::Parse("kivi(4, k=2)").ToString(), "full+kivi(4, k=2)");
  for (const char* spec : {"kivi(5)", "kivi(1)", "kivi(2, group=24)", "kivi(3, group=256)", "kivi(3, rotate=2)", "kivi(2, window=100)", "kivi(2, k=4, v=4, bits=2)", "kivi(4, k=2, v=2)"})
    EXPECT_THROW(CacheSpec::Parse(spec), Error) << spec;
  EXPECT_THROW(Create("kivi(2, group=64)", 80), Error);
  EXPECT_NO_THROW(Create("kivi(2, group=16)", 80));
  EXPECT_NO_THROW(Create("kivi(3, group=128)", 80));
  EXPECT_THROW(Create("kivi(3, group=128)", 72), Error);
  EXPECT_NO_THROW(Config("kivi(k=4, v=3, group=256, window=256)"));
  EXPECT_NO_THROW(Config("h2o(64)+kivi"));
  const auto message = [](const std::string& spec, std::vector<ProtectedSpan> protect) {
    try {
      Config(spec, 240, std::move(protect));
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message("h2o(63)+kivi", {}).find("keeps 63 rows a head, but its codec needs two groups of 32"), std::string::npos);
  // Of four groups one is the window's and one must be free to leave.
  EXPECT_EQ(message("tova(64)+kivi(group=16, window=16)", {{3, 5}, {20, 21}}), "");
  EXPECT_NE(message("tova(64)+kivi(group=16, window=16)", {{15, 17}, {40, 41}}).find("3 groups of 16"), std::string::npos);
}

// Under a budget whole groups leave, by their votes, never of the window; what stays was coded once, from exact rows.
void ExpectGroupsLeaveWhole(const std::string& spec) {
  SCOPED_TRACE(spec);
  const auto config = Config(spec);
  const Rows rows(240);
  SequenceCache cache(config);
  size_t seen = 0;
  std::vector<Position> before;
  const auto step = [&](size_t n, StepKind kind) {
    std::vector<float> out(n * kHeads * kDim);
    cache.BeginStep(n, kind);
    cache.Append(0, &rows.k[seen * kKvHeads * kDim], &rows.v[seen * kKvHeads * kDim]);
    cache.Attend(0, &rows.q[seen * kHeads * kDim], out.data());
    cache.EndStep();
    seen += n;
    const std::vector<Position> held = cache.ResidentPositions(0, 1);
    EXPECT_LE(held.size(), 80u);
    EXPECT_GT(held.size() + 16, std::min<size_t>(80, seen));
    for (size_t i = 0; i < 32 && i < seen; ++i)  // the window
      EXPECT_EQ(ToInt(held[held.size() - 1 - i]), static_cast<int32_t>(seen - 1 - i));
    for (size_t i = 0; i < held.size(); ++i) {
      const size_t p = static_cast<size_t>(ToInt(held[i]));
      EXPECT_EQ(p % 16, i % 16);
    }
  };
  step(130, StepKind::kPrompt);
  for (size_t i = 0; i < 60; ++i) step(1, StepKind::kDecode);
  step(40, StepKind::kPrompt);
  step(3, StepKind::kStream);
  EXPECT_EQ(cache.Stats().tokens_dropped + cache.Stats().tokens_resident, static_cast<double>(seen));
}

TEST(Kivi, GroupsLeaveWhole) {
  ExpectGroupsLeaveWhole("h2o(80)+kivi(2, group=16, window=32)");
  ExpectGroupsLeaveWhole("h2o(80)+kivi(2, group=16, window=32)+think(0.5)");
}

}  // namespace
}  // namespace lesskv
