#include "eval/speed_verify.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "base/threads.h"
#include "kernels/basic/cpu.h"
#include "kernels/linear/linear.h"
#include "kernels/quants/half.h"
#include "model/forward.h"

namespace lesskv {
namespace {

constexpr size_t kPrompt = kMostFewTokens + 1;  // the shortest prompt that takes the kernels of long ones
constexpr size_t kSteps = 2;
constexpr size_t kDepth = 200;  // of a cache that nothing leaves: more than a block of rows, and not a whole number

class ScalarKernels {
 public:
  ScalarKernels() : active_(ActiveIsa()) { ForceIsa(Isa::kScalar); }
  ~ScalarKernels() { ForceIsa(active_); }

 private:
  Isa active_;
};

// Tokens in the cache before the prompt: enough for each head's budget to be full and something to have left.
size_t Depth(const CacheConfig& config) {
  size_t most = 0;
  const size_t ctx = config.shape().ctx;
  for (const size_t budget : config.Budgets(ctx)) most = std::max(most, budget);
  return std::min(most == 0 ? kDepth : most + most / 4 + 1, ctx - std::min(ctx, kPrompt + kSteps));
}

double Difference(std::span<const float> found, std::span<const float> expected) {
  double error = 0, power = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error += std::pow(static_cast<double>(found[i]) - expected[i], 2);
    power += std::pow(static_cast<double>(expected[i]), 2);
  }
  const double difference = error / std::max(power, 1e-30);
  return std::isfinite(difference) ? difference : INFINITY;
}

// The largest difference that was found, in parts of what was allowed where it was.
struct Worst {
  double difference = 0, allowed = 1;
  void Note(double found, double bound) {
    if (found / bound > difference / allowed) difference = found, allowed = bound;
  }
};

std::vector<float> Rounded(const float* x, size_t n) {
  std::vector<float> out(x, x + n);
  for (float& value : out) value = Bf16ToFloat(FloatToBf16(value));
  return out;
}

// A step of a cache, whose every layer a copy of it answers, too, with the scalar kernels. Where the arithmetic rounds,
// another copy answers with queries, keys and values of the step that were rounded to bfloat16: what such a rounding alone
// does to a layer depends on how large its scores are (keys of Qwen2 share biases of hundreds), and kernels may do a few
// times that.
class CheckedStep final : public KvCache {
 public:
  CheckedStep(SequenceCache& cache, size_t n_tokens, StepKind kind, ComputeType compute)
      : cache_(cache), reference_(cache.Clone()), n_tokens_(n_tokens), bound_(VerifyTolerance(compute)) {
    if (compute != ComputeType::kF32) rounded_ = cache.Clone();
    for (SequenceCache* each : {&cache, reference_.get(), rounded_.get()})
      if (each != nullptr) each->BeginStep(n_tokens, kind);
  }

  bool WantsInputs(size_t layer) const override { return cache_.WantsInputs(layer); }
  void ReadInputs(size_t layer, size_t first, size_t n, const float* x) override {
    cache_.ReadInputs(layer, first, n, x);
    reference_->ReadInputs(layer, first, n, x);
    if (rounded_ != nullptr) rounded_->ReadInputs(layer, first, n, x);
  }

  void Append(size_t layer, const float* keys, const float* values) override {
    cache_.Append(layer, keys, values);
    const ScalarKernels scalar;
    reference_->Append(layer, keys, values);
    if (rounded_ == nullptr) return;
    const size_t n = n_tokens_ * cache_.config().shape().layers[layer].kv_dim();
    rounded_->Append(layer, Rounded(keys, n).data(), Rounded(values, n).data());
  }

  void Attend(size_t layer, const float* queries, float* out) override {
    cache_.Attend(layer, queries, out);
    const size_t n = n_tokens_ * cache_.config().shape().layers[layer].q_dim();
    std::vector<float> expected(n), rounded(n);
    double by_rounding = 0;
    {
      const ScalarKernels scalar;
      reference_->Attend(layer, queries, expected.data());
      if (rounded_ != nullptr) {
        rounded_->Attend(layer, Rounded(queries, n).data(), rounded.data());
        by_rounding = Difference(rounded, expected);
      }
    }
    constexpr double kTimesRounding = 8;
    constexpr double kMost = 0.05;         // a wrong kernel is not excused by a layer that is next to chaotic
    worst_.Note(Difference({out, n}, expected), std::max(bound_, std::min(kMost, kTimesRounding * by_rounding)));
  }

