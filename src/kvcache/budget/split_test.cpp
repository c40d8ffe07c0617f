#include "kvcache/budget/split.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "kvcache/cache_config.h"
#include "kvcache/residual/feature_maps.h"

namespace lesskv {
namespace {

using Rows = std::vector<size_t>;

SidecarBudgets Budgets(std::vector<size_t> n_kv_heads, std::vector<float> ratios, std::vector<float> shares) {
  return {std::move(n_kv_heads), std::move(ratios), std::move(shares), 0};
}

BudgetRequest Request(std::vector<size_t> n_kv_heads, size_t rows, size_t n_tokens) {
  BudgetRequest request;
  request.n_kv_heads = std::move(n_kv_heads);
  request.rows = rows;
  request.n_tokens = n_tokens;
  return request;
}

TEST(Split, SharesLieOnLines) {
  const SidecarBudgets b = Budgets({2}, {.1f, .3f}, {.2f, .0f, .4f, .2f});
  const auto expect = [&](double ratio, double first, double second) {
    const std::vector<double> shares = SharesAt(b, ratio);
    EXPECT_NEAR(shares[0], first, 1e-6) << ratio;
    EXPECT_NEAR(shares[1], second, 1e-6) << ratio;
  };
  expect(0, 0, 0);
  expect(.05, .1, 0);
  expect(.1, .2, 0);
  expect(.2, .3, .1);
  expect(.3, .4, .2);
  expect(.65, .7, .6);
  expect(1, 1, 1);
}

TEST(Split, RowsByHand) {
  // Half of 100 rows are every head's; 2 * 50 go by shares 3 : 1.
  const SidecarBudgets b = Budgets({1, 1}, {.5f}, {.75f, .25f});
  EXPECT_EQ(SplitRows(b, Request({1, 1}, 100, 1000), 50), (Rows{125, 75}));
  EXPECT_EQ(SplitRows(b, Request({1, 1}, 100, 1000), 1000), (Rows{125, 75}));
  EXPECT_EQ(SplitRows(b, Request({1, 1}, 100, 1000), 0), (Rows{150, 50}));
  // Near the whole text the shares near one another: at 5/6 they are 11/12 and 9/12.
  EXPECT_EQ(SplitRows(b, Request({1, 1}, 100, 120), 0), (Rows{110, 90}));
  EXPECT_EQ(SplitRows(b, Request({1, 1}, 100, 100), 0), (Rows{100, 100}));
  BudgetRequest tight = Request({1, 1}, 100, 1000);
  tight.smallest = 90;
  EXPECT_EQ(SplitRows(b, tight, 0), (Rows{105, 95}));
}

TEST(Split, HeadsOfALayerStayEqualWhereTheyMust) {
  const SidecarBudgets b = Budgets({2, 2}, {.5f}, {.6f, .3f, .3f, .1f});
  // A row each, and of 396 others 182.8, 91.4, 91.4 and 30.5; of layers 198 others, 137.1 and 60.9.
  EXPECT_EQ(SplitRows(b, Request({2, 2}, 100, 10000), 0), (Rows{184, 92, 92, 32}));
  BudgetRequest request = Request({2, 2}, 100, 10000);
  request.one_budget_a_layer = true;
  EXPECT_EQ(SplitRows(b, request, 0), (Rows{138, 138, 62, 62}));
}

TEST(Split, SumsAreExactWithinBounds) {
  Rng rng(9);
  for (int i = 0; i < 3000; ++i) {
    const size_t layers = 1 + rng.Below(4), heads = 1 + rng.Below(3), n_tokens = 3 + rng.Below(400);
    SidecarBudgets b = Budgets(Rows(layers, heads), {.05f, .2f, .6f}, {});
    for (size_t j = 0; j < 3 * layers * heads; ++j) b.shares.push_back(rng.Below(4) == 0 ? 0 : rng.UniformFloat(0, 1));
    BudgetRequest request = Request(Rows(layers, heads), 1 + rng.Below(n_tokens), n_tokens);
    request.smallest = 1 + rng.Below(request.rows);
    request.one_budget_a_layer = rng.Below(2) == 0;
    const Rows rows = SplitRows(b, request, rng.Below(50));
    ASSERT_EQ(std::accumulate(rows.begin(), rows.end(), size_t{0}), layers * heads * request.rows);
    for (size_t h = 0; h < rows.size(); ++h) {
      ASSERT_GE(rows[h], request.smallest);
      ASSERT_LE(rows[h], n_tokens);
      if (request.one_budget_a_layer) {
        ASSERT_EQ(rows[h], rows[h / heads * heads]);
      }
    }
  }
}

class SplitFile : public testing::Test {
 protected:
  void SetUp() override {
    sidecar_.model_fingerprint = 0x1234;
    sidecar_.budgets = Budgets({2, 2}, {.1f}, {.3f, .1f, 0, 0});
    path_ = testing::TempDir() + "/" + testing::UnitTest::GetInstance()->current_test_info()->name() + ".less.gguf";
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::string Refusal(ErrorCode code, uint64_t fingerprint, size_t layers) {
    WriteSidecar(path_, sidecar_);
    try {
      Config("window(20)+split", fingerprint, layers);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "not refused";
    return {};
  }
  std::shared_ptr<const CacheConfig> Config(const std::string& spec, uint64_t fingerprint, size_t layers) {
    const CacheShape shape = CacheShape::Uniform(layers, 2, 2, 8, 200, {.n_dims = 8, .frequency_factors = {}});
    return CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, {path_, fingerprint, 0});
  }

  Sidecar sidecar_;
  std::string path_;
};

TEST_F(SplitFile, BudgetsAloneAreASidecar) {
  WriteSidecar(path_, sidecar_);
  const Sidecar read = ReadSidecar(path_);
  EXPECT_EQ(read.budgets, sidecar_.budgets);
  EXPECT_FALSE(read.has_maps());
  const auto config = Config("window(20)+split(0)", 0x1234, 2);
  EXPECT_EQ(config->Budgets(200), (Rows{50, 20, 5, 5})) << "of 80 rows 60 go by shares, 5 are the least of a window";
  EXPECT_EQ(config->sidecar_bytes(), 5 * sizeof(float));
  EXPECT_NE(config->spec_text().find("sidecar=\""), std::string::npos);
  EXPECT_THROW(Config("window(20)+less", 0x1234, 2), Error);  // it holds no maps
}

TEST_F(SplitFile, MapsAndBudgetsShareAFile) {
  SidecarShape shape;
  shape.n_layers = 2, shape.n_heads = 2, shape.n_kv_heads = 2, shape.head_dim = 8, shape.rank = 2, shape.hidden = 4;
  Sidecar both = InitialSidecar(shape, 3);
  WriteSidecar(path_, both);
  EXPECT_TRUE(ReadSidecar(path_).budgets.empty());
  EXPECT_THROW(Config("window(20)+split", 0, 2), Error);  // it holds no budgets
  both.budgets = sidecar_.budgets;
  WriteSidecar(path_, both);
  const Sidecar read = ReadSidecar(path_);
  EXPECT_EQ(read.budgets, both.budgets);
  EXPECT_EQ(read.shape, shape);
  EXPECT_NO_THROW(Config("window(20)+split+less", 0, 2));
}

TEST_F(SplitFile, WrongFilesAreRefused) {
  EXPECT_NE(Refusal(ErrorCode::kMismatch, 0x9999, 2).find("belongs to the model"), std::string::npos);
  EXPECT_NE(Refusal(ErrorCode::kMismatch, 0x1234, 3).find("4 heads in 2 layers"), std::string::npos);
  sidecar_.budgets.shares[1] = 1.5f;
  EXPECT_NE(Refusal(ErrorCode::kBadFile, 0x1234, 2).find("between 0 and 1"), std::string::npos);
  sidecar_.budgets = Budgets({2, 2}, {.4f, .1f}, std::vector<float>(8, .1f));
  EXPECT_NE(Refusal(ErrorCode::kBadFile, 0x1234, 2).find("must ascend"), std::string::npos);
  std::filesystem::remove(path_);
  EXPECT_THROW(Config("window(20)+split", 0x1234, 2), Error);
}

}  // namespace
}  // namespace lesskv
