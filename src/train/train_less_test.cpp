// The whole way from a text to a sidecar, on a tiny random model: captures that agree with the cache, training that
// lowers the loss, resuming that equals not having stopped, parts that merge, refusals.
#include "train/train_less.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>

#include "base/error.h"
#include "base/rng.h"
#include "format/gguf_writer.h"
#include "kvcache/residual/feature_maps.h"
#include "kvcache/sequence_cache.h"
#include "train/capture.h"
#include "train/capture_record.h"
#include "train/crop_source.h"

namespace lesskv::train {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLayers = 2, kHeads = 4, kKvHeads = 2, kDim = 16, kModel = 32, kFfn = 48, kVocab = 258;

// A llama of two layers with random weights and a byte vocabulary, as a GGUF file. Its keys may carry a bias, in two
// channels that are then hardly rotated, and its scores another scale than the usual one.
std::string TinyModel(const std::string& folder, float key_bias = 0, float score_scale = UsualScale(kDim)) {
  const std::string path = folder + "/tiny.gguf";
  GgufWriter writer;
  writer.Add("general.architecture", "llama");
  writer.Add("general.name", "tiny");
  writer.Add("llama.block_count", uint32_t{kLayers});
  writer.Add("llama.context_length", uint32_t{128});
  writer.Add("llama.embedding_length", uint32_t{kModel});
  writer.Add("llama.feed_forward_length", uint32_t{kFfn});
  writer.Add("llama.attention.head_count", uint32_t{kHeads});
  writer.Add("llama.attention.head_count_kv", uint32_t{kKvHeads});
  writer.Add("llama.attention.key_length", uint32_t{kDim});
  writer.Add("llama.attention.value_length", uint32_t{kDim});
  writer.Add("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  writer.Add("llama.attention.scale", score_scale);
  writer.Add("llama.rope.dimension_count", uint32_t{kDim});
  writer.Add("llama.rope.freq_base", key_bias == 0 ? 100.0f : 1e6f);
  std::vector<std::string> tokens = {"<unk>", "<s>"};
  std::vector<int32_t> types = {2, 3};
  std::vector<float> scores(kVocab);
  for (int b = 0; b < 256; ++b) {
    tokens.push_back(fmt::format("<0x{:02X}>", b));
    types.push_back(6);
  }
  writer.Add("tokenizer.ggml.model", "llama");
  writer.AddArray("tokenizer.ggml.tokens", tokens);
  writer.AddArray("tokenizer.ggml.scores", scores);
  writer.AddArray("tokenizer.ggml.token_type", types);
  writer.Add("tokenizer.ggml.unknown_token_id", uint32_t{0});
  writer.Add("tokenizer.ggml.bos_token_id", uint32_t{1});
  writer.Add("tokenizer.ggml.add_bos_token", true);
  Rng rng(5);
  std::vector<std::vector<float>> kept;
  kept.reserve(64);
  auto add = [&](const std::string& name, std::vector<size_t> ne, float scale) {
    std::vector<float>& w = kept.emplace_back(ne[0] * (ne.size() > 1 ? ne[1] : 1));
    for (float& x : w) x = scale == 0 ? 1.0f : scale * rng.Normal();
    writer.AddTensor(name, DType::kF32, ne, std::as_bytes(std::span(w)));
  };
  add("token_embd.weight", {kModel, kVocab}, 1.0f);
  add("output_norm.weight", {kModel}, 0);
  for (size_t l = 0; l < kLayers; ++l) {
    const std::string block = fmt::format("blk.{}.", l);
    add(block + "attn_norm.weight", {kModel}, 0);
    add(block + "ffn_norm.weight", {kModel}, 0);
    add(block + "attn_q.weight", {kModel, kHeads * kDim}, 0.3f);
    add(block + "attn_k.weight", {kModel, kKvHeads * kDim}, 0.3f);
    if (key_bias != 0) {
      std::vector<float>& bias = kept.emplace_back(kKvHeads * kDim);
      for (size_t i = 0; i < bias.size(); ++i) bias[i] = i % kDim >= kDim - 2 ? key_bias : 0;
      writer.AddTensor(block + "attn_k.bias", DType::kF32, {bias.size()}, std::as_bytes(std::span(bias)));
    }
    add(block + "attn_v.weight", {kModel, kKvHeads * kDim}, 0.3f);
    add(block + "attn_output.weight", {kHeads * kDim, kModel}, 0.1f);
    add(block + "ffn_gate.weight", {kModel, kFfn}, 0.1f);
    add(block + "ffn_up.weight", {kModel, kFfn}, 0.1f);
    add(block + "ffn_down.weight", {kFfn, kModel}, 0.1f);
  }
  writer.Write(path);
  return path;
}

class TrainLessTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = testing::TempDir() + "/train_less_" + info->name();
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    model_ = Model::Load(TinyModel(folder_));
    tokenizer_ = Tokenizer::Create(LoadVocabulary(model_->file()));
    engine_ = std::make_unique<Engine>(model_, EngineOptions{.compute = ComputeChoice::kF32});
    Rng rng(1);
    std::string text;
    while (text.size() < 20000) text += std::string(1 + rng.Below(8), static_cast<char>('a' + rng.Below(9))) + " ";
    std::ofstream(folder_ + "/text.txt") << text;
    options_.texts = {folder_ + "/text.txt"};
    options_.policies = {"h2o(8)", "window(8, sinks=2)", "tova(8)"};
    options_.steps = {4, 1};
    options_.views = 2;
    options_.sequences = 8;
    options_.ctx = 64;
    options_.rank = 4;
    options_.hidden = 16;
    options_.epochs = 3;
    options_.batch = 2;
    options_.rate = 1e-2;
    options_.matrix_type = DType::kF32;
    options_.work_folder = folder_ + "/work";
  }
  void TearDown() override { fs::remove_all(folder_); }