  Worst End() {
    cache_.EndStep();
    return worst_;
  }

 private:
  SequenceCache& cache_;
  std::unique_ptr<SequenceCache> reference_, rounded_;
  size_t n_tokens_;
  double bound_;
  Worst worst_;
};

Worst CheckAttention(Engine& engine, const std::shared_ptr<const CacheConfig>& config, uint64_t seed) {
  const size_t ctx = config->shape().ctx;
  if (ctx <= kSteps) return {};  // a context of one or two tokens has nothing to compare
  Rng rng(seed + 1);
  std::vector<int32_t> tokens(std::min(kPrompt, ctx - kSteps) + kSteps);
  for (int32_t& token : tokens) token = static_cast<int32_t>(rng.Below(engine.model().config().n_vocab));
  SequenceCache cache(config);
  if (const size_t depth = Depth(*config); depth > 0) cache.FillRandom(depth, seed);
  const StepKind prompt = config->prefill_chunk() > 0 ? StepKind::kStream : StepKind::kPrompt;
  ForwardWorkspace workspace;
  Worst worst;
  for (size_t at = 0; at < tokens.size();) {
    const size_t n = at == 0 ? tokens.size() - kSteps : 1;
    CheckedStep step(cache, n, at == 0 ? prompt : StepKind::kDecode, engine.compute());
    Forward(engine.model(), std::span(tokens).subspan(at, n), step, engine.compute(), workspace);
    const Worst of_step = step.End();
    worst.Note(of_step.difference, of_step.allowed);
    at += n;
  }
  return worst;
}

// Some rows of a matrix times random rows, one and as many as take the other path.
double CheckProduct(const WeightView& weights, ComputeType compute, uint64_t seed) {
  constexpr size_t kOutputs = 64;
  WeightView some = weights;
  some.n_out = std::min(kOutputs, weights.n_out);
  double worst = 0;
  for (const size_t n_tokens : {size_t{1}, kMostFewTokens + 1}) {
    Rng rng(seed);
    std::vector<float> x(n_tokens * some.n_in), found(n_tokens * some.n_out), expected(found.size());
    for (float& value : x) value = rng.Normal();
    Linear(some, x.data(), some.n_in, n_tokens, found.data(), some.n_out, compute);
    const ScalarKernels scalar;
    Linear(some, x.data(), some.n_in, n_tokens, expected.data(), some.n_out, compute);
    worst = std::max(worst, Difference(found, expected));
  }
  return worst;
}

double CheckProducts(const Engine& engine, uint64_t seed) {
  const LayerWeights& layer = engine.model().layer(0);
  double worst = 0;
  for (const WeightView* w : {&layer.q, &layer.k, &layer.v, &layer.attn_output, &layer.ffn_gate, &layer.ffn_up,
                              &layer.ffn_down, &engine.model().output()})
    if (w->n_out > 0) worst = std::max(worst, CheckProduct(*w, engine.compute(), seed));
  return worst;
}

}  // namespace

double VerifyTolerance(ComputeType compute) { return compute == ComputeType::kF32 ? 1e-6 : 2e-3; }

double VerifyAgainstScalar(Engine& engine, const std::shared_ptr<const CacheConfig>& config, uint64_t seed) {
  const ThreadScope scope(engine.threads());
  Worst worst = CheckAttention(engine, config, seed);
  worst.Note(CheckProducts(engine, seed), VerifyTolerance(engine.compute()));
  if (!(worst.difference <= worst.allowed))
    Fail(ErrorCode::kRuntime,
         "{} with {} kernels disagrees with the scalar ones, so it is not timed: normalised squared difference {:.2g}, "
         "at most {:.2g} expected",
         config->spec_text(), IsaName(), worst.difference, worst.allowed);
  return worst.difference;
}

}  // namespace lesskv
