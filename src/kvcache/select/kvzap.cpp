// KVzap (arXiv 2601.07891), trained to KVzip+ (arXiv 2505.23416): a row's score is a linear map of the layer's input at its
// token, one a KV head, fitted to the logarithm of what the row adds to the output where the model repeats the text:
//
//   score_h(t) = b_h + w_h x_t,  x_t: what enters the key projection, after the layer's norm
//
// It needs no attention statistics, never changes, and is the same for a prompt, a text that streams in and what is
// generated. The first `sinks` tokens and the newest `window` always stay. Of the others those with the best scores do
// (`rows`), or, however many they are, those that reach `threshold` as they leave the window: dense text then keeps
// more rows, and each head its own number. With `max` beside it the best ones of them.
//
// Scores can be compared between heads. So `rows` are a mean: at a prompt's end the best scores of all layers and heads
// stay (scope=model), or of each layer's, or, with scope=head, each head keeps `rows`. While decoding a head keeps the
// number that it then has. Text that streams in has no end: a head there keeps what the same scope left it of the training
// texts, by the quantiles of its scores.
#include <algorithm>
#include <span>

#include "base/error.h"
#include "kernels/basic/basic.h"
#include "kvcache/budget/ada.h"
#include "kvcache/budget/budgeter.h"
#include "kvcache/budget/zigzag.h"
#include "kvcache/registry.h"
#include "kvcache/residual/find_sidecar.h"
#include "kvcache/residual/sidecar.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

struct KvzapOptions {
  size_t rows;  // at most; 0: as many as the threshold lets stay
  size_t window, sinks;
  float threshold;
  bool by_threshold;  // else `threshold` means nothing
};

class KvzapSelector final : public Selector {
 public:
  KvzapSelector(const KvzapOptions& options, std::shared_ptr<const SidecarScores> scores, std::string artefact)
      : rows_(options.rows),
        window_(options.window),
        sinks_(options.sinks),
        threshold_(options.threshold),
        by_threshold_(options.by_threshold),
        scores_(std::move(scores)),
        artefact_(std::move(artefact)) {
    first_.push_back(0);
    for (const size_t n : scores_->n_kv_heads) first_.push_back(first_.back() + n);
  }

  Growth After(StepKind, size_t tokens_seen) const override { return {true, rows_ > 0 ? rows_ : tokens_seen}; }
  bool SaysHowMany() const override { return by_threshold_; }
  bool KeepsAShare() const override { return rows_ == 0; }
  size_t Window(size_t budget) const override { return std::min(sinks_ + window_, budget); }
  size_t Sinks() const override { return sinks_; }
  Votes votes() const override { return Votes::kKept; }
  bool ReadsInputs() const override { return true; }
  std::string artefact() const override { return artefact_; }
  size_t ArtefactBytes() const override { return (scores_->weight.size() + scores_->bias.size()) * sizeof(float); }

  void ScoreInput(size_t layer, const float* x, float* scores, size_t stride) const override {
    const size_t d = scores_->width;
    for (size_t head = first_[layer], h = 0; head < first_[layer + 1]; ++head, ++h)
      scores[h * stride] = scores_->bias[head] + Dot(x, &scores_->weight[head * d], d);
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const size_t window = Window(head.budget), recent = window - std::min(window, sinks_);
    const auto recent_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(recent);
    const PositionRange old{static_cast<int32_t>(sinks_), recent_from};
    if (by_threshold_) ChooseBelow(head, old, *layer.protect, victims);
    if (victims.size() >= head.n_leaving()) return;
    victims.clear();  // those below the threshold are the worst, too
    ChooseWorst(head, head.votes, old, *layer.protect, head.n_leaving(), victims);
  }

 private:
  // Not-a-number reaches no threshold.
  void ChooseBelow(const HeadRows& head, PositionRange old, const ProtectedSet& protect,
                   std::vector<uint32_t>& victims) const {
    for (uint32_t r = 0; r < head.n_rows(); ++r) {
      if (head.votes[r] >= threshold_) continue;
      const Position p = head.positions[r];
      if (ToInt(p) >= old.begin && ToInt(p) < old.end && !protect.Contains(p)) victims.push_back(r);
    }
  }

  size_t rows_, window_, sinks_;
  float threshold_;
  bool by_threshold_;
  std::shared_ptr<const SidecarScores> scores_;
  std::string artefact_;
  std::vector<size_t> first_;  // heads before each layer
};

// The part of a head's training scores that reach a threshold, between the quantiles in proportion; none beyond the last.
double PartAbove(std::span<const float> quantiles, double threshold) {
  const auto after = std::upper_bound(quantiles.begin(), quantiles.end(), threshold);
  if (after == quantiles.begin()) return 1;
  if (after == quantiles.end()) return 0;
  const double low = static_cast<double>(after[-1]), high = static_cast<double>(after[0]);
  const double below = static_cast<double>(after - quantiles.begin()) + (threshold - low) / (high - low);
  return 1 - below / static_cast<double>(quantiles.size() + 1);
}

