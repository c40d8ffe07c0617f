// Heads whose budgets differ: what they hold is what their budgets say, and the memory is that of the rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "base/error.h"
#include "cache_harness.h"
#include "kvcache/budget/zigzag.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

constexpr TinyShape kShape{4, 4, 2, 32, 500};

// Heads that attend unlike each other: keys of different sizes.
Text UnevenText(size_t n, uint64_t seed) {
  Text text = RandomText(kShape, n, seed);
  for (size_t l = 0; l < kShape.n_layers; ++l)
    for (size_t t = 0; t < n; ++t)
      for (size_t h = 0; h < kShape.n_kv_heads; ++h)
        for (size_t c = 0; c < kShape.head_dim; ++c)
          text.k[l][(t * kShape.n_kv_heads + h) * kShape.head_dim + c] *= static_cast<float>(l + 1) * (h == 0 ? 0.3f : 1.2f);
  return text;
}

size_t TotalRows(const SequenceCache& cache) {
  size_t n = 0;
  for (const auto& head : AllResident(cache, kShape)) n += head.size();
  return n;
}

// Rows in f16, positions (and a newcomer's), votes.
size_t BytesOfRows(size_t rows, bool votes, bool newcomers) {
  const size_t heads = kShape.n_layers * kShape.n_kv_heads;
  return rows * 4 * kShape.head_dim + (rows + (newcomers ? heads : 0)) * (votes ? 8 : 4);
}

// What rows take where a threshold chooses them: blocks of 128, and what is behind them, by four, beside the other heads' of
// the layer.
size_t RowBytesOfAThreshold(const SequenceCache& cache) {
  size_t rows = 0;
  const auto heads = AllResident(cache, kShape);
  for (size_t first = 0; first < heads.size(); first += kShape.n_kv_heads) {
    size_t tails = 0;
    for (size_t i = first; i < first + kShape.n_kv_heads; ++i) {
      const size_t room = (heads[i].size() + 3) / 4 * 4;
      rows += room / 128 * 128;
      tails += room % 128;
    }
    rows += (tails + 15) / 16 * 16;
  }
  return rows * 4 * kShape.head_dim;
}

TEST(RaggedBudgets, MemoryIsTheSumOfTheBudgets) {
  const Text text = UnevenText(400, 31);
  const TempSidecar sidecar(kShape);
  const size_t heads = kShape.n_layers * kShape.n_kv_heads;
  for (const std::string rest : {"", "+ada", "+ada(0)", "+pyramid(3)", "+pyramid(3)+ada", "+zigzag", "+zigzag+ada", "+split",
                                 "+split(4)", "+pooled"})
    for (const std::string select : {"h2o", "snapkv", "kvzap", "kvzap of a layer"})
      for (const size_t rows : {64, 65, 77, 100, 133}) {
        const bool divides = select.starts_with("kvzap");  // by itself, where nothing else does
        if (rest.empty() ? !divides : select == "kvzap of a layer") continue;
        const std::string name = select.substr(0, select.find(' ')), scope = select == name ? "" : ", scope=layer";
        const std::string spec = name + "(" + std::to_string(rows) + scope + ")" + rest;
        SCOPED_TRACE(spec);
        const bool votes = select != "snapkv";
        const auto config = MakeConfig(spec, kShape, sidecar);
        SequenceCache cache(config);
        Live(cache, text, 0, {300, StepKind::kPrompt});
        std::set<size_t> sizes;
        for (const auto& head : AllResident(cache, kShape)) sizes.insert(head.size());
        EXPECT_GT(sizes.size(), 1u);
        EXPECT_EQ(TotalRows(cache), rows * heads);
        const CacheStats stats = cache.Stats();
        EXPECT_EQ(stats.kv_bytes, BytesOfRows(rows * heads, votes, votes) + stats.kv_bytes_slack);
        EXPECT_LT(static_cast<double>(stats.kv_bytes_slack), 0.05 * static_cast<double>(stats.kv_bytes));
        EXPECT_EQ(config->Plan(300, 0).bytes_end, stats.kv_bytes);
        EXPECT_EQ(config->Plan(300, 0).bytes_slack, stats.kv_bytes_slack);
        // A second prompt divides anew; nothing of the first division stays behind.
        Live(cache, text, 300, {90, StepKind::kPrompt});
        EXPECT_EQ(TotalRows(cache), rows * heads);
        if (votes) {
          EXPECT_EQ(cache.Stats().kv_bytes, stats.kv_bytes);
        }
      }
}

