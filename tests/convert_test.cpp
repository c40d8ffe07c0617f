// Hugging Face directories to model files: the same logits as transformers, the same ids as tokenizers, refusals that
// name the thing, and memory that does not grow with the model.
#include "convert/convert.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "child_peak.h"
#include "command_harness.h"
#include "convert/row_encoder.h"
#include "engine/engine.h"
#include "format/safetensors.h"
#include "kernels/quants/quants.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

const fs::path kModels = fs::path(LESSKV_SOURCE_DIR) / "tests/data/huggingface";
const char* const kNames[] = {"llama3", "mistral", "smollm",    "qwen2",      "qwen3",
                              "gemma3", "phi3",    "falcon-7b", "falcon-40b", "smollm3"};

Json ReadJson(const fs::path& path) {
  std::ifstream file(path);
  return Json::parse(file);
}
void WriteText(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

class ConvertTest : public testing_support::CommandTest {
 protected:
  std::string Convert(const std::string& in, const std::string& out = "out.gguf", std::optional<DType> type = {}) {
    const std::string path = Path(out);
    report_ = lesskv::Convert({.in = in, .out = path, .type = type, .progress = {}});
    return path;
  }

  // A copy of one of the committed directories that can be spoilt.
  fs::path Copy(const std::string& name) {
    const fs::path copy = Path(name);
    fs::remove_all(copy);
    fs::copy(kModels / name, copy);
    return copy;
  }

  static void Edit(const fs::path& path, const std::function<void(Json&)>& edit) {
    Json json = ReadJson(path);
    edit(json);
    WriteText(path, json.dump());
  }

  // Rewrites a shard, each tensor through `edit`, which may change it; a copy of `copied` is added under `copy_name`.
  struct Tensor {
    std::string name;
    SafetensorType type;
    std::vector<size_t> shape;
    std::vector<std::byte> data;
  };
  static void EditTensors(const fs::path& path, const std::function<void(Tensor&)>& edit,
                          const std::string& copied = "", const std::string& copy_name = "") {
    SafetensorsWriter writer;
    const SafetensorsFile file = SafetensorsFile::Open(path.string());
    for (const Safetensor& tensor : file.tensors()) {
      Tensor copy{tensor.name, tensor.type, tensor.shape, {tensor.data.begin(), tensor.data.end()}};
      edit(copy);
      writer.Add(copy.name, copy.type, copy.shape, copy.data);
      if (tensor.name == copied) writer.Add(copy_name, copy.type, copy.shape, copy.data);
    }
    writer.Write(path.string());
  }

  std::string ErrorOf(const fs::path& in) {
    try {
      Convert(in.string());
    } catch (const Error& error) {
      EXPECT_FALSE(Exists("out.gguf")) << error.what();
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "no Error was thrown";
    return "";
  }

  bool Noted(const std::string& part) const {
    return std::any_of(report_.notes.begin(), report_.notes.end(),
                       [&](const std::string& note) { return note.find(part) != std::string::npos; });
  }

  ConvertReport report_;
};

std::vector<float> Logits(const std::string& path, const std::vector<int64_t>& tokens, size_t ctx) {
  Engine engine(Model::Load(path), {.threads = 1, .compute = ComputeChoice::kF32});
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full+f32"), ctx));
  const std::vector<int32_t> ids(tokens.begin(), tokens.end());
  std::vector<float> logits;
  engine.Prefill({{&sequence, ids, LogitsRows::kAll}}, [&](std::span<const LogitsRow> rows) {
    for (const LogitsRow& row : rows) logits.insert(logits.end(), row.logits.begin(), row.logits.end());
  });
  return logits;
}

// The first rows of `want` are of tokens; those of an embedding's padding are not computed here.
void ExpectLogits(const std::vector<float>& got, const std::vector<float>& want, const std::string& name) {
  ASSERT_EQ(got.size(), want.size()) << name;
  const auto [low, high] = std::minmax_element(want.begin(), want.end());
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(double{got[i]} - want[i]));
  EXPECT_LE(worst, 1e-5 * (*high - *low)) << name;
}

TEST_F(ConvertTest, LogitsAreThoseOfTransformers) {
  for (const std::string name : kNames) {
    const std::string path = Convert(kModels / name);
    const auto expected = SafetensorsFile::Open((kModels / name / "expected.safetensors").string());
    auto tokens = expected.Values<int64_t>("tokens");
    ExpectLogits(Logits(path, tokens, 64), expected.Values<float>("logits"), name);
    if (expected.FindTensor("short_logits") == nullptr) continue;
    tokens.resize(6);
    ExpectLogits(Logits(path, tokens, 6), expected.Values<float>("short_logits"), name + ", short");
  }
}

TEST_F(ConvertTest, TokensAreThoseOfTokenizers) {
  for (const std::string name : kNames) {
    const auto tokenizer = Tokenizer::Create(LoadVocabulary(GgufFile::Open(Convert(kModels / name))));
    const Json expected = ReadJson(kModels / name / "expected.json");
    for (size_t i = 0; i < expected["texts"].size(); ++i) {
      const std::string text = expected["texts"][i];
      EXPECT_EQ(tokenizer->Encode(text, true, true), expected["ids"][i].get<std::vector<int32_t>>())
          << name << ": " << text;
    }
  }
}

TEST_F(ConvertTest, MetadataNameTheTokensAndTheTemplate) {
  const struct {
    const char* name;
    const char* pre;
    int64_t bos, eos, unk;
    bool add_bos;
    std::vector<int32_t> ends;
    bool has_template;
  } kCases[] = {
      {"llama3", "llama-bpe", 1, 0, -1, true, {0, 2}, true},    {"mistral", "default", 1, 2, 0, true, {2}, true},
      {"smollm", "smollm", 0, 2, -1, false, {0, 2}, true},      {"qwen2", "qwen2", -1, 2, -1, false, {0, 2}, true},
      {"qwen3", "qwen2", -1, 2, -1, false, {0, 2}, true},       {"gemma3", "default", 1, 2, 0, true, {2, 372}, true},
      {"phi3", "default", 1, 369, 0, true, {369, 371}, true},   {"falcon-7b", "falcon", 0, 0, -1, false, {0}, false},
      {"smollm3", "llama-bpe", -1, 2, -1, false, {0, 2}, true},
  };
  for (const auto& test : kCases) {
    const GgufFile file = GgufFile::Open(Convert(kModels / test.name));
    const auto id = [&](const char* key) {
      return file.GetOr<int64_t>(std::string("tokenizer.ggml.") + key + "_token_id", -1);
    };
    EXPECT_EQ(file.Get<std::string>("tokenizer.ggml.pre"), test.pre) << test.name;
    EXPECT_EQ(id("bos"), test.bos) << test.name;
    EXPECT_EQ(id("eos"), test.eos) << test.name;
    EXPECT_EQ(id("unknown"), test.unk) << test.name;
    EXPECT_EQ(file.Get<bool>("tokenizer.ggml.add_bos_token"), test.add_bos) << test.name;
    const auto tokenizer = Tokenizer::Create(LoadVocabulary(file));
    for (const int32_t end : test.ends) EXPECT_TRUE(tokenizer->IsEndOfGeneration(end)) << test.name << " " << end;
    EXPECT_EQ(file.Find("tokenizer.chat_template") != nullptr, test.has_template) << test.name;
    EXPECT_EQ(file.GetOr<std::string>("tokenizer.chat_template", "").starts_with("{% for m"), test.has_template);
  }
}

TEST_F(ConvertTest, EndsWithoutAKnownTextAreWritten) {
  const fs::path model = Copy("qwen3");
  Edit(model / "generation_config.json", [](Json& json) { json["eos_token_id"] = {2, 40, 41, 42}; });
  const GgufFile file = GgufFile::Open(Convert(model));
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(file));
  for (const int32_t id : {2, 40, 41}) EXPECT_TRUE(tokenizer->IsEndOfGeneration(id)) << id;
  EXPECT_TRUE(Noted("token 42 ends no generation"));
}

