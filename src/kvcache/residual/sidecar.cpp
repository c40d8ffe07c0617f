#include "kvcache/residual/sidecar.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <cstring>
#include <functional>

#include "base/checked.h"
#include "base/error.h"
#include "base/rng.h"
#include "format/gguf.h"
#include "format/gguf_writer.h"
#include "kernels/quants/half.h"

namespace lesskv {
namespace {

constexpr const char* kArchitecture = "lesskv-sidecar";
constexpr uint32_t kVersion = 2;          // the latest; files without centres of keys are of version 1
constexpr float kWarmStart = 1e-4f;  // the paper's initial scale of psi: training starts at the bare selector
constexpr float kLargestParameter = 1e6f;

// One stored tensor: where it lives in LayerParams and its shape, fastest dimension first.
struct Field {
  const char* name;
  std::vector<float>* values;
  std::vector<size_t> ne;
  bool is_matrix;  // stored in the file's matrix type
  bool is_optional = false;
};

std::vector<Field> Fields(const SidecarShape& s, LayerParams& p) {
  std::vector<Field> fields = {
      {"phi.w1", &p.phi.w1, {s.hidden, s.head_dim, s.n_heads}, true},
      {"phi.w2", &p.phi.w2, {s.rank, s.hidden, s.n_heads}, true},
      {"psi.w1", &p.psi.w1, {s.hidden, s.head_dim, s.n_kv_heads}, true},
      {"psi.w2", &p.psi.w2, {s.rank, s.hidden, s.n_kv_heads}, true},
  };
  if (s.kind == FeatureKind::kGelu) {
    fields.push_back({"psi.d", &p.d, {s.rank, s.n_kv_heads}, false});
    fields.push_back({"psi.x", &p.x, {s.rank, s.rank, s.n_kv_heads}, false});
    fields.push_back({"psi.d2", &p.d2, {s.rank, s.n_kv_heads}, false});
  } else {
    fields.push_back({"phi.b1", &p.phi.b1, {s.hidden, s.n_heads}, false});
    fields.push_back({"phi.b2", &p.phi.b2, {s.rank, s.n_heads}, false});
    fields.push_back({"psi.b1", &p.psi.b1, {s.hidden, s.n_kv_heads}, false});
    fields.push_back({"psi.b2", &p.psi.b2, {s.rank, s.n_kv_heads}, false});
  }
  fields.push_back({"center", &p.center, {s.head_dim, s.n_kv_heads}, false, true});
  return fields;
}

size_t Elements(const std::vector<size_t>& ne) {
  size_t n = 1;
  for (size_t d : ne) n *= d;
  return n;
}

std::string TensorName(size_t layer, const char* field) { return fmt::format("less.{}.{}", layer, field); }

std::string NeString(const std::vector<size_t>& ne) {
  std::string text = "[";
  for (size_t i = 0; i < ne.size(); ++i) text += (i ? ", " : "") + std::to_string(ne[i]);
  return text + "]";
}

size_t ReadSize(const GgufFile& file, const char* key, size_t low, size_t high) {
  const uint64_t value = file.Get<uint64_t>(key);
  if (value < low || value > high)
    Fail(ErrorCode::kBadFile, "{}: {} must be between {} and {}, found {}", file.name(), key, low, high, value);
  return static_cast<size_t>(value);
}

SidecarShape ReadShape(const GgufFile& file) {
  SidecarShape shape;
  shape.n_layers = ReadSize(file, "less.block_count", 1, 1024);
  shape.n_heads = ReadSize(file, "less.head_count", 1, 1024);
  shape.n_kv_heads = ReadSize(file, "less.head_count_kv", 1, 1024);
  shape.head_dim = ReadSize(file, "less.head_dim", 1, 1024);
  shape.rank = ReadSize(file, "less.rank", 1, 64);
  shape.hidden = ReadSize(file, "less.hidden", 1, 8192);
  shape.kind = ParseFeatureKind(file.Get<std::string>("less.features"));
  if (shape.n_heads % shape.n_kv_heads != 0)
    Fail(ErrorCode::kBadFile, "{}: less.head_count must be a multiple of less.head_count_kv ({}), found {}", file.name(),
         shape.n_kv_heads, shape.n_heads);
  return shape;
}

uint64_t ParseHex(const GgufFile& file, const char* key, const std::string& text) {
  const bool ok = text.size() == 16 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!ok) Fail(ErrorCode::kBadFile, "{}: {} must be 16 hexadecimal digits, found {}", file.name(), key, Quoted(text));
  return std::stoull(text, nullptr, 16);
}

uint64_t ReadFingerprint(const GgufFile& file) {
  constexpr const char* kKey = "lesskv.model.fingerprint";
  return ParseHex(file, kKey, file.Get<std::string>(kKey));
}

uint64_t ReadIdentity(const GgufFile& file) {
  constexpr const char* kKey = "lesskv.model.identity";
  const std::string text = file.GetOr<std::string>(kKey, "");
  return text.empty() ? 0 : ParseHex(file, kKey, text);
}

void CheckFinite(const GgufFile& file, const std::string& name, const std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(std::fabs(values[i]) <= kLargestParameter))
      Fail(ErrorCode::kBadFile, "{}: tensor {} must hold finite numbers up to {}, found {} at element {}", file.name(),
           name, kLargestParameter, values[i], i);
  }
}

