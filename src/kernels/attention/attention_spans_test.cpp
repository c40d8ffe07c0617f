// One job over rows in several formats, keys and values cut at different rows, and rows behind a reader.
#include "kernels/attention/attention_problem.h"

namespace lesskv {
namespace {

class AttentionSpansTest : public AttentionIsaTest {};
INSTANTIATE_ISAS(AttentionSpansTest);

struct Mix {
  std::string name;
  std::vector<RowRun> keys, values;
};

// 700 rows. Runs end beside tiles, blocks and splits, and in the middle of the 128 rows that share a rounding.
std::vector<Mix> Mixes() {
  constexpr RowType kF32 = RowType::kF32, kF16 = RowType::kF16, kBF16 = RowType::kBF16, kQ8 = RowType::kQ8,
                    kQ4 = RowType::kQ4;
  return {{"old rows coded, new ones exact", {{640, kQ4}, {60, kF16}}, {{660, kQ4}, {40, kF16}}},
          {"every type", {{1, kQ8}, {300, kF32}, {15, kBF16}, {200, kQ4}, {184, kF16}},
           {{130, kF16}, {99, kQ8}, {27, kQ4}, {400, kBF16}, {44, kF32}}},
          {"alternating", {{17, kQ8}, {17, kQ4}, {17, kQ8}, {17, kF16}, {632, kQ8}},
           {{1, kQ4}, {1, kF32}, {1, kQ8}, {1, kF32}, {696, kQ4}}},
          {"readers of both sides", {{.n = 700, .reader = true}}, {{.n = 700, .reader = true}}},
          {"hooks of both sides", {{.n = 700, .reader = true, .hooks = true}},
           {{.n = 700, .reader = true, .hooks = true}}},
          {"reader, region, reader", {{.n = 300, .reader = true, .hooks = true}, {7, kQ8}, {.n = 393, .reader = true}},
           {{.n = 31, .reader = true}, {600, kQ4}, {.n = 69, .reader = true, .hooks = true}}},
          {"some channels of old keys", {{.n = 650, .type = kF16, .narrow = true}, {50, kF16}}, {{700, kF16}}},
          {"some channels of every type",
           {{.n = 17, .type = kQ8, .narrow = true}, {3, kQ8}, {.n = 230, .type = kF32, .narrow = true},
            {.n = 150, .type = kQ4, .narrow = true}, {20, kQ4}, {.n = 200, .type = kBF16, .narrow = true}, {80, kBF16}},
           {{130, kF16}, {570, kQ8}}}};
}

Case MixedCase(const Mix& mix, size_t n_queries) {
  Case c;
  c.key_runs = mix.keys;
  c.value_runs = mix.values;
  c.n_queries = n_queries;
  c.n_past = 700 - n_queries;
  c.group = 3;
  c.seed = n_queries;
  return c;
}

TEST_P(AttentionSpansTest, MixedLayoutsMatchFloat64) {
  for (const Mix& mix : Mixes()) {
    for (size_t n_queries : {1, 3, 21}) {
      for (size_t dim : {32, 96}) {
        SCOPED_TRACE(testing::Message() << mix.name << ", queries " << n_queries << ", dim " << dim);
        Case c = MixedCase(mix, n_queries);
        c.dim = dim;
        ExpectMatches(c);
      }
    }
  }
}

TEST_P(AttentionSpansTest, CutsOfEitherSideDoNotChangeABit) {
  Rng rng(3);
  for (const Mix& mix : Mixes()) {
    for (size_t n_queries : {1, 4, 21}) {
      SCOPED_TRACE(testing::Message() << mix.name << ", queries " << n_queries);
      for (const ComputeType compute : {ComputeType::kF32, ComputeType::kBF16}) {
        Case c = MixedCase(mix, n_queries);
        c.compute = compute;
        const Problem problem(c);
        const Ask ask = {.keep = n_queries == 1};
        const ThreadPool one(1), two(2);
        const ThreadScope alone(one);
        const Result whole = problem.Run(OneSpan(700), ask);
        for (size_t longest : {2, 50, 400}) {
          const ThreadScope scope(two);
          const Layout keys = RandomLayout(700, rng, longest), values = RandomLayout(700, rng, longest * 2);
          ExpectSameBits(whole, problem.RunCut(keys, values, ask));
        }
      }
    }
  }
}

// Quantised rows meet one to four queries at a time, in vectors of channels and of rows, whose lanes a window or the end
// of a span cuts off anywhere.
TEST_P(AttentionSpansTest, CodedRowsOfAnyGroupAndWidth) {
  Rng rng(5);
  for (RowType type : {RowType::kQ8, RowType::kQ4}) {
    for (size_t dim : {32, 64, 96, 128, 256}) {
      for (size_t group : {1, 2, 3, 4, 7, 8}) {
        SCOPED_TRACE(testing::Message() << Name(type) << " dim " << dim << " group " << group);
        Case c;
        c.key_type = c.value_type = type;
        c.dim = dim;
        c.group = group;
        c.n_past = 290 + group;
        c.first_position = 500;
        c.window = group % 2 == 0 ? 301 : 0;
        c.seed = dim + group;
        ExpectMatches(c);
        const Problem problem(c);
        const Ask ask = {.keep = true};
        ExpectSameBits(problem.Run(OneSpan(c.n_rows()), ask),
                       problem.RunCut(RandomLayout(c.n_rows(), rng, 40), RandomLayout(c.n_rows(), rng, 90), ask));
      }
    }
  }
}

// Rows of one format beside each other are one format's rows: no bit tells where another job's spans ended.
TEST_P(AttentionSpansTest, RunsOfOneTypeAreOneRun) {
  for (RowType type : kTypes) {
    Case whole = MixedCase({"", {{700, type}}, {{700, type}}}, 1), parts = whole;
    parts.key_runs = {{100, type}, {0, RowType::kF32}, {600, type}};
    parts.value_runs = {{333, type}, {367, type}};
    ExpectSameBits(Problem(whole).Run(OneSpan(700)), Problem(parts).Run(OneSpan(700)));
  }
}

TEST_P(AttentionSpansTest, UnrotatedKeysOfAllLayouts) {
  for (const Mix& mix : Mixes()) {
    if (std::any_of(mix.keys.begin(), mix.keys.end(), [](const RowRun& run) { return run.narrow; })) continue;
    for (size_t n_queries : {1, 21}) {
      for (size_t hadamard_block : {0, 64}) {
        SCOPED_TRACE(testing::Message() << mix.name << ", queries " << n_queries << ", block " << hadamard_block);
        Case c = MixedCase(mix, n_queries);
        c.rope = n_queries == 1 ? RopeStyle::kHalves : RopeStyle::kInterleaved;
        c.hadamard_block = hadamard_block;
        ExpectMatches(c, 1e-8);
        const Problem problem(c);
        Rng rng(hadamard_block);
        ExpectSameBits(problem.Run(OneSpan(700)), problem.RunCut(RandomLayout(700, rng, 30), RandomLayout(700, rng, 90)));
      }
    }
  }
}

TEST_P(AttentionSpansTest, ReadersAreAskedOnceForEachRow) {
  for (const bool hooks : {false, true}) {
    Case c = MixedCase({"", {{.n = 700, .reader = true, .hooks = hooks}}, {{.n = 700, .reader = true, .hooks = hooks}}}, 1);
    const Problem problem(c);
    problem.Run(RandomLayout(700, *std::make_unique<Rng>(1), 500));
    const FloatReader &keys = problem.key_reader(hooks), &values = problem.value_reader(hooks);
    EXPECT_EQ(keys.scored, hooks ? 700 : 0);
    EXPECT_EQ(keys.expansions, hooks ? 700 : 1400);  // column sums expand once more
    EXPECT_EQ(values.summed, hooks ? 700 : 0);
    EXPECT_EQ(values.expansions, hooks ? 0 : 700);
    EXPECT_FALSE(keys.too_many || values.too_many);
  }
}

// What a reader scores is not rotated: with read positions it is expanded.
TEST_P(AttentionSpansTest, ReadersDoNotScoreUnrotatedKeys) {
  Case c = MixedCase({"", {{.n = 700, .reader = true, .hooks = true}}, {{700}}}, 1);
  c.rope = RopeStyle::kHalves;
  const Problem problem(c);
  problem.Run(OneSpan(700));
  EXPECT_EQ(problem.key_reader(true).scored, 0);
}

// Many queries always expand.
TEST_P(AttentionSpansTest, ReadersAreExpandedForManyQueries) {
  const Problem problem(MixedCase(Mixes()[4], 21));
  problem.Run(OneSpan(700));
  EXPECT_EQ(problem.key_reader(true).scored, 0);
  EXPECT_EQ(problem.value_reader(true).summed, 0);
  EXPECT_GE(problem.key_reader(true).expansions, 700);
}

}  // namespace
}  // namespace lesskv