// Rows a head of one layer, or of all layers, `rows` on average: by the part of its scores above the threshold that as many
// rows of all heads reach.
std::vector<size_t> RowsByQuantiles(std::span<const float> quantiles, const BudgetRequest& request) {
  constexpr size_t kQuantiles = SidecarScores::kQuantiles;
  const size_t n = quantiles.size() / kQuantiles, least = std::max(request.least(), request.smallest);
  if (request.rows >= request.n_tokens || request.rows <= least) return std::vector<size_t>(n, request.rows);
  // Of less than a hundredth of the rows the quantiles know nothing more.
  const double ratio = std::max(0.01, static_cast<double>(request.rows - least) / static_cast<double>(request.n_tokens - least));
  std::vector<double> parts(n);
  const auto [lowest, highest] = std::minmax_element(quantiles.begin(), quantiles.end());
  double low = *lowest, high = *highest;
  for (int i = 0; i < 50; ++i) {
    const double threshold = (low + high) / 2;
    double sum = 0;
    for (size_t h = 0; h < n; ++h) sum += parts[h] = PartAbove(quantiles.subspan(h * kQuantiles, kQuantiles), threshold);
    (sum > ratio * static_cast<double>(n) ? low : high) = threshold;
  }
  return ZigzagRows(parts, request.rows, least, 0, request.n_tokens);
}

// scope=model and scope=layer.
class ScopeBudgeter final : public Budgeter {
 public:
  ScopeBudgeter(AllocationScope scope, std::shared_ptr<const SidecarScores> scores, std::string path)
      : scope_(scope), scores_(std::move(scores)), path_(std::move(path)) {}

  AllocationScope scope() const override { return scope_; }
  size_t ArtefactBytes() const override { return scores_->quantiles.size() * sizeof(float); }
  std::string WhyNoStream() const override {
    if (!scores_->quantiles.empty()) return {};
    return fmt::format("{} holds no quantiles of kvzap's scores, by which heads share rows while text streams in (make them with "
                       "'lesskv train kvzap', or give scope=head)", path_);
  }

  std::vector<size_t> Allocate(const BudgetRequest& request) const override {
    if (scores_->quantiles.empty()) return std::vector<size_t>(request.n_heads(), request.rows);
    const std::span<const float> all(scores_->quantiles);
    if (scope_ == AllocationScope::kModel) return RowsByQuantiles(all, request);
    std::vector<size_t> rows;
    for (const size_t n : request.n_kv_heads) {
      const std::vector<size_t> layer = RowsByQuantiles(all.subspan(rows.size() * SidecarScores::kQuantiles, n * SidecarScores::kQuantiles), request);
      rows.insert(rows.end(), layer.begin(), layer.end());
    }
    return rows;
  }
  void AllocateLayer(const LayerRows& layer, std::span<size_t> budgets) const override {
    DivideByVotes({&layer, 1}, 0, budgets);
  }
  void AllocateModel(const BudgetRequest&, std::span<const LayerRows> layers, std::span<size_t> budgets) const override {
    DivideByVotes(layers, 0, budgets);
  }

 private:
  AllocationScope scope_;
  std::shared_ptr<const SidecarScores> scores_;
  std::string path_;
};

void CheckShape(const SidecarScores& scores, const MethodContext& context, const std::string& path) {
  if (context.input_width == 0)
    Fail(ErrorCode::kInvalidArgument, "kvzap scores what enters a layer, which a cache without its model is not given");
  std::vector<size_t> heads;
  for (const LayerShape& layer : context.layers) heads.push_back(layer.n_kv_heads);
  if (heads != scores.n_kv_heads || scores.width != context.input_width)
    Fail(ErrorCode::kMismatch, "{}: scores for {} global layers of width {}, but the model has {} of width {}, or other KV heads",
         path, scores.n_kv_heads.size(), scores.width, heads.size(), context.input_width);
}

// What is given instead of rows: a threshold, and a cap or none.
KvzapOptions ReadOptions(const Arguments& arguments, size_t ctx) {
  const bool by_threshold = arguments.Has("threshold"), capped = !by_threshold || arguments.Has("max");
  KvzapOptions options{0, 128, arguments.Count("sinks"), 0, by_threshold};
  if (by_threshold) options.threshold = static_cast<float>(arguments.Real("threshold"));
  if (capped) options.rows = arguments.Rows(by_threshold ? "max" : "rows", ctx);
  if (arguments.Has("window"))
    options.window = arguments.Count("window");
  else if (capped)
    options.window = std::min<size_t>(128, options.rows / 4);
  if (capped && options.rows <= options.sinks + options.window)
    Fail(ErrorCode::kInvalidArgument, "kvzap: a budget of {} rows must exceed its {} sinks and window of {} (context {})",
         options.rows, options.sinks, options.window, ctx);
  return options;
}