void ReadTensor(const GgufFile& file, const GgufTensor& tensor, const Field& field, DType type) {
  bool same = tensor.n_dims <= 4;
  for (size_t i = 0; i < 4; ++i) same &= tensor.ne[i] == (i < field.ne.size() ? field.ne[i] : 1);
  if (!same)
    Fail(ErrorCode::kBadFile, "{}: tensor {} must have shape {}, found {}", file.name(), tensor.name,
         NeString(field.ne), tensor.ShapeString());
  if (tensor.type != type)
    Fail(ErrorCode::kBadFile, "{}: tensor {} must be of type {}, found {}", file.name(), tensor.name, Traits(type).name,
         Traits(tensor.type).name);
  field.values->resize(Elements(field.ne));
  if (type == DType::kF32) {
    std::memcpy(field.values->data(), tensor.data.data(), tensor.data.size());
  } else {
    for (size_t i = 0; i < field.values->size(); ++i) {
      uint16_t half;
      std::memcpy(&half, tensor.data.data() + 2 * i, 2);
      (*field.values)[i] = Bf16ToFloat(half);
    }
  }
  CheckFinite(file, tensor.name, *field.values);
}

void ReadLayer(const GgufFile& file, size_t layer, Sidecar& sidecar) {
  std::vector<Field> fields = Fields(sidecar.shape, sidecar.layers[layer]);
  if (file.FindTensor(TensorName(layer, fields[0].name)) == nullptr) return;  // a part without this layer
  for (const Field& field : fields) {
    const std::string name = TensorName(layer, field.name);
    const GgufTensor* tensor = file.FindTensor(name);
    if (tensor == nullptr && field.is_optional) continue;
    if (tensor == nullptr) Fail(ErrorCode::kBadFile, "{}: tensor {} is missing", file.name(), name);
    ReadTensor(file, *tensor, field, field.is_matrix ? sidecar.matrix_type : DType::kF32);
  }
}

DType ReadMatrixType(const GgufFile& file) {
  const std::string name = file.Get<std::string>("less.matrix_type");
  if (name == "bf16") return DType::kBF16;
  if (name == "f32") return DType::kF32;
  Fail(ErrorCode::kBadFile, "{}: less.matrix_type must be bf16 or f32, found {}", file.name(), Quoted(name));
}

// KV heads of each global layer, and their sum.
size_t ReadHeads(const GgufFile& file, const char* key, std::vector<size_t>& n_kv_heads) {
  size_t n_heads = 0;
  for (const uint32_t n : file.Get<std::vector<uint32_t>>(key)) {
    if (n < 1 || n > 1024) Fail(ErrorCode::kBadFile, "{}: {} must hold numbers between 1 and 1024, found {}", file.name(), key, n);
    n_kv_heads.push_back(n);
    n_heads += n;
  }
  return n_heads;
}

