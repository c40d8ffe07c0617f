// Elastic Cache (Liu et al., ECCV 2024, arXiv 2407.18121): a share gamma of the tokens seen stays. At a prompt's end the
// tokens that received the most attention become anchors, one set a layer, and every other token is averaged into the
// nearest anchor; while decoding the token at one fixed place in the cache is deleted.
//
//   I_n = mean over the layer's query heads of the sum over queries m >= n of p_mn
//   rows after N tokens: ceil(gamma N), at least first + last + 1
//
// Choices, where paper and code differ: anchors are ranked by importance itself (the code compares the values of an
// argsort as if they were ranks), ties keep the lower position, positions stay true, and the first and last tokens of a
// prompt are neither merged nor merged into. A later prompt's tokens are merged among themselves.
//
// The fixed place needs no number: at a prompt's end the rows before it are marked frozen in their votes, and decoding
// deletes the oldest row that is not.
#include <algorithm>
#include <cmath>
#include <optional>

#include "kernels/basic/basic.h"
#include "kvcache/registry.h"
#include "kvcache/residual/merging.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

constexpr float kFrozen = -1;  // as a vote; importance is not negative

class ElasticSelector final : public Selector {
 public:
  struct Options {
    double gamma;
    size_t first, last, distance;
    std::optional<size_t> at;
    bool merges, weighted, unrotated;
  };
  explicit ElasticSelector(const Options& options) : options_(options) {}

  Growth After(StepKind, size_t tokens_seen) const override {
    // The small term keeps exact products exact, as for percentages.
    const auto share = static_cast<size_t>(std::ceil(options_.gamma * static_cast<double>(tokens_seen) - 1e-9));
    return {true, std::max(share, Window(tokens_seen))};
  }
  size_t Window(size_t budget) const override { return std::min(options_.first + options_.last + 1, std::max<size_t>(budget, 1)); }
  bool KeepsAShare() const override { return true; }
  bool KeepsOneSetALayer() const override { return true; }
  Votes votes() const override { return Votes::kKept; }
  Weights weights() const override {
    return !options_.merges ? Weights::kNone : options_.weighted ? Weights::kInLogits : Weights::kKept;
  }
  bool WantsUnrotatedKeys() const override { return options_.unrotated; }
  Observation Observes(StepKind kind) const override {
    return {.queries = kind == StepKind::kPrompt ? Observation::Queries::kAll : Observation::Queries::kNone};
  }

  // Importance of the prompt's own tokens, the same for all heads. Where none of them must leave the rows before the
  // fixed place are frozen at once.
  void Observe(const LayerRows& layer, size_t h) const override {
    if (layer.kind != StepKind::kPrompt) return;
    const HeadRows& own = layer.heads[h];
    const size_t first = own.n_rows() - layer.n_step;
    const std::span<float> importance = own.votes.subspan(first);
    for (const HeadRows& head : layer.heads) Add(importance.data(), head.attention.data() + first, layer.n_step);
    Scale(importance.data(), 1 / static_cast<float>(layer.heads.size() * layer.group), layer.n_step);
    for (float& x : importance) x = x == x ? x : 0;  // not a number is no importance
    if (own.n_leaving() == 0) Freeze(own, {});
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    const uint32_t best = BestCandidate(layer, head);
    std::vector<uint32_t> rows;
    for (uint32_t r = 0; r < head.n_rows(); ++r)
      if (!Stays(layer, head, r)) rows.push_back(r);
    const auto first_new = static_cast<uint32_t>(head.n_rows() - layer.n_step);
    // A prompt's own tokens go first, all but one that the others merge into; then deletion at the fixed place; the
    // frozen rows, from their end, only where a budget leaves nothing else.
    const auto rank = [&](uint32_t r) {
      if (r == best) return 3;
      if (layer.kind == StepKind::kPrompt && r >= first_new) return 0;
      return head.votes[r] == kFrozen ? 2 : 1;
    };
    const auto before = [&](uint32_t a, uint32_t b) {
      const int rank_a = rank(a), rank_b = rank(b);
      if (rank_a != rank_b) return rank_a < rank_b;
      if (rank_a == 0 && head.votes[a] != head.votes[b]) return head.votes[a] < head.votes[b];
      const bool older = ToInt(head.positions[a]) < ToInt(head.positions[b]);
      return rank_a == 1 ? older : !older;
    };
    TakeFirst(rows, head.n_leaving(), before, victims);
    if (layer.kind == StepKind::kPrompt) Freeze(head, victims);
  }

  // A prompt's tokens are merged into its anchors; what is deleted has no target here.
  void Decide(const LayerRows& layer, size_t h, std::span<Departure> departures) const override {
    if (!options_.merges || layer.kind != StepKind::kPrompt) return;
    const HeadRows& head = layer.heads[h];
    const auto is_new = [&](uint32_t r) { return r >= head.n_rows() - layer.n_step; };
    MergeIntoNearest(head, departures, is_new, [&](uint32_t r) { return is_new(r) && !Stays(layer, head, r); });
  }

