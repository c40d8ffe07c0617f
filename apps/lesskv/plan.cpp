// lesskv plan: the bytes that caches will take, before anything is loaded or computed.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "base/memory.h"
#include "engine/run_info.h"

namespace lesskv {
namespace {

struct PlanOptions {
  ModelOptions model;
  std::vector<std::string> specs;
  size_t parallel = 1;
  size_t prompt = 0;
  size_t predict = 0;
  bool has_prompt = false;
  std::string format = "text";
};

struct PlanRow {
  std::shared_ptr<const CacheConfig> config;
  CachePlan plan;
};

Json RowJson(const PlanRow& row, const PlanOptions& options, const Engine& engine, size_t full_bytes) {
  const size_t n = options.parallel;
  Json json;
  json["kv_spec"] = row.config->spec_text();
  json["kv_bytes_after_prompt"] = row.plan.bytes_after_prompt * n;
  json["kv_bytes"] = row.plan.bytes_end * n;
  json["kv_bytes_peak"] = row.plan.bytes_peak * n;
  json["kv_bytes_slack"] = row.plan.bytes_slack * n;
  json["kv_bytes_full"] = full_bytes * n;
  if (row.plan.bytes_local > 0) json["kv_bytes_local"] = row.plan.bytes_local * n;
  json["tokens_resident"] = row.plan.rows_end;
  if (row.config->global().selector->SaysHowMany()) {  // the others are the most that a text can make of it
    json["kv_bytes_least"] = row.plan.bytes_end_least * n;
    json["tokens_resident_least"] = row.plan.rows_end_least;
  }
  json["sidecar_bytes"] = row.config->sidecar_bytes();
  json["prompt_tokens"] = options.prompt;
  json["generated_tokens"] = options.predict;
  json["parallel"] = n;
  json["weight_bytes"] = engine.model().weight_bytes();
  const size_t chunk = row.config->prefill_chunk();
  json["work_bytes"] = engine.WorkBytes(chunk > 0 ? std::min(chunk, options.prompt) : options.prompt);
  AddRunInfo(json, engine, *row.config, 0);
  return json;
}

void PrintTable(const std::vector<Json>& rows) {
  WriteResult(fmt::format("{:<44} {:>10} {:>12} {:>12} {:>12} {:>8} {:>12} {:>12}\n", "cache", "rows", "after prompt",
                          "at the end", "at most", "of full", "sidecar", "work memory"));
  for (const Json& row : rows) {
    const auto bytes = [&](const char* key) { return HumanBytes(row[key].get<size_t>()); };
    const double share = row["kv_bytes"].get<double>() / std::max(1.0, row["kv_bytes_full"].get<double>());
    const double most = row["tokens_resident"].get<double>();
    const std::string n_rows = row.contains("tokens_resident_least")
                                   ? fmt::format("{:.0f}-{:.0f}", row["tokens_resident_least"].get<double>(), most)
                                   : fmt::format("{:.0f}", most);
    WriteResult(fmt::format("{:<44} {:>10} {:>12} {:>12} {:>12} {:>7.1f}% {:>12} {:>12}\n",
                            row["kv_spec"].get<std::string>(), n_rows,
                            bytes("kv_bytes_after_prompt"), bytes("kv_bytes"), bytes("kv_bytes_peak"), 100 * share,
                            bytes("sidecar_bytes"), bytes("work_bytes")));
  }
}

void PrintRanges(const std::vector<Json>& rows) {
  for (const Json& row : rows)
    if (row.contains("kv_bytes_least"))
      WriteResult(fmt::format("\n{}: how many rows stay depends on the text; sizes are the most, the least at the end is {}\n",
                              row["kv_spec"].get<std::string>(), HumanBytes(row["kv_bytes_least"].get<size_t>())));
}

void PrintLocalLayers(const Json& row) {
  if (!row.contains("n_local_layers")) return;
  WriteResult(fmt::format("\n{} local layers keep a window of {} tokens each, {} in each of these sizes; specs, rows and "
                          "percentages are about the other layers\n",
                          row["n_local_layers"].get<size_t>(), row["local_window"].get<size_t>(),
                          HumanBytes(row.value("kv_bytes_local", size_t{0}))));
}

void Plan(PlanOptions& options) {
  if (options.parallel < 1 || options.parallel > 1000000)
    Fail(ErrorCode::kInvalidArgument, "--parallel: expected 1 to 1000000 sequences, found {}", options.parallel);
  if (options.format != "text" && options.format != "json")
    Fail(ErrorCode::kInvalidArgument, "-o: expected text or json, found \"{}\"", options.format);
  std::vector<CacheSpec> specs;
  for (const std::string& text : options.specs) specs.push_back(CacheSpec::Parse(text));
  if (specs.empty()) specs.emplace_back();

  options.model.loading = ModelLoading::kMap;  // the weights are not read
  const OpenedModel opened = OpenModel(options.model);
  if (!options.has_prompt) options.prompt = opened.ctx - std::min(opened.ctx, options.predict);
  if (options.prompt < 1 || options.predict > opened.ctx || options.prompt > opened.ctx - options.predict)
    Fail(ErrorCode::kInvalidArgument, "a prompt of {} tokens (at least 1) and {} generated ones do not fit the context of {}",
         options.prompt, options.predict, opened.ctx);
  const size_t full_bytes = opened.engine->MakeCacheConfig({}, opened.ctx)->FullBytes(options.prompt + options.predict);
  std::vector<Json> rows;
  for (const CacheSpec& spec : specs) {
    auto config = opened.engine->MakeCacheConfig(spec, opened.ctx);
    const CachePlan plan = config->Plan(options.prompt, options.predict);
    rows.push_back(RowJson({config, plan}, options, *opened.engine, full_bytes));
  }
  if (options.format == "json") {
    WriteResult(Dump(Json(rows)) + "\n");
  } else {
    WriteResult(fmt::format("{} prompt tokens, {} generated, {} sequence{}; weights {}; a full f16 cache takes {}\n\n",
                            options.prompt, options.predict, options.parallel, options.parallel == 1 ? "" : "s",
                            HumanBytes(opened.model->weight_bytes()), HumanBytes(full_bytes * options.parallel)));
    PrintTable(rows);
    PrintRanges(rows);
    PrintLocalLayers(rows[0]);
  }
  FlushResults();
}

}  // namespace

void AddPlanCommand(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("plan", "Tell the bytes that caches will take, exactly or at most, before anything is computed");
  auto options = std::make_shared<PlanOptions>();
  AddModelOptions(*command, options->model);
  command->add_option("--kv", options->specs, "Cache spec; may be repeated (default: full)")
      ->option_text("SPEC")->allow_extra_args(false);
  command->add_option("--parallel", options->parallel, "Sequences at the same time")->capture_default_str();
  command->add_option("-p,--prompt", options->prompt, "Prompt tokens (default: what -n leaves of the context)")
      ->option_text("N");
  command->add_option("-n,--predict", options->predict, "Tokens generated after it")->capture_default_str();
  command->add_option("-o,--output", options->format, "text or json")->capture_default_str()->option_text("FORMAT");
  command->callback([command, options] {
    options->has_prompt = command->count("--prompt") > 0;
    Plan(*options);
  });
}

}  // namespace lesskv
