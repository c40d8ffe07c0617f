#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <optional>
#include <unordered_set>

#include "base/error.h"
#include "base/large_pages.h"
#include "base/memory.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {
namespace {

// Hands out the file's tensors by name, checks their shapes, and remembers which were asked for.
class TensorReader {
 public:
  explicit TensorReader(const GgufFile& file) : file_(file) {}

  WeightView Matrix(const std::string& name, size_t n_out, size_t n_in) {
    const GgufTensor& tensor = Require(name);
    if (tensor.ne[0] != n_in || tensor.ne[1] != n_out || tensor.Rows() != n_out)
      WrongShape(tensor, fmt::format("[{}, {}]", n_in, n_out));
    if (!IsLinearType(tensor.type))
      Fail(ErrorCode::kBadFile, "{}: tensor {}: {} is not a type of weights", file_.name(), name,
           Traits(tensor.type).name);
    return {tensor.type, n_out, n_in, tensor.data.data()};
  }

  std::vector<float> Vector(const std::string& name, size_t n) {
    const GgufTensor& tensor = Require(name);
    if (tensor.ne[0] != n || tensor.Rows() != 1) WrongShape(tensor, fmt::format("[{}]", n));
    if (tensor.type != DType::kF32)
      Fail(ErrorCode::kBadFile, "{}: tensor {}: expected type F32, found {}", file_.name(), name,
           Traits(tensor.type).name);
    std::vector<float> values(n);
    std::memcpy(values.data(), tensor.data.data(), n * sizeof(float));
    return values;
  }

  std::vector<float> VectorIfPresent(const std::string& name, size_t n) {
    return file_.FindTensor(name) == nullptr ? std::vector<float>() : Vector(name, n);
  }

  // Divisors of frequencies.
  std::vector<float> Factors(const std::string& name, size_t n) {
    std::vector<float> factors = Vector(name, n);
    for (const float factor : factors)
      if (!(factor > 0) || !std::isfinite(factor))
        Fail(ErrorCode::kBadFile, "{}: tensor {}: expected factors above 0, found {}", file_.name(), name, factor);
    return factors;
  }

  NormWeights Norm(const std::string& name, size_t n, NormKind kind) {
    return {Vector(name + ".weight", n), kind == NormKind::kLayer ? Vector(name + ".bias", n) : std::vector<float>()};
  }

  bool Has(const std::string& name) const { return file_.FindTensor(name) != nullptr; }
  size_t Rows(const std::string& name) { return Require(name).Rows(); }

  // A tensor nobody asked for would change the result in a way that the layer does not know. The two exceptions are
  // tables of rotations that old converters wrote and that follow from the metadata.
  void RefuseUnused() const {
    for (const GgufTensor& tensor : file_.tensors()) {
      if (used_.contains(tensor.name)) continue;
      if (tensor.name.ends_with(".attn_rot_embd") || tensor.name.ends_with(".rope_freqs")) continue;
      Fail(ErrorCode::kBadFile, "{}: tensor {} is not part of architecture \"{}\" as lesskv knows it", file_.name(),
           Quoted(tensor.name), file_.Get<std::string>("general.architecture"));
    }
  }

 private:
  const GgufTensor& Require(const std::string& name) {
    const GgufTensor* tensor = file_.FindTensor(name);
    if (tensor == nullptr) Fail(ErrorCode::kNotFound, "{}: tensor {} is missing", file_.name(), name);
    used_.insert(tensor->name);
    return *tensor;
  }

  [[noreturn]] void WrongShape(const GgufTensor& tensor, const std::string& wanted) const {
    Fail(ErrorCode::kBadFile, "{}: tensor {}: expected shape {}, found {}", file_.name(), tensor.name, wanted,
         tensor.ShapeString());
  }

  const GgufFile& file_;
  std::unordered_set<std::string_view> used_;
};

WeightView Rows(const WeightView& matrix, size_t first, size_t n) {
  const auto* data = static_cast<const std::byte*>(matrix.data) + first * RowBytes(matrix.type, matrix.n_in);
  return {matrix.type, n, matrix.n_in, data};
}

// The embedding or output matrix, both with the embedding's rows, without the padding behind the last token.
WeightView VocabularyMatrix(TensorReader& tensors, const std::string& name, const ModelConfig& config) {
  WeightView matrix = tensors.Matrix(name, tensors.Rows("token_embd.weight"), config.d_model);
  matrix.n_out = config.n_vocab;
  return matrix;
}

std::vector<float> Part(const std::vector<float>& bias, size_t first, size_t n) {
  if (bias.empty()) return {};
  return {bias.begin() + static_cast<ptrdiff_t>(first), bias.begin() + static_cast<ptrdiff_t>(first + n)};
}

// The tensors of one layer by their names inside it.
class LayerReader {
 public:
  LayerReader(TensorReader& tensors, const ModelConfig& config, size_t index)
      : tensors_(tensors), c_(config), prefix_(fmt::format("blk.{}.", index)) {}

