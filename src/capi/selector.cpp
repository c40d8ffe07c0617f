// Selectors that a caller registers: a method of the registry whose votes come from a C function.
#include <array>
#include <memory>
#include <string>
#include <utility>

#include "capi/handles.h"
#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

using namespace lesskv;        // NOLINT
using namespace lesskv::capi;  // NOLINT

namespace {

constexpr size_t kMaxSelectors = 64;
constexpr lesskv_selector kDefaults{sizeof kDefaults, nullptr, false, SIZE_MAX, nullptr, nullptr};

lesskv_step_kind KindOf(StepKind kind) {
  switch (kind) {
    case StepKind::kPrompt: return LESSKV_STEP_PROMPT;
    case StepKind::kStream: return LESSKV_STEP_STREAM;
    case StepKind::kDecode: break;
  }
  return LESSKV_STEP_DECODE;
}

class CallersSelector final : public Selector {
 public:
  CallersSelector(std::string name, const lesskv_selector& o, size_t rows, size_t recent)
      : name_(std::move(name)), o_(o), rows_(rows), recent_(recent) {}

  Growth After(StepKind, size_t) const override { return {true, rows_}; }
  size_t Window(size_t budget) const override { return std::min(recent_, budget); }
  lesskv::Votes votes() const override { return o_.keeps_votes ? lesskv::Votes::kKept : lesskv::Votes::kStep; }
  Observation Observes(StepKind) const override {
    if (o_.last_queries == 0) return {};
    if (o_.last_queries == SIZE_MAX) return {.queries = Observation::Queries::kAll};
    return {.queries = Observation::Queries::kLast, .last = o_.last_queries};
  }

  void Observe(const LayerRows& layer, size_t h) const override {
    const HeadRows& head = layer.heads[h];
    if (!o_.keeps_votes) std::fill(head.votes.begin(), head.votes.end(), 0.0f);
    static_assert(sizeof(Position) == sizeof(int32_t));
    char sentence[512] = "";
    const lesskv_selector_rows rows{sizeof(lesskv_selector_rows), layer.layer, h, KindOf(layer.kind), layer.tokens_seen,
                                    layer.n_step, head.budget, head.n_rows(),
                                    reinterpret_cast<const int32_t*>(head.positions.data()),
                                    head.attention.empty() ? nullptr : head.attention.data(), head.votes.data(), sentence,
                                    sizeof sentence};
    const auto votes = [&] {
      const InVote scope;
      return o_.vote(&rows, o_.user_data);
    };
    if (votes()) return;
    sentence[sizeof sentence - 1] = 0;
    Fail(ErrorCode::kRuntime, "the selector '{}' failed: {}", name_, sentence[0] == 0 ? "it gave no reason" : sentence);
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const auto recent_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(Window(head.budget));
    ChooseWorst(head, head.votes, {0, recent_from}, *layer.protect, head.n_leaving(), victims);
  }

 private:
  std::string name_;
  lesskv_selector o_;
  size_t rows_, recent_;
};

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept", .min = 1, .positional = true},
    {.name = "recent", .kind = Parameter::Kind::kCount, .default_value = "4", .help = "most recent rows that always stay"},
};

// The registry's methods are plain functions without data of their own, so each name has a place, and a function that
// knows the place.
struct Place {
  std::string name, summary, example;
  lesskv_selector selector;
  Method method;
};
std::array<std::unique_ptr<Place>, kMaxSelectors> places;
std::mutex places_mutex;

template <size_t I>
std::unique_ptr<const Selector> MakeOf(const Arguments& arguments, const MethodContext& context) {
  const std::lock_guard lock(places_mutex);
  const size_t rows = arguments.Rows("rows", context.ctx);
  if (rows == 0)
    Fail(ErrorCode::kInvalidArgument, "{}: a budget of 0 rows keeps nothing (context {})", places[I]->name, context.ctx);
  return std::make_unique<CallersSelector>(places[I]->name, places[I]->selector, rows, arguments.Count("recent"));
}

template <size_t I>
void ValidateOf(const Arguments& arguments) {
  RequireGiven(arguments, places[I]->name, "rows", places[I]->example);
}

template <size_t... I>
void SetFunctions(Method& method, size_t at, std::index_sequence<I...>) {
  constexpr decltype(Method::make_selector) makers[] = {&MakeOf<I>...};
  constexpr decltype(Method::validate) validators[] = {&ValidateOf<I>...};
  method.make_selector = makers[at];
  method.validate = validators[at];
}

void RequireName(const char* name) {
  Require(name != nullptr, "a selector needs a name");
  const std::string_view all(name);
  const bool fits = !all.empty() && all.size() <= 64 && all[0] >= 'a' && all[0] <= 'z' &&
                    all.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string_view::npos;
  if (!fits)
    Fail(ErrorCode::kInvalidArgument, "a selector's name has 1 to 64 small letters, digits and underscores, a letter "
         "first; found '{}'", all.substr(0, 80));
}

void AddPlace(const char* name, const lesskv_selector& selector) {
  size_t at = 0;
  while (at < kMaxSelectors && places[at] != nullptr && places[at]->name != name) ++at;
  if (at == kMaxSelectors)
    Fail(ErrorCode::kInvalidArgument, "there are {} selectors already, none more fits", kMaxSelectors);
  if (places[at] != nullptr) {
    places[at]->selector = selector;
    return;
  }
  auto place = std::make_unique<Place>(Place{name, selector.summary == nullptr ? "" : selector.summary,
                                             std::string(name) + "(256)", selector, {}});
  place->method = {.name = place->name, .stage = Stage::kSelect, .summary = place->summary, .reference = "",
                   .parameters = kParameters,
                   .traits = [](const Arguments&) { return MethodTraits{.evicts = true, .votes_by_head = true}; },
                   .example = place->example};
  SetFunctions(place->method, at, std::make_index_sequence<kMaxSelectors>());
  RegisterMethod(place->method);
  places[at] = std::move(place);
}

}  // namespace

extern "C" {

lesskv_status lesskv_selector_init(lesskv_selector* selector, size_t size) { return Init(selector, size, kDefaults); }

lesskv_status lesskv_selector_register(const char* name, const lesskv_selector* selector) {
  return Guard([&] {
    RequireName(name);
    Require(selector != nullptr, "a selector needs its structure");
    lesskv_selector o = Options(selector, kDefaults);
    Require(o.vote != nullptr, "a selector needs its vote function");
    const std::lock_guard lock(places_mutex);
    AddPlace(name, o);
  });
}

}  // extern "C"
