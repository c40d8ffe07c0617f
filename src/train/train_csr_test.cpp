// From text to dictionaries in a sidecar, on the bundled model, and what is refused.
#include "train/train_csr.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "base/error.h"
#include "kernels/quants/half.h"
#include "kvcache/sequence_cache.h"

namespace lesskv::train {
namespace {

class TrainCsrTest : public testing::Test {
 protected:
  void SetUp() override {
    model_ = Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
    tokenizer_ = Tokenizer::Create(LoadVocabulary(model_->file()));
    engine_ = std::make_unique<Engine>(model_, EngineOptions{.compute = ComputeChoice::kF32});
    options_.texts = {LESSKV_SOURCE_DIR "/docs/kv-cache.md", LESSKV_SOURCE_DIR "/docs/less.md"};
    options_.sequences = 3;
    options_.tokens = 128;
    options_.samples = 300;
    options_.atoms.atoms = 64;
    options_.atoms.pairs = 4;
    options_.atoms.rounds = 3;
    options_.atoms.epochs = 2;
    options_.atoms.seed = 5;
  }
  TrainCsrReport Train() {
    return TrainCsr(*engine_, *tokenizer_, options_, [](std::string_view, double) {});
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
  TrainCsrOptions options_;
};

TEST_F(TrainCsrTest, DictionariesAreRepeatableAndKeptBesideOthers) {
  const TrainCsrReport report = Train();
  const SidecarDictionaries& d = report.dictionaries;
  EXPECT_TRUE(d == Train().dictionaries);
  const CacheShape shape = model_->MakeCacheShape(256, ComputeType::kF32);
  ASSERT_EQ(d.key_of.size(), shape.n_layers());
  EXPECT_EQ(d.keys.size(), shape.n_layers() * 64 * shape.layers[0].head_dim);
  EXPECT_EQ(d.values.size(), shape.n_layers() * 64 * shape.layers[0].head_dim / 2);
  for (const auto& side : {report.keys, report.values})
    for (const TrainedAtoms& t : side) {
      EXPECT_GT(t.error, 0);
      EXPECT_LT(t.error, 0.8);
    }

  Sidecar sidecar = ReadSidecar(LESSKV_SOURCE_DIR "/models/lesskv-small.less.gguf");
  const auto maps = sidecar.layers[0].phi.w1;
  sidecar.dictionaries = d;
  const std::string path = testing::TempDir() + "/train_csr.less.gguf";
  WriteSidecar(path, sidecar);
  const Sidecar read = ReadSidecar(path);
  EXPECT_TRUE(read.dictionaries == d);
  EXPECT_EQ(read.layers[0].phi.w1, maps);
  for (const char* spec : {"full+csr(4)", "h2o(24)+csr(4, atoms=40)+less"}) {
    const auto config = CacheConfig::Create(CacheSpec::Parse(spec), shape, {}, {path, model_->fingerprint(), model_->identity()});
    EXPECT_GT(config->sidecar_bytes(), 0u);
    EXPECT_NE(config->spec_text().find("csr(4, sidecar="), std::string::npos) << config->spec_text();
  }
  std::filesystem::remove(path);
}

TEST_F(TrainCsrTest, NeighbouringLayersMayShare) {
  options_.group = 2;
  const SidecarDictionaries d = Train().dictionaries;
  for (uint32_t l = 0; l < d.key_of.size(); ++l) EXPECT_EQ(d.key_of[l], l / 2);
  EXPECT_EQ(d.keys.size() / d.n_atoms / d.head_dim, (d.key_of.size() + 1) / 2);
}

TEST_F(TrainCsrTest, RefusesWhatCannotWork) {
  const TrainCsrOptions good = options_;
  options_.atoms.pairs = 5;
  EXPECT_NE(Refusal().find("must be even"), std::string::npos);
  options_ = good;
  options_.samples = 70;
  EXPECT_NE(Refusal().find("--samples must be at least 5/4 of --atoms"), std::string::npos);
  options_ = good;
  options_.texts = {"nowhere.txt"};
  EXPECT_NE(Refusal().find("nowhere.txt"), std::string::npos);
  options_ = good;
  options_.sequences = 1;
  options_.tokens = 16;
  options_.samples = 1000;
  options_.atoms.atoms = 600;
  EXPECT_NE(Refusal().find("too few for 600 atoms"), std::string::npos) << Refusal();
  options_ = good;
  const std::atomic<bool> stop = true;
  EXPECT_THROW(TrainCsr(*engine_, *tokenizer_, options_, [](std::string_view, double) {}, &stop), Error);
}

}  // namespace
}  // namespace lesskv::train