// Where generation_config.json is missing, config.json says what ends.
TEST_F(ConvertTest, EndsMayStandInTheModelsConfiguration) {
  const fs::path model = Copy("qwen3");
  fs::remove(model / "generation_config.json");
  Edit(model / "config.json", [](Json& json) { json["eos_token_id"] = {2, 40}; });
  EXPECT_TRUE(Tokenizer::Create(LoadVocabulary(GgufFile::Open(Convert(model))))->IsEndOfGeneration(40));
}

// The same tokenizer as other versions of its library write it.
TEST_F(ConvertTest, TokenizersOfOtherFormsAreTheSame) {
  const auto strings = [](const GgufFile& file, const char* key) { return file.Get<std::vector<std::string>>(key); };
  const GgufFile llama = GgufFile::Open(Convert(kModels / "llama3", "llama.gguf"));
  const fs::path bytes = Copy("llama3");
  Edit(bytes / "tokenizer.json", [](Json& json) {
    for (Json& merge : json["model"]["merges"]) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
    for (Json& token : json["added_tokens"]) token["special"] = false;  // <|...|> is special in any case
  });
  const GgufFile again = GgufFile::Open(Convert(bytes));
  EXPECT_EQ(strings(again, "tokenizer.ggml.merges"), strings(llama, "tokenizer.ggml.merges"));
  EXPECT_EQ(again.Get<std::vector<int32_t>>("tokenizer.ggml.token_type"), llama.Get<std::vector<int32_t>>("tokenizer.ggml.token_type"));

  const GgufFile mistral = GgufFile::Open(Convert(kModels / "mistral", "mistral.gguf"));
  for (const char* scheme : {"always", "first", "never"}) {
    const fs::path pieces = Copy("mistral");
    Edit(pieces / "tokenizer.json", [&](Json& json) {
      json["normalizer"] = nullptr;
      json["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", scheme}, {"split", false}};
      json["model"]["merges"].push_back(json["model"]["merges"][0]);  // of a pair listed twice the first place counts
    });
    const GgufFile file = GgufFile::Open(Convert(pieces));
    EXPECT_EQ(file.Get<bool>("tokenizer.ggml.add_space_prefix"), std::string(scheme) != "never") << scheme;
    EXPECT_EQ(Noted("a space is put behind special tokens, too"), std::string(scheme) == "first") << scheme;
    EXPECT_EQ(file.Get<std::vector<float>>("tokenizer.ggml.scores"), mistral.Get<std::vector<float>>("tokenizer.ggml.scores"));
  }
}