 private:
  // First tokens, protected ones and the newest ones: of a prompt its last tokens, else the step's last.
  bool Stays(const LayerRows& layer, const HeadRows& head, uint32_t row) const {
    const auto at = static_cast<size_t>(ToInt(head.positions[row]));
    const size_t newest = layer.kind == StepKind::kPrompt ? options_.last : 1;
    return at < options_.first || at + newest >= layer.tokens_seen || layer.protect->Contains(head.positions[row]);
  }

  // The most important of a prompt's tokens that may leave; n_rows when there is none.
  uint32_t BestCandidate(const LayerRows& layer, const HeadRows& head) const {
    auto best = static_cast<uint32_t>(head.n_rows());
    if (layer.kind != StepKind::kPrompt) return best;
    for (auto r = static_cast<uint32_t>(head.n_rows() - layer.n_step); r < head.n_rows(); ++r)
      if (!Stays(layer, head, r) && (best == head.n_rows() || head.votes[r] > head.votes[best])) best = r;
    return best;
  }

  // Marks the rows before the fixed place, in order of positions, of those that stay.
  void Freeze(const HeadRows& head, const std::vector<uint32_t>& victims) const {
    std::vector<uint32_t> staying;
    for (uint32_t r = 0; r < head.n_rows(); ++r)
      if (!std::binary_search(victims.begin(), victims.end(), r)) staying.push_back(r);
    std::sort(staying.begin(), staying.end(),
              [&](uint32_t a, uint32_t b) { return ToInt(head.positions[a]) < ToInt(head.positions[b]); });
    const size_t n = staying.size();
    const size_t at = options_.at ? *options_.at : n - std::min(n, options_.distance);
    const size_t place = std::min(std::max(at, options_.first), n - 1);
    for (size_t i = 0; i < n; ++i) head.votes[staying[i]] = i < place ? kFrozen : 0;
  }

  Options options_;
};

std::unique_ptr<const Selector> Make(const Arguments& arguments, const MethodContext&) {
  ElasticSelector::Options options;
  options.gamma = arguments.Real("gamma");
  options.first = arguments.Count("first");
  options.last = arguments.Count("last");
  options.distance = arguments.Count("distance");
  if (arguments.Has("at")) options.at = arguments.Count("at");
  options.merges = arguments.Text("merge") == "on";
  options.weighted = arguments.Text("weighted") == "true";
  options.unrotated = arguments.Text("keys") == "unrotated";
  return std::make_unique<ElasticSelector>(options);
}

void Validate(const Arguments& arguments) {
  RequireGiven(arguments, "elastic", "gamma", "elastic(0.2)");
  if (arguments.Real("gamma") == 0)
    Fail(ErrorCode::kInvalidArgument, "cache spec: elastic's gamma, the share of tokens that stay, must be above 0");
  if (arguments.Has("at") && arguments.Has("distance"))
    Fail(ErrorCode::kInvalidArgument, "cache spec: elastic deletes at a place or at a distance from the end, not both");
  if (arguments.Text("merge") == "off" && (arguments.Has("weighted") || arguments.Has("keys")))
    Fail(ErrorCode::kInvalidArgument, "cache spec: elastic with merge=off has no merged rows, so {} has nothing to do",
         arguments.Has("weighted") ? "weighted=true" : "keys=unrotated");
}

constexpr Parameter kParameters[] = {
    {.name = "gamma", .kind = Parameter::Kind::kReal, .default_value = "", .help = "share of the tokens seen that stay",
     .min = 0, .max = 1, .positional = true},
    {.name = "merge", .kind = Parameter::Kind::kWord, .default_value = "on",
     .help = "a prompt's other tokens are averaged into the nearest anchor, or leave", .choices = "on|off"},
    {.name = "keys", .kind = Parameter::Kind::kWord, .default_value = "rotated",
     .help = "keys are averaged rotated to their positions, or before rotation and read at the anchor's",
     .choices = "rotated|unrotated"},
    {.name = "weighted", .kind = Parameter::Kind::kWord, .default_value = "false",
     .help = "the logarithm of a merged row's tokens is added to its scores", .choices = "true|false"},
    {.name = "first", .kind = Parameter::Kind::kCount, .default_value = "1", .help = "first tokens that stay as they are"},
    {.name = "last", .kind = Parameter::Kind::kCount, .default_value = "1",
     .help = "last tokens of a prompt that stay as they are"},
    {.name = "distance", .kind = Parameter::Kind::kCount, .default_value = "25",
     .help = "rows from the end of a cut prompt to the place at which decoding deletes"},
    {.name = "at", .kind = Parameter::Kind::kCount, .default_value = "", .help = "that place itself, counted from the start"},
};

}  // namespace

extern const Method kElasticMethod{
    .name = "elastic",
    .stage = Stage::kSelect,
    .summary = "a share of the tokens stays: of a prompt the most attended ones, which the others are averaged into; while "
               "decoding the token at a fixed place is deleted",
    .reference = "arXiv 2407.18121",
    .parameters = kParameters,
    .traits =
        [](const Arguments& arguments) {
          const bool merges = arguments.Text("merge") == "on";
          return MethodTraits{.evicts = true, .acts_in_stream = false, .needs_rewrites = merges,
                              .needs_single_rows = true, .same_rows = true, .takes_no_fit = true};
        },
    .validate = Validate,
    .make_selector = Make,
    .example = "elastic(0.5)",
};

}  // namespace lesskv