  LayerWeights Read() {
    ReadNorms();
    ReadQueriesKeysValues();
    w_.attn_output = Matrix("attn_output", c_.d_model, c_.q_dim());
    w_.attn_output_bias = Bias("attn_output", c_.d_model);
    ReadFeedForward();
    return std::move(w_);
  }

 private:
  // A parallel layer whose halves are normed apart (Falcon 40B) calls attention's norm attn_norm_2.
  void ReadNorms() {
    const Architecture& a = c_.architecture;
    w_.attn_norm = Norm("attn_norm", c_.d_model);
    w_.ffn_norm = a.parallel ? w_.attn_norm : Norm("ffn_norm", c_.d_model);
    if (a.parallel && tensors_.Has(prefix_ + "attn_norm_2.weight")) w_.attn_norm = Norm("attn_norm_2", c_.d_model);
    if (a.qk_norm) {
      w_.q_norm = Norm("attn_q_norm", c_.head_dim);
      w_.k_norm = Norm("attn_k_norm", c_.head_dim);
    }
    if (a.post_norms) {
      w_.post_attn_norm = Norm("post_attention_norm", c_.d_model);
      w_.post_ffn_norm = Norm("post_ffw_norm", c_.d_model);
    }
  }

  void ReadQueriesKeysValues() {
    const size_t q = c_.q_dim(), kv = c_.kv_dim();
    if (tensors_.Has(prefix_ + "attn_qkv.weight")) {
      const WeightView all = Matrix("attn_qkv", q + 2 * kv, c_.d_model);
      w_.q = Rows(all, 0, q);
      w_.k = Rows(all, q, kv);
      w_.v = Rows(all, q + kv, kv);
    } else {
      w_.q = Matrix("attn_q", q, c_.d_model);
      w_.k = Matrix("attn_k", kv, c_.d_model);
      w_.v = Matrix("attn_v", kv, c_.d_model);
    }
    ReadQueryKeyValueBiases(q, kv);
  }

  // Apart, or in one vector where the matrices are one; old files have one matrix and biases apart.
  void ReadQueryKeyValueBiases(size_t q, size_t kv) {
    if (!tensors_.Has(prefix_ + "attn_qkv.bias")) {
      w_.q_bias = Bias("attn_q", q);
      w_.k_bias = Bias("attn_k", kv);
      w_.v_bias = Bias("attn_v", kv);
      return;
    }
    const std::vector<float> biases = Bias("attn_qkv", q + 2 * kv);
    w_.q_bias = Part(biases, 0, q);
    w_.k_bias = Part(biases, q, kv);
    w_.v_bias = Part(biases, q + kv, kv);
  }

  void ReadFeedForward() {
    const Architecture& a = c_.architecture;
    const size_t n = c_.d_ffn;
    if (a.gate_in_up) {
      const WeightView both = Matrix("ffn_up", 2 * n, c_.d_model);
      w_.ffn_gate = Rows(both, 0, n);
      w_.ffn_up = Rows(both, n, n);
    } else {
      w_.ffn_up = Matrix("ffn_up", n, c_.d_model);
      w_.ffn_up_bias = Bias("ffn_up", n);
      if (a.gated()) {
        w_.ffn_gate = Matrix("ffn_gate", n, c_.d_model);
        w_.ffn_gate_bias = Bias("ffn_gate", n);
      }
    }
    w_.ffn_down = Matrix("ffn_down", c_.d_model, n);
    w_.ffn_down_bias = Bias("ffn_down", c_.d_model);
  }

  WeightView Matrix(const char* name, size_t n_out, size_t n_in) {
    return tensors_.Matrix(prefix_ + name + ".weight", n_out, n_in);
  }
  std::vector<float> Bias(const char* name, size_t n) { return tensors_.VectorIfPresent(prefix_ + name + ".bias", n); }
  NormWeights Norm(const char* name, size_t n) { return tensors_.Norm(prefix_ + name, n, c_.architecture.norm); }

