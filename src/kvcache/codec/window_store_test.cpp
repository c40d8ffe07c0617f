// Rows that are whole while they are new, and coded once when they are not: through the store alone.
#include "kvcache/codec/window_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/checked.h"
#include "base/rng.h"
#include "kernels/basic/cpu.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

constexpr size_t kHeads = 4, kKvHeads = 2, kDim = 64, kWindow = 20;

LayerShape Shape() {
  return {kHeads, kKvHeads, kDim, UsualScale(kDim), std::make_shared<RopeTable>(RopeConfig{.n_dims = 0, .frequency_factors = {}}), 0};
}

// One channel stands out, as it does in the keys of real models.
std::vector<float> Draw(size_t n, size_t heads, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n * heads * kDim);
  for (size_t i = 0; i < x.size(); ++i) x[i] = rng.Normal() + (i % kDim == 5 ? 8 : 0);
  return x;
}

struct Text {
  std::vector<float> q, k, v;
  explicit Text(size_t n) : q(Draw(n, kHeads, 1)), k(Draw(n, kKvHeads, 2)), v(Draw(n, kKvHeads, 3)) {}
};

struct Subject {
  ByteCounter counter;
  LayerShape shape = Shape();
  WindowStore store;
  size_t seen = 0;

  explicit Subject(const RowTypes& types) : store(counter, {{shape}, ComputeType::kF32, false, true}, types, {}, WholeRows(types), {kWindow}) {}

  std::vector<float> Take(const Text& text, size_t n, bool is_prompt = false) {
    store.Reserve({.n_step = n, .is_prompt = is_prompt, .budgets = {}});
    store.Append(0, 0, n, &text.k[seen * shape.kv_dim()], &text.v[seen * shape.kv_dim()]);
    std::vector<float> out(n * shape.q_dim()), lse(n * kHeads);
    JobList list;
    const StoreQuery query{.queries = &text.q[seen * shape.q_dim()], .n_queries = n, .out = out.data(), .lse = lse.data()};
    store.AddJobs(query, list);
    Attend(list.jobs);
    store.Finish(query);
    for (size_t h = 0; h < kKvHeads; ++h) EXPECT_EQ(store.Close(0, h, {}).n_rows, seen + n);
    store.EndStep();
    seen += n;
    return out;
  }
  // [2][rows, kDim]: keys, values of a head.
  std::pair<std::vector<float>, std::vector<float>> Read(size_t h) const {
    std::vector<uint32_t> rows(seen);
    for (size_t i = 0; i < seen; ++i) rows[i] = static_cast<uint32_t>(i);
    std::pair<std::vector<float>, std::vector<float>> out{std::vector<float>(seen * kDim), std::vector<float>(seen * kDim)};
    store.ReadRows(0, h, rows, out.first.data(), out.second.data());
    return out;
  }
};

constexpr RowTypes kTypes[] = {{RowType::kQ4, RowType::kQ4, true}, {RowType::kQ4, RowType::kQ4, false}, {RowType::kQ8, RowType::kF16, true},
                               {RowType::kF16, RowType::kQ4, false}};

// Mean square of what rows [begin, end) lack of the text's, over that of the rows.
double Loss(const std::vector<float>& read, const std::vector<float>& text, size_t h, size_t begin, size_t end) {
  double lost = 0, all = 0;
  for (size_t i = begin * kDim; i < end * kDim; ++i) {
    const double x = text[(i / kDim * kKvHeads + h) * kDim + i % kDim];
    lost += (read[i] - x) * (read[i] - x), all += x * x;
  }
  return lost / all;
}

TEST(WindowStore, NewRowsAreWholeAndOldOnesCoded) {
  const Text text(150);
  for (const RowTypes& types : kTypes) {
    Subject subject(types);
    subject.Take(text, 100, true);
    for (size_t i = 0; i < 40; ++i) subject.Take(text, 1);
    ASSERT_EQ(subject.store.old_rows(0, 0), 120u);
    for (size_t h = 0; h < kKvHeads; ++h) {
      const auto [keys, values] = subject.Read(h);
      for (const auto& [read, x, type] : {std::tuple{keys, text.k, types.keys}, {values, text.v, types.values}}) {
        EXPECT_LT(Loss(read, x, h, 120, 140), 1e-6);
        const double old = Loss(read, x, h, 0, 120);
        EXPECT_EQ(old < 1e-6, type == RowType::kF16);
        EXPECT_LT(old, type == RowType::kQ4 ? 4e-2 : 1e-4);
      }
    }
  }
}