const GgufTensor& RequiredTensor(const GgufFile& file, const char* name) {
  const GgufTensor* tensor = file.FindTensor(name);
  if (tensor == nullptr) Fail(ErrorCode::kBadFile, "{}: tensor {} is missing", file.name(), name);
  return *tensor;
}

void ReadScores(const GgufFile& file, SidecarScores& scores) {
  if (file.Find("kvzap.head_count_kv") == nullptr) return;
  const size_t n_heads = ReadHeads(file, "kvzap.head_count_kv", scores.n_kv_heads);
  scores.width = file.Get<uint32_t>("kvzap.width");
  if (n_heads == 0 || scores.width < 1 || scores.width > (1u << 20))
    Fail(ErrorCode::kBadFile, "{}: kvzap.width must be between 1 and 2^20, of one head at least, found {} of {}", file.name(),
         scores.width, n_heads);
  scores.tokens = file.GetOr<uint64_t>("kvzap.train.tokens", 0);
  scores.r2 = file.GetOr<std::vector<float>>("kvzap.train.r2", {});
  ReadTensor(file, RequiredTensor(file, "kvzap.weight"), {"", &scores.weight, {scores.width, n_heads}, false}, DType::kF32);
  ReadTensor(file, RequiredTensor(file, "kvzap.bias"), {"", &scores.bias, {n_heads}, false}, DType::kF32);
  const GgufTensor* quantiles = file.FindTensor("kvzap.quantiles");
  if (quantiles == nullptr) return;  // of an earlier version
  ReadTensor(file, *quantiles, {"", &scores.quantiles, {SidecarScores::kQuantiles, n_heads}, false}, DType::kF32);
  for (size_t i = 0; i < scores.quantiles.size(); ++i)
    if (i % SidecarScores::kQuantiles > 0 && scores.quantiles[i] < scores.quantiles[i - 1])
      Fail(ErrorCode::kBadFile, "{}: tensor kvzap.quantiles must ascend in each head, found {} after {}", file.name(),
           scores.quantiles[i], scores.quantiles[i - 1]);
}

void AddScores(const SidecarScores& scores, GgufWriter& writer) {
  if (scores.empty()) return;
  writer.AddArray("kvzap.head_count_kv", std::vector<uint32_t>(scores.n_kv_heads.begin(), scores.n_kv_heads.end()));
  writer.Add("kvzap.width", static_cast<uint32_t>(scores.width));
  writer.Add("kvzap.train.tokens", scores.tokens);
  writer.AddArray("kvzap.train.r2", scores.r2);
  const size_t ne[] = {scores.width, scores.bias.size()};
  writer.AddTensor("kvzap.weight", DType::kF32, ne, std::as_bytes(std::span(scores.weight)));
  writer.AddTensor("kvzap.bias", DType::kF32, {&ne[1], 1}, std::as_bytes(std::span(scores.bias)));
  if (scores.quantiles.empty()) return;
  writer.AddTensor("kvzap.quantiles", DType::kF32, {SidecarScores::kQuantiles, scores.bias.size()},
                   std::as_bytes(std::span(scores.quantiles)));
}

void ReadBudgets(const GgufFile& file, SidecarBudgets& budgets) {
  constexpr const char* kTensor = "budgets.shares";
  const GgufTensor* tensor = file.FindTensor(kTensor);
  if (tensor == nullptr) return;
  const size_t n_heads = ReadHeads(file, "budgets.head_count_kv", budgets.n_kv_heads);
  budgets.ratios = file.Get<std::vector<float>>("budgets.ratios");
  budgets.tokens = file.GetOr<uint64_t>("budgets.train.tokens", 0);
  float before = 0;
  for (const float ratio : budgets.ratios) {
    if (!(ratio > before && ratio < 1))
      Fail(ErrorCode::kBadFile, "{}: budgets.ratios must ascend between 0 and 1, found {} after {}", file.name(), ratio,
           before);
    before = ratio;
  }
  const Field field{"", &budgets.shares, {n_heads, budgets.ratios.size()}, false};
  ReadTensor(file, *tensor, field, DType::kF32);
  for (const float share : budgets.shares)
    if (!(share >= 0 && share <= 1))
      Fail(ErrorCode::kBadFile, "{}: tensor {} must hold shares between 0 and 1, found {}", file.name(), kTensor, share);
  if (budgets.empty()) Fail(ErrorCode::kBadFile, "{}: tensor {} is empty", file.name(), kTensor);
}

