// lesskv train: LESS feature maps (or parts of them merged), budgets, scores, dictionaries and matrices for a model, into
// its sidecar.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/memory.h"
#include "commands.h"
#include "common.h"
#include "engine/run_info.h"
#include "train/train_balance.h"
#include "train/train_budgets.h"
#include "train/train_csr.h"
#include "train/train_kvzap.h"
#include "train/train_less.h"

namespace lesskv {
namespace {

struct TrainCommand {
  ModelOptions model;
  std::string output, layers, features = "exp", type = "bf16", schedule = "cosine";
  std::vector<std::string> merge;
  std::string disk;
  bool keep = false, json = false;
  train::TrainLessOptions options;
};

// "2-5": layers 2 to 5, both included; "3": one layer.
void ParseLayers(const std::string& text, train::TrainLessOptions& options) {
  if (text.empty()) return;
  const size_t dash = text.find('-');
  const std::string begin = text.substr(0, dash), end = dash == std::string::npos ? begin : text.substr(dash + 1);
  const auto is_layer = [](const std::string& number) {
    return !number.empty() && number.size() < 10 && number.find_first_not_of("0123456789") == std::string::npos;
  };
  const bool are_layers = is_layer(begin) && is_layer(end);
  const size_t first = are_layers ? std::stoul(begin) : 0, last = are_layers ? std::stoul(end) : 0;
  if (!are_layers || last < first)
    Fail(ErrorCode::kInvalidArgument, "--layers: expected a layer from 0 or a range such as 2-5, found {}", text);
  options.first_layer = first;
  options.end_layer = last + 1;
}

template <typename T>
T Choose(const std::string& option, const std::string& value, std::initializer_list<std::pair<const char*, T>> choices) {
  std::string names;
  for (const auto& [name, result] : choices) {
    if (value == name) return result;
    names += (names.empty() ? "" : " or ") + std::string(name);
  }
  Fail(ErrorCode::kInvalidArgument, "{}: expected {}, found {}", option, names, value);
}

// On a terminal one line that changes, elsewhere a line a minute.
void ShowProgress(StatusLine& status, std::chrono::steady_clock::time_point& last_line, const train::TrainProgress& p) {
  const auto now = std::chrono::steady_clock::now();
  if (!status.enabled() && now - last_line < std::chrono::minutes(1)) return;
  const int minutes = static_cast<int>(p.seconds_left / 60), seconds = static_cast<int>(p.seconds_left) % 60;
  std::string line = fmt::format("{} {:3.0f} %  {}:{:02} left", p.phase, 100 * p.done, minutes, seconds);
  if (p.phase == "train")
    line += fmt::format("  layer {} epoch {}  loss {:.3e}  validation {:.3e}  selector {:.3e}  Baseline+ {:.3e}", p.layer,
                        p.epoch, p.loss, p.validation, p.baseline, p.baseline_plus);
  if (status.enabled()) {
    status.Set(line);
  } else {
    Say("{}\n", line);
    last_line = now;
  }
}

void TellPlan(const train::TrainLessPlan& plan, const std::string& folder) {
  Say("captures    {} of disk in {} at once, for {} of {} layers; the time they take is known after the first text\n",
      HumanBytes(plan.bytes_at_once()), folder, plan.layers_at_once, plan.n_layers);
}

void PrintReport(const TrainCommand& c, const train::TrainLessReport& r) {
  if (c.json) {
    std::string rows;
    for (size_t i = 0; i < r.validation.size(); ++i)
      rows += fmt::format("{}{{\"layer\": {}, \"validation\": {:.6e}, \"selector\": {:.6e}, \"baseline_plus\": {:.6e}}}",
                          i ? ", " : "", c.options.first_layer + i, r.validation[i], r.baseline[i], r.baseline_plus[i]);
    WriteResult(fmt::format("{{\"model\": \"{:016x}\", \"version\": \"{}\", \"seed\": {}, \"capture_bytes\": {}, "
                            "\"capture_seconds\": {:.1f}, \"train_seconds\": {:.1f}, \"layers\": [{}]}}\n",
                            r.sidecar.model_fingerprint, Version(), c.options.seed, r.capture_bytes, r.capture_seconds,
                            r.train_seconds, rows));
    return;
  }
  WriteResult("| layer | selector | Baseline+ | LESS | of the selector's error |\n|---|---|---|---|---|\n");
  for (size_t i = 0; i < r.validation.size(); ++i)
    WriteResult(fmt::format("| {} | {:.3e} | {:.3e} | {:.3e} | {:.1f} % |\n", c.options.first_layer + i, r.baseline[i],
                            r.baseline_plus[i], r.validation[i], 100 * r.validation[i] / r.baseline[i]));
  WriteResult(fmt::format("captures: {:.1f} MiB on disk, {:.0f} s; training: {:.0f} s\n",
                          static_cast<double>(r.capture_bytes) / (1 << 20), r.capture_seconds, r.train_seconds));
}

// The one that is there already, or a new one for the model. Commands look twice: before the work, to refuse another model's,
// and after it, as others may have trained parts meanwhile.
Sidecar SidecarToAddTo(const std::string& path, const Model& model) {
  if (std::optional<Sidecar> existing = ExistingSidecar(path, model.fingerprint(), model.identity())) return std::move(*existing);
  Sidecar sidecar;
  sidecar.model_fingerprint = model.fingerprint();
  sidecar.model_identity = model.identity();
  sidecar.model_name = model.config().name;
  return sidecar;
}

void Train(TrainCommand& c) {
  if (c.output.empty()) Fail(ErrorCode::kInvalidArgument, "train less: name the sidecar to write with -o");
  CheckOutputPath("-o", c.output);
  if (!c.merge.empty()) {
    Sidecar merged = MergeSidecars(c.merge);
    if (const auto existing = ExistingSidecar(c.output, merged.model_fingerprint, merged.model_identity))
      AddOtherParts(*existing, merged);
    WriteSidecar(c.output, merged);
    return;
  }
  if (c.model.model.empty()) Fail(ErrorCode::kInvalidArgument, "train less: name the model with -m");
  train::TrainLessOptions& o = c.options;
  o.kind = ParseFeatureKind(c.features);
  o.matrix_type = Choose<DType>("--type", c.type, {{"bf16", DType::kBF16}, {"f32", DType::kF32}});
  o.halve = Choose<bool>("--schedule", c.schedule, {{"cosine", false}, {"halve", true}});
  ParseLayers(c.layers, o);
  OpenedModel opened = OpenModel(c.model);
  SidecarToAddTo(c.output, *opened.model);
  o.ctx = opened.ctx;
  const bool temporary = o.work_folder.empty();
  if (temporary) o.work_folder = c.output + ".work";
  o.disk_bytes = c.disk.empty() ? 0 : ParseBytes(c.disk, "--disk");
  StatusLine status;
  auto last_line = std::chrono::steady_clock::now();
  train::TrainLessReport report =
      train::TrainLess(*opened.engine, *opened.tokenizer, o,
                       [&](const train::TrainProgress& p) {
                         if (p.phase == "plan") return TellPlan(p.plan, o.work_folder);
                         ShowProgress(status, last_line, p);
                       }, &StopOnInterrupt());
  status.Clear();
  AddOtherParts(SidecarToAddTo(c.output, *opened.model), report.sidecar);
  WriteSidecar(c.output, report.sidecar);
  PrintReport(c, report);
  if (temporary && !c.keep) std::filesystem::remove_all(o.work_folder);
}

void AddLess(CLI::App& train) {
  auto c = std::make_shared<TrainCommand>();
  c->options.policies = {"h2o(2%)", "h2o(5%)", "h2o(10%)", "window(2%)", "window(5%)", "tova(2%)", "tova(5%)"};
  CLI::App* less = train.add_subcommand("less", "Train the feature maps of the LESS state for a model");
  less->add_option("-m,--model", c->model.model, "Model file (GGUF)")->option_text("MODEL");
  less->add_option("-c,--ctx", c->model.ctx, "Tokens of a training text (default: the trained context)");
  less->add_option("-t,--threads", c->model.threads, "Threads (default: all CPUs)");
  less->add_option("--compute", c->model.compute, "Arithmetic of the captured model: auto, f32, bf16, int8");
  less->add_option("-o,--output", c->output, "Sidecar to write, NAME.less.gguf for NAME.gguf")->option_text("SIDECAR");
  train::TrainLessOptions& o = c->options;
  less->add_option("--text", o.texts, "Text files to draw training texts from")->option_text("FILE...");
  less->add_option("--kv", o.policies, "Selectors and budgets to train for, shared out over the texts")
      ->option_text("SPEC...")->capture_default_str();
  less->add_option("--step", o.steps, "Tokens a step while text streams in, in turn")->capture_default_str();
  less->add_option("--views", o.views, "Selectors each text is captured under")->capture_default_str();
  less->add_option("--sequences", o.sequences, "Training texts, validation included")->capture_default_str();
  less->add_option("--validation", o.validation, "Share of the texts that validates")->capture_default_str();
  less->add_option("--rank", o.rank, "Features R of the state")->capture_default_str();
  less->add_option("--hidden", o.hidden, "Hidden width R' of the maps")->capture_default_str();
  less->add_option("--features", c->features, "exp, or gelu (the paper's)")->capture_default_str();
  less->add_option("--type", c->type, "Stored matrices: bf16 or f32")->capture_default_str();
  less->add_option("--epochs", o.epochs, "Times that all training texts are gone through")->capture_default_str();
  less->add_option("--batch", o.batch, "Texts an Adam step")->capture_default_str();
  less->add_option("--lr", o.rate, "Learning rate")->capture_default_str();
  less->add_option("--schedule", c->schedule, "cosine, or halve (the paper's: every 10 epochs)")->capture_default_str();
  less->add_option("--dropout", o.dropout, "Of hidden units (the paper: 0.3)")->capture_default_str();
  AddSeed(*less, o.seed, "Seed of texts, maps and order");
  less->add_option("--layers", c->layers, "Train these layers only, A-B; merge the parts later")->option_text("A-B");
  less->add_option("--from", o.from, "Sidecar to start from; texts then pass the model compressed with it")
      ->option_text("SIDECAR");
  less->add_option("--work", o.work_folder, "Folder of captures and states (default: SIDECAR.work, removed at the end)");
  less->add_option("--disk", c->disk, "Bytes that captures may take at once, such as 10GiB: layers then go in groups (default: "
                   "all layers at once)")->option_text("BYTES");
  less->add_flag("--keep", c->keep, "Keep the default work folder");
  less->add_flag("--resume", o.resume, "Continue what lies in the work folder");
  less->add_option("--merge", c->merge, "Join sidecars of different layers into one and do nothing else")
      ->option_text("FILE...");
  less->add_flag("--json", c->json, "Print one JSON object");
  less->callback([c] { Train(*c); });
}

struct BudgetsCommand {
  ModelOptions model;
  std::string output;
  bool json = false;
  train::TrainBudgetsOptions options;
};

void PrintBudgets(const BudgetsCommand& c, const train::TrainBudgetsReport& r, const Sidecar& sidecar) {
  const SidecarBudgets& b = r.budgets;
  Json rows = Json::array();
  std::string table = "| rows of all | least head | median | largest head | half of the rows in | correlation of halves |\n|---|---|---|---|---|---|\n";
  for (size_t i = 0; i < b.ratios.size(); ++i) {
    const size_t n = b.n_heads();
    std::vector<float> shares(b.shares.begin() + static_cast<ptrdiff_t>(i * n), b.shares.begin() + static_cast<ptrdiff_t>((i + 1) * n));
    std::sort(shares.begin(), shares.end());
    double sum = 0, all = 0;
    for (const float share : shares) all += share;
    size_t heads = 0;
    while (heads < n && sum < all / 2) sum += shares[n - 1 - heads++];
    rows.push_back({{"ratio", b.ratios[i]}, {"least", shares.front()}, {"median", shares[n / 2]}, {"largest", shares.back()},
                    {"heads_with_half", heads}, {"correlation", r.correlation[i]}});
    table += fmt::format("| {:.0f} % | {:.2f} % | {:.2f} % | {:.1f} % | {} of {} heads | {:.3f} |\n", 100 * b.ratios[i],
                         100 * shares.front(), 100 * shares[n / 2], 100 * shares.back(), heads, n, r.correlation[i]);
  }
  if (c.json)
    WriteResult(Dump({{"model", FingerprintString(sidecar.model_fingerprint)}, {"version", Version()}, {"seed", c.options.seed},
                      {"tokens", b.tokens}, {"seconds", r.seconds}, {"ratios", rows}}) + "\n");
  else
    WriteResult(table + fmt::format("{} texts of {} tokens, {:.0f} s\n", c.options.sequences, c.options.tokens, r.seconds));
}

void TrainBudgets(BudgetsCommand& c) {
  CheckOutputPath("-o", c.output);
  const OpenedModel opened = OpenModel(c.model);
  SidecarToAddTo(c.output, *opened.model);
  StatusLine status;
  const train::TrainBudgetsReport report = train::TrainBudgets(
      *opened.engine, *opened.tokenizer, c.options,
      [&](double done) { if (status.enabled()) status.Set(fmt::format("budgets {:3.0f} %", 100 * done)); },
      &StopOnInterrupt());
  status.Clear();
  Sidecar sidecar = SidecarToAddTo(c.output, *opened.model);
  sidecar.budgets = report.budgets;
  WriteSidecar(c.output, sidecar);
  PrintBudgets(c, report, sidecar);
  FlushResults();
}

// Options that commands which measure a model on texts share.
template <typename Command>
void AddMeasureOptions(CLI::App& app, Command& c, uint64_t& seed, const char* tokens, size_t least_tokens = 16) {
  app.add_option("-m,--model", c.model.model, "Model file (GGUF)")->option_text("MODEL")->required();
  app.add_option("-t,--threads", c.model.threads, "Threads (default: all CPUs)");
  app.add_option("--compute", c.model.compute, "Arithmetic of the model: auto, f32, bf16, int8");
  app.add_option("-o,--output", c.output, "Sidecar to write, or to add them to, NAME.less.gguf for NAME.gguf")
      ->option_text("SIDECAR")->required();
  app.add_option("--text", c.options.texts, "Text files to draw texts from")->option_text("FILE...")->required();
  app.add_option("--sequences", c.options.sequences, "Texts")->capture_default_str()->check(CLI::Range(1, 100000));
  app.add_option("--tokens", c.options.tokens, tokens)->capture_default_str()->check(CLI::Range(least_tokens, size_t{1} << 20));
  AddSeed(app, seed, "Seed of the texts");
  app.add_flag("--json", c.json, "Print one JSON object");
}

void AddBudgets(CLI::App& train) {
  auto c = std::make_shared<BudgetsCommand>();
  CLI::App* budgets = train.add_subcommand("budgets", "Measure how many rows each head of a model needs, for split");
  AddMeasureOptions(*budgets, *c, c->options.seed, "Tokens of a text; the model reads it twice");
  budgets->callback([c] { TrainBudgets(*c); });
}

struct KvzapCommand {
  ModelOptions model;
  std::string output;
  bool json = false;
  train::TrainKvzapOptions options;
};

void PrintScores(const KvzapCommand& c, const train::TrainKvzapReport& r, const Sidecar& sidecar) {
  const SidecarScores& s = r.scores;
  Json layers = Json::array();
  std::string table = "| layer | lambda | R2 of heads, texts left out |\n|---|---|---|\n";
  double sum = 0;
  for (size_t l = 0, head = 0; l < s.n_kv_heads.size(); ++l) {
    const std::vector<float> own(s.r2.begin() + static_cast<ptrdiff_t>(head),
                                 s.r2.begin() + static_cast<ptrdiff_t>(head + s.n_kv_heads[l]));
    head += own.size();
    std::string cells;
    for (const float r2 : own) cells += fmt::format("{}{:.2f}", cells.empty() ? "" : " ", r2), sum += r2;
    layers.push_back({{"lambda", r.lambda[l]}, {"r2", own}});
    table += fmt::format("| {} | {:g} | {} |\n", l, r.lambda[l], cells);
  }
  const double mean = sum / static_cast<double>(s.r2.size());
  // Of all heads together: the thresholds that as many of a text's rows reach.
  std::vector<float> scores = s.quantiles;
  std::sort(scores.begin(), scores.end());
  const auto reached_by = [&](size_t percent) { return scores[(scores.size() - 1) * (100 - percent) / 100]; };
  Json thresholds = Json::array();
  std::string of_all;
  for (const size_t percent : {5, 10, 25, 50, 75, 90}) {
    thresholds.push_back({{"rows", static_cast<double>(percent) / 100}, {"threshold", reached_by(percent)}});
    of_all += fmt::format("{}{:.2f} by {} %", of_all.empty() ? "" : ", ", reached_by(percent), percent);
  }
  if (c.json)
    WriteResult(Dump({{"model", FingerprintString(sidecar.model_fingerprint)}, {"version", Version()}, {"seed", c.options.seed},
                      {"tokens", s.tokens}, {"seconds", r.seconds}, {"mean_r2", mean}, {"thresholds", thresholds},
                      {"layers", layers}}) + "\n");
  else
    WriteResult(table + fmt::format("thresholds that rows reach: {}\nmean R2 {:.3f}; {} texts of {} tokens, {:.0f} s\n", of_all,
                                    mean, c.options.sequences, c.options.tokens, r.seconds));
}

void TrainKvzap(KvzapCommand& c) {
  CheckOutputPath("-o", c.output);
  const OpenedModel opened = OpenModel(c.model);
  SidecarToAddTo(c.output, *opened.model);
  StatusLine status;
  const train::TrainKvzapReport report = train::TrainKvzap(
      *opened.engine, *opened.tokenizer, c.options,
      [&](double done) { if (status.enabled()) status.Set(fmt::format("scores {:3.0f} %", 100 * done)); },
      &StopOnInterrupt());
  status.Clear();
  Sidecar sidecar = SidecarToAddTo(c.output, *opened.model);
  sidecar.scores = report.scores;
  WriteSidecar(c.output, sidecar);
  PrintScores(c, report, sidecar);
  FlushResults();
}

void AddKvzap(CLI::App& train) {
  auto c = std::make_shared<KvzapCommand>();
  CLI::App* kvzap = train.add_subcommand("kvzap", "Fit scores of rows to what a model reads of them, for kvzap");
  AddMeasureOptions(*kvzap, *c, c->options.seed, "Tokens of a text; the model reads it twice");
  kvzap->callback([c] { TrainKvzap(*c); });
}

struct CsrCommand {
  ModelOptions model;
  std::string output;
  bool json = false;
  train::TrainCsrOptions options;
};

void PrintDictionaries(const CsrCommand& c, const train::TrainCsrReport& r, const Sidecar& sidecar) {
  const SidecarDictionaries& d = sidecar.dictionaries;
  Json rows = Json::array();
  std::string table = "| layers | keys, k-means | keys | values, k-means | values |\n|---|---|---|---|---|\n";
  double key_mean = 0, value_mean = 0;
  for (size_t i = 0; i < r.keys.size(); ++i) {
    const size_t first = i * c.options.group, last = std::min(first + c.options.group, d.key_of.size()) - 1;
    const train::TrainedAtoms &k = r.keys[i], &v = r.values[i];
    rows.push_back({{"first_layer", first}, {"last_layer", last}, {"keys_start", k.start}, {"keys", k.error},
                    {"values_start", v.start}, {"values", v.error}});
    table += fmt::format("| {} | {:.3f} | {:.3f} | {:.3f} | {:.3f} |\n",
                         first == last ? fmt::format("{}", first) : fmt::format("{}-{}", first, last), k.start, k.error, v.start,
                         v.error);
    key_mean += k.error / static_cast<double>(r.keys.size());
    value_mean += v.error / static_cast<double>(r.keys.size());
  }
  const size_t bytes = (d.keys.size() + d.values.size()) * sizeof(uint16_t);
  if (c.json)
    WriteResult(Dump({{"model", FingerprintString(sidecar.model_fingerprint)}, {"version", Version()},
                      {"seed", c.options.atoms.seed}, {"tokens", d.tokens}, {"atoms", d.n_atoms}, {"pairs", d.pairs},
                      {"bytes", bytes}, {"collect_seconds", r.collect_seconds}, {"seconds", r.seconds},
                      {"keys", key_mean}, {"values", value_mean}, {"dictionaries", rows}}) + "\n");
  else
    WriteResult(table + fmt::format("squared error of held-out vectors, of their square: keys {:.3f}, values {:.3f}; {} of "
                                    "atoms; {} tokens, {:.0f} s\n",
                                    key_mean, value_mean, HumanBytes(bytes), d.tokens, r.seconds));
}

void TrainCsr(CsrCommand& c) {
  CheckOutputPath("-o", c.output);
  const OpenedModel opened = OpenModel(c.model);
  SidecarToAddTo(c.output, *opened.model);
  StatusLine status;
  const train::TrainCsrReport report = train::TrainCsr(
      *opened.engine, *opened.tokenizer, c.options,
      [&](std::string_view phase, double done) {
        if (status.enabled()) status.Set(fmt::format("{} {:3.0f} %", phase, 100 * done));
      },
      &StopOnInterrupt());
  status.Clear();
  Sidecar sidecar = SidecarToAddTo(c.output, *opened.model);
  sidecar.dictionaries = report.dictionaries;
  WriteSidecar(c.output, sidecar);
  PrintDictionaries(c, report, sidecar);
  FlushResults();
}

void AddCsr(CLI::App& train) {
  auto c = std::make_shared<CsrCommand>();
  CLI::App* csr = train.add_subcommand("csr", "Train dictionaries of keys and values, for the codec csr");
  AddMeasureOptions(*csr, *c, c->options.atoms.seed, "Tokens of a text");
  train::TrainCsrOptions& o = c->options;
  csr->add_option("--atoms", o.atoms.atoms, "Atoms of a dictionary")->capture_default_str()->check(CLI::Range(1, 65536));
  csr->add_option("-s,--pairs", o.atoms.pairs, "Atoms a key while training, and two value halves together")
      ->capture_default_str()->check(CLI::Range(2, 128));
  csr->add_option("--samples", o.samples, "Vectors a dictionary learns from, at most")->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  csr->add_option("--group", o.group, "Neighbouring layers that share dictionaries")->capture_default_str()
      ->check(CLI::Range(1, 1024));
  csr->add_option("--rounds", o.atoms.rounds, "Rounds of k-means")->capture_default_str()->check(CLI::Range(0, 1000));
  csr->add_option("--epochs", o.atoms.epochs, "Epochs of training")->capture_default_str()->check(CLI::Range(0, 1000));
  csr->add_option("--batch", o.atoms.batch, "Vectors an Adam step")->capture_default_str()->check(CLI::Range(1, 1 << 20));
  csr->add_option("--lr", o.atoms.rate, "Learning rate")->capture_default_str()->check(CLI::Range(0.0, 1.0));
  csr->callback([c] { TrainCsr(*c); });
}

struct BalanceCommand {
  ModelOptions model;
  std::string output;
  bool json = false;
  train::TrainBalanceOptions options;
};

void PrintBalance(const BalanceCommand& c, const train::TrainBalanceReport& r, const Sidecar& sidecar) {
  const SidecarBalance& b = sidecar.balance;
  Json layers = Json::array();
  std::string table = "| layer | 2 bits | 3 bits | 4 bits |\n|---|---|---|---|\n";
  double mean[3] = {};
  for (size_t l = 0; l < b.n_kv_heads.size(); ++l) {
    layers.push_back({r.error[0][l], r.error[1][l], r.error[2][l]});
    table += fmt::format("| {} | {:.3f} | {:.3f} | {:.3f} |\n", l, r.error[0][l], r.error[1][l], r.error[2][l]);
    for (size_t i = 0; i < 3; ++i) mean[i] += r.error[i][l] / static_cast<double>(b.n_kv_heads.size());
  }
  const size_t bytes = b.keys.size() * sizeof(uint16_t);
  if (c.json)
    WriteResult(Dump({{"model", FingerprintString(sidecar.model_fingerprint)}, {"version", Version()}, {"seed", c.options.seed},
                      {"tokens", b.tokens}, {"positions", b.positions}, {"bytes", bytes}, {"seconds", r.seconds},
                      {"mean_error", {mean[0], mean[1], mean[2]}}, {"error", layers}}) + "\n");
  else
    WriteResult(table + fmt::format("squared error of scores to expect, of that without matrices: {:.3f}, {:.3f}, {:.3f}; {}; "
                                    "{} tokens, up to position {}, {:.0f} s\n",
                                    mean[0], mean[1], mean[2], HumanBytes(bytes), b.tokens, b.positions, r.seconds));
}

void TrainBalance(BalanceCommand& c) {
  CheckOutputPath("-o", c.output);
  const OpenedModel opened = OpenModel(c.model);
  SidecarToAddTo(c.output, *opened.model);
  StatusLine status;
  const train::TrainBalanceReport report = train::TrainBalance(
      *opened.engine, *opened.tokenizer, c.options,
      [&](double done) { if (status.enabled()) status.Set(fmt::format("balance {:3.0f} %", 100 * done)); },
      &StopOnInterrupt());
  status.Clear();
  Sidecar sidecar = SidecarToAddTo(c.output, *opened.model);
  sidecar.balance = report.balance;
  WriteSidecar(c.output, sidecar);
  PrintBalance(c, report, sidecar);
  FlushResults();
}

void AddBalance(CLI::App& train) {
  auto c = std::make_shared<BalanceCommand>();
  CLI::App* balance = train.add_subcommand("balance", "Find the matrices behind which keys are coded, for balanced");
  AddMeasureOptions(*balance, *c, c->options.seed, "Tokens of a text", 128);
  balance->add_option("--positions", c->options.positions, "Longest context to be ready for (default: the trained one)")
      ->check(CLI::Range(128, 1 << 24));
  balance->callback([c] { TrainBalance(*c); });
}

}  // namespace

void AddTrainCommand(CLI::App& app) {
  CLI::App* train = app.add_subcommand("train", "Train what belongs to a model");
  train->require_subcommand(1);
  AddLess(*train);
  AddTrainMass(*train);
  AddBudgets(*train);
  AddKvzap(*train);
  AddCsr(*train);
  AddBalance(*train);
}

}  // namespace lesskv
