#include "convert/hf_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"
#include "format/gguf.h"  // Quoted

namespace lesskv {
namespace {

// A class of transformers, and what its configuration means where it leaves something out.
struct HfClass {
  std::string_view name;          // architectures[0]
  std::string_view architecture;  // general.architecture
  std::string_view activation = "silu";
  double eps = 1e-6;
  double rope_base = 10000;
  bool tied = false;
};
constexpr HfClass kClasses[] = {
    {.name = "LlamaForCausalLM", .architecture = "llama"},
    {.name = "MistralForCausalLM", .architecture = "llama"},
    {.name = "Qwen2ForCausalLM", .architecture = "qwen2"},
    {.name = "Qwen3ForCausalLM", .architecture = "qwen3"},
    {.name = "Gemma3ForCausalLM",
     .architecture = "gemma3",
     .activation = "gelu_pytorch_tanh",
     .rope_base = 1e6,
     .tied = true},
    {.name = "Gemma3ForConditionalGeneration",
     .architecture = "gemma3",
     .activation = "gelu_pytorch_tanh",
     .rope_base = 1e6,
     .tied = true},
    {.name = "Phi3ForCausalLM", .architecture = "phi3", .eps = 1e-5},
    {.name = "FalconForCausalLM", .architecture = "falcon", .activation = "gelu", .eps = 1e-5, .tied = true},
    {.name = "SmolLM3ForCausalLM", .architecture = "smollm3", .rope_base = 2e6, .tied = true},
};

// Keys that would change the result and that no class above has: refused unless absent, null, false or zero. One expert
// is none.
constexpr std::string_view kForeignKeys[] = {"attn_logit_softcapping",
                                             "final_logit_softcapping",
                                             "num_local_experts",
                                             "num_experts",
                                             "clip_qkv",
                                             "use_bidirectional_attention",
                                             "alibi",
                                             "quantization_config"};

const HfClass& FindClass(const JsonReader& config) {
  const nlohmann::json& names = config.Array("architectures");
  const std::string name = names.size() == 1 && names[0].is_string() ? names[0].get<std::string>() : "";
  std::string known;
  for (const HfClass& one : kClasses) {
    if (one.name == name) return one;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", one.name);
  }
  config.Refuse("architectures", "one of " + known);
}

void RefuseForeignKeys(const JsonReader& config) {
  for (const std::string_view key : kForeignKeys) {
    const nlohmann::json* const value = config.Find(key);
    if (value == nullptr || *value == false || *value == 0 || (key.ends_with("experts") && *value == 1)) continue;
    config.Refuse(key, "none (lesskv has nothing that does this)");
  }
}

class Translator {
 public:
  Translator(const HfClass& kind, const JsonReader& config, GgufWriter& writer)
      : kind_(kind), c_(config), writer_(writer), prefix_(std::string(kind.architecture) + ".") {
    result_.architecture = kind.architecture;
    result_.multimodal = kind.name == "Gemma3ForConditionalGeneration";
  }

  HfConfig Translate() {
    RefuseForeignKeys(c_);
    CheckActivation();
    writer_.Add("general.architecture", kind_.architecture);
    AddSizes();
    AddRotation();
    if (kind_.architecture == "gemma3") AddLocalLayers();
    if (kind_.architecture == "falcon") CheckFalcon();
    if (kind_.architecture == "smollm3") CheckUnrotatedLayers();
    CheckSlidingWindow();
    result_.tied = c_.TruthOr("tie_word_embeddings", kind_.tied);
    if (c_.Has("vocab_size")) {
      result_.n_vocab = c_.Count("vocab_size");
      writer_.Add(prefix_ + "vocab_size", c_.Count("vocab_size"));
    }
    return std::move(result_);
  }

 private:
  bool falcon() const { return kind_.architecture == "falcon"; }
  bool gemma() const { return kind_.architecture == "gemma3"; }
  void Add(const std::string& key, auto value) { writer_.Add(prefix_ + key, value); }

  void CheckActivation() const {
    const std::string_view key = c_.AnyOf({"hidden_activation", "hidden_act", "activation"});
    if (c_.TextOr(key, kind_.activation) != kind_.activation) c_.Refuse(key, Quoted(kind_.activation));
  }