// Heads that grow take four rows at a time behind what the prompt's end left them, beside each other's: less than four rows a
// head are slack. Positions have room for a tile.
TEST(RaggedBudgets, GrowingHeadsTakeFourRowsAtATime) {
  constexpr size_t kRowBytes = 4 * kShape.head_dim, kHeads = kShape.n_layers * kShape.n_kv_heads;
  const Text text = UnevenText(400, 37);
  const TempSidecar sidecar(kShape);
  for (const std::string spec : {"snapkv(64)+zigzag", "snapkv(65)+ada", "snapkv(77)+zigzag+ada", "snapkv(64)+pooled"}) {
    SCOPED_TRACE(spec);
    const auto config = MakeConfig(spec, kShape, sidecar);
    SequenceCache cache(config);
    Live(cache, text, 0, {300, StepKind::kPrompt});
    const size_t rows = TotalRows(cache), slack = cache.Stats().kv_bytes_slack;
    for (size_t n = 1; n <= 40; ++n) {
      Feed(cache, text, 299 + n, 1, StepKind::kDecode);
      const size_t room = (n + 3) / 4 * 4, positions = (n + 15) / 16 * 16;
      const CacheStats stats = cache.Stats();
      ASSERT_EQ(stats.kv_bytes_slack, slack + (room - n) * kHeads * kRowBytes) << n;
      ASSERT_EQ(stats.kv_bytes, (rows + n * kHeads) * kRowBytes + (rows + positions * kHeads) * 4 + stats.kv_bytes_slack) << n;
      ASSERT_EQ(config->Plan(300, n).bytes_end, stats.kv_bytes) << n;
      ASSERT_LT(static_cast<double>(stats.kv_bytes_slack - slack), 0.05 * static_cast<double>(stats.kv_bytes)) << n;
    }
  }
}

// Equal rows a head are rounded up to tiles, and that is told.
TEST(RaggedBudgets, SlackOfEvenBudgetsIsTold) {
  const Text text = UnevenText(300, 32);
  const TempSidecar sidecar(kShape);
  for (const auto& [rows, slack] : {std::pair<size_t, size_t>{64, 0}, {65, 15}, {80, 0}}) {
    SequenceCache cache(MakeConfig("h2o(" + std::to_string(rows) + ")", kShape, sidecar));
    Live(cache, text, 0, {200, StepKind::kPrompt});
    EXPECT_EQ(cache.Stats().kv_bytes_slack, slack * kShape.n_layers * kShape.n_kv_heads * 4 * kShape.head_dim);
  }
}

