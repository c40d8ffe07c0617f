// lesskv bench: tokens a second of prompts and of generation, at any depth, with every cache.
#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "base/memory.h"
#include "eval/speed.h"

namespace lesskv {
namespace {

struct BenchOptions {
  std::vector<std::string> models, specs;
  std::vector<int> threads = {0};
  std::string compute = "auto", output = "md", memory;
  bool random_sidecar = false;
  ModelLoading loading = ModelLoading::kAuto;
  RandomMaps maps;
  SpeedOptions speed;
};

void AddBenchOptions(CLI::App& command, BenchOptions& o) {
  const CLI::Range counts(int64_t{0}, int64_t{1} << 30), numbers(int64_t{1}, int64_t{1} << 30);
  const auto list = [&](const char* names, auto& values, const char* help, const CLI::Range& range) {
    AddList(command, names, values, help, range)->allow_extra_args(false)->option_text("N,...");
  };
  command.add_option("-m,--model", o.models, "Model file (GGUF); may be repeated")
      ->required()->option_text("MODEL")->allow_extra_args(false);
  command.add_option("--kv", o.specs, "Cache spec, such as full or h2o(5%)+less; may be repeated (default: full)")
      ->option_text("SPEC")->allow_extra_args(false);
  list("-p,--prompt", o.speed.prompts, "Prompt tokens; 0 for no such test", counts);
  list("-n,--predict", o.speed.predicts, "Generated tokens; 0 for no such test", counts);
  list("-d,--depth", o.speed.depths, "Tokens in the cache before the test, put there without computing them",
       counts);
  list("--batch", o.speed.batches, "Sequences processed together; tokens/s are those of all",
       CLI::Range(int64_t{1}, int64_t{1} << 16));
  command.add_option("--memory", o.memory, "Instead of --batch: as many sequences as fit this much cache memory, such "
                                           "as 256MiB; measures generation only")->option_text("BYTES");
  command.add_option("-r,--repetitions", o.speed.repeat, "Times that each test is run, after one to warm up")
      ->check(CLI::Range(1, 1000))->option_text("N")->capture_default_str();
  command.add_option("-c,--ctx", o.speed.ctx, "Context length that percentages of a cache spec refer to (default: "
                                              "what the longest test needs)")->check(numbers)->option_text("N");
  list("-t,--threads", o.threads, "Threads; 0 for all CPUs", CLI::Range(0, 1024));
  command.add_option("--compute", o.compute, "Arithmetic of products: auto, f32, bf16, int8")->option_text("TYPE");
  AddModelLoading(command, o.loading);
  command.add_flag("--random-sidecar", o.random_sidecar, "Give less feature maps with random weights: for speed only");
  command.add_option("--rank", o.maps.rank, "Features of random maps")->check(CLI::Range(1, 64))->option_text("N")
      ->capture_default_str();
  command.add_option("--hidden", o.maps.hidden, "Hidden width of random maps")->check(CLI::Range(1, 8192))
      ->option_text("N")->capture_default_str();
  AddSeed(command, o.speed.seed, "Seed of rows and tokens");
  command.add_option("-o,--output", o.output, "md, csv, json or table")->option_text("FORMAT")->capture_default_str();
}

void CheckOptions(const CLI::App& command, BenchOptions& o) {
  const auto given = [&](const char* name) { return command.count(name) > 0; };
  if (!o.random_sidecar && (given("--rank") || given("--hidden")))
    Fail(ErrorCode::kInvalidArgument, "--rank and --hidden describe the maps of --random-sidecar, which is not given");
  if (o.random_sidecar) o.speed.random_maps = o.maps;
  for (const std::string& text : o.specs) o.speed.specs.push_back(CacheSpec::Parse(text));
  if (o.specs.empty()) o.speed.specs.emplace_back();
  if (o.memory.empty()) return;
  if (given("--batch")) Fail(ErrorCode::kInvalidArgument, "--memory chooses the number of sequences: not with --batch");
  if (given("--prompt"))
    Fail(ErrorCode::kInvalidArgument, "--memory measures generation: not with -p (-n and -d choose the test)");
  o.speed.memory_bytes = ParseBytes(o.memory, "--memory");
  o.speed.prompts = {0};
}

void RunBench(const CLI::App& command, BenchOptions& o) {
  const OutputFormat format = ParseOutputFormat(o.output);
  const ComputeChoice compute = ParseComputeChoice(o.compute);
  CheckOptions(command, o);
  std::vector<std::shared_ptr<const Model>> models;
  for (const std::string& path : o.models) models.push_back(Model::Load(path, o.loading));

  ProgressBar bar("bench");
  Report report{.columns = SpeedColumns(), .rows = {}, .notes = {}};
  const auto print = [&] {
    bar.Clear();
    if (!report.rows.empty()) WriteResult(Format(report, format));
    FlushResults();
  };
  o.speed.stop = &StopOnInterrupt();
  const double n_runs = static_cast<double>(models.size() * o.threads.size());
  double runs = 0;
  PlainRead plain_read;
  try {
    for (const auto& model : models) {
      for (const int threads : o.threads) {
        o.speed.progress = [&](double done) { bar.Show((runs + done) / n_runs); };
        Engine engine(model, {.threads = threads, .compute = compute});
        MeasureSpeed(engine, o.speed, plain_read, report);
        runs += 1;
      }
    }
  } catch (const Error&) {
    print();  // what was measured before
    throw;
  }
  print();
}

}  // namespace

void AddBenchCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure speed: prompts and generation, at any depth, with any cache");
  auto options = std::make_shared<BenchOptions>();
  AddBenchOptions(*command, *options);
  command->callback([command, options] { RunBench(*command, *options); });
}

}  // namespace lesskv