// Without a template around texts the flags decide.
TEST_F(ConvertTest, TokensAroundATextMayBeFlags) {
  const fs::path model = Copy("mistral");
  Edit(model / "tokenizer.json", [](Json& json) { json.erase("post_processor"); });
  for (const bool bos : {false, true}) {
    Edit(model / "tokenizer_config.json", [&](Json& json) { json["add_bos_token"] = bos, json["add_eos_token"] = !bos; });
    const GgufFile file = GgufFile::Open(Convert(model));
    EXPECT_EQ(file.Get<bool>("tokenizer.ggml.add_bos_token"), bos);
    EXPECT_EQ(file.Get<bool>("tokenizer.ggml.add_eos_token"), !bos);
  }
}

// Special tokens take the white space behind them in models of that name only.
TEST_F(ConvertTest, AModelThatStripsBehindSpecialTokensIsNamedForIt) {
  EXPECT_EQ(GgufFile::Open(Convert(kModels / "phi3")).Get<std::string>("general.name"), "phi3");
  fs::rename(Copy("phi3"), Path("mini"));
  EXPECT_EQ(GgufFile::Open(Convert(Path("mini"))).Get<std::string>("general.name"), "Phi-3 mini");
}

TEST_F(ConvertTest, RowsWithoutATokenBecomeUnusedOnes) {
  const GgufFile file = GgufFile::Open(Convert(kModels / "qwen2"));
  const auto tokens = file.Strings("tokenizer.ggml.tokens");
  ASSERT_EQ(tokens.size(), 304u);
  EXPECT_EQ(tokens[303], "[PAD303]");
  EXPECT_EQ(file.Get<std::vector<int32_t>>("tokenizer.ggml.token_type")[303], 5);
  EXPECT_EQ(file.FindTensor("output.weight"), nullptr);  // tied
}

TEST_F(ConvertTest, AddedTokensWithoutARowAreLeftOut) {
  const fs::path model = Copy("qwen3");
  Edit(model / "tokenizer.json", [](Json& json) {
    json["added_tokens"].push_back({{"id", 290}, {"content", "<image>"}, {"special", true}});
  });
  EXPECT_EQ(GgufFile::Open(Convert(model)).Strings("tokenizer.ggml.tokens").size(), 290u);
  EXPECT_TRUE(Noted("1 added tokens without a row"));
  // As fine-tuned models have for padding.
  Edit(model / "tokenizer_config.json", [](Json& json) { json["pad_token"] = "<image>"; });
  EXPECT_EQ(GgufFile::Open(Convert(model)).Find("tokenizer.ggml.padding_token_id"), nullptr);
  Edit(model / "tokenizer_config.json", [](Json& json) { json["pad_token"] = "<|end|>"; });
  EXPECT_EQ(GgufFile::Open(Convert(model)).Get<uint32_t>("tokenizer.ggml.padding_token_id"), 2u);
  Edit(model / "tokenizer_config.json", [](Json& json) { json["eos_token"] = "<image>"; });
  fs::remove(Path("out.gguf"));
  EXPECT_NE(ErrorOf(model).find("eos_token: expected a token of the vocabulary"), std::string::npos);
}

TEST_F(ConvertTest, ShardsAndTiesAreRead) {
  const GgufFile file = GgufFile::Open(Convert(kModels / "llama3"));
  EXPECT_NE(file.FindTensor("output.weight"), nullptr);
  ASSERT_NE(file.FindTensor("rope_freqs.weight"), nullptr);
  EXPECT_EQ(file.FindTensor("token_embd.weight")->type, DType::kBF16);
  EXPECT_EQ(file.FindTensor("output_norm.weight")->type, DType::kF32);
  EXPECT_EQ(file.Get<std::string>("general.name"), "llama3");
  // A tied checkpoint may still hold the output matrix.
  const fs::path tied = Copy("qwen3");
  EditTensors(
      tied / "model.safetensors", [](Tensor&) {}, "model.embed_tokens.weight", "lm_head.weight");
  EXPECT_EQ(GgufFile::Open(Convert(tied)).FindTensor("output.weight"), nullptr);
}

// What a checkpoint in shards leaves behind where one in a single file is saved over it.
TEST_F(ConvertTest, OneFileOfWeightsCountsBesideAnIndex) {
  const fs::path model = Copy("qwen3");
  WriteText(model / "model.safetensors.index.json", R"({"weight_map": {"model.norm.weight": "no-such-file"}})");
  EXPECT_EQ(GgufFile::Open(Convert(model)).Identity(),
            GgufFile::Open(Convert(kModels / "qwen3", "alone.gguf")).Identity());
}

TEST_F(ConvertTest, AnotherOutputMatrixIsTakenThoughTheConfigurationTies) {
  const fs::path tied = Copy("qwen3");
  const auto flip_sign = [](Tensor& tensor) {
    if (tensor.name == "lm_head.weight") tensor.data[1] ^= std::byte{0x80};  // the sign of the first value
  };
  EditTensors(
      tied / "model.safetensors", [](Tensor&) {}, "model.embed_tokens.weight", "lm_head.weight");
  EditTensors(tied / "model.safetensors", flip_sign);
  const GgufFile file = GgufFile::Open(Convert(tied));
  EXPECT_TRUE(Noted("lm_head.weight is not the embedding"));
  ASSERT_NE(file.FindTensor("output.weight"), nullptr);
  const auto &output = file.FindTensor("output.weight")->data, &embedding = file.FindTensor("token_embd.weight")->data;
  EXPECT_EQ(output[1], embedding[1] ^ std::byte{0x80});
  EXPECT_TRUE(std::ranges::equal(output.subspan(2), embedding.subspan(2)));
}

