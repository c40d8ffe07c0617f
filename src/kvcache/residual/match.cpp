// Attention Matching (Zweiger et al., 2026, arXiv 2602.16284): what a selector keeps of a prompt answers for what left. A
// KV head's kept rows get a weight each, added to their scores as a logarithm, and new values, fitted on queries of the
// prompt itself so that softmax mass and output over the kept rows are those over all rows.
//
//   w = argmin |A w - 1|^2 + mu |w - 1|^2   A_qj = exp(s_qj - lse_q), lse over the whole block, e^-3 <= w <= e^7
//   C = argmin |X C - Y|^2 + lambda |C - V|^2   X_qj = softmax over kept rows of s_qj + log w_j, Y the block's outputs
//
// Choices: the queries are every n-th of the step's, of all query heads of the group, rotated anew behind all keys, so
// that each sees every row; both ridges draw to what a row was before the fit. The authors' plain least squares lets
// values explode where no query reads a row. A head whose fit is not finite, or worse than none, keeps its rows as they
// are. While text comes in small steps a fit needs rows that leave together and queries of more than one token: every=N
// lets N rows leave at a time and answers the queries of the last N tokens.
#include <algorithm>
#include <cmath>

#include "base/threads.h"
#include "kernels/attention/attention.h"
#include "kernels/basic/basic.h"
#include "kvcache/registry.h"
#include "kvcache/residual/attention_fit.h"
#include "kvcache/residual/residual.h"

namespace lesskv {
namespace {

constexpr size_t kLeastLeaving = 16;  // rows; fewer of a chunk are not worth a fit

// Rows of a block as the attention kernels read them.
struct BlockReader final : RowReader {
  const float* rows;
  size_t dim;

  BlockReader(const float* x, size_t d) : rows(x), dim(d) {}
  void ExpandKeys(size_t first, size_t n, float* out, size_t stride) const override {
    for (size_t i = 0; i < n; ++i)
      for (size_t c = 0; c < dim; ++c) out[c * stride + i] = rows[(first + i) * dim + c];
  }
  void ExpandValues(size_t first, size_t n, float* out, size_t stride) const override {
    for (size_t i = 0; i < n; ++i) std::copy_n(&rows[(first + i) * dim], dim, out + i * stride);
  }
};

// What the whole block answers to each query.
struct Target {
  explicit Target(const FitBlock& block)
      : keys(block.keys, block.head_dim),
        values(block.values, block.head_dim),
        spans{RowSpan{{RowType::kF32, RowSide::kKeys, block.head_dim}, nullptr, 0, block.n_rows, &keys},
              RowSpan{{RowType::kF32, RowSide::kValues, block.head_dim}, nullptr, 0, block.n_rows, &values}},
        bias(block.weights, block.weights + block.n_rows),
        outputs(block.n_queries * block.head_dim),
        lse(block.n_queries) {
    for (float& w : bias) w = std::log(w);
  }
  Target(const Target&) = delete;

  AttentionJob Job(const FitBlock& block) {
    AttentionJob job;
    job.keys = {&spans[0], 1};
    job.values = {&spans[1], 1};
    job.n_past = block.n_rows;
    job.n_queries = block.n_queries;
    job.q = block.queries;
    job.q_stride = job.out_stride = block.head_dim;
    job.scale = block.scale;
    job.bias = bias.data();
    job.out = outputs.data();
    job.lse = lse.data();
    return job;
  }

  BlockReader keys, values;
  RowSpan spans[2];
  std::vector<float> bias, outputs, lse;
};

class MatchResidual final : public Residual {
 public:
  struct Options {
    size_t queries;
    double value_ridge, mass_ridge;
    bool weighs, replaces;
    size_t every;
  };
  explicit MatchResidual(const Options& options) : options_(options) {}

  Weights weights() const override { return Weights::kInLogits; }
  FitRule Fits(StepKind kind) const override {
    if (kind == StepKind::kDecode && options_.every == 0) return {};
    return {options_.queries, kind == StepKind::kPrompt ? 1 : kLeastLeaving};
  }
  Bunches LeaveInBunches() const override {
    const size_t rows = std::max<size_t>(options_.every, 1);
    return {rows, std::min(options_.queries, rows)};
  }

  void Fit(std::span<FitBlock> blocks) const override {
    std::vector<std::unique_ptr<Target>> targets;
    std::vector<AttentionJob> jobs;
    for (const FitBlock& block : blocks) {
      targets.push_back(std::make_unique<Target>(block));
      jobs.push_back(targets.back()->Job(block));
    }
    lesskv::Attend(jobs);
    ParallelFor(blocks.size(), [&](size_t i) { FitHead(blocks[i], *targets[i]); });
  }