  // Where a multimodal checkpoint's configuration leaves out what the class has by default (those of transformers'
  // Gemma3TextConfig).
  uint32_t Size(std::string_view key, uint32_t gemma_default) const {
    return result_.multimodal ? c_.CountOr(key, gemma_default) : c_.Count(key);
  }

  void AddSizes() {
    const std::string_view heads = c_.AnyOf({"num_attention_heads", "n_head"});
    const std::string_view layers = c_.AnyOf({"num_hidden_layers", "n_layer"});
    const uint32_t n_heads = Size(heads, 8), d_model = Size("hidden_size", 2304);
    if (n_heads == 0) c_.Refuse(heads, "at least 1");
    Add("block_count", Size(layers, 26));
    Add("embedding_length", d_model);
    Add("context_length", ContextLength());
    Add("feed_forward_length", falcon() ? c_.CountOr("ffn_hidden_size", 4 * d_model) : Size("intermediate_size", 9216));
    Add("attention.head_count", n_heads);
    Add("attention.head_count_kv", KvHeads(n_heads));
    const std::string_view eps = falcon() ? "layer_norm_epsilon" : "rms_norm_eps";
    Add(falcon() ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon",
        static_cast<float>(c_.RealOr(eps, kind_.eps)));
    if (!c_.Has("head_dim") && !gemma() && d_model % n_heads != 0)
      c_.Refuse("hidden_size", fmt::format("a multiple of the {} heads", n_heads));
    head_dim_ = c_.CountOr("head_dim", gemma() ? 256 : kind_.name == "Qwen3ForCausalLM" ? 128 : d_model / n_heads);
    Add("attention.key_length", head_dim_);
    Add("attention.value_length", head_dim_);
  }

  uint32_t ContextLength() const {
    if (falcon()) return c_.CountOr("max_position_embeddings", 2048);
    return Size("max_position_embeddings", 131072);
  }

  uint32_t KvHeads(uint32_t n_heads) const {
    if (!falcon()) return c_.CountOr("num_key_value_heads", result_.multimodal ? 4 : n_heads);
    if (c_.TruthOr("new_decoder_architecture", false))
      return c_.CountOr(c_.AnyOf({"num_kv_heads", "n_head_kv"}), n_heads);
    return c_.TruthOr("multi_query", true) ? 1 : n_heads;
  }

  // The description of the rotation: `rope_parameters` of transformers 5, which holds the base and for Gemma one object
  // a kind of layer, or `rope_scaling` of earlier ones.
  std::optional<JsonReader> Scaling() const {
    if (c_.Has("rope_parameters")) {
      const JsonReader all = c_.Object("rope_parameters");
      return all.Has("full_attention") ? all.Object("full_attention") : all;
    }
    if (c_.Has("rope_scaling")) return c_.Object("rope_scaling");
    return std::nullopt;
  }

  void AddRotation() {
    const std::optional<JsonReader> scaling = Scaling();
    base_ = c_.RealOr("rope_theta", kind_.rope_base);
    double share = c_.RealOr("partial_rotary_factor", 1.0);
    if (scaling) base_ = scaling->RealOr("rope_theta", base_);
    if (scaling) share = scaling->RealOr("partial_rotary_factor", share);
    if (!(base_ > 0)) c_.Refuse("rope_theta", "a number above 0");
    if (!(share > 0 && share <= 1)) c_.Refuse("partial_rotary_factor", "a number in (0, 1]", fmt::format("{}", share));
    n_rotated_ = static_cast<uint32_t>(head_dim_ * share);
    Add("rope.freq_base", static_cast<float>(base_));
    Add("rope.dimension_count", n_rotated_);
    if (scaling) AddScaling(*scaling);
  }

  void AddScaling(const JsonReader& scaling) {
    const std::string_view key = scaling.AnyOf({"rope_type", "type"});
    const std::string type = scaling.TextOr(key, "default");
    if (type == "default") return;
    if (type == "linear") {
      AddStretch(scaling, "linear");
      return;
    }
    if (type == "llama3") return AddLlama3Factors(scaling);
    if (type == "yarn") return AddYarn(scaling);
    if ((type == "longrope" || type == "su") && kind_.architecture == "phi3") return AddLongRope(scaling);
    scaling.Refuse(key, R"("default", "linear", "llama3", "yarn" or, for Phi 3, "longrope")");
  }

