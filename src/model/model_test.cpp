// Loading: what a description must say, which tensors there must be, and the sentences for files that break this.
#include "model/model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>

#include "base/error.h"
#include "format/gguf_writer.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {
namespace {

// A tiny llama file whose metadata and tensors a test can change before it is written.
struct TinyFile {
  std::string architecture = "llama";
  std::map<std::string, uint32_t> counts = {{"block_count", 1},          {"context_length", 64},
                                            {"embedding_length", 8},     {"feed_forward_length", 12},
                                            {"attention.head_count", 2}, {"attention.head_count_kv", 1}};
  std::map<std::string, float> reals = {{"attention.layer_norm_rms_epsilon", 1e-5f}};
  std::map<std::string, std::string> texts;
  std::vector<std::string> tokens;  // of the vocabulary; none: it has none
  std::map<std::string, std::vector<uint32_t>> arrays;  // a number a layer
  std::map<std::string, std::vector<size_t>> tensors = {
      {"token_embd.weight", {8, 5}},    {"output_norm.weight", {8}},          {"blk.0.attn_norm.weight", {8}},
      {"blk.0.ffn_norm.weight", {8}},   {"blk.0.attn_q.weight", {8, 8}},      {"blk.0.attn_k.weight", {8, 4}},
      {"blk.0.attn_v.weight", {8, 4}},  {"blk.0.attn_output.weight", {8, 8}}, {"blk.0.ffn_gate.weight", {8, 12}},
      {"blk.0.ffn_up.weight", {8, 12}}, {"blk.0.ffn_down.weight", {12, 8}}};
  std::map<std::string, DType> types;  // where not f32
  std::function<float(size_t)> element = [](size_t) { return 0.0f; };  // element i of a tensor of f32