// Rows that a threshold lets go are freed as each layer ends: a prompt takes what stays and one layer in full, and what
// stays is rounded up to four rows a head and a tile a layer.
TEST(RaggedBudgets, MemoryFollowsWhatAThresholdKeeps) {
  constexpr size_t kRowBytes = 4 * kShape.head_dim, kHeads = kShape.n_layers * kShape.n_kv_heads;
  const Text text = UnevenText(400, 36);
  const TempSidecar sidecar(kShape);
  for (const std::string spec : {"kvzap(threshold=0, window=20)", "kvzap(threshold=3, window=20)", "kvzap(threshold=-3, max=90)"}) {
    SCOPED_TRACE(spec);
    SequenceCache cache(MakeConfig(spec, kShape, sidecar));
    const auto bytes = [&] {
      size_t ledgers = 0;
      for (const auto& head : AllResident(cache, kShape)) ledgers += (head.size() + 15) / 16 * 16 * 8;
      return RowBytesOfAThreshold(cache) + ledgers;
    };
    Live(cache, text, 0, {300, StepKind::kPrompt});
    std::set<size_t> sizes;
    for (const auto& head : AllResident(cache, kShape)) sizes.insert(head.size());
    EXPECT_EQ(sizes.size() > 1, spec.find("max") == std::string::npos);
    const CacheStats stats = cache.Stats();
    EXPECT_EQ(stats.kv_bytes, bytes());
    EXPECT_EQ(stats.kv_bytes_peak, stats.kv_bytes + 304 * kShape.n_kv_heads * kRowBytes);
    EXPECT_EQ(stats.kv_bytes_slack, RowBytesOfAThreshold(cache) - TotalRows(cache) * kRowBytes);
    EXPECT_EQ(stats.tokens_resident, static_cast<double>(TotalRows(cache)) / kHeads);
    EXPECT_EQ(stats.tokens_resident + stats.tokens_dropped, 300);
    // The same while decoding, beside a tile for the new token.
    for (size_t t = 300; t < 340; ++t) {
      Feed(cache, text, t, 1, StepKind::kDecode);
      ASSERT_EQ(cache.Stats().kv_bytes, bytes() + 16 * kShape.n_kv_heads * kRowBytes);
    }
    if (spec.find("max") != std::string::npos) {
      EXPECT_EQ(TotalRows(cache), 90 * kHeads);
    }
  }
}

// While a text streams in, too: nothing that a chunk could have kept stays allocated behind what it kept.
TEST(RaggedBudgets, MemoryFollowsWhatAThresholdKeepsOfAStream) {
  constexpr size_t kRowBytes = 4 * kShape.head_dim;
  const Text text = UnevenText(400, 36);
  const TempSidecar sidecar(kShape);
  SequenceCache cache(MakeConfig("kvzap(threshold=2, window=20)+prefill(chunk=50)", kShape, sidecar));
  for (size_t seen = 0; seen < 400; seen += 50) {
    Live(cache, text, seen, {50, StepKind::kPrompt});
    size_t bytes = 64 * kShape.n_kv_heads * kRowBytes + RowBytesOfAThreshold(cache);  // the next chunk waits in the first
    for (const auto& head : AllResident(cache, kShape)) bytes += (head.size() + 15) / 16 * 16 * 8;
    ASSERT_EQ(cache.Stats().kv_bytes, bytes) << "after " << seen + 50;
  }
  EXPECT_LT(cache.Stats().tokens_resident, 150);
  EXPECT_LE(cache.Stats().kv_bytes_peak, cache.Stats().kv_bytes + kShape.n_kv_heads * 128 * kRowBytes);  // a layer's tails that move
}

// While decoding a head that is over its budget evicts one of its own.
TEST(RaggedBudgets, HeadsKeepTheirBudgetsWhileDecoding) {
  const Text text = UnevenText(200, 33);
  const TempSidecar sidecar(kShape);
  SequenceCache cache(MakeConfig("h2o(24)+ada+less+f32", kShape, sidecar));
  Live(cache, text, 0, {120, StepKind::kPrompt});
  const auto before = AllResident(cache, kShape);
  for (size_t t = 120; t < 150; ++t) Feed(cache, text, t, 1, StepKind::kDecode);
  const auto after = AllResident(cache, kShape);
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(after[i].size(), before[i].size());
    EXPECT_EQ(after[i].back(), 149);
  }
  const CacheStats stats = cache.Stats();
  EXPECT_EQ(stats.tokens_resident + stats.tokens_absorbed, 150);
}