  TrainLessReport Run(const std::atomic<bool>* stop = nullptr) {
    return TrainLess(*engine_, *tokenizer_, options_, [&](const TrainProgress& p) { if (watch_) watch_(p); }, stop);
  }

  std::string folder_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<Engine> engine_;
  TrainLessOptions options_;
  std::function<void(const TrainProgress&)> watch_;
};

bool Same(const Sidecar& a, const Sidecar& b) {
  for (size_t l = 0; l < a.layers.size(); ++l) {
    const LayerParams &x = a.layers[l], &y = b.layers[l];
    if (x.phi.w1 != y.phi.w1 || x.phi.w2 != y.phi.w2 || x.psi.w1 != y.psi.w1 || x.psi.b2 != y.psi.b2 || x.d != y.d)
      return false;
  }
  return true;
}

TEST_F(TrainLessTest, LowersTheErrorOfEveryLayerBelowTheSelectors) {
  options_.epochs = 12;
  for (FeatureKind kind : {FeatureKind::kExp, FeatureKind::kGelu}) {
    options_.kind = kind;
    options_.work_folder = folder_ + "/work-" + FeatureKindName(kind);
    double last = 0;
    watch_ = [&](const TrainProgress& p) {
      if (p.phase != "train") return;
      EXPECT_GE(p.done, last);
      last = p.done;
    };
    const TrainLessReport report = Run();
    EXPECT_NEAR(last, 1, 1e-9);
    ASSERT_EQ(report.validation.size(), kLayers);
    for (size_t l = 0; l < kLayers; ++l) {
      EXPECT_LT(report.validation[l], 0.8 * report.baseline[l]) << FeatureKindName(kind) << " layer " << l;
      EXPECT_LT(report.baseline_plus[l], report.baseline[l]);
    }
    EXPECT_EQ(report.sidecar.model_fingerprint, model_->fingerprint());
    EXPECT_GT(report.capture_bytes, 0u);
    WriteSidecar(folder_ + "/tiny.less.gguf", report.sidecar);
    EXPECT_NO_THROW(FeatureMaps::OfFile(ReadSidecar(folder_ + "/tiny.less.gguf"), "tiny"));
  }
}

