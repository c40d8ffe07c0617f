#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "base/error.h"

namespace lesskv {
namespace {

// Bounds that no real model comes near; what lies beyond them is a damaged or hostile file.
constexpr size_t kMaxLayers = 1024;
constexpr size_t kMaxHeads = 4096;
constexpr size_t kMaxHeadDim = 2048;
constexpr size_t kMaxWidth = size_t{1} << 20;
constexpr size_t kMaxFfn = size_t{1} << 22;
constexpr size_t kMaxVocab = size_t{1} << 24;
constexpr size_t kMaxContext = size_t{1} << 28;

// Reads `ARCHITECTURE.key` and checks its range; every refusal names the file, the key, what was expected and found.
class KeyReader {
 public:
  KeyReader(const GgufFile& file, std::string architecture) : file_(file), prefix_(std::move(architecture) + ".") {}

  bool Has(std::string_view key) const { return file_.Find(prefix_ + std::string(key)) != nullptr; }

  size_t Count(std::string_view key, size_t high) const {
    const std::string full = prefix_ + std::string(key);
    const auto value = file_.Get<uint64_t>(full);
    if (value < 1 || value > high) Refuse(full, fmt::format("a number in [1, {}]", high), fmt::format("{}", value));
    return static_cast<size_t>(value);
  }

  size_t CountOr(std::string_view key, size_t high, size_t fallback) const {
    return Has(key) ? Count(key, high) : fallback;
  }

  // In (0, high].
  float Real(std::string_view key, float high) const {
    const std::string full = prefix_ + std::string(key);
    const auto value = file_.Get<float>(full);
    if (!(value > 0) || !(value <= high))
      Refuse(full, fmt::format("a number above 0, at most {}", high), fmt::format("{}", value));
    return value;
  }

  float RealOr(std::string_view key, float high, float fallback) const { return Has(key) ? Real(key, high) : fallback; }

  std::string TextOr(std::string_view key, const std::string& fallback) const {
    return file_.GetOr<std::string>(prefix_ + std::string(key), fallback);
  }

  [[noreturn]] void Refuse(std::string_view key, std::string_view expected, std::string_view found) const {
    Fail(ErrorCode::kBadFile, "{}: {}: expected {}, found {}", file_.name(), key, expected, found);
  }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

void ReadHeads(const KeyReader& keys, ModelConfig& config) {
  config.n_heads = keys.Count("attention.head_count", kMaxHeads);
  config.n_kv_heads = keys.CountOr("attention.head_count_kv", kMaxHeads, config.n_heads);
  if (config.n_heads % config.n_kv_heads != 0)
    keys.Refuse("attention.head_count_kv", fmt::format("a divisor of the {} query heads", config.n_heads),
                fmt::format("{}", config.n_kv_heads));
  if (!keys.Has("attention.key_length") && config.d_model % config.n_heads != 0)
    keys.Refuse("embedding_length", fmt::format("a multiple of the {} heads", config.n_heads),
                fmt::format("{}", config.d_model));
  config.head_dim = keys.CountOr("attention.key_length", kMaxHeadDim, config.d_model / config.n_heads);
  const size_t value_length = keys.CountOr("attention.value_length", kMaxHeadDim, config.head_dim);
  if (value_length != config.head_dim)
    keys.Refuse("attention.value_length", fmt::format("{}, as the keys have", config.head_dim),
                fmt::format("{}", value_length));
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim || config.head_dim == 0)
    keys.Refuse("head size", fmt::format("an even number in [2, {}]", kMaxHeadDim), fmt::format("{}", config.head_dim));
}

void ReadRope(const KeyReader& keys, ModelConfig& config) {
  const size_t rotated = keys.CountOr("rope.dimension_count", kMaxHeadDim, config.head_dim);
  if (rotated != config.head_dim)
    keys.Refuse("rope.dimension_count", fmt::format("the head size {}", config.head_dim), fmt::format("{}", rotated));
  config.rope_base = keys.RealOr("rope.freq_base", 1e12f, 10000.0f);
  float factor = keys.RealOr("rope.scale_linear", 1e6f, 1.0f);  // the name in files of 2023
  const std::string type = keys.TextOr("rope.scaling.type", "none");
  if (type == "linear") {
    factor = keys.Real("rope.scaling.factor", 1e6f);
  } else if (type != "none") {
    keys.Refuse("rope.scaling.type", "\"none\" or \"linear\"", Quoted(type));
  }
  config.rope_factor = factor;
}

// Files pad their matrices to round numbers of rows. Those rows have no token: nothing is ever looked up in them, and
// no logit is computed of them, so that all probabilities are of tokens. Without a vocabulary every row is a token.
void ReadVocabularySize(const GgufFile& file, const KeyReader& keys, ModelConfig& config) {
  const GgufTensor* embedding = file.FindTensor("token_embd.weight");
  if (embedding == nullptr) Fail(ErrorCode::kNotFound, "{}: tensor token_embd.weight is missing", file.name());
  const size_t rows = embedding->Rows();
  if (rows > kMaxVocab)
    keys.Refuse("token_embd.weight", fmt::format("at most {} rows", kMaxVocab), fmt::format("{}", rows));
  const GgufValue* tokens = file.Find("tokenizer.ggml.tokens");
  const size_t n_tokens = tokens != nullptr && tokens->is_array() ? tokens->size() : 0;
  config.n_vocab = n_tokens == 0 ? rows : std::min(rows, n_tokens);
  const size_t stated = keys.CountOr("vocab_size", kMaxVocab, rows);
  if (stated != rows && stated != config.n_vocab)
    keys.Refuse("vocab_size", fmt::format("the {} rows of token_embd.weight", rows), fmt::format("{}", stated));
}

}  // namespace

ModelConfig ReadModelConfig(const GgufFile& file) {
  ModelConfig config;
  config.architecture = file.Get<std::string>("general.architecture");
  config.name = file.GetOr<std::string>("general.name", "");
  if (config.architecture == "qwen2") {
    config.rope_style = RopeStyle::kHalves;
    config.qkv_bias = true;
  } else if (config.architecture != "llama") {
    Fail(ErrorCode::kBadFile, "{}: general.architecture: expected \"llama\" or \"qwen2\", found {}", file.name(),
         Quoted(config.architecture));
  }
  const KeyReader keys(file, config.architecture);
  if (keys.Has("expert_count") && file.Get<uint64_t>(config.architecture + ".expert_count") != 0)
    keys.Refuse("expert_count", "0 (mixtures of experts are not supported)", "more");
  config.n_layers = keys.Count("block_count", kMaxLayers);
  config.d_model = keys.Count("embedding_length", kMaxWidth);
  config.d_ffn = keys.Count("feed_forward_length", kMaxFfn);
  config.train_ctx = keys.Count("context_length", kMaxContext);
  config.norm_eps = keys.Real("attention.layer_norm_rms_epsilon", 1.0f);
  ReadHeads(keys, config);
  ReadRope(keys, config);

  ReadVocabularySize(file, keys, config);
  return config;
}

}  // namespace lesskv