// With beta 1, with one layer, and where all fits, zigzag is its selector alone.
TEST(RaggedBudgets, ZigzagThatDividesNothingIsTheSelector) {
  const Text text = UnevenText(200, 35);
  const TempSidecar sidecar(kShape);
  const auto same = [&](const TinyShape& shape, const Text& of, const std::string& a, const std::string& b) {
    SCOPED_TRACE(a + ", " + b);
    SequenceCache one(MakeConfig(a, shape, sidecar)), other(MakeConfig(b, shape, sidecar));
    EXPECT_EQ(Live(one, of, 0, {120, StepKind::kPrompt}), Live(other, of, 0, {120, StepKind::kPrompt}));
    for (size_t t = 120; t < 125; ++t) EXPECT_EQ(Feed(one, of, t, 1, StepKind::kDecode), Feed(other, of, t, 1, StepKind::kDecode));
    EXPECT_EQ(AllResident(one, shape), AllResident(other, shape));
    return std::pair(one.Stats().kv_bytes, other.Stats().kv_bytes);
  };
  const auto [zigzag, snapkv] = same(kShape, text, "h2o(48)+zigzag(1)", "h2o(48)");
  EXPECT_EQ(zigzag, snapkv);
  same(kShape, text, "snapkv(48)+zigzag(1)", "snapkv(48)");
  same(kShape, text, "snapkv(130)+zigzag+f32", "full+f32");
  // More rows than the context has tokens: as many as it has.
  for (const char* spec : {"snapkv(900)+zigzag+f32", "h2o(900)+zigzag+ada+f32", "h2o(501)+pooled+f32", "tova(900)+zigzag+f32"})
    same(kShape, text, spec, "full+f32");
  TinyShape shape = kShape;
  shape.n_layers = 1;
  Text layer = text;
  for (auto* x : {&layer.q, &layer.k, &layer.v}) x->resize(1);
  same(shape, layer, "snapkv(48)+zigzag", "snapkv(48)");
  // It divides at all: the layers of the uneven text differ.
  SequenceCache cache(MakeConfig("snapkv(48)+zigzag", kShape, sidecar));
  Live(cache, text, 0, {120, StepKind::kPrompt});
  const auto held = AllResident(cache, kShape);
  EXPECT_NE(held[0].size(), held[2 * (kShape.n_layers - 1)].size());
  EXPECT_EQ(held[0].size(), held[1].size());
}

// Keys that hold 0.9 of what the last 32 queries give, mean over the query heads: attention by its definition, in double.
double NeedOf(const TinyShape& shape, const Text& text, size_t layer, size_t n) {
  const size_t d = shape.head_dim, first = n - std::min<size_t>(n, 32);
  double keys = 0;
  for (size_t head = 0; head < shape.n_heads; ++head) {
    std::vector<double> received(n);
    std::vector<std::vector<double>> k(n);
    for (size_t t = 0; t < n; ++t) k[t] = Rotated(shape, &text.k[layer][(t * shape.n_kv_heads + head / shape.group()) * d], t);
    for (size_t i = first; i < n; ++i) {
      const std::vector<double> q = Rotated(shape, &text.q[layer][(i * shape.n_heads + head) * d], i);
      std::vector<double> weight(i + 1);
      double sum = 0;
      for (size_t t = 0; t <= i; ++t)
        sum += weight[t] = std::exp(std::inner_product(q.begin(), q.end(), k[t].begin(), 0.0) / std::sqrt(static_cast<double>(d)));
      for (size_t t = 0; t <= i; ++t) received[t] += weight[t] / sum / static_cast<double>(n - first);
    }
    std::sort(received.rbegin(), received.rend());
    double held = 0;
    for (size_t t = 0; held < 0.9 - 1e-6; ++t, ++keys) held += received[t];
  }
  return keys / static_cast<double>(shape.n_heads);
}

