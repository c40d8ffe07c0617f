#include "eval/speed_verify.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/rng.h"
#include "kernels/basic/cpu.h"

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

using Logits = std::vector<std::vector<float>>;

Logits Run(Engine& engine, Sequence sequence, const std::vector<int32_t>& tokens) {
  Logits logits;
  const LogitsSink keep = [&](std::span<const LogitsRow> tile) {
    for (const LogitsRow& row : tile) logits.emplace_back(row.logits.begin(), row.logits.end());
  };
  const size_t n_prompt = tokens.size() - kSteps;
  engine.Prefill({{&sequence, std::span(tokens).first(n_prompt), LogitsRows::kLast}}, keep);
  for (size_t i = n_prompt; i < tokens.size(); ++i)
    engine.Decode({{&sequence, std::span(tokens).subspan(i, 1), LogitsRows::kLast}}, keep);
  return logits;
}

double Difference(const std::vector<float>& found, const std::vector<float>& expected) {
  double error = 0, power = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error += std::pow(static_cast<double>(found[i]) - expected[i], 2);
    power += std::pow(static_cast<double>(expected[i]), 2);
  }
  return error / std::max(power, 1e-30);
}

}  // namespace

double VerifyTolerance(ComputeType compute) { return compute == ComputeType::kF32 ? 1e-6 : 2e-2; }

double VerifyAgainstScalar(Engine& engine, const std::shared_ptr<const CacheConfig>& config, uint64_t seed) {
  const size_t ctx = config->shape().ctx;
  if (ctx <= kSteps) return 0;  // a context of one or two tokens has nothing to compare
  Rng rng(seed + 1);
  std::vector<int32_t> tokens(std::min(kPrompt, ctx - kSteps) + kSteps);
  for (int32_t& token : tokens) token = static_cast<int32_t>(rng.Below(engine.model().config().n_vocab));

  auto cache = std::make_unique<SequenceCache>(config);
  const size_t depth = Depth(*config);
  if (depth > 0) cache->FillRandom(depth, seed);
  const Sequence filled(std::move(cache), std::vector<int32_t>(depth));
  const Logits found = Run(engine, filled.Clone(), tokens);
  Logits expected;
  {
    const ScalarKernels scalar;
    expected = Run(engine, filled.Clone(), tokens);
  }
  double worst = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double difference = Difference(found[i], expected[i]);
    worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
  }
  const double bound = VerifyTolerance(engine.compute());
  if (!(worst <= bound))
    Fail(ErrorCode::kRuntime,
         "{} with {} kernels disagrees with the scalar ones, so it is not timed: normalised squared difference of the "
         "logits {:.2g}, at most {:.2g} expected",
         config->spec_text(), IsaName(), worst, bound);
  return worst;
}

}  // namespace lesskv