// llama.cpp refuses a window that no layer has.
TEST_F(ConvertTest, GemmaWithoutLocalLayersHasNoWindow) {
  const fs::path model = Copy("gemma3");
  Edit(model / "config.json", [](Json& json) { json["layer_types"] = std::vector<std::string>(7, "full_attention"); });
  const GgufFile file = GgufFile::Open(Convert(model));
  EXPECT_EQ(file.Find("gemma3.attention.sliding_window"), nullptr);
  EXPECT_EQ(file.Find("gemma3.attention.sliding_window_pattern"), nullptr);
  EXPECT_TRUE(ReadModelConfig(file).local.empty());
  EXPECT_NE(GgufFile::Open(Convert(kModels / "gemma3")).Find("gemma3.attention.sliding_window"), nullptr);
}

// As in transformers 5: the ratio of the contexts is only what stands for a factor that is missing.
TEST_F(ConvertTest, LongRopeGoesByItsFactor) {
  const auto magnitude = [&](const fs::path& model) {
    return GgufFile::Open(Convert(model)).Get<float>("phi3.rope.scaling.attn_factor");
  };
  EXPECT_NEAR(magnitude(kModels / "phi3"), std::sqrt(1 + std::log(64.0 / 6) / std::log(6)), 1e-6);
  const fs::path model = Copy("phi3");
  Edit(model / "config.json", [](Json& json) { json["rope_scaling"]["factor"] = 3; });
  EXPECT_NEAR(magnitude(model), std::sqrt(1 + std::log(3.0) / std::log(6)), 1e-6);
}

// What stands elsewhere in the files of other models, or nowhere.
TEST_F(ConvertTest, ConfigurationsOfOtherModelsBecomeTheSameMetadata) {
  const struct {
    const char* model;
    Json patch;
    std::string key;
    double value;
  } kCases[] = {
      {"llama3", {{"rms_norm_eps", nullptr}}, "llama.attention.layer_norm_rms_epsilon", 1e-6},
      {"smollm", {{"rope_scaling", {{"attention_factor", 1.5}}}}, "llama.rope.scaling.attn_factor", 1.5 / (1 + 0.1 * std::log(4.0))},
      {"smollm", {{"rope_scaling", {{"beta_fast", 16}}}}, "llama.rope.scaling.yarn_beta_fast", 16},
      {"smollm", {{"rope_scaling", {{"beta_slow", 2}}}}, "llama.rope.scaling.yarn_beta_fast", 32},
      {"smollm", {{"rope_scaling", {{"beta_slow", 2}}}}, "llama.rope.scaling.yarn_beta_slow", 2},
      {"smollm", {{"rope_scaling", {{"original_max_position_embeddings", nullptr}}}}, "llama.rope.scaling.original_context_length", 64},
      {"phi3", {{"rope_scaling", {{"factor", 0.5}}}}, "phi3.rope.scaling.attn_factor", 1},
      {"phi3", {{"rope_scaling", {{"attention_factor", 1.25}}}}, "phi3.rope.scaling.attn_factor", 1.25},
      {"phi3", {{"rope_scaling", {{"original_max_position_embeddings", 8}}}}, "phi3.rope.scaling.original_context_length", 8},
      {"phi3",
       {{"partial_rotary_factor", nullptr}, {"rope_scaling", {{"partial_rotary_factor", 0.75}}}},
       "phi3.rope.dimension_count",
       6},
      {"gemma3", {{"rope_parameters", {{"full_attention", {{"rope_theta", 5e5}}}}}}, "gemma3.rope.freq_base", 5e5},
      {"gemma3", {{"rope_parameters", {{"sliding_attention", {{"rope_theta", 2e4}}}}}}, "gemma3.rope.freq_base_swa", 2e4},
      {"gemma3", {{"rope_parameters", nullptr}, {"rope_local_base_freq", 3e4}}, "gemma3.rope.freq_base_swa", 3e4},
      {"gemma3", {{"rope_parameters", nullptr}}, "gemma3.rope.freq_base_swa", 1e4},
      {"gemma3", {{"sliding_window", nullptr}}, "gemma3.attention.sliding_window", 4096},
      {"gemma3", {{"query_pre_attn_scalar", 16}}, "gemma3.attention.scale", 0.25},
      {"falcon-7b", {{"multi_query", nullptr}}, "falcon.attention.head_count_kv", 1},
      {"falcon-7b", {{"max_position_embeddings", nullptr}}, "falcon.context_length", 2048},
  };
  for (const auto& test : kCases) {
    const fs::path model = Copy(test.model);
    Edit(model / "config.json", [&](Json& json) { json.merge_patch(test.patch); });
    EXPECT_NEAR(GgufFile::Open(Convert(model)).Get<double>(test.key), test.value, 1e-6 * test.value) << test.patch.dump();
  }
  const fs::path model = Copy("gemma3");
  Edit(model / "config.json", [](Json& json) { json.merge_patch({{"layer_types", nullptr}, {"sliding_window_pattern", 3}}); });
  EXPECT_EQ(ReadModelConfig(GgufFile::Open(Convert(model))).local, (std::vector<bool>{true, true, false, true, true, false, true}));
}

