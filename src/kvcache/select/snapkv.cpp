// SnapKV (Li et al., NeurIPS 2024, arXiv 2404.14469): at the end of a prompt each KV head keeps the last `window` tokens
// and the earlier ones that these window's queries voted for; nothing leaves while decoding.
//
//   s_j = sum over the window's queries of the softmax probability of j, mean over the query group
//   pooled over neighbouring rows (max, or average with zero padding and constant divisor), the best ones stay
//
// The group is reduced before pooling, and the kept set is one a KV head (the released code expands KV heads instead).
#include <algorithm>
#include <limits>
#include <numeric>

#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

class SnapkvSelector final : public Selector {
 public:
  SnapkvSelector(size_t rows, size_t window, size_t kernel, bool average)
      : rows_(rows), window_(window), kernel_(kernel), average_(average) {}

  Growth After(StepKind kind, size_t) const override {
    return kind == StepKind::kDecode ? Growth{} : Growth{true, rows_};
  }
  size_t Window(size_t budget) const override { return std::min(window_, budget); }
  Observation Observes(StepKind kind) const override {
    if (kind == StepKind::kDecode) return {};
    return {.queries = Observation::Queries::kLast, .last = window_};
  }
  Votes votes() const override { return Votes::kStep; }

  // Votes of the rows before the window, pooled along increasing position; 0 for the window's own rows.
  void Observe(const LayerRows& layer, size_t h) const override {
    const HeadRows& head = layer.heads[h];
    const auto window_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(window_);
    std::vector<uint32_t> order;
    for (uint32_t r = 0; r < head.n_rows(); ++r)
      if (ToInt(head.positions[r]) < window_from) order.push_back(r);
    const auto earlier = [&](uint32_t a, uint32_t b) { return ToInt(head.positions[a]) < ToInt(head.positions[b]); };
    if (!std::is_sorted(order.begin(), order.end(), earlier)) std::sort(order.begin(), order.end(), earlier);

    const std::span<const float> sums = head.attention;
    const std::span<float> pooled = head.votes;
    std::fill(pooled.begin(), pooled.end(), 0.0f);
    const size_t half = kernel_ / 2;
    const float scale = 1.0f / static_cast<float>(layer.group);
    for (size_t i = 0; i < order.size(); ++i) {
      const size_t begin = i - std::min(i, half), end = std::min(order.size(), i + half + 1);
      float best = -std::numeric_limits<float>::infinity(), sum = 0;
      for (size_t j = begin; j < end; ++j) {
        best = std::max(best, sums[order[j]] * scale);
        sum += sums[order[j]] * scale;
      }
      pooled[order[i]] = average_ ? sum / static_cast<float>(kernel_) : best;
    }
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const auto window_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(Window(head.budget));
    ChooseWorst(head, head.votes, {0, window_from}, *layer.protect, head.n_leaving(), victims);
  }

 private:
  size_t rows_, window_, kernel_;
  bool average_;
};

void Validate(const Arguments& arguments) {
  RequireGiven(arguments, "snapkv", "rows", "snapkv(1024) or snapkv(5%)");
  if (arguments.Count("kernel") % 2 == 0)
    Fail(ErrorCode::kInvalidArgument, "cache spec: snapkv's kernel must be odd, not {}", arguments.Count("kernel"));
}

std::unique_ptr<const Selector> Make(const Arguments& arguments, const MethodContext& context) {
  const size_t rows = arguments.Rows("rows", context.ctx) + arguments.Count("extra");
  const size_t window = arguments.Has("window") ? arguments.Count("window") : std::clamp<size_t>(rows / 2, 1, 32);
  if (rows <= window)
    Fail(ErrorCode::kInvalidArgument, "snapkv: a capacity of {} rows must exceed its window of {} (context {})", rows,
         window, context.ctx);
  return std::make_unique<SnapkvSelector>(rows, window, arguments.Count("kernel"), arguments.Text("pool") == "avg");
}

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept of a prompt, window included",
     .min = 1, .positional = true},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "",
     .help = "last tokens that vote and stay; min(32, rows / 2) when not given", .min = 1},
    {.name = "kernel", .kind = Parameter::Kind::kCount, .default_value = "7", .help = "rows pooled, odd", .min = 1,
     .max = 1001},
    {.name = "pool", .kind = Parameter::Kind::kWord, .default_value = "max", .help = "how votes are pooled",
     .choices = "max|avg"},
    {.name = "extra", .kind = Parameter::Kind::kCount, .default_value = "0", .help = "rows added"},
};

}  // namespace

extern const Method kSnapkvMethod{
    .name = "snapkv",
    .stage = Stage::kSelect,
    .summary = "at a prompt's end, the tokens its last queries vote for stay; nothing leaves while decoding",
    .reference = "arXiv 2404.14469",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.evicts = true, .votes_by_head = true}; },
    .validate = Validate,
    .make_selector = Make,
    .example = "snapkv(10%)",
};

}  // namespace lesskv
