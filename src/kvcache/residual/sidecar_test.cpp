#include "kvcache/residual/sidecar.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>

#include "base/error.h"
#include "format/gguf.h"
#include "format/gguf_writer.h"
#include "kvcache/codec/key_bases.h"
#include "kvcache/residual/feature_maps.h"
#include "kvcache/residual/find_sidecar.h"

namespace lesskv {
namespace {

SidecarShape SmallShape(FeatureKind kind) {
  SidecarShape s;
  s.n_layers = 3;
  s.n_heads = 4;
  s.n_kv_heads = 2;
  s.head_dim = 8;
  s.rank = 4;
  s.hidden = 12;
  s.kind = kind;
  return s;
}

Sidecar Small(FeatureKind kind = FeatureKind::kGelu) {
  Sidecar sidecar = InitialSidecar(SmallShape(kind), 3);
  sidecar.model_fingerprint = 0x0123456789abcdefull;
  sidecar.model_name = "tiny";
  sidecar.matrix_type = DType::kF32;
  sidecar.training.policies = {"h2o(5%)", "window(2%)"};
  sidecar.training.tokens = 1u << 20;
  sidecar.training.validation = {0.5f, 0.25f, 0.125f};
  sidecar.training.validation_baseline = {1, 1, 1};
  sidecar.training.history = {"refined", "weighed"};
  return sidecar;
}

// Tests run side by side, each in a process of its own.
std::string TempPath(const std::string& name) {
  return testing::TempDir() + "/" + testing::UnitTest::GetInstance()->current_test_info()->name() + "_" + name;
}

std::shared_ptr<const FeatureMaps> Load(const std::string& path, uint64_t model_fingerprint) {
  const Sidecar sidecar = ReadSidecar(path);
  CheckModel(sidecar, path, model_fingerprint, 0);
  return FeatureMaps::OfFile(sidecar, path);
}

// The message of the Error that `run` must throw.
std::string Refusal(ErrorCode code, const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "accepted";
  return "";
}

TEST(Sidecar, RoundTrip) {
  for (FeatureKind kind : {FeatureKind::kGelu, FeatureKind::kExp}) {
    Sidecar wrote = Small(kind);
    wrote.layers[1].center.assign(wrote.shape.n_kv_heads * wrote.shape.head_dim, 0.25f);
    const std::string path = TempPath("round.less.gguf");
    WriteSidecar(path, wrote);
    const Sidecar read = ReadSidecar(path);
    EXPECT_EQ(read.shape, wrote.shape);
    EXPECT_EQ(read.model_fingerprint, wrote.model_fingerprint);
    EXPECT_EQ(read.model_name, wrote.model_name);
    EXPECT_EQ(read.training.policies, wrote.training.policies);
    EXPECT_EQ(read.training.tokens, wrote.training.tokens);
    EXPECT_EQ(read.training.validation, wrote.training.validation);
    EXPECT_EQ(read.training.history, wrote.training.history);
    for (size_t layer = 0; layer < 3; ++layer) {
      const LayerParams &a = read.layers[layer], &b = wrote.layers[layer];
      EXPECT_EQ(a.phi.w1, b.phi.w1);
      EXPECT_EQ(a.phi.w2, b.phi.w2);
      EXPECT_EQ(a.phi.b1, b.phi.b1);
      EXPECT_EQ(a.psi.w1, b.psi.w1);
      EXPECT_EQ(a.psi.b2, b.psi.b2);
      EXPECT_EQ(a.d, b.d);
      EXPECT_EQ(a.x, b.x);
      EXPECT_EQ(a.d2, b.d2);
      EXPECT_EQ(a.center, b.center);
    }
  }
}

// A program that knows nothing of centres must not run maps that have them.
TEST(Sidecar, CentersMakeItANewerFile) {
  Sidecar sidecar = Small();
  auto version = [&] {
    WriteSidecar(TempPath("v.less.gguf"), sidecar);
    return GgufFile::Open(TempPath("v.less.gguf")).Get<uint32_t>("lesskv.sidecar.version");
  };
  EXPECT_EQ(version(), 1u);
  sidecar.layers[2].center.assign(sidecar.shape.n_kv_heads * sidecar.shape.head_dim, 1.0f);
  EXPECT_EQ(version(), 2u);
  EXPECT_EQ(FeatureMaps::Create(sidecar)->bytes(), FeatureMaps::Create(Small())->bytes() + sidecar.layers[2].center.size() * 4);
}

TEST(Sidecar, Bf16RoundsOnceAndThenStays) {
  Sidecar sidecar = Small();
  sidecar.matrix_type = DType::kBF16;
  WriteSidecar(TempPath("a.less.gguf"), sidecar);
  const Sidecar once = ReadSidecar(TempPath("a.less.gguf"));
  for (size_t i = 0; i < once.layers[0].phi.w1.size(); ++i) {
    const float wrote = sidecar.layers[0].phi.w1[i];
    EXPECT_NEAR(once.layers[0].phi.w1[i], wrote, std::fabs(wrote) / 256);
  }
  WriteSidecar(TempPath("b.less.gguf"), once);
  EXPECT_EQ(ReadSidecar(TempPath("b.less.gguf")).layers[2].psi.w2, once.layers[2].psi.w2);
}

TEST(Sidecar, RefusesAnotherModel) {
  WriteSidecar(TempPath("m.less.gguf"), Small());
  EXPECT_NO_THROW(Load(TempPath("m.less.gguf"), 0x0123456789abcdefull));
  EXPECT_NO_THROW(Load(TempPath("m.less.gguf"), 0));
  const std::string message =
      Refusal(ErrorCode::kMismatch, [] { Load(TempPath("m.less.gguf"), 0xffull); });
  EXPECT_NE(message.find("0123456789abcdef"), std::string::npos) << message;
  EXPECT_NE(message.find("00000000000000ff"), std::string::npos) << message;
}

TEST(Sidecar, RefusesNumbersThatAreNotFinite) {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e9f}) {
    Sidecar sidecar = Small();
    sidecar.layers[1].psi.w2[5] = bad;
    WriteSidecar(TempPath("nan.less.gguf"), sidecar);
    const std::string message = Refusal(ErrorCode::kBadFile, [] { ReadSidecar(TempPath("nan.less.gguf")); });
    EXPECT_NE(message.find("less.1.psi.w2"), std::string::npos) << message;
  }
}