struct FoundScores {
  std::shared_ptr<const SidecarScores> scores;
  std::string path, fingerprint;
};

FoundScores FindScores(const Arguments& arguments, const MethodContext& context) {
  const FoundSidecar found = FindSidecar(arguments, context.sidecar, "kvzap", "scores", "kvzap");
  auto scores = ShareTrained<SidecarScores>(found, context.sidecar, "kvzap", [&](const Sidecar& sidecar) {
    if (sidecar.scores.empty())
      Fail(ErrorCode::kNotFound, "{}: holds no scores (train them with 'lesskv train kvzap')", found.path);
    return std::make_shared<const SidecarScores>(sidecar.scores);
  });
  CheckShape(*scores, context, found.path);
  return {std::move(scores), found.path, found.fingerprint};
}

std::unique_ptr<const Selector> Make(const Arguments& arguments, const MethodContext& context) {
  const KvzapOptions options = ReadOptions(arguments, context.ctx);
  if (context.layers.empty())  // no model: who only asks for the growth law needs no scores
    return std::make_unique<KvzapSelector>(options, std::make_shared<const SidecarScores>(), "");
  FoundScores found = FindScores(arguments, context);
  return std::make_unique<KvzapSelector>(options, std::move(found.scores), found.fingerprint);
}

std::unique_ptr<const Budgeter> MakeDivider(const Arguments& arguments, const MethodContext& context) {
  const AllocationScope scope = arguments.Text("scope") == "model" ? AllocationScope::kModel : AllocationScope::kLayer;
  if (context.layers.empty()) return std::make_unique<ScopeBudgeter>(scope, std::make_shared<const SidecarScores>(), "");
  FoundScores found = FindScores(arguments, context);
  return std::make_unique<ScopeBudgeter>(scope, std::move(found.scores), found.path);
}

void Validate(const Arguments& arguments) {
  if (!arguments.Has("threshold")) RequireGiven(arguments, "kvzap", "rows", "kvzap(1024) or kvzap(5%), or a threshold");
  if (arguments.Has("threshold") && arguments.Has("rows"))
    Fail(ErrorCode::kInvalidArgument,
         "cache spec: kvzap keeps a number of rows or those that reach a threshold, not both; the most of these is its max");
  if (arguments.Has("threshold") && arguments.Has("scope"))
    Fail(ErrorCode::kInvalidArgument, "cache spec: kvzap's scope says among which heads its rows are shared, of which a threshold "
         "knows none");
  if (arguments.Has("max") && !arguments.Has("threshold"))
    Fail(ErrorCode::kInvalidArgument,
         "cache spec: kvzap's max bounds what a threshold keeps; its rows are a bound already");
}

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "",
     .help = "rows kept, sinks and window included, on average over what `scope` names", .min = 1, .positional = true},
    {.name = "scope", .kind = Parameter::Kind::kWord, .default_value = "model",
     .help = "among which rows the best ones stay at a prompt's end, where no budget or share term divides them: those of "
             "all layers and heads, of a layer's heads, or of a head alone",
     .choices = "model|layer|head"},
    {.name = "threshold", .kind = Parameter::Kind::kReal, .default_value = "",
     .help = "instead of rows: the score, in the model's own units, that a token must reach to stay when it leaves the window",
     .min = -1e9},
    {.name = "max", .kind = Parameter::Kind::kRows, .default_value = "",
     .help = "most rows that a threshold keeps, sinks and window included: the best ones", .min = 1},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "",
     .help = "most recent tokens that stay; 128, or a quarter of rows or max where that is less, when not given"},
    {.name = "sinks", .kind = Parameter::Kind::kCount, .default_value = "4", .help = "first tokens that stay"},
    {.name = "file", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the sidecar with the trained scores; when not given it is found as that of less"},
    {.name = "sidecar", .kind = Parameter::Kind::kText, .default_value = "",
     .help = "the fingerprint that the sidecar must have, 16 hexadecimal digits"},
};

}  // namespace

extern const Method kKvzapMethod{
    .name = "kvzap",
    .stage = Stage::kSelect,
    .summary = "the tokens whose layer input has the best trained score, or one that reaches a threshold, stay, and the "
               "most recent ones",
    .reference = "arXiv 2601.07891, 2505.23416",
    .parameters = kParameters,
    .traits =
        [](const Arguments& arguments) {
          const bool by_threshold = arguments.Has("threshold"), divides = !by_threshold && arguments.Text("scope") != "head";
          return MethodTraits{.evicts = true, .divides_rows = divides, .insists_on_scope = divides && arguments.Has("scope"),
                              .says_how_many = by_threshold, .reads_sidecar = true, .votes_by_head = true};
        },
    .validate = Validate,
    .make_selector = Make,
    .make_divider = MakeDivider,
    .example = "kvzap(5%)",
    .variant = "kvzap(threshold=-4)",
};

}  // namespace lesskv
