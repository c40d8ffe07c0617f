// Sinks and a recent window: keeps the first `sinks` tokens and the most recent ones. No scores, the same rows for all
// heads; the baseline every selector must beat at equal bytes.
//
// positions=true: keys keep their true rotary positions (Λ-masking, LM-Infinite, arXiv 2308.16137, as LESS uses it).
// positions=cache: keys are read at consecutive positions inside the cache (StreamingLLM, arXiv 2309.17453), so that the
// largest position ever used is rows + step and text can run far beyond the trained context.
#include "kvcache/select/window.h"

#include <algorithm>

#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

class WindowSelector final : public Selector {
 public:
  WindowSelector(size_t rows, size_t sinks, bool cache_positions)
      : rows_(rows), sinks_(sinks), cache_positions_(cache_positions) {}

  Growth After(StepKind, size_t) const override { return {true, rows_}; }
  bool KeepsOneSetALayer() const override { return true; }
  // The sinks and the newest token; how far the window reaches beyond it is what protected tokens may shorten.
  size_t Window(size_t budget) const override { return std::min(sinks_ + 1, budget); }
  size_t Sinks() const override { return sinks_; }
  bool UsesCachePositions() const override { return cache_positions_; }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const auto evictable = [&](uint32_t r) {
      return ToInt(head.positions[r]) >= static_cast<int32_t>(sinks_) && !layer.protect->Contains(head.positions[r]);
    };
    const auto older = [&](uint32_t a, uint32_t b) { return ToInt(head.positions[a]) < ToInt(head.positions[b]); };
    const auto n_rows = static_cast<uint32_t>(head.n_rows());
    if (head.n_leaving() == 1) {
      uint32_t oldest = n_rows;
      for (uint32_t r = 0; r < n_rows; ++r)
        if ((oldest == n_rows || older(r, oldest)) && evictable(r)) oldest = r;
      CHECK(oldest < n_rows, "no row may leave");
      return victims.push_back(oldest);
    }
    std::vector<uint32_t> rows;
    for (uint32_t r = 0; r < n_rows; ++r)
      if (evictable(r)) rows.push_back(r);
    TakeFirst(rows, head.n_leaving(), older, victims);
  }

 private:
  size_t rows_, sinks_;
  bool cache_positions_;
};

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept, sinks included",
     .min = 1, .positional = true},
    {.name = "sinks", .kind = Parameter::Kind::kCount, .default_value = "4", .help = "first tokens that always stay"},
    {.name = "extra", .kind = Parameter::Kind::kCount, .default_value = "0", .help = "rows added"},
    {.name = "positions", .kind = Parameter::Kind::kWord, .default_value = "true",
     .help = "rotary positions: true ones, or consecutive ones inside the cache", .choices = "true|cache"},
};

}  // namespace

std::unique_ptr<const Selector> MakeLocalSelector(size_t window) {
  return std::make_unique<WindowSelector>(std::max<size_t>(window, 2) - 1, 0, false);
}

extern const Method kWindowMethod{
    .name = "window",
    .stage = Stage::kSelect,
    .summary = "the first tokens (sinks) and the most recent ones stay",
    .reference = "arXiv 2309.17453, 2308.16137",
    .parameters = kParameters,
    .traits =
        [](const Arguments& arguments) {
          return MethodTraits{.renumbers_positions = arguments.Text("positions") == "cache", .evicts = true, .is_rival = true};
        },
    .validate = [](const Arguments& arguments) { RequireGiven(arguments, "window", "rows", "window(256) or window(5%)"); },
    .make_selector = [](const Arguments& arguments, const MethodContext& context) -> std::unique_ptr<const Selector> {
      const size_t rows = arguments.Rows("rows", context.ctx) + arguments.Count("extra");
      const size_t sinks = arguments.Count("sinks");
      if (rows <= sinks)
        Fail(ErrorCode::kInvalidArgument, "window: {} rows do not hold {} sinks and a recent token (context {})", rows,
             sinks, context.ctx);
      return std::make_unique<WindowSelector>(rows, sinks, arguments.Text("positions") == "cache");
    },
    .example = "window(5%)",
    .variant = "window(5%, positions=cache)",
};

}  // namespace lesskv
