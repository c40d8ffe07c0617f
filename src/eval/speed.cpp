#include "eval/speed.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "base/threads.h"
#include "base/memory.h"
#include "eval/metrics.h"
#include "eval/random_sidecar.h"
#include "eval/speed_verify.h"
#include "eval/stopwatch.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

constexpr size_t kWarmUpPrompt = 512;
constexpr size_t kWarmUpTokens = 2;
constexpr size_t kLeastContext = 64;  // room to verify in, also when the tests are shorter

// One row of the report: a prompt (predict is 0) or generated tokens (prompt is 0).
struct Test {
  size_t prompt = 0;
  size_t predict = 0;
  size_t depth = 0;
  size_t batch = 1;

  size_t tokens() const { return prompt + predict; }
  std::string Name() const {
    std::string name = prompt > 0 ? fmt::format("pp{}", prompt) : fmt::format("tg{}", predict);
    return depth > 0 ? fmt::format("{} @ d{}", name, depth) : name;
  }
};

struct Samples {
  std::vector<double> seconds;
  std::vector<double> read_rate;       // bytes a second of a plain read, measured in between
  double kv_bytes_mean = 0;            // of all sequences, over the timed steps
  CacheStats stats;                    // of one sequence at the end
};

double StandardDeviation(const std::vector<double>& x) {
  if (x.size() < 2) return 0;
  const double mean = std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
  double sum = 0;
  for (const double v : x) sum += (v - mean) * (v - mean);
  return std::sqrt(sum / static_cast<double>(x.size() - 1));
}

class Bench {
 public:
  Bench(Engine& engine, const SpeedOptions& options, PlainRead& plain_read, Report& report)
      : engine_(engine), options_(options), plain_read_(plain_read), report_(report) {}

  void Run() {
    if (options_.random_maps)
      sidecar_.emplace(engine_.model(), options_.random_maps->rank, options_.random_maps->hidden, options_.seed);
    for (const size_t depth : options_.depths) {
      for (const size_t n : options_.prompts) AddTests({.prompt = n, .depth = depth});
      for (const size_t n : options_.predicts) AddTests({.predict = n, .depth = depth});
    }
    if (tests_.empty()) Fail(ErrorCode::kInvalidArgument, "nothing to measure: both -p and -n are 0");
    for (const CacheSpec& spec : options_.specs) MakeConfig(spec);  // refuses what cannot be before it takes time
    for (const CacheSpec& spec : options_.specs) Verify(spec);
    for (size_t i = 0; i < options_.specs.size(); ++i) {
      difference_ = verified_[i];
      for (const Test& test : tests_) Measure(options_.specs[i], test);
    }
  }

 private:
  void AddTests(const Test& test) {
    if (test.tokens() == 0) return;
    if (options_.ctx > 0 && test.depth + test.tokens() > options_.ctx)
      Fail(ErrorCode::kInvalidArgument, "{} needs a context of {} tokens, --ctx is {}", test.Name(),
           test.depth + test.tokens(), options_.ctx);
    for (const size_t batch : options_.batches) {
      tests_.push_back(test);
      tests_.back().batch = batch;
    }
  }

  static bool ReadsSidecar(const CacheSpec& spec) {
    const auto& terms = spec.terms();
    return std::any_of(terms.begin(), terms.end(), [](const SpecTerm& term) { return TraitsOf(term).reads_sidecar; });
  }

  bool UsesRandomMaps(const CacheSpec& spec) const {
    return ReadsSidecar(spec) && sidecar_.has_value();
  }

  std::shared_ptr<const CacheConfig> MakeConfig(const CacheSpec& spec) const {
    const Model& model = engine_.model();
    size_t ctx = options_.ctx > 0 ? options_.ctx : kLeastContext;
    for (const Test& test : tests_) ctx = std::max(ctx, test.depth + test.tokens());
    return CacheConfig::Create(spec, model.MakeCacheShape(ctx, engine_.compute()), {},
                               UsesRandomMaps(spec) ? sidecar_->source() : model.Sidecar());
  }

  void Verify(const CacheSpec& spec) {
    CheckStop();
    verified_.push_back(VerifyAgainstScalar(engine_, MakeConfig(spec), options_.seed));
    Progress(0.1 * static_cast<double>(verified_.size()) / static_cast<double>(options_.specs.size()));
  }

