// A store that transforms its rows answers as one that does not: with float32 rows, to rounding.
#include "kvcache/codec/row_store.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "base/rng.h"
#include "kvcache/bytes.h"

namespace lesskv {
namespace {

LayerShape Shape(size_t head_dim, RopeStyle style) {
  return {4, 2, head_dim, UsualScale(head_dim),
          std::make_shared<RopeTable>(
              RopeConfig{.n_dims = head_dim / 2, .style = style, .base = 100.0, .frequency_factors = {}}),
          0};
}

std::vector<float> Random(size_t n, uint64_t seed) {
  Rng rng(seed);
  std::vector<float> x(n);
  for (float& v : x) v = rng.Normal();
  return x;
}

void ExpectNear(const std::vector<float>& a, const std::vector<float>& b, double tolerance, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  double error = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    error += std::pow(double(a[i]) - b[i], 2);
    size += double(b[i]) * b[i];
  }
  EXPECT_LE(std::sqrt(error / size), tolerance) << what;  // NaN fails
}

struct Answer {
  std::vector<float> out, lse, sums, keys, values;
};

// 300 rows, then a step of n_queries that may evict, so that its rows wait apart.
Answer Ask(const LayerShape& shape, RowTypes types, size_t n_queries, bool evicts, bool cache_positions) {
  const size_t d = shape.head_dim, n_past = 300, n_rows = n_past + n_queries, n_kv = shape.n_kv_heads;
  ByteCounter counter;
  RowStore store(counter, {{shape}, ComputeType::kF32, cache_positions, true}, types);
  const std::vector<float> keys = Random(n_rows * n_kv * d, 1), values = Random(n_rows * n_kv * d, 2),
                           queries = Random(n_queries * shape.n_heads * d, 3);
  const std::vector<size_t> budgets(n_kv, n_past);
  store.Reserve({.n_step = n_past, .budgets = {}});
  store.Append(0, 0, n_past, keys.data(), values.data());
  for (size_t h = 0; h < n_kv; ++h) store.Close(0, h, {});
  store.EndStep();
  store.Reserve({.n_step = n_queries, .evicts = evicts, .budgets = budgets});
  store.Append(0, 0, n_queries, keys.data() + n_past * n_kv * d, values.data() + n_past * n_kv * d);

  std::vector<int32_t> positions(n_rows);
  for (size_t i = 0; i < n_rows; ++i) positions[i] = static_cast<int32_t>(i * 7 % n_rows);
  Answer answer;
  answer.out.resize(queries.size());
  answer.lse.resize(n_queries * shape.n_heads);
  answer.sums.resize(shape.n_heads * n_rows);
  StoreQuery query;
  query.queries = queries.data();
  query.n_queries = n_queries;
  const std::vector<const int32_t*> read_positions(cache_positions ? n_kv : 0, positions.data());
  query.read_positions = read_positions;
  query.out = answer.out.data();
  query.lse = answer.lse.data();
  JobList list;
  store.AddJobs(query, list);
  Attend(list.jobs);
  std::vector<ColumnSumJob> sums;
  for (size_t h = 0; h < n_kv; ++h)
    sums.push_back({.attention = list.jobs[h], .lse = list.jobs[h].lse, .sums = answer.sums.data() + h * shape.group() * n_rows});
  ColumnSums(sums);
  store.Finish(query);
  const uint32_t rows[] = {0, 17, 299, static_cast<uint32_t>(n_rows - 1)};
  answer.keys.resize(std::size(rows) * d);
  answer.values.resize(std::size(rows) * d);
  store.ReadRows(0, 1, rows, answer.keys.data(), answer.values.data());
  return answer;
}

void ExpectSame(const Answer& a, const Answer& b, double tolerance) {
  ExpectNear(a.out, b.out, tolerance, "outputs");
  ExpectNear(a.lse, b.lse, tolerance, "log-masses");
  ExpectNear(a.sums, b.sums, tolerance, "column sums");
  ExpectNear(a.keys, b.keys, tolerance, "keys read");
  ExpectNear(a.values, b.values, tolerance, "values read");
}

TEST(RowStore, TransformedRowsAnswerAsPlainOnes) {
  for (size_t head_dim : {64, 96, 80, 20})
    for (RopeStyle style : {RopeStyle::kInterleaved, RopeStyle::kHalves})
      for (size_t n_queries : {1, 3, 20})
        for (bool evicts : {false, true})
          for (bool cache_positions : {false, true}) {
            SCOPED_TRACE(testing::Message() << "heads of " << head_dim << ", " << n_queries << " queries, evicts "
                                            << evicts << ", cache positions " << cache_positions);
            const LayerShape shape = Shape(head_dim, style);
            const auto ask = [&](bool rotate) {
              return Ask(shape, {RowType::kF32, RowType::kF32, rotate}, n_queries, evicts, cache_positions);
            };
            ExpectSame(ask(true), ask(false), 2e-6);
          }
}

TEST(RowStore, TransformedLowBitRowsAnswerAsExactOnesToTheirPrecision) {
  for (size_t head_dim : {64, 96})
    for (size_t n_queries : {1, 20})
      for (bool cache_positions : {false, true}) {
        SCOPED_TRACE(testing::Message() << "heads of " << head_dim << ", " << n_queries << " queries, cache positions "
                                        << cache_positions);
        const LayerShape shape = Shape(head_dim, RopeStyle::kInterleaved);
        const Answer exact = Ask(shape, {RowType::kF32, RowType::kF32, false}, n_queries, true, cache_positions);
        ExpectSame(Ask(shape, {RowType::kQ8, RowType::kQ8, true}, n_queries, true, cache_positions), exact, 0.02);
        ExpectSame(Ask(shape, {RowType::kQ4, RowType::kQ4, true}, n_queries, true, cache_positions), exact, 0.25);
      }
}

// Of all that a file may have in the place of two bytes, infinities as scales alone are refused, and all of them.
TEST(RowStore, SavedScalesAreFinite) {
  const LayerShape shape = Shape(64, RopeStyle::kHalves);
  const size_t width = shape.n_kv_heads * shape.head_dim, n_scales = 32 * shape.head_dim / 32 * shape.n_kv_heads * 2;
  for (const RowType type : {RowType::kQ8, RowType::kQ4})
    for (const size_t n : {size_t{32}, size_t{25}}) {  // whole tiles, and one that is copied
      const std::vector<float> keys = Random(n * width, 1), values = Random(n * width, 2);
      const std::vector<size_t> budgets(shape.n_kv_heads, n);
      ByteCounter counter;
      const StoreShape of{{shape}, ComputeType::kF32, false, true};
      RowStore store(counter, of, {type, type});
      store.Reserve({.n_step = n, .budgets = {}});
      store.Append(0, 0, n, keys.data(), values.data());
      for (size_t h = 0; h < shape.n_kv_heads; ++h) store.Close(0, h, {});
      store.EndStep();
      ByteWriter saved;
      store.Save(saved);
      const size_t head_bytes = saved.bytes.size() / shape.n_kv_heads;
      size_t refused = 0;
      for (size_t at = 0; at < saved.bytes.size(); at += 2) {
        if (at % head_bytes < sizeof(uint64_t)) continue;  // the number of rows
        std::vector<std::byte> bad = saved.bytes;
        bad[at] = std::byte{0};
        bad[at + 1] = std::byte{0x7c};
        RowStore other(counter, of, {type, type});
        ByteReader in{bad};
        try {
          other.Load(in, budgets, n);
        } catch (const Error& error) {
          EXPECT_NE(std::string_view(error.what()).find("not finite"), std::string_view::npos) << error.what();
          ++refused;
        }
      }
      EXPECT_EQ(refused, n_scales) << Name(type) << n;
    }
}

// A head of a damaged file has no more rows than its text, for which alone there is room.
TEST(RowStore, SavedHeadsHaveNoMoreRowsThanTheText) {
  const LayerShape shape = Shape(64, RopeStyle::kHalves);
  const size_t n = 20, width = shape.n_kv_heads * shape.head_dim;
  const std::vector<float> rows = Random(n * width, 1);
  const std::vector<size_t> budgets = {150, 250};
  for (const bool packs : {false, true}) {
    ByteCounter counter;
    StoreShape of{{shape}};
    of.packs = packs;
    RowStore store(counter, of, kF16Rows);
    store.Reserve({.n_step = n, .evicts = true, .budgets = budgets});
    store.Append(0, 0, n, rows.data(), rows.data());
    for (size_t h = 0; h < shape.n_kv_heads; ++h) store.Close(0, h, {});
    store.EndStep();
    ByteWriter saved;
    store.Save(saved);
    for (const size_t said : {n, n + 1, size_t{140}}) {
      std::vector<std::byte> bytes = saved.bytes;
      std::memcpy(bytes.data(), &said, sizeof said);
      bytes.resize(1 << 20);
      RowStore other(counter, of, kF16Rows);
      ByteReader in{bytes};
      if (said == n)
        other.Load(in, budgets, n);
      else
        EXPECT_THROW(other.Load(in, budgets, n), Error) << said;
    }
  }
}

// Layers of two head sizes, whose heads lie beside those of their size: what each kept of a prompt and grows by stays its own,
// in a copy and a saved cache, too.
TEST(RowStore, HeadsSideBySideKeepTheirRows) {
  const size_t n_prompt = 40, n_more = 37;
  const std::vector<size_t> budgets = {3, 17, 20, 1, 9, 40};
  StoreShape of{{Shape(64, RopeStyle::kHalves), Shape(32, RopeStyle::kHalves), Shape(64, RopeStyle::kHalves)}};
  of.grows = of.packs = true;
  ByteCounter counter;
  RowStore store(counter, of, {RowType::kF32, RowType::kF32});
  std::vector<std::vector<float>> keys;  // [layers][tokens, heads, head_dim]
  for (const LayerShape& layer : of.layers) keys.push_back(Random((n_prompt + n_more) * layer.n_kv_heads * layer.head_dim, keys.size()));
  const auto append = [&](size_t first, size_t n, bool prompt) {
    store.Reserve({.n_step = n, .evicts = prompt, .is_prompt = prompt, .budgets = budgets});
    for (size_t l = 0; l < of.layers.size(); ++l) {
      const LayerShape& layer = of.layers[l];
      const float* const rows = &keys[l][first * layer.n_kv_heads * layer.head_dim];
      store.Append(l, 0, n, rows, rows);
      for (size_t h = 0; h < layer.n_kv_heads; ++h) {
        std::vector<Departure> leaving;
        for (uint32_t row = static_cast<uint32_t>(budgets[2 * l + h]); prompt && row < n; ++row) leaving.push_back({row});
        store.Close(l, h, leaving);
      }
    }
    store.EndStep();
  };
  const auto expect_rows = [&](const KvStore& from, size_t n_after) {
    for (size_t l = 0; l < of.layers.size(); ++l) {
      const size_t d = of.layers[l].head_dim, n_heads = of.layers[l].n_kv_heads;
      for (size_t h = 0; h < n_heads; ++h) {
        const size_t n = budgets[2 * l + h] + n_after;
        ASSERT_EQ(from.n_rows(l, h), n);
        for (uint32_t row = 0; row < n; ++row) {
          std::vector<float> k(d), v(d);
          from.ReadRows(l, h, {&row, 1}, k.data(), v.data());
          const size_t token = row < budgets[2 * l + h] ? row : row - budgets[2 * l + h] + n_prompt;
          const float* const expected = &keys[l][(token * n_heads + h) * d];
          ASSERT_TRUE(std::equal(k.begin(), k.end(), expected) && k == v) << l << h << row;
        }
      }
    }
  };
  append(0, n_prompt, true);
  for (size_t n = 0; n < n_more; ++n) {
    expect_rows(store, n);
    append(n_prompt + n, 1, false);
  }
  expect_rows(store, n_more);
  ByteCounter of_others;
  expect_rows(*store.Clone(of_others), n_more);
  ByteWriter saved;
  store.Save(saved);
  RowStore loaded(of_others, of, {RowType::kF32, RowType::kF32});
  ByteReader in{saved.bytes};
  loaded.Load(in, budgets, n_prompt + n_more);
  expect_rows(loaded, n_more);
  EXPECT_EQ(of_others.now, counter.now);
}

// Full blocks of a store that keeps all, and the last one of each head apart.
TEST(RowStore, WhatACloneSharesIsNotWritten) {
  const LayerShape shape = Shape(64, RopeStyle::kHalves);
  const size_t n = 2 * kBlockRows + 10, width = shape.n_kv_heads * shape.head_dim;
  const std::vector<float> keys = Random(n * width, 1), values = Random(n * width, 2);
  for (const bool keeps_all : {true, false}) {
    ByteCounter counter, other;
    StoreShape of{{shape}, ComputeType::kF32, false, true};
    of.keeps_all = keeps_all;
    RowStore store(counter, of, {RowType::kF32, RowType::kF32});
    store.Reserve({.n_step = n, .budgets = {}});
    store.Append(0, 0, n, keys.data(), values.data());
    for (size_t h = 0; h < shape.n_kv_heads; ++h) store.Close(0, h, {});
    store.EndStep();
    std::vector<SharedPart> parts;
    store.AddShareable(parts);
    ASSERT_EQ(parts.size(), keeps_all ? 1 : 0);
    auto clone = store.Clone(other);
    EXPECT_EQ(counter.now, other.now);
    const uint32_t swapped[] = {1, 0}, rows[] = {0, 1, n - 2, n - 1};
    const auto read = [&](const KvStore& from) {
      std::vector<float> k(4 * shape.head_dim), v(k.size());
      from.ReadRows(0, 1, rows, k.data(), v.data());
      return k;
    };
    const std::vector<float> before = read(store);
    store.Reorder(0, 1, n - 2, swapped);
    EXPECT_EQ(read(*clone), before);
    EXPECT_NE(read(store), before);
    if (keeps_all) {
      EXPECT_DEATH(store.Reorder(0, 1, 0, swapped), "rows of another cache");
    }
    clone.reset();
    EXPECT_EQ(other.now, 0u);
    store.Reorder(0, 1, 0, swapped);
  }
}

}  // namespace
}  // namespace lesskv
