// A cache method from nothing, outside the library: docs/kv-cache.md walks through it. It keeps sinks, a recent window and
// a random sample of the tokens in between: the baseline that shows what choosing is worth.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kvcache/registry.h"
#include "kvcache/select/selection.h"

namespace lesskv::example {

class SampleSelector final : public Selector {
 public:
  SampleSelector(size_t rows, size_t recent) : rows_(rows), recent_(recent) {}

  // The growth law: after every step at most `rows_` rows. Plans, bounds and arenas follow from it.
  Growth After(StepKind, size_t) const override { return {true, rows_}; }
  // Rows that the method itself always keeps; protected tokens must fit beside them.
  size_t Window(size_t budget) const override { return std::min(recent_, budget); }
  // A vote for each row, made anew in each step.
  Votes votes() const override { return Votes::kStep; }

  void Observe(const LayerRows& layer, size_t kv_head) const override {
    const HeadRows& head = layer.heads[kv_head];
    for (size_t r = 0; r < head.n_rows(); ++r) head.votes[r] = Luck(head.positions[r]);
  }

  void Choose(const LayerRows& layer, size_t kv_head, std::vector<uint32_t>& victims) const override {
    const HeadRows& head = layer.heads[kv_head];
    const auto recent_from = static_cast<int32_t>(layer.tokens_seen) - static_cast<int32_t>(Window(head.budget));
    ChooseWorst(head, head.votes, {0, recent_from}, *layer.protect, head.n_leaving(), victims);
  }

 private:
  // The same number in [0, 1) for a position each time: what was kept once is kept until luckier tokens come.
  static float Luck(Position position) {
    const uint32_t x = static_cast<uint32_t>(ToInt(position)) * 2654435769u;
    return static_cast<float>((x ^ (x >> 15)) >> 8) / 16777216.0f;
  }

  size_t rows_, recent_;
};

inline constexpr Parameter kSampleParameters[] = {
    {.name = "rows", .kind = Parameter::Kind::kRows, .default_value = "", .help = "rows kept", .min = 1, .positional = true},
    {.name = "recent", .kind = Parameter::Kind::kCount, .default_value = "4", .help = "most recent rows that always stay"},
};

inline const Method kSampleMethod{
    .name = "sample",
    .stage = Stage::kSelect,
    .summary = "a random sample of the text, and the most recent tokens, stay",
    .reference = "",
    .parameters = kSampleParameters,
    .traits = [](const Arguments&) { return MethodTraits{.evicts = true, .votes_by_head = true}; },
    .validate = [](const Arguments& a) { RequireGiven(a, "sample", "rows", "sample(256) or sample(5%)"); },
    .make_selector = [](const Arguments& a, const MethodContext& context) -> std::unique_ptr<const Selector> {
      return std::make_unique<SampleSelector>(a.Rows("rows", context.ctx), a.Count("recent"));
    },
    .example = "sample(12)",
};

}  // namespace lesskv::example
