// lesskv train mass: how much the LESS states of a sidecar should weigh. Maps are trained a layer at a time, on inputs of
// their own layer; behind one another the errors of many layers add up, and states of another weight predict text
// better. One number, added to the log-mass of every state, is chosen with the whole model on text.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>

#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "eval/perplexity.h"
#include "kvcache/residual/sidecar.h"
#include "train/train_less.h"

namespace lesskv {
namespace {

constexpr int kFarthest = 8;  // shifts tried, in either direction

struct MassCommand {
  ModelOptions model;
  std::string output;
  std::vector<std::string> texts, policies = {"h2o(2%)", "h2o(5%)", "h2o(10%)"};
  size_t max_windows = 4, step = 8;
  double grid = 0.5;
  bool json = false;
};

// Perplexities through the caches under test by the shift of the states' log-mass.
class MassSearch {
 public:
  MassSearch(const MassCommand& command, const OpenedModel& opened, Sidecar sidecar)
      : command_(command), opened_(opened), sidecar_(std::move(sidecar)), file_(command.output + ".part.less.gguf"), bar_("mass") {}
  ~MassSearch() {
    std::error_code ignored;
    std::filesystem::remove(file_, ignored);
  }
  MassSearch(const MassSearch&) = delete;
  MassSearch& operator=(const MassSearch&) = delete;

  // Steps of the grid from no shift on, downwards or else upwards, for as long as text is predicted better.
  int Best() {
    const int way = Loss(-1) < Loss(0) ? -1 : 1;
    int best = way < 0 ? -1 : 0;
    while (std::abs(best) < kFarthest && Loss(best + way) < Loss(best)) best += way;
    return best;
  }

  Sidecar Shifted(int steps) const {
    Sidecar shifted = sidecar_;
    const double shift = steps * command_.grid;
    ShiftLogMass(shifted, static_cast<float>(shift));
    shifted.training.history.push_back(fmt::format("train mass: {:+g} nats, chosen for {}", shift, fmt::join(command_.policies, ", ")));
    return shifted;
  }

  const std::map<int, std::vector<double>>& tried() const { return tried_; }

 private:
  // Mean over the caches of the nats a token.
  double Loss(int steps) {
    double nats = 0;
    for (const double perplexity : Perplexities(steps)) nats += std::log(perplexity);
    return nats / static_cast<double>(command_.policies.size());
  }

  const std::vector<double>& Perplexities(int steps) {
    const auto [at, is_new] = tried_.try_emplace(steps);
    if (!is_new) return at->second;
    WriteSidecar(file_, Shifted(steps));
    EvalSetup setup;
    setup.engine = opened_.engine.get();
    setup.tokenizer = opened_.tokenizer.get();
    setup.ctx = opened_.ctx;
    for (const std::string& policy : command_.policies)
      setup.subjects.push_back({setup.MakeConfig(CacheSpec::Parse(fmt::format("{}+less(file=\"{}\")", policy, file_)))});
    setup.stop = &StopOnInterrupt();
    setup.progress = [&](double done) { bar_.Show(done); };
    Protocol protocol;
    protocol.step = command_.step;
    for (const Json& row : EvaluatePerplexity(setup, {command_.texts, command_.max_windows, protocol}).rows)
      at->second.push_back(row.at("perplexity").get<double>());
    bar_.Clear();
    return at->second;
  }

  const MassCommand& command_;
  const OpenedModel& opened_;
  const Sidecar sidecar_;
  const std::string file_;
  ProgressBar bar_;
  std::map<int, std::vector<double>> tried_;
};

void Print(const MassCommand& c, const MassSearch& search, int best) {
  Json rows = Json::array();
  std::string head = "| shift |", line = "|---:|", table;
  for (const std::string& policy : c.policies) head += fmt::format(" `{}+less` |", policy), line += "---:|";
  for (const auto& [steps, perplexities] : search.tried()) {
    rows.push_back({{"shift", steps * c.grid}, {"perplexity", perplexities}});
    table += fmt::format("| {:+.2f}{} |", steps * c.grid, steps == best ? ", taken" : "");
    for (const double perplexity : perplexities) table += fmt::format(" {:.3f} |", perplexity);
    table += "\n";
  }
  if (c.json)
    WriteResult(Dump({{"version", Version()}, {"shift", best * c.grid}, {"kv", c.policies}, {"tried", rows}}) + "\n");
  else
    WriteResult(head + "\n" + line + "\n" + table);
  FlushResults();
}

void TrainMass(MassCommand& c) {
  CheckOutputPath("-o", c.output);
  const OpenedModel opened = OpenModel(c.model);
  Sidecar sidecar = ReadSidecar(c.output);
  CheckModel(sidecar, c.output, opened.model->fingerprint(), opened.model->identity());
  if (!sidecar.has_maps())
    Fail(ErrorCode::kNotFound, "{}: holds no feature maps (train them with 'lesskv train less')", c.output);
  for (const std::string& policy : c.policies) {
    CacheSpec::Parse(policy + "+less");  // what less cannot stand beside
    train::RequireLoss(*opened.engine->MakeCacheConfig(CacheSpec::Parse(policy), opened.ctx), c.step, "train mass");
  }
  MassSearch search(c, opened, std::move(sidecar));
  const int best = search.Best();
  if (best != 0) WriteSidecar(c.output, search.Shifted(best));
  Print(c, search, best);
}

}  // namespace

void AddTrainMass(CLI::App& train) {
  auto c = std::make_shared<MassCommand>();
  CLI::App* mass = train.add_subcommand("mass", "Weigh the LESS states of a sidecar with the whole model, on text");
  mass->add_option("-m,--model", c->model.model, "Model file (GGUF)")->option_text("MODEL")->required();
  mass->add_option("-c,--ctx", c->model.ctx, "Tokens of a window (default: the trained context)");
  mass->add_option("-t,--threads", c->model.threads, "Threads (default: all CPUs)");
  mass->add_option("--compute", c->model.compute, "Arithmetic of the model: auto, f32, bf16, int8");
  mass->add_option("-o,--output", c->output, "Sidecar whose maps are weighed, and written again")->option_text("SIDECAR")->required();
  mass->add_option("--text", c->texts, "Text files, none of which trained the maps")->option_text("FILE...")->required();
  mass->add_option("--kv", c->policies, "Selectors and budgets to weigh them for")->option_text("SPEC...")
      ->capture_default_str();
  mass->add_option("--max-windows", c->max_windows, "Windows, evenly spaced over the texts")->capture_default_str()->check(CLI::Range(1, 100000));
  mass->add_option("--step", c->step, "Tokens a step while text streams in")->capture_default_str()->check(CLI::Range(1, 1 << 20));
  mass->add_option("--grid", c->grid, "Distance of the shifts that are tried, nats")->capture_default_str()->check(CLI::Range(0.01, 4.0));
  mass->add_flag("--json", c->json, "Print one JSON object");
  mass->callback([c] { TrainMass(*c); });
}

}  // namespace lesskv
