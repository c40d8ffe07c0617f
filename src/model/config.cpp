#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>

#include "base/error.h"
#include "kvcache/cache_shape.h"

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

// Biases, a norm before the feed-forward part of a parallel layer, queries, keys and values in one matrix (attn_qkv) and
// a tied output are seen from the tensors.
constexpr Architecture kArchitectures[] = {
    {.name = "llama"},
    {.name = "qwen2", .rope_style = RopeStyle::kHalves},
    {.name = "qwen3", .rope_style = RopeStyle::kHalves, .qk_norm = true},
    {.name = "gemma3",
     .rope_style = RopeStyle::kHalves,
     .activation = Activation::kGeluTanhGate,
     .qk_norm = true,
     .post_norms = true,
     .scaled_embedding = true,
     .local_layers = true},
    // Its sliding window is not one: see ReadLocalLayers.
    {.name = "phi3", .rope_style = RopeStyle::kHalves, .gate_in_up = true, .partial_rotation = true},
    {.name = "falcon",
     .rope_style = RopeStyle::kHalves,
     .norm = NormKind::kLayer,
     .activation = Activation::kGelu,
     .parallel = true},
    {.name = "smollm3", .unrotated_every = 4},
};

// Metadata that would change the result and that no architecture above has: refused unless it is neutral.
struct ForeignKey {
  std::string_view key;
  double neutral;
};
constexpr ForeignKey kForeignKeys[] = {
    {"expert_count", 0},          {"attn_logit_softcapping", 0}, {"final_logit_softcapping", 0},
    {"attention.clamp_kqv", 0},   {"attention.max_alibi_bias", 0}, {"attention.causal", 1},
    {"embedding_scale", 1},       {"residual_scale", 1},         {"logit_scale", 1},
    {"rope.scaling.yarn_log_multiplier", 0}, {"rope.scaling.yarn_ext_factor", 1}, {"rope.scaling.yarn_attn_factor", 1},
    {"nextn_predict_layers", 0},  // of block_count, behind the model's own
};

// Reads `ARCHITECTURE.key` and checks its range; every refusal names the file, the key, what was expected and found.
class KeyReader {
 public:
  KeyReader(const GgufFile& file, std::string architecture) : file_(file), prefix_(std::move(architecture) + ".") {}

  bool Has(std::string_view key) const { return file_.Find(prefix_ + std::string(key)) != nullptr; }