void AddBudgets(const SidecarBudgets& budgets, GgufWriter& writer) {
  if (budgets.empty()) return;
  writer.AddArray("budgets.head_count_kv", std::vector<uint32_t>(budgets.n_kv_heads.begin(), budgets.n_kv_heads.end()));
  writer.AddArray("budgets.ratios", budgets.ratios);
  writer.Add("budgets.train.tokens", budgets.tokens);
  const size_t ne[] = {budgets.n_heads(), budgets.ratios.size()};
  writer.AddTensor("budgets.shares", DType::kF32, ne, std::as_bytes(std::span(budgets.shares)));
}

// The dictionary of each layer; how many there are.
size_t ReadDictionaryNumbers(const GgufFile& file, const char* key, std::vector<uint32_t>& numbers) {
  numbers = file.Get<std::vector<uint32_t>>(key);
  size_t n = 0;
  for (const uint32_t number : numbers) {
    if (number > n) Fail(ErrorCode::kBadFile, "{}: {} must number dictionaries in order, found {} where {} come before",
                         file.name(), key, number, n);
    n = std::max<size_t>(n, number + 1);
  }
  if (n == 0 || n > 1024) Fail(ErrorCode::kBadFile, "{}: {} must name 1 to 1024 dictionaries, found {}", file.name(), key, n);
  return n;
}

void CheckAtoms(const GgufFile& file, const char* tensor, const std::vector<uint16_t>& halves, size_t dim) {
  constexpr double kTolerance = 2e-3;  // what rounding to halves does to a length, doubled
  for (size_t at = 0; at < halves.size(); at += dim) {
    double square = 0;
    for (size_t c = 0; c < dim; ++c) square += std::pow(HalfToFloat(halves[at + c]), 2);
    if (!(std::fabs(std::sqrt(square) - 1) <= kTolerance))
      Fail(ErrorCode::kBadFile, "{}: tensor {} must hold atoms of length 1, found {} at atom {}", file.name(), tensor,
           std::sqrt(square), at / dim);
  }
}

void ReadHalves(const GgufFile& file, const char* name, std::vector<size_t> ne, std::vector<uint16_t>& halves) {
  const GgufTensor* tensor = &RequiredTensor(file, name);
  ne.resize(4, 1);
  if (tensor->n_dims > 4 || !std::equal(ne.begin(), ne.end(), tensor->ne.begin()))
    Fail(ErrorCode::kBadFile, "{}: tensor {} must have shape {}, found {}", file.name(), name, NeString(ne),
         tensor->ShapeString());
  if (tensor->type != DType::kF16)
    Fail(ErrorCode::kBadFile, "{}: tensor {} must be of type f16, found {}", file.name(), name, Traits(tensor->type).name);
  halves.resize(Elements(ne));
  std::memcpy(halves.data(), tensor->data.data(), halves.size() * sizeof(uint16_t));
}

void ReadAtoms(const GgufFile& file, const char* name, size_t dim, size_t n_atoms, size_t n, std::vector<uint16_t>& halves) {
  ReadHalves(file, name, {dim, n_atoms, n}, halves);
  CheckAtoms(file, name, halves, dim);
}

