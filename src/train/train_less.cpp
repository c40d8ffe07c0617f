#include "train/train_less.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <numbers>
#include <numeric>

#include "base/atomic_file.h"
#include "base/check.h"
#include "base/error.h"
#include "base/memory.h"
#include "base/rng.h"
#include "base/threads.h"
#include "format/gguf.h"
#include "format/gguf_writer.h"
#include "train/capture.h"
#include "train/capture_record.h"
#include "train/crop_source.h"
#include "train/input_scaling.h"
#include "train/less_layer.h"
#include "train/train_kernels.h"

namespace lesskv::train {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

// ---------------------------------------------------------------------------------------------------------- the run

class Trainer {
 public:
  Trainer(Engine& engine, const Tokenizer& tokenizer, const TrainLessOptions& options,
          const std::function<void(const TrainProgress&)>& report, const std::atomic<bool>* stop)
      : engine_(engine), tokenizer_(tokenizer), o_(options), report_(report), stop_(stop) {
    const ModelConfig& model = engine.model().config();
    if (o_.ctx == 0) o_.ctx = model.train_ctx;
    if (o_.end_layer == 0) o_.end_layer = model.n_layers;
    Validate(model);
    shape_ = {model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim, o_.rank, o_.hidden, o_.kind};
    n_validation_ = std::max<size_t>(1, static_cast<size_t>(o_.validation * static_cast<double>(o_.sequences) + 0.5));
    if (n_validation_ >= o_.sequences)
      Fail(ErrorCode::kInvalidArgument, "train less: --validation {} of {} texts leaves none to train on", o_.validation, o_.sequences);
    n_training_ = o_.sequences - n_validation_;
  }

  TrainLessPlan Plan() const {
    const auto text_bytes = [&](bool plus) {
      return RecordBytes(o_.ctx, shape_.n_heads, shape_.n_kv_heads, shape_.head_dim, o_.views, plus);
    };
    TrainLessPlan plan;
    plan.layer_bytes = n_training_ * text_bytes(false) + n_validation_ * text_bytes(true);
    plan.n_layers = plan.layers_at_once = o_.end_layer - o_.first_layer;
    if (o_.disk_bytes == 0) return plan;
    if (plan.layer_bytes > o_.disk_bytes)
      Fail(ErrorCode::kInvalidArgument, "--disk: the captures of one layer take {}, more than the {} allowed; fewer texts "
           "(--sequences) take less", HumanBytes(plan.layer_bytes), HumanBytes(o_.disk_bytes));
    plan.layers_at_once = std::min<uint64_t>(plan.n_layers, o_.disk_bytes / plan.layer_bytes);
    return plan;
  }

  TrainLessReport Run() {
    TrainLessReport result;
    result.sidecar = o_.from.empty() ? InitialSidecar(shape_, o_.seed) : StartingSidecar();
    const TrainLessPlan plan = Plan();
    PrepareFolder();
    CheckRoom(plan);
    TrainProgress begin;
    begin.phase = "plan";
    begin.plan = plan;
    report_(begin);
    for (size_t layer = 0; layer < shape_.n_layers; ++layer)
      if (layer < o_.first_layer || layer >= o_.end_layer) result.sidecar.layers[layer] = {};
    for (size_t first = o_.first_layer; first < o_.end_layer; first += plan.layers_at_once)
      TrainGroup({first, std::min(o_.end_layer, first + plan.layers_at_once)}, plan.n_groups() > 1, result);
    Describe(result);
    return result;
  }

 private:
  struct Group {
    size_t first, end;  // layers, half-open
  };

  void TrainGroup(const Group& group, bool remove_captures, TrainLessReport& result) {
    const auto start = Clock::now();
    if (!IsTrained(group)) Capture(group);
    result.capture_seconds += Seconds(start);
    result.capture_bytes = std::max(result.capture_bytes, CaptureBytes());
    const auto trained = Clock::now();
    for (size_t layer = group.first; layer < group.end; ++layer) TrainLayer(layer, result.sidecar.layers[layer], result);
    result.train_seconds += Seconds(trained);
    for (size_t layer = group.first; layer < group.end && remove_captures; ++layer)
      for (size_t s = 0; s < o_.sequences; ++s) fs::remove(RecordPath(o_.work_folder, s, layer));
  }

