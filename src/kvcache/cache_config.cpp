#include "kvcache/cache_config.h"

#include "base/check.h"
#include "kvcache/budget/budgeter.h"
#include "kvcache/residual/residual.h"
#include "kvcache/select/selector.h"

namespace lesskv {
namespace {

// The stage's method and its checked arguments, the default one where the spec names none.
struct Choice {
  const Method* method;
  SpecTerm term;
  Arguments arguments() const { return Arguments(method->parameters, term); }
};

Choice Choose(const CacheSpec& spec, Stage stage) {
  for (const SpecTerm& term : spec.terms()) {
    const Method* method = FindMethod(term.name);
    if (method->stage == stage) return {method, term};
  }
  const std::string name(DefaultTerm(stage));
  return {FindMethod(name), {name, {}}};
}

void CheckRowType(const CacheShape& shape, RowType type) {
  if (!Supports(type, shape.head_dim))
    Fail(ErrorCode::kInvalidArgument, "codec {} needs a head size that is a multiple of 32; this model's is {}",
         Name(type), shape.head_dim);
}

}  // namespace

CacheConfig::CacheConfig(const CacheSpec& spec, const CacheShape& shape, ProtectedSet protect)
    : spec_(spec), spec_text_(spec.ToString()), shape_(shape), protect_(std::move(protect)) {}

CacheConfig::~CacheConfig() = default;

std::shared_ptr<const CacheConfig> CacheConfig::Create(const CacheSpec& spec, const CacheShape& shape,
                                                       std::vector<ProtectedSpan> protected_spans,
                                                       const SidecarSource& sidecar) {
  CHECK(shape.n_layers > 0 && shape.n_kv_heads > 0 && shape.head_dim > 0 && shape.ctx > 0 &&
        shape.n_heads % shape.n_kv_heads == 0);
  std::shared_ptr<CacheConfig> config(new CacheConfig(spec, shape, ProtectedSet(std::move(protected_spans))));

  const Choice select = Choose(spec, Stage::kSelect);
  config->selector_ = select.method->make_selector(select.arguments(), shape);
  const Choice budget = Choose(spec, Stage::kBudget);
  config->budgeter_ = budget.method->make_budgeter(budget.arguments());
  const Choice codec = Choose(spec, Stage::kCodec);
  config->row_types_ = codec.method->row_types(codec.arguments());
  CheckRowType(shape, config->row_types_.keys);
  CheckRowType(shape, config->row_types_.values);
  const Choice residual = Choose(spec, Stage::kResidual);
  if (residual.method->make_residual != nullptr)
  {
    MadeResidual made = residual.method->make_residual(residual.arguments(), shape, sidecar);
    config->residual_ = std::move(made.residual);
    if (!made.artefact.empty()) config->spec_text_ = spec.ToString(residual.term.name, made.artefact);
  }
  if (const SpecTerm* prefill = spec.Find("prefill"))
    config->prefill_chunk_ = Arguments(FindMethod("prefill")->parameters, *prefill).Count("chunk");

  config->Budgets(shape.ctx);  // refuses what cannot fit before any text is seen
  return config;
}

std::vector<size_t> CacheConfig::Budgets(size_t n_tokens) const {
  const size_t rows = selector_->Rows();
  if (rows == 0) return {};
  std::vector<size_t> budgets = budgeter_->Allocate(
      {shape_.n_layers, shape_.n_kv_heads, rows, selector_->Window(rows), n_tokens});
  CHECK(budgets.size() == shape_.n_layers * shape_.n_kv_heads);
  const size_t n_protected = protect_.CountFrom(static_cast<int32_t>(selector_->Sinks()));
  for (size_t i = 0; i < budgets.size() && n_protected > 0; ++i) {
    const size_t window = selector_->Window(budgets[i]);
    if (window + n_protected > budgets[i])
      Fail(ErrorCode::kInvalidArgument,
           "{} protected tokens do not fit '{}': layer {} keeps {} rows, {} of them always its own window",
           protect_.size(), spec_.ToString(), i / shape_.n_kv_heads, budgets[i], window);
  }
  return budgets;
}

size_t CacheConfig::sidecar_bytes() const { return residual_ == nullptr ? 0 : residual_->WeightBytes(); }

}  // namespace lesskv