// Keys of Qwen2 carry biases of hundreds, which add the same to all exponents of a query: more than features can reach.
TEST_F(TrainLessTest, KeysThatShareALargeBiasAreLearned) {
  model_ = Model::Load(TinyModel(folder_, 100));
  engine_ = std::make_unique<Engine>(model_, EngineOptions{.compute = ComputeChoice::kF32});
  options_.epochs = 12;
  const TrainLessReport report = Run();
  WriteSidecar(folder_ + "/tiny.less.gguf", report.sidecar);
  for (size_t l = 0; l < kLayers; ++l) {
    EXPECT_LT(report.validation[l], 0.85 * report.baseline[l]) << l;
    EXPECT_FALSE(report.sidecar.layers[l].center.empty()) << l;
  }
  options_.resume = true;  // nothing is left to do, and nothing is lost
  const Sidecar again = Run().sidecar;
  EXPECT_TRUE(Same(again, report.sidecar));
  for (size_t l = 0; l < kLayers; ++l) EXPECT_EQ(again.layers[l].center, report.sidecar.layers[l].center) << l;
  options_.resume = false;
  // And the cache reads what was trained: the same maps go on from where they were.
  options_.from = folder_ + "/tiny.less.gguf";
  options_.work_folder += "2";
  options_.epochs = 1;
  options_.rate = 1e-9;
  options_.end_layer = 1;  // whose inputs do not depend on the maps
  EXPECT_NEAR(Run().validation[0], report.validation[0], 0.02 * report.validation[0]);
  options_.work_folder += "3";
  options_.seed = 9;  // of other texts, whose mean keys are others
  EXPECT_EQ(Run().sidecar.layers[0].center, report.sidecar.layers[0].center) << "maps belong to their centre";
}

TEST_F(TrainLessTest, SameSeedSameBitsAnotherSeedOthers) {
  const Sidecar a = Run().sidecar;
  options_.work_folder += "2";
  const Sidecar b = Run().sidecar;
  EXPECT_TRUE(Same(a, b));
  options_.work_folder += "3";
  options_.seed = 1;
  EXPECT_FALSE(Same(a, Run().sidecar));
}

// Stopped in the capture and again in the middle of an epoch of the second layer: nothing is lost and nothing differs.
TEST_F(TrainLessTest, ResumingEqualsNotHavingStopped) {
  const Sidecar want = Run().sidecar;
  options_.work_folder += "2";
  std::atomic<bool> stop{false};
  watch_ = [&](const TrainProgress& p) { stop = stop || (p.phase == "capture" && p.done > 0.4); };
  EXPECT_THROW(Run(&stop), Error);
  stop = false;
  EXPECT_THROW(Run(&stop), Error) << "must ask for --resume";
  options_.resume = true;
  watch_ = [&](const TrainProgress& p) { stop = stop || (p.phase == "train" && p.layer == 1 && p.epoch == 1); };
  EXPECT_THROW(Run(&stop), Error);
  stop = false;
  watch_ = nullptr;
  EXPECT_TRUE(Same(want, Run().sidecar));
  options_.rate *= 2;  // another training must not go on from these states
  EXPECT_THROW(Run(), Error);
  options_.rate /= 2;
  options_.ctx = 32;
  EXPECT_THROW(Run(), Error);
}

// Layers in groups, whose captures go before the next are made: the same maps, on a bounded disk, also when stopped.
TEST_F(TrainLessTest, ABoundedDiskChangesNothing) {
  const TrainLessReport whole = Run();
  const TrainLessPlan all = PlanTraining(*engine_, *tokenizer_, options_);
  EXPECT_EQ(all.layers_at_once, kLayers);
  EXPECT_NEAR(static_cast<double>(all.bytes_at_once()), static_cast<double>(whole.capture_bytes),
              0.03 * static_cast<double>(whole.capture_bytes) + 2000 * 8 * kLayers);
  options_.work_folder += "2";
  options_.disk_bytes = all.layer_bytes * 3 / 2;
  EXPECT_EQ(PlanTraining(*engine_, *tokenizer_, options_).n_groups(), 2u);
  std::atomic<bool> stop{false};
  watch_ = [&](const TrainProgress& p) {
    stop = stop || (p.phase == "train" && p.layer == 1 && p.epoch == 1);
    size_t layers = 0;
    for (size_t layer = 0; layer < kLayers; ++layer) layers += fs::exists(RecordPath(options_.work_folder, 0, layer));
    EXPECT_LE(layers, 1u);
  };
  EXPECT_THROW(Run(&stop), Error);
  stop = false;
  options_.resume = true;
  watch_ = [&](const TrainProgress& p) {
    if (p.phase == "plan") {
      EXPECT_EQ(p.plan.layers_at_once, 1u);
    } else {
      EXPECT_EQ(p.layer, 1u) << "the first layer is done";
    }
  };
  const TrainLessReport report = Run();
  EXPECT_TRUE(Same(whole.sidecar, report.sidecar));
  EXPECT_EQ(report.validation, whole.validation);
  EXPECT_LT(report.capture_bytes, whole.capture_bytes * 2 / 3);
  options_.disk_bytes = all.layer_bytes - 1;
  EXPECT_THROW(PlanTraining(*engine_, *tokenizer_, options_), Error);
}

