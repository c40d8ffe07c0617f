// H2O, heavy hitters (Zhang et al., NeurIPS 2023, arXiv 2306.14048), with the budgets and the decode-mode rules of LESS
// (arXiv 2402.09398, section 3 and the authors' code): a KV head keeps its most recent tokens and those that have
// received the most attention so far.
//
//   c_j += sum over the step's queries and the group's heads of the softmax probability of j, over exact tokens only
//   keep { j >= seen - recent } and the `heavy` largest c_j among the rest
#include <algorithm>

#include "kernels/basic/basic.h"
#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

class H2oSelector final : public Selector {
 public:
  H2oSelector(size_t heavy, size_t recent) : heavy_(heavy), recent_(recent) {}

  Growth After(StepKind, size_t) const override { return {true, heavy_ + recent_}; }
  size_t Window(size_t budget) const override {
    return budget == heavy_ + recent_ ? recent_ : std::min(recent_, budget / 2);
  }
  Observation Observes(StepKind) const override { return {.queries = Observation::Queries::kAll}; }
  Votes votes() const override { return Votes::kKept; }

  void Observe(const LayerRows& layer, size_t h) const override {
    const HeadRows& head = layer.heads[h];
    Add(head.votes.data(), head.attention.data(), head.n_rows());
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const auto recent_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(Window(head.budget));
    ChooseWorst(head, head.votes, {0, recent_from}, *layer.protect, head.n_leaving(), victims);
  }

 private:
  size_t heavy_, recent_;
};

void Validate(const Arguments& arguments) {
  const bool split = arguments.Has("heavy") || arguments.Has("recent");
  if (split && arguments.Has("rows"))
    Fail(ErrorCode::kInvalidArgument, "cache spec: h2o takes either a total of rows or heavy and recent, not both");
  if (split ? !(arguments.Has("heavy") && arguments.Has("recent")) : !arguments.Has("rows"))
    Fail(ErrorCode::kInvalidArgument,
         "cache spec: h2o needs its rows, such as h2o(256), h2o(5%) or h2o(heavy=128, recent=128)");
}

std::unique_ptr<const Selector> Make(const Arguments& arguments, const MethodContext& context) {
  size_t heavy, recent;
  if (arguments.Has("heavy")) {
    heavy = arguments.Rows("heavy", context.ctx);
    recent = arguments.Rows("recent", context.ctx);
  } else if (arguments.Text("rows").ends_with('%')) {
    heavy = recent = arguments.Rows("rows", context.ctx, 2);
  } else {
    recent = arguments.Rows("rows", context.ctx, 2);
    heavy = arguments.Rows("rows", context.ctx) - recent;
  }
  const size_t extra = arguments.Count("extra");
  heavy += (extra + 1) / 2;
  recent += extra / 2;
  if (heavy + recent == 0)
    Fail(ErrorCode::kInvalidArgument, "h2o: a budget of 0 rows keeps nothing (context {})", context.ctx);
  return std::make_unique<H2oSelector>(heavy, recent);
}

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "",
     .help = "rows kept, half heavy, half recent (of a percentage each half is rounded down, as in the paper)", .min = 1,
     .positional = true},
    {.name = "heavy", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept for their score"},
    {.name = "recent", .kind = Parameter::Kind::kRows, .default_value = "", .help = "most recent rows kept"},
    {.name = "extra", .kind = Parameter::Kind::kCount, .default_value = "0",
     .help = "rows added, the odd one to heavy (Baseline+)"},
};

}  // namespace

extern const Method kH2oMethod{
    .name = "h2o",
    .stage = Stage::kSelect,
    .summary = "heavy hitters by accumulated attention, and the most recent tokens, stay",
    .reference = "arXiv 2306.14048, 2402.09398",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.evicts = true, .votes_by_head = true, .is_rival = true}; },
    .validate = Validate,
    .make_selector = Make,
    .example = "h2o(5%)",
};

}  // namespace lesskv
