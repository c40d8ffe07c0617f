#include "kvcache/registry.h"

#include <charconv>
#include <cmath>

#include "base/check.h"
#include "base/error.h"

// One line a method: X(Name) stands for `const Method kNameMethod`, defined beside the method's implementation.
#define LESSKV_METHODS(X) \
  X(Full)                 \
  X(Window)               \
  X(H2o)                  \
  X(Tova)                 \
  X(Snapkv)               \
  X(Cascade)              \
  X(Elastic)              \
  X(Kvzap)                \
  X(Uniform)              \
  X(Pyramid)              \
  X(Zigzag)               \
  X(Split)                \
  X(Pooled)               \
  X(Ada)                  \
  X(Drop)                 \
  X(Less)                 \
  X(Merge)                \
  X(Match)                \
  X(F16)                  \
  X(F32)                  \
  X(Bf16)                 \
  X(Q8)                   \
  X(Q4)                   \
  X(Mix)                  \
  X(Kivi)                 \
  X(Balanced)             \
  X(Csr)                  \
  X(Think)                \
  X(Recent)               \
  X(All)                  \
  X(Cluster)              \
  X(Prefill)

namespace lesskv {

#define X(name) extern const Method k##name##Method;
LESSKV_METHODS(X)
#undef X

namespace {

std::vector<const Method*>& MethodList() {
#define X(name) &k##name##Method,
  static std::vector<const Method*> methods = {LESSKV_METHODS(X)};
#undef X
  return methods;
}

}  // namespace

std::span<const Method* const> Methods() { return MethodList(); }

const Method* FindMethod(std::string_view name) {
  for (const Method* method : MethodList())
    if (method->name == name) return method;
  return nullptr;
}

void RegisterMethod(const Method& method) {
  if (FindMethod(method.name) != nullptr)
    Fail(ErrorCode::kInvalidArgument, "there is already a cache method '{}'", method.name);
  MethodList().push_back(&method);
}

MethodTraits TraitsOf(const SpecTerm& term) {
  const Method& method = *FindMethod(term.name);
  return method.traits == nullptr ? MethodTraits{} : method.traits(Arguments(method.parameters, term));
}

std::string_view Name(Stage stage) {
  switch (stage) {
    case Stage::kSelect: return "select";
    case Stage::kBudget: return "budget";
    case Stage::kShare: return "share";
    case Stage::kResidual: return "residual";
    case Stage::kCodec: return "codec";
    case Stage::kWrap: return "wrap";
    case Stage::kRecall: return "recall";
    case Stage::kPrefill: return "prefill";
  }
  CHECK(false, "unknown stage");
}

std::string_view DefaultTerm(Stage stage) {
  switch (stage) {
    case Stage::kSelect: return "full";
    case Stage::kBudget: return "uniform";
    case Stage::kShare: return "";
    case Stage::kResidual: return "drop";
    case Stage::kCodec: return "f16";
    case Stage::kWrap: return "";
    case Stage::kRecall: return "all";
    case Stage::kPrefill: return "";
  }
  CHECK(false, "unknown stage");
}

std::optional<std::string> Conflict(const Method& a, const MethodTraits& a_traits, const Method& b,
                                    const MethodTraits& b_traits) {
  if (a.stage == b.stage) return fmt::format("'{}' and '{}' answer the same question ({})", a.name, b.name, Name(a.stage));
  const auto one_way = [](const Method& x, const MethodTraits& tx, const Method& y,
                          const MethodTraits& ty) -> std::optional<std::string> {
    if (tx.renumbers_positions && ty.needs_true_positions)
      return fmt::format("'{}' re-numbers positions and cannot feed '{}', which needs true ones", x.name, y.name);
    if (tx.renumbers_positions && ty.fixes_rotation)
      return fmt::format("'{}' re-numbers positions, but '{}' stores keys rotated in a form that cannot be rotated anew", x.name,
                         y.name);
    if (x.stage == Stage::kCodec && !tx.plain_rows && ty.needs_plain_rows)
      return fmt::format("'{}' leaves out channels of keys, which '{}' as given here does not keep apart", y.name,
                         x.name);
    if (x.stage == Stage::kSelect && !tx.evicts && ty.needs_eviction)
      return fmt::format("'{}' lets no token leave, so '{}' has nothing to do", x.name, y.name);
    if (x.stage == Stage::kSelect && !tx.votes_by_head && ty.needs_votes_by_head)
      return fmt::format("'{}' has no votes of each head's own, by which '{}' divides rows", x.name, y.name);
    if (!tx.gives_full_keys && ty.needs_full_keys)
      return fmt::format("'{}' does not give back whole keys, which '{}' needs", x.name, y.name);
    if (tx.needs_known_rows && !ty.acts_in_stream && (y.stage == Stage::kBudget || y.stage == Stage::kShare))
      return fmt::format("'{}' divides rows at the end of a prompt, but '{}' must know its rows before", y.name, x.name);
    if (tx.needs_known_rows && ty.divides_rows)
      return fmt::format("'{}' divides rows at the end of a prompt (but for scope=head), but '{}' must know its rows before", y.name,
                         x.name);
    if (tx.groups_rows && ty.needs_single_rows)
      return fmt::format("rows of '{}' leave in groups, those of '{}' one by one", x.name, y.name);
    const bool divides =
        y.stage == Stage::kShare || (y.stage == Stage::kBudget && y.name != DefaultTerm(Stage::kBudget));
    if (tx.insists_on_scope && (y.stage == Stage::kShare || y.stage == Stage::kBudget))
      return fmt::format("'{}' with this scope divides its rows itself, which '{}' would do", x.name, y.name);
    if (tx.says_how_many && divides)
      return fmt::format("'{}' says itself how many rows each head keeps, which '{}' would divide", x.name, y.name);
    const bool stores = y.stage == Stage::kCodec || y.stage == Stage::kWrap;
    if (tx.says_how_many && ((stores && !ty.movable_rows) || (y.stage == Stage::kResidual && ty.needs_known_rows)))
      return fmt::format("how many rows '{}' keeps is known only when they are chosen, but '{}' must know before", x.name,
                         y.name);
    if (tx.same_rows && divides)
      return fmt::format("'{}' keeps as many rows in all layers and heads, which '{}' would divide", x.name, y.name);
    if (tx.takes_no_fit && ty.fits_rows)
      return fmt::format("rows of '{}' are replaced or merged one by one, which a fit by '{}' does not outlive", x.name, y.name);
    if (tx.evicts && ty.recalls_all)
      return fmt::format("'{}' lets tokens leave, any of which '{}' may recall", x.name, y.name);
    if (tx.recalls_all && ty.needs_eviction)
      return fmt::format("'{}' may recall any token, so that none leaves and '{}' has nothing to do", x.name, y.name);
    if (tx.moves_rows && (y.stage == Stage::kCodec || y.stage == Stage::kWrap) && !ty.movable_rows)
      return fmt::format("'{}' moves single rows, but those of '{}' do not lie by themselves", x.name, y.name);
    if (!tx.rewrites_rows && ty.needs_rewrites)
      return fmt::format("'{}' cannot change a row that is stored, which '{}' needs", x.name, y.name);
    if (tx.prompt_block > 0 && !ty.acts_in_stream)
      return fmt::format("'{}' acts at the end of a prompt only, so it cannot be used with '{}'{}", y.name, x.name,
                         x.stage == Stage::kSelect ? ", which reads it in blocks (block=0: in one step)" : "");
    return std::nullopt;
  };
  if (auto reason = one_way(a, a_traits, b, b_traits)) return reason;
  return one_way(b, b_traits, a, a_traits);
}

std::optional<std::string> Conflict(const SpecTerm& a, const SpecTerm& b) {
  return Conflict(*FindMethod(a.name), TraitsOf(a), *FindMethod(b.name), TraitsOf(b));
}

std::optional<std::string> Conflict(const Method& a, const Method& b) {
  if (a.stage == b.stage) return Conflict(a, {}, b, {});
  return Conflict(ParseTerm(a.Example()), ParseTerm(b.Example()));
}

void RequireGiven(const Arguments& arguments, std::string_view method, std::string_view parameter,
                  std::string_view example) {
  if (!arguments.Has(parameter))
    Fail(ErrorCode::kInvalidArgument, "cache spec: {} needs its {}, such as {}", method, parameter, example);
}

const Parameter& Arguments::Find(std::string_view name) const {
  for (const Parameter& parameter : parameters_)
    if (parameter.name == name) return parameter;
  CHECK(false, "no parameter '{}'", name);
}

bool Arguments::Has(std::string_view name) const {
  for (const SpecArgument& argument : term_->arguments)
    if (argument.key == name) return true;
  return false;
}

std::string_view Arguments::Text(std::string_view name) const {
  for (const SpecArgument& argument : term_->arguments)
    if (argument.key == name) return argument.value;
  return Find(name).default_value;
}

double Arguments::Real(std::string_view name) const {
  const std::string_view text = Text(name);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  CHECK(error == std::errc() && (end == text.data() + text.size() || *end == '%'), "'{}' was validated", text);
  return value;
}

size_t Arguments::Count(std::string_view name) const { return static_cast<size_t>(Real(name)); }

size_t Arguments::Rows(std::string_view name, size_t ctx, size_t divisor) const {
  const std::string_view text = Text(name);
  if (text.empty() || text.back() != '%') return Count(name) / divisor;
  // The small term keeps exact products exact: 5 % of 2040 is 102, not 101.999....
  const double rows = Real(name) / 100 * static_cast<double>(ctx) / static_cast<double>(divisor);
  return static_cast<size_t>(std::floor(rows + 1e-9));
}

}  // namespace lesskv
