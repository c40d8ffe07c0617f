// A filled cache is in a state that real steps could have left it in: its bytes are the plan's, its rows keep the rules,
// and it goes on.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "base/rng.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

constexpr size_t kLayers = 2, kHeads = 4, kKvHeads = 2, kDim = 32, kCtx = 400;

std::shared_ptr<const CacheConfig> Config(const std::string& spec, std::vector<ProtectedSpan> protect = {}) {
  const CacheShape shape = CacheShape::Uniform(kLayers, kHeads, kKvHeads, kDim, kCtx, {.n_dims = kDim});
  return CacheConfig::Create(CacheSpec::Parse(spec), shape, std::move(protect));
}

void Decode(SequenceCache& cache) {
  std::vector<float> kv(kKvHeads * kDim, 0.5f), q(kHeads * kDim, 0.5f), out(q.size());
  cache.BeginStep(1, StepKind::kDecode);
  for (size_t layer = 0; layer < kLayers; ++layer) {
    cache.Append(layer, kv.data(), kv.data());
    cache.Attend(layer, q.data(), out.data());
  }
  cache.EndStep();
}

const char* const kSpecs[] = {"full",
                              "q8",
                              "cluster(64, skip=1)",
                              "cluster(64, skip=0)+prefill(chunk=48)",
                              "h2o(10%)",
                              "h2o(20%)+pyramid",
                              "h2o(10%)+prefill(chunk=48)",
                              "h2o(150)+prefill(chunk=16)",
                              "tova(50)",
                              "window(40, sinks=4)",
                              "window(40, sinks=4, positions=cache)",
                              "snapkv(40, window=8)",
                              "snapkv(40, window=8)+q4",
                              "snapkv(40, window=8)+pyramid",
                              "snapkv(40, window=8)+pyramid+prefill(chunk=48)",
                              "snapkv(350, window=8)+pyramid+prefill(chunk=30)"};

TEST(FillRandom, BytesAndRowsAreThePlans) {
  for (const char* spec : kSpecs) {
    const auto config = Config(spec);
    for (const size_t n : {1, 17, 39, 300, 399}) {
      SCOPED_TRACE(fmt::format("{} at {}", spec, n));
      SequenceCache cache(config);
      cache.FillRandom(n, 1);
      const CachePlan after = config->Plan(n, 0), end = config->Plan(n, 1);
      EXPECT_EQ(cache.Stats().tokens_seen, n);
      EXPECT_EQ(cache.Stats().kv_bytes, after.bytes_after_prompt);
      EXPECT_LE(cache.Stats().kv_bytes_peak, after.bytes_peak);
      EXPECT_DOUBLE_EQ(cache.Stats().tokens_resident, after.rows_end);
      Decode(cache);
      EXPECT_EQ(cache.Stats().tokens_seen, n + 1);
      EXPECT_EQ(cache.Stats().kv_bytes, end.bytes_end);
      EXPECT_DOUBLE_EQ(cache.Stats().tokens_resident, end.rows_end);
    }
  }
}

// Budgets are what may stay, not what a short prompt has: where rows pile up behind them, room comes with the rows.
TEST(Plan, PackedBudgetsOfAShortPromptTakeNoMoreThanItsRows) {
  const size_t full = Config("full")->Plan(60, 5).bytes_end;
  const size_t tiles = kLayers * kKvHeads * kTileRows * 2 * kDim * sizeof(uint16_t);
  for (const char* spec : {"snapkv(200, window=8)", "snapkv(200, window=8)+pyramid"})
    EXPECT_LE(Config(spec)->Plan(60, 5).bytes_end, full + 2 * tiles) << spec;
}

// Two prompts that are together shorter than the budgets: the second finds room behind the first, and all is read.
TEST(Plan, PackedBudgetsHaveRoomForTheRowsOfTwoPrompts) {
  const auto outputs = [](const char* spec) {
    SequenceCache cache(Config(spec));
    Rng rng(3);
    std::vector<float> all;
    for (const size_t n : {30, 45}) {
      std::vector<float> kv(n * kKvHeads * kDim), q(n * kHeads * kDim), out(q.size());
      cache.BeginStep(n, StepKind::kPrompt);
      for (size_t layer = 0; layer < kLayers; ++layer) {
        for (float& x : kv) x = rng.Normal();
        for (float& x : q) x = rng.Normal();
        cache.Append(layer, kv.data(), kv.data());
        cache.Attend(layer, q.data(), out.data());
        all.insert(all.end(), out.begin(), out.end());
      }
      cache.EndStep();
    }
    EXPECT_EQ(cache.Stats().tokens_resident, 75) << spec;
    return all;
  };
  const std::vector<float> want = outputs("full"), found = outputs("snapkv(200, window=8)+pyramid");
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(found[i], want[i], 1e-5) << i;
}

TEST(FillRandom, ProtectedTokensAndWindowsStay) {
  const auto config = Config("h2o(40)", {{10, 15}});
  SequenceCache cache(config);
  cache.FillRandom(300, 1);
  std::set<std::vector<Position>> different;
  for (size_t layer = 0; layer < kLayers; ++layer) {
    for (size_t h = 0; h < kKvHeads; ++h) {
      const std::vector<Position> held = cache.ResidentPositions(layer, h);
      ASSERT_EQ(held.size(), 40u);
      EXPECT_EQ(std::adjacent_find(held.begin(), held.end()), held.end());
      const auto has = [&](int p) { return std::binary_search(held.begin(), held.end(), Position(p)); };
      for (int p = 10; p < 15; ++p) EXPECT_TRUE(has(p)) << p;
      for (int p = 280; p < 300; ++p) EXPECT_TRUE(has(p)) << p;
      different.insert(held);
    }
  }
  EXPECT_EQ(different.size(), kLayers * kKvHeads);
}

TEST(FillRandom, AWindowHoldsItsSinksAndTheNewest) {
  SequenceCache cache(Config("window(12, sinks=4)"));
  cache.FillRandom(300, 1);
  std::vector<int> held;
  for (const Position p : cache.ResidentPositions(1, 1)) held.push_back(ToInt(p));
  EXPECT_EQ(held, (std::vector<int>{0, 1, 2, 3, 292, 293, 294, 295, 296, 297, 298, 299}));
}

TEST(FillRandom, SavedAndRestoredItGoesOnTheSame) {
  for (const char* spec : kSpecs) {
    SCOPED_TRACE(spec);
    const auto config = Config(spec);
    SequenceCache cache(config), restored(config);
    cache.FillRandom(300, 1);
    const std::vector<std::byte> saved = cache.Serialize();
    restored.Restore(saved.data(), saved.size());
    Decode(cache);
    Decode(restored);
    EXPECT_EQ(cache.Serialize(), restored.Serialize());
  }
}

}  // namespace
}  // namespace lesskv
