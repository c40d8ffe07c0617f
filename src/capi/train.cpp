// Training of sidecars.
#include <atomic>
#include <filesystem>
#include <optional>

#include "capi/handles.h"
#include "engine/run_info.h"
#include "train/train_budgets.h"
#include "train/train_less.h"

using namespace lesskv;        // NOLINT
using namespace lesskv::capi;  // NOLINT

namespace {

lesskv_train_less_params LessDefaults() {
  const train::TrainLessOptions o;
  return {sizeof(lesskv_train_less_params), nullptr, 0, nullptr, 0, o.ctx, o.sequences, o.rank, o.hidden, o.epochs, o.batch,
          o.rate, o.seed, nullptr, false, nullptr, nullptr};
}

lesskv_train_budgets_params BudgetsDefaults() {
  const train::TrainBudgetsOptions o;
  return {sizeof(lesskv_train_budgets_params), nullptr, 0, o.sequences, o.tokens, o.seed, nullptr, nullptr};
}

// Tells the caller, and remembers that it wants no more.
struct Progress {
  lesskv_progress_callback callback;
  void* user_data;
  std::atomic<bool> stop{false};

  void operator()(const char* phase, double done) {
    if (callback != nullptr && !stop && !callback(phase, done, user_data)) stop = true;
  }

  // Before anything is written: the callback may have said so when all was done.
  void RequireWanted() const {
    if (stop) Fail(ErrorCode::kRuntime, "stopped");
  }
};

void RequireAtMost(const char* name, size_t value, size_t most) {
  if (value > most) Fail(ErrorCode::kInvalidArgument, "{}: expected at most {}, found {}", name, most, value);
}

constexpr size_t kMostSequences = 1'000'000, kMostTokens = size_t{1} << 20;

train::TrainLessOptions OptionsOf(const lesskv_train_less_params& o, const std::string& sidecar) {
  RequireAtMost("sequences", o.sequences, kMostSequences);
  RequireAtMost("ctx", o.ctx, kMostTokens);
  train::TrainLessOptions options;
  options.texts = Strings(o.texts, o.n_texts, "texts");
  options.policies = Strings(o.kv_specs, o.n_kv_specs, "cache specs");
  options.ctx = o.ctx;
  options.sequences = o.sequences;
  options.rank = o.rank;
  options.hidden = o.hidden;
  options.epochs = o.epochs;
  options.batch = o.batch;
  options.rate = o.learning_rate;
  options.seed = o.seed;
  options.work_folder = o.work_folder == nullptr ? sidecar + ".work" : o.work_folder;
  options.resume = o.resume;
  return options;
}

Json LayerRowsOf(const train::TrainLessReport& report, size_t first_layer) {
  Json rows = Json::array();
  for (size_t i = 0; i < report.validation.size(); ++i)
    rows.push_back({{"layer", first_layer + i}, {"selector", report.baseline[i]}, {"baseline_plus", report.baseline_plus[i]},
                    {"less", report.validation[i]}});
  return rows;
}

Json RatioRowsOf(const SidecarBudgets& budgets) {
  Json rows = Json::array();
  for (size_t i = 0; i < budgets.ratios.size(); ++i) {
    const auto begin = budgets.shares.begin() + static_cast<ptrdiff_t>(i * budgets.n_heads());
    rows.push_back({{"ratio", budgets.ratios[i]},
                    {"shares", std::vector<float>(begin, begin + static_cast<ptrdiff_t>(budgets.n_heads()))}});
  }
  return rows;
}

Sidecar NewSidecar(const Model& model) {
  Sidecar sidecar;
  sidecar.model_fingerprint = model.fingerprint();
  sidecar.model_identity = model.identity();
  sidecar.model_name = model.config().name;
  return sidecar;
}

}  // namespace

extern "C" {

lesskv_status lesskv_train_less_params_init(lesskv_train_less_params* params, size_t size) {
  return Init(params, size, LessDefaults());
}

lesskv_status lesskv_train_budgets_params_init(lesskv_train_budgets_params* params, size_t size) {
  return Init(params, size, BudgetsDefaults());
}

lesskv_status lesskv_train_less(lesskv_model* model, const lesskv_train_less_params* params, const char* sidecar,
                                char** json) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    Require(sidecar != nullptr, "a sidecar to write is needed");
    const lesskv_train_less_params o = Options(params, LessDefaults());
    const train::TrainLessOptions options = OptionsOf(o, sidecar);
    const std::lock_guard lock(loaded->in_use);
    const auto existing = [&] { return ExistingSidecar(sidecar, loaded->model->fingerprint(), loaded->model->identity()); };
    existing();  // one that is of another model is refused before the work
    Progress progress{o.on_progress, o.user_data};
    train::TrainLessReport report = train::TrainLess(
        *loaded->engine, *loaded->tokenizer, options,
        [&](const train::TrainProgress& p) { if (p.phase != "plan") progress(p.phase.c_str(), p.done); }, &progress.stop);
    progress.RequireWanted();
    if (const auto other = existing()) AddOtherParts(*other, report.sidecar);  // as it is now: others may train parts, too
    WriteSidecar(sidecar, report.sidecar);
    if (o.work_folder == nullptr) std::filesystem::remove_all(options.work_folder);
    GiveText(Dump(LayerRowsOf(report, options.first_layer)), json);
  });
}

lesskv_status lesskv_train_budgets(lesskv_model* model, const lesskv_train_budgets_params* params, const char* sidecar,
                                   char** json) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    Require(sidecar != nullptr, "a sidecar to write is needed");
    const lesskv_train_budgets_params o = Options(params, BudgetsDefaults());
    RequireAtMost("sequences", o.sequences, kMostSequences);
    RequireAtMost("tokens", o.tokens, kMostTokens);
    train::TrainBudgetsOptions options;
    options.texts = Strings(o.texts, o.n_texts, "texts");
    options.sequences = o.sequences;
    options.tokens = o.tokens;
    options.seed = o.seed;
    const std::lock_guard lock(loaded->in_use);
    const auto existing = [&] { return ExistingSidecar(sidecar, loaded->model->fingerprint(), loaded->model->identity()); };
    existing();  // one that is of another model is refused before the work
    Progress progress{o.on_progress, o.user_data};
    const train::TrainBudgetsReport report = train::TrainBudgets(
        *loaded->engine, *loaded->tokenizer, options, [&](double done) { progress("budgets", done); }, &progress.stop);
    progress.RequireWanted();
    Sidecar written = existing().value_or(NewSidecar(*loaded->model));  // as it is now: others may train parts, too
    written.budgets = report.budgets;
    WriteSidecar(sidecar, written);
    GiveText(Dump(RatioRowsOf(report.budgets)), json);
  });
}

}  // extern "C"