  // Whether an earlier run has done all epochs of a group: its captures may be gone.
  bool IsTrained(const Group& group) const {
    for (size_t layer = group.first; layer < group.end; ++layer)
      if (!o_.resume || !fs::exists(StatePath(layer)) || OpenState(layer).Get<size_t>("train.epoch") < o_.epochs) return false;
    return true;
  }

  void CheckRoom(const TrainLessPlan& plan) const {
    std::error_code unknown;
    const fs::space_info space = fs::space(o_.work_folder, unknown);
    const uint64_t there = CaptureBytes();
    if (unknown || plan.bytes_at_once() <= space.available + there) return;
    Fail(ErrorCode::kInvalidArgument, "{} has room for {}, but captures take {} at once; --disk {} trains layers in groups",
         o_.work_folder, HumanBytes(space.available), HumanBytes(plan.bytes_at_once()),
         HumanBytes((space.available + there) / 10 * 9));
  }

  void Validate(const ModelConfig& model) const {
    auto require = [](bool ok, const char* what) {
      if (!ok) Fail(ErrorCode::kInvalidArgument, "train less: {}", what);
    };
    require(!o_.policies.empty(), "at least one policy is needed (--kv)");
    // What less cannot stand beside teaches it nothing: a cache that no token leaves, positions counted inside the cache.
    for (const std::string& policy : o_.policies) CacheSpec::Parse(policy + "+less");
    require(!o_.steps.empty() && *std::min_element(o_.steps.begin(), o_.steps.end()) > 0, "--step must be at least 1");
    constexpr size_t kMost = 1'000'000;  // a negative number that became a huge one makes no sense, either
    require(o_.views >= 1 && o_.views <= 1000, "--views must lie between 1 and 1000");
    require(o_.sequences >= 2 && o_.sequences <= kMost, "--sequences must lie between 2 and 1000000: one of them validates");
    require(o_.validation > 0 && o_.validation < 1, "--validation must lie between 0 and 1");
    require(o_.rank >= 1 && o_.rank <= 64, "--rank must lie between 1 and 64");
    require(o_.hidden >= 1 && o_.hidden <= 8192, "--hidden must lie between 1 and 8192");
    require(std::min(o_.epochs, o_.batch) >= 1 && std::max(o_.epochs, o_.batch) <= kMost,
            "--epochs and --batch must lie between 1 and 1000000");
    require(o_.rate > 0 && o_.rate < 1, "--lr must lie between 0 and 1");
    require(o_.dropout >= 0 && o_.dropout < 1, "--dropout must lie between 0 and 1");
    require(o_.ctx >= 16, "--ctx must be at least 16");
    const CacheShape shape = engine_.model().MakeCacheShape(o_.ctx, engine_.compute());
    for (const std::string& policy : o_.policies) {
      const auto config = CacheConfig::Create(CacheSpec::Parse(policy), shape);
      for (const size_t step : o_.steps) RequireLoss(*config, step, "train less");
    }
    require(!o_.work_folder.empty(), "a work folder is needed");
    require(model.local.empty() && model.architecture.unrotated_every == 0,
            "models whose layers differ (local ones, ones without rotation) are not supported");
    if (o_.first_layer >= o_.end_layer || o_.end_layer > model.n_layers)
      Fail(ErrorCode::kInvalidArgument, "--layers must lie within 0-{}, found {}-{}", model.n_layers - 1, o_.first_layer,
           o_.end_layer - 1);
  }