  // A number, or an array of one number a layer, which must be equal.
  size_t Count(std::string_view key, size_t high) const {
    const std::string full = prefix_ + std::string(key);
    const GgufValue* const stored = file_.Find(full);
    const bool is_array = stored != nullptr && stored->is_array();
    const uint64_t value = is_array ? OneOf(full, *stored) : file_.Get<uint64_t>(full);
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

  // Truth values count as 0 and 1. An array is refused: what it holds would be ignored.
  double NumberOr(std::string_view key, double fallback) const {
    const std::string full = prefix_ + std::string(key);
    const GgufValue* const value = file_.Find(full);
    if (value == nullptr) return fallback;
    const auto truth = value->is_array() ? std::nullopt : value->Element<bool>(0);
    return truth ? *truth : file_.Get<double>(full);
  }

  // One truth value a layer; empty without the key or where it holds a number.
  std::vector<bool> Layers(std::string_view key, size_t n_layers) const {
    const GgufValue* const value = file_.Find(prefix_ + std::string(key));
    if (value == nullptr || !value->is_array()) return {};
    if (value->size() != n_layers)
      Refuse(prefix_ + std::string(key), fmt::format("one value for each of {} layers", n_layers),
             fmt::format("{}", value->size()));
    return file_.Get<std::vector<bool>>(prefix_ + std::string(key));
  }

  std::string TextOr(std::string_view key, const std::string& fallback) const {
    return file_.GetOr<std::string>(prefix_ + std::string(key), fallback);
  }

  [[noreturn]] void Refuse(std::string_view key, std::string_view expected, std::string_view found) const {
    Fail(ErrorCode::kBadFile, "{}: {}: expected {}, found {}", file_.name(), key, expected, found);
  }

 private:
  uint64_t OneOf(const std::string& key, const GgufValue& array) const {
    const auto first = array.size() == 0 ? std::nullopt : array.Element<uint64_t>(0);
    if (!first) Refuse(key, "a number, or one a layer", fmt::format("{} of {}", array.TypeName(), array.size()));
    for (size_t i = 1; i < array.size(); ++i)
      if (array.Element<uint64_t>(i) != first)
        Refuse(key, fmt::format("the same number in all layers ({} in the first)", *first),
               fmt::format("another in layer {}", i));
    return *first;
  }

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
  if (config.head_dim % 2 != 0 || config.head_dim > kMaxHeadDim)
    keys.Refuse("head size", fmt::format("an even number in [2, {}]", kMaxHeadDim), fmt::format("{}", config.head_dim));
}

// The stretching of positions. YaRN's angles and LongRoPE's factors come with a magnitude (rope.h).
void ReadRopeScaling(const KeyReader& keys, ModelConfig& config) {
  const std::string type = keys.TextOr("rope.scaling.type", "linear");
  config.original_ctx = keys.CountOr("rope.scaling.original_context_length", kMaxContext, config.train_ctx);
  RopeConfig& rope = config.rope;
  rope.magnitude = keys.RealOr("rope.scaling.attn_factor", 100, 1);
  if (type == "none") return;  // no stretching, whatever the factor
  if (type != "linear" && type != "yarn" && type != "longrope")
    keys.Refuse("rope.scaling.type", "\"none\", \"linear\", \"yarn\" or \"longrope\"", Quoted(type));
  // rope.scale_linear is the name in files of 2023; some converters write a factor of 0 for none.
  const char* const factor = keys.Has("rope.scaling.factor") ? "rope.scaling.factor" : "rope.scale_linear";
  config.long_rope = type == "longrope";
  rope.linear_scale = keys.NumberOr(factor, 0) == 0 ? 1.0 : keys.Real(factor, 1e6f);
  if (type != "yarn") return;
  rope.yarn = {.original_ctx = static_cast<double>(config.original_ctx),
               .beta_fast = keys.RealOr("rope.scaling.yarn_beta_fast", 1e6f, 32),
               .beta_slow = keys.RealOr("rope.scaling.yarn_beta_slow", 1e6f, 1)};
  rope.magnitude *= 1 + 0.1 * std::log(std::max(1.0, rope.linear_scale));  // section 3.4 of the paper
}

void ReadRope(const KeyReader& keys, ModelConfig& config) {
  const size_t rotated = keys.CountOr("rope.dimension_count", kMaxHeadDim, config.head_dim);
  const bool fits = config.architecture.partial_rotation ? rotated <= config.head_dim && rotated % 2 == 0
                                                         : rotated == config.head_dim;
  if (!fits)
    keys.Refuse("rope.dimension_count",
                fmt::format("{} head size {}", config.architecture.partial_rotation ? "an even number up to the" : "the",
                            config.head_dim),
                fmt::format("{}", rotated));
  config.rope.n_dims = rotated;
  config.rope.style = config.architecture.rope_style;
  config.rope.base = keys.RealOr("rope.freq_base", 1e12f, 10000.0f);
  ReadRopeScaling(keys, config);
}

// Local layers have the heads of the others.
void RequireSame(const KeyReader& keys, std::string_view key, size_t global) {
  const size_t local = keys.CountOr(key, kMaxHeadDim, global);
  if (local != global) keys.Refuse(key, fmt::format("{}, as global layers have", global), fmt::format("{}", local));
}

// Which layers see a window only. Phi 3's metadata name a window (2047 for the context of 4096), but its layers attend
// to everything in llama.cpp, whose results we follow.
void ReadLocalLayers(const KeyReader& keys, ModelConfig& config) {
  if (!config.architecture.local_layers || keys.NumberOr("attention.sliding_window", 0) == 0) return;
  RequireSame(keys, "attention.key_length_swa", config.head_dim);
  RequireSame(keys, "attention.value_length_swa", config.head_dim);
  RequireSame(keys, "rope.dimension_count_swa", config.rope.n_dims);
  config.window = keys.Count("attention.sliding_window", kMaxContext);
  config.local_rope_base = keys.RealOr("rope.freq_base_swa", 1e12f, 10000.0f);
  config.local = keys.Layers("attention.sliding_window_pattern", config.n_layers);
  if (!config.local.empty()) return;
  const size_t period = keys.CountOr("attention.sliding_window_pattern", kMaxLayers, 6);  // gemma 3's: five of six
  for (size_t layer = 0; layer < config.n_layers; ++layer) config.local.push_back((layer + 1) % period != 0);
}

void ReadAttentionScale(const KeyReader& keys, ModelConfig& config) {
  config.attention_scale = UsualScale(config.head_dim);
  // Gemma 3 27B, known by its layers: no key says that its queries are scaled as if heads shared d_model evenly.
  if (config.architecture.name == "gemma3" && config.n_layers == 62)
    config.attention_scale = UsualScale(config.d_model / config.n_heads);
  config.attention_scale = keys.RealOr("attention.scale", 1e6f, config.attention_scale);
}

Architecture FindArchitecture(const GgufFile& file) {
  const auto name = file.Get<std::string>("general.architecture");
  std::string known;
  for (const Architecture& architecture : kArchitectures) {
    if (architecture.name == name) return architecture;
    known += (known.empty() ? "" : ", ") + std::string(architecture.name);
  }
  Fail(ErrorCode::kBadFile, "{}: general.architecture: expected one of {}; found {}", file.name(), known, Quoted(name));
}

void RefuseForeignKeys(const KeyReader& keys) {
  for (const ForeignKey& foreign : kForeignKeys)
    if (const double value = keys.NumberOr(foreign.key, foreign.neutral); value != foreign.neutral)
      keys.Refuse(foreign.key, fmt::format("{} (lesskv has nothing that does this)", foreign.neutral),
                  fmt::format("{}", value));
}

// Files pad their matrices to round numbers of rows. Those rows have no token: nothing is ever looked up in them, and
// no logit is computed of them, so that all probabilities are of tokens. Without a vocabulary every row is a token. A vocab_size beside it is often stale,
// and nobody reads it.
void ReadVocabularySize(const GgufFile& file, const KeyReader& keys, ModelConfig& config) {
  const GgufTensor* embedding = file.FindTensor("token_embd.weight");
  if (embedding == nullptr) Fail(ErrorCode::kNotFound, "{}: tensor token_embd.weight is missing", file.name());
  const size_t rows = embedding->Rows();
  if (rows > kMaxVocab)
    keys.Refuse("token_embd.weight", fmt::format("at most {} rows", kMaxVocab), fmt::format("{}", rows));
  const GgufValue* tokens = file.Find("tokenizer.ggml.tokens");
  const size_t n_tokens = tokens != nullptr && tokens->is_array() ? tokens->size() : 0;
  config.n_vocab = n_tokens == 0 ? rows : std::min(rows, n_tokens);
}

}  // namespace

ModelConfig ReadModelConfig(const GgufFile& file) {
  ModelConfig config;
  config.architecture = FindArchitecture(file);
  config.name = file.GetOr<std::string>("general.name", "");
  const KeyReader keys(file, std::string(config.architecture.name));
  RefuseForeignKeys(keys);
  config.n_layers = keys.Count("block_count", kMaxLayers);
  config.d_model = keys.Count("embedding_length", kMaxWidth);
  config.d_ffn = keys.Count("feed_forward_length", kMaxFfn);
  config.train_ctx = keys.Count("context_length", kMaxContext);
  const bool rms = config.architecture.norm == NormKind::kRms;
  config.norm_eps = keys.Real(rms ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon", 1.0f);
  ReadHeads(keys, config);
  ReadRope(keys, config);
  ReadLocalLayers(keys, config);
  ReadAttentionScale(keys, config);

  ReadVocabularySize(file, keys, config);
  return config;
}

}  // namespace lesskv
