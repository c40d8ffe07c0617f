// lesskv eval: what a cache costs in quality, measured through the cache itself, with its bytes and speed beside it.
#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "base/atomic_file.h"
#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "eval/divergence.h"
#include "eval/perplexity.h"
#include "eval/report.h"
#include "eval/setup.h"

namespace lesskv {
namespace {

// What every evaluation takes.
struct CommonOptions {
  ModelOptions model;
  std::vector<std::string> specs;
  std::string output = "table";
  uint64_t seed = 0;
  size_t batch = 16;
};

struct ProtocolOptions {
  std::string mode = "stream";
  size_t step = 8;
  size_t prompt = 0;

  Protocol Parse() const { return {ParseMode(mode), step, prompt}; }
};

void AddCommonOptions(CLI::App& command, CommonOptions& o) {
  AddModelOptions(command, o.model);
  command.add_option("--kv", o.specs, "Cache spec, such as full or h2o(5%)+less; may be repeated (default: full)")
      ->option_text("SPEC")
      ->allow_extra_args(false);
  command.add_option("-o,--output", o.output, "table, md, csv or json")->option_text("FORMAT")->capture_default_str();
  command.add_option("--seed", o.seed, "Seed of generated tasks and sampling")->option_text("N")->capture_default_str();
  command
      .add_option("--batch", o.batch,
                  "Texts that go through the model together, at most; fewer when their caches "
                  "would take more than 1 GiB")
      ->option_text("N")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
}

// An evaluation about to run: the model, what stops it and shows progress, and the setup that points to them.
struct Session {
  explicit Session(const CommonOptions& options, const char* label) : bar(label) {
    format = ParseOutputFormat(options.output);
    std::vector<CacheSpec> specs;
    for (const std::string& text : options.specs) specs.push_back(CacheSpec::Parse(text));
    if (specs.empty()) specs.emplace_back();
    opened = OpenModel(options.model);
    setup.engine = opened.engine.get();
    setup.tokenizer = opened.tokenizer.get();
    setup.ctx = opened.ctx;
    setup.seed = options.seed;
    setup.batch = options.batch;
    for (const CacheSpec& spec : specs) setup.subjects.push_back({opened.engine->MakeCacheConfig(spec, opened.ctx)});
    setup.stop = &StopOnInterrupt();
    setup.progress = [this](double done) { bar.Show(done); };
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void Print(const Report& report) {
    bar.Clear();
    WriteResult(Format(report, format));
    FlushResults();
  }

  OutputFormat format;
  ProgressBar bar;
  OpenedModel opened;
  EvalSetup setup;
};

struct TextOptions {
  CommonOptions common;
  ProtocolOptions protocol;
  std::vector<std::string> texts;
  size_t max_windows = 0;
};

void AddTextOptions(CLI::App& command, TextOptions& o) {
  AddCommonOptions(command, o.common);
  command.add_option("--text", o.texts, "Text file; may be repeated")
      ->required()
      ->option_text("FILE")
      ->allow_extra_args(false);
  command.add_option("--max-windows", o.max_windows, "Windows of --ctx tokens, evenly spaced over the texts; 0: all")
      ->option_text("N")
      ->capture_default_str();
  command
      .add_option("--mode", o.protocol.mode,
                  "stream: text is fed --step tokens at a time, evicting in between; "
                  "continue: --prompt tokens at once, then one token a step")
      ->option_text("MODE")
      ->capture_default_str();
  command.add_option("--step", o.protocol.step, "Tokens a step of --mode stream")
      ->option_text("N")
      ->capture_default_str();
  command.add_option("--prompt", o.protocol.prompt, "Tokens that --mode continue reads before scoring")
      ->option_text("N");
}

void AddPerplexity(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("perplexity", "How well text is predicted, by token, word and byte");
  auto o = std::make_shared<TextOptions>();
  AddTextOptions(*command, *o);
  command->callback([o] {
    Session session(o->common, "perplexity");
    session.Print(EvaluatePerplexity(session.setup, {o->texts, o->max_windows, o->protocol.Parse()}));
  });
}

void AddDivergence(CLI::App& parent) {
  CLI::App* command = parent.add_subcommand("divergence", "How far predictions are from the full cache's");
  auto o = std::make_shared<TextOptions>();
  AddTextOptions(*command, *o);
  command->callback([o] {
    Session session(o->common, "divergence");
    session.Print(EvaluateDivergence(session.setup, {o->texts, o->max_windows, o->protocol.Parse()}));
  });
}

}  // namespace

void AddEvalCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Measure what a cache costs in quality, with its bytes and speed");
  command->require_subcommand(1);
  AddPerplexity(*command);
  AddDivergence(*command);
}

}  // namespace lesskv