TEST_F(TrainLessTest, LayersTrainedApartMergeToTheWhole) {
  const Sidecar whole = Run().sidecar;
  std::vector<std::string> parts;
  for (size_t l = 0; l < kLayers; ++l) {
    options_.work_folder = folder_ + fmt::format("/part{}", l);
    options_.first_layer = l;
    options_.end_layer = l + 1;
    parts.push_back(folder_ + fmt::format("/part{}.less.gguf", l));
    const TrainLessReport part = Run();
    const SidecarTraining& told = part.sidecar.training;
    EXPECT_EQ(told.validation[l], static_cast<float>(part.validation[0]));
    EXPECT_EQ(told.validation_baseline[l], static_cast<float>(part.baseline_plus[0]));
    EXPECT_EQ(told.validation[1 - l] + told.validation_baseline[1 - l], 0);
    WriteSidecar(parts.back(), part.sidecar);
  }
  EXPECT_TRUE(Same(whole, MergeSidecars(parts)));
}

// A second round on what the compressed model sees starts from the first round's maps and is never worse than they are
// on its own texts.
TEST_F(TrainLessTest, GoesOnFromASidecarWithCompressedTexts) {
  const TrainLessReport first = Run();
  const std::string path = folder_ + "/first.less.gguf";
  WriteSidecar(path, first.sidecar);
  options_.from = path;
  options_.work_folder += "2";
  options_.rate = 1e-3;
  const TrainLessReport second = Run();
  for (size_t l = 0; l < kLayers; ++l) {
    EXPECT_LT(second.validation[l], 0.95 * second.baseline[l]) << l;
    // Layer 0 sees the same texts either way, later ones what the compressed model makes of them.
    if (l == 0) {
      EXPECT_NEAR(second.baseline[l], first.baseline[l], 1e-3 * first.baseline[l]);
    } else {
      EXPECT_NE(second.baseline[l], first.baseline[l]);
    }
  }
  Sidecar other = first.sidecar;
  other.model_fingerprint ^= 1;  // another file ...
  other.model_identity ^= 1;     // ... of another model
  WriteSidecar(path, other);
  options_.work_folder += "3";
  EXPECT_THROW(Run(), Error);
  WriteSidecar(path, first.sidecar);
  options_.rank = 5;
  options_.work_folder += "4";
  EXPECT_THROW(Run(), Error);
}

TEST_F(TrainLessTest, RefusesOptionsThatMakeNoSense) {
  auto refuses = [&](auto change) {
    const TrainLessOptions kept = options_;
    change(options_);
    EXPECT_THROW(Run(), Error);
    options_ = kept;
  };
  refuses([](auto& o) { o.policies.clear(); });
  refuses([](auto& o) { o.policies = {"h2o(8)+less"}; });
  refuses([](auto& o) { o.policies = {"h2o(8)+pyramid"}; });
  refuses([](auto& o) { o.policies = {"nonsense"}; });
  refuses([](auto& o) { o.steps = {0}; });
  refuses([](auto& o) { o.sequences = 1; });
  refuses([](auto& o) { o.rank = 65; });
  refuses([](auto& o) { o.end_layer = 3; });
  refuses([](auto& o) { o.texts = {"/nonexistent"}; });
  refuses([](auto& o) { o.ctx = 1u << 20; });  // no text is that long
  // What a negative number becomes: a batch that no text reaches, epochs without end.
  refuses([](auto& o) { o.batch = SIZE_MAX; });
  refuses([](auto& o) { o.epochs = SIZE_MAX; });
  refuses([](auto& o) { o.views = SIZE_MAX; });
  refuses([](auto& o) { o.sequences = SIZE_MAX; });
  refuses([](auto& o) { o.sequences = 2, o.validation = 0.9; });  // nothing is left to train on
}