  // Returns the factor.
  double AddStretch(const JsonReader& scaling, const char* type) {
    const double factor = scaling.Real("factor");
    if (!(factor >= 1)) scaling.Refuse("factor", "a number of at least 1");
    Add("rope.scaling.type", type);
    Add("rope.scaling.factor", static_cast<float>(factor));
    return factor;
  }

  // Llama 3.1: slow pairs are stretched, quick ones are not, those between in part. GGUF stores the divisors.
  void AddLlama3Factors(const JsonReader& scaling) {
    const double factor = scaling.Real("factor"), low = scaling.Real("low_freq_factor"),
                 high = scaling.Real("high_freq_factor"), ctx = scaling.Count("original_max_position_embeddings");
    if (!(factor >= 1)) scaling.Refuse("factor", "a number of at least 1");
    if (!(low > 0 && high > low)) scaling.Refuse("high_freq_factor", "a number above low_freq_factor, itself above 0");
    std::vector<float> divisors;
    for (uint32_t pair = 0; pair < n_rotated_ / 2; ++pair) {
      const double frequency = std::pow(base_, -2.0 * pair / n_rotated_);
      const double turns = ctx * frequency / (2 * std::numbers::pi);  // in the original context
      const double kept = std::clamp((turns - low) / (high - low), 0.0, 1.0);
      divisors.push_back(static_cast<float>(1 / ((1 - kept) / factor + kept)));
    }
    result_.rope_factors["rope_freqs.weight"] = std::move(divisors);
  }

  void AddYarn(const JsonReader& scaling) {
    for (const char* key : {"mscale", "mscale_all_dim"})
      if (scaling.RealOr(key, 0) != 0) scaling.Refuse(key, "none (lesskv has nothing that does this)");
    if (!scaling.TruthOr("truncate", true)) scaling.Refuse("truncate", "true");
    const double factor = AddStretch(scaling, "yarn");
    Add("rope.scaling.original_context_length", scaling.CountOr("original_max_position_embeddings", ContextLength()));
    Add("rope.scaling.yarn_beta_fast", static_cast<float>(scaling.RealOr("beta_fast", 32)));
    Add("rope.scaling.yarn_beta_slow", static_cast<float>(scaling.RealOr("beta_slow", 1)));
    // The loader multiplies by YaRN's own magnitude; config.json gives the whole.
    if (scaling.Has("attention_factor"))
      Add("rope.scaling.attn_factor",
          static_cast<float>(scaling.Real("attention_factor") / (1 + 0.1 * std::log(factor))));
  }

  void AddLongRope(const JsonReader& scaling) {
    const JsonReader& holder = scaling.Has("original_max_position_embeddings") ? scaling : c_;
    const double original = holder.Count("original_max_position_embeddings");
    const double stretch = scaling.RealOr("factor", ContextLength() / original);
    const double magnitude = stretch > 1 ? std::sqrt(1 + std::log(stretch) / std::log(original)) : 1;
    Add("rope.scaling.original_context_length", holder.Count("original_max_position_embeddings"));
    Add("rope.scaling.attn_factor", static_cast<float>(scaling.RealOr("attention_factor", magnitude)));
    for (const auto& [key, tensor] : {std::pair{"short_factor", "rope_factors_short.weight"},
                                      std::pair{"long_factor", "rope_factors_long.weight"}}) {
      const std::vector<double> factors = scaling.Reals(key);
      if (factors.size() != n_rotated_ / 2)
        scaling.Refuse(key, fmt::format("{} numbers, one a rotated pair", n_rotated_ / 2),
                       fmt::format("{}", factors.size()));
      result_.rope_factors[tensor] = {factors.begin(), factors.end()};
    }
  }

  // Gemma 3: which layers see a window only, their own rotation, and the scale of scores.
  void AddLocalLayers() {
    const auto n_layers = Size("num_hidden_layers", 26);
    const double scalar = c_.RealOr("query_pre_attn_scalar", 256);
    if (!(scalar > 0)) c_.Refuse("query_pre_attn_scalar", "a number above 0");
    if (scalar != head_dim_) Add("attention.scale", static_cast<float>(1 / std::sqrt(scalar)));
    const uint32_t period = c_.CountOr(c_.AnyOf({"sliding_window_pattern", "_sliding_window_pattern"}), 6);
    const std::vector<bool> local = c_.Has("layer_types") ? LayerTypes(n_layers) : EveryOther(n_layers, period);
    // A window that no layer has is none: llama.cpp refuses such a file.
    if (std::find(local.begin(), local.end(), true) == local.end()) return;
    Add("attention.sliding_window", c_.CountOr("sliding_window", 4096));
    Add("rope.freq_base_swa", static_cast<float>(LocalBase()));
    if (local != EveryOther(n_layers, 6)) writer_.AddBools(prefix_ + "attention.sliding_window_pattern", local);
  }

