// Cascading cache (Willette et al., ICLR 2025, arXiv 2406.17808): the recent window is cut into rings. Ring 0 takes every
// token; ring i takes what falls off ring i - 1 at one in 2^i arrivals, and in between keeps the better of the token that
// falls and its own newest one. The rows are as many as a window's, and reach about (2^levels - 1) / levels times as far.
//
//   score_j <- b^n score_j + sum over the step's n queries m of b^(n-1-m) p_mj, reduced over the query group; then the
//   step's tokens are pushed in order of their positions.
//
// Rings need no state of their own. A token never passes another, so ring i holds the rows of one range of ranks by
// position, and when a ring accepts follows from the arriving token's position: rings are found anew in each step.
// With one level nothing is scored and the rows are those of `window`.
#include <algorithm>
#include <cmath>
#include <vector>

#include "base/check.h"
#include "base/error.h"
#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv {
namespace {

enum class Reduction { kMax, kMean, kMedian };

// The rings of one head while a step's tokens are pushed. Rows beyond what the rings hold are lost.
class Rings {
 public:
  // capacity rows in all, divided evenly; what does not divide widens ring 0, so that rings of no row have no use.
  Rings(size_t capacity, size_t levels, std::span<const float> scores) : scores_(scores), rows_(capacity) {
    const size_t width = capacity / levels;
    size_t first = 0;
    for (size_t i = 0; i < levels && first < capacity; ++i) {
      const size_t own = i == 0 ? capacity - (levels - 1) * width : width;
      rings_.push_back({&rows_[first], own, 0, 0});
      first += own;
    }
  }

  // Resident rows, the oldest first: the newest fill ring 0, then ring 1, ...
  void Fill(std::span<const uint32_t> rows, std::vector<uint32_t>& lost) {
    for (Ring& ring : rings_) {
      ring.count = std::min(ring.width, rows.size());
      std::copy(rows.end() - static_cast<ptrdiff_t>(ring.count), rows.end(), ring.rows);
      rows = rows.first(rows.size() - ring.count);
      held_ += ring.count;
    }
    lost.insert(lost.end(), rows.begin(), rows.end());
  }

  // `clock`: the arriving token's place behind the sinks. While filling (`eager`) every ring accepts.
  void Push(uint32_t row, size_t clock, bool eager, std::vector<uint32_t>& lost) {
    eager = eager || held_ < rows_.size();
    for (size_t i = 0; i < rings_.size(); ++i) {
      Ring& ring = rings_[i];
      if (eager || clock % (size_t{1} << i) == 0) {
        if (ring.count < ring.width) {
          ring.rows[(ring.start + ring.count++) % ring.width] = row;
          ++held_;
          return;
        }
        std::swap(row, ring.rows[ring.start]);
        ring.start = (ring.start + 1) % ring.width;
      } else {
        uint32_t& newest = ring.rows[(ring.start + ring.count - 1) % ring.width];
        if (scores_[row] >= scores_[newest]) std::swap(row, newest);
        break;
      }
    }
    lost.push_back(row);
  }

 private:
  struct Ring {
    uint32_t* rows;  // [width], the oldest at `start`
    size_t width, start, count;
  };

  std::span<const float> scores_;
  std::vector<uint32_t> rows_;
  std::vector<Ring> rings_;
  size_t held_ = 0;
};

class CascadeSelector final : public Selector {
 public:
  struct Options {
    size_t rows, levels, sinks;
    double decay;
    Reduction reduction;
    bool cache_positions;
  };
  explicit CascadeSelector(const Options& options) : options_(options) {}

  Growth After(StepKind, size_t) const override { return {true, options_.rows}; }
  // The sinks and the newest token; protected tokens may shorten the rings down to it.
  size_t Window(size_t budget) const override { return std::min(options_.sinks + 1, budget); }
  size_t Sinks() const override { return options_.sinks; }
  bool UsesCachePositions() const override { return options_.cache_positions; }
  bool KeepsOneSetALayer() const override { return options_.levels == 1; }
  Votes votes() const override { return options_.levels == 1 ? Votes::kNone : Votes::kKept; }
  Observation Observes(StepKind) const override {
    if (options_.levels == 1) return {};
    return {.queries = Observation::Queries::kAll,
            .by_query_head = options_.reduction != Reduction::kMean,
            .decay = static_cast<float>(options_.decay)};
  }

  void Observe(const LayerRows& layer, size_t h) const override {
    if (options_.levels == 1) return;
    const HeadRows& head = layer.heads[h];
    const size_t n = head.n_rows();
    const auto kept = static_cast<float>(std::pow(options_.decay, static_cast<double>(layer.n_step)));
    std::vector<float> received(options_.reduction == Reduction::kMean ? 1 : layer.group);
    for (size_t r = 0; r < n; ++r) {
      for (size_t g = 0; g < received.size(); ++g) received[g] = head.attention[g * n + r];
      head.votes[r] = kept * head.votes[r] + Reduce(received);
    }
  }

