// The matrices' defining property, on random covariances, and from text to a sidecar on the bundled model.
#include "train/train_balance.h"

#include <gtest/gtest.h>

#include <Eigen/LU>
#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "base/rng.h"
#include "kvcache/sequence_cache.h"

namespace lesskv::train {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Matrix RandomCovariance(Eigen::Index d, Rng& rng) {
  Matrix x(d, d);
  for (Eigen::Index i = 0; i < d * d; ++i) x.data()[i] = rng.Normal() * std::pow(0.8, static_cast<double>(i % d));
  return x.transpose() * x;
}

TEST(TrainBalance, BothCovariancesBecomeOneDiagonal) {
  Rng rng(3);
  for (const Eigen::Index d : {16, 48}) {
    const Matrix queries = RandomCovariance(d, rng), keys = RandomCovariance(d, rng);
    const auto n = static_cast<size_t>(d);
    const std::vector<double> b = BalancingMatrix(n, {queries.data(), n * n}, {keys.data(), n * n});
    const Matrix matrix = Eigen::Map<const Matrix>(b.data(), d, d), inverse = matrix.inverse();
    const Matrix noisy = queries + Matrix::Identity(d, d) * (0.01 * queries.trace() / static_cast<double>(d));
    const Matrix of_keys = matrix.transpose() * keys * matrix, of_queries = inverse * noisy * inverse.transpose();
    const double ratio = of_queries(0, 0) / of_keys(0, 0), largest = of_keys(0, 0);
    for (Eigen::Index i = 0; i < d; ++i)
      for (Eigen::Index j = 0; j < d; ++j) {
        if (i != j) {
          EXPECT_NEAR(of_keys(i, j) / largest, 0, 1e-8);
          EXPECT_NEAR(of_queries(i, j) / largest / ratio, 0, 1e-8);
        } else if (of_keys(i, i) > 2e-3 * largest) {  // none that is held up to the least power
          EXPECT_NEAR(of_queries(i, i) / of_keys(i, i) / ratio, 1, 1e-6) << i;
        }
        if (i == j && i > 0) {
          EXPECT_LE(of_keys(i, i), of_keys(i - 1, i - 1) * (1 + 1e-9));
        }
      }
    EXPECT_DOUBLE_EQ(matrix.cwiseAbs().maxCoeff(), 1);
  }
  // Keys and queries that are nothing: some matrix that can be inverted.
  const std::vector<double> nothing(16 * 16), b = BalancingMatrix(16, nothing, nothing);
  EXPECT_GT(std::fabs(Eigen::Map<const Matrix>(b.data(), 16, 16).determinant()), 0);
}

// What is the same in all keys of a group counts nothing, what differs between groups neither; the rest in full.
TEST(TrainBalance, MeansOfGroupsDoNotCount) {
  constexpr size_t kDim = 16, kRows = 3 * kBalanceGroup, kStride = 20;
  Rng rng(9);
  std::vector<float> same(kRows * kStride, 1e9f), keys = same;
  for (size_t i = 0; i < kRows; ++i)
    for (size_t c = 0; c < kDim; ++c) {
      const float mean = static_cast<float>(i / kBalanceGroup + 2 * c);
      same[i * kStride + c] = mean;
      keys[i * kStride + c] = mean + rng.Normal();
    }
  std::vector<double> nothing(kDim * kDim), sums(kDim * kDim);
  AddWithoutGroupMeans(same.data(), kRows, kDim, kStride, nothing);
  AddWithoutGroupMeans(keys.data(), kRows, kDim, kStride, sums);
  for (size_t i = 0; i < kDim * kDim; ++i) EXPECT_NEAR(nothing[i], 0, 1e-3);
  for (size_t c = 0; c < kDim; ++c) EXPECT_NEAR(sums[c * (kDim + 1)] / static_cast<double>(kRows - 3), 1, 0.4);
}

class TrainBalanceTest : public testing::Test {
 protected:
  void SetUp() override {
    model_ = Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
    tokenizer_ = Tokenizer::Create(LoadVocabulary(model_->file()));
    engine_ = std::make_unique<Engine>(model_, EngineOptions{.compute = ComputeChoice::kF32});
    options_.texts = {LESSKV_SOURCE_DIR "/docs/kv-cache.md", LESSKV_SOURCE_DIR "/docs/less.md"};
    options_.sequences = 4;
    options_.tokens = 256;
    options_.seed = 5;
  }
  TrainBalanceReport Train(const std::atomic<bool>* stop = nullptr) {
    return TrainBalance(*engine_, *tokenizer_, options_, [](double) {}, stop);
  }
  std::string Refusal() {
    try {
      Train();
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<Engine> engine_;
  TrainBalanceOptions options_;
};

TEST_F(TrainBalanceTest, MatricesAreRepeatableAndServeTheCodec) {
  const TrainBalanceReport report = Train();
  EXPECT_TRUE(report.balance == Train().balance);
  const CacheShape shape = model_->MakeCacheShape(512, ComputeType::kF32);
  ASSERT_EQ(report.error.size(), 3u);
  for (const std::vector<double>& bits : report.error) {
    ASSERT_EQ(bits.size(), shape.n_layers());
    for (const double error : bits) {
      EXPECT_GT(error, 0);
      EXPECT_LT(error, 0.9);
    }
  }
  EXPECT_EQ(report.balance.positions, model_->config().train_ctx);
  EXPECT_EQ(report.balance.tokens, 3 * 256u);
  options_.sequences = 3;  // of which none judges
  EXPECT_EQ(Train().balance.keys, report.balance.keys) << "the fourth text teaches nothing";

  Sidecar sidecar = ReadSidecar(LESSKV_SOURCE_DIR "/models/lesskv-small.less.gguf");
  const auto maps = sidecar.layers[0].phi.w1;
  const std::string path = testing::TempDir() + "/train_balance.less.gguf";
  const SidecarSource source{path, model_->fingerprint(), model_->identity()};
  const auto refusal = [&](const char* spec) -> std::string {
    try {
      CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, source);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  sidecar.balance = {};
  WriteSidecar(path, sidecar);
  EXPECT_NE(refusal("full+balanced(2)").find("holds no matrices for keys (train them with 'lesskv train balance')"), std::string::npos);
  sidecar.balance = report.balance;
  WriteSidecar(path, sidecar);
  EXPECT_TRUE(ReadSidecar(path).balance == report.balance);
  EXPECT_EQ(ReadSidecar(path).layers[0].phi.w1, maps);
  for (const char* spec : {"full+balanced", "h2o(256)+balanced(k=3, v=2)+less"}) {
    const auto config = CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, source);
    EXPECT_GT(config->sidecar_bytes(), 0u);
    EXPECT_NE(config->spec_text().find("sidecar="), std::string::npos) << config->spec_text();
  }
  sidecar.balance.n_kv_heads.pop_back();
  sidecar.balance.keys.resize(sidecar.balance.keys.size() / shape.n_layers() * (shape.n_layers() - 1));
  WriteSidecar(path, sidecar);
  EXPECT_NE(refusal("full+balanced").find("layers, but the model has"), std::string::npos);
  EXPECT_NE(refusal("window(64, positions=cache)+balanced").find("rotated"), std::string::npos);
  EXPECT_NE(refusal("full+balanced(bits=4, k=3, v=3)").find("balanced's bits"), std::string::npos);
  std::filesystem::remove(path);
}

// Matrices for a longer context are others: one basis for many places gains less at each than a basis of that place.
TEST_F(TrainBalanceTest, MatricesAreForAllPositions) {
  const TrainBalanceReport long_context = Train();
  options_.positions = options_.tokens;
  const TrainBalanceReport short_context = Train();
  EXPECT_NE(long_context.balance.keys, short_context.balance.keys);
  EXPECT_EQ(short_context.balance.positions, 256u);
  double of_long = 0, of_short = 0;
  for (size_t l = 0; l < long_context.error[0].size(); ++l) of_long += long_context.error[0][l], of_short += short_context.error[0][l];
  EXPECT_GT(of_long, of_short);
}

TEST_F(TrainBalanceTest, RefusesWhatMakesNoSense) {
  const TrainBalanceOptions good = options_;
  options_.tokens = 100;
  EXPECT_NE(Refusal().find("--tokens must be at least 128"), std::string::npos);
  options_ = good;
  options_.positions = 200;
  EXPECT_NE(Refusal().find("--positions must be at least --tokens"), std::string::npos);
  options_ = good;
  options_.sequences = 0;
  EXPECT_NE(Refusal().find("--sequences"), std::string::npos);
  options_ = good;
  options_.texts = {};
  EXPECT_NE(Refusal(), "accepted");
  options_ = good;
  const std::atomic<bool> stop = true;
  EXPECT_THROW(Train(&stop), Error);
}

}  // namespace
}  // namespace lesskv::train