// Which epoch is kept, and what error is told, is of texts that training has not read.
TEST_F(TrainLessTest, ValidationSharesNothingWithTraining) {
  const CropSource crops(*tokenizer_, options_.texts);
  std::vector<CropSource::Stretch> held(4);
  for (uint64_t i = 0; i < held.size(); ++i) crops.Crop(i, 512, true, {}, &held[i]);
  const auto shares = [&](const CropSource::Stretch& s) {
    return std::any_of(held.begin(), held.end(), [&](const auto& other) { return s.begin < other.end && other.begin < s.end; });
  };
  size_t would_share = 0;
  for (uint64_t seed = 10; seed < 60; ++seed) {
    CropSource::Stretch where{};
    EXPECT_EQ(crops.Crop(seed, 512, true, held, &where).size(), 512u);
    EXPECT_FALSE(shares(where)) << seed;
    const std::vector<int32_t> ids = crops.Crop(seed, 512, true, {}, &where);
    EXPECT_EQ(ids, crops.Crop(seed, 512));
    would_share += shares(where);
    // The stretch is where the tokens come from.
    std::ifstream in(options_.texts[0]);
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    const auto again = tokenizer_->Encode(text.substr(where.begin, where.end - where.begin), tokenizer_->add_bos(), false);
    ASSERT_GE(again.size(), ids.size());
    EXPECT_TRUE(std::equal(ids.begin(), ids.end(), again.begin()));
  }
  EXPECT_GT(would_share, 0u);
  // A text that a single crop fills has nothing left to train on.
  std::string words;
  for (int i = 0; i < 38; ++i) words += "a ";
  std::ofstream(folder_ + "/short.txt") << words;
  options_.texts = {folder_ + "/short.txt"};
  try {
    Run();
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("no validation text shares"), std::string::npos) << error.what();
  }
}

// A fifth of eight texts, two, validate; where training texts would share with them, others are taken.
TEST_F(TrainLessTest, CapturesAreOfTextsThatShareNothing) {
  std::ifstream in(options_.texts[0]);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  options_.texts = {folder_ + "/short.txt"};
  std::ofstream(options_.texts[0]) << text.substr(0, 700);
  options_.validation = 0.2;
  options_.epochs = 1;
  options_.end_layer = 1;
  const TrainLessReport report = Run();
  const CropSource crops(*tokenizer_, options_.texts);
  std::vector<CropSource::Stretch> held(2);
  for (size_t i = 0; i < 2; ++i) crops.Crop(MixSeed(0, 6 + i), 64, true, {}, &held[i]);
  const CacheShape shape = model_->MakeCacheShape(64, ComputeType::kF32);
  ForwardWorkspace workspace;
  size_t n_others = 0;
  for (size_t s = 0; s < 8; ++s) {
    const auto tokens = s < 6 ? crops.Crop(MixSeed(0, s), 64, true, held) : crops.Crop(MixSeed(0, s), 64);
    n_others += tokens != crops.Crop(MixSeed(0, s), 64);
    const LessExample captured = ReadExample(RecordPath(options_.work_folder, s, 0), 0, kHeads, kKvHeads);
    CaptureCache cache(shape, 64, {{"h2o(8)", 4}}, options_.rank / 2, 0, 1, [&](size_t, const CaptureRecord& record) {
      for (size_t i = 0; i < record.k.size(); ++i) ASSERT_NEAR(captured.k[i], record.k[i], 1e-3 * (1 + std::fabs(record.k[i]))) << s;
      if (s != 6) return;
      std::vector<float> plus;
      ReadExample(RecordPath(options_.work_folder, s, 0), 0, kHeads, kKvHeads, &plus);
      for (size_t i = 0; i < plus.size(); ++i) ASSERT_NEAR(plus[i], record.views[0].plus_out[i], 2e-3) << i;
    });
    Forward(*model_, tokens, cache, ComputeType::kF32, workspace, {}, [](size_t) { return false; });
  }
  EXPECT_GT(n_others, 0u);

  // What is told of the selector alone: squared errors behind the output projection, a channel.
  const auto* w = reinterpret_cast<const float*>(model_->layer(0).attn_output.data);
  double error = 0, n_scored = 0;
  for (size_t s = 6; s < 8; ++s)
    for (size_t view = 0; view < 2; ++view) {
      const LessExample e = ReadExample(RecordPath(options_.work_folder, s, 0), view, kHeads, kKvHeads);
      for (size_t t = e.first_scored; t < 64; ++t, ++n_scored)
        for (size_t c = 0; c < kModel; ++c) {
          double sum = 0;
          for (size_t i = 0; i < kHeads * kDim; ++i)
            sum += double(w[c * kHeads * kDim + i]) * (e.exact_out[t * kHeads * kDim + i] - e.target[t * kHeads * kDim + i]);
          error += sum * sum / kModel;
        }
    }
  EXPECT_NEAR(report.baseline[0], error / n_scored, 1e-4 * report.baseline[0]);
}