  // Everything that changes what is captured, and in TrainKey what is trained.
  std::string CaptureKey() const {
    std::string key = fmt::format("model {:016x}\nctx {}\nsequences {}\nviews {}\nvalidation {}\nseed {}\nrank {}\n",
                                  engine_.model().fingerprint(), o_.ctx, o_.sequences, o_.views, n_validation_, o_.seed,
                                  o_.rank);
    if (!o_.from.empty()) key += fmt::format("from {}\n", FingerprintString(GgufFile::Open(o_.from).Fingerprint()));
    for (const std::string& policy : o_.policies) key += "policy " + policy + "\n";
    for (size_t step : o_.steps) key += fmt::format("step {}\n", step);
    for (const std::string& text : o_.texts)
      key += fmt::format("text {} bytes {}\n", fs::path(text).filename().string(), fs::file_size(text));
    return key;
  }

  std::string TrainKey() const {
    return CaptureKey() + fmt::format("hidden {}\nfeatures {}\nepochs {}\nbatch {}\nrate {}\nhalve {}\ndropout {}\n",
                                      o_.hidden, FeatureKindName(o_.kind), o_.epochs, o_.batch, o_.rate, o_.halve,
                                      o_.dropout);
  }

  void PrepareFolder() {
    const std::string key_path = o_.work_folder + "/capture.txt";
    std::error_code error, ignored;
    for (const std::string& text : o_.texts)
      if (!fs::is_regular_file(text, error))
        Fail(ErrorCode::kNotFound, "{}: {}", text, error ? error.message() : "not a file of text");
    if (fs::exists(key_path)) {
      if (!o_.resume)
        Fail(ErrorCode::kInvalidArgument,
             "{} holds an earlier training; continue it with --resume, or name another folder with --work",
             o_.work_folder);
      std::ifstream in(key_path);
      const std::string found((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
      if (found != CaptureKey())
        Fail(ErrorCode::kMismatch, "{} was made with other options, texts or another model; name another folder with "
             "--work", o_.work_folder);
      return;
    }
    CropSource(tokenizer_, o_.texts).Crop(MixSeed(o_.seed, 0), o_.ctx);  // texts too short leave no folder behind
    fs::create_directories(o_.work_folder, ignored);
    AtomicFile file(key_path);
    const std::string key = CaptureKey();
    file.Write(std::as_bytes(std::span(key)));
    file.Commit();
  }

  bool Stopped() const { return stop_ != nullptr && *stop_; }
  void ThrowIfStopped() const {
    if (Stopped()) Fail(ErrorCode::kRuntime, "stopped; what was done lies in {} (--resume continues)", o_.work_folder);
  }

  // ------------------------------------------------------------------------------------------------------- capture

  std::vector<ViewRequest> Views(size_t sequence) const {
    std::vector<ViewRequest> views;
    for (size_t i = 0; i < o_.views; ++i) {
      const size_t n = sequence * o_.views + i;
      views.push_back({o_.policies[n % o_.policies.size()], o_.steps[(n / o_.policies.size()) % o_.steps.size()]});
    }
    return views;
  }

  bool IsCaptured(size_t sequence, const Group& group) const {
    for (size_t layer = group.first; layer < group.end; ++layer)
      if (!fs::exists(RecordPath(o_.work_folder, sequence, layer))) return false;
    return true;
  }

  Sidecar StartingSidecar() const {
    Sidecar from = ReadSidecar(o_.from);
    if (!from.has_maps()) Fail(ErrorCode::kMismatch, "{}: holds no feature maps", o_.from);
    CheckModel(from, o_.from, engine_.model().fingerprint(), engine_.model().identity());
    if (!(from.shape == shape_))
      Fail(ErrorCode::kMismatch, "{}: expected {}, found {}", o_.from, shape_.ToString(), from.shape.ToString());
    for (size_t layer = o_.first_layer; layer < o_.end_layer; ++layer)
      if (from.layers[layer].empty()) Fail(ErrorCode::kMismatch, "{}: layer {} is missing", o_.from, layer);
    return from;
  }

  // The text through the model compressed under `view` with the maps of --from, step by step.
  void CaptureCompressed(const CacheShape& shape, const ViewRequest& view, const std::vector<int32_t>& tokens,
                         const Group& group, CaptureCache& capture, ForwardWorkspace& workspace) const {
    const CacheSpec spec = CacheSpec::Parse(view.spec + "+less(file=\"" + o_.from + "\")");
    SequenceCache cache(CacheConfig::Create(spec, shape, {}, {"", engine_.model().fingerprint(), engine_.model().identity()}));
    RecordingCache recorder(cache, shape);
    for (size_t seen = 0; seen < tokens.size(); seen += view.step) {
      const size_t n = std::min(view.step, tokens.size() - seen);
      cache.BeginStep(n, StepKind::kStream);
      recorder.SetStep(n);
      Forward(engine_.model(), std::span(tokens).subspan(seen, n), recorder, engine_.compute(), workspace);
      cache.EndStep();
    }
    for (size_t layer = group.first; layer < group.end; ++layer) recorder.Replay(layer, capture);
  }

  // Where the texts that validate lie, of which training reads nothing.
  std::vector<CropSource::Stretch> ValidationStretches(const CropSource& crops) const {
    std::vector<CropSource::Stretch> stretches(n_validation_);
    for (size_t i = 0; i < n_validation_; ++i) crops.Crop(MixSeed(o_.seed, n_training_ + i), o_.ctx, true, {}, &stretches[i]);
    return stretches;
  }

  void Capture(const Group& group) {
    const CropSource crops(tokenizer_, o_.texts);
    const std::vector<CropSource::Stretch> held = ValidationStretches(crops);
    const CacheShape shape = engine_.model().MakeCacheShape(o_.ctx, engine_.compute());
    ForwardWorkspace workspace;
    workspace.Reserve(engine_.model().config(), o_.ctx);
    const auto start = Clock::now();
    size_t captured = 0;
    for (size_t s = 0; s < o_.sequences; ++s) {
      ThrowIfStopped();
      if (IsCaptured(s, group)) continue;
      const std::vector<int32_t> tokens =
          crops.Crop(MixSeed(o_.seed, s), o_.ctx, true, s < n_training_ ? std::span(held) : std::span<const CropSource::Stretch>());
      const size_t plus_rows = s >= n_training_ ? std::max<size_t>(1, o_.rank / 2) : 0;
      CaptureCache cache(shape, o_.ctx, Views(s), plus_rows, group.first, group.end,
                         [&](size_t layer, const CaptureRecord& record) {
                           WriteRecord(RecordPath(o_.work_folder, s, layer), record, shape_.n_heads, shape_.n_kv_heads);
                         });
      if (!o_.from.empty()) {
        CaptureCompressed(shape, Views(s)[0], tokens, group, cache, workspace);
      } else {
        Forward(engine_.model(), tokens, cache, engine_.compute(), workspace, {},
                [&](size_t layers_done) { return layers_done < group.end; });
      }
      ++captured;
      TrainProgress p;
      p.phase = "capture";
      p.layer = group.first;
      p.done = static_cast<double>(s + 1) / static_cast<double>(o_.sequences);
      p.seconds_left = Seconds(start) / static_cast<double>(captured) * static_cast<double>(o_.sequences - s - 1);
      report_(p);
    }
  }

  uint64_t CaptureBytes() const {
    uint64_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(o_.work_folder))
      if (entry.path().filename().string().starts_with("text-")) bytes += entry.file_size();
    return bytes;
  }

  // ------------------------------------------------------------------------------------------------------ training

  // W_o^T W_o / d_model: the error of the attention block's output as a quadratic form of the heads' outputs.
  std::vector<float> Metric(size_t layer) const {
    const WeightView& w = engine_.model().layer(layer).attn_output;
    std::vector<float> identity(w.n_in * w.n_in), transposed(w.n_in * w.n_out), metric(w.n_in * w.n_in);
    for (size_t i = 0; i < w.n_in; ++i) identity[i * w.n_in + i] = 1;
    Linear(w, identity.data(), w.n_in, w.n_in, transposed.data(), w.n_out, ComputeType::kF32);
    Gemm(false, true, w.n_in, w.n_in, w.n_out, transposed.data(), w.n_out, transposed.data(), w.n_out, metric.data(),
         w.n_in, false);
    for (float& m : metric) m /= static_cast<float>(w.n_out);
    return metric;
  }

  struct Wanted {
    size_t sequence, view;
  };

  // Reads examples on all threads, and standardises them where `scaling` is given. plus (may be null): Baseline+'s outputs.
  std::vector<LessExample> Load(size_t layer, std::span<const Wanted> wanted, const InputScaling* scaling,
                                std::vector<std::vector<float>>* plus = nullptr) const {
    std::vector<LessExample> examples(wanted.size());
    std::vector<std::exception_ptr> failures(wanted.size());
    if (plus != nullptr) plus->resize(wanted.size());
    ParallelFor(wanted.size(), [&](size_t i) {
      try {
        examples[i] = ReadExample(RecordPath(o_.work_folder, wanted[i].sequence, layer), wanted[i].view, shape_.n_heads,
                                  shape_.n_kv_heads, plus == nullptr ? nullptr : &(*plus)[i]);
        if (scaling != nullptr) scaling->Standardize(shape_, examples[i]);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
    for (const std::exception_ptr& failure : failures)
      if (failure) std::rethrow_exception(failure);
    return examples;
  }

  struct Validation {
    double less = 0, bare = 0, plus = 0;  // mean squared errors at scored positions
  };

  // Bare and Baseline+ do not change: computed when asked for.
  Validation Validate(size_t layer, const LessLayer& model, const InputScaling* scaling, bool with_baselines) const {
    Validation sum;
    size_t scored = 0;
    std::vector<Wanted> all;
    for (size_t s = n_training_; s < o_.sequences; ++s)
      for (size_t view = 0; view < o_.views; ++view) all.push_back({s, view});
    for (size_t first = 0; first < all.size(); first += o_.batch) {
      const std::span<const Wanted> some(all.data() + first, std::min(o_.batch, all.size() - first));
      std::vector<std::vector<float>> plus;
      const std::vector<LessExample> examples = Load(layer, some, scaling, &plus);
      std::vector<const LessExample*> batch;
      for (const LessExample& e : examples) batch.push_back(&e);
      size_t n = 0;
      sum.less += model.LossSum(batch, &n);
      scored += n;
      for (size_t i = 0; i < examples.size() && with_baselines; ++i) {
        sum.bare += model.OutputLossSum(examples[i], examples[i].exact_out.data());
        sum.plus += model.OutputLossSum(examples[i], plus[i].data());
      }
    }
    const double n = static_cast<double>(std::max<size_t>(1, scored));
    return {sum.less / n, sum.bare / n, sum.plus / n};
  }

  float Rate(size_t batch, size_t n_batches, size_t epoch) const {
    if (o_.halve) return static_cast<float>(o_.rate * std::pow(0.5, static_cast<double>(epoch / 10)));
    const double total = static_cast<double>(n_batches * o_.epochs);
    const double at = static_cast<double>(epoch * n_batches + batch);
    const double warm_up = std::min(1.0, (at + 1) / std::max(1.0, 0.03 * total));
    return static_cast<float>(o_.rate * warm_up * (0.5 + 0.5 * std::cos(std::numbers::pi * at / total)));
  }

  struct Optimizer {
    std::vector<float> m, v;
    size_t steps = 0;
  };

  // Adam: beta 0.9, 0.999, epsilon 1e-8; no weight decay.
  void Update(const std::vector<float>& gradient, float rate, LessLayer& model, Optimizer& adam) const {
    ++adam.steps;
    const double c1 = 1 - std::pow(0.9, static_cast<double>(adam.steps));
    const double c2 = std::sqrt(1 - std::pow(0.999, static_cast<double>(adam.steps)));
    // m / c1 / (sqrt(v) / c2 + e) = (c2 / c1) m / (sqrt(v) + e c2)
    const AdamStep step = {static_cast<float>(rate * c2 / c1), 0.9f, 0.999f, static_cast<float>(1e-8 * c2)};
    Adam(step, gradient.data(), gradient.size(), model.parameters().data(), adam.m.data(), adam.v.data());
  }

  struct LayerState {
    size_t epoch = 0;  // epochs done
    Optimizer adam;
    std::vector<float> parameters, best;
    Validation best_validation;
    InputScaling inputs;
  };

  // The paper's features have no bias that could take a mean, and see queries and keys as they are.
  const InputScaling* Scaling(const LayerState& state) const { return o_.kind == FeatureKind::kExp ? &state.inputs : nullptr; }

  void TrainEpoch(size_t layer, LessLayer& model, LayerState& state, TrainProgress& progress, Clock::time_point start,
                  double first_done) {
    const size_t epoch = state.epoch;
    std::vector<size_t> order(n_training_);
    std::iota(order.begin(), order.end(), 0);
    Rng rng(MixSeed(MixSeed(o_.seed, layer), epoch));
    rng.Shuffle(order);
    const size_t n_batches = (n_training_ + o_.batch - 1) / o_.batch;
    std::vector<float> gradient;
    double sum = 0;
    for (size_t b = 0; b < n_batches; ++b) {
      ThrowIfStopped();
      std::vector<Wanted> wanted;
      for (size_t i = b * o_.batch; i < std::min(n_training_, (b + 1) * o_.batch); ++i)
        wanted.push_back({order[i], (epoch + order[i]) % o_.views});
      const std::vector<LessExample> examples = Load(layer, wanted, Scaling(state));
      std::vector<const LessExample*> batch;
      for (const LessExample& e : examples) batch.push_back(&e);
      const DropoutOptions dropout{static_cast<float>(o_.dropout), MixSeed(rng.Next(), b)};
      sum += model.LossAndGradient(batch, dropout, gradient);
      Update(gradient, Rate(b, n_batches, epoch), model, state.adam);
      progress.loss = sum / static_cast<double>(b + 1);
      const double layers = static_cast<double>(o_.end_layer - o_.first_layer);
      const double in_layer = (static_cast<double>(epoch) + static_cast<double>(b + 1) / static_cast<double>(n_batches)) /
                              static_cast<double>(o_.epochs);
      progress.done = (static_cast<double>(layer - o_.first_layer) + in_layer) / layers;
      progress.seconds_left = Seconds(start) / std::max(1e-9, progress.done - first_done) * (1 - progress.done);
      report_(progress);
    }
  }

  std::string StatePath(size_t layer) const { return fmt::format("{}/state-layer-{:03}.gguf", o_.work_folder, layer); }

  void SaveState(size_t layer, const LayerState& state) const {
    GgufWriter writer;
    writer.Add("general.architecture", "lesskv-train-state");
    writer.Add("train.key", TrainKey());
    writer.Add("train.epoch", static_cast<uint64_t>(state.epoch));
    writer.Add("train.steps", static_cast<uint64_t>(state.adam.steps));
    writer.AddArray("train.validation", std::vector<double>{state.best_validation.less, state.best_validation.bare,
                                                            state.best_validation.plus});
    writer.AddTensor("parameters", {state.parameters.size()}, state.parameters);
    writer.AddTensor("best", {state.best.size()}, state.best);
    writer.AddTensor("adam.m", {state.adam.m.size()}, state.adam.m);
    writer.AddTensor("adam.v", {state.adam.v.size()}, state.adam.v);
    for (const auto& [name, channels] : {std::pair{"q", &state.inputs.q}, std::pair{"k", &state.inputs.k}}) {
      if (channels->mean.empty()) continue;
      writer.AddTensor(fmt::format("{}.mean", name), {channels->mean.size()}, channels->mean);
      writer.AddTensor(fmt::format("{}.deviation", name), {channels->deviation.size()}, channels->deviation);
    }
    if (!state.inputs.center.empty()) writer.AddTensor("center", {state.inputs.center.size()}, state.inputs.center);
    writer.Write(StatePath(layer));
  }

  GgufFile OpenState(size_t layer) const {
    GgufFile file = GgufFile::Open(StatePath(layer));
    if (file.GetOr<std::string>("train.key", "") != TrainKey())
      Fail(ErrorCode::kMismatch, "{} was made with other training options; remove it or name another folder with --work",
           file.name());
    return file;
  }

  bool LoadState(size_t layer, size_t n, LayerState& state) const {
    if (!o_.resume || !fs::exists(StatePath(layer))) return false;
    const GgufFile file = OpenState(layer);
    auto read = [&](const char* name, size_t size, std::vector<float>& values) {
      const GgufTensor* tensor = file.FindTensor(name);
      if (tensor == nullptr || tensor->type != DType::kF32 || tensor->Elements() != size)
        Fail(ErrorCode::kBadFile, "{}: tensor {} must hold {} numbers", file.name(), name, size);
      values.resize(size);
      std::memcpy(values.data(), tensor->data.data(), tensor->data.size());
    };
    read("parameters", n, state.parameters);
    read("best", n, state.best);
    read("adam.m", n, state.adam.m);
    read("adam.v", n, state.adam.v);
    if (Scaling(state) != nullptr) {
      const size_t q_dim = shape_.n_heads * shape_.head_dim, kv_dim = shape_.n_kv_heads * shape_.head_dim;
      read("q.mean", q_dim, state.inputs.q.mean);
      read("q.deviation", q_dim, state.inputs.q.deviation);
      read("k.mean", kv_dim, state.inputs.k.mean);
      read("k.deviation", kv_dim, state.inputs.k.deviation);
      if (file.FindTensor("center") != nullptr) read("center", kv_dim, state.inputs.center);
    }
    state.epoch = file.Get<size_t>("train.epoch");
    state.adam.steps = file.Get<size_t>("train.steps");
    const auto validation = file.Get<std::vector<double>>("train.validation");
    if (validation.size() != 3) Fail(ErrorCode::kBadFile, "{}: train.validation must hold 3 numbers", file.name());
    state.best_validation = {validation[0], validation[1], validation[2]};
    return true;
  }

  // What a layer's training begins with: the scale of its inputs, measured on the first texts, and maps for inputs of that
  // scale. Fresh maps are meant for deviations of 1; those of --from take queries and keys as they are.
  void Begin(size_t layer, const LayerParams& params, LessLayer& model, LayerState& state) const {
    std::vector<Wanted> some;
    for (size_t s = 0; s < std::min<size_t>(n_training_, 8); ++s) some.push_back({s, 0});
    if (Scaling(state) != nullptr) {
      std::vector<LessExample> texts = Load(layer, some, nullptr);
      state.inputs = InputScaling::Measure(shape_, engine_.model().config().attention_scale, texts);
      if (!o_.from.empty()) state.inputs.center = params.center;
      for (LessExample& text : texts) state.inputs.Standardize(shape_, text);
      model.Import(o_.from.empty() ? NearTheBareSelector(shape_, params, texts) : state.inputs.ToStandard(shape_, params));
    }
    state.adam.m.assign(model.parameters().size(), 0.0f);
    state.adam.v = state.adam.m;
    state.best_validation = Validate(layer, model, Scaling(state), true);
    state.best = model.parameters();
  }

  void TrainLayer(size_t layer, LayerParams& params, TrainLessReport& result) {
    LayerState state;
    LessLayer model(shape_, params, Metric(layer));
    if (LoadState(layer, model.parameters().size(), state)) {
      model.parameters() = state.parameters;
    } else {
      Begin(layer, params, model, state);
    }
    TrainProgress progress;
    progress.phase = "train";
    progress.layer = layer;
    progress.baseline = state.best_validation.bare;
    progress.baseline_plus = state.best_validation.plus;
    progress.validation = state.best_validation.less;
    const auto start = Clock::now();
    const double layers = static_cast<double>(o_.end_layer - o_.first_layer);
    const double first_done = (static_cast<double>(layer - o_.first_layer) +
                               static_cast<double>(state.epoch) / static_cast<double>(o_.epochs)) / layers;
    while (state.epoch < o_.epochs) {
      progress.epoch = state.epoch;
      TrainEpoch(layer, model, state, progress, start, first_done);
      ++state.epoch;
      const Validation now = Validate(layer, model, Scaling(state), false);
      if (now.less < state.best_validation.less) {
        state.best_validation.less = now.less;
        state.best = model.parameters();
      }
      progress.validation = now.less;
      progress.epoch = state.epoch;
      report_(progress);
      state.parameters = model.parameters();
      SaveState(layer, state);
    }
    model.parameters() = state.best;
    params = Scaling(state) == nullptr ? model.Export() : state.inputs.ToPlain(shape_, model.Export(), o_.matrix_type);
    result.validation.push_back(state.best_validation.less);
    result.baseline.push_back(state.best_validation.bare);
    result.baseline_plus.push_back(state.best_validation.plus);
  }

  void Describe(TrainLessReport& result) const {
    Sidecar& sidecar = result.sidecar;
    sidecar.model_fingerprint = engine_.model().fingerprint();
    sidecar.model_identity = engine_.model().identity();
    sidecar.model_name = engine_.model().config().name;
    sidecar.matrix_type = o_.matrix_type;
    SidecarTraining& t = sidecar.training;
    t.policies = o_.policies;
    t.tokens = static_cast<uint64_t>(n_training_) * o_.ctx;
    t.ctx = static_cast<uint32_t>(o_.ctx);
    t.epochs = static_cast<uint32_t>(o_.epochs);
    t.seed = o_.seed;
    t.validation.assign(shape_.n_layers, 0.0f);
    t.validation_baseline.assign(shape_.n_layers, 0.0f);
    for (size_t i = 0; i < result.validation.size(); ++i) {
      t.validation[o_.first_layer + i] = static_cast<float>(result.validation[i]);
      t.validation_baseline[o_.first_layer + i] = static_cast<float>(result.baseline_plus[i]);
    }
  }

  Engine& engine_;
  const Tokenizer& tokenizer_;
  TrainLessOptions o_;
  const std::function<void(const TrainProgress&)> report_;
  const std::atomic<bool>* stop_;
  SidecarShape shape_;
  size_t n_training_ = 0, n_validation_ = 0;
};

}  // namespace

void RequireLoss(const CacheConfig& config, size_t step, std::string_view command) {
  if (config.global().selector->SaysHowMany()) return;  // its budgets are bounds only
  const size_t n_tokens = config.shape().ctx, seen = (n_tokens - 1) / step * step;  // before the last step
  const std::vector<size_t> budgets = config.Budgets(n_tokens);
  if (std::any_of(budgets.begin(), budgets.end(), [&](size_t rows) { return rows < seen; })) return;
  Fail(ErrorCode::kInvalidArgument,
       "{}: '{}' loses no token of a text of {} before its last step of {}, so that there is nothing to learn", command,
       config.spec().ToString(), n_tokens, step);
}

TrainLessPlan PlanTraining(Engine& engine, const Tokenizer& tokenizer, const TrainLessOptions& options) {
  return Trainer(engine, tokenizer, options, {}, nullptr).Plan();
}

TrainLessReport TrainLess(Engine& engine, const Tokenizer& tokenizer, const TrainLessOptions& options,
                          const std::function<void(const TrainProgress&)>& report, const std::atomic<bool>* stop) {
  const ThreadScope scope(engine.threads());
  return Trainer(engine, tokenizer, options, report, stop).Run();
}

}  // namespace lesskv::train
