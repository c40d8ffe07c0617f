#include "kvcache/cache_config.h"

#include <algorithm>

#include "base/check.h"
#include "base/checked.h"
#include "kvcache/codec/row_store.h"
#include "kvcache/select/window.h"

namespace lesskv {
namespace {

// The stage's method and its checked arguments, the default one where the spec names none.
struct Choice {
  const Method* method;
  SpecTerm term;
  Arguments arguments() const { return Arguments(method->parameters, term); }
};

Choice Choose(const CacheSpec& spec, Stage stage) {
  if (const SpecTerm* term = spec.Find(stage)) return {FindMethod(term->name), *term};
  const std::string name(DefaultTerm(stage));
  return {FindMethod(name), {name, {}}};
}

// Local layers, which hold their window, have the codec as it is and the default budget.

std::unique_ptr<const Codec> MakeCodec(const CacheSpec& spec, const MethodContext& context, bool local,
                                       std::vector<Artefact>& artefacts) {
  const Choice choice = Choose(spec, Stage::kCodec);
  std::unique_ptr<const Codec> codec = choice.method->make_codec(choice.arguments(), context);
  if (local) return codec;
  if (!codec->artefact().empty()) artefacts.push_back({choice.term.name, codec->artefact()});
  for (const Stage stage : {Stage::kWrap, Stage::kRecall}) {
    if (spec.Find(stage) == nullptr) continue;
    const Choice wrap = Choose(spec, stage);
    codec = wrap.method->make_wrapper(wrap.arguments(), context, std::move(codec));
  }
  return codec;
}

std::unique_ptr<const Budgeter> MakeBudgeter(const CacheSpec& spec, const MethodContext& context, bool local,
                                             std::vector<Artefact>& artefacts) {
  const Choice select = Choose(spec, Stage::kSelect), choice = Choose(local ? CacheSpec() : spec, Stage::kBudget);
  const bool shares = spec.Find(Stage::kShare) != nullptr, divided = spec.Find(Stage::kBudget) != nullptr || shares;
  std::unique_ptr<const Budgeter> budgeter = !local && !divided && TraitsOf(select.term).divides_rows
                                                 ? select.method->make_divider(select.arguments(), context)
                                                 : choice.method->make_budgeter(choice.arguments(), context);
  if (!budgeter->artefact().empty()) artefacts.push_back({choice.term.name, budgeter->artefact()});
  if (local || !shares) return budgeter;
  const Choice share = Choose(spec, Stage::kShare);
  return share.method->make_sharer(share.arguments(), context, std::move(budgeter));
}

void CheckShape(const CacheShape& shape) {
  CHECK(shape.n_layers() > 0 && shape.ctx > 0);
  for (const LayerShape& layer : shape.layers)
    CHECK(layer.n_kv_heads > 0 && layer.head_dim > 0 && layer.n_heads % layer.n_kv_heads == 0 && layer.rope != nullptr);
}

}  // namespace

BudgetRequest LayerPolicy::Request(size_t rows, size_t n_tokens) const {
  // A head never holds more rows than there are tokens, and room for more would be memory for nothing.
  rows = std::min(rows, ctx);
  BudgetRequest request{{}, rows, selector->Window(rows), n_tokens, protect.CountFrom(static_cast<int32_t>(selector->Sinks())),
                        selector->MustKeepOneSetALayer()};
  request.apart = codec->traits().apart_rows;
  while (request.smallest < rows && !Holds(request.smallest)) ++request.smallest;
  for (const LayerShape& layer : layers) request.n_kv_heads.push_back(layer.n_kv_heads);
  return request;
}

bool LayerPolicy::Holds(size_t budget) const {
  const size_t sinks = selector->Sinks();
  const size_t own = std::max(selector->Window(budget), sinks > 0 ? sinks + 1 : 0);
  return own + protect.CountFrom(static_cast<int32_t>(sinks)) <= budget;
}

std::vector<size_t> LayerPolicy::Budgets(size_t rows, size_t n_tokens) const {
  std::vector<size_t> budgets = budgeter->Allocate(Request(rows, n_tokens));
  CHECK(budgets.size() == heads.size());
  const size_t n_protected = protect.CountFrom(static_cast<int32_t>(selector->Sinks()));
  if (selector->KeepsAShare())
    for (size_t& budget : budgets) budget = std::max(budget, selector->Window(ctx) + n_protected);
  for (size_t i = 0; i < budgets.size() && n_protected > 0; ++i) {
    const size_t own = selector->Window(budgets[i]);
    if (own + n_protected > budgets[i])
      Fail(ErrorCode::kInvalidArgument,
           "{} protected tokens do not fit '{}': layer {} keeps {} rows, {} of them always its own window",
           protect.size(), name, model_layers[heads.LayerOf(i)], budgets[i], own);
  }
  for (size_t i = 0; i < budgets.size() && codec->traits().group_rows > 1; ++i) CheckGroups(i, budgets[i]);
  const size_t bunch = bunches().rows;
  for (size_t i = 0; i < budgets.size() && bunch > 1; ++i)
    if (budgets[i] < bunch || !Holds(budgets[i] + 1 - bunch))
      Fail(ErrorCode::kInvalidArgument,
           "'{}': {} rows cannot leave a head at once where layer {} keeps {}, its own window and protected tokens among them",
           name, bunch, model_layers[heads.LayerOf(i)], budgets[i]);
  return budgets;
}

size_t LayerPolicy::RowsThatStay(size_t n, size_t budget) const {
  const size_t group = std::max(codec->traits().group_rows, bunches().rows);
  return n > budget ? n - CeilDiv(n - budget, group) * group : n;
}

size_t LayerPolicy::RowsThatAlwaysStay(size_t tokens_seen) const {
  const size_t own = selector->Window(ctx), sinks = selector->Sinks();
  if (tokens_seen <= own) return tokens_seen;
  const auto between = static_cast<int32_t>(sinks), end = static_cast<int32_t>(tokens_seen + std::min(own, sinks) - own);
  return own + protect.CountFrom(between) - protect.CountFrom(std::max(between, end));
}

// Beside the codec's window and the groups of tokens that must stay there is always a group that may leave.
void LayerPolicy::CheckGroups(size_t head, size_t budget) const {
  const CodecTraits traits = codec->traits();
  const size_t group = traits.group_rows, exact = std::min(traits.window_rows, budget / 2 / group * group) / group;
  if (traits.window_rows > 0 && exact == 0)
    Fail(ErrorCode::kInvalidArgument,
         "'{}': layer {} keeps {} rows a head, but its codec needs two groups of {}, one for its exact window", name,
         model_layers[heads.LayerOf(head)], budget, group);
  std::vector<ProtectedSpan> spans(protect.spans().begin(), protect.spans().end());
  if (selector->Sinks() > 0) spans.insert(spans.begin(), {0, static_cast<int32_t>(selector->Sinks())});
  size_t held = 0;
  int64_t next = 0;  // the first group that is not counted yet
  for (const ProtectedSpan& span : spans) {
    const int64_t first = std::max<int64_t>(next, span.begin / static_cast<int64_t>(group));
    const int64_t last = (span.end - 1) / static_cast<int64_t>(group);
    if (last < first) continue;
    held += static_cast<size_t>(last - first + 1);
    next = last + 1;
  }
  if (held > 0 && exact + held + 1 > budget / group)
    Fail(ErrorCode::kInvalidArgument,
         "protected tokens in {} groups of {} do not fit '{}': layer {} keeps {} rows, of which {} are always exact",
         held, group, name, model_layers[heads.LayerOf(head)], budget, exact * group);
}

std::shared_ptr<const CacheConfig> CacheConfig::Create(const CacheSpec& spec, const CacheShape& shape,
                                                       std::vector<ProtectedSpan> protected_spans,
                                                       const SidecarSource& sidecar) {
  CheckShape(shape);
  std::shared_ptr<CacheConfig> config(new CacheConfig(spec, shape));
  config->DivideLayers();
  config->policies_[0].protect = ProtectedSet(std::move(protected_spans));
  config->MakeMethods(sidecar);
  const SpecTerm* prefill = spec.Find(Stage::kPrefill);
  config->prefill_chunk_ = TraitsOf(prefill != nullptr ? *prefill : *spec.Find(Stage::kSelect)).prompt_block;
  if (const std::string why = config->global().budgeter->WhyNoStream(); config->prefill_chunk_ > 0 && !why.empty())
    Fail(ErrorCode::kInvalidArgument, "cache spec '{}': {}", spec.ToString(), why);
  config->Budgets(shape.ctx);  // refuses what cannot fit before any text is seen
  return config;
}

std::shared_ptr<const CacheConfig> CacheConfig::WithProtected(std::vector<ProtectedSpan> protected_spans) const {
  std::shared_ptr<CacheConfig> config(new CacheConfig(*this));
  config->policies_[0].protect = ProtectedSet(std::move(protected_spans));
  config->Budgets(shape_.ctx);
  return config;
}

// Global layers first, then the local ones of each window, in the order in which the windows appear.
void CacheConfig::DivideLayers() {
  std::vector<size_t> windows = {0};
  for (const LayerShape& layer : shape_.layers)
    if (std::find(windows.begin(), windows.end(), layer.window) == windows.end()) windows.push_back(layer.window);
  places_.resize(shape_.n_layers());
  for (const size_t window : windows) {
    std::vector<LayerShape> shapes;
    std::vector<size_t> numbers;
    for (size_t l = 0; l < shape_.n_layers(); ++l) {
      if (shape_.layers[l].window != window) continue;
      places_[l] = {policies_.size(), shapes.size()};
      shapes.push_back(shape_.layers[l]);
      numbers.push_back(l);
    }
    LayerPolicy policy(std::move(shapes), std::move(numbers));
    policy.window = window;
    policy.ctx = shape_.ctx;
    policy.compute = shape_.compute;
    policy.name = spec_.ToString();
    policies_.push_back(std::move(policy));
  }
}

void CacheConfig::MakeMethods(const SidecarSource& sidecar) {
  const MethodContext context{policies_[0].layers, shape_.ctx, shape_.compute, sidecar, shape_.input_width};
  std::vector<Artefact> artefacts;
  for (LayerPolicy& policy : policies_) {
    MethodContext own = context;
    own.layers = policy.layers;
    const bool local = policy.window > 0;
    policy.codec = MakeCodec(spec_, own, local, artefacts);
    policy.budgeter = MakeBudgeter(spec_, own, local, artefacts);
    if (local) policy.selector = MakeLocalSelector(policy.window);
  }
  const Choice select = Choose(spec_, Stage::kSelect);
  policies_[0].selector = select.method->make_selector(select.arguments(), context);
  if (const std::string artefact = policies_[0].selector->artefact(); !artefact.empty())
    artefacts.push_back({select.term.name, artefact});
  if (policies_[0].codec->traits().grows && policies_[0].selector->EvictsIn(StepKind::kDecode))
    Fail(ErrorCode::kInvalidArgument,
         "cache spec '{}': '{}' bounds the rows of a head while decoding, but what is generated would pile up beside "
         "them",
         spec_.ToString(), select.term.name);
  const Choice residual = Choose(spec_, Stage::kResidual);
  if (residual.method->make_residual != nullptr) {
    MadeResidual made = residual.method->make_residual(residual.arguments(), context);
    policies_[0].residual = std::move(made.residual);
    if (!made.artefact.empty()) artefacts.push_back({residual.term.name, made.artefact});
  }
  spec_text_ = spec_.ToString(artefacts);
}

std::vector<size_t> CacheConfig::Budgets(size_t n_tokens) const {
  const LayerPolicy& policy = global();
  const Growth growth = policy.selector->After(StepKind::kPrompt, n_tokens);
  if (!growth.evicts) return {};
  return policy.Budgets(growth.rows, n_tokens);
}

size_t CacheConfig::sidecar_bytes() const {
  return (global().residual == nullptr ? 0 : global().residual->WeightBytes()) + global().codec->ArtefactBytes() +
         global().budgeter->ArtefactBytes() + global().selector->ArtefactBytes();
}

bool CacheConfig::ReadsPromptsAs(const CacheConfig& other) const {
  const auto same_layer = [](const LayerShape& a, const LayerShape& b) {
    return a.n_heads == b.n_heads && a.n_kv_heads == b.n_kv_heads && a.head_dim == b.head_dim && a.scale == b.scale &&
           a.rope == b.rope && a.window == b.window;
  };
  const auto same_policy = [](const LayerPolicy& a, const LayerPolicy& b) {
    const RowTypes *types = a.codec->first_prompt_types(), *others = b.codec->first_prompt_types();
    return types != nullptr && others != nullptr && *types == *others && a.unrotated_keys() == b.unrotated_keys();
  };
  return prefill_chunk_ == 0 && other.prefill_chunk_ == 0 && shape_.compute == other.shape_.compute &&
         std::ranges::equal(shape_.layers, other.shape_.layers, same_layer) &&
         std::ranges::equal(policies_, other.policies_, same_policy);
}

size_t CacheConfig::FullBytes(size_t n_tokens) const {
  size_t bytes = 0;
  for (const LayerShape& layer : shape_.layers)
    bytes += (layer.window > 0 ? std::min(layer.window, n_tokens) : n_tokens) * layer.kv_dim() * 2 * sizeof(uint16_t);
  return bytes;
}

}  // namespace lesskv
