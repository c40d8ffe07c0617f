#include "train/train_csr.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <numeric>

#include "base/checked.h"
#include "base/error.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/rows/atom_codes.h"
#include "kvcache/kv_cache.h"
#include "train/crop_source.h"
#include "train/full_layers.h"

namespace lesskv::train {
namespace {

constexpr size_t kChunks = SidecarDictionaries::kValueChunks;

// Keys and values of a dictionary's layers, [n, head_dim] each.
struct Vectors {
  std::vector<float> keys, values;
};

// Attends in full, a layer at a time, and keeps the keys and values of some tokens of each global layer.
class CollectingCache final : public KvCache {
 public:
  CollectingCache(const CacheShape& shape, size_t n_tokens, std::vector<size_t> kept, size_t group,
                  std::vector<Vectors>& groups)
      : shape_(shape), full_(shape, n_tokens), kept_(std::move(kept)), group_(group), groups_(groups) {}

  void Append(size_t layer, const float* keys, const float* values) override {
    full_.Append(layer, keys, values);
    if (shape_.layers[layer].window > 0) return;
    Vectors& to = groups_[n_global_++ / group_];
    const size_t width = shape_.layers[layer].kv_dim();
    for (const size_t token : kept_) {
      to.keys.insert(to.keys.end(), keys + token * width, keys + (token + 1) * width);
      to.values.insert(to.values.end(), values + token * width, values + (token + 1) * width);
    }
  }

  void Attend(size_t, const float* queries, float* out) override { full_.Attend(queries, out); }

 private:
  CacheShape shape_;
  FullLayers full_;
  std::vector<size_t> kept_;  // tokens
  size_t group_, n_global_ = 0;
  std::vector<Vectors>& groups_;
};

void Validate(const TrainCsrOptions& o) {
  const auto require = [](bool ok, const char* what) {
    if (!ok) Fail(ErrorCode::kInvalidArgument, "train csr: {}", what);
  };
  require(o.sequences >= 1, "--sequences must be at least 1");
  require(o.tokens >= 16, "--tokens must be at least 16");
  require(o.group >= 1, "--group must be at least 1");
  require(o.atoms.pairs >= kChunks && o.atoms.pairs % kChunks == 0, "-s must be even, since a value is coded in two halves");
  require(o.atoms.atoms >= 1 && o.atoms.atoms <= kMostAtoms, "--atoms must be between 1 and 65536");
  require(o.atoms.batch >= 1, "--batch must be at least 1");
  require(o.samples >= o.atoms.atoms + o.atoms.atoms / 4, "--samples must be at least 5/4 of --atoms");
}

// The head size of the global layers, which share dictionaries.
size_t HeadDim(const CacheShape& shape, size_t& n_global, size_t& n_kv_heads) {
  size_t dim = 0;
  n_global = 0;
  n_kv_heads = 1;
  for (const LayerShape& layer : shape.layers) {
    if (layer.window > 0) continue;
    if (dim != 0 && layer.head_dim != dim)
      Fail(ErrorCode::kInvalidArgument, "train csr: the model has heads of {} and of {}", dim, layer.head_dim);
    dim = layer.head_dim;
    n_kv_heads = std::max(n_kv_heads, layer.n_kv_heads);
    ++n_global;
  }
  if (dim == 0) Fail(ErrorCode::kInvalidArgument, "train csr: the model has no global layers");
  if (dim % kChunks != 0 || dim > kMostAtomChannels)
    Fail(ErrorCode::kInvalidArgument, "train csr: heads must have an even size of at most {}, the model's have {}",
         kMostAtomChannels, dim);
  return dim;
}

// A random choice of `count` of n tokens, ascending.
std::vector<size_t> SomeTokens(uint64_t seed, size_t n, size_t count) {
  std::vector<size_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), size_t{0});
  Rng rng(seed);
  rng.Shuffle(tokens);
  tokens.resize(std::min(n, count));
  std::sort(tokens.begin(), tokens.end());
  return tokens;
}

// At most `count` of the vectors, drawn without preference.
void Thin(std::vector<float>& vectors, size_t dim, size_t count, uint64_t seed) {
  const std::vector<size_t> kept = SomeTokens(seed, vectors.size() / dim, count);
  for (size_t i = 0; i < kept.size(); ++i)
    if (kept[i] != i) std::copy_n(&vectors[kept[i] * dim], dim, &vectors[i * dim]);
  vectors.resize(kept.size() * dim);
}

class CsrTraining {
 public:
  CsrTraining(const Engine& engine, const TrainCsrOptions& options, const std::atomic<bool>* stop,
              const std::function<void(std::string_view, double)>& progress)
      : engine_(engine), o_(options), stop_(stop), progress_(progress) {}