TEST_F(ConvertTest, AWindowThatIsNotAppliedIsSaid) {
  const fs::path model = Copy("mistral");
  for (const uint32_t window : {63u, 64u}) {
    Edit(model / "config.json", [&](Json& json) { json["sliding_window"] = window; });
    Convert(model);
    EXPECT_EQ(Noted("the sliding window of 63 tokens is not applied"), window < 64);
  }
}

// A checkpoint with a vision tower: the language model's part is the same file, but for its name.
TEST_F(ConvertTest, TheLanguageModelOfAMultimodalCheckpointIsTaken) {
  const GgufFile alone = GgufFile::Open(Convert(kModels / "gemma3", "alone.gguf"));
  for (const std::string prefix : {"language_model.", "model.language_model."}) {
    const fs::path model = Copy("gemma3");
    Edit(model / "config.json", [](Json& json) {
      Json text = json;
      text.erase("architectures");
      text.erase("vocab_size");  // such files leave defaults out
      json = {{"architectures", {"Gemma3ForConditionalGeneration"}}, {"text_config", text}};
    });
    const auto rename = [&](Tensor& tensor) {
      const std::string inner = tensor.name.substr(std::strlen("model."));
      tensor.name = prefix + (prefix.starts_with("model.") ? inner : tensor.name);
    };
    EditTensors(model / "model.safetensors", rename, "model.norm.weight", "vision_tower.norm.weight");
    const GgufFile file = GgufFile::Open(Convert(model));
    EXPECT_TRUE(Noted("1 tensors outside the language model are left out"));
    ASSERT_EQ(file.tensors().size(), alone.tensors().size()) << prefix;
    for (const GgufTensor& tensor : alone.tensors())
      EXPECT_TRUE(std::ranges::equal(tensor.data, file.FindTensor(tensor.name)->data)) << tensor.name;
  }
}

// Weights of the width 32 as every type, against rows encoded one by one.
TEST_F(ConvertTest, MatricesHaveTheTypeThatIsAskedFor) {
  const fs::path model = Copy("falcon-40b");
  const GgufFile reference = GgufFile::Open(Convert(model, "f32.gguf", DType::kF32));
  for (const DType type : {DType::kF16, DType::kBF16, DType::kQ8_0, DType::kQ4_0}) {
    const GgufFile file = GgufFile::Open(Convert(model, "out.gguf", type));
    size_t n_as_asked = 0;
    for (const GgufTensor& tensor : file.tensors()) {
      const GgufTensor& exact = *reference.FindTensor(tensor.name);
      if (tensor.type == DType::kF32) {
        EXPECT_TRUE(std::ranges::equal(tensor.data, exact.data)) << tensor.name;
        continue;
      }
      ASSERT_EQ(tensor.type, type);
      ++n_as_asked;
      std::vector<std::byte> row(RowBytes(type, tensor.RowLength()));
      for (size_t r = 0; r < tensor.Rows(); ++r) {
        const auto* values = reinterpret_cast<const float*>(exact.data.data()) + r * tensor.RowLength();
        QuantizeRow(type, values, tensor.RowLength(), row.data());
        ASSERT_EQ(std::memcmp(row.data(), tensor.data.data() + r * row.size(), row.size()), 0) << tensor.name;
      }
    }
    const bool blocks = Traits(type).block_elements > 1;
    EXPECT_EQ(n_as_asked > 0, !blocks) << Traits(type).name;  // rows of 16 and 24 are no blocks of 32
    EXPECT_EQ(Noted("kept as F32: "), blocks);
    const uint32_t number = type == DType::kF16 ? 1 : type == DType::kBF16 ? 32 : type == DType::kQ8_0 ? 7 : 2;
    EXPECT_EQ(file.Get<uint32_t>("general.file_type"), number);
    EXPECT_EQ(file.Find("general.quantization_version") != nullptr, blocks);
  }
}

class MemorySink final : public ByteSink {
 public:
  void Write(std::span<const std::byte> more) override { bytes.insert(bytes.end(), more.begin(), more.end()); }
  std::vector<std::byte> bytes;
};

// Rows of a mebibyte are encoded a few at a time; what is said of one is said of its place in the tensor.
TEST(RowEncoder, RowsKeepTheirPlaces) {
  constexpr size_t kRows = 9, kLength = size_t{1} << 20;
  RowEncoder encoder("m");
  MemorySink sink;
  size_t n_done = 0;
  encoder.Encode("t", kRows, kLength, DType::kQ4_0, [](size_t row, float* values) {
    std::fill_n(values, kLength, row == 3 ? 0.0f : static_cast<float>(row + 1));
    const float large = row == 1 ? 36.0f : row == 6 ? 115.0f : row == 8 ? 162.0f : 0.0f;  // beside which the others are lost
    for (size_t i = 0; i < kLength && large > 0; i += 32) values[i] = large;
  }, sink, [&](size_t n) { n_done += n; });
  EXPECT_EQ(n_done, kRows);
  ASSERT_EQ(sink.bytes.size(), kRows * RowBytes(DType::kQ4_0, kLength));
  std::vector<float> row(kLength);
  for (const size_t r : {0, 3, 4, 7}) {
    DequantizeRow(DType::kQ4_0, &sink.bytes[r * RowBytes(DType::kQ4_0, kLength)], kLength, row.data());
    EXPECT_NEAR(row[kLength - 1], r == 3 ? 0.0f : static_cast<float>(r + 1), 1e-2) << r;
  }
  EXPECT_EQ(encoder.losses().rows, 3u);
  EXPECT_EQ(encoder.losses().where, "row 6 of tensor 't'");
  try {
    encoder.Encode("t", kRows, kLength, DType::kF16, [](size_t r, float* values) {
      std::fill_n(values, kLength, r == 5 ? -65520.0f : 1.0f);
    }, sink, [](size_t) {});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "m: row 5 of tensor 't' holds 65520, more than F16 can; BF16 can");
  }
}

