// Tests: a KiviStore of one layer that tokens go through, and what attention over it should give.
#pragma once

#include <cmath>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "kvcache/codec/kivi_store.h"
#include "kvcache/codec/row_store.h"

namespace lesskv {

inline constexpr size_t kDim = 32, kHeads = 4, kKvHeads = 2;

inline LayerShape Shape(size_t n_heads = kHeads, size_t n_kv_heads = kKvHeads) {
  return {n_heads, n_kv_heads, kDim, UsualScale(kDim), std::make_shared<RopeTable>(RopeConfig{.n_dims = 0, .frequency_factors = {}}), 0};
}

struct Rows {
  std::vector<float> q, k, v;
  explicit Rows(size_t n, size_t n_heads = kHeads, size_t n_kv_heads = kKvHeads) {
    Rng rng(7);
    for (auto* x : {&q, &k, &v}) x->resize(n * (x == &q ? n_heads : n_kv_heads) * kDim);
    for (auto* x : {&q, &k, &v})
      for (float& f : *x) f = rng.Normal();
  }
};

// A store of one layer that nothing leaves.
struct Subject {
  ByteCounter counter;
  LayerShape shape;
  std::unique_ptr<KvStore> store;
  size_t seen = 0;

  explicit Subject(const KiviOptions& options, const LayerShape& s = Shape()) : shape(s) {
    store = std::make_unique<KiviStore>(counter, StoreShape{{shape}, ComputeType::kF32, false, true}, options);
  }
  explicit Subject(RowType type) : shape(Shape()) {
    store = std::make_unique<RowStore>(counter, StoreShape{{shape}, ComputeType::kF32, false, true}, RowTypes{type, type});
  }
  KiviStore& kivi() { return static_cast<KiviStore&>(*store); }

  // One step; the outputs of its queries.
  std::vector<float> Step(const Rows& rows, size_t n) {
    const size_t kv = shape.kv_dim(), qs = shape.q_dim();
    store->Reserve({.n_step = n, .budgets = {}});
    store->Append(0, 0, n, &rows.k[seen * kv], &rows.v[seen * kv]);
    std::vector<float> out(n * qs), lse(n * shape.n_heads);
    JobList list;
    StoreQuery query{.queries = &rows.q[seen * qs], .n_queries = n, .out = out.data(), .lse = lse.data()};
    store->AddJobs(query, list);
    Attend(list.jobs);
    store->Observe(query);
    store->Finish(query);
    for (size_t h = 0; h < shape.n_kv_heads; ++h) store->Close(0, h, {});
    store->EndStep();
    seen += n;
    return out;
  }
  std::vector<std::byte> Saved() const {
    ByteWriter out;
    store->Save(out);
    return out.bytes;
  }
  std::pair<std::vector<float>, std::vector<float>> Read(size_t h, size_t n) const {
    std::vector<uint32_t> rows(n);
    std::iota(rows.begin(), rows.end(), 0u);
    std::vector<float> keys(n * kDim), values(n * kDim);
    store->ReadRows(0, h, rows, keys.data(), values.data());
    return {keys, values};
  }
};

// Softmax attention in double over what ReadRows gives.
inline std::vector<double> Exact(const Subject& subject, const Rows& rows, size_t token, size_t n) {
  const LayerShape& shape = subject.shape;
  std::vector<double> out(shape.q_dim());
  for (size_t head = 0; head < shape.n_heads; ++head) {
    const auto [keys, values] = subject.Read(head / shape.group(), n);
    std::vector<double> p(n);
    double sum = 0;
    for (size_t r = 0; r < n; ++r) {
      for (size_t c = 0; c < kDim; ++c) p[r] += double(rows.q[(token * shape.n_heads + head) * kDim + c]) * keys[r * kDim + c];
      p[r] = std::exp(p[r] * shape.scale);
      sum += p[r];
    }
    for (size_t r = 0; r < n; ++r)
      for (size_t c = 0; c < kDim; ++c) out[head * kDim + c] += p[r] / sum * values[r * kDim + c];
  }
  return out;
}

inline double Deviation(const std::vector<float>& x, const std::vector<double>& want) {
  double error = 0, power = 0;
  for (size_t i = 0; i < x.size(); ++i) error += std::pow(x[i] - want[i], 2), power += want[i] * want[i];
  return error / power;
}

}  // namespace lesskv
