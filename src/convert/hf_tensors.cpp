#include "convert/hf_tensors.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <span>
#include <unordered_set>

#include "base/error.h"
#include "format/gguf.h"  // Quoted

namespace lesskv {
namespace {

// Names inside a layer.
struct LayerName {
  const char* gguf;
  const char* hf;
};
constexpr LayerName kAttention[] = {{"attn_q", "self_attn.q_proj"},
                                    {"attn_k", "self_attn.k_proj"},
                                    {"attn_v", "self_attn.v_proj"},
                                    {"attn_output", "self_attn.o_proj"}};
constexpr LayerName kGatedFeedForward[] = {
    {"ffn_gate", "mlp.gate_proj"}, {"ffn_up", "mlp.up_proj"}, {"ffn_down", "mlp.down_proj"}};
constexpr LayerName kFusedAttention[] = {{"attn_qkv", "self_attn.qkv_proj"}, {"attn_output", "self_attn.o_proj"}};
constexpr LayerName kFusedFeedForward[] = {{"ffn_up", "mlp.gate_up_proj"}, {"ffn_down", "mlp.down_proj"}};
constexpr LayerName kFalconMatrices[] = {{"attn_qkv", "self_attention.query_key_value"},
                                         {"attn_output", "self_attention.dense"},
                                         {"ffn_up", "mlp.dense_h_to_4h"},
                                         {"ffn_down", "mlp.dense_4h_to_h"}};

bool IsFloating(SafetensorType type) {
  return type == SafetensorType::kF32 || type == SafetensorType::kF16 || type == SafetensorType::kBF16;
}

const Safetensor& RequireFloating(const HfDirectory& directory, const HfTensor& tensor) {
  if (!IsFloating(tensor.tensor->type))
    Fail(ErrorCode::kBadFile, "{}: tensor {}: expected type F32, F16 or BF16, found {}", directory.path(),
         Quoted(tensor.tensor->name), SafetensorTypeName(tensor.tensor->type));
  return *tensor.tensor;
}

class Planner {
 public:
  Planner(const HfDirectory& directory, const HfConfig& hf, const ModelConfig& model)
      : directory_(directory), hf_(hf), m_(model), prefix_(BodyPrefix(directory, hf)) {}

  std::vector<TensorRecipe> Plan() {
    const size_t n_rows = RequireEmbedding(directory_, hf_).tensor->shape[0];
    if (hf_.n_vocab && *hf_.n_vocab != n_rows)
      Fail(ErrorCode::kBadFile, "{}: tensor {} has {} rows, vocab_size is {}", directory_.path(), prefix_ + Embedding(),
           n_rows, *hf_.n_vocab);
    Add("token_embd.weight", prefix_ + Embedding(), {n_rows, m_.d_model});
    for (size_t layer = 0; layer < m_.n_layers; ++layer) AddLayer(layer);
    AddNorm("output_norm", prefix_ + (falcon() ? "ln_f" : "norm"), m_.d_model);
    if (!hf_.tied || HasOtherOutput()) Add("output.weight", OutputName(), {n_rows, m_.d_model});
    return std::move(recipes_);
  }

  void RefuseUnused(std::vector<std::string>& notes) const {
    size_t n_elsewhere = 0;
    if (hf_.tied && used_.contains(OutputName()))
      notes.push_back(fmt::format("{} is not the embedding, though tie_word_embeddings is true: it is taken as it is",
                                  OutputName()));
    for (const auto& [name, tensor] : directory_.tensors()) {
      if (used_.contains(name)) continue;
      if (name.ends_with("rotary_emb.inv_freq")) continue;  // follows from the configuration
      if (hf_.tied && name == OutputName()) continue;       // the embedding again
      if (hf_.multimodal && !name.starts_with(prefix_)) {
        ++n_elsewhere;
        continue;
      }
      Fail(ErrorCode::kBadFile, "{}: tensor {} is not part of architecture \"{}\" as lesskv knows it",
           directory_.path(), Quoted(name), hf_.architecture);
    }
    if (n_elsewhere > 0)
      notes.push_back(fmt::format("{} tensors outside the language model are left out", n_elsewhere));
  }