void ReadDictionaries(const GgufFile& file, SidecarDictionaries& d) {
  if (file.Find("csr.atom_count") == nullptr) return;
  d.n_atoms = ReadSize(file, "csr.atom_count", 1, 65536);
  d.head_dim = ReadSize(file, "csr.head_dim", 2, 512);
  if (d.head_dim % SidecarDictionaries::kValueChunks != 0)
    Fail(ErrorCode::kBadFile, "{}: csr.head_dim must be a multiple of {}, found {}", file.name(),
         SidecarDictionaries::kValueChunks, d.head_dim);
  const size_t n_keys = ReadDictionaryNumbers(file, "csr.key_dictionaries", d.key_of);
  const size_t n_values = ReadDictionaryNumbers(file, "csr.value_dictionaries", d.value_of);
  if (d.key_of.size() != d.value_of.size())
    Fail(ErrorCode::kBadFile, "{}: csr.value_dictionaries must be of {} layers like csr.key_dictionaries, found {}",
         file.name(), d.key_of.size(), d.value_of.size());
  d.tokens = file.GetOr<uint64_t>("csr.train.tokens", 0);
  d.pairs = file.GetOr<uint32_t>("csr.train.pairs", 0);
  ReadAtoms(file, "csr.keys", d.head_dim, d.n_atoms, n_keys, d.keys);
  ReadAtoms(file, "csr.values", d.head_dim / SidecarDictionaries::kValueChunks, d.n_atoms, n_values, d.values);
}

void AddDictionaries(const SidecarDictionaries& d, GgufWriter& writer) {
  if (d.empty()) return;
  writer.Add("csr.atom_count", static_cast<uint32_t>(d.n_atoms));
  writer.Add("csr.head_dim", static_cast<uint32_t>(d.head_dim));
  writer.AddArray("csr.key_dictionaries", d.key_of);
  writer.AddArray("csr.value_dictionaries", d.value_of);
  writer.Add("csr.train.tokens", d.tokens);
  writer.Add("csr.train.pairs", d.pairs);
  const size_t values_dim = d.head_dim / SidecarDictionaries::kValueChunks;
  writer.AddTensor("csr.keys", DType::kF16, {d.head_dim, d.n_atoms, d.keys.size() / d.n_atoms / d.head_dim},
                   std::as_bytes(std::span(d.keys)));
  writer.AddTensor("csr.values", DType::kF16, {values_dim, d.n_atoms, d.values.size() / d.n_atoms / values_dim},
                   std::as_bytes(std::span(d.values)));
}

void ReadBalance(const GgufFile& file, SidecarBalance& b) {
  if (file.Find("balance.head_count_kv") == nullptr) return;
  const size_t n_heads = ReadHeads(file, "balance.head_count_kv", b.n_kv_heads);
  b.head_dim = ReadSize(file, "balance.head_dim", 1, 512);
  b.tokens = file.GetOr<uint64_t>("balance.train.tokens", 0);
  b.positions = file.GetOr<uint64_t>("balance.train.positions", 0);
  ReadHalves(file, "balance.keys", {b.head_dim, b.head_dim, n_heads}, b.keys);
  if (b.empty()) Fail(ErrorCode::kBadFile, "{}: tensor balance.keys is empty", file.name());
  for (const uint16_t half : b.keys)
    if (!std::isfinite(HalfToFloat(half)))
      Fail(ErrorCode::kBadFile, "{}: tensor balance.keys holds a number that is not finite", file.name());
}

void AddBalance(const SidecarBalance& b, GgufWriter& writer) {
  if (b.empty()) return;
  writer.AddArray("balance.head_count_kv", std::vector<uint32_t>(b.n_kv_heads.begin(), b.n_kv_heads.end()));
  writer.Add("balance.head_dim", static_cast<uint32_t>(b.head_dim));
  writer.Add("balance.train.tokens", b.tokens);
  writer.Add("balance.train.positions", b.positions);
  writer.AddTensor("balance.keys", DType::kF16, {b.head_dim, b.head_dim, b.keys.size() / b.head_dim / b.head_dim},
                   std::as_bytes(std::span(b.keys)));
}