// A rate that ruins the maps: those that were best stay, here the first ones.
TEST_F(TrainLessTest, TheBestEpochIsKept) {
  options_.rate = 0.9;
  double last = 0;
  watch_ = [&](const TrainProgress& p) { last = p.layer == 0 ? p.validation : last; };
  const TrainLessReport first = Run();
  ASSERT_GT(last, 1.2 * first.validation[0]);
  options_.from = folder_ + "/first.less.gguf";
  WriteSidecar(options_.from, first.sidecar);
  options_.work_folder += "2";
  options_.epochs = 1;
  options_.rate = 1e-9;
  options_.end_layer = 1;  // whose inputs do not depend on the maps
  EXPECT_NEAR(Run().validation[0], first.validation[0], 0.02 * first.validation[0]);
}

// One text, of which each epoch sees another view; the rate leaves the maps as they are.
TEST_F(TrainLessTest, EpochsTakeTheViewsOfATextInTurn) {
  options_.sequences = 2;
  options_.epochs = 3;
  options_.end_layer = 1;
  options_.rate = 1e-12;
  std::vector<double> losses(3);
  watch_ = [&](const TrainProgress& p) {
    if (p.phase == "train" && p.epoch < 3) losses[p.epoch] = p.loss;
  };
  Run();
  EXPECT_NEAR(losses[2], losses[0], 1e-6 * losses[0]);
  EXPECT_GT(std::fabs(losses[1] - losses[0]), 1e-2 * losses[0]);
}

// A row that leaves with a text's last step is missed by nobody.
TEST_F(TrainLessTest, RefusesWhatLosesNothingOfATextBeforeItsLastStep) {
  const auto loses = [&](const char* spec, size_t step) {
    const CacheShape shape = model_->MakeCacheShape(64, ComputeType::kF32);
    try {
      RequireLoss(*CacheConfig::Create(CacheSpec::Parse(spec), shape), step, "train less");
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return false;
    }
    return true;
  };
  for (const char* spec : {"full", "full+q8", "h2o(100%)", "window(5000000)", "window(56)", "tova(64)"})
    EXPECT_FALSE(loses(spec, 8)) << spec;
  for (const char* spec : {"h2o(50%)", "window(55)", "snapkv(40)+pyramid"}) EXPECT_TRUE(loses(spec, 8)) << spec;
  EXPECT_TRUE(loses("window(62)", 1));
  EXPECT_FALSE(loses("window(63)", 1));
  EXPECT_FALSE(loses("window(8)", 64)) << "a text in one step";
  options_.policies.emplace_back("h2o(100%)");
  try {
    Run();
    FAIL() << "expected a refusal";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("'h2o(100%)' loses no token of a text of 64"), std::string::npos)
        << error.what();
  }
  EXPECT_FALSE(fs::exists(options_.work_folder));
}

// ------------------------------------------------------------------------------------------------------------ capture

