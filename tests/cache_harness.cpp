#include "cache_harness.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "base/check.h"
#include "kernels/quants/half.h"
#include "kvcache/registry.h"

namespace lesskv::testing_support {

std::string TinyShape::Name() const {
  return fmt::format("{} layers, {}/{} heads of {}", n_layers, n_heads, n_kv_heads, head_dim);
}

CacheShape MakeCacheShape(const TinyShape& shape, size_t rotary_dims) {
  CacheShape made = CacheShape::Uniform(shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.ctx,
                                        {.n_dims = rotary_dims, .base = 100.0, .frequency_factors = {}});
  made.input_width = shape.n_kv_heads * shape.head_dim;  // what enters a layer here are the values
  return made;
}

CacheShape MakeCacheShape(const TinyShape& shape) { return MakeCacheShape(shape, shape.rotary_dims()); }

std::vector<double> Rotated(const TinyShape& shape, const float* x, size_t position) {
  std::vector<double> y(x, x + shape.head_dim);
  const size_t n = shape.rotary_dims();
  for (size_t i = 0; i < n / 2; ++i) {
    const double angle = double(position) * std::pow(100.0, -2.0 * double(i) / double(n));
    y[2 * i] = x[2 * i] * std::cos(angle) - x[2 * i + 1] * std::sin(angle);
    y[2 * i + 1] = x[2 * i] * std::sin(angle) + x[2 * i + 1] * std::cos(angle);
  }
  return y;
}

Text RandomText(const TinyShape& shape, size_t n, uint64_t seed, float scale) {
  Rng rng(seed);
  const auto fill = [&](size_t heads) {
    std::vector<float> x(n * heads * shape.head_dim);
    for (float& value : x) value = rng.Normal() * scale;
    return x;
  };
  Text text{n, {}, {}, {}};
  for (size_t l = 0; l < shape.n_layers; ++l) {
    text.q.push_back(fill(shape.n_heads));
    text.k.push_back(fill(shape.n_kv_heads));
    text.v.push_back(fill(shape.n_kv_heads));
  }
  return text;
}

namespace {

Outputs RunLayersOf(KvCache& cache, size_t n_heads, size_t n_kv_heads, size_t head_dim, const Text& text,
                    size_t first, size_t n) {
  CHECK(first + n <= text.n, "the text has {} tokens", text.n);
  Outputs outputs;
  for (size_t l = 0; l < text.q.size(); ++l) {
    // Copies, so that a cache that kept the pointers would read freed memory.
    const size_t kv = n_kv_heads * head_dim, qs = n_heads * head_dim;
    {
      const std::vector<float> k(text.k[l].begin() + static_cast<ptrdiff_t>(first * kv),
                                 text.k[l].begin() + static_cast<ptrdiff_t>((first + n) * kv));
      const std::vector<float> v(text.v[l].begin() + static_cast<ptrdiff_t>(first * kv),
                                 text.v[l].begin() + static_cast<ptrdiff_t>((first + n) * kv));
      if (cache.WantsInputs(l)) cache.ReadInputs(l, 0, n, v.data());
      cache.Append(l, k.data(), v.data());
    }
    std::vector<float> out(n * qs, std::nanf(""));
    cache.Attend(l, text.q[l].data() + first * qs, out.data());
    outputs.push_back(std::move(out));
  }
  return outputs;
}

void AddOutputs(Outputs& all, const Outputs& part) {
  all.resize(part.size());
  for (size_t l = 0; l < part.size(); ++l) all[l].insert(all[l].end(), part[l].begin(), part[l].end());
}

}  // namespace

Outputs RunLayers(KvCache& cache, const TinyShape& shape, const Text& text, size_t first, size_t n) {
  return RunLayersOf(cache, shape.n_heads, shape.n_kv_heads, shape.head_dim, text, first, n);
}

Outputs Feed(SequenceCache& cache, const Text& text, size_t first, size_t n, StepKind kind) {
  const LayerShape& shape = cache.config().shape().layers[0];
  cache.BeginStep(n, kind);
  Outputs outputs = RunLayersOf(cache, shape.n_heads, shape.n_kv_heads, shape.head_dim, text, first, n);
  cache.EndStep();
  return outputs;
}

std::vector<LifeStep> UsualLife() {
  std::vector<LifeStep> life{{45, StepKind::kPrompt}};
  for (int i = 0; i < 20; ++i) life.push_back({1, StepKind::kDecode});
  life.push_back({3, StepKind::kDecode});
  life.push_back({18, StepKind::kPrompt});
  for (int i = 0; i < 9; ++i) life.push_back({1, StepKind::kDecode});
  return life;
}

size_t Tokens(const std::vector<LifeStep>& life) {
  size_t n = 0;
  for (const LifeStep& step : life) n += step.n;
  return n;
}

Outputs Live(SequenceCache& cache, const Text& text, size_t first, const LifeStep& step) {
  if (step.kind != StepKind::kPrompt) return Feed(cache, text, first, step.n, step.kind);
  const size_t chunk = cache.config().prefill_chunk();
  Outputs outputs;
  if (chunk == 0) outputs = Feed(cache, text, first, step.n, StepKind::kPrompt);
  for (size_t done = 0; chunk > 0 && done < step.n; done += chunk)
    AddOutputs(outputs, Feed(cache, text, first + done, std::min(chunk, step.n - done), StepKind::kStream));
  cache.EndPrompt();
  return outputs;
}

TempSidecar::TempSidecar(const TinyShape& shape, FeatureKind kind, size_t input_width) {
  static std::atomic<int> count{0};
  path_ = (std::filesystem::temp_directory_path() / fmt::format("lesskv-contract-{}-{}.less.gguf", getpid(), count++))
              .string();
  SidecarShape s;
  s.n_layers = shape.n_layers;
  s.n_heads = shape.n_heads;
  s.n_kv_heads = shape.n_kv_heads;
  s.head_dim = shape.head_dim;
  s.rank = 8;
  s.hidden = 32;
  s.kind = kind;
  sidecar_ = InitialSidecar(s, 7);
  sidecar_.model_fingerprint = 7;
  sidecar_.matrix_type = DType::kF32;
  Rng rng(11);
  for (LayerParams& layer : sidecar_.layers) {
    for (float& d : layer.d) d = rng.UniformFloat(-2.0f, 2.0f);
    for (float& d : layer.d2) d = rng.UniformFloat(-1.0f, 1.0f);
    for (float& b : layer.psi.b2) b = rng.UniformFloat(-0.5f, 0.5f);
  }
  SidecarBudgets& budgets = sidecar_.budgets;
  budgets.n_kv_heads.assign(shape.n_layers, shape.n_kv_heads);
  budgets.ratios = {0.02f, 0.1f, 0.4f};
  for (const float ratio : budgets.ratios)
    for (size_t i = 0; i < budgets.n_heads(); ++i)
      budgets.shares.push_back(std::min(1.0f, ratio * rng.UniformFloat(0.1f, 1.9f)));
  SidecarScores& scores = sidecar_.scores;
  scores.n_kv_heads = budgets.n_kv_heads;
  scores.width = input_width > 0 ? input_width : shape.n_kv_heads * shape.head_dim;
  for (size_t i = 0; i < budgets.n_heads(); ++i) {
    scores.bias.push_back(rng.UniformFloat(-1.0f, 1.0f));
    for (size_t c = 0; c < scores.width; ++c) scores.weight.push_back(rng.UniformFloat(-0.5f, 0.5f));
    for (size_t q = 1; q <= SidecarScores::kQuantiles; ++q)
      scores.quantiles.push_back(scores.bias.back() + 0.05f * (static_cast<float>(q) - 50));
  }
  if (shape.head_dim % SidecarDictionaries::kValueChunks == 0) AddDictionaries(shape, rng);
  AddBalance(shape, rng);
  WriteSidecar(path_, sidecar_);
}

// Random atoms, but for the first of values, which is the same in all channels; the last two layers share theirs of keys.
void TempSidecar::AddDictionaries(const TinyShape& shape, Rng& rng) {
  SidecarDictionaries& d = sidecar_.dictionaries;
  d.head_dim = shape.head_dim;
  d.n_atoms = 75;
  const size_t n_keys = std::max<size_t>(shape.n_layers, 2) - 1;
  for (uint32_t l = 0; l < shape.n_layers; ++l) {
    d.key_of.push_back(std::min(l, static_cast<uint32_t>(n_keys) - 1));
    d.value_of.push_back(l);
  }
  const auto fill = [&](size_t n, size_t dim, std::vector<uint16_t>& halves) {
    for (size_t i = 0; i < n * d.n_atoms; ++i) {
      std::vector<float> atom(dim);
      double square = 0;
      for (float& x : atom) x = rng.Normal(), square += double(x) * x;
      for (const float x : atom) halves.push_back(FloatToHalf(static_cast<float>(x / std::sqrt(square))));
    }
  };
  fill(n_keys, shape.head_dim, d.keys);
  const size_t chunk = shape.head_dim / SidecarDictionaries::kValueChunks;
  fill(shape.n_layers, chunk, d.values);
  for (size_t l = 0; l < shape.n_layers; ++l)
    std::fill_n(d.values.begin() + static_cast<ptrdiff_t>(l * d.n_atoms * chunk), chunk,
                FloatToHalf(1 / std::sqrt(static_cast<float>(chunk))));
}

// Matrices not far from those that change nothing.
void TempSidecar::AddBalance(const TinyShape& shape, Rng& rng) {
  SidecarBalance& b = sidecar_.balance;
  const size_t d = shape.head_dim;
  b.head_dim = d;
  b.n_kv_heads.assign(shape.n_layers, shape.n_kv_heads);
  for (size_t i = 0; i < shape.n_layers * shape.n_kv_heads * d * d; ++i)
    b.keys.push_back(FloatToHalf((i % (d * d) % (d + 1) == 0 ? 1.0f : 0.0f) + 0.2f / std::sqrt(static_cast<float>(d)) * rng.Normal()));
}

TempSidecar::~TempSidecar() { std::filesystem::remove(path_); }

std::shared_ptr<const CacheConfig> MakeConfig(const std::string& spec, const TinyShape& shape,
                                              const TempSidecar& sidecar, std::vector<ProtectedSpan> protect) {
  return CacheConfig::Create(CacheSpec::Parse(spec), MakeCacheShape(shape), std::move(protect), sidecar.source());
}

namespace {

// The example with a chunk, and groups, that are small beside the texts of these tests.
std::string Example(const Method& method) {
  if (method.name == "kivi") return "kivi(2, group=16, window=16)";
  if (method.name == "balanced") return "balanced(2, group=16, window=16, sinks=3)";
  if (method.name == "cluster") return "cluster(12, sinks=2, size=5, every=8, add=2, skip=1)";
  if (method.name == "think") return "think(0.4, window=4)";
  if (method.name == "recent") return "recent(4)";
  return method.stage == Stage::kPrefill ? "prefill(chunk=7)" : std::string(method.Example());
}

bool InGroups(const std::string& spec) {
  return spec.find("kivi") != std::string::npos || spec.find("balanced") != std::string::npos;
}

// A pair as a spec; where rows lie in groups, with budgets that hold some.
std::string WithRoom(const std::string& spec) {
  if (!InGroups(spec)) return spec;
  std::string text = spec;
  for (const Method* method : Methods()) {
    const std::string few(method->Example());
    if (method->stage != Stage::kSelect || !few.ends_with("%)")) continue;
    if (const size_t at = text.find(few); at != std::string::npos)
      text.replace(at, few.size(), std::string(method->name) + "(66)");
  }
  // Its window is think's, and half of 32 channels the least that can go.
  const std::string think = "think(0.4, window=4)";
  if (const size_t at = text.find(think); at != std::string::npos) text.replace(at, think.size(), "think(0.5)");
  return text;
}

bool TakesHeadSize(const std::string& spec, size_t head_dim) {
  if (InGroups(spec)) return head_dim % 32 == 0;
  const bool blocks = spec.find("q8") != std::string::npos || spec.find("q4") != std::string::npos ||
                      spec.find("csr") != std::string::npos;
  if (blocks && spec.find("think") != std::string::npos) return head_dim % 32 == 0 && head_dim > 32;
  return !blocks || head_dim % 32 == 0;
}

}  // namespace

std::vector<std::string> LegalSpecs(const TinyShape& shape) {
  std::vector<std::string> specs;
  const auto add = [&](const std::string& text) {
    if (TakesHeadSize(text, shape.head_dim)) specs.push_back(CacheSpec::Parse(WithRoom(text)).ToString());
  };
  const Method &h2o = *FindMethod("h2o"), &full = *FindMethod("full");
  for (size_t i = 0; i < Methods().size(); ++i) {
    const Method* a = Methods()[i];
    const bool a_selects = a->stage == Stage::kSelect;
    add((a_selects ? "" : Conflict(*a, h2o) ? "full+" : "h2o(5%)+") + Example(*a));
    for (const Method* b : Methods().subspan(i + 1)) {
      if (Conflict(*a, *b)) continue;
      const bool selects = a_selects || b->stage == Stage::kSelect;
      const bool evicts = !selects && !Conflict(*a, h2o) && !Conflict(*b, h2o);
      if (!selects && !evicts && (Conflict(*a, full) || Conflict(*b, full))) continue;
      add((selects ? "" : evicts ? "h2o(5%)+" : "full+") + Example(*a) + "+" + Example(*b));
    }
  }
  const SpecTerm threshold = ParseTerm("kvzap(threshold=0.2, window=5, sinks=2)");
  for (const Method* b : Methods())
    if (!Conflict(threshold, ParseTerm(Example(*b)))) add(ToString(threshold) + "+" + Example(*b));
  for (const char* more :
       {"window(12, sinks=2, positions=cache)", "window(12, sinks=2, positions=cache)+f32+prefill(chunk=5)",
        "window(12, sinks=0)+less+f32", "h2o(heavy=9, recent=3)+less+f32", "h2o(heavy=0, recent=11)+f32",
        "h2o(heavy=11, recent=0)+f32", "h2o(11, extra=4)+pyramid(3)+less+bf16+prefill(chunk=9)",
        "tova(10)+pyramid(5)+less+f32", "tova(1)+f32", "snapkv(14, window=4, kernel=3)+less+f32+pyramid",
        "snapkv(14, window=4, pool=avg)+f32+prefill(chunk=6)", "full+f32+prefill(chunk=16)",
        "h2o(16)+ada(0)+less+f32", "snapkv(24, window=4)+ada+f32+less", "h2o(20)+pyramid(3)+ada(0.1)",
        "snapkv(14, window=4)+pyramid(4)+q8", "h2o(16)+zigzag+ada+less+f32", "snapkv(24, window=4)+zigzag(0.1, window=5)+ada(0)+f32",
        "window(12, sinks=2, positions=cache)+split(2)+f32", "h2o(12)+split(2)+less+f32+prefill(chunk=5)",
        "window(20)+split(0)+q8", "snapkv(14, window=4)+split(4)+f32", "snapkv(14, window=4)+split(4)+f32+prefill(chunk=6)",
        "tova(12)+split(2)+f32", "h2o(14)+split+ada+f32", "tova(12)+zigzag+less+f32", "window(12, sinks=2, positions=cache)+zigzag",
        "h2o(12)+mix(k=f16, v=f32)+less", "h2o(16)+mix(k=q8, v=q4)+less",
        "full+q4(rotate=true)", "h2o(16)+mix(k=q8, v=q4, rotate=true)+less", "snapkv(14, window=4)+q8(rotate=true)",
        "h2o(66)+pyramid+f32", "full+kivi(4, group=16, window=16)", "full+kivi(3, group=64, window=64)",
        "full+kivi(k=4, v=2, group=32, window=64)+prefill(chunk=11)",
        "h2o(41)+kivi(2, group=16, window=16)+less+prefill(chunk=5)", "h2o(70)+kivi(k=3, v=2, group=16, rotate=true)+less",
        "window(49, sinks=2, positions=cache)+kivi(4, group=16)", "snapkv(40, window=4)+kivi(2, group=16, window=16)",
        "full+balanced(3, group=32, window=9)+prefill(chunk=11)", "full+balanced(k=4, v=2, group=16, window=20, sinks=0)",
        "h2o(41)+balanced(2, group=16, window=16)+less+prefill(chunk=5)", "snapkv(40, window=4)+balanced(3, group=16, window=5, sinks=9)",
        "h2o(60)+split(4)+balanced(2, group=16, window=16)", "kvzap(66, scope=head)+balanced(2, group=16, window=16)",
        "full+csr(4, window=9)", "full+csr(6, atoms=33, sample=8, guard=5)+prefill(chunk=11)",
        "full+csr(4, window=9, coefficients=f8)", "snapkv(24, window=4)+csr(6, coefficients=f8, sample=8, guard=5)+less",
        "h2o(41)+csr(4, window=16, sample=16)+less+prefill(chunk=5)", "snapkv(24, window=4)+csr(2, guard=12)+less",
        "window(20, sinks=2, positions=cache)+csr(window=7)", "tova(16)+csr(4, window=5, sample=4, guard=3)",
        "h2o(30)+split(4)+csr(window=6)", "snapkv(24, window=4)+pyramid(3)+csr(4, sample=20)",
        "tova(16)+q8(rotate=true)+prefill(chunk=9)", "window(12, sinks=2, positions=cache)+q8(rotate=true)",
        "cascade(14, levels=3, sinks=2)+f32", "cascade(14, levels=3, sinks=2)+pyramid(3)+f32+prefill(chunk=9)",
        "cascade(14, levels=3, sinks=2, positions=true)+less+f32+prefill(chunk=7)", "cascade(12, levels=1)+f32",
        "cascade(14, levels=2, sinks=0, positions=true, heads=mean)+f32",
        "elastic(0.3, weighted=true)+f32", "elastic(0.2, keys=unrotated)+less+f32", "elastic(0.4, merge=off, at=9)+merge+f32",
        "elastic(0.2, first=0, last=0)+f16", "h2o(12)+merge(weighted=true)+f32+prefill(chunk=7)",
        "window(12, sinks=2, positions=cache)+merge(weighted=true)+q8(rotate=true)", "tova(10)+merge(keys=unrotated)+f32",
        "kvzap(14, window=3)+pooled+f32", "kvzap(14, scope=layer)+f32", "kvzap(14, scope=head)+less+q8",
        "kvzap(13, scope=layer, window=2)+less+f32+prefill(chunk=6)", "kvzap(12)+uniform+f32", "kvzap(66, scope=head)+kivi(2, group=16, window=16)", "kvzap(24, scope=head)+csr(4, window=6)",
        "kvzap(14)+pooled(0.3)+less+q8", "kvzap(12, sinks=0)+f32+prefill(chunk=5)",
        "kvzap(13)+split(2)+f32", "h2o(16)+pooled+f32", "snapkv(24, window=4)+pooled+f32", "kvzap(20)+ada+f32",
        "kvzap(threshold=-0.5, max=20, window=4)+f32", "kvzap(threshold=0, max=24, window=3)+less+q8(rotate=true)+prefill(chunk=7)",
        "kvzap(threshold=0.5, window=0, sinks=0)+less+f32", "kvzap(threshold=-1000)+f32", "kvzap(threshold=1000, window=7)+f32",
        "full+cluster(14, sinks=3, size=4, every=9, add=3, skip=1, offload=\"/tmp\", cache=32)+f32",
        "full+cluster(9, share=group, sinks=0, size=5, every=7, add=2, skip=0, offload=\"/tmp\", cache=5)+f16+prefill(chunk=9)",
        "full+cluster(9, share=group, sinks=0, size=3, every=7, add=3, skip=0)+f32",
        "full+cluster(14, sinks=4, size=50, every=11, add=1, skip=1)+q8(rotate=true)+prefill(chunk=9)",
        "full+f32+think(0.5, window=3)", "full+f32+think(0.5, window=3, generated=full)",
        "snapkv(14, window=4)+f32+think(0.6, window=4, generated=full)", "h2o(16)+ada(0)+f32+think(0.3, window=5)",
        "snapkv(24, window=4)+zigzag(0.1)+ada(0)+think(window=6)", "snapkv(24, window=4)+ada+f32+think(0.5)",
        "h2o(12)+split(2)+f32+think(0.5, window=3)", "h2o(14)+split+ada+f32+think(0.5, window=7)",
        "tova(12)+zigzag(0.1)+think(0.5, window=20)", "snapkv(14, window=4)+pyramid(4)+think(window=4)",
        "window(12, sinks=2)+f32+think(0.5, window=5)+prefill(chunk=5)", "elastic(0.4, merge=off, at=9)+f32+think(window=4)",
        "cascade(14, levels=3, sinks=2, positions=true)+f32+think(window=3)",
        "full+think(0.5)+kivi(2, group=16, window=16)", "h2o(20%)+think(0.5)+kivi(4, group=16, window=16)",
        "full+think(0.6)+kivi(k=3, v=2, group=16, window=32, rotate=true)+prefill(chunk=11)",
        "snapkv(40, window=4)+think(0.5)+kivi(2, group=16, window=16)", "h2o(60)+split(4)+think(0.5)+kivi(3, group=16, window=16)",
        "full+q4(rotate=true)+recent(5)", "full+mix(k=q8, v=f32)+recent(3)+prefill(chunk=7)", "h2o(16)+less+q8(rotate=true)+recent(4)",
        "h2o(14)+split+ada+q4+recent(7)", "snapkv(24, window=4)+zigzag(0.1)+ada(0)+q8+recent(6)", "tova(12)+zigzag(0.1)+q4+recent(20)",
        "snapkv(14, window=4)+pyramid(4)+q8+recent(4)", "window(12, sinks=2)+q4+recent(5)+prefill(chunk=5)",
        "elastic(0.4, merge=off, at=9)+q8+recent(4)", "snapkv(14, window=4)+match+f32", "snapkv(14, window=4)+match+f32+pyramid", "h2o(12)+match(values=off)+f32",
        "h2o(40)+match(every=16)+f32", "tova(24)+match(queries=5, every=16)", "h2o(44)+pyramid(2)+match(every=17)+q8(rotate=true)+prefill(chunk=6)",
        "snapkv(30, window=4)+match(every=16)+f32+prefill(chunk=7)", "kvzap(60, window=3)+split(48)+match(queries=9, every=20)+f32",
        "h2o(12)+match(queries=5)+q8(rotate=true)+prefill(chunk=20)", "snapkv(14)+match(weights=off)+f32+prefill(chunk=19)"})
    add(more);
  std::sort(specs.begin(), specs.end());
  specs.erase(std::unique(specs.begin(), specs.end()), specs.end());
  return specs;
}

bool IsLossless(const std::string& spec) {
  const CacheSpec parsed = CacheSpec::Parse(spec);
  return parsed.Find("f32") != nullptr;
}

std::vector<int32_t> Resident(const SequenceCache& cache, size_t layer, size_t kv_head) {
  std::vector<int32_t> positions;
  for (Position p : cache.ResidentPositions(layer, kv_head)) positions.push_back(ToInt(p));
  return positions;
}

std::vector<std::vector<int32_t>> AllResident(const SequenceCache& cache, const TinyShape& shape) {
  std::vector<std::vector<int32_t>> all;
  for (size_t l = 0; l < shape.n_layers; ++l)
    for (size_t h = 0; h < shape.n_kv_heads; ++h) all.push_back(Resident(cache, l, h));
  return all;
}

bool Same(const Outputs& a, const Outputs& b) {
  if (a.size() != b.size()) return false;
  for (size_t l = 0; l < a.size(); ++l)
    if (a[l].size() != b[l].size() || std::memcmp(a[l].data(), b[l].data(), a[l].size() * sizeof(float)) != 0)
      return false;
  return true;
}

double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  CHECK(a.size() == b.size());
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(double(a[i]) - b[i]);
    if (!(difference <= worst)) worst = difference;  // NaN stays
    largest = std::max(largest, std::fabs(double(b[i])));
  }
  return worst / largest;
}

std::string SharedFile(const std::string& relative) {
  const char* root = std::getenv("LESSKV_SHARED_DIR");
  const std::string path = (root != nullptr ? std::string(root) : LESSKV_SOURCE_DIR "/../shared") + "/" + relative;
  return std::filesystem::exists(path) ? path : "";
}

}  // namespace lesskv::testing_support