SidecarTraining ReadTraining(const GgufFile& file) {
  SidecarTraining training;
  training.policies = file.GetOr<std::vector<std::string>>("less.train.policies", {});
  training.tokens = file.GetOr<uint64_t>("less.train.tokens", 0);
  training.ctx = file.GetOr<uint32_t>("less.train.ctx", 0);
  training.epochs = file.GetOr<uint32_t>("less.train.epochs", 0);
  training.seed = file.GetOr<uint64_t>("less.train.seed", 0);
  training.validation = file.GetOr<std::vector<float>>("less.train.validation", {});
  training.validation_baseline = file.GetOr<std::vector<float>>("less.train.validation_baseline", {});
  training.history = file.GetOr<std::vector<std::string>>("less.refine.history", {});
  return training;
}

void AddMetadata(const Sidecar& sidecar, GgufWriter& writer) {
  const SidecarShape& s = sidecar.shape;
  writer.Add("general.architecture", kArchitecture);
  writer.Add("general.name", sidecar.model_name + " sidecar");
  const bool has_centers = std::any_of(sidecar.layers.begin(), sidecar.layers.end(), [](const LayerParams& p) { return !p.center.empty(); });
  writer.Add("lesskv.sidecar.version", has_centers ? kVersion : 1);
  writer.Add("lesskv.model.fingerprint", fmt::format("{:016x}", sidecar.model_fingerprint));
  if (sidecar.model_identity != 0) writer.Add("lesskv.model.identity", FingerprintString(sidecar.model_identity));
  writer.Add("lesskv.model.name", sidecar.model_name);
  if (!sidecar.has_maps()) return;
  writer.Add("less.block_count", static_cast<uint32_t>(s.n_layers));
  writer.Add("less.head_count", static_cast<uint32_t>(s.n_heads));
  writer.Add("less.head_count_kv", static_cast<uint32_t>(s.n_kv_heads));
  writer.Add("less.head_dim", static_cast<uint32_t>(s.head_dim));
  writer.Add("less.rank", static_cast<uint32_t>(s.rank));
  writer.Add("less.hidden", static_cast<uint32_t>(s.hidden));
  writer.Add("less.features", FeatureKindName(s.kind));
  writer.Add("less.matrix_type", sidecar.matrix_type == DType::kBF16 ? "bf16" : "f32");
  const SidecarTraining& t = sidecar.training;
  writer.AddArray("less.train.policies", t.policies);
  writer.Add("less.train.tokens", t.tokens);
  writer.Add("less.train.ctx", t.ctx);
  writer.Add("less.train.epochs", t.epochs);
  writer.Add("less.train.seed", t.seed);
  writer.AddArray("less.train.validation", t.validation);
  writer.AddArray("less.train.validation_baseline", t.validation_baseline);
  if (!t.history.empty()) writer.AddArray("less.refine.history", t.history);
}

void AddField(const std::string& name, const Field& field, DType type, GgufWriter& writer) {
  if (type == DType::kF32 || !field.is_matrix) {
    writer.AddTensor(name, DType::kF32, field.ne, std::as_bytes(std::span(*field.values)));
    return;
  }
  const std::vector<float>* values = field.values;
  writer.AddTensor(name, DType::kBF16, std::span<const size_t>(field.ne), [values](ByteSink& sink) {
    std::vector<uint16_t> halves(values->size());
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = FloatToBf16((*values)[i]);
    sink.Write(std::as_bytes(std::span(halves)));
  });
}

void FillUniform(Rng& rng, size_t n, double fan, std::vector<float>& values) {
  const float a = static_cast<float>(std::sqrt(6.0 / fan));
  values.resize(n);
  for (float& v : values) v = rng.UniformFloat(-a, a);
}

void InitialNet(const SidecarShape& s, size_t heads, float last_bias, Rng& rng, NetParams& net) {
  FillUniform(rng, heads * s.head_dim * s.hidden, static_cast<double>(s.head_dim + s.hidden), net.w1);
  FillUniform(rng, heads * s.hidden * s.rank, static_cast<double>(s.rank + s.hidden), net.w2);
  if (s.kind == FeatureKind::kGelu) return;
  net.b1.assign(heads * s.hidden, 0.0f);
  net.b2.assign(heads * s.rank, last_bias);
}

}  // namespace

size_t SidecarBudgets::n_heads() const {
  size_t n = 0;
  for (const size_t heads : n_kv_heads) n += heads;
  return n;
}