  TensorReader& tensors_;
  const ModelConfig& c_;
  std::string prefix_;
  LayerWeights w_ = {};
};

std::shared_ptr<const RopeTable> WithFactors(RopeConfig rope, std::vector<float> factors) {
  rope.frequency_factors = std::move(factors);
  return std::make_shared<RopeTable>(rope);
}

// Llama 3's factors (rope_freqs) hold for every context. LongRoPE has two sets, and the context chooses.
RopeTables ReadRopes(TensorReader& tensors, const ModelConfig& config) {
  const size_t n_pairs = config.rope.n_dims / 2;
  RopeTables tables;
  if (config.long_rope || tensors.Has("rope_factors_long.weight")) {
    tables.global = WithFactors(config.rope, tensors.Factors("rope_factors_short.weight", n_pairs));
    tables.global_long = WithFactors(config.rope, tensors.Factors("rope_factors_long.weight", n_pairs));
  } else {
    const bool has_factors = tensors.Has("rope_freqs.weight");
    tables.global = WithFactors(
        config.rope, has_factors ? tensors.Factors("rope_freqs.weight", n_pairs) : std::vector<float>());
  }
  if (!config.local.empty())
    tables.local = std::make_shared<RopeTable>(
        RopeConfig{.n_dims = config.rope.n_dims, .style = config.rope.style, .base = config.local_rope_base});
  if (config.architecture.unrotated_every != 0)
    tables.none = std::make_shared<RopeTable>(RopeConfig{.n_dims = 0, .style = config.rope.style});
  return tables;
}

bool ReadsAtOnce(const std::string& path, ModelLoading loading) {
  if (loading != ModelLoading::kAuto) return loading == ModelLoading::kRead;
  constexpr uintmax_t kLeastBytes = uintmax_t{64} << 20;  // smaller files stay in caches, or cost little either way
  uintmax_t bytes = 0;
  for (const std::string& file : ModelFiles(path)) {
    std::error_code unreadable;  // left to GgufFile::Open
    const uintmax_t file_bytes = std::filesystem::file_size(file, unreadable);
    if (unreadable) return false;
    bytes += file_bytes;
  }
  return bytes >= kLeastBytes && HasLargePages() && AvailableMemory().value_or(0) / 2 >= bytes;
}

// NAME.less.gguf beside the model, else another one for the same model there or one folder up.
SidecarSource FindSidecar(const std::string& model_path, uint64_t fingerprint, uint64_t identity) {
  namespace fs = std::filesystem;
  const std::optional<SplitName> split = ParseSplitName(model_path);
  const fs::path named =
      split ? fs::path(split->prefix + ".less.gguf") : fs::path(model_path).replace_extension(".less.gguf");
  SidecarSource source{named.string(), fingerprint, identity};
  std::error_code error;
  if (fs::exists(named, error)) return source;
  const fs::path folder = fs::absolute(model_path, error).parent_path();
  for (const fs::path& place : {folder, folder.parent_path()}) {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(place, error))
      if (entry.path().string().ends_with(".less.gguf")) found.push_back(entry.path().string());
    std::sort(found.begin(), found.end());
    for (const std::string& candidate : found) {
      if (SidecarIdentity(candidate) != identity) continue;
      source.path = candidate;
      return source;
    }
  }
  return source;
}

}  // namespace

std::shared_ptr<const Model> Model::Load(const std::string& path, ModelLoading loading) {
  auto file = std::make_shared<const GgufFile>(GgufFile::Open(path, !ReadsAtOnce(path, loading)));
  const ModelConfig config = ReadModelConfig(*file);
  TensorReader tensors(*file);
  std::shared_ptr<Model> model(new Model(file, config));
  model->rope_ = ReadRopes(tensors, config);
  model->path_ = path;
  model->token_embedding_ = VocabularyMatrix(tensors, "token_embd.weight", config);
  model->output_ =
      tensors.Has("output.weight") ? VocabularyMatrix(tensors, "output.weight", config) : model->token_embedding_;
  model->output_norm_ = tensors.Norm("output_norm", config.d_model, config.architecture.norm);
  for (size_t i = 0; i < config.n_layers; ++i) model->layers_.push_back(LayerReader(tensors, config, i).Read());
  tensors.RefuseUnused();
  for (const GgufTensor& tensor : file->tensors()) {
    model->parameter_count_ += tensor.Elements();
    model->weight_bytes_ += tensor.data.size();
  }
  model->fingerprint_ = file->Fingerprint();
  model->identity_ = file->Identity();
  model->sidecar_ = FindSidecar(path, model->fingerprint_, model->identity_);
  return model;
}

CacheShape Model::MakeCacheShape(size_t ctx, ComputeType compute) const {
  const ModelConfig& c = config_;
  const auto& global = rope_.global_long != nullptr && ctx > c.original_ctx ? rope_.global_long : rope_.global;
  CacheShape shape{{}, ctx, compute, c.d_model};
  for (size_t layer = 0; layer < c.n_layers; ++layer) {
    const auto& rope = c.is_local(layer) ? rope_.local : c.is_rotated(layer) ? global : rope_.none;
    shape.layers.push_back(
        {c.n_heads, c.n_kv_heads, c.head_dim, c.attention_scale, rope, c.is_local(layer) ? c.window : 0});
  }
  return shape;
}

}  // namespace lesskv
