// TOVA (Oren et al., arXiv 2401.06104): after a step, the rows with the most attention from the step's last query stay,
// averaged over all query heads of the layer, one set for all KV heads. No accumulation and no protected window: the
// current token competes like any other.
#include <algorithm>

#include "kernels/basic/basic.h"
#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

class TovaSelector final : public Selector {
 public:
  explicit TovaSelector(size_t rows) : rows_(rows) {}

  Growth After(StepKind, size_t) const override { return {true, rows_}; }
  bool KeepsOneSetALayer() const override { return true; }
  bool MustKeepOneSetALayer() const override { return true; }
  size_t Window(size_t) const override { return 0; }
  Observation Observes(StepKind) const override { return {.queries = Observation::Queries::kLast, .last = 1}; }
  Votes votes() const override { return Votes::kStep; }

  // All heads hold the same rows in the same order, since they have always lost the same ones.
  void Observe(const LayerRows& layer, size_t h) const override {
    const std::span<float> sum = layer.heads[h].votes;
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (const HeadRows& head : layer.heads) {
      CHECK(head.n_rows() == sum.size());
      Add(sum.data(), head.attention.data(), sum.size());
    }
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    ChooseWorst(head, head.votes, {}, *layer.protect, head.n_leaving(), victims);
  }

 private:
  size_t rows_;
};

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept", .min = 1,
     .positional = true},
    {.name = "extra", .kind = Parameter::Kind::kCount, .default_value = "0", .help = "rows added"},
};

}  // namespace

extern const Method kTovaMethod{
    .name = "tova",
    .stage = Stage::kSelect,
    .summary = "the tokens the last query attends to most stay, one set a layer",
    .reference = "arXiv 2401.06104",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.evicts = true}; },
    .validate = [](const Arguments& arguments) { RequireGiven(arguments, "tova", "rows", "tova(256) or tova(5%)"); },
    .make_selector = [](const Arguments& arguments, const MethodContext& context) -> std::unique_ptr<const Selector> {
      const size_t rows = arguments.Rows("rows", context.ctx) + arguments.Count("extra");
      if (rows == 0) Fail(ErrorCode::kInvalidArgument, "tova: a budget of 0 rows keeps nothing (context {})", context.ctx);
      return std::make_unique<TovaSelector>(rows);
    },
    .example = "tova(5%)",
};

}  // namespace lesskv