  double LocalBase() const {
    if (!c_.Has("rope_parameters")) return c_.RealOr("rope_local_base_freq", 10000);
    const JsonReader all = c_.Object("rope_parameters");
    if (!all.Has("sliding_attention")) return c_.RealOr("rope_local_base_freq", 10000);
    const JsonReader local = all.Object("sliding_attention");
    if (local.TextOr("rope_type", "default") != "default") local.Refuse("rope_type", "\"default\"");
    return local.RealOr("rope_theta", 10000);
  }

  std::vector<bool> EveryOther(uint32_t n_layers, uint32_t period) const {
    if (period == 0) c_.Refuse("sliding_window_pattern", "at least 1");
    std::vector<bool> local;
    for (uint32_t layer = 0; layer < std::min(n_layers, kMostLayers); ++layer)
      local.push_back((layer + 1) % period != 0);
    return local;
  }

  std::vector<bool> LayerTypes(uint32_t n_layers) const {
    const nlohmann::json& types = c_.Array("layer_types");
    if (types.size() != n_layers)
      c_.Refuse("layer_types", fmt::format("one for each of {} layers", n_layers), fmt::format("{}", types.size()));
    std::vector<bool> local;
    for (const nlohmann::json& type : types) {
      if (type != "sliding_attention" && type != "full_attention")
        c_.Refuse("layer_types", R"("sliding_attention" or "full_attention")", Quoted(type.dump()));
      local.push_back(type == "sliding_attention");
    }
    return local;
  }

  void CheckFalcon() {
    if (!c_.TruthOr("parallel_attn", true)) c_.Refuse("parallel_attn", "true");
    const bool new_form = c_.TruthOr("new_decoder_architecture", false);
    result_.two_norms = new_form && c_.CountOr("num_ln_in_parallel_attn", 2) == 2;
    Add("tensor_data_layout", "jploski");
  }

  void CheckUnrotatedLayers() const {
    const uint32_t n_layers = c_.Count("num_hidden_layers");
    if (c_.CountOr("no_rope_layer_interval", 4) != 4) c_.Refuse("no_rope_layer_interval", "4");
    if (!c_.Has("no_rope_layers")) return;
    const std::vector<double> rotated = c_.Reals("no_rope_layers");
    bool fits = rotated.size() == n_layers;
    for (size_t layer = 0; fits && layer < rotated.size(); ++layer) fits = rotated[layer] == ((layer + 1) % 4 != 0);
    if (!fits) c_.Refuse("no_rope_layers", fmt::format("0 in every fourth of {} layers, else 1", n_layers));
  }

  // Windows other than Gemma's: the engine's layers attend to everything, as llama.cpp's do.
  void CheckSlidingWindow() {
    if (gemma() || !c_.Has("sliding_window")) return;
    const bool switchable = c_.Has("use_sliding_window");
    if (switchable && !c_.Truth("use_sliding_window")) return;
    if (switchable) c_.Refuse("use_sliding_window", "false");
    const uint32_t window = c_.Count("sliding_window");
    if (kind_.architecture == "phi3") Add("attention.sliding_window", window);
    if (window < ContextLength())
      result_.notes.push_back(
          fmt::format("the sliding window of {} tokens is not applied: all layers attend to everything", window));
  }

  static constexpr uint32_t kMostLayers = 4096;  // more than the loader takes

  const HfClass& kind_;
  const JsonReader& c_;
  GgufWriter& writer_;
  const std::string prefix_;
  uint32_t head_dim_ = 0, n_rotated_ = 0;
  double base_ = 0;
  HfConfig result_;
};

}  // namespace

HfConfig TranslateConfig(const JsonReader& config, GgufWriter& writer) {
  const HfClass& kind = FindClass(config);
  if (!config.Has("text_config")) return Translator(kind, config, writer).Translate();
  RefuseForeignKeys(config);
  const JsonReader text = config.Object("text_config");
  return Translator(kind, text, writer).Translate();
}

}  // namespace lesskv