 private:
  using RowMap = std::function<size_t(size_t)>;

  bool falcon() const { return hf_.architecture == "falcon"; }
  const char* Embedding() const { return falcon() ? "word_embeddings.weight" : "embed_tokens.weight"; }
  std::string OutputName() const {
    return prefix_.starts_with("language_model.") ? "language_model.lm_head.weight" : "lm_head.weight";
  }

  // transformers 5 ties only what is equal or missing.
  bool HasOtherOutput() const {
    const auto output = directory_.Find(OutputName());
    if (!output) return false;
    const HfTensor embedding = RequireEmbedding(directory_, hf_);
    const bool same = output->tensor->type == embedding.tensor->type &&
                      std::ranges::equal(output->tensor->data, embedding.tensor->data);
    for (const HfTensor& read : {*output, embedding}) read.shard->Release(*read.tensor);
    return !same;
  }

  void Add(const std::string& name, const std::string& source, std::vector<size_t> shape, RowMap rows = {},
           float shift = 0) {
    const auto found = directory_.Find(source);
    if (!found) Fail(ErrorCode::kNotFound, "{}: tensor {} is missing", directory_.path(), source);
    const Safetensor& tensor = RequireFloating(directory_, *found);
    if (tensor.shape != shape)
      Fail(ErrorCode::kBadFile, "{}: tensor {}: expected shape [{}], found {}", directory_.path(), source,
           fmt::join(shape, ", "), tensor.ShapeString());
    used_.insert(source);
    recipes_.push_back({name, *found, std::move(shape), std::move(rows), shift});
  }

  // A bias's elements move as the matrix's rows do; it is written as a column would be, one value a row.
  void AddMatrix(const std::string& name, const std::string& source, size_t n_out, size_t n_in,
                 const RowMap& rows = {}) {
    Add(name + ".weight", source + ".weight", {n_out, n_in}, rows);
    if (directory_.Find(source + ".bias")) Add(name + ".bias", source + ".bias", {n_out}, rows);
  }

  void AddNorm(const std::string& name, const std::string& source, size_t n) {
    Add(name + ".weight", source + ".weight", {n}, {}, hf_.architecture == "gemma3" ? 1.0f : 0.0f);
    if (m_.architecture.norm == NormKind::kLayer) Add(name + ".bias", source + ".bias", {n});
  }

  void AddLayer(size_t layer) {
    gguf_ = fmt::format("blk.{}.", layer);
    hf_layer_ = fmt::format("{}{}.{}.", prefix_, falcon() ? "h" : "layers", layer);
    AddLayerNorms();
    if (falcon()) return AddMatrices(kFalconMatrices);
    const bool fused = hf_.architecture == "phi3";
    AddMatrices(fused ? std::span<const LayerName>(kFusedAttention) : kAttention);
    AddMatrices(fused ? std::span<const LayerName>(kFusedFeedForward) : kGatedFeedForward);
  }

  void AddLayerNorms() {
    const auto add = [&](const char* gguf, const char* hf, size_t n) { AddNorm(gguf_ + gguf, hf_layer_ + hf, n); };
    if (falcon()) {
      add("attn_norm", hf_.two_norms ? "ln_mlp" : "input_layernorm", m_.d_model);
      if (hf_.two_norms) add("attn_norm_2", "ln_attn", m_.d_model);
      return;
    }
    add("attn_norm", "input_layernorm", m_.d_model);
    if (m_.architecture.post_norms) {
      add("post_attention_norm", "post_attention_layernorm", m_.d_model);
      add("ffn_norm", "pre_feedforward_layernorm", m_.d_model);
      add("post_ffw_norm", "post_feedforward_layernorm", m_.d_model);
    } else {
      add("ffn_norm", "post_attention_layernorm", m_.d_model);
    }
    if (!m_.architecture.qk_norm) return;
    add("attn_q_norm", "self_attn.q_norm", m_.head_dim);
    add("attn_k_norm", "self_attn.k_norm", m_.head_dim);
  }

