// KVzap (arXiv 2601.07891), trained to KVzip+ (arXiv 2505.23416): a row's score is a linear map of the layer's input at its
// token, one a KV head, fitted to the logarithm of what the row adds to the output where the model repeats the text:
//
//   score_h(t) = b_h + w_h x_t,  x_t: what enters the key projection, after the layer's norm
//
// It needs no attention statistics, never changes, and is the same for a prompt, a text that streams in and what is
// generated. The first `sinks` tokens and the newest `window` always stay; of the others those with the best scores.
#include <algorithm>

#include "base/error.h"
#include "kernels/basic/basic.h"
#include "kvcache/registry.h"
#include "kvcache/residual/find_sidecar.h"
#include "kvcache/residual/sidecar.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

class KvzapSelector final : public Selector {
 public:
  KvzapSelector(size_t rows, size_t window, size_t sinks, SidecarScores scores, std::string artefact)
      : rows_(rows), window_(window), sinks_(sinks), scores_(std::move(scores)), artefact_(std::move(artefact)) {
    first_.push_back(0);
    for (const size_t n : scores_.n_kv_heads) first_.push_back(first_.back() + n);
  }

  Growth After(StepKind, size_t) const override { return {true, rows_}; }
  size_t Window(size_t budget) const override { return std::min(sinks_ + window_, budget); }
  size_t Sinks() const override { return sinks_; }
  Votes votes() const override { return Votes::kKept; }
  bool ReadsInputs() const override { return true; }
  std::string artefact() const override { return artefact_; }
  size_t ArtefactBytes() const override { return (scores_.weight.size() + scores_.bias.size()) * sizeof(float); }

  void ScoreInput(size_t layer, const float* x, float* scores, size_t stride) const override {
    const size_t d = scores_.width;
    for (size_t head = first_[layer], h = 0; head < first_[layer + 1]; ++head, ++h)
      scores[h * stride] = scores_.bias[head] + Dot(x, &scores_.weight[head * d], d);
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const size_t window = Window(head.budget), recent = window - std::min(window, sinks_);
    const auto recent_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(recent);
    ChooseWorst(head, head.votes, {static_cast<int32_t>(sinks_), recent_from}, *layer.protect, head.n_leaving(), victims);
  }

 private:
  size_t rows_, window_, sinks_;
  SidecarScores scores_;
  std::string artefact_;
  std::vector<size_t> first_;  // heads before each layer
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

std::unique_ptr<const Selector> Make(const Arguments& arguments, const MethodContext& context) {
  const size_t rows = arguments.Rows("rows", context.ctx), sinks = arguments.Count("sinks");
  const size_t window = arguments.Has("window") ? arguments.Count("window") : std::min<size_t>(128, rows / 4);
  if (rows <= sinks + window)
    Fail(ErrorCode::kInvalidArgument, "kvzap: a budget of {} rows must exceed its {} sinks and window of {} (context {})",
         rows, sinks, window, context.ctx);
  if (context.layers.empty())  // no model: who only asks for the growth law needs no scores
    return std::make_unique<KvzapSelector>(rows, window, sinks, SidecarScores(), "");
  const FoundSidecar found = FindSidecar(arguments, context.sidecar, "kvzap", "scores", "kvzap");
  Sidecar sidecar = ReadSidecar(found.path);
  CheckModel(sidecar, found.path, context.sidecar.model_fingerprint, context.sidecar.model_identity);
  if (sidecar.scores.empty())
    Fail(ErrorCode::kNotFound, "{}: holds no scores (train them with 'lesskv train kvzap')", found.path);
  CheckShape(sidecar.scores, context, found.path);
  return std::make_unique<KvzapSelector>(rows, window, sinks, std::move(sidecar.scores), found.fingerprint);
}

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept, sinks and window included",
     .min = 1, .positional = true},
    {.name = "window", .kind = Parameter::Kind::kCount, .default_value = "",
     .help = "most recent tokens that stay; min(128, rows / 4) when not given"},
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
    .summary = "the tokens whose layer input has the best trained score stay, and the most recent ones",
    .reference = "arXiv 2601.07891, 2505.23416",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.evicts = true, .reads_sidecar = true, .votes_by_head = true}; },
    .validate = [](const Arguments& arguments) { RequireGiven(arguments, "kvzap", "rows", "kvzap(1024) or kvzap(5%)"); },
    .make_selector = Make,
    .example = "kvzap(5%)",
};

}  // namespace lesskv