// Rows are coded once, by themselves: however the text was cut into steps.
TEST(WindowStore, StepsDoNotChangeACode) {
  const Text text(120);
  for (const RowTypes& types : kTypes) {
    Subject once(types);
    once.Take(text, 90, true);
    for (const size_t step : {1, 7, 45}) {
      Subject other(types);
      while (other.seen < 90) other.Take(text, std::min<size_t>(step, 90 - other.seen));
      for (size_t h = 0; h < kKvHeads; ++h) EXPECT_EQ(other.Read(h), once.Read(h)) << step;
    }
  }
}

// Old and new rows under one softmax, against float64 over what the rows decode to.
TEST(WindowStore, AttentionIsThatOfTheDecodedRows) {
  const Text text(700);
  for (const Isa isa : AvailableIsas()) {
    ForceIsa(isa);
    for (const RowTypes& types : kTypes) {
      SCOPED_TRACE(testing::Message() << IsaName(isa) << ", " << Name(types.keys) << " " << Name(types.values) << " " << types.rotate);
      Subject subject(types);
      subject.Take(text, 600, true);
      for (const size_t n : {size_t{1}, size_t{9}}) {
        const size_t first = subject.seen;
        const std::vector<float> out = subject.Take(text, n);
        Subject copy(types);  // the rows as the first query met them: old ones coded, its own whole
        copy.Take(text, first, true);
        copy.seen = first;
        for (size_t head = 0; head < kHeads; ++head) {
          const size_t h = head / (kHeads / kKvHeads);
          const auto [keys, values] = copy.Read(h);
          std::vector<double> want(kDim);
          double mass = 0;
          for (size_t r = 0; r <= first; ++r) {
            const float* k = r < first ? &keys[r * kDim] : &text.k[(r * kKvHeads + h) * kDim];
            const float* v = r < first ? &values[r * kDim] : &text.v[(r * kKvHeads + h) * kDim];
            double dot = 0;
            for (size_t c = 0; c < kDim; ++c) dot += static_cast<double>(text.q[(first * kHeads + head) * kDim + c]) * k[c];
            const double weight = std::exp(dot * subject.shape.scale - 40);
            mass += weight;
            for (size_t c = 0; c < kDim; ++c) want[c] += weight * v[c];
          }
          double error = 0, size = 0;
          for (size_t c = 0; c < kDim; ++c) {
            error += std::pow(out[head * kDim + c] - want[c] / mass, 2);
            size += std::pow(want[c] / mass, 2);
          }
          EXPECT_LT(error / size, 1e-4) << n;
        }
      }
    }
  }
  ForceIsa(BestIsa());
}

TEST(WindowStore, BytesAreThoseOfCodesAndOfTheWindow) {
  const Text text(500);
  Subject subject({RowType::kQ4, RowType::kQ4, true});
  subject.Take(text, 500, true);
  const size_t code = kDim / 2 + kDim / 32 * 2, whole = kDim * 2;
  EXPECT_EQ(subject.counter.now - subject.store.SlackBytes({}), kKvHeads * 2 * ((500 - kWindow) * code + kWindow * whole));
}

TEST(WindowStore, TypesThatAreWholeStayAsTheyAre) {
  const auto store_of = [](const std::string& spec) {
    return CacheConfig::Create(CacheSpec::Parse(spec), CacheShape::Uniform(1, kHeads, kKvHeads, kDim, 240, {.n_dims = kDim, .frequency_factors = {}}))
        ->Plan(200, 10)
        .bytes_peak;
  };
  EXPECT_EQ(store_of("full+f16+recent"), store_of("full+f16"));
  EXPECT_EQ(store_of("full+f32+recent"), store_of("full+f32"));
  EXPECT_GT(store_of("full+q4+recent(64)"), store_of("full+q4"));
  EXPECT_LT(store_of("full+q4+recent(16)"), store_of("full+q4+recent(64)"));
}

}  // namespace
}  // namespace lesskv