  std::string Write(const std::string& name = "") const {
    GgufWriter writer;
    writer.Add("general.architecture", architecture);
    for (const auto& [key, value] : counts) writer.Add(architecture + "." + key, value);
    for (const auto& [key, value] : reals) writer.Add(architecture + "." + key, value);
    for (const auto& [key, value] : texts) writer.Add(architecture + "." + key, value);
    if (!tokens.empty()) writer.AddArray("tokenizer.ggml.tokens", tokens);
    for (const auto& [key, value] : arrays) writer.AddArray(architecture + "." + key, value);
    std::vector<float> values(1024);
    for (size_t i = 0; i < values.size(); ++i) values[i] = element(i);
    for (const auto& [tensor, ne] : tensors) {
      const DType type = types.contains(tensor) ? types.at(tensor) : DType::kF32;
      size_t rows = 1;
      for (size_t i = 1; i < ne.size(); ++i) rows *= ne[i];
      writer.AddTensor(tensor, type, std::span<const size_t>(ne), std::as_bytes(std::span(values)).first(RowBytes(type, ne[0]) * rows));
    }
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    const std::string path = name.empty() ? testing::TempDir() + "lesskv_model_test_" + info->name() + ".gguf" : name;
    writer.Write(path);
    return path;
  }
};

// The sentence with which loading refuses the file; empty if it does not.
std::string Refusal(const TinyFile& file) {
  const std::string path = file.Write();
  std::string message;
  try {
    Model::Load(path);
  } catch (const Error& error) {
    message = error.what();
    EXPECT_EQ(error.ExitStatus(), 2);
  }
  std::filesystem::remove(path);
  return message;
}

TEST(Model, RowsBehindTheLastTokenAreNotUsed) {
  TinyFile file;
  file.tensors["output.weight"] = {8, 5};
  file.tokens = {"a", "b", "c"};
  for (const uint32_t stated : {3u, 5u, 4u}) {  // the last one is stale
    file.counts["vocab_size"] = stated;
    const std::string path = file.Write();
    const auto model = Model::Load(path, ModelLoading::kRead);
    std::filesystem::remove(path);
    EXPECT_EQ(model->config().n_vocab, 3u);
    EXPECT_EQ(model->output().n_out, 3u);
    EXPECT_EQ(model->token_embedding().n_out, 3u);
  }
}

TEST(Model, TinyFileLoadsWithItsDefaults) {
  const TinyFile file;
  const std::string path = file.Write();
  const auto model = Model::Load(path);
  std::filesystem::remove(path);
  EXPECT_EQ(model->config().head_dim, 4u);
  EXPECT_EQ(model->config().n_vocab, 5u);
  EXPECT_EQ(model->config().rope.base, 10000.0);
  EXPECT_EQ(model->output().data, model->token_embedding().data);  // tied
  EXPECT_EQ(model->parameter_count(), 8u * 5 + 3 * 8 + 2 * 64 + 2 * 32 + 3 * 96);
  EXPECT_EQ(model->MakeCacheShape(100, ComputeType::kF32).layers[0].group(), 2u);
  EXPECT_EQ(std::filesystem::path(model->Sidecar().path).filename(),
            std::filesystem::path(path).stem().string() + ".less.gguf");
}

// What other programs accept and what changes no result.
TEST(Model, OddMetadataAreTaken) {
  TinyFile file;
  file.counts["vocab_size"] = 6;  // stale: the embedding has 5 rows
  for (const char* key : {"attention.head_count", "attention.head_count_kv", "feed_forward_length"}) {
    file.arrays[key] = {file.counts.at(key), file.counts.at(key)};
    file.counts.erase(key);
  }
  file.reals["attn_logit_softcapping"] = 0;
  file.reals["rope.scaling.yarn_attn_factor"] = file.reals["rope.scaling.yarn_ext_factor"] = 1;
  file.counts["nextn_predict_layers"] = 0;
  file.counts["attention.causal"] = 1;
  EXPECT_EQ(Refusal(file), "");
  file.architecture = "qwen2";  // whose newer models have no biases
  EXPECT_EQ(Refusal(file), "");
}

// The rope of the layers, for what metadata say about scaling.
RopeConfig RopeOf(const std::map<std::string, float>& reals, const std::string& type) {
  TinyFile file;
  file.reals.insert(reals.begin(), reals.end());
  if (!type.empty()) file.texts["rope.scaling.type"] = type;
  const std::string path = file.Write();
  const RopeConfig rope = Model::Load(path)->config().rope;
  std::filesystem::remove(path);
  return rope;
}

TEST(Model, RopeScalingFromMetadata) {
  EXPECT_EQ(RopeOf({}, "").linear_scale, 1);
  EXPECT_EQ(RopeOf({{"rope.scaling.factor", 4}}, "").linear_scale, 4);  // linear unless another type is named
  EXPECT_EQ(RopeOf({{"rope.scale_linear", 4}}, "").linear_scale, 4);
  EXPECT_EQ(RopeOf({{"rope.scaling.factor", 4}}, "none").linear_scale, 1);
  EXPECT_EQ(RopeOf({{"rope.scaling.attn_factor", 0.5}}, "none").magnitude, 0.5f);
  EXPECT_EQ(RopeOf({}, "linear").linear_scale, 1);
  EXPECT_EQ(RopeOf({{"rope.scaling.factor", 0}}, "linear").linear_scale, 1);  // as some converters write for none
  EXPECT_EQ(RopeOf({{"rope.scaling.factor", 0.5}}, "yarn").magnitude, 1);
  const RopeConfig yarn = RopeOf({{"rope.scaling.factor", 4}, {"rope.scaling.yarn_beta_fast", 16}}, "yarn");
  EXPECT_EQ(yarn.yarn.original_ctx, 64);  // the context length where nothing else is said
  EXPECT_EQ(yarn.yarn.beta_fast, 16);
  EXPECT_EQ(yarn.yarn.beta_slow, 1);
  EXPECT_NEAR(yarn.magnitude, 1 + 0.1 * std::log(4.0), 1e-12);
  EXPECT_NEAR(RopeOf({{"rope.scaling.factor", 4}, {"rope.scaling.attn_factor", 0.5}}, "yarn").magnitude,
              0.5 * (1 + 0.1 * std::log(4.0)), 1e-12);
}

ModelConfig ConfigOf(const TinyFile& file) {
  const std::string path = file.Write();
  const ModelConfig config = ReadModelConfig(GgufFile::Open(path, false));
  std::filesystem::remove(path);
  return config;
}

TEST(Model, ScalesOfScores) {
  TinyFile file;
  file.counts["attention.key_length"] = 16;  // not the width over the heads
  EXPECT_EQ(ConfigOf(file).attention_scale, 0.25f);
  file.counts["block_count"] = 62;
  EXPECT_EQ(ConfigOf(file).attention_scale, 0.25f);
  file.architecture = "gemma3";  // the one of 27 billion parameters
  EXPECT_EQ(ConfigOf(file).attention_scale, 0.5f);
  file.reals["attention.scale"] = 0.75f;
  EXPECT_EQ(ConfigOf(file).attention_scale, 0.75f);
}

TEST(Model, WhichLayersAreLocal) {
  TinyFile file;
  file.architecture = "gemma3";
  file.counts["block_count"] = 7;
  EXPECT_TRUE(ConfigOf(file).local.empty()) << "no window is named";
  file.counts["attention.sliding_window"] = 8;
  EXPECT_EQ(ConfigOf(file).local, (std::vector<bool>{true, true, true, true, true, false, true}));
  EXPECT_EQ(ConfigOf(file).local_rope_base, 10000);
  file.counts["attention.sliding_window_pattern"] = 2;
  file.reals["rope.freq_base_swa"] = 500;
  EXPECT_EQ(ConfigOf(file).local, (std::vector<bool>{true, false, true, false, true, false, true}));
  EXPECT_EQ(ConfigOf(file).local_rope_base, 500);
  file.architecture = "phi3";  // whose window is none
  EXPECT_TRUE(ConfigOf(file).local.empty());
}

std::shared_ptr<const Model> LoadTiny(const std::string& name) {
  return Model::Load(std::string(LESSKV_SOURCE_DIR) + "/tests/data/models/" + name + ".gguf");
}

TEST(Model, LayersOfUnlikeKinds) {
  const auto gemma = LoadTiny("gemma3-local");
  const CacheShape shape = gemma->MakeCacheShape(100, ComputeType::kF32);
  for (size_t layer = 0; layer < 7; ++layer) {
    EXPECT_EQ(shape.layers[layer].window, layer == 5 ? 0u : 9u);
    EXPECT_EQ(shape.layers[layer].rope == shape.layers[0].rope, layer != 5);
  }
  EXPECT_NEAR(shape.layers[0].rope->frequencies()[1], std::pow(10000.0, -1.0 / 6), 1e-12);
  EXPECT_NEAR(shape.layers[5].rope->frequencies()[1], std::pow(1e6, -1.0 / 6) / 8, 1e-12);
  const auto smollm = LoadTiny("smollm3-nope")->MakeCacheShape(100, ComputeType::kF32);
  for (size_t layer = 0; layer < 5; ++layer) EXPECT_EQ(smollm.layers[layer].rope->n_dims(), layer == 3 ? 0u : 6u);
}

TEST(Model, LongContextsTakeTheLongFactors) {
  const auto phi = LoadTiny("phi3-longrope");
  const auto frequency = [&](size_t ctx) {
    return phi->MakeCacheShape(ctx, ComputeType::kF32).layers[1].rope->frequencies()[2];
  };
  EXPECT_NEAR(frequency(20) / frequency(21), 9.0 / 1.5, 1e-6);
  EXPECT_EQ(frequency(21), frequency(80));
}

// The same file in three parts, by whole tensors: the same weights, a fingerprint of its own, and a sidecar named for the
// model and not for its part.
TEST(Model, SplitFileLoadsAsOne) {
  const std::string whole = TinyFile().Write(), prefix = testing::TempDir() + "lesskv_model_test_split";
  const GgufFile file = GgufFile::Open(whole);
  const size_t n_tensors = file.tensors().size();
  std::vector<std::string> paths;
  for (size_t part = 0; part < 3; ++part) {
    GgufWriter writer;
    if (part == 0) {
      for (const auto& [key, value] : file.metadata()) writer.Add(key, value);
    }
    writer.Add("split.no", static_cast<uint16_t>(part));
    writer.Add("split.count", uint16_t{3});
    writer.Add("split.tensors.count", static_cast<int32_t>(n_tensors));
    for (size_t i = part * n_tensors / 3; i < (part + 1) * n_tensors / 3; ++i) {
      const GgufTensor& tensor = file.tensors()[i];
      writer.AddTensor(tensor.name, tensor.type, std::span(tensor.ne).first(tensor.n_dims), tensor.data);
    }
    paths.push_back(fmt::format("{}-{:05}-of-00003.gguf", prefix, part + 1));
    writer.Write(paths.back());
  }
  const auto expected = Model::Load(whole);
  for (const ModelLoading loading : {ModelLoading::kMap, ModelLoading::kRead, ModelLoading::kAuto}) {
    const auto model = Model::Load(paths[0], loading);
    EXPECT_EQ(model->parameter_count(), expected->parameter_count());
    EXPECT_EQ(model->weight_bytes(), expected->weight_bytes());
    EXPECT_NE(model->fingerprint(), expected->fingerprint());
    EXPECT_EQ(model->Sidecar().path, prefix + ".less.gguf");
    EXPECT_EQ(model->Sidecar().model_fingerprint, model->fingerprint());
  }
  for (const std::string& path : paths) std::filesystem::remove(path);
  std::filesystem::remove(whole);
}

struct BadFile {
  const char* name;
  std::function<void(TinyFile&)> spoil;
  std::vector<const char*> said;  // words the sentence must hold
};

const std::vector<BadFile> kBadFiles = {
    {"unknown architecture", [](TinyFile& f) { f.architecture = "mamba"; }, {"general.architecture", "mamba"}},
    {"no layers", [](TinyFile& f) { f.counts["block_count"] = 0; }, {"llama.block_count", "found 0"}},
    {"absurd layers", [](TinyFile& f) { f.counts["block_count"] = 4000000000u; }, {"block_count", "4000000000"}},
    {"missing key", [](TinyFile& f) { f.counts.erase("embedding_length"); }, {"embedding_length"}},
    {"absurd width", [](TinyFile& f) { f.counts["embedding_length"] = 1u << 30; }, {"embedding_length"}},
    {"absurd context", [](TinyFile& f) { f.counts["context_length"] = 0xffffffffu; }, {"context_length"}},
    {"KV heads do not divide", [](TinyFile& f) { f.counts["attention.head_count_kv"] = 3; }, {"divisor", "found 3"}},
    {"width no multiple of heads",
     [](TinyFile& f) {
       f.counts["attention.head_count"] = 3;
       f.counts.erase("attention.head_count_kv");
     },
     {"multiple of the 3 heads"}},
    {"odd head size", [](TinyFile& f) { f.counts["attention.key_length"] = 5; }, {"even number", "found 5"}},
    {"unequal value size", [](TinyFile& f) { f.counts["attention.value_length"] = 6; }, {"value_length", "found 6"}},
    {"partial rotation",
     [](TinyFile& f) { f.counts["rope.dimension_count"] = 2; },
     {"rope.dimension_count", "found 2"}},
    {"NaN epsilon", [](TinyFile& f) { f.reals["attention.layer_norm_rms_epsilon"] = NAN; }, {"epsilon", "nan"}},
    {"negative rope base", [](TinyFile& f) { f.reals["rope.freq_base"] = -1; }, {"rope.freq_base", "found -1"}},
    {"infinite scale",
     [](TinyFile& f) {
       f.texts["rope.scaling.type"] = "linear";
       f.reals["rope.scaling.factor"] = INFINITY;
     },
     {"rope.scaling.factor", "inf"}},
    {"other scaling", [](TinyFile& f) { f.texts["rope.scaling.type"] = "dynamic"; }, {"rope.scaling.type", "dynamic"}},
    {"another magnitude for YaRN",
     [](TinyFile& f) { f.reals["rope.scaling.yarn_attn_factor"] = 0.5; },
     {"yarn_attn_factor", "expected 1", "found 0.5"}},
    {"YaRN in part", [](TinyFile& f) { f.reals["rope.scaling.yarn_ext_factor"] = 0; }, {"yarn_ext_factor", "found 0"}},
    {"layers that predict further tokens",
     [](TinyFile& f) { f.counts["nextn_predict_layers"] = 1; },
     {"nextn_predict_layers", "found 1"}},
    {"local layers with heads of their own",
     [](TinyFile& f) {
       f.architecture = "gemma3";
       f.counts["attention.sliding_window"] = 8;
       f.counts["attention.key_length_swa"] = f.counts["attention.value_length_swa"] = 2;
     },
     {"attention.key_length_swa", "expected 4, as global layers have", "found 2"}},
    {"local layers that are rotated in part",
     [](TinyFile& f) {
       f.architecture = "gemma3";
       f.counts["attention.sliding_window"] = 8;
       f.counts["rope.dimension_count_swa"] = 2;
     },
     {"rope.dimension_count_swa", "expected 4, as global layers have", "found 2"}},
    {"experts", [](TinyFile& f) { f.counts["expert_count"] = 8; }, {"expert_count"}},
    {"unlike layers",
     [](TinyFile& f) {
       f.counts.erase("attention.head_count_kv");
       f.arrays["attention.head_count_kv"] = {1, 1, 2};
     },
     {"head_count_kv", "the same number in all layers (1 in the first)", "layer 2"}},
    {"soft caps", [](TinyFile& f) { f.reals["attn_logit_softcapping"] = 50; }, {"attn_logit_softcapping", "found 50"}},
    {"a factor for each layer",
     [](TinyFile& f) {
       f.arrays["rope.scaling.factor"] = {2, 2, 2};
     },
     {"rope.scaling.factor", "array of u32"}},
    {"attention to what comes later", [](TinyFile& f) { f.counts["attention.causal"] = 0; }, {"attention.causal", "found 0"}},
    {"a pattern of more layers",
     [](TinyFile& f) {
       f.architecture = "gemma3";
       f.counts["attention.sliding_window"] = 8;
       f.arrays["attention.sliding_window_pattern"] = {1, 1};
     },
     {"sliding_window_pattern", "one value for each of 1 layers", "found 2"}},
    {"an odd number of rotated channels",
     [](TinyFile& f) {
       f.architecture = "phi3";
       f.counts["rope.dimension_count"] = 3;
     },
     {"rope.dimension_count", "an even number up to the head size 4", "found 3"}},
    {"soft caps for no layer",
     [](TinyFile& f) { f.arrays["attn_logit_softcapping"] = {}; },
     {"attn_logit_softcapping", "array of u32"}},
    {"architectures are listed",
     [](TinyFile& f) { f.architecture = "gemma2"; },
     {"llama, qwen2, qwen3, gemma3, phi3, falcon, smollm3", "gemma2"}},
    {"LongRoPE without factors",
     [](TinyFile& f) { f.texts["rope.scaling.type"] = "longrope"; },
     {"rope_factors_short.weight is missing"}},
    {"qwen3 without norms of the heads",
     [](TinyFile& f) { f.architecture = "qwen3"; },
     {"blk.0.attn_q_norm.weight is missing"}},
    {"no embedding", [](TinyFile& f) { f.tensors.erase("token_embd.weight"); }, {"token_embd.weight is missing"}},
    {"no norm", [](TinyFile& f) { f.tensors.erase("output_norm.weight"); }, {"output_norm.weight is missing"}},
    {"no matrix", [](TinyFile& f) { f.tensors.erase("blk.0.ffn_up.weight"); }, {"blk.0.ffn_up.weight is missing"}},
    {"wrong shape",
     [](TinyFile& f) {
       f.tensors["blk.0.attn_k.weight"] = {8, 8};
     },
     {"blk.0.attn_k.weight", "expected shape [8, 4]", "found [8, 8]"}},
    {"a matrix of three dimensions",
     [](TinyFile& f) {
       f.tensors["blk.0.attn_k.weight"] = {8, 2, 2};
     },
     {"blk.0.attn_k.weight", "expected shape [8, 4]", "found [8, 2, 2]"}},
    {"transposed",
     [](TinyFile& f) {
       f.tensors["blk.0.ffn_down.weight"] = {8, 12};
     },
     {"blk.0.ffn_down.weight", "[12, 8]"}},
    {"wrong norm", [](TinyFile& f) { f.tensors["blk.0.attn_norm.weight"] = {7}; }, {"attn_norm.weight", "[8]", "[7]"}},
    {"norm in f16", [](TinyFile& f) { f.types["output_norm.weight"] = DType::kF16; }, {"expected type F32", "F16"}},
    {"integer matrix", [](TinyFile& f) { f.types["blk.0.attn_q.weight"] = DType::kI32; }, {"attn_q.weight", "I32"}},
    {"unknown tensor", [](TinyFile& f) { f.tensors["blk.0.attn_q_norm.weight"] = {4}; }, {"blk.0.attn_q_norm.weight"}},
    {"tensor of a layer too many", [](TinyFile& f) { f.tensors["blk.1.attn_norm.weight"] = {8}; }, {"blk.1.attn_norm"}},
    {"rope factors of another size",
     [](TinyFile& f) { f.tensors["rope_freqs.weight"] = {3}; },
     {"rope_freqs.weight", "[2]"}},
    {"rope factors of zero",
     [](TinyFile& f) { f.tensors["rope_freqs.weight"] = {2}; },
     {".gguf: tensor rope_freqs.weight", "found 0"}},
    {"rope factors without end",
     [](TinyFile& f) {
       f.tensors["rope_freqs.weight"] = {2};
       f.element = [](size_t) { return INFINITY; };
     },
     {".gguf: tensor rope_freqs.weight", "found inf"}},
};

TEST(Model, BrokenFilesAreRefusedByName) {
  for (const BadFile& bad : kBadFiles) {
    TinyFile file;
    bad.spoil(file);
    const std::string message = Refusal(file);
    EXPECT_FALSE(message.empty()) << bad.name << " was accepted";
    for (const char* word : bad.said) EXPECT_NE(message.find(word), std::string::npos) << bad.name << ": " << message;
  }
}

TEST(Model, UntiedOutputAndOptionalBiasesAreTaken) {
  TinyFile file;
  file.tensors["output.weight"] = {8, 5};
  file.tensors["blk.0.attn_output.bias"] = {8};
  file.tensors["blk.0.attn_rot_embd"] = {2};  // old converters wrote them; ignored
  file.tensors["blk.0.rope_freqs"] = {2};
  const std::string path = file.Write();
  const auto model = Model::Load(path);
  std::filesystem::remove(path);
  EXPECT_NE(model->output().data, model->token_embedding().data);
  EXPECT_EQ(model->layer(0).attn_output_bias.size(), 8u);
  EXPECT_TRUE(model->layer(0).q_bias.empty());
}

// As old converters wrote Qwen's and Phi's.
TEST(Model, OneMatrixMayHaveItsBiasesApart) {
  TinyFile file;
  for (const char* name : {"q", "k", "v"}) file.tensors.erase(fmt::format("blk.0.attn_{}.weight", name));
  file.tensors["blk.0.attn_qkv.weight"] = {8, 16};
  file.tensors["blk.0.attn_q.bias"] = {8};
  file.tensors["blk.0.attn_k.bias"] = file.tensors["blk.0.attn_v.bias"] = {4};
  const std::string path = file.Write();
  const auto model = Model::Load(path);
  std::filesystem::remove(path);
  EXPECT_EQ(model->layer(0).q_bias.size(), 8u);
  EXPECT_EQ(model->layer(0).k_bias.size(), 4u);
  EXPECT_EQ(model->layer(0).v_bias.size(), 4u);
}

// As Phi's and new Qwen's have: queries, keys and values one behind the other, in the matrix as in its biases.
TEST(Model, OneMatrixIsCutIntoThree) {
  TinyFile file;
  for (const char* name : {"q", "k", "v"}) file.tensors.erase(fmt::format("blk.0.attn_{}.weight", name));
  file.tensors["blk.0.attn_qkv.weight"] = {8, 16};
  file.tensors["blk.0.attn_qkv.bias"] = {16};
  file.element = [](size_t i) { return static_cast<float>(i); };
  const std::string path = file.Write();
  const auto model = Model::Load(path, ModelLoading::kRead);
  std::filesystem::remove(path);
  const LayerWeights& w = model->layer(0);
  EXPECT_EQ(w.q_bias, (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(w.k_bias, (std::vector<float>{8, 9, 10, 11}));
  EXPECT_EQ(w.v_bias, (std::vector<float>{12, 13, 14, 15}));
  EXPECT_EQ(*static_cast<const float*>(w.k.data), 64);
  EXPECT_EQ(*static_cast<const float*>(w.v.data), 96);
}

// The name goes first, then what fits beside the model and above it, by name; what belongs to another model is none.
TEST(Model, SidecarsThatFitAreFound) {
  const std::filesystem::path folder = testing::TempDir() + "lesskv_model_test_sidecars", inner = folder / "inner";
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(inner);
  const std::string path = TinyFile().Write((inner / "m.gguf").string());
  Sidecar sidecar = InitialSidecar({1, 2, 1, 4, 2, 4, FeatureKind::kExp}, 1);
  const auto write = [&](const std::filesystem::path& to, uint64_t identity) {
    sidecar.model_identity = identity;
    WriteSidecar(to.string(), sidecar);
  };
  const auto found = [&] { return std::filesystem::relative(Model::Load(path, ModelLoading::kRead)->Sidecar().path, folder).string(); };
  const uint64_t own = Model::Load(path, ModelLoading::kRead)->identity();
  write(inner / "a.less.gguf", own + 1);
  EXPECT_EQ(found(), "inner/m.less.gguf") << "where it would be";
  write(folder / "b.less.gguf", own);
  write(folder / "a.less.gguf", own);
  EXPECT_EQ(found(), "a.less.gguf");
  write(inner / "c.less.gguf", own);
  EXPECT_EQ(found(), "inner/c.less.gguf");
  write(inner / "m.less.gguf", own + 1);
  EXPECT_EQ(found(), "inner/m.less.gguf") << "which is then refused by name";
  std::filesystem::remove_all(folder);
}

TEST(Model, FingerprintSeparatesFiles) {
  TinyFile file;
  const std::string first = Model::Load(file.Write())->FingerprintText();
  EXPECT_EQ(first.size(), 16u);
  EXPECT_EQ(Model::Load(file.Write())->FingerprintText(), first);
  file.reals["rope.freq_base"] = 20000;
  EXPECT_NE(Model::Load(file.Write())->FingerprintText(), first);
  std::filesystem::remove(file.Write());
}

}  // namespace
}  // namespace lesskv