  void Measure(const CacheSpec& spec, Test test) {
    const auto config = MakeConfig(spec);
    const CachePlan plan = config->Plan(test.depth + test.prompt, test.predict);
    if (options_.memory_bytes > 0) {
      test.batch = options_.memory_bytes / plan.bytes_end;
      if (test.batch == 0) {
        report_.notes.push_back(fmt::format("{}, {}: one sequence takes {}, more than the {} of --memory",
                                            config->spec_text(), test.Name(), HumanBytes(plan.bytes_end),
                                            HumanBytes(options_.memory_bytes)));
        report_.rows.push_back(Row(spec, *config, test, plan, {}));
        return Advance(options_.repeat + 1);
      }
    }
    RequireMemory(test.batch * plan.bytes_end, fmt::format("the cache of {} sequences of {} at {} tokens", test.batch,
                                                          config->spec_text(), test.depth + test.tokens()));
    if (test.depth > 0 && config->global().selector->SaysHowMany())
      report_.notes.push_back(fmt::format("{}, {}: how many rows stay depends on the text; the cache is filled with the most",
                                          config->spec_text(), test.Name()));
    Samples samples;
    for (size_t i = 0; i <= options_.repeat; ++i) {
      RunOnce(config, test, i == 0, samples);
      Advance(1);
    }
    report_.rows.push_back(Row(spec, *config, test, plan, samples));
  }

  // New sequences at the test's depth: one is filled, the others are copies of it, in memory of their own as those of
  // different texts have it.
  std::vector<Sequence> MakeSequences(const std::shared_ptr<const CacheConfig>& config, const Test& test) const {
    auto cache = std::make_unique<SequenceCache>(config);
    if (test.depth > 0) cache->FillRandom(test.depth, options_.seed);
    std::vector<Sequence> sequences;
    sequences.emplace_back(std::move(cache), std::vector<int32_t>(test.depth));
    while (sequences.size() < test.batch) {
      CheckStop();
      sequences.emplace_back(sequences[0].cache().CloneApart(), sequences[0].tokens());
    }
    return sequences;
  }

  // The first run of a test, shorter, warms up and is not kept.
  void RunOnce(const std::shared_ptr<const CacheConfig>& config, const Test& test, bool warm_up, Samples& samples) {
    CheckStop();
    std::vector<Sequence> sequences = MakeSequences(config, test);
    Rng rng(options_.seed + 7);
    const double read_before = plain_read_.Measure();
    double kv_bytes = 0;
    const size_t n_prompt = warm_up ? std::min(test.prompt, kWarmUpPrompt) : test.prompt;
    const size_t n_predict = warm_up ? std::min(test.predict, kWarmUpTokens) : test.predict;
    const double seconds = n_prompt > 0 ? Prefill(sequences, n_prompt, rng) : Decode(sequences, n_predict, rng, kv_bytes);
    if (warm_up) return;
    samples.seconds.push_back(seconds);
    samples.read_rate.push_back(read_before);
    samples.read_rate.push_back(plain_read_.Measure());
    samples.kv_bytes_mean = kv_bytes;
    samples.stats = sequences[0].Stats();
  }

  double Prefill(std::vector<Sequence>& sequences, size_t n, Rng& rng) {
    std::vector<std::vector<int32_t>> tokens(sequences.size(), std::vector<int32_t>(n));
    std::vector<StepItem> items;
    for (size_t i = 0; i < sequences.size(); ++i) {
      for (int32_t& token : tokens[i]) token = RandomToken(rng);
      items.push_back({&sequences[i], tokens[i], LogitsRows::kLast});
    }
    const Stopwatch watch;
    if (!engine_.Prefill(items, Ignore(), {.stop = options_.stop})) CheckStop();
    return watch.Seconds();
  }

  double Decode(std::vector<Sequence>& sequences, size_t n, Rng& rng, double& kv_bytes_mean) {
    std::vector<int32_t> tokens(sequences.size());
    std::vector<StepItem> items;
    for (size_t i = 0; i < sequences.size(); ++i) items.push_back({&sequences[i], {&tokens[i], 1}, LogitsRows::kLast});
    double seconds = 0, kv_bytes = 0;
    for (size_t step = 0; step < n; ++step) {
      CheckStop();
      for (int32_t& token : tokens) token = RandomToken(rng);
      const Stopwatch watch;
      engine_.Decode(items, Ignore());
      seconds += watch.Seconds();
      kv_bytes += static_cast<double>(sequences[0].Stats().kv_bytes * sequences.size());
    }
    kv_bytes_mean = kv_bytes / static_cast<double>(n);
    return seconds;
  }

  int32_t RandomToken(Rng& rng) const {
    return static_cast<int32_t>(rng.Below(engine_.model().config().n_vocab));
  }
  static LogitsSink Ignore() {
    return [](std::span<const LogitsRow>) {};
  }

  // Weights that every step reads: all matrices, except an embedding that is not also the output.
  size_t WeightBytesRead() const {
    const Model& model = engine_.model();
    const WeightView& table = model.token_embedding();
    const bool tied = table.data == model.output().data;
    return model.weight_bytes() - (tied ? 0 : table.n_out * RowBytes(table.type, table.n_in));
  }