// What a record says of a policy is what the cache does: resident pairs at each query, output and log-mass over them.
TEST_F(TrainLessTest, RecordsAgreeWithExplicitAttention) {
  constexpr float kScale = 0.4f;
  model_ = Model::Load(TinyModel(folder_, 0, kScale));
  const CacheShape shape = model_->MakeCacheShape(64, ComputeType::kF32);
  std::vector<int32_t> tokens(60);
  Rng rng(3);
  for (int32_t& t : tokens) t = static_cast<int32_t>(2 + rng.Below(200));
  std::vector<CaptureRecord> records;
  CaptureCache cache(shape, tokens.size(), {{"h2o(10)+f32", 3}, {"window(9, sinks=2)+f32", 1}}, 4, 0, kLayers,
                     [&](size_t, const CaptureRecord& r) { records.push_back(r); });
  ForwardWorkspace workspace;
  workspace.Reserve(model_->config(), tokens.size());
  Forward(*model_, tokens, cache, ComputeType::kF32, workspace);
  ASSERT_EQ(records.size(), kLayers);
  for (const CaptureRecord& r : records) {
    for (const CaptureView& view : r.views) {
      ASSERT_EQ(view.plus_out.size(), view.exact_out.size());
      EXPECT_NE(view.plus_out, view.exact_out);
      for (size_t t = 0; t < r.n_tokens; ++t) {
        for (size_t h = 0; h < kHeads; ++h) {
          const size_t kv = h / (kHeads / kKvHeads);
          std::vector<double> exact(kDim), full(kDim);
          double exact_mass = 0, full_mass = 0;
          size_t n_seen = 0;
          for (size_t j = 0; j <= t; ++j) {
            double score = 0;
            for (size_t d = 0; d < kDim; ++d)
              score += double(r.q[(t * kHeads + h) * kDim + d]) * r.k[(j * kKvHeads + kv) * kDim + d];
            const double p = std::exp(score * double(kScale));
            const bool seen = view.leave[kv * r.n_tokens + j] > static_cast<int32_t>(t);
            n_seen += seen;
            full_mass += p;
            exact_mass += seen ? p : 0;
            for (size_t d = 0; d < kDim; ++d) {
              const double v = r.v[(j * kKvHeads + kv) * kDim + d];
              full[d] += p * v;
              if (seen) exact[d] += p * v;
            }
          }
          EXPECT_NEAR(view.exact_lse[t * kHeads + h], std::log(exact_mass), 1e-4);
          EXPECT_LE(n_seen, 10u + view.step);
          for (size_t d = 0; d < kDim; ++d) {
            EXPECT_NEAR(view.exact_out[(t * kHeads + h) * kDim + d], exact[d] / exact_mass, 1e-4);
            EXPECT_NEAR(r.target[(t * kHeads + h) * kDim + d], full[d] / full_mass, 1e-4);
          }
        }
      }
    }
    EXPECT_EQ(r.views[0].first_scored, 12u);  // the first step of 3 that ends beyond 10 rows
    EXPECT_EQ(r.views[1].first_scored, 10u);
  }
  WriteRecord(RecordPath(folder_, 0, 1), records[1], kHeads, kKvHeads);
  std::vector<float> plus;
  const LessExample e = ReadExample(RecordPath(folder_, 0, 1), 1, kHeads, kKvHeads, &plus);
  EXPECT_EQ(e.leave, records[1].views[1].leave);
  EXPECT_EQ(e.exact_lse, records[1].views[1].exact_lse);
  for (size_t i = 0; i < e.q.size(); ++i) EXPECT_NEAR(e.q[i], records[1].q[i], 1e-3 * (1 + std::fabs(e.q[i])));
  EXPECT_EQ(plus.size(), e.exact_out.size());
  EXPECT_THROW(ReadExample(RecordPath(folder_, 0, 1), 2, kHeads, kKvHeads), Error);
  EXPECT_THROW(ReadExample(RecordPath(folder_, 0, 1), 0, kHeads + 1, kKvHeads), Error);
}

TEST(WithExtraRows, AddsToTheSelectorOnly) {
  auto equal = [](const std::string& spec, const std::string& want) {
    EXPECT_EQ(CacheSpec::Parse(spec).WithExtraRows(4).ToString(), CacheSpec::Parse(want).ToString());
  };
  equal("h2o(5%)", "h2o(5%, extra=4)");
  equal("h2o(heavy=8, recent=8, extra=2)+q8", "h2o(heavy=8, recent=8, extra=6)+q8");
  equal("window(64, sinks=2)", "window(64, sinks=2, extra=4)");
  equal("tova(2%)", "tova(2%, extra=4)");
}

}  // namespace
}  // namespace lesskv::train