TEST_F(ConvertTest, ConfigurationsThatCannotBeRunAreNamed) {
  const struct {
    const char *model, *key;
    Json value;
    std::string said;
  } kCases[] = {
      {"llama3", "architectures", {"MambaForCausalLM"}, "config.json: architectures: expected one of LlamaForCausalLM"},
      {"llama3", "architectures", nullptr, "architectures: expected an array, found none"},
      {"llama3", "hidden_act", "gelu", "hidden_act: expected 'silu', found '\"gelu\"'"},
      {"llama3", "num_hidden_layers", "two", "num_hidden_layers: expected a count, found '\"two\"'"},
      {"llama3", "num_hidden_layers", -1, "num_hidden_layers: expected a count, found '-1'"},
      {"llama3", "num_hidden_layers", 4000000000u, "llama.block_count: expected a number in [1, 1024]"},
      {"llama3", "num_hidden_layers", 3, "tensor model.layers.2.input_layernorm.weight is missing"},
      {"llama3", "num_hidden_layers", 1, "is not part of architecture \"llama\" as lesskv knows it"},
      {"llama3", "num_attention_heads", 0, "num_attention_heads: expected at least 1"},
      {"llama3", "head_dim", 6, "expected shape [24, 8], found [16, 8]"},
      {"llama3", "hidden_size", 16, "model.embed_tokens.weight: expected shape [290, 16], found [290, 8]"},
      {"llama3", "vocab_size", 291, "has 290 rows, vocab_size is 291"},
      {"llama3", "rms_norm_eps", 0, "llama.attention.layer_norm_rms_epsilon: expected a number above 0"},
      {"llama3", "rope_scaling", {{"rope_type", "dynamic"}}, "rope_type: expected \"default\", \"linear\""},
      {"llama3", "rope_scaling", {{"rope_type", "linear"}}, "rope_scaling: factor: expected a number, found none"},
      {"llama3", "rope_scaling", 5, "rope_scaling: expected an object, found '5'"},
      {"llama3", "quantization_config", {{"bits", 4}}, "quantization_config: expected none"},
      {"llama3", "num_local_experts", 8, "num_local_experts: expected none"},
      {"smollm", "rope_scaling", {{"type", "yarn"}, {"factor", 4}, {"mscale_all_dim", 1.0}}, "mscale_all_dim: expected none"},
      {"qwen3", "head_dim", nullptr, "q_norm.weight: expected shape [128], found [6]"},  // 128 where nothing is said
      {"falcon-40b", "num_ln_in_parallel_attn", 1, "tensor transformer.h.0.input_layernorm.weight is missing"},
      {"llama3", "tie_word_embeddings", "yes", "tie_word_embeddings: expected true or false"},
      {"qwen2", "use_sliding_window", true, "use_sliding_window: expected false, found 'true'"},
      {"gemma3", "final_logit_softcapping", 30.0, "final_logit_softcapping: expected none"},
      {"gemma3", "attn_logit_softcapping", 1.0, "attn_logit_softcapping: expected none"},
      {"gemma3", "layer_types", {"full_attention"}, "layer_types: expected one for each of 7 layers, found 1"},
      {"falcon-7b", "parallel_attn", false, "parallel_attn: expected true"},
      {"falcon-7b", "alibi", true, "alibi: expected none"},
      {"smollm3", "no_rope_layers", {1, 1, 1, 1, 1}, "no_rope_layers: expected 0 in every fourth of 5 layers"},
      {"phi3",
       "rope_scaling",
       {{"type", "longrope"}, {"short_factor", {1.0}}, {"long_factor", {1.0}}},
       "short_factor: expected 3 numbers, one a rotated pair, found 1"},
  };
  for (const auto& test : kCases) {
    const fs::path model = Copy(test.model);
    Edit(model / "config.json", [&](Json& json) { json[test.key] = test.value; });
    const std::string message = ErrorOf(model);
    EXPECT_NE(message.find(test.said), std::string::npos) << test.key << ": " << message;
  }
}