  void Choose(const LayerRows& layer, size_t h, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[h];
    if (head.n_leaving() == 0) return;
    const auto n_rows = static_cast<uint32_t>(head.n_rows());
    std::vector<uint32_t> order;  // of the rows that rings hold, the oldest first
    size_t n_protected = 0;
    for (uint32_t r = 0; r < n_rows; ++r) {
      if (ToInt(head.positions[r]) < static_cast<int32_t>(options_.sinks)) continue;
      if (layer.protect->Contains(head.positions[r])) ++n_protected;
      else order.push_back(r);
    }
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return ToInt(head.positions[a]) < ToInt(head.positions[b]); });
    CHECK(head.budget > options_.sinks + n_protected, "{} rows do not hold what always stays", head.budget);
    PushAll(head, n_rows - layer.n_step, order, head.budget - options_.sinks - n_protected, victims);
    std::sort(victims.begin(), victims.end());
  }

 private:
  // Rows from first_new on arrive. The rings hold `capacity` rows, however many of the step's tokens are protected.
  void PushAll(const HeadRows& head, size_t first_new, std::span<const uint32_t> order, size_t capacity,
               std::vector<uint32_t>& victims) const {
    Rings rings(capacity, options_.levels, head.votes);
    size_t n_old = 0;
    while (n_old < order.size() && order[n_old] < first_new) ++n_old;
    rings.Fill(order.first(n_old), victims);
    for (const uint32_t row : order.subspan(n_old)) {
      const size_t clock = static_cast<size_t>(ToInt(head.positions[row])) - options_.sinks;
      rings.Push(row, clock, clock + options_.sinks <= head.budget, victims);
    }
  }

  float Reduce(std::vector<float>& received) const {
    if (received.size() == 1) return received[0];
    if (options_.reduction == Reduction::kMax) return *std::max_element(received.begin(), received.end());
    const auto middle = received.begin() + static_cast<ptrdiff_t>((received.size() - 1) / 2);
    std::nth_element(received.begin(), middle, received.end());
    return *middle;
  }

  Options options_;
};

std::unique_ptr<const Selector> Make(const Arguments& arguments, const MethodContext& context) {
  CascadeSelector::Options options;
  const size_t extra = arguments.Count("extra");
  options.rows = arguments.Rows("rows", context.ctx) + extra;
  options.levels = arguments.Count("levels");
  options.sinks = arguments.Count("sinks");
  options.decay = arguments.Real("decay");
  const std::string_view heads = arguments.Text("heads");
  options.reduction = heads == "max" ? Reduction::kMax : heads == "mean" ? Reduction::kMean : Reduction::kMedian;
  options.cache_positions = arguments.Text("positions") == "cache";
  if (options.rows < options.sinks + options.levels)
    Fail(ErrorCode::kInvalidArgument, "cascade: {} rows do not hold {} sinks and a row for each of {} levels (context {})",
         options.rows, options.sinks, options.levels, context.ctx);
  const bool exact = !arguments.Text("rows").ends_with('%') && extra == 0;
  if (const size_t rings = options.rows - options.sinks; exact && rings % options.levels != 0)
    Fail(ErrorCode::kInvalidArgument, "cascade: {} rows behind {} sinks cannot be divided into {} levels; {} rows can",
         rings, options.sinks, options.levels, options.rows - rings % options.levels);
  return std::make_unique<CascadeSelector>(options);
}

constexpr Parameter kParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "",
     .help = "rows kept, sinks included; without the sinks a number divides by the levels, of a percentage the remainder "
             "falls to level 0",
     .min = 1, .positional = true},
    {.name = "levels", .kind = Parameter::Kind::kCount, .default_value = "4", .help = "rings; one keeps what window keeps",
     .min = 1, .max = 16},
    {.name = "sinks", .kind = Parameter::Kind::kCount, .default_value = "4",
     .help = "first tokens that always stay (the paper keeps 64)"},
    {.name = "extra", .kind = Parameter::Kind::kCount, .default_value = "0", .help = "rows added"},
    {.name = "positions", .kind = Parameter::Kind::kWord, .default_value = "cache",
     .help = "rotary positions: consecutive ones inside the cache, or true ones", .choices = "cache|true"},
    {.name = "heads", .kind = Parameter::Kind::kWord, .default_value = "max",
     .help = "how the scores of a group's query heads become one", .choices = "max|mean|median"},
    {.name = "decay", .kind = Parameter::Kind::kReal, .default_value = "0.9999999",
     .help = "what a score keeps from one query to the next", .min = 0, .max = 1},
    {.name = "block", .kind = Parameter::Kind::kCount, .default_value = "512",
     .help = "tokens of a prompt that are read together, each block attending what the one before left; 0 reads it in one "
             "step, attended in full; a prefill(chunk) term comes first",
     .max = 1 << 20},
};

}  // namespace

extern const Method kCascadeMethod{
    .name = "cascade",
    .stage = Stage::kSelect,
    .summary = "the first tokens stay, and of the others the more the nearer: rings that each take half of what falls off",
    .reference = "arXiv 2406.17808",
    .parameters = kParameters,
    .traits =
        [](const Arguments& arguments) {
          return MethodTraits{.renumbers_positions = arguments.Text("positions") == "cache",
                              .evicts = true,
                              .prompt_block = arguments.Count("block"),
                              .needs_single_rows = true,
                              .needs_known_rows = true,
                              .takes_no_fit = true};
        },
    .validate = [](const Arguments& arguments) { RequireGiven(arguments, "cascade", "rows", "cascade(1028) or cascade(5%)"); },
    .make_selector = Make,
    .example = "cascade(5%)",
};

}  // namespace lesskv