  TrainCsrReport Run(const CropSource& crops) {
    const auto start = std::chrono::steady_clock::now();
    const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    TrainCsrReport report;
    size_t n_global = 0, n_kv_heads = 1;
    const CacheShape shape = engine_.model().MakeCacheShape(o_.tokens, engine_.compute());
    const size_t dim = HeadDim(shape, n_global, n_kv_heads), n_groups = CeilDiv(n_global, o_.group);
    std::vector<Vectors> groups(n_groups);
    // Of the last group's layers, which may be the fewest, the sample is still whole.
    const size_t a_text = CeilDiv(CeilDiv(o_.samples, o_.sequences), n_kv_heads);
    for (size_t s = 0; s < o_.sequences; ++s) {
      Collect(crops, s, a_text, groups);
      progress_("collect", static_cast<double>(s + 1) / static_cast<double>(o_.sequences));
    }
    report.collect_seconds = seconds();
    Train(groups, dim, report);
    SidecarDictionaries& d = report.dictionaries;
    d.head_dim = dim;
    d.n_atoms = o_.atoms.atoms;
    for (uint32_t l = 0; l < n_global; ++l) d.key_of.push_back(l / static_cast<uint32_t>(o_.group));
    d.value_of = d.key_of;
    for (const TrainedAtoms& t : report.keys) d.keys.insert(d.keys.end(), t.atoms.begin(), t.atoms.end());
    for (const TrainedAtoms& t : report.values) d.values.insert(d.values.end(), t.atoms.begin(), t.atoms.end());
    d.tokens = o_.sequences * o_.tokens;
    d.pairs = static_cast<uint32_t>(o_.atoms.pairs);
    report.seconds = seconds();
    return report;
  }

 private:
  void CheckStop() const {
    if (stop_ != nullptr && *stop_) Fail(ErrorCode::kRuntime, "stopped");
  }

  void Collect(const CropSource& crops, size_t s, size_t n_kept, std::vector<Vectors>& groups) {
    CheckStop();
    const uint64_t seed = MixSeed(o_.atoms.seed, s);
    const std::vector<int32_t> text = crops.Crop(seed, o_.tokens);
    const Model& model = engine_.model();
    CacheShape shape = model.MakeCacheShape(text.size(), engine_.compute());
    shape.compute = ComputeType::kF32;
    ForwardWorkspace workspace;
    workspace.Reserve(model.config(), text.size());
    CollectingCache cache(shape, text.size(), SomeTokens(seed, text.size(), n_kept), o_.group, groups);
    Forward(model, text, cache, engine_.compute(), workspace);
  }

  // All dictionaries side by side, each on one thread.
  void Train(std::vector<Vectors>& groups, size_t dim, TrainCsrReport& report) {
    const size_t n = groups.size();
    report.keys.resize(n);
    report.values.resize(n);
    std::mutex mutex;
    size_t done = 0;
    const size_t all = 2 * n * (o_.atoms.rounds + o_.atoms.epochs);
    ParallelFor(2 * n, [&](size_t task) {
      const bool keys = task % 2 == 0;
      std::vector<float> vectors = std::move(keys ? groups[task / 2].keys : groups[task / 2].values);
      AtomOptions options = o_.atoms;
      options.seed = MixSeed(o_.atoms.seed, 1000 + task);
      if (!keys) options.pairs /= kChunks;
      options.dim = keys ? dim : dim / kChunks;
      Thin(vectors, options.dim, o_.samples, options.seed);
      if (vectors.size() / options.dim < o_.atoms.atoms + o_.atoms.atoms / 4)
        Fail(ErrorCode::kInvalidArgument, "train csr: {} vectors are too few for {} atoms; take more --sequences or --tokens",
             vectors.size() / options.dim, o_.atoms.atoms);
      (keys ? report.keys : report.values)[task / 2] = TrainAtoms(std::move(vectors), options, [&] {
        CheckStop();
        const std::lock_guard lock(mutex);
        progress_("train", static_cast<double>(++done) / static_cast<double>(all));
      });
    });
  }

  const Engine& engine_;
  const TrainCsrOptions& o_;
  const std::atomic<bool>* stop_;
  const std::function<void(std::string_view, double)>& progress_;
};

}  // namespace

TrainCsrReport TrainCsr(const Engine& engine, const Tokenizer& tokenizer, const TrainCsrOptions& options,
                        const std::function<void(std::string_view, double)>& progress, const std::atomic<bool>* stop) {
  Validate(options);
  const CropSource crops(tokenizer, options.texts);
  const ThreadScope threads(engine.threads());
  return CsrTraining(engine, options, stop, progress).Run(crops);
}

}  // namespace lesskv::train