TEST_F(ConvertTest, TokenizersThatCannotBeRunAreNamed) {
  const struct {
    const char *model, *pointer;
    Json value;
    std::string said;
  } kCases[] = {
      {"llama3", "/model/type", "Unigram", "tokenizer.json: model: type: expected \"BPE\", found '\"Unigram\"'"},
      {"llama3", "/model/merges/0", 7, "merges: expected pairs of texts, found '7'"},
      {"llama3", "/model/vocab/a", -3, "expected an id below"},
      {"llama3", "/model/vocab/a", 5, "expected an id of its own"},
      {"llama3", "/model/end_of_word_suffix", "</w>", "end_of_word_suffix: expected none"},
      {"llama3", "/normalizer", {{"type", "Lowercase"}}, "normalizer: type: expected \"NFC\" or no normalizer"},
      {"llama3", "/pre_tokenizer/pretokenizers/0/pattern/Regex", "[a-z]+",
       "no known pre-tokenizer cuts text by '[a-z]+'"},
      {"llama3", "/pre_tokenizer/pretokenizers/0/behavior", "MergedWithNext", "behavior: expected \"Isolated\""},
      {"llama3", "/pre_tokenizer/pretokenizers/0/invert", true, "behavior: expected \"Isolated\""},
      {"llama3", "/pre_tokenizer/pretokenizers/1/add_prefix_space", true, "add_prefix_space: expected false"},
      {"llama3", "/pre_tokenizer/pretokenizers/0/type", "Whitespace", "expected a step of a known pre-tokenizer"},
      {"llama3", "/post_processor/processors/1/single/0/SpecialToken/id", "<|end|>", "the beginning token"},
      {"llama3", "/post_processor", {{"type", "BertProcessing"}}, "expected \"TemplateProcessing\" or \"ByteLevel\""},
      {"llama3", "/added_tokens/0/content", "", "content: expected a text that is not empty"},
      {"mistral", "/model/byte_fallback", false, "byte_fallback: expected true"},
      {"mistral", "/normalizer/normalizers/1/content", "_", "expected a Prepend of U+2581 or a Replace"},
      {"mistral", "/pre_tokenizer", {{"type", "Whitespace"}}, "pre_tokenizer: type: expected \"Metaspace\""},
      {"mistral", "/model/unk_token", "<none>", "unk_token: expected a token of the vocabulary"},
  };
  for (const auto& test : kCases) {
    const fs::path model = Copy(test.model);
    Edit(model / "tokenizer.json", [&](Json& json) { json[Json::json_pointer(test.pointer)] = test.value; });
    const std::string message = ErrorOf(model);
    EXPECT_NE(message.find(test.said), std::string::npos) << test.pointer << ": " << message;
  }
}

TEST_F(ConvertTest, DamagedDirectoriesAreRefused) {
  const auto shard = [](int i) { return fmt::format("model-{:05}-of-00002.safetensors", i); };
  const struct {
    std::string said;
    std::function<void(const fs::path&)> damage;
  } kCases[] = {
      {"has no config.json", [](const fs::path& m) { fs::remove(m / "config.json"); }},
      {"config.json is not valid JSON", [](const fs::path& m) { WriteText(m / "config.json", "{\"a\":"); }},
      {"config.json is not valid JSON ([json.exception.parse_error.101] parse error: nested deeper than 64 levels)",
       [](const fs::path& m) { WriteText(m / "config.json", std::string(200000, '[') + std::string(200000, ']')); }},
      {"config.json is not a JSON object", [](const fs::path& m) { WriteText(m / "config.json", "[1]"); }},
      {"has no model-00002-of-00002.safetensors, which model.safetensors.index.json names",
       [&](const fs::path& m) { fs::remove(m / shard(2)); }},
      {"is not a directory", [](const fs::path& m) { fs::remove_all(m), WriteText(m, "x"); }},
      {"there is no directory", [](const fs::path& m) { fs::remove_all(m); }},
      {"has neither model.safetensors nor model.safetensors.index.json; pytorch_model.bin files are not read",
       [](const fs::path& m) {
         fs::remove(m / "model.safetensors.index.json");
         WriteText(m / "pytorch_model.bin", "x");
       }},
      {"expected the name of a file beside it",
       [](const fs::path& m) {
         Edit(m / "model.safetensors.index.json", [](Json& j) { j["weight_map"]["lm_head.weight"] = "../x"; });
       }},
      {"has no tensor 'extra', which model.safetensors.index.json places there",
       [&](const fs::path& m) {
         Edit(m / "model.safetensors.index.json", [&](Json& j) { j["weight_map"]["extra"] = shard(1); });
       }},
      {"tensor 'lm_head.weight' is in another shard, too",
       [&](const fs::path& m) {
         EditTensors(m / shard(2), [](Tensor& t) {
           if (t.name == "model.norm.weight") t.name = "lm_head.weight";
         });
       }},
      {"data_offsets", [&](const fs::path& m) { fs::resize_file(m / shard(2), fs::file_size(m / shard(2)) - 1); }},
      {"expected type F32, F16 or BF16, found I64",
       [&](const fs::path& m) {
         EditTensors(m / shard(2), [](Tensor& t) {
           if (t.name == "model.norm.weight") t.type = SafetensorType::kI64, t.shape = {2};
         });
       }},
      {"row 3 of tensor 'lm_head.weight' holds a value that is not finite",
       [&](const fs::path& m) {
         EditTensors(m / shard(1), [](Tensor& t) {
           if (t.name == "lm_head.weight") t.data[3 * 16] = std::byte{0x80}, t.data[3 * 16 + 1] = std::byte{0x7f};
         });
       }},
      {"has no tokenizer.json", [](const fs::path& m) { fs::remove(m / "tokenizer.json"); }},
      {"bos_token: expected a token of the vocabulary, found '<none>'",
       [](const fs::path& m) { Edit(m / "tokenizer_config.json", [](Json& j) { j["bos_token"] = "<none>"; }); }},
      {"single: '<|start|>' is put before every text, but nothing says that it is the beginning token: bos_token is missing in "
       "tokenizer_config.json, and bos_token_id in config.json",
       [](const fs::path& m) {
         fs::remove(m / "tokenizer_config.json");
         for (const char* name : {"config.json", "generation_config.json"})
           if (fs::exists(m / name)) Edit(m / name, [](Json& j) { j.erase("bos_token_id"); });
       }},
      {"eos_token_id: expected token ids below 290",
       [](const fs::path& m) { Edit(m / "generation_config.json", [](Json& j) { j["eos_token_id"] = 290; }); }},
  };
  for (const auto& test : kCases) {
    const fs::path model = Copy("llama3");
    test.damage(model);
    const std::string message = ErrorOf(model);
    EXPECT_NE(message.find(test.said), std::string::npos) << message;
  }
}

