// Clusters of keys by direction, and which of them a query reads: the arithmetic of ClusterKV (arXiv 2412.03213),
// without memory of its own. All results are the same whatever the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace lesskv {

// k-means by cosine: a key belongs to the centroid with the largest cos(key, centroid), the lower one among equals; a
// centroid is the mean of its keys as they are, and one without keys stays as it was. Starts from n_clusters different
// keys drawn with `seed`, then `passes` means at most, fewer where labels no longer change; labels are always those of
// the final centroids. Keys of length 0 and those that are not numbers go to cluster 0.
//   keys       [n, dim], n >= n_clusters >= 1
//   centroids  [n_clusters, dim], written
//   labels     [n], written
void ClusterKeys(const float* keys, size_t n, size_t dim, size_t n_clusters, size_t passes, uint64_t seed,
                 float* centroids, std::span<uint32_t> labels);

// Keys by label, those of one label in their old order: order [n] receives their numbers, ends [n_clusters] how many
// have that label or a lower one.
void OrderByLabel(std::span<const uint32_t> labels, std::span<uint32_t> order, std::span<uint32_t> ends);

struct RowRange {
  size_t first = 0, n = 0;
};

// The rows of the best clusters, in the order of their scores, budget of them: the last cluster is cut at its end. Of
// equal scores the lower cluster comes first; what is not a number comes last.
//   scores  [n_clusters]: q . centroid
//   ends    [n_clusters], ascending: rows of cluster c and those before it
std::vector<RowRange> SelectRows(std::span<const float> scores, std::span<const uint32_t> ends, size_t budget);

}  // namespace lesskv