TEST(Sidecar, RefusesWrongShapesNamingWantedAndFound) {
  Sidecar sidecar = Small();
  WriteSidecar(TempPath("good.less.gguf"), sidecar);
  // The same tensors under metadata that promises other shapes.
  const GgufFile good = GgufFile::Open(TempPath("good.less.gguf"));
  auto rewrite = [&](std::string_view key, auto value) {
    GgufWriter writer;
    for (const auto& [name, stored] : good.metadata())
      if (name != key) writer.Add(name, stored);
    writer.Add(key, value);
    for (const GgufTensor& t : good.tensors())
      writer.AddTensor(t.name, t.type, std::span(t.ne.data(), t.n_dims), t.data);
    writer.Write(TempPath("wrong.less.gguf"));
    return Refusal(ErrorCode::kBadFile, [] { ReadSidecar(TempPath("wrong.less.gguf")); });
  };
  const std::string hidden = rewrite("less.hidden", uint32_t{16});
  EXPECT_NE(hidden.find("[16, 8, 4]"), std::string::npos) << hidden;
  EXPECT_NE(hidden.find("[12, 8, 4]"), std::string::npos) << hidden;
  EXPECT_NE(rewrite("less.rank", uint32_t{0}).find("less.rank"), std::string::npos);
  EXPECT_NE(rewrite("less.rank", uint32_t{65}).find("less.rank"), std::string::npos);
  EXPECT_NE(rewrite("less.head_count", uint32_t{3}).find("multiple"), std::string::npos);
  EXPECT_NE(rewrite("less.hidden", uint32_t{4000000000u}).find("less.hidden"), std::string::npos);
  EXPECT_NE(rewrite("lesskv.model.fingerprint", "xyz").find("hexadecimal"), std::string::npos);
  EXPECT_NE(rewrite("lesskv.sidecar.version", uint32_t{3}).find("version"), std::string::npos);
  EXPECT_NE(rewrite("general.architecture", "llama").find("not a sidecar"), std::string::npos);
}