 private:
  // Attention of the kept rows with these weights: the rows of `mass` weighed and divided by their sums.
  static std::vector<double> Attention(const std::vector<double>& mass, const std::vector<double>& w) {
    std::vector<double> x = mass;
    for (size_t q = 0; q < x.size(); q += w.size()) {
      double sum = 0;
      for (size_t j = 0; j < w.size(); ++j) sum += x[q + j] *= w[j];
      for (size_t j = 0; j < w.size() && sum > 0; ++j) x[q + j] /= sum;
    }
    return x;
  }

  static double MassError(const std::vector<double>& mass, const std::vector<double>& w) {
    double error = 0;
    for (size_t q = 0; q < mass.size(); q += w.size()) {
      double rest = -1;
      for (size_t j = 0; j < w.size(); ++j) rest += mass[q + j] * w[j];
      error += rest * rest;
    }
    return error;
  }

  void FitHead(FitBlock& block, const Target& target) const {
    const size_t n = block.n_kept, d = block.head_dim;
    std::vector<double> mass(block.n_queries * n);  // A
    for (size_t q = 0; q < block.n_queries; ++q)
      for (size_t j = 0; j < n; ++j)
        mass[q * n + j] = std::exp(double(block.scale) * Dot(block.queries + q * d, block.keys + j * d, d) - target.lse[q]);
    const std::vector<double> before(block.weights, block.weights + n), values(block.values, block.values + n * d),
        outputs(target.outputs.begin(), target.outputs.end());
    const std::vector<double> ones(block.n_queries, 1.0);
    const MassFit bounds{options_.mass_ridge, std::exp(-3.0), std::exp(7.0), before};
    const std::vector<double> w = options_.weighs ? FitMass(mass, ones, n, bounds) : before;
    const std::vector<double> x = Attention(mass, w);
    const std::vector<double> c = options_.replaces ? FitValues(x, outputs, values, n, d, options_.value_ridge) : values;
    const double plain = OutputError(Attention(mass, before), values, outputs, n, d);
    const bool better = OutputError(x, c, outputs, n, d) <= plain && MassError(mass, w) <= MassError(mass, before);
    if (!better) return;  // also where something is not a number
    std::copy(w.begin(), w.end(), block.kept_weights.begin());
    std::copy(c.begin(), c.end(), block.kept_values.begin());
    block.fitted = std::all_of(block.kept_weights.begin(), block.kept_weights.end(), [](float f) { return std::isfinite(f); }) &&
                   std::all_of(block.kept_values.begin(), block.kept_values.end(), [](float f) { return std::isfinite(f); });
  }

  Options options_;
};

constexpr Parameter kParameters[] = {
    {.name = "queries", .kind = Parameter::Kind::kCount, .default_value = "256",
     .help = "positions of a prompt (or chunk), evenly spread, whose queries the fit answers", .min = 1, .max = 1 << 16},
    {.name = "every", .kind = Parameter::Kind::kCount, .default_value = "0",
     .help = "rows that leave a head at a time, so that what stays is fitted while text streams in or is generated, on "
             "the queries of as many last tokens (at least 16; 0: only at the end of a prompt, or of a chunk that 16 "
             "rows leave)",
     .max = 1 << 16},
    {.name = "weights", .kind = Parameter::Kind::kWord, .default_value = "on", .help = "kept rows get weights", .choices = "on|off"},
    {.name = "values", .kind = Parameter::Kind::kWord, .default_value = "on", .help = "kept rows get new values", .choices = "on|off"},
    {.name = "lambda", .kind = Parameter::Kind::kReal, .default_value = "0.3", .help = "how strongly values stay what they were",
     .min = 1e-6, .max = 1e6},
    {.name = "mu", .kind = Parameter::Kind::kReal, .default_value = "0.03", .help = "how strongly weights stay near 1", .max = 1e6},
};

void Validate(const Arguments& arguments) {
  const size_t every = arguments.Count("every");
  if (every > 0 && every < kLeastLeaving)
    Fail(ErrorCode::kInvalidArgument, "cache spec: match(every={}): fewer than {} rows are not worth a fit", every,
         kLeastLeaving);
}

}  // namespace

extern const Method kMatchMethod{
    .name = "match",
    .stage = Stage::kResidual,
    .summary = "rows that stay get weights and values with which they answer the prompt's own queries as all rows did",
    .reference = "arXiv 2602.16284",
    .parameters = kParameters,
    .traits =
        [](const Arguments& arguments) {
          return MethodTraits{.needs_true_positions = true,
                              .needs_eviction = true,
                              .needs_full_keys = true,
                              .needs_rewrites = true,
                              .needs_known_rows = arguments.Count("every") > 0,
                              .fits_rows = true};
        },
    .validate = Validate,
    .make_residual = [](const Arguments& arguments, const MethodContext&) -> MadeResidual {
      return {std::make_unique<MatchResidual>(MatchResidual::Options{
                  arguments.Count("queries"), arguments.Real("lambda"), arguments.Real("mu"),
                  arguments.Text("weights") == "on", arguments.Text("values") == "on", arguments.Count("every")}),
              ""};
    },
};

}  // namespace lesskv