  Json Row(const CacheSpec& spec, const CacheConfig& config, const Test& test, const CachePlan& plan,
           const Samples& samples) const {
    const Model& model = engine_.model();
    Json row;
    row["command"] = "bench";
    AddRunInfo(row, engine_, config, options_.seed);
    row["model_name"] = std::filesystem::path(model.path()).stem().string();
    row["model_bytes"] = model.weight_bytes();
    row["parameters"] = model.parameter_count();
    row["feature_maps"] = FeatureMapsText(spec);
    row["test"] = test.Name();
    row["n_prompt"] = test.prompt;
    row["n_predict"] = test.predict;
    row["depth"] = test.depth;
    row["batch"] = test.batch;
    row["difference_from_scalar"] = difference_;
    row["memory_limit"] = options_.memory_bytes > 0 ? Json(options_.memory_bytes) : Json();
    AddSpeed(row, config, test, samples);
    AddBytes(row, config, test, plan, samples);
    return row;
  }

  Json FeatureMapsText(const CacheSpec& spec) const {
    if (!ReadsSidecar(spec)) return {};
    if (!UsesRandomMaps(spec)) return "trained";
    return fmt::format("random, rank {}, hidden {}", options_.random_maps->rank, options_.random_maps->hidden);
  }

  void AddSpeed(Json& row, const CacheConfig& config, const Test& test, const Samples& samples) const {
    std::vector<double> rates;
    for (const double seconds : samples.seconds)
      rates.push_back(static_cast<double>(test.batch * test.tokens()) / seconds);
    const double median = Percentile(rates, 50);
    row["tokens_per_second"] = median;
    row["tokens_per_second_deviation"] = rates.empty() ? kNotANumber : StandardDeviation(rates);
    row["samples_tokens_per_second"] = rates;
    row["samples_seconds"] = samples.seconds;
    const double plain_read = Percentile(samples.read_rate, 50);
    const double batch = static_cast<double>(test.batch);
    const size_t shared = WeightBytesRead() + config.sidecar_bytes();
    const double per_token = test.predict > 0 && test.batch > 0
                                 ? (static_cast<double>(shared) + samples.kv_bytes_mean) / batch : kNotANumber;
    row["bytes_read_per_token"] = std::isnan(per_token) ? Json() : Json(static_cast<size_t>(per_token));
    row["gb_per_second"] = per_token * median * 1e-9;
    row["plain_read_gb_per_second"] = plain_read * 1e-9;
    row["share_of_plain_read"] = per_token * median / plain_read;
  }

  // Bytes of all sequences; tokens seen and resident of one. A prompt that was not computed has its peak from the plan.
  void AddBytes(Json& row, const CacheConfig& config, const Test& test, const CachePlan& plan,
                const Samples& samples) const {
    CacheStats stats = samples.stats;
    if (test.depth > 0) stats.kv_bytes_peak = std::max(stats.kv_bytes_peak, plan.bytes_peak);
    for (size_t* bytes : {&stats.kv_bytes, &stats.kv_bytes_peak, &stats.kv_bytes_full}) *bytes *= test.batch;
    AddCacheStats(row, stats, config);
  }

  void CheckStop() const {
    if (options_.stop != nullptr && *options_.stop)
      Fail(ErrorCode::kRuntime, "interrupted before the benchmark was done");
  }
  void Progress(double done) const {
    if (options_.progress) options_.progress(done);
  }
  void Advance(size_t runs) {
    runs_done_ += runs;
    const size_t total = options_.specs.size() * tests_.size() * (options_.repeat + 1);
    Progress(0.1 + 0.9 * static_cast<double>(runs_done_) / static_cast<double>(total));
  }

  Engine& engine_;
  const SpeedOptions& options_;
  PlainRead& plain_read_;
  Report& report_;
  std::optional<RandomSidecar> sidecar_;
  std::vector<Test> tests_;
  std::vector<double> verified_;  // a spec: difference from the scalar kernels
  double difference_ = 0;         // of the spec being measured
  size_t runs_done_ = 0;
};

}  // namespace

void MeasureSpeed(Engine& engine, const SpeedOptions& options, PlainRead& plain_read, Report& report) {
  const ThreadScope scope(engine.threads());
  Bench(engine, options, plain_read, report).Run();
}

std::vector<Column> SpeedColumns() {
  using Style = Column::Style;
  return {{"model_name", "model"},
          {"model_bytes", "size", Style::kBytes},
          {"parameters", "params", Style::kCount},
          {"threads", "threads", Style::kCount},
          {"isa", "isa"},
          {"compute", "compute"},
          {"kv_spec", "cache"},
          {"batch", "batch", Style::kCount},
          {"test", "test"},
          {"tokens_per_second", "tokens/s", Style::kFixed, 2, "tokens_per_second_deviation"},
          {"kv_bytes", "kv bytes", Style::kBytes},
          {"kv_bytes_peak", "kv peak", Style::kBytes},
          {"bytes_read_per_token", "read/token", Style::kBytes},
          {"gb_per_second", "GB/s", Style::kFixed, 1},
          {"share_of_plain_read", "% of read", Style::kPercent, 0}};
}

}  // namespace lesskv
