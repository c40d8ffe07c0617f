#include "model/model.h"

#include <algorithm>

#include <cstring>
#include <filesystem>
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

LayerWeights ReadLayer(TensorReader& tensors, const ModelConfig& c, size_t index) {
  const std::string prefix = fmt::format("blk.{}.", index);
  const auto matrix = [&](const char* name, size_t n_out, size_t n_in) {
    return tensors.Matrix(prefix + name + ".weight", n_out, n_in);
  };
  const auto bias = [&](const char* name, size_t n, bool required) {
    const std::string full = prefix + name + ".bias";
    return required ? tensors.Vector(full, n) : tensors.VectorIfPresent(full, n);
  };
  return {
      .attn_norm = tensors.Vector(prefix + "attn_norm.weight", c.d_model),
      .ffn_norm = tensors.Vector(prefix + "ffn_norm.weight", c.d_model),
      .q = matrix("attn_q", c.q_dim(), c.d_model),
      .k = matrix("attn_k", c.kv_dim(), c.d_model),
      .v = matrix("attn_v", c.kv_dim(), c.d_model),
      .q_bias = bias("attn_q", c.q_dim(), c.qkv_bias),
      .k_bias = bias("attn_k", c.kv_dim(), c.qkv_bias),
      .v_bias = bias("attn_v", c.kv_dim(), c.qkv_bias),
      .attn_output = matrix("attn_output", c.d_model, c.q_dim()),
      .attn_output_bias = bias("attn_output", c.d_model, false),
      .ffn_gate = matrix("ffn_gate", c.d_ffn, c.d_model),
      .ffn_up = matrix("ffn_up", c.d_ffn, c.d_model),
      .ffn_down = matrix("ffn_down", c.d_model, c.d_ffn),
      .ffn_gate_bias = bias("ffn_gate", c.d_ffn, false),
      .ffn_up_bias = bias("ffn_up", c.d_ffn, false),
      .ffn_down_bias = bias("ffn_down", c.d_model, false),
  };
}

// The embedding or output matrix, both with the embedding's rows, without the padding behind the last token.
WeightView VocabularyMatrix(TensorReader& tensors, const std::string& name, const ModelConfig& config) {
  WeightView matrix = tensors.Matrix(name, tensors.Rows("token_embd.weight"), config.d_model);
  matrix.n_out = config.n_vocab;
  return matrix;
}

RopeTable MakeRope(TensorReader& tensors, const ModelConfig& config) {
  return RopeTable({.n_dims = config.head_dim,
                    .style = config.rope_style,
                    .base = config.rope_base,
                    .linear_scale = config.rope_factor,
                    .frequency_factors = tensors.VectorIfPresent("rope_freqs.weight", config.head_dim / 2)});
}

bool ReadsAtOnce(const std::string& path, ModelLoading loading) {
  if (loading != ModelLoading::kAuto) return loading == ModelLoading::kRead;
  constexpr uintmax_t kLeastBytes = uintmax_t{64} << 20;  // smaller files stay in caches, or cost little either way
  std::error_code unreadable;                             // left to GgufFile::Open
  const uintmax_t bytes = std::filesystem::file_size(path, unreadable);
  return !unreadable && bytes >= kLeastBytes && HasLargePages() && AvailableMemory().value_or(0) / 2 >= bytes;
}

// NAME.less.gguf beside the model, else another one for the same model there or one folder up.
SidecarSource FindSidecar(const std::string& model_path, uint64_t fingerprint, uint64_t identity) {
  namespace fs = std::filesystem;
  const fs::path named = fs::path(model_path).replace_extension(".less.gguf");
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

Model::Model(std::shared_ptr<const GgufFile> file, ModelConfig config, RopeTable rope)
    : file_(std::move(file)), config_(std::move(config)), rope_(std::make_shared<RopeTable>(std::move(rope))) {}

std::shared_ptr<const Model> Model::Load(const std::string& path, ModelLoading loading) {
  auto file = std::make_shared<const GgufFile>(GgufFile::Open(path, !ReadsAtOnce(path, loading)));
  const ModelConfig config = ReadModelConfig(*file);
  TensorReader tensors(*file);
  std::shared_ptr<Model> model(new Model(file, config, MakeRope(tensors, config)));
  model->path_ = path;
  model->token_embedding_ = VocabularyMatrix(tensors, "token_embd.weight", config);
  model->output_ =
      tensors.Has("output.weight") ? VocabularyMatrix(tensors, "output.weight", config) : model->token_embedding_;
  model->output_norm_ = tensors.Vector("output_norm.weight", config.d_model);
  for (size_t i = 0; i < config.n_layers; ++i) model->layers_.push_back(ReadLayer(tensors, config, i));
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
  const LayerShape layer{config_.n_heads, config_.n_kv_heads, config_.head_dim, UsualScale(config_.head_dim), rope_, 0};
  return {std::vector<LayerShape>(config_.n_layers, layer), ctx, compute};
}

}  // namespace lesskv
