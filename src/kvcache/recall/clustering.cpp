#include "kvcache/recall/clustering.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/rng.h"
#include "kernels/basic/basic.h"
#include "kernels/linear/linear.h"

namespace lesskv {
namespace {

constexpr size_t kBlockKeys = 128;  // keys whose cosines are in memory at a time

// n different numbers below `of`, in the order in which they were drawn.
std::vector<uint32_t> Draw(size_t n, size_t of, Rng& rng) {
  std::vector<uint32_t> all(of);
  std::iota(all.begin(), all.end(), 0u);
  for (size_t i = 0; i < n; ++i) std::swap(all[i], all[i + rng.Below(of - i)]);
  all.resize(n);
  return all;
}

// A key's own length does not change which cosine is largest.
void Assign(const float* keys, size_t n, size_t dim, const float* centroids, size_t n_clusters,
            std::span<uint32_t> labels) {
  std::vector<float> unit(centroids, centroids + n_clusters * dim), cosines(kBlockKeys * n_clusters);
  for (size_t c = 0; c < n_clusters; ++c) {
    float* const row = &unit[c * dim];
    Scale(row, 1 / (std::sqrt(Dot(row, row, dim)) + 1e-8f), dim);
  }
  const WeightView view{DType::kF32, n_clusters, dim, unit.data()};
  for (size_t first = 0; first < n; first += kBlockKeys) {
    const size_t block = std::min(kBlockKeys, n - first);
    Linear(view, keys + first * dim, dim, block, cosines.data(), n_clusters, ComputeType::kF32);
    for (size_t i = 0; i < block; ++i)
      labels[first + i] = static_cast<uint32_t>(ArgMax(&cosines[i * n_clusters], n_clusters));
  }
}

void TakeMeans(const float* keys, size_t n, size_t dim, std::span<const uint32_t> labels, float* centroids,
               size_t n_clusters) {
  std::vector<float> sums(n_clusters * dim);
  std::vector<size_t> sizes(n_clusters);
  for (size_t i = 0; i < n; ++i) {
    Add(&sums[labels[i] * dim], keys + i * dim, dim);
    ++sizes[labels[i]];
  }
  for (size_t c = 0; c < n_clusters; ++c) {
    if (sizes[c] == 0) continue;
    Scale(&sums[c * dim], 1 / static_cast<float>(sizes[c]), dim);
    std::copy_n(&sums[c * dim], dim, centroids + c * dim);
  }
}

}  // namespace

void ClusterKeys(const float* keys, size_t n, size_t dim, size_t n_clusters, size_t passes, uint64_t seed,
                 float* centroids, std::span<uint32_t> labels) {
  CHECK(n_clusters >= 1 && n_clusters <= n && labels.size() == n, "{} clusters of {} keys", n_clusters, n);
  Rng rng(seed);
  size_t next = 0;
  for (const uint32_t key : Draw(n_clusters, n, rng)) std::copy_n(keys + key * dim, dim, centroids + dim * next++);
  Assign(keys, n, dim, centroids, n_clusters, labels);
  std::vector<uint32_t> before(n);
  for (size_t pass = 0; pass < passes; ++pass) {
    std::copy(labels.begin(), labels.end(), before.begin());
    TakeMeans(keys, n, dim, labels, centroids, n_clusters);
    Assign(keys, n, dim, centroids, n_clusters, labels);
    if (std::equal(labels.begin(), labels.end(), before.begin())) break;
  }
}

void OrderByLabel(std::span<const uint32_t> labels, std::span<uint32_t> order, std::span<uint32_t> ends) {
  std::fill(ends.begin(), ends.end(), 0u);
  for (const uint32_t label : labels) ++ends[label];
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  for (size_t i = labels.size(); i-- > 0;) order[--ends[labels[i]]] = static_cast<uint32_t>(i);
  // Each end now stands where its cluster begins.
  std::copy(ends.begin() + 1, ends.end(), ends.begin());
  ends.back() = static_cast<uint32_t>(labels.size());
}

std::vector<RowRange> SelectRows(std::span<const float> scores, std::span<const uint32_t> ends, size_t budget) {
  struct Ranked {
    float score;
    uint32_t cluster;
    bool operator<(const Ranked& other) const {
      return score != other.score ? score < other.score : cluster > other.cluster;
    }
  };
  std::vector<Ranked> heap(scores.size());
  for (uint32_t c = 0; c < heap.size(); ++c)
    heap[c] = {std::isnan(scores[c]) ? -std::numeric_limits<float>::infinity() : scores[c], c};
  std::make_heap(heap.begin(), heap.end());  // a query needs the best few only
  std::vector<RowRange> ranges;
  size_t left = budget;
  for (auto end = heap.end(); left > 0 && end != heap.begin(); --end) {
    std::pop_heap(heap.begin(), end);
    const uint32_t c = (end - 1)->cluster;
    const size_t first = c == 0 ? 0 : ends[c - 1], n = std::min<size_t>(left, ends[c] - first);
    if (n > 0) ranges.push_back({first, n});
    left -= n;
  }
  return ranges;
}

}  // namespace lesskv