std::string FeatureKindName(FeatureKind kind) { return kind == FeatureKind::kGelu ? "gelu" : "exp"; }

FeatureKind ParseFeatureKind(const std::string& name) {
  if (name == "gelu") return FeatureKind::kGelu;
  if (name == "exp") return FeatureKind::kExp;
  Fail(ErrorCode::kInvalidArgument, "features of a map are gelu or exp, found {}", Quoted(name));
}

std::string SidecarShape::ToString() const {
  return fmt::format("{} layers, {} query heads, {} KV heads of {}, rank {}, hidden width {}, {} features", n_layers,
                     n_heads, n_kv_heads, head_dim, rank, hidden, FeatureKindName(kind));
}

Sidecar InitialSidecar(const SidecarShape& shape, uint64_t seed) {
  Sidecar sidecar;
  sidecar.shape = shape;
  sidecar.layers.resize(shape.n_layers);
  for (size_t layer = 0; layer < shape.n_layers; ++layer) {
    Rng rng(seed + 0x9e3779b97f4a7c15ull * (layer + 1));  // a layer's start does not depend on which others are trained
    LayerParams& p = sidecar.layers[layer];
    InitialNet(shape, shape.n_heads, 0.0f, rng, p.phi);
    InitialNet(shape, shape.n_kv_heads, std::log(kWarmStart), rng, p.psi);
    if (shape.kind == FeatureKind::kExp) continue;
    p.d.assign(shape.n_kv_heads * shape.rank, kWarmStart);
    p.d2 = p.d;
    FillUniform(rng, shape.n_kv_heads * shape.rank * shape.rank, 2.0 * static_cast<double>(shape.rank), p.x);
  }
  return sidecar;
}

Sidecar ReadSidecar(const std::string& path) {
  const GgufFile file = GgufFile::Open(path);
  const std::string architecture = file.GetOr<std::string>("general.architecture", "");
  if (architecture != kArchitecture)
    Fail(ErrorCode::kBadFile, "{}: not a sidecar: general.architecture must be {}, found {}", path, kArchitecture,
         Quoted(architecture));
  const uint32_t version = file.Get<uint32_t>("lesskv.sidecar.version");
  if (version < 1 || version > kVersion)
    Fail(ErrorCode::kBadFile, "{}: sidecar version must be 1 to {}, found {}", path, kVersion, version);
  Sidecar sidecar;
  sidecar.model_fingerprint = ReadFingerprint(file);
  sidecar.model_identity = ReadIdentity(file);
  sidecar.model_name = file.GetOr<std::string>("lesskv.model.name", "");
  ReadBudgets(file, sidecar.budgets);
  ReadScores(file, sidecar.scores);
  ReadDictionaries(file, sidecar.dictionaries);
  ReadBalance(file, sidecar.balance);
  const bool has_others = !sidecar.budgets.empty() || !sidecar.scores.empty() || !sidecar.dictionaries.empty() ||
                          !sidecar.balance.empty();
  if (has_others && file.Find("less.block_count") == nullptr) return sidecar;  // no feature maps
  sidecar.shape = ReadShape(file);
  sidecar.training = ReadTraining(file);
  sidecar.matrix_type = ReadMatrixType(file);
  sidecar.layers.resize(sidecar.shape.n_layers);
  for (size_t layer = 0; layer < sidecar.shape.n_layers; ++layer) ReadLayer(file, layer, sidecar);
  return sidecar;
}

void WriteSidecar(const std::string& path, const Sidecar& sidecar) {
  GgufWriter writer;
  AddMetadata(sidecar, writer);
  AddBudgets(sidecar.budgets, writer);
  AddScores(sidecar.scores, writer);
  AddDictionaries(sidecar.dictionaries, writer);
  AddBalance(sidecar.balance, writer);
  Sidecar copy = sidecar;  // Fields hands out mutable vectors; sources point into the copy until Write returns
  for (size_t layer = 0; layer < copy.shape.n_layers; ++layer) {
    if (copy.layers[layer].empty()) continue;
    for (const Field& field : Fields(copy.shape, copy.layers[layer]))
      if (!field.is_optional || !field.values->empty()) AddField(TensorName(layer, field.name), field, copy.matrix_type, writer);
  }
  writer.Write(path);
}