TEST(Sidecar, PartsMergeAndIncompleteOnesDoNotRun) {
  Sidecar first = Small(), second = Small();
  first.layers[2] = {};
  second.layers[0] = second.layers[1] = {};
  WriteSidecar(TempPath("p1.less.gguf"), first);
  WriteSidecar(TempPath("p2.less.gguf"), second);
  Refusal(ErrorCode::kMismatch, [] { Load(TempPath("p1.less.gguf"), 0); });
  const Sidecar merged = MergeSidecars({TempPath("p1.less.gguf"), TempPath("p2.less.gguf")});
  for (size_t layer = 0; layer < 3; ++layer) EXPECT_EQ(merged.layers[layer].phi.w1, Small().layers[layer].phi.w1);
  EXPECT_EQ(merged.training.validation, Small().training.validation);
  Refusal(ErrorCode::kMismatch, [] { MergeSidecars({TempPath("p1.less.gguf"), TempPath("p1.less.gguf")}); });
  Refusal(ErrorCode::kMismatch, [] { MergeSidecars({TempPath("p1.less.gguf")}); });
  second.model_fingerprint = 5;
  WriteSidecar(TempPath("p2.less.gguf"), second);
  Refusal(ErrorCode::kMismatch, [] { MergeSidecars({TempPath("p1.less.gguf"), TempPath("p2.less.gguf")}); });
}

// What stands beside the maps is kept from whichever file has it.
TEST(Sidecar, PartsBesideTheMapsSurviveAMerge) {
  Sidecar first = Small(), second = Small();
  first.layers[2] = {};
  second.layers[0] = second.layers[1] = {};
  first.budgets = {{2}, {0.5f}, {0.25f, 0.5f}, 7};
  second.budgets = {{2}, {0.5f}, {0.5f, 0.75f}, 9};
  second.balance.head_dim = 16;
  second.balance.n_kv_heads = {1};
  for (size_t i = 0; i < 256; ++i) second.balance.keys.push_back(i % 17 == 0 ? 0x3c00 : 0);
  WriteSidecar(TempPath("p1.less.gguf"), first);
  WriteSidecar(TempPath("p2.less.gguf"), second);
  const Sidecar merged = MergeSidecars({TempPath("p1.less.gguf"), TempPath("p2.less.gguf")});
  EXPECT_EQ(merged.budgets, first.budgets);
  EXPECT_EQ(merged.balance, second.balance);
  EXPECT_TRUE(merged.scores.empty());
}

// Made once while anybody holds it, and anew where the file, the model or what is made of it is another.
TEST(Sidecar, TrainedPartsAreShared) {
  const std::string path = TempPath("s.less.gguf");
  WriteSidecar(path, Small());
  const FoundSidecar found{path, FingerprintString(GgufFile::Open(path).Fingerprint())};
  const SidecarSource source{path, Small().model_fingerprint, 0};
  int made = 0;
  const auto get = [&](const FoundSidecar& file, const SidecarSource& model, const std::string& what) {
    return ShareTrained<std::string>(file, model, what, [&](const Sidecar& sidecar) {
      ++made;
      return std::make_shared<const std::string>(sidecar.model_name + what);
    });
  };
  auto first = get(found, source, "a");
  EXPECT_EQ(*first, "tinya");
  EXPECT_EQ(get(found, source, "a"), first);
  EXPECT_EQ(made, 1);
  EXPECT_EQ(*get(found, source, "b"), "tinyb");
  EXPECT_EQ(made, 2);
  EXPECT_NE(get(found, {path, 0, 0}, "a"), first);  // of no model in particular
  Refusal(ErrorCode::kMismatch, [&] { get(found, {path, 5, 0}, "a"); });
  EXPECT_EQ(made, 3);
  std::filesystem::last_write_time(path, std::filesystem::last_write_time(path) + std::chrono::seconds(1));
  EXPECT_NE(get(found, source, "a"), first);
  EXPECT_EQ(made, 4);
  first = get(found, source, "a");
  EXPECT_EQ(made, 5);  // the one before was nobody's any more
  EXPECT_EQ(get({path, "another"}, source, "a").use_count(), 1);
  EXPECT_EQ(made, 6);
}