TEST_F(ConvertTest, AFailureLeavesTheOldFile) {
  const fs::path model = Copy("qwen3");
  Write("out.gguf", "old");
  EditTensors(model / "model.safetensors", [](Tensor& tensor) {
    if (tensor.name == "model.norm.weight") tensor.data[1] = std::byte{0x7f}, tensor.data[0] = std::byte{0x80};
  });
  EXPECT_THROW(Convert(model), Error);
  EXPECT_EQ(Read("out.gguf"), "old");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 2);  // no temporary file
}

TEST_F(ConvertTest, TheCommandConvertsAndRuns) {
  const std::string in = (kModels / "mistral").string();
  const auto done = Shell(fmt::format("$L convert '{}' m.gguf --type f16", in));
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_EQ(done.out, "");
  EXPECT_NE(done.err.find("note: chat template 'tool_use' is left out\n"), std::string::npos) << done.err;
  EXPECT_NE(done.err.find("m.gguf: F16, "), std::string::npos) << done.err;
  EXPECT_EQ(Shell("$L run -m m.gguf -p the -n 3 --temp 0").status, 0);
  ExpectOneSentence(Shell(fmt::format("$L convert '{}' x.gguf --type Q6_K", in)), 2,
                    "expected F32, F16, BF16, Q8_0 or Q4_0");
  ExpectOneSentence(Shell(fmt::format("$L convert '{}' absent/x.gguf", in)), 2, "OUT");
  ExpectOneSentence(Shell("$L convert absent x.gguf"), 2, "there is no directory absent");
  Copy("qwen3");
  ExpectOneSentence(Shell("$L convert qwen3 qwen3/model.safetensors"), 2, "are the same file");
}

// A model of about 200 MB of weights, its shard written in pieces.
void WriteLargeModel(const fs::path& folder, size_t d_ffn) {
  fs::create_directories(folder);
  fs::copy_file(kModels / "qwen3/tokenizer.json", folder / "tokenizer.json");
  const size_t d = 64, n_vocab = 290;
  Json config = ReadJson(kModels / "llama3/config.json");
  config.update({{"hidden_size", d}, {"head_dim", 16}, {"intermediate_size", d_ffn}, {"num_hidden_layers", 1}});
  config.update({{"rope_scaling", nullptr}, {"tie_word_embeddings", true}, {"bos_token_id", 1}});
  WriteText(folder / "config.json", config.dump());
  const std::pair<std::string, std::vector<size_t>> tensors[] = {{"model.embed_tokens.weight", {n_vocab, d}},
                                                                 {"model.norm.weight", {d}},
                                                                 {"input_layernorm.weight", {d}},
                                                                 {"post_attention_layernorm.weight", {d}},
                                                                 {"self_attn.q_proj.weight", {64, d}},
                                                                 {"self_attn.k_proj.weight", {32, d}},
                                                                 {"self_attn.v_proj.weight", {32, d}},
                                                                 {"self_attn.o_proj.weight", {d, 64}},
                                                                 {"mlp.gate_proj.weight", {d_ffn, d}},
                                                                 {"mlp.up_proj.weight", {d_ffn, d}},
                                                                 {"mlp.down_proj.weight", {d, d_ffn}}};
  Json header = Json::object();
  size_t offset = 0;
  for (const auto& [name, shape] : tensors) {
    const size_t bytes = 2 * shape[0] * (shape.size() == 2 ? shape[1] : 1);
    const std::string full = name.starts_with("model.") ? name : "model.layers.0." + name;
    header[full] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  std::ofstream out(folder / "model.safetensors", std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), sizeof(length)) << text;
  const std::string piece(1 << 16, '\x3c');  // BF16 of 0.0115
  for (size_t done = 0; done < offset; done += piece.size())
    out.write(piece.data(), static_cast<std::streamsize>(std::min(piece.size(), offset - done)));
}

TEST_F(ConvertTest, MemoryDoesNotGrowWithTheModel) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer keeps freed memory and shadows the rest";
#endif
  const auto peak = [&](const std::string& name, size_t d_ffn) {
    WriteLargeModel(Path(name), d_ffn);
    return testing_support::PeakOfRun({"convert", Path(name), Path(name + ".gguf"), "--type", "Q8_0", "-t", "2"}, "/dev/null");
  };
  const size_t small = peak("small", 1 << 16), large = peak("large", 1 << 19);  // 25 and 201 MB
  const double weights = static_cast<double>(fs::file_size(Path("large") + "/model.safetensors"));
  fmt::print("{:.0f} MB of weights: {:.1f} MB resident, {:.1f} MB for an eighth of them\n", weights / 1e6,
             static_cast<double>(large) / 1e6, static_cast<double>(small) / 1e6);
  EXPECT_LT(static_cast<double>(large), static_cast<double>(small) + 0.15 * weights);
  EXPECT_LT(static_cast<double>(large), 0.5 * weights);
}

}  // namespace
}  // namespace lesskv
