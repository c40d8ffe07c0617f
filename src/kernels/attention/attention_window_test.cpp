// What a job may ask beyond plain attention: a sliding window, a bias a row, sums of each head.
#include "kernels/attention/attention_problem.h"

namespace lesskv {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

class AttentionWindowTest : public AttentionIsaTest {};
INSTANTIATE_ISAS(AttentionWindowTest);

Case WindowCase(size_t n_past, size_t n_queries, size_t window) {
  Case c;
  c.n_past = n_past;
  c.n_queries = n_queries;
  c.window = window;
  c.first_position = static_cast<int32_t>(n_past + n_past / 2);  // the past has gaps and lies in any order
  c.group = 2;
  c.dim = 32;
  c.seed = n_past + n_queries + window;
  return c;
}

// Rows that no query from `first` on sees received exactly 0.
void ExpectNothingReceived(const Problem& problem, const Case& c, size_t first, const std::vector<float>& received) {
  for (size_t r = 0; r < c.n_rows(); ++r) {
    bool seen = false;
    for (size_t m = first; m < c.n_queries; ++m) seen = seen || problem.Visible(m, r);
    if (!seen) {
      EXPECT_EQ(received[r], 0) << "row " << r;
    }
  }
}

TEST_P(AttentionWindowTest, WindowsMatchFloat64) {
  for (size_t n_past : {0, 20, 1300}) {
    for (size_t n_queries : {1, 4, 5, 300}) {
      if (Slow() && n_past + n_queries > 1400) continue;
      for (size_t window : {1, 2, 16, 257, 5000}) {
        SCOPED_TRACE(testing::Message() << n_past << " past, " << n_queries << " queries, window " << window);
        Case c = WindowCase(n_past, n_queries, window);
        ExpectMatches(c);
        const Problem problem(c);
        const Result result = problem.Run(OneSpan(c.n_rows()), {.first_query = n_queries / 2, .keep = n_queries == 1});
        ExpectNothingReceived(problem, c, n_queries / 2, result.sums);
        if (n_queries == 1) ExpectNothingReceived(problem, c, 0, result.received);
      }
    }
  }
}

TEST_P(AttentionWindowTest, CodedRowsInAWindow) {
  for (RowType type : {RowType::kF16, RowType::kQ8, RowType::kQ4}) {
    for (size_t n_queries : {1, 3, 40}) {
      SCOPED_TRACE(testing::Message() << Name(type) << ", queries " << n_queries);
      Case c = WindowCase(600, n_queries, 100);
      c.key_type = c.value_type = type;
      ExpectMatches(c);
    }
  }
}

TEST_P(AttentionWindowTest, AWindowOfOneIsTheRowItself) {
  for (size_t n_queries : {1, 70}) {
    Case c = WindowCase(30, n_queries, 1);
    c.group = 1;
    Problem problem(c);
    const Result result = problem.Run(OneSpan(c.n_rows()));
    for (size_t m = 0; m < n_queries; ++m)
      for (size_t i = 0; i < c.dim; ++i)
        EXPECT_NEAR(result.out[m * c.dim + i], problem.values()[(c.n_past + m) * c.dim + i], 1e-6);
  }
}

TEST_P(AttentionWindowTest, AWindowThatHoldsAllChangesNoBit) {
  for (size_t n_queries : {1, 60}) {
    Case c = WindowCase(300, n_queries, 100000);
    Case plain = c;
    plain.window = 0;
    const Ask ask = {.keep = n_queries == 1};
    ExpectSameBits(Problem(c).Run(OneSpan(c.n_rows()), ask), Problem(plain).Run(OneSpan(c.n_rows()), ask));
  }
}

TEST_P(AttentionWindowTest, NothingInReachGivesNothing) {
  for (size_t n_queries : {1, 9}) {
    Case c = WindowCase(1100, n_queries, 8);
    c.own_rows = false;
    Problem problem(c);
    for (int32_t& position : problem.past_positions()) position = std::min(position, c.first_position - 8);
    const Result result = problem.Run(OneSpan(c.n_rows()), {.keep = n_queries == 1});
    for (float x : result.out) EXPECT_EQ(x, 0);
    for (float x : result.lse) EXPECT_EQ(x, kNothing);
    for (float x : result.sums) EXPECT_EQ(x, 0);
    for (float x : result.received) EXPECT_EQ(x, 0);
  }
}

// Some of a step's queries see a past row, the later ones none at all.
TEST_P(AttentionWindowTest, LaterQueriesMaySeeNothing) {
  for (size_t n_queries : {3, 9}) {
    Case c = WindowCase(1, n_queries, 3);
    c.own_rows = false;
    Problem problem(c);
    problem.past_positions()[0] = c.first_position - 1;
    const Result result = problem.Run(OneSpan(1));
    for (size_t m = 0; m < n_queries; ++m) EXPECT_EQ(result.lse[m * c.group] == kNothing, m >= 2) << m;
    EXPECT_NEAR(result.sums[0], 2.0 * static_cast<double>(c.group), 1e-5);
  }
}

Case ReaderCase(size_t n_past, size_t n_queries, size_t window) {
  Case c = WindowCase(n_past, n_queries, window);
  c.first_position = static_cast<int32_t>(n_past);
  c.key_runs = c.value_runs = {{.n = c.n_rows(), .reader = true}};
  c.group = 4;
  return c;
}

// A tile of 48 queries reads the blocks of 256 rows that a window of 100 rows reaches: two, not all before it.
TEST_P(AttentionWindowTest, LongPromptsReadTheirWindowsOnly) {
  const size_t n = Slow() ? 1000 : 4000;
  const Case c = ReaderCase(0, n, 100);
  const Problem problem(c);
  problem.Run(OneSpan(n));
  const size_t tiles = (n + 47) / 48;
  EXPECT_LE(problem.value_reader(false).expansions, tiles * 512);
  EXPECT_LE(problem.key_reader(false).expansions, tiles * 512 + n);  // and each row once for the sums
  EXPECT_GE(problem.value_reader(false).expansions, n);
}

TEST_P(AttentionWindowTest, DecodeReadsSplitsInReachOnly) {
  const Case c = ReaderCase(4000, 1, 100);
  Problem problem(c);
  std::iota(problem.past_positions().begin(), problem.past_positions().end(), 0);
  problem.Run(OneSpan(c.n_rows()));
  EXPECT_LE(problem.value_reader(false).expansions, 1024);
  EXPECT_LE(problem.key_reader(false).expansions, 1024 + 256);
}

TEST_P(AttentionWindowTest, CutsAndThreadsDoNotChangeABit) {
  Rng rng(5);
  for (size_t n_queries : {1, 4, 50}) {
    for (RowType type : {RowType::kF16, RowType::kQ4}) {
      Case c = WindowCase(900, n_queries, 200);
      c.key_type = c.value_type = type;
      c.biased = true;
      const Problem problem(c);
      const Ask ask = {.keep = n_queries == 1, .by_head = true};
      const ThreadPool one(1), two(2);
      const ThreadScope alone(one);
      const Result whole = problem.Run(OneSpan(c.n_rows()), ask);
      const ThreadScope scope(two);
      const Layout keys = RandomLayout(c.n_rows(), rng, 60), values = RandomLayout(c.n_rows(), rng, 300);
      ExpectSameBits(whole, problem.RunCut(keys, values, ask));
    }
  }
}

TEST_P(AttentionWindowTest, BiasMatchesFloat64) {
  for (RowType type : {RowType::kF32, RowType::kF16, RowType::kQ8}) {
    for (size_t n_queries : {1, 3, 5, 90}) {
      for (size_t window : {0, 150}) {
        SCOPED_TRACE(testing::Message() << Name(type) << ", queries " << n_queries << ", window " << window);
        Case c = WindowCase(500, n_queries, window);
        c.key_type = c.value_type = type;
        c.biased = true;
        ExpectMatches(c);
      }
    }
  }
}

// A row of weight 2 is a row that is there twice; one of weight 0 is not there.
TEST_P(AttentionWindowTest, BiasIsTheLogarithmOfAWeight) {
  for (size_t n_queries : {1, 9}) {
    Case c = WindowCase(40, n_queries, 0);
    c.own_rows = false;
    c.biased = true;
    Problem weighted(c), repeated(c);
    std::fill(weighted.bias().begin(), weighted.bias().end(), 0.0f);
    repeated.bias() = weighted.bias();
    weighted.bias()[3] = std::log(2.0f);
    weighted.bias()[20] = weighted.bias()[39] = kNothing;
    repeated.bias()[39] = kNothing;
    for (auto rows : {&Problem::keys, &Problem::values})
      std::copy_n((repeated.*rows)().begin() + 3 * 32, 32, (repeated.*rows)().begin() + 20 * 32);
    const Ask ask = {.keep = n_queries == 1};
    const Result a = weighted.Run(OneSpan(40), ask), b = repeated.Run(OneSpan(40), ask);
    for (size_t i = 0; i < a.out.size(); ++i) EXPECT_NEAR(a.out[i], b.out[i], 1e-6);
    for (size_t i = 0; i < a.lse.size(); ++i) EXPECT_NEAR(a.lse[i], b.lse[i], 1e-6);
    EXPECT_NEAR(a.sums[3], b.sums[3] + b.sums[20], 1e-5);
    EXPECT_EQ(a.sums[20], 0);
    if (n_queries == 1) {
      EXPECT_EQ(a.received[20], 0);
    }
  }
}

// Even a score that overflowed.
TEST_P(AttentionWindowTest, AHiddenRowWithAHugeKeyStaysHidden) {
  for (size_t n_queries : {1, 9}) {
    Case c = WindowCase(40, n_queries, 0);
    c.own_rows = false;
    c.biased = true;
    Problem problem(c);
    const Result calm = problem.Run(OneSpan(40));
    problem.bias()[7] = kNothing;
    for (size_t i = 0; i < c.dim; ++i) problem.keys()[7 * c.dim + i] = 3e38f;
    const Result result = problem.Run(OneSpan(40));
    for (float x : result.out) EXPECT_TRUE(std::isfinite(x));
    EXPECT_EQ(result.sums[7], 0);
    EXPECT_NE(calm.sums[7], 0);
  }
}

TEST_P(AttentionWindowTest, SumsByHeadMatchFloat64AndAddUp) {
  for (size_t n_queries : {1, 4, 5, 130}) {
    for (size_t window : {0, 90}) {
      Case c = WindowCase(1100, n_queries, window);
      if (Slow()) c = WindowCase(300, n_queries, window);
      c.group = 5;
      const Problem problem(c);
      const size_t first = n_queries / 2;
      std::vector<float> weights(n_queries - first);
      for (size_t i = 0; i < weights.size(); ++i) weights[i] = 0.5f + static_cast<float>(i % 3);
      Ask ask = {.first_query = first, .weights = weights.data(), .keep = n_queries == 1, .by_head = true};
      const Result heads = problem.Run(OneSpan(c.n_rows()), ask);
      ask.by_head = false;
      const Result group = problem.Run(OneSpan(c.n_rows()), ask);
      EXPECT_LE(Nmse(heads.sums, problem.Reference(ask).head_sums), 1e-10);
      const auto total = [&](const std::vector<float>& x) {
        std::vector<double> sum(c.n_rows());
        for (size_t i = 0; i < x.size(); ++i) sum[i % sum.size()] += x[i];
        return sum;
      };
      EXPECT_LE(Nmse(group.sums, total(heads.sums)), 1e-12);
      if (n_queries != 1) continue;
      EXPECT_LE(Nmse(heads.received, problem.Reference().head_sums), 1e-10);
      EXPECT_LE(Nmse(group.received, total(heads.received)), 1e-12);
    }
  }
}

// Attention that differs by query head: a job a head, q and out at the head, gives what the group gives.
TEST_P(AttentionWindowTest, AJobAHeadGivesTheGroupsResult) {
  constexpr size_t kGroup = 3, kDim = 20, kRows = 50;
  const RowFormat keys = {RowType::kF32, RowSide::kKeys, kDim}, values = {RowType::kF32, RowSide::kValues, kDim};
  Rng rng(2);
  std::vector<float> rows(kRows * kDim), q(2 * kGroup * kDim);
  for (float& x : rows) x = rng.Normal();
  for (float& x : q) x = rng.Normal();
  Region region[2];
  WriteRows(keys, region[0].Allocate(RegionBytes(keys, 64)), 0, kRows, rows.data(), kDim);
  WriteRows(values, region[1].Allocate(RegionBytes(values, 64)), 0, kRows, rows.data(), kDim);
  const RowSpan key_span = {.format = keys, .rows = region[0].data, .n_rows = kRows};
  const RowSpan value_span = {.format = values, .rows = region[1].data, .n_rows = kRows};
  AttentionJob job;
  job.keys = {&key_span, 1};
  job.values = {&value_span, 1};
  job.n_past = kRows - 2;
  job.n_queries = 2;
  job.q = q.data();
  job.q_stride = job.out_stride = kGroup * kDim;
  job.group = kGroup;
  std::vector<float> out(q.size()), lse(2 * kGroup), head_out(q.size()), head_lse(2 * kGroup);
  job.out = out.data();
  job.lse = lse.data();
  Attend({&job, 1});
  std::vector<AttentionJob> heads(kGroup, job);
  for (size_t g = 0; g < kGroup; ++g) {
    heads[g].group = 1;
    heads[g].q += g * kDim;
    heads[g].out = head_out.data() + g * kDim;
    heads[g].lse = head_lse.data() + g * 2;  // [n_queries, 1]
  }
  Attend(heads);
  for (size_t i = 0; i < out.size(); ++i) EXPECT_NEAR(out[i], head_out[i], 1e-6);
  for (size_t g = 0; g < kGroup; ++g)
    for (size_t m = 0; m < 2; ++m) EXPECT_NEAR(lse[m * kGroup + g], head_lse[g * 2 + m], 1e-6);
}

}  // namespace
}  // namespace lesskv