  void AddMatrices(std::span<const LayerName> names) {
    for (const LayerName& name : names) {
      const auto [n_out, n_in] = Shape(name.gguf);
      AddMatrix(gguf_ + name.gguf, hf_layer_ + name.hf, n_out, n_in, Rows(name.gguf));
    }
  }

  std::pair<size_t, size_t> Shape(std::string_view matrix) const {
    if (matrix == "attn_q") return {m_.q_dim(), m_.d_model};
    if (matrix == "attn_k" || matrix == "attn_v") return {m_.kv_dim(), m_.d_model};
    if (matrix == "attn_qkv") return {m_.q_dim() + 2 * m_.kv_dim(), m_.d_model};
    if (matrix == "attn_output") return {m_.d_model, m_.q_dim()};
    if (matrix == "ffn_down") return {m_.d_model, m_.d_ffn};
    return {m_.architecture.gate_in_up ? 2 * m_.d_ffn : m_.d_ffn, m_.d_model};
  }

  RowMap Rows(std::string_view matrix) const {
    const bool rotated = matrix == "attn_q" || matrix == "attn_k";
    if (rotated && m_.architecture.rope_style == RopeStyle::kInterleaved) return HalvesToPairs(m_.head_dim);
    if (matrix == "attn_qkv" && falcon()) return GroupsApart(m_.n_heads, m_.n_kv_heads, m_.head_dim);
    return {};
  }

  // transformers rotates (i, i + d/2) of a head, GGUF's llama (2i, 2i + 1).
  static RowMap HalvesToPairs(size_t d) {
    return [d](size_t row) {
      const size_t in_head = row % d;
      return row - in_head + in_head % 2 * (d / 2) + in_head / 2;
    };
  }

  // Falcon's fused matrix has each KV head's query heads, its key and its value together; GGUF has all queries, then
  // all keys, then all values.
  static RowMap GroupsApart(size_t n_heads, size_t n_kv, size_t d) {
    return [=](size_t row) {
      const size_t head = row / d, group = n_heads / n_kv;
      const auto source = [&](size_t kv, size_t place) { return (kv * (group + 2) + place) * d + row % d; };
      if (head < n_heads) return source(head / group, head % group);
      return head < n_heads + n_kv ? source(head - n_heads, group) : source(head - n_heads - n_kv, group + 1);
    };
  }

  const HfDirectory& directory_;
  const HfConfig& hf_;
  const ModelConfig& m_;
  const std::string prefix_;
  std::string gguf_, hf_layer_;  // prefixes of the layer in work
  std::vector<TensorRecipe> recipes_;
  std::unordered_set<std::string> used_;
};

}  // namespace

std::string BodyPrefix(const HfDirectory& directory, const HfConfig& hf) {
  if (hf.architecture == "falcon") return "transformer.";
  if (hf.multimodal) {
    for (const char* prefix : {"model.language_model.", "language_model.model."})
      if (directory.Find(std::string(prefix) + "embed_tokens.weight")) return prefix;
  }
  return "model.";
}

HfTensor RequireEmbedding(const HfDirectory& directory, const HfConfig& hf) {
  const std::string name =
      BodyPrefix(directory, hf) + (hf.architecture == "falcon" ? "word_embeddings.weight" : "embed_tokens.weight");
  const auto found = directory.Find(name);
  if (!found) Fail(ErrorCode::kNotFound, "{}: tensor {} is missing", directory.path(), name);
  const Safetensor& tensor = RequireFloating(directory, *found);
  if (tensor.shape.size() != 2 || tensor.Elements() == 0)
    Fail(ErrorCode::kBadFile, "{}: tensor {}: expected a matrix, found shape {}", directory.path(), name,
         tensor.ShapeString());
  return *found;
}

std::vector<TensorRecipe> PlanTensors(const HfDirectory& directory, const HfConfig& hf, const ModelConfig& model,
                                      std::vector<std::string>& notes) {
  Planner planner(directory, hf, model);
  std::vector<TensorRecipe> recipes = planner.Plan();
  planner.RefuseUnused(notes);
  return recipes;
}

}  // namespace lesskv
