// Merging as a residual: a token that leaves is averaged into the nearest row of its head that stays, by weights.
//
//   k <- (W k + w k_victim) / (W + w), v likewise, W <- W + w; W and w start at 1
//
// Rotated keys are averaged as they are, which shrinks the channels that turn fast; keys=unrotated has the store keep
// them unrotated, so that means are taken before rotation and read at the position of the row that stays.
#include "kvcache/registry.h"
#include "kvcache/residual/merging.h"
#include "kvcache/residual/residual.h"

namespace lesskv {
namespace {

class MergeResidual final : public Residual {
 public:
  MergeResidual(bool in_logits, bool unrotated) : in_logits_(in_logits), unrotated_(unrotated) {}

  Weights weights() const override { return in_logits_ ? Weights::kInLogits : Weights::kKept; }
  bool WantsUnrotatedKeys() const override { return unrotated_; }

  void Decide(const LayerRows& layer, size_t h, std::span<Departure> departures) const override {
    std::vector<char> undecided(layer.heads[h].n_rows());
    for (const Departure& departure : departures) undecided[departure.row] = departure.fate == Fate::kDrop;
    MergeIntoNearest(layer.heads[h], departures, [&](uint32_t row) { return undecided[row] != 0; },
                     [](uint32_t) { return true; });
  }

 private:
  bool in_logits_, unrotated_;
};

constexpr Parameter kParameters[] = {
    {.name = "weighted", .kind = Parameter::Kind::kWord, .default_value = "false",
     .help = "the logarithm of a row's tokens is added to its scores", .choices = "true|false"},
    {.name = "keys", .kind = Parameter::Kind::kWord, .default_value = "rotated",
     .help = "keys are averaged rotated to their positions, or before rotation", .choices = "rotated|unrotated"},
};

}  // namespace

extern const Method kMergeMethod{
    .name = "merge",
    .stage = Stage::kResidual,
    .summary = "tokens that leave are averaged into the nearest row that stays",
    .reference = "arXiv 2407.18121",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.needs_eviction = true, .needs_rewrites = true}; },
    .make_residual = [](const Arguments& arguments, const MethodContext&) -> MadeResidual {
      return {std::make_unique<MergeResidual>(arguments.Text("weighted") == "true", arguments.Text("keys") == "unrotated"), ""};
    },
};

}  // namespace lesskv