// Dictionaries alone, and what they must not hold.
TEST(Sidecar, Dictionaries) {
  Sidecar sidecar;
  sidecar.model_name = "tiny";
  SidecarDictionaries& d = sidecar.dictionaries;
  d = {.head_dim = 4, .n_atoms = 3, .key_of = {0, 0, 1}, .value_of = {0, 1, 2}, .keys = {}, .values = {}, .tokens = 77, .pairs = 8};
  const uint16_t one = 0x3c00, half = 0x3800;
  for (size_t i = 0; i < 2 * 3; ++i) d.keys.insert(d.keys.end(), {half, half, 0xb800, half});
  for (size_t i = 0; i < 3 * 3; ++i) d.values.insert(d.values.end(), {0, one});
  const std::string path = TempPath("dictionaries.less.gguf");
  WriteSidecar(path, sidecar);
  EXPECT_TRUE(ReadSidecar(path).dictionaries == d);
  EXPECT_FALSE(ReadSidecar(path).has_maps());
  const auto refused = [&](const std::function<void(SidecarDictionaries&)>& damage) {
    Sidecar bad = sidecar;
    damage(bad.dictionaries);
    WriteSidecar(path, bad);
    return Refusal(ErrorCode::kBadFile, [&] { ReadSidecar(path); });
  };
  const auto says = [](const std::string& message, const char* what) { return message.find(what) != std::string::npos; };
  EXPECT_TRUE(says(refused([&](auto& b) { b.keys[5 * 4] = one; }), "csr.keys must hold atoms of length 1"));
  EXPECT_TRUE(says(refused([&](auto& b) { b.values[1] = 0x7e00; }), "csr.values must hold atoms of length 1"));
  EXPECT_TRUE(says(refused([&](auto& b) { b.key_of = {1, 0, 0}; }), "csr.key_dictionaries must number dictionaries in order"));
  EXPECT_TRUE(says(refused([&](auto& b) { b.key_of = {0, 0, 0}; }), "csr.keys must have shape [4, 3, 1, 1]"));
  EXPECT_TRUE(says(refused([&](auto& b) { b.key_of = {0, 1}; }), "csr.value_dictionaries must be of 2 layers"));
}

// Matrices alone, and what they must not hold.
TEST(Sidecar, MatricesOfKeys) {
  Sidecar sidecar;
  sidecar.model_name = "tiny";
  SidecarBalance& b = sidecar.balance;
  b = {.head_dim = 2, .n_kv_heads = {1, 2}, .keys = {}, .tokens = 99, .positions = 4096};
  const uint16_t one = 0x3c00, half = 0x3800;
  for (size_t i = 0; i < 3; ++i) b.keys.insert(b.keys.end(), {one, half, 0, one});
  const std::string path = TempPath("balance.less.gguf");
  WriteSidecar(path, sidecar);
  EXPECT_TRUE(ReadSidecar(path).balance == b);
  EXPECT_FALSE(ReadSidecar(path).has_maps());
  const auto refused = [&](const std::function<void(SidecarBalance&)>& damage) {
    Sidecar bad = sidecar;
    damage(bad.balance);
    WriteSidecar(path, bad);
    return Refusal(ErrorCode::kBadFile, [&] { ReadSidecar(path); });
  };
  const auto says = [](const std::string& message, const char* what) { return message.find(what) != std::string::npos; };
  EXPECT_TRUE(says(refused([&](auto& bad) { bad.keys[5] = 0x7c00; }), "balance.keys holds a number that is not finite"));
  EXPECT_TRUE(says(refused([&](auto& bad) { bad.n_kv_heads = {1, 1}; }), "balance.keys must have shape [2, 2, 2, 1]"));
  EXPECT_TRUE(says(refused([&](auto& bad) { bad.n_kv_heads = {0, 3}; }), "balance.head_count_kv must hold numbers between 1"));

  EXPECT_EQ(KeyBases::Create(b, {2}, path)->Bytes(), 3 * 2 * 4 * sizeof(float));
  b.keys = {one, half, 0, one, one, half, one, half, 0, one, one, half};
  const std::string singular = Refusal(ErrorCode::kBadFile, [&] { KeyBases::Create(b, {2}, path); });
  EXPECT_TRUE(says(singular, "a matrix that cannot be inverted, that of head 1")) << singular;
}

}  // namespace
}  // namespace lesskv