// Budgets come from what really was attended, also where the last queries cross tiles.
TEST(RaggedBudgets, ZigzagMeasuresTheLastQueriesOfEachQueryHead) {
  TinyShape shape = kShape;
  shape.ctx = 1200;
  Text text = RandomText(shape, 1100, 38, 0.6f);
  for (size_t l = 0; l < shape.n_layers; ++l)
    for (float& x : text.k[l]) x *= 0.5f * std::pow(3.0f, static_cast<float>(l));
  const TempSidecar sidecar(shape);
  for (const auto& [rows, n] : {std::pair<size_t, size_t>{48, 300}, {48, 512}, {48, 530}, {100, 1100}}) {
    SCOPED_TRACE(n);
    std::vector<double> needs;
    for (size_t l = 0; l < shape.n_layers; ++l) needs.push_back(NeedOf(shape, text, l, n));
    const std::vector<size_t> want = ZigzagRows(needs, rows, std::min<size_t>(32, rows / 2), 0.2, n);
    ASSERT_GT(want[0], want[3] + 4);
    SequenceCache cache(MakeConfig("snapkv(" + std::to_string(rows) + ")+zigzag+f32", shape, sidecar));
    Live(cache, text, 0, {n, StepKind::kPrompt});
    for (size_t l = 0; l < shape.n_layers; ++l)
      EXPECT_NEAR(static_cast<double>(Resident(cache, l, 0).size()), static_cast<double>(want[l]), 1) << "layer " << l;
  }
}

// A short prompt behind a long one divides what is there: as many rows leave as tokens came, none beside them. Budgets that
// follow the text's length alone (split) may move by a row a head.
TEST(RaggedBudgets, AShortSecondPromptLosesNothingElse) {
  const Text text = UnevenText(400, 31);
  const TempSidecar sidecar(kShape);
  const size_t heads = kShape.n_layers * kShape.n_kv_heads;
  for (const std::string spec : {"h2o(64)+zigzag", "snapkv(64)+zigzag", "h2o(64)+zigzag(0)", "tova(64)+zigzag", "window(64)+zigzag",
                                 "snapkv(64)+zigzag+ada", "h2o(64)+zigzag+ada(0.5)", "h2o(64)+ada", "h2o(64)+pooled",
                                 "snapkv(64)+pooled(0.5)", "h2o(64)+pyramid(3)+ada", "h2o(64)+split+ada", "h2o(64)+split"})
    for (const size_t n : {1, 3})
      for (const size_t decoded : {0, 10}) {
        SCOPED_TRACE(spec + ", " + std::to_string(n) + " tokens after " + std::to_string(decoded));
        SequenceCache cache(MakeConfig(spec, kShape, sidecar));
        Live(cache, text, 0, {300, StepKind::kPrompt});
        EXPECT_EQ(TotalRows(cache), 64 * heads);
        for (size_t t = 300; t < 300 + decoded; ++t) Feed(cache, text, t, 1, StepKind::kDecode);
        Live(cache, text, 300 + decoded, {n, StepKind::kPrompt});
        const size_t moved = spec.find("split") != std::string::npos ? heads : 0;
        EXPECT_GE(TotalRows(cache) + moved, 64 * heads);
        EXPECT_LE(TotalRows(cache), 64 * heads);
      }
}

// The budgets of a prompt outlive saving: decoding goes on with them.
TEST(RaggedBudgets, RestoredBudgetsStay) {
  const Text text = UnevenText(200, 34);
  const TempSidecar sidecar(kShape);
  for (const std::string spec : {"h2o(24)+ada", "h2o(24)+pyramid", "snapkv(24)+pyramid+ada", "tova(24)+zigzag",
                                 "window(24)+zigzag+less", "h2o(24)+zigzag+ada+q8", "window(24)+split(6)",
                                 "h2o(24)+split(6)"}) {
    SCOPED_TRACE(spec);
    SequenceCache cache(MakeConfig(spec, kShape, sidecar)), restored(MakeConfig(spec, kShape, sidecar));
    Live(cache, text, 0, {60, StepKind::kPrompt});
    const auto bytes = cache.Serialize();
    restored.Restore(bytes.data(), bytes.size());
    EXPECT_EQ(restored.Stats().kv_bytes, cache.Stats().kv_bytes);
    for (size_t t = 60; t < 70; ++t)
      EXPECT_EQ(Feed(restored, text, t, 1, StepKind::kDecode), Feed(cache, text, t, 1, StepKind::kDecode)) << spec;
    EXPECT_EQ(AllResident(restored, kShape), AllResident(cache, kShape));
  }
}

}  // namespace
}  // namespace lesskv
