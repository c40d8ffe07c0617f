// Every available instruction set against attention written down in float64, and the exactness that attention.h
// promises: the same bits however rows are cut into spans, wherever they lie, however many threads run.
#include "kernels/attention/attention_problem.h"

namespace lesskv {
namespace {

class AttentionTest : public AttentionIsaTest {};
INSTANTIATE_ISAS(AttentionTest);

// Two rows whose weights can be seen by eye: scores 0 and log 3.
TEST_P(AttentionTest, WeightsOfTwoRowsByHand) {
  Case c;
  c.dim = 2;
  c.n_past = 1;
  Problem problem(c);
  AttentionJob job;
  const float keys[] = {0, 0, std::log(3.0f), 0}, values[] = {4, 8, 8, 0}, q[] = {1, 5};
  const RowFormat key_format = {RowType::kF32, RowSide::kKeys, 2}, value_format = {RowType::kF32, RowSide::kValues, 2};
  Region k, v;
  WriteRows(key_format, k.Allocate(RegionBytes(key_format, 16)), 3, 2, keys, 2);
  WriteRows(value_format, v.Allocate(RegionBytes(value_format, 16)), 3, 2, values, 2);
  const RowSpan key_span = {.format = key_format, .rows = k.data, .first_slot = 3, .n_rows = 2};
  const RowSpan value_span = {.format = value_format, .rows = v.data, .first_slot = 3, .n_rows = 2};
  float out[2], lse, received[2];
  job.keys = {&key_span, 1};
  job.values = {&value_span, 1};
  job.n_past = 1;
  job.n_queries = 1;
  job.q = q;
  job.out = out;
  job.lse = &lse;
  job.received = received;
  Attend({&job, 1});
  EXPECT_NEAR(out[0], 7, 1e-5);  // 1/4 and 3/4
  EXPECT_NEAR(out[1], 2, 1e-5);
  EXPECT_NEAR(lse, std::log(4.0f), 1e-6);
  EXPECT_NEAR(received[0], 0.25, 1e-6);
  EXPECT_NEAR(received[1], 0.75, 1e-6);
  float sums[2];
  const ColumnSumJob sum_job = {job, &lse, 0, nullptr, sums};
  ColumnSums({&sum_job, 1});
  EXPECT_NEAR(sums[0], 0.25, 1e-6);
  EXPECT_NEAR(sums[1], 0.75, 1e-6);
}

TEST_P(AttentionTest, DecodeMatchesFloat64) {
  for (RowType type : kTypes) {
    for (size_t dim : {1, 20, 32, 33, 64, 80, 96, 128}) {
      if (!Supports(type, dim)) continue;
      for (size_t group : {1, 2, 3, 4, 7, 8}) {
        for (size_t n_rows : {1, 15, 16, 17, 255, 256, 257, 1000}) {
          if (n_rows > 17 && (dim + group + n_rows) % 5 != 0) continue;  // a fifth of the long ones
          SCOPED_TRACE(testing::Message() << Name(type) << " dim " << dim << " group " << group << " rows " << n_rows);
          Case c;
          c.key_type = c.value_type = type;
          c.dim = dim;
          c.group = group;
          c.n_past = n_rows - 1;
          c.seed = dim * 1000 + group * 100 + n_rows;
          ExpectMatches(c);
        }
      }
    }
  }
}

TEST_P(AttentionTest, ManyQueriesMatchFloat64) {
  for (RowType type : kTypes) {
    for (size_t dim : {20, 33, 64, 80, 128}) {
      if (!Supports(type, dim)) continue;
      for (size_t group : {1, 3, 4}) {
        for (size_t n_queries : {2, 3, 4, 5, 17, 64, 129, 130}) {
          for (size_t n_past : {0, 7, 250}) {
            // A third of the short ones, an eighth of the long ones.
            if ((dim + group + n_queries + n_past) % (n_queries > 5 ? 8 : 3) != 0) continue;
            SCOPED_TRACE(testing::Message() << Name(type) << " dim " << dim << " group " << group << " queries "
                                            << n_queries << " past " << n_past);
            Case c;
            c.key_type = c.value_type = type;
            c.dim = dim;
            c.group = group;
            c.n_queries = n_queries;
            c.n_past = n_past;
            c.seed = dim + n_queries;
            ExpectMatches(c);
            c.own_rows = false;
            ExpectMatches(c);
          }
        }
      }
    }
  }
}

TEST_P(AttentionTest, KeysAndValuesMayDifferInType) {
  for (RowType keys : kTypes) {
    for (RowType values : kTypes) {
      for (size_t n_queries : {1, 33}) {
        SCOPED_TRACE(testing::Message() << Name(keys) << " " << Name(values) << " queries " << n_queries);
        Case c;
        c.key_type = keys;
        c.value_type = values;
        c.group = 4;
        c.n_past = 300;
        c.n_queries = n_queries;
        ExpectMatches(c);
      }
    }
  }
}

// From nearly equal weights to a few rows that outweigh all others: the small ones are rounded most.
TEST_P(AttentionTest, EvenAndUnevenWeightsOfQuantisedValues) {
  for (RowType type : {RowType::kQ8, RowType::kQ4}) {
    for (float size : {0.1f, 3.0f, 10.0f}) {
      for (size_t group : {1, 4}) {
        SCOPED_TRACE(testing::Message() << Name(type) << " keys " << size << " group " << group);
        Case c;
        c.value_type = type;
        c.key_size = size;
        c.group = group;
        c.n_past = Slow() ? 300 : 2500;
        ExpectMatches(c);
      }
    }
  }
}

// bfloat16 products: 8 bits of mantissa, an error of 2^-9 a factor.
TEST_P(AttentionTest, Bf16ProductsStayClose) {
  for (RowType type : kTypes) {
    for (size_t dim : {33, 64, 128}) {
      if (!Supports(type, dim)) continue;
      Case c;
      c.key_type = c.value_type = type;
      c.dim = dim;
      c.group = 4;
      c.n_past = 100;
      c.n_queries = 65;
      c.compute = ComputeType::kBF16;
      ExpectMatches(c, 3e-5);
    }
  }
}

// Whatever comes together: sizes, types, spans, weights, windows.
TEST_P(AttentionTest, RandomCasesMatchFloat64) {
  for (uint64_t seed = 0; seed < (Slow() ? 60 : 200); ++seed) {
    Rng rng(seed * 2 + 1);
    const auto one_of = [&](auto... options) {
      const size_t list[] = {size_t{options}...};
      return list[rng.Below(sizeof...(options))];
    };
    const auto chance = [&](size_t percent) { return rng.Below(100) < percent; };
    Case c;
    c.dim = chance(50) ? one_of(8u, 16u, 32u, 64u, 96u, 128u, 256u) : 1 + rng.Below(256);
    do c.key_type = kTypes[rng.Below(std::size(kTypes))];
    while (!Supports(c.key_type, c.dim));
    do c.value_type = kTypes[rng.Below(std::size(kTypes))];
    while (!Supports(c.value_type, c.dim));
    c.group = 1 + rng.Below(16);
    c.n_past = one_of(0u, rng.Below(40), rng.Below(514), 256u, 512u);
    const size_t most_queries = 4'000'000 / (c.dim * c.group * (c.n_past + 1)) + 1;
    c.n_queries = chance(40) ? 1 : std::min(most_queries, one_of(2u, 3u, 4u, 5u, 1 + rng.Below(70)));
    c.own_rows = chance(85);
    c.biased = chance(30);
    c.key_size = chance(20) ? 3 : 1;
    if (chance(40)) {
      c.window = 1 + rng.Below(c.n_past + 20);
      c.first_position = static_cast<int32_t>(c.n_past + rng.Below(30));
    }
    if (chance(25)) c.rope = chance(50) ? RopeStyle::kHalves : RopeStyle::kInterleaved;
    c.seed = seed;
    SCOPED_TRACE(testing::Message() << "seed " << seed << ": " << Name(c.key_type) << ' ' << Name(c.value_type)
                                    << " dim " << c.dim << " group " << c.group << " queries " << c.n_queries
                                    << " past " << c.n_past << " window " << c.window << (c.own_rows ? "" : " without own rows") << (c.biased ? " biased" : "")
                                    << (c.rope ? " rope" : ""));
    const Problem problem(c);
    const bool by_head = chance(50);
    const size_t longest = one_of(3u, 30u, 1000u);
    const Result result = problem.RunCut(RandomLayout(c.n_rows(), rng, longest), RandomLayout(c.n_rows(), rng, longest),
                                         {.keep = c.n_queries == 1, .by_head = by_head});
    const Problem::Exact exact = problem.Reference();
    const std::vector<double>& sums = by_head ? exact.head_sums : exact.sums;
    const double bound = DefaultBound(c);
    EXPECT_LE(Nmse(result.out, exact.out), bound);
    EXPECT_LE(Nmse(result.sums, sums), bound);
    if (c.n_queries == 1) {
      EXPECT_LE(Nmse(result.received, sums), bound);
    }
    ExpectNearLse(result.lse, exact.lse, std::sqrt(bound));
  }
}

// A query with a channel that is no number has no result, however rows are stored; those beside it have theirs.
TEST_P(AttentionTest, QueriesThatAreNoNumbersHaveNoResult) {
  for (RowType type : kTypes)
    for (size_t n_queries : {1, 3, 9})
      for (const float bad : {NAN, -NAN}) {
        SCOPED_TRACE(testing::Message() << Name(type) << " queries " << n_queries << ", " << bad);
        Case c;
        c.key_type = c.value_type = type;
        c.group = 3;
        c.n_past = 200;
        c.n_queries = n_queries;
        Problem problem(c);
        const Result sound = problem.Run(OneSpan(c.n_rows()));
        const size_t at = (c.n_queries * c.group - 2) * c.dim;  // of the last query's heads that in the middle
        problem.queries()[at + 5] = bad;
        const Result result = problem.Run(OneSpan(c.n_rows()));
        for (size_t i = 0; i < result.out.size(); ++i) {
          if (i / c.dim == at / c.dim)
            EXPECT_TRUE(std::isnan(result.out[i])) << i << ": " << result.out[i];
          else
            EXPECT_EQ(result.out[i], sound.out[i]) << i;
        }
      }
}

TEST_P(AttentionTest, SpansSlotsAndThreadsDoNotChangeABit) {
  Rng rng(99);
  for (RowType type : kTypes) {
    for (size_t dim : {33, 64, 96}) {
      if (!Supports(type, dim)) continue;
      for (size_t n_queries : {1, 3, 21}) {
        for (ComputeType compute : {ComputeType::kF32, ComputeType::kBF16}) {
          SCOPED_TRACE(testing::Message() << Name(type) << " dim " << dim << " queries " << n_queries);
          Case c;
          c.key_type = c.value_type = type;
          c.dim = dim;
          c.group = 3;
          c.n_past = Slow() ? 300 : 1100;
          c.n_queries = n_queries;
          c.compute = compute;
          if (dim == 64) c.rope = RopeStyle::kHalves;
          const Problem problem(c);
          const ThreadPool one(1), two(2);
          const ThreadScope alone(one);
          const Result whole = problem.Run(OneSpan(c.n_rows()), {.keep = n_queries == 1});
          for (size_t longest : {3, 40, 700}) {
            const ThreadScope scope(longest == 40 ? one : two);
            ExpectSameBits(whole, problem.Run(RandomLayout(c.n_rows(), rng, longest), {.keep = n_queries == 1}));
          }
        }
      }
    }
  }
}

TEST_P(AttentionTest, JobsTogetherGiveTheBitsOfEachAlone) {
  std::vector<Case> cases(5);
  for (size_t i = 0; i < cases.size(); ++i) {
    cases[i].n_past = 100 + 333 * i;
    cases[i].group = 1 + i % 4;
    cases[i].dim = i % 2 ? 64 : 48;
    cases[i].n_queries = i == 3 ? 20 : 1;
    cases[i].key_type = i % 2 ? RowType::kQ8 : RowType::kF16;
    cases[i].seed = i;
  }
  const ThreadPool pool(2);
  const ThreadScope scope(pool);
  std::vector<AttentionJob> jobs;
  std::vector<Result> alone, together(cases.size());
  std::vector<Region> regions(2 * cases.size());
  std::vector<RowSpan> spans(2 * cases.size());
  std::vector<std::vector<float>> queries(cases.size());
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    Rng rng(i);
    std::vector<float> rows(c.n_rows() * c.dim), q(c.n_queries * c.group * c.dim);
    for (float& x : rows) x = rng.Normal();
    for (float& x : q) x = rng.Normal();
    queries[i] = q;
    AttentionJob job;
    for (const RowSide side : {RowSide::kKeys, RowSide::kValues}) {
      const size_t at = 2 * i + (side == RowSide::kValues ? 1 : 0);
      const RowFormat format = {side == RowSide::kKeys ? c.key_type : c.value_type, side, c.dim};
      std::byte* data = regions[at].Allocate(RegionBytes(format, (c.n_rows() + 15) / 16 * 16));
      WriteRows(format, data, 0, c.n_rows(), rows.data(), c.dim);
      spans[at] = {.format = format, .rows = data, .n_rows = c.n_rows()};
    }
    job.keys = {&spans[2 * i], 1};
    job.values = {&spans[2 * i + 1], 1};
    job.n_past = c.n_past;
    job.n_queries = c.n_queries;
    job.q = queries[i].data();
    job.q_stride = job.out_stride = c.group * c.dim;
    job.group = c.group;
    job.scale = 0.125f;
    together[i].out.resize(q.size());
    together[i].lse.resize(c.n_queries * c.group);
    Result own = together[i];
    job.out = own.out.data();
    job.lse = own.lse.data();
    Attend({&job, 1});
    alone.push_back(own);
    job.out = together[i].out.data();
    job.lse = together[i].lse.data();
    jobs.push_back(job);
  }
  Attend(jobs);
  for (size_t i = 0; i < jobs.size(); ++i) ExpectSameBits(alone[i], together[i]);
}

TEST_P(AttentionTest, UnrotatedKeysAreRotatedToTheirReadPositions) {
  for (RopeStyle style : {RopeStyle::kInterleaved, RopeStyle::kHalves}) {
    for (RowType type : {RowType::kF16, RowType::kQ8}) {
      for (size_t n_queries : {1, 20}) {
        Case c;
        c.key_type = type;
        c.group = 2;
        c.n_past = 600;
        c.n_queries = n_queries;
        c.rope = style;
        ExpectMatches(c, 1e-9);
      }
    }
  }
}

// Layers that take turns with several ropes, and jobs of many sequences in one call: each reads its own angles.
TEST_P(AttentionTest, JobsReadAtPositionsAndRopesOfTheirOwn) {
  constexpr size_t kJobs = 24, kRows = 40, kDim = 32;
  const RowFormat keys = {RowType::kF32, RowSide::kKeys, kDim}, values = {RowType::kF32, RowSide::kValues, kDim};
  std::vector<RopeTable> ropes;
  for (size_t i = 0; i < 6; ++i) ropes.emplace_back(RopeConfig{.n_dims = 8 + 4 * i, .base = 100.0 + 1000.0 * i});
  Rng rng(8);
  std::vector<float> rows(kRows * kDim);
  for (float& x : rows) x = rng.Normal();
  Region region[2];
  WriteRows(keys, region[0].Allocate(RegionBytes(keys, 48)), 0, kRows, rows.data(), kDim);
  WriteRows(values, region[1].Allocate(RegionBytes(values, 48)), 0, kRows, rows.data(), kDim);
  const RowSpan spans[2] = {{.format = keys, .rows = region[0].data, .n_rows = kRows},
                            {.format = values, .rows = region[1].data, .n_rows = kRows}};
  std::vector<std::vector<int32_t>> positions(kJobs / 3);
  for (auto& p : positions)
    for (size_t r = 0; r < kRows; ++r) p.push_back(static_cast<int32_t>(rng.Below(10000)));  // some are not kept
  std::vector<Result> alone(kJobs), together(kJobs);
  std::vector<AttentionJob> jobs(kJobs);
  for (size_t j = 0; j < kJobs; ++j) {
    AttentionJob& job = jobs[j];
    job.keys = {&spans[0], 1};
    job.values = {&spans[1], 1};
    job.n_past = kRows;
    job.n_queries = 1;
    job.q = &rows[3];
    job.rope = &ropes[j % 5 == 4 ? 5 : j / 3 % ropes.size()];
    job.read_positions = j % 7 == 6 ? nullptr : positions[j / 3].data();
    for (Result* result : {&alone[j], &together[j]}) {
      result->out.assign(kDim, Problem::kUnset);
      result->lse.assign(1, Problem::kUnset);
      job.out = result->out.data();
      job.lse = result->lse.data();
      if (result == &alone[j]) Attend({&job, 1});
    }
  }
  Attend(jobs);
  for (size_t j = 0; j < kJobs; ++j) {
    ExpectSameBits(alone[j], together[j]);
    const bool alike = j > 0 && jobs[j].rope == jobs[j - 1].rope && jobs[j].read_positions == jobs[j - 1].read_positions;
    EXPECT_EQ(j > 0 && SameBits(alone[j - 1].out, alone[j].out), alike) << j;
  }
}

TEST_P(AttentionTest, NoRowsGiveNothing) {
  for (size_t n_queries : {1, 9}) {
    Case c;
    c.n_queries = n_queries;
    c.own_rows = false;
    c.group = 2;
    const Problem problem(c);
    for (const Layout& layout : {Layout{{0, 0}}, Layout{{0, 5}, {0, 16}}}) {
      const Result result = problem.Run(layout);
      for (float x : result.out) EXPECT_EQ(x, 0);
      for (float x : result.lse) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
    }
  }
}

TEST_P(AttentionTest, NoJobsAndNoQueriesAreFine) {
  Attend({});
  ColumnSums({});
  Case c;
  c.n_queries = 0;
  c.n_past = 20;
  const Problem problem(c);
  const Result result = problem.Run(OneSpan(20));
  for (float x : result.sums) EXPECT_EQ(x, 0);
}

TEST_P(AttentionTest, HugeAndTinyKeys) {
  for (RowType type : kTypes) {
    for (float size : {1e-30f, 1e-6f, 1e3f}) {
      for (size_t n_queries : {1, 20}) {
        SCOPED_TRACE(testing::Message() << Name(type) << " keys " << size << " queries " << n_queries);
        Case c;
        c.key_type = type;
        c.key_size = size;
        c.n_past = 100;
        c.n_queries = n_queries;
        // Scores of a thousand are rounded to 1e-4, and so are the weights; with queries of 16 bits (AVX2 and beyond)
        // to some 1e-2.
        const bool coded = type == RowType::kQ8 || type == RowType::kQ4;
        ExpectMatches(c, coded && n_queries == 1 ? 1e-4 : 1e-6);
      }
    }
  }
}

// Scores that overflow count as the largest float: a finite answer, the average of the winners.
TEST_P(AttentionTest, OverflowedScoresWin) {
  for (size_t n_queries : {1, 6}) {
    Case c;
    c.n_past = 20;
    c.n_queries = n_queries;
    c.own_rows = false;
    Problem problem(c);
    std::fill(problem.keys().begin(), problem.keys().end(), 0.0f);
    for (size_t i = 0; i < c.dim; ++i) problem.keys()[7 * c.dim + i] = 3e38f;
    const Result result = problem.Run(OneSpan(20));
    for (float x : result.out) EXPECT_TRUE(std::isfinite(x));
  }
}

TEST_P(AttentionTest, WeightsSumToOne) {
  for (size_t n_queries : {1, 3, 40}) {
    Case c;
    c.n_past = 777;
    c.n_queries = n_queries;
    c.group = 2;
    Problem problem(c);
    for (size_t i = 0; i < problem.values().size(); ++i) problem.values()[i] = static_cast<float>(i % c.dim) - 20;
    const Result result = problem.Run(OneSpan(c.n_rows()));
    for (size_t i = 0; i < result.out.size(); ++i) {
      const float expected = static_cast<float>(i % c.dim) - 20;
      EXPECT_NEAR(result.out[i], expected, 1e-5f * std::max(1.0f, std::fabs(expected)));
    }
  }
}

TEST_P(AttentionTest, ColumnSumsTotalTheQueriesOfAllHeads) {
  for (size_t n_queries : {1, 2, 17, 129}) {
    for (size_t first : {size_t{0}, n_queries / 2}) {
      Case c;
      c.n_past = 333;
      c.n_queries = n_queries;
      c.group = 3;
      const Result result = Problem(c).Run(OneSpan(c.n_rows()), {.first_query = first});
      const double total = std::accumulate(result.sums.begin(), result.sums.end(), 0.0);
      EXPECT_NEAR(total, static_cast<double>(c.group * (n_queries - first)), 6e-5 * static_cast<double>(n_queries));
    }
  }
}

TEST_P(AttentionTest, ColumnSumsTakeWeightsAndAFirstQuery) {
  Case c;
  c.n_past = 140;
  c.n_queries = 50;
  c.group = 2;
  const Problem problem(c);
  std::vector<float> weights;
  for (int i = 0; i < 20; ++i) weights.push_back(0.1f * static_cast<float>(i));
  const Ask ask = {.first_query = 30, .weights = weights.data()};
  const Result result = problem.Run(OneSpan(c.n_rows()), ask);
  EXPECT_LE(Nmse(result.sums, problem.Reference(ask).sums), 1e-10);
}

TEST_P(AttentionTest, WhatRowsReceivedIsTheColumnSumsOfASecondPass) {
  for (size_t n_past : {0, 1, 15, 700, 1023, 1024, 2600}) {
    Case c;
    c.n_past = n_past;
    c.group = 4;
    const Problem problem(c);
    const Result kept = problem.Run(OneSpan(c.n_rows()), {.keep = true}), plain = problem.Run(OneSpan(c.n_rows()));
    EXPECT_LE(Nmse(kept.received, std::vector<double>(plain.sums.begin(), plain.sums.end())), 1e-11) << n_past;
    EXPECT_TRUE(SameBits(kept.out, plain.out));
  }
}

// A query of a long step alone: decode and prefill are different paths and agree to rounding.
TEST_P(AttentionTest, DecodeAgreesWithPrefill) {
  Case c;
  c.n_past = 200;
  c.n_queries = 20;
  c.own_rows = false;
  c.group = 4;
  c.key_type = c.value_type = RowType::kF16;
  const Result many = Problem(c).Run(OneSpan(200));
  Case one = c;
  one.n_queries = 1;  // the same rows and first query: they are drawn first
  const Result single = Problem(one).Run(OneSpan(200));
  for (size_t i = 0; i < single.out.size(); ++i) EXPECT_NEAR(single.out[i], many.out[i], 1e-5);
  for (size_t i = 0; i < single.lse.size(); ++i) EXPECT_NEAR(single.lse[i], many.lse[i], 1e-5);
}

TEST(AttentionMerge, TwoHalvesGiveTheWhole) {
  float out[2] = {1, 10}, lse = std::log(2.0f);
  const float other[2] = {4, 40};
  Merge(out, &lse, other, std::log(4.0f), 2);  // masses 2 and 4
  EXPECT_NEAR(out[0], 3, 1e-6);
  EXPECT_NEAR(out[1], 30, 1e-5);
  EXPECT_NEAR(lse, std::log(6.0f), 1e-6);
}

TEST(AttentionMerge, NothingIsTheIdentity) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float out[2] = {0.1f, -0.3f}, lse = 0.7f;
  const float zero[2] = {0, 0};
  Merge(out, &lse, zero, kNothing, 2);
  EXPECT_EQ(out[0], 0.1f);
  EXPECT_EQ(out[1], -0.3f);
  EXPECT_EQ(lse, 0.7f);
  float empty[2] = {0, 0}, empty_lse = kNothing;
  Merge(empty, &empty_lse, out, lse, 2);
  EXPECT_EQ(empty[0], 0.1f);
  EXPECT_EQ(empty[1], -0.3f);
  EXPECT_EQ(empty_lse, 0.7f);
  empty_lse = kNothing;
  Merge(empty, &empty_lse, zero, kNothing, 2);
  EXPECT_EQ(empty_lse, kNothing);
}

TEST(AttentionMerge, FarApartMassesKeepTheLarger) {
  float out[1] = {1}, lse = 500;
  const float other[1] = {2};
  Merge(out, &lse, other, -500, 1);
  EXPECT_EQ(out[0], 1);
  EXPECT_EQ(lse, 500);
  Merge(out, &lse, other, 2000, 1);
  EXPECT_EQ(out[0], 2);
  EXPECT_EQ(lse, 2000);
}

}  // namespace
}  // namespace lesskv