std::optional<uint64_t> SidecarIdentity(const std::string& path) {
  try {
    const GgufFile file = GgufFile::Open(path);
    const uint64_t identity = ReadIdentity(file);
    if (identity != 0 && file.GetOr<std::string>("general.architecture", "") == kArchitecture) return identity;
  } catch (const Error&) {
  }
  return std::nullopt;
}

void CheckModel(const Sidecar& sidecar, const std::string& path, uint64_t model_fingerprint, uint64_t model_identity) {
  if (model_fingerprint == 0 || sidecar.model_fingerprint == model_fingerprint) return;
  if (model_identity != 0 && sidecar.model_identity == model_identity) return;
  Fail(ErrorCode::kMismatch, "{}: it belongs to the model {:016x} ({}), but the model is {:016x}", path,
       sidecar.model_fingerprint, sidecar.model_name, model_fingerprint);
}

void ShiftLogMass(Sidecar& sidecar, float shift) {
  for (LayerParams& layer : sidecar.layers) {
    if (sidecar.shape.kind == FeatureKind::kExp) {
      for (float& bias : layer.psi.b2) bias += shift;
    } else {
      for (float& scale : layer.d) scale *= std::exp(shift);
    }
  }
}

std::optional<Sidecar> ExistingSidecar(const std::string& path, uint64_t model_fingerprint, uint64_t model_identity) {
  if (!std::filesystem::exists(path)) return std::nullopt;
  Sidecar sidecar = ReadSidecar(path);
  CheckModel(sidecar, path, model_fingerprint, model_identity);
  return sidecar;
}

void AddOtherParts(const Sidecar& from, Sidecar& to) {
  if (to.budgets.empty()) to.budgets = from.budgets;
  if (to.scores.empty()) to.scores = from.scores;
  if (to.dictionaries.empty()) to.dictionaries = from.dictionaries;
  if (to.balance.empty()) to.balance = from.balance;
}

Sidecar MergeSidecars(const std::vector<std::string>& paths) {
  if (paths.empty()) Fail(ErrorCode::kInvalidArgument, "merging sidecars needs at least one file");
  Sidecar merged = ReadSidecar(paths[0]);
  if (!merged.has_maps()) Fail(ErrorCode::kMismatch, "{}: holds no feature maps", paths[0]);
  merged.training.validation.resize(merged.shape.n_layers);
  merged.training.validation_baseline.resize(merged.shape.n_layers);
  for (size_t i = 1; i < paths.size(); ++i) {
    Sidecar part = ReadSidecar(paths[i]);
    if (!(part.shape == merged.shape) || part.matrix_type != merged.matrix_type)
      Fail(ErrorCode::kMismatch, "{}: expected the shape of {} ({}), found {}", paths[i], paths[0],
           merged.shape.ToString(), part.shape.ToString());
    CheckModel(part, paths[i], merged.model_fingerprint, merged.model_identity);
    AddOtherParts(part, merged);
    part.training.validation.resize(merged.shape.n_layers);
    part.training.validation_baseline.resize(merged.shape.n_layers);
    for (size_t layer = 0; layer < merged.shape.n_layers; ++layer) {
      if (part.layers[layer].empty()) continue;
      if (!merged.layers[layer].empty())
        Fail(ErrorCode::kMismatch, "{}: layer {} is also in an earlier file", paths[i], layer);
      merged.layers[layer] = std::move(part.layers[layer]);
      merged.training.validation[layer] = part.training.validation[layer];
      merged.training.validation_baseline[layer] = part.training.validation_baseline[layer];
    }
  }
  for (size_t layer = 0; layer < merged.shape.n_layers; ++layer)
    if (merged.layers[layer].empty()) Fail(ErrorCode::kMismatch, "no file holds layer {}", layer);
  return merged;
}

}  // namespace lesskv
