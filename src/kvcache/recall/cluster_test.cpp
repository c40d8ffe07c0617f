// ClusterKV: the arithmetic by hand and by its properties, and the store against exact arithmetic over the rows that
// its own clusters say.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/rng.h"
#include "kernels/attention/attention.h"
#include "kvcache/cache_batch.h"
#include "kvcache/cache_config.h"
#include "kvcache/recall/cluster_file.h"
#include "kvcache/recall/cluster_store.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {
namespace {

using Ids = std::vector<uint32_t>;

std::vector<float> Random(size_t n, Rng& rng) {
  std::vector<float> x(n);
  for (float& value : x) value = rng.Normal();
  return x;
}

double Dot64(const float* a, const float* b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += double(a[i]) * b[i];
  return sum;
}

double Cosine(const float* a, const float* b, size_t n) {
  const double lengths = std::sqrt(Dot64(a, a, n) * Dot64(b, b, n));
  return lengths == 0 ? 0 : Dot64(a, b, n) / lengths;
}

Ids Expand(const std::vector<RowRange>& ranges) {
  Ids rows;
  for (const RowRange& range : ranges)
    for (size_t i = 0; i < range.n; ++i) rows.push_back(static_cast<uint32_t>(range.first + i));
  return rows;
}

// ---- Arithmetic

// More pieces than go to the system at once.
TEST(ClusterFile, PiecesAreTheNextBytesEach) {
  constexpr size_t kPieces = 150, kBytes = 24;
  std::vector<std::byte> bytes(kPieces * kBytes + 7), got(kPieces * kBytes);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 7 / 5);
  ClusterFile file(testing::TempDir());
  file.Resize(bytes.size());
  file.Write(0, bytes);
  std::vector<std::byte*> to;
  for (size_t i = 0; i < kPieces; ++i) to.push_back(&got[i * kBytes]);
  file.ReadPieces(7, to, kBytes);
  EXPECT_TRUE(std::equal(got.begin(), got.end(), bytes.begin() + 7));
}

TEST(Clustering, OrderAndSelectionByHand) {
  const Ids labels = {2, 0, 1, 1, 1, 2};
  Ids order(6), ends(3);
  OrderByLabel(labels, order, ends);
  EXPECT_EQ(ends, (Ids{1, 4, 6}));
  EXPECT_EQ(order, (Ids{1, 2, 3, 4, 0, 5}));
  const auto tokens = [&](std::vector<float> scores, size_t budget) {
    Ids rows = Expand(SelectRows(scores, ends, budget));
    for (uint32_t& row : rows) row = order[row];
    return rows;
  };
  EXPECT_EQ(tokens({2, 1, 3}, 3), (Ids{0, 5, 1}));
  EXPECT_EQ(tokens({1, 3, 2}, 4), (Ids{2, 3, 4, 0}));
  EXPECT_EQ(tokens({1, 1, 1}, 2), (Ids{1, 2}));  // ties: the lower cluster
  EXPECT_EQ(tokens({1, std::nanf(""), -1}, 4), (Ids{1, 0, 5, 2}));
  EXPECT_EQ(tokens({1, 2, 3}, 100).size(), 6u);
  EXPECT_TRUE(tokens({1, 2, 3}, 0).empty());
}

TEST(Clustering, SelectionsAreExactNestedAndFreeOfScale) {
  Rng rng(1);
  for (int round = 0; round < 50; ++round) {
    const size_t n_clusters = 1 + rng.Below(40);
    Ids ends(n_clusters);
    for (size_t c = 0; c < n_clusters; ++c)
      ends[c] = static_cast<uint32_t>((c > 0 ? ends[c - 1] : 0) + rng.Below(9));  // some empty
    std::vector<float> scores = Random(n_clusters, rng), scaled = scores;
    for (float& x : scaled) x *= 0.125f;
    Ids before;
    for (size_t budget = 0; budget <= ends.back() + 2; ++budget) {
      const Ids rows = Expand(SelectRows(scores, ends, budget));
      ASSERT_EQ(rows.size(), std::min<size_t>(budget, ends.back()));
      ASSERT_EQ(std::set<uint32_t>(rows.begin(), rows.end()).size(), rows.size());
      ASSERT_TRUE(std::equal(before.begin(), before.end(), rows.begin())) << "a larger budget adds rows behind";
      ASSERT_EQ(rows, Expand(SelectRows(scaled, ends, budget)));
      before = rows;
    }
    // The best cluster's rows first.
    size_t best = 0;
    for (size_t c = 0; c < n_clusters; ++c)
      if (ends[c] > (c > 0 ? ends[c - 1] : 0) &&
          (ends[best] == (best > 0 ? ends[best - 1] : 0) || scores[c] > scores[best]))
        best = c;
    if (!before.empty()) {
      EXPECT_EQ(before[0], best == 0 ? 0 : ends[best - 1]);
    }
  }
}

// Labels are those of the final centroids, whatever a key's length; the same again with the same seed.
TEST(Clustering, LabelsAreNearestByCosine) {
  Rng rng(2);
  for (const auto& [n, dim, n_clusters, passes] : {std::tuple<size_t, size_t, size_t, size_t>{300, 16, 7, 4},
                                                   {129, 5, 20, 0},
                                                   {64, 8, 64, 3},
                                                   {1, 3, 1, 2},
                                                   {500, 64, 6, 20}}) {
    std::vector<float> keys = Random(n * dim, rng), centroids(n_clusters * dim);
    for (size_t i = 0; i < n; ++i)
      for (size_t c = 0; c < dim; ++c) keys[i * dim + c] *= static_cast<float>(i % 5 + 1);
    Ids labels(n), again(n);
    ClusterKeys(keys.data(), n, dim, n_clusters, passes, 9, centroids.data(), labels);
    for (size_t i = 0; i < n; ++i) {
      double best = -2;
      for (size_t c = 0; c < n_clusters; ++c) best = std::max(best, Cosine(&keys[i * dim], &centroids[c * dim], dim));
      ASSERT_GE(Cosine(&keys[i * dim], &centroids[labels[i] * dim], dim), best - 1e-5) << i;
    }
    std::vector<float> same(n_clusters * dim);
    ClusterKeys(keys.data(), n, dim, n_clusters, passes, 9, same.data(), again);
    EXPECT_EQ(labels, again);
    EXPECT_EQ(centroids, same);
  }
}

// Between the same centroids a key's length decides nothing, however it is scaled.
TEST(Clustering, AKeysLengthDecidesNothing) {
  Rng rng(8);
  constexpr size_t kN = 120, kDim = 16, kClusters = 9;
  std::vector<float> keys = Random(kN * kDim, rng), centroids(kClusters * kDim), same(kClusters * kDim);
  Ids labels(kN), after(kN);
  ClusterKeys(keys.data(), kN, kDim, kClusters, 0, 4, centroids.data(), labels);  // no pass: keys that were drawn
  for (size_t i = 0; i < kN; ++i)
    for (const float factor : {3.0f, 0.01f, 1e4f}) {
      std::vector<float> scaled = keys;
      for (size_t c = 0; c < kDim; ++c) scaled[i * kDim + c] *= factor;
      ClusterKeys(scaled.data(), kN, kDim, kClusters, 0, 4, same.data(), after);
      ASSERT_EQ(after, labels) << "key " << i << " times " << factor;
      size_t drawn = 0;
      for (size_t c = 0; c < kClusters; ++c) drawn += !std::equal(&same[c * kDim], &same[(c + 1) * kDim - 1] + 1, &centroids[c * kDim]);
      ASSERT_LE(drawn, 1u);
    }
}

// Directions far apart, lengths that differ: every direction a cluster, its centroid the mean of the keys as they are.
TEST(Clustering, FindsDirections) {
  Rng rng(3);
  constexpr size_t kN = 400, kDim = 24, kDirections = 4;
  std::vector<float> keys(kN * kDim), centroids(kDirections * kDim);
  for (size_t i = 0; i < kN; ++i)
    for (size_t c = 0; c < kDim; ++c) {
      const float length = rng.UniformFloat(0.1f, 10.0f);
      keys[i * kDim + c] = (c / 6 == i % kDirections ? length : 0) + 0.01f * rng.Normal();
    }
  // A draw that begins with two keys of one direction may stay there: the best of some is the test.
  bool found = false;
  for (uint64_t seed = 0; seed < 20 && !found; ++seed) {
    Ids labels(kN);
    ClusterKeys(keys.data(), kN, kDim, kDirections, 20, seed, centroids.data(), labels);
    std::set<std::pair<size_t, uint32_t>> pairs;
    for (size_t i = 0; i < kN; ++i) pairs.insert({i % kDirections, labels[i]});
    found = pairs.size() == kDirections;
    if (!found) continue;
    for (const auto& [direction, label] : pairs)
      for (size_t c = 0; c < kDim; ++c) {
        double mean = 0;
        for (size_t i = direction; i < kN; i += kDirections) mean += keys[i * kDim + c];
        EXPECT_NEAR(centroids[label * kDim + c], mean / (kN / kDirections), 1e-4);
      }
  }
  EXPECT_TRUE(found);
}

TEST(Clustering, EdgesHaveAPlace) {
  std::vector<float> keys(6 * 4, 2.0f), centroids(3 * 4);
  Ids labels(6);
  ClusterKeys(keys.data(), 6, 4, 3, 4, 1, centroids.data(),
              labels);  // all alike: the others stay empty, where they began
  EXPECT_EQ(labels, Ids(6, 0));
  EXPECT_EQ(centroids, std::vector<float>(12, 2.0f));
  std::fill(keys.begin(), keys.end(), 0.0f);
  ClusterKeys(keys.data(), 6, 4, 3, 4, 1, centroids.data(), labels);
  EXPECT_EQ(labels, Ids(6, 0));
  keys[5] = std::nanf("");
  ClusterKeys(keys.data(), 6, 4, 3, 4, 1, centroids.data(), labels);
  for (const uint32_t label : labels) EXPECT_LT(label, 3u);
}

// ---- The store

struct Shape {
  size_t n_layers = 2, n_kv = 2, group = 3, d = 32;
  float query_length = 1;  // a factor of all queries, by which their scores are divided
  size_t n_heads() const { return n_kv * group; }
};

StoreShape MakeStoreShape(const Shape& shape) {
  CacheShape cache = CacheShape::Uniform(shape.n_layers, shape.n_heads(), shape.n_kv, shape.d, 4096,
                                         {.n_dims = shape.d, .frequency_factors = {}});
  for (LayerShape& layer : cache.layers) layer.scale /= shape.query_length;
  return {cache.layers, ComputeType::kF32, false, true, false};
}

// Drives a store as the cache does, with keys and queries as they are stored.
struct Driver {
  Driver(const Shape& s, std::unique_ptr<KvStore> made, uint64_t seed) : shape(s), store(std::move(made)), rng(seed) {}

  std::vector<std::vector<float>> Step(size_t n, bool is_prompt) {
    const size_t kv = shape.n_kv * shape.d, qd = shape.n_heads() * shape.d;
    StoreRoom(n, is_prompt);
    std::vector<std::vector<float>> outputs;
    for (size_t layer = 0; layer < shape.n_layers; ++layer) {
      keys.resize(shape.n_layers), values.resize(shape.n_layers), queries.resize(shape.n_layers);
      const std::vector<float> k = Random(n * kv, rng), v = Random(n * kv, rng),
                               q = asks_again ? queries[layer] : Random(n * qd, rng);
      keys[layer].insert(keys[layer].end(), k.begin(), k.end());
      values[layer].insert(values[layer].end(), v.begin(), v.end());
      queries[layer] = q;
      for (float& x : queries[layer]) x *= asks_again ? 1 : shape.query_length;
      store->Append(layer, 0, n, k.data(), v.data());
      outputs.emplace_back(n * qd);
      std::vector<float> lse(n * shape.n_heads());
      StoreQuery query;
      query.layer = layer;
      query.queries = queries[layer].data();
      query.n_queries = n;
      query.out = outputs.back().data();
      query.lse = lse.data();
      if (before_attention) before_attention(layer);
      JobList list;
      store->AddJobs(query, list);
      Attend(list.jobs);
      store->Finish(query);
      for (size_t h = 0; h < shape.n_kv; ++h) CheckMap(layer, h, n);
    }
    store->EndStep();
    n_tokens += n;
    return outputs;
  }

  // The slot map says where every row is afterwards.
  void CheckMap(size_t layer, size_t h, size_t n) {
    const size_t all = n_tokens + n;
    Ids rows(all);
    std::iota(rows.begin(), rows.end(), 0u);
    std::vector<float> k(all * shape.d), v(k.size()), k_after(k.size()), v_after(k.size());
    const bool checks = checks_maps && all < 400;
    if (checks) store->ReadRows(layer, h, rows, k.data(), v.data());
    const SlotMap map = store->Close(layer, h, {});
    ASSERT_EQ(map.n_rows, all);
    if (!checks) return;
    store->ReadRows(layer, h, rows, k_after.data(), v_after.data());
    Ids from = rows;
    for (const RowMove& move : map.moves) from[move.to] = move.from;
    for (size_t r = 0; r < all; ++r) {
      ASSERT_TRUE(std::equal(&k_after[r * shape.d], &k_after[r * shape.d] + shape.d, &k[from[r] * shape.d])) << r;
      ASSERT_TRUE(std::equal(&v_after[r * shape.d], &v_after[r * shape.d] + shape.d, &v[from[r] * shape.d])) << r;
    }
  }

  void StoreRoom(size_t n, bool is_prompt) { store->Reserve({n, false, is_prompt, false, {}, false}); }

  // The token in each slot of a head, by its key: only for stores of floats.
  Ids Tokens(size_t layer, size_t h) const {
    std::map<float, uint32_t> by_key;
    for (uint32_t t = 0; t < n_tokens; ++t) by_key[keys[layer][(t * shape.n_kv + h) * shape.d]] = t;
    Ids rows(n_tokens);
    std::iota(rows.begin(), rows.end(), 0u);
    std::vector<float> k(n_tokens * shape.d), v(k.size());
    store->ReadRows(layer, h, rows, k.data(), v.data());
    Ids tokens;
    for (size_t r = 0; r < n_tokens; ++r) {
      const uint32_t t = by_key.at(k[r * shape.d]);
      EXPECT_TRUE(std::equal(&k[r * shape.d], &k[r * shape.d] + shape.d, &keys[layer][(t * shape.n_kv + h) * shape.d]));
      EXPECT_TRUE(
          std::equal(&v[r * shape.d], &v[r * shape.d] + shape.d, &values[layer][(t * shape.n_kv + h) * shape.d]));
      tokens.push_back(t);
    }
    return tokens;
  }

  const ClusterStore& clusters() const { return static_cast<const ClusterStore&>(*store); }

  Shape shape;
  std::unique_ptr<KvStore> store;
  Rng rng;
  size_t n_tokens = 0;
  std::vector<std::vector<float>> keys, values;  // a layer: [tokens, n_kv, d]
  std::vector<std::vector<float>> queries;       // of the last step
  std::function<void(size_t)> before_attention;
  bool checks_maps = true;  // rows that went to a file can be read again when the step has ended
  bool asks_again = false;  // with the queries of the step before
};

Driver Make(const Shape& shape, const ClusterOptions& options, ByteCounter& counter,
            RowTypes types = {RowType::kF32, RowType::kF32}, uint64_t seed = 5) {
  Driver driver(shape, std::make_unique<ClusterStore>(counter, MakeStoreShape(shape), types, options), seed);
  driver.checks_maps = options.folder.empty();
  return driver;
}

Driver MakeFull(const Shape& shape, ByteCounter& counter, RowTypes types = {RowType::kF32, RowType::kF32},
                uint64_t seed = 5) {
  return Driver(shape, std::make_unique<RowStore>(counter, MakeStoreShape(shape), types), seed);
}

// Softmax attention of one query head over given rows, in double precision.
std::vector<double> Exact(const float* q, const std::vector<float>& keys, const std::vector<float>& values,
                          const Ids& rows, size_t d) {
  std::vector<double> p;
  double largest = -1e300, sum = 0;
  for (const uint32_t r : rows) p.push_back(Dot64(q, &keys[r * d], d) / std::sqrt(double(d)));
  for (const double x : p) largest = std::max(largest, x);
  for (double& x : p) sum += x = std::exp(x - largest);
  std::vector<double> out(d);
  for (size_t i = 0; i < rows.size(); ++i)
    for (size_t c = 0; c < d; ++c) out[c] += p[i] / sum * values[rows[i] * d + c];
  return out;
}

// Every token is in one place: a sink, a cluster (its tokens in the order of the text), or behind. Clusters come in the
// numbers that the text's length says.
TEST(ClusterStore, EveryTokenIsInOnePlace) {
  const Shape shape;
  for (const size_t n_prompt : {1, 3, 4, 5, 9, 40, 200}) {
    SCOPED_TRACE(n_prompt);
    ByteCounter counter;
    const ClusterOptions options{.budget = 12, .sinks = 4, .size = 6, .every = 10, .added = 3, .skip = 1};
    Driver driver = Make(shape, options, counter);
    driver.Step(n_prompt, true);
    const size_t behind = n_prompt - std::min<size_t>(n_prompt, 4),
                 first = behind == 0 ? 0 : std::max<size_t>(1, behind / 6);
    const size_t missing = 4 - std::min<size_t>(4, n_prompt);  // sinks that the prompt did not fill
    for (size_t g = 0; g <= 37; ++g) {
      if (g > 0) driver.Step(1, false);
      const size_t generated = g - std::min(g, missing), windows = generated / 10;
      ASSERT_EQ(driver.clusters().n_clusters(), first + 3 * windows);
      ASSERT_EQ(driver.clusters().clustered_rows(), behind + 10 * windows);
      for (size_t h = 0; h < shape.n_kv; ++h) {
        const Ids tokens = driver.Tokens(1, h);
        const auto at = [&](size_t i) { return tokens.begin() + static_cast<ptrdiff_t>(i); };
        Ids sorted = tokens;
        std::sort(sorted.begin(), sorted.end());
        for (uint32_t t = 0; t < driver.n_tokens; ++t) ASSERT_EQ(sorted[t], t);
        if (driver.n_tokens < 4) continue;
        const size_t rest = 4 + behind + 10 * windows;
        ASSERT_TRUE(std::is_sorted(at(0), at(4)));
        EXPECT_EQ(*at(3), 3u);
        for (size_t i = rest; i < tokens.size(); ++i) ASSERT_EQ(tokens[i], i);
        size_t begin = 0;
        for (const uint32_t end : driver.clusters().Ends(1, h)) {
          ASSERT_TRUE(std::is_sorted(at(4 + begin), at(4 + end)));
          begin = end;
        }
        ASSERT_EQ(begin, driver.clusters().clustered_rows());
      }
      const Ids untouched = driver.Tokens(0, 0);
      ASSERT_TRUE(std::is_sorted(untouched.begin(), untouched.end())) << "layers that are skipped";
    }
  }
}

// A cluster holds the keys that are nearest to its centroid, of those that were clustered with them.
TEST(ClusterStore, ClustersHoldWhatIsNearest) {
  const Shape shape;
  ByteCounter counter;
  Driver driver = Make(shape, {.budget = 30, .sinks = 3, .size = 9, .every = 20, .added = 4, .skip = 0}, counter);
  driver.Step(150, true);
  for (int i = 0; i < 45; ++i) driver.Step(1, false);
  const size_t first = (150 - 3) / 9;
  ASSERT_EQ(driver.clusters().n_clusters(), first + 8);
  for (size_t layer = 0; layer < 2; ++layer)
    for (size_t h = 0; h < shape.n_kv; ++h) {
      const auto ends = driver.clusters().Ends(layer, h);
      const float* mu = driver.clusters().Centroids(layer, h).data();
      const Ids tokens = driver.Tokens(layer, h);
      for (size_t c = 0, row = 0; c < ends.size(); ++c)
        for (; row < ends[c]; ++row) {
          const float* key = &driver.keys[layer][(tokens[3 + row] * shape.n_kv + h) * shape.d];
          const size_t from = c < first ? 0 : first + (c - first) / 4 * 4, to = c < first ? first : from + 4;
          for (size_t other = from; other < to; ++other)
            ASSERT_GE(Cosine(key, mu + c * shape.d, shape.d), Cosine(key, mu + other * shape.d, shape.d) - 1e-6);
        }
    }
}

// What single tokens read is what exact arithmetic says of the store's clusters: sinks, the best clusters up to the
// budget, and all that is in none; a head or a group at a time, for rows of every kind.
TEST(ClusterStore, OutputsAreThoseOfExactArithmetic) {
  const Shape shape;
  const size_t d = shape.d;
  for (const RowTypes types : {RowTypes{RowType::kF32, RowType::kF32}, RowTypes{RowType::kF16, RowType::kF16},
                               RowTypes{RowType::kBF16, RowType::kF32}, RowTypes{RowType::kQ8, RowType::kQ4},
                               RowTypes{RowType::kQ8, RowType::kQ8, true}})
    for (const bool by_group : {false, true}) {
      SCOPED_TRACE(testing::Message() << Name(types.keys) << (by_group ? " by group" : " by head"));
      const double near = types.keys == RowType::kQ8 ? 1e-4 : 2e-5;  // queries may be rounded to 16 bits
      ByteCounter counter;
      const ClusterOptions options{
          .budget = 25, .by_group = by_group, .sinks = 5, .size = 7, .every = 16, .added = 2, .skip = 1};
      Driver driver = Make(shape, options, counter, types);
      driver.Step(140, true);
      std::vector<std::vector<float>> k(shape.n_kv), v(shape.n_kv), mu(shape.n_kv);
      std::vector<Ids> ends(shape.n_kv);
      size_t clustered = 0;
      for (int step = 0; step < 40; ++step) {
        const size_t n = driver.n_tokens + 1;
        driver.before_attention = [&](size_t layer) {  // what is there when the queries come
          if (layer != 1) return;
          Ids rows(n);
          std::iota(rows.begin(), rows.end(), 0u);
          clustered = driver.clusters().clustered_rows();
          for (size_t h = 0; h < shape.n_kv; ++h) {
            k[h].resize(n * d), v[h].resize(n * d);
            driver.store->ReadRows(1, h, rows, k[h].data(), v[h].data());
            const auto own_ends = driver.clusters().Ends(1, h);
            const auto own_mu = driver.clusters().Centroids(1, h);
            ends[h].assign(own_ends.begin(), own_ends.end());
            mu[h].assign(own_mu.begin(), own_mu.end());
          }
        };
        const RecallStats before = driver.store->recall();
        const auto outputs = driver.Step(1, false);
        EXPECT_EQ(driver.store->recall().queries - before.queries, shape.n_heads());
        EXPECT_EQ(driver.store->recall().rows_read - before.rows_read, shape.n_heads() * (25 + n - 5 - clustered));
        for (size_t head = 0; head < shape.n_heads(); ++head) {
          const size_t h = head / shape.group;
          std::vector<std::pair<double, size_t>> ranked;
          for (size_t c = 0; c < ends[h].size(); ++c) {
            double score = 0;
            for (size_t g = by_group ? h * shape.group : head; g < (by_group ? (h + 1) * shape.group : head + 1); ++g)
              score += Dot64(&driver.queries[1][g * d], &mu[h][c * d], d);
            ranked.push_back({-score, c});
          }
          std::sort(ranked.begin(), ranked.end());
          Ids rows = {0, 1, 2, 3, 4};
          for (const auto& [score, c] : ranked)
            for (size_t r = c == 0 ? 0 : ends[h][c - 1]; r < ends[h][c] && rows.size() < 25; ++r)
              rows.push_back(static_cast<uint32_t>(5 + r));
          ASSERT_EQ(rows.size(), 25u);
          for (size_t r = 5 + clustered; r < n; ++r) rows.push_back(static_cast<uint32_t>(r));
          const auto want = Exact(&driver.queries[1][head * d], k[h], v[h], rows, d);
          for (size_t c = 0; c < d; ++c)
            ASSERT_NEAR(outputs[1][head * d + c], want[c], near) << "step " << step << ", head " << head;
        }
      }
    }
}

// Longer queries whose scores are divided by as much read the same rows: neither a query's length nor the scale of the
// scores decides.
TEST(ClusterStore, WhatIsReadIsFreeOfAQuerysLength) {
  for (const bool by_group : {false, true})
    for (const float length : {8.0f, 0.3f, 50.0f}) {
      SCOPED_TRACE(testing::Message() << length << (by_group ? " by group" : " by head"));
      Shape shape, other;
      other.query_length = length;
      ByteCounter counter;
      const ClusterOptions options{
          .budget = 25, .by_group = by_group, .sinks = 5, .size = 7, .every = 16, .added = 2, .skip = 0};
      Driver one = Make(shape, options, counter), longer = Make(other, options, counter);
      one.Step(140, true), longer.Step(140, true);
      for (int step = 0; step < 40; ++step) {
        const auto want = one.Step(1, false), got = longer.Step(1, false);
        for (size_t layer = 0; layer < shape.n_layers; ++layer)
          for (size_t c = 0; c < want[layer].size(); ++c) ASSERT_NEAR(got[layer][c], want[layer][c], 2e-5) << "step " << step;
      }
    }
}

// Where everything fits the budget everything is read; prompts, and layers that are skipped, always read everything.
TEST(ClusterStore, ReadsEverythingWhereItShould) {
  const Shape shape;
  ByteCounter counter, full_counter;
  for (const size_t budget : {8, 60, 400}) {
    Driver driver = Make(shape, {.budget = budget, .sinks = 4, .size = 6, .every = 10, .added = 3, .skip = 1}, counter);
    Driver full = MakeFull(shape, full_counter);
    bool differed = false;
    for (const auto& [n, is_prompt] : {std::pair<size_t, bool>{40, true},
                                       {1, false},
                                       {1, false},
                                       {30, true},
                                       {1, true},
                                       {12, false},
                                       {1, false},
                                       {1, false},
                                       {5, true},
                                       {3, false},
                                       {1, false}}) {
      const bool all = n > 1 || is_prompt || driver.clusters().clustered_rows() + 4 <= budget;
      const auto got = driver.Step(n, is_prompt), want = full.Step(n, is_prompt);
      EXPECT_EQ(got[0], want[0]) << "a layer without clusters, in every bit";
      double worst = 0;
      for (size_t i = 0; i < got[1].size(); ++i) worst = std::max(worst, std::fabs(double(got[1][i]) - want[1][i]));
      if (all) {
        EXPECT_LT(worst, 1e-5) << "after " << driver.n_tokens;
      } else {
        differed = differed || worst > 1e-3;
      }
    }
    EXPECT_EQ(differed, budget == 8 || budget == 60);
  }
}

// Clusters of one key each: the rows with the largest q . k. One cluster of all: the first ones.
TEST(ClusterStore, ExtremesAreKnown) {
  const Shape shape;
  ByteCounter counter;
  Driver singles = Make(shape, {.budget = 20, .sinks = 4, .size = 1, .skip = 0}, counter);
  singles.Step(120, true);
  Driver one = Make(shape, {.budget = 20, .sinks = 4, .size = 1000, .skip = 0}, counter);
  one.Step(120, true);
  ASSERT_EQ(singles.clusters().n_clusters(), 116u);
  ASSERT_EQ(one.clusters().n_clusters(), 1u);
  Rng rng(6);
  const std::vector<float> q = Random(shape.group * shape.d, rng);
  for (size_t h = 0; h < shape.n_kv; ++h)
    for (size_t g = 0; g < shape.group; ++g) {
      const Ids tokens = singles.Tokens(0, h);
      Ids got;
      for (const uint32_t row : Expand(singles.clusters().Select(0, h, g, 1, q.data()))) got.push_back(tokens[4 + row]);
      Ids want(116);
      std::iota(want.begin(), want.end(), 4u);
      std::sort(want.begin(), want.end(), [&](uint32_t a, uint32_t b) {
        const auto score = [&](uint32_t t) {
          return Dot64(&q[g * shape.d], &singles.keys[0][(t * shape.n_kv + h) * shape.d], shape.d);
        };
        return score(a) > score(b);
      });
      want.resize(16);
      EXPECT_EQ(got, want);
      Ids first(16);
      std::iota(first.begin(), first.end(), 0u);
      EXPECT_EQ(Expand(one.clusters().Select(0, h, g, 1, q.data())), first);
    }
}

TEST(ClusterStore, RunsAreAlike) {
  const Shape shape;
  ByteWriter saved[2];
  for (ByteWriter& out : saved) {
    ByteCounter counter;
    Driver driver = Make(shape, {.budget = 20, .sinks = 4, .size = 6, .every = 10, .added = 3, .skip = 0}, counter);
    driver.Step(100, true);
    for (int i = 0; i < 25; ++i) driver.Step(1, false);
    driver.store->Save(out);
  }
  EXPECT_TRUE(saved[0].bytes == saved[1].bytes);
}

// ---- Clusters in a file

class Folder {
 public:
  Folder() : path_(std::filesystem::temp_directory_path() / fmt::format("lesskv-cluster-test-{}", getpid())) {
    std::filesystem::create_directory(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string path() const { return path_; }
  bool empty() const { return std::filesystem::is_empty(path_); }

 private:
  std::filesystem::path path_;
};

// Prompts, chunks and single tokens.
const std::pair<size_t, bool> kLife[] = {{70, true}, {1, false}, {1, false}, {33, false}, {1, false},
                                         {1, false}, {1, false}, {40, true}, {1, false},  {1, false},
                                         {2, false}, {1, false}, {1, true},  {1, false}};

// Where rows lie changes no bit, however few of them are in memory.
TEST(ClusterOffload, AnswersAsInMemory) {
  const Folder folder;
  const Shape shape{3, 2, 2, 32};
  for (const RowTypes types : {RowTypes{RowType::kF32, RowType::kF32}, RowTypes{RowType::kQ8, RowType::kQ4, true}})
    for (const bool by_group : {false, true})
      for (const size_t budget : {21, 500})
        for (const size_t cache_rows : {1, 48, 1000}) {
          SCOPED_TRACE(testing::Message()
                       << Name(types.keys) << ", " << by_group << ", " << budget << ", " << cache_rows);
          ByteCounter counter;
          ClusterOptions options{
              .budget = budget, .by_group = by_group, .sinks = 4, .size = 6, .every = 10, .added = 3, .skip = 1};
          Driver memory = Make(shape, options, counter, types);
          options.folder = folder.path();
          options.cache_rows = cache_rows;
          Driver file = Make(shape, options, counter, types);
          for (const auto& [n, is_prompt] : kLife) {
            const auto want = memory.Step(n, is_prompt), got = file.Step(n, is_prompt);
            ASSERT_EQ(got, want) << "after " << file.n_tokens;
            ASSERT_TRUE(folder.empty());
            ASSERT_EQ(file.store->recall().rows_offloaded, 2 * shape.n_kv * file.clusters().clustered_rows());
          }
          if (types.keys == RowType::kF32) {
            for (size_t layer = 0; layer < 3; ++layer) EXPECT_EQ(file.Tokens(layer, 1), memory.Tokens(layer, 1));
          }
          // A clone goes on as its original, and alone.
          ByteCounter other;
          Driver clone(shape, file.store->Clone(other), 5);
          clone.rng = file.rng;
          clone.checks_maps = false;
          clone.n_tokens = file.n_tokens;
          clone.keys = file.keys, clone.values = file.values, clone.queries = file.queries;
          ByteWriter saved;
          file.store->Save(saved);
          EXPECT_EQ(clone.Step(1, false), file.Step(1, false));
          for (int i = 0; i < 12; ++i) clone.Step(1, false);
          memory.Step(1, false);
          ASSERT_EQ(file.Step(30, true), memory.Step(30, true));
          ASSERT_EQ(file.Step(1, false), memory.Step(1, false));
          // So does what was saved.
          ByteCounter third;
          Driver restored = Make(shape, options, third, types);
          ByteReader in{saved.bytes};
          restored.store->Load(in, std::vector<size_t>(3 * shape.n_kv), 10000);
          EXPECT_TRUE(in.rest.empty());
          ByteWriter again;
          restored.store->Save(again);
          EXPECT_TRUE(again.bytes == saved.bytes);
        }
}

// A life of random steps under random options: where rows lie changes no bit, and what single tokens read is what exact
// arithmetic says.
TEST(ClusterOffload, RandomLivesAreThoseOfExactArithmetic) {
  const Folder folder;
  size_t n_checked = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Rng rng(seed * 2 + 1);
    const auto one_of = [&](std::initializer_list<size_t> list) { return list.begin()[rng.Below(list.size())]; };
    const Shape shape{1 + rng.Below(3), 1 + rng.Below(2), one_of({1, 2, 4}), one_of({8, 20, 32})};
    ClusterOptions options{.budget = 1,
                           .by_group = rng.Below(2) == 1,
                           .sinks = one_of({0, 1, 5, 16, 40, 300}),
                           .size = one_of({1, 3, 17, 80}),
                           .every = one_of({1, 2, 7, 40, 320}),
                           .passes = one_of({0, 1, 4}),
                           .skip = rng.Below(shape.n_layers)};
    options.budget += options.sinks + one_of({0, 1, 10, 60, 1000});
    options.added = 1 + rng.Below(std::min<size_t>(options.every, 4));
    SCOPED_TRACE(testing::Message() << "seed " << seed << ": " << options.budget << " rows, sinks " << options.sinks
                                    << ", size " << options.size << ", every " << options.every);
    ByteCounter counter, file_counter;
    Driver memory = Make(shape, options, counter);
    options.folder = folder.path();
    options.cache_rows = one_of({1, 17, 50, 1000});
    Driver file = Make(shape, options, file_counter);
    const size_t layer = shape.n_layers - 1, d = shape.d, n_most = one_of({60, 250, 700});
    while (memory.n_tokens < n_most) {
      const bool is_prompt = rng.Below(6) == 0;
      const size_t n = is_prompt ? 1 + rng.Below(n_most / 3) : rng.Below(4) == 0 ? 1 + rng.Below(9) : 1;
      const size_t clustered = memory.clusters().clustered_rows(), all = memory.n_tokens + n;
      const bool chooses = n == 1 && !is_prompt && clustered > 0 && clustered + options.sinks > options.budget;
      std::map<size_t, std::vector<double>> exact;  // by query head
      memory.before_attention = [&](size_t l) {
        if (l != layer || !chooses || rng.Below(2) > 0) return;
        // What every query head is to read, of what is there when the queries come.
        Ids rows(all);
        std::iota(rows.begin(), rows.end(), 0u);
        std::vector<float> k(all * d), v(all * d);
        const std::vector<float> q = memory.queries[layer];
        for (size_t head = 0; head < shape.n_heads(); ++head) {
          const size_t h = head / shape.group;
          memory.store->ReadRows(layer, h, rows, k.data(), v.data());
          const std::span<const uint32_t> ends = memory.clusters().Ends(layer, h);
          std::vector<std::pair<double, size_t>> ranked;
          for (size_t c = 0; c < ends.size(); ++c) {
            double score = 0;
            const size_t first = options.by_group ? h * shape.group : head;
            for (size_t g = first; g < first + (options.by_group ? shape.group : 1); ++g)
              score += Dot64(&q[g * d], &memory.clusters().Centroids(layer, h)[c * d], d);
            ranked.push_back({-score, c});
          }
          std::sort(ranked.begin(), ranked.end());
          Ids read(rows.begin(), rows.begin() + static_cast<ptrdiff_t>(options.sinks));
          for (const auto& [score, c] : ranked)
            for (size_t r = c == 0 ? 0 : ends[c - 1]; r < ends[c] && read.size() < options.budget; ++r)
              read.push_back(static_cast<uint32_t>(options.sinks + r));
          ASSERT_EQ(read.size(), options.budget);
          for (size_t r = options.sinks + clustered; r < all; ++r) read.push_back(static_cast<uint32_t>(r));
          exact[head] = Exact(&q[head * d], k, v, read, d);
        }
      };
      const auto want = memory.Step(n, is_prompt), got = file.Step(n, is_prompt);
      ASSERT_EQ(got, want) << "after " << file.n_tokens;
      for (const auto& [head, out] : exact)
        for (size_t c = 0; c < d; ++c)
          ASSERT_NEAR(want[layer][head * d + c], out[c], 2e-5) << "after " << file.n_tokens;
      n_checked += exact.size();
    }
  }
  EXPECT_GT(n_checked, 400u);
}

// The same question again reads nothing anew where the cache holds what it needs; another one reads what is new.
TEST(ClusterOffload, TheSameQuestionReadsNothing) {
  const Folder folder;
  const Shape shape;
  ByteCounter counter;
  Driver driver = Make(shape,
                       {.budget = 40,
                        .sinks = 4,
                        .size = 10,
                        .every = 300,
                        .added = 3,
                        .skip = 1,
                        .folder = folder.path(),
                        .cache_rows = 16 * 50 * 3},
                       counter);
  driver.Step(500, true);
  EXPECT_EQ(driver.store->recall().rows_recalled, 0u);
  driver.Step(1, false);
  const RecallStats first = driver.store->recall();
  EXPECT_EQ(first.rows_recalled, 36 * shape.n_heads());
  EXPECT_GT(first.bytes_read, first.rows_recalled / 3 * shape.d * 8);
  driver.asks_again = true;
  driver.Step(1, false);
  const RecallStats second = driver.store->recall();
  EXPECT_EQ(second.bytes_read, first.bytes_read);
  EXPECT_EQ(second.rows_recalled - first.rows_recalled, 36 * shape.n_heads());
  EXPECT_EQ(second.rows_cached - first.rows_cached, 36 * shape.n_heads());
  driver.asks_again = false;
  driver.Step(1, false);
  EXPECT_GT(driver.store->recall().bytes_read, second.bytes_read);
}

// Memory does not grow with the text beyond centroids and the rows that are always read; a prompt holds one layer.
TEST(ClusterOffload, MemoryIsBounded) {
  const Folder folder;
  const Shape shape{8, 2, 2, 32};
  ByteCounter counter;
  Driver driver = Make(shape,
                       {.budget = 40,
                        .by_group = true,
                        .sinks = 4,
                        .size = 20,
                        .every = 50,
                        .added = 2,
                        .skip = 0,
                        .folder = folder.path(),
                        .cache_rows = 64},
                       counter);
  const size_t row = 2 * shape.d * sizeof(float), heads = shape.n_layers * shape.n_kv;
  driver.Step(2000, true);
  const size_t centroids = heads * driver.clusters().n_clusters() * (shape.d + 1) * 4;
  EXPECT_LE(counter.now, centroids + heads * (64 + 4 + 128 + 8) * row);
  EXPECT_GE(driver.store->recall().file_bytes, heads * 1996 * row);
  EXPECT_LE(counter.peak, counter.now + centroids + shape.n_kv * 2016 * row);
  for (int i = 0; i < 120; ++i) driver.Step(1, false);
  EXPECT_LE(counter.now, centroids + heads * 4 * 33 * 4 + heads * (64 + 4 + 128 + 8) * row);
}

// Also of a text that comes in chunks, beside layers that hold all of it.
TEST(ClusterOffload, ChunksLeaveMemory) {
  const Folder folder;
  const Shape shape{8, 2, 2, 32};
  const size_t row = 2 * shape.d * sizeof(float);
  for (const size_t chunk : {1, 40, 130}) {
    ByteCounter counter;
    Driver driver = Make(shape,
                         {.budget = 40,
                          .by_group = true,
                          .sinks = 4,
                          .every = 200,
                          .added = 2,
                          .skip = 2,
                          .folder = folder.path(),
                          .cache_rows = 64},
                         counter);
    while (driver.n_tokens < 1000) driver.Step(chunk, false);
    const size_t centroids = 6 * shape.n_kv * driver.clusters().n_clusters() * (shape.d + 1) * 4;
    const size_t rows = shape.n_kv * (6 * (64 + 384 + 8) + 2 * (driver.n_tokens + 128));
    EXPECT_LE(counter.now, centroids + rows * row) << chunk;
  }
}

// A text that is restored where heads have several full blocks takes what it would have taken, whichever leave then.
TEST(ClusterOffload, ARestoredTextLeavesMemoryToo) {
  const Folder folder;
  const Shape shape{3, 2, 2, 32};
  const ClusterOptions options{.budget = 40,
                               .by_group = true,
                               .sinks = 4,
                               .every = 400,
                               .added = 2,
                               .skip = 1,
                               .folder = folder.path(),
                               .cache_rows = 64};
  ByteCounter counter;
  Driver whole = Make(shape, options, counter);
  std::vector<std::pair<ByteWriter, Rng>> moments;
  std::vector<size_t> bytes;
  while (whole.n_tokens < 1200) {
    moments.emplace_back(ByteWriter(), whole.rng);
    whole.store->Save(moments.back().first);
    whole.Step(60, false);
    bytes.push_back(counter.now);
  }
  for (size_t m = 1; m < moments.size(); ++m) {
    ByteCounter other;
    Driver restored = Make(shape, options, other);
    ByteReader in{moments[m].first.bytes};
    restored.store->Load(in, std::vector<size_t>(shape.n_layers * shape.n_kv), 10000);
    restored.rng = moments[m].second, restored.n_tokens = 60 * m;
    restored.checks_maps = false;
    for (size_t step = m; step < bytes.size(); ++step) {
      restored.Step(60, false);
      ASSERT_EQ(other.now, bytes[step]) << "restored behind " << 60 * m << ", behind " << 60 * (step + 1);
    }
  }
}

// What a token reads twice over is more than the whole text where budgets are large: the cache holds no more than that.
TEST(ClusterOffload, TheCacheIsNeverLargerThanTheContext) {
  const Folder folder;
  const auto bytes = [&](const std::string& term) {
    const auto config = CacheConfig::Create(CacheSpec::Parse(fmt::format("cluster({}, offload=\"{}\")", term, folder.path())),
                                            CacheShape::Uniform(4, 6, 2, 32, 512, {.n_dims = 32, .frequency_factors = {}}));
    return config->Plan(512, 0).bytes_end;
  };
  EXPECT_EQ(bytes("400"), bytes("400, cache=512"));
  EXPECT_EQ(bytes("400"), bytes("400, cache=5000"));
  EXPECT_EQ(bytes("60"), bytes("60, cache=360"));
  EXPECT_LT(bytes("60"), bytes("400"));
}

// Room on the disk is had before a step begins: where it cannot be, nothing is lost, and the step can come again.
TEST(ClusterOffload, AFullDiskIsOneSentence) {
  const Folder folder;
  const Shape shape;
  ByteCounter counter;
  ClusterOptions options{.budget = 30, .sinks = 4, .size = 6, .every = 10, .added = 3, .skip = 0};
  Driver memory = Make(shape, options, counter);
  options.folder = folder.path();
  Driver file = Make(shape, options, counter);
  ASSERT_EQ(file.Step(100, true), memory.Step(100, true));
  rlimit usual;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &usual), 0);
  const rlimit small{file.store->recall().file_bytes + 100, usual.rlim_max};
  const auto on_limit = std::signal(SIGXFSZ, SIG_IGN);
  ByteWriter before, after;
  file.store->Save(before);
  const size_t bytes = counter.now;
  for (const bool is_prompt : {true, false}) {
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    try {
      file.StoreRoom(50, is_prompt);
      ADD_FAILURE() << "there was room";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo);
      EXPECT_NE(std::string(error.what()).find(folder.path() + " of offloaded clusters: cannot make room for"),
                std::string::npos)
          << error.what();
    }
    setrlimit(RLIMIT_FSIZE, &usual);
  }
  std::signal(SIGXFSZ, on_limit);
  EXPECT_EQ(counter.now, bytes);
  file.store->Save(after);
  EXPECT_TRUE(before.bytes == after.bytes);
  ASSERT_EQ(file.Step(50, true), memory.Step(50, true));
  ASSERT_EQ(file.Step(1, false), memory.Step(1, false));
}

// The caches of a model of two layers over a folder, which take the same tokens.
class ClusterFailures : public testing::Test {
 protected:
  static constexpr size_t kMost = 200, kKv = 2 * 32, kQ = 4 * 32, kLayers = 2;

  std::shared_ptr<const CacheConfig> Config(const std::string& options) const {
    return CacheConfig::Create(
        CacheSpec::Parse(
            fmt::format("cluster(40, sinks=4, size=6, skip=0, offload=\"{}\"{})+f32", folder_.path(), options)),
        CacheShape::Uniform(kLayers, 4, 2, 32, 512, {.n_dims = 32, .frequency_factors = {}}));
  }

  // Outputs [layer][sequence][tokens]; `begun` is called when rows have their room.
  std::vector<std::vector<float>> Step(std::vector<SequenceCache*> caches, size_t n, StepKind kind,
                                       const std::function<void()>& begun = {}) {
    for (SequenceCache* cache : caches) cache->BeginStep(n, kind);
    batch_.Start(caches);
    if (begun) begun();
    const auto times = [&](const std::vector<float>& x, size_t width) {
      std::vector<float> all;
      for (size_t i = 0; i < caches.size(); ++i)
        all.insert(all.end(), x.begin(), x.begin() + static_cast<std::ptrdiff_t>(n * width));
      return all;
    };
    std::vector<std::vector<float>> outs;
    for (size_t layer = 0; layer < kLayers; ++layer) {
      outs.emplace_back(caches.size() * n * kQ);
      batch_.Append(layer, times(k_, kKv).data(), times(v_, kKv).data());
      batch_.Attend(layer, times(q_, kQ).data(), outs.back().data());
    }
    for (size_t i = 0; i < caches.size(); ++i)
      batch_.failure(i) ? caches[i]->CancelStep() : caches[i]->EndStep();
    return outs;
  }

  // The files of the folder, which have no names.
  std::vector<int> Files() const {
    std::vector<int> files;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      const std::string target = std::filesystem::read_symlink(entry.path(), gone);
      if (!gone && target.starts_with(folder_.path())) files.push_back(std::stoi(entry.path().filename()));
    }
    return files;
  }

  void ExpectFailure(size_t i, const char* part) const {
    try {
      ASSERT_TRUE(batch_.failure(i));
      std::rethrow_exception(batch_.failure(i));
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo);
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }

  const Folder folder_;
  Rng rng_{7};
  const std::vector<float> k_ = Random(kMost * kKv, rng_), v_ = Random(kMost * kKv, rng_),
                           q_ = Random(kMost * kQ, rng_);
  CacheBatch batch_;
};

// A file that cannot be read fails its own sequence, whether its rows are read through the cache, past it, or all of
// them; the others of the step go on, in the same bits as alone.
TEST_F(ClusterFailures, AFileThatCannotBeReadFailsItsSequenceAlone) {
  for (const char* const options : {"", ", cache=1"})
    for (const size_t n : {1, 2}) {
      SCOPED_TRACE(testing::Message() << n << " tokens" << options);
      const auto config = Config(options);
      SequenceCache broken(config), sound(config), alone(config);
      Step({&broken}, kMost, StepKind::kPrompt);
      const std::vector<int> files = Files();
      ASSERT_EQ(files.size(), 1u);
      ASSERT_EQ(ftruncate(files[0], 0), 0);
      Step({&sound}, kMost, StepKind::kPrompt);
      Step({&alone}, kMost, StepKind::kPrompt);
      const auto want = Step({&alone}, n, StepKind::kDecode), got = Step({&broken, &sound}, n, StepKind::kDecode);
      for (size_t layer = 0; layer < kLayers; ++layer)
        EXPECT_EQ(std::vector<float>(got[layer].end() - static_cast<std::ptrdiff_t>(n * kQ), got[layer].end()),
                  want[layer]);
      EXPECT_FALSE(batch_.failure(1));
      ExpectFailure(0, "the file ends");
    }
}

// Nor are rows that it has no longer read as zeros when it grows.
TEST_F(ClusterFailures, AFileThatWasCutDoesNotGrow) {
  SequenceCache cache(Config(""));
  Step({&cache}, kMost, StepKind::kPrompt);
  ASSERT_EQ(ftruncate(Files().at(0), 1000), 0);
  try {
    cache.BeginStep(50, StepKind::kPrompt);
    ADD_FAILURE() << "was begun";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("the file ends"), std::string::npos) << error.what();
  }
}

// One that cannot be written, although there was room, fails its sequence alone.
TEST_F(ClusterFailures, AFileThatCannotBeWrittenFailsItsSequenceAlone) {
  const auto config = Config("");
  SequenceCache broken(config), sound(config), alone(config);
  const auto want = Step({&alone}, kMost, StepKind::kPrompt);
  const std::vector<int> before = Files();
  const auto got = Step({&broken, &sound}, kMost, StepKind::kPrompt, [&] {
    std::vector<int> files = Files();
    std::erase_if(files, [&](int file) { return std::ranges::find(before, file) != before.end(); });
    ASSERT_EQ(files.size(), 2u);
    const int full = open("/dev/full", O_WRONLY);
    ASSERT_EQ(dup2(full, std::min(files[0], files[1])), std::min(files[0], files[1]));  // that of the first one
    close(full);
  });
  for (size_t layer = 0; layer < kLayers; ++layer)
    EXPECT_EQ(std::vector<float>(got[layer].begin() + static_cast<std::ptrdiff_t>(kMost * kQ), got[layer].end()),
              want[layer]);
  ExpectFailure(0, "cannot write");
  EXPECT_FALSE(batch_.failure(1));
  EXPECT_EQ(Step({&sound}, 1, StepKind::kDecode), Step({&alone}, 1, StepKind::kDecode));
}

// Whose file is open goes on without its folder; a new file is refused with a sentence, and can be had again later.
TEST_F(ClusterFailures, AFolderThatIsGoneConcernsNewFilesOnly) {
  const auto config = Config("");
  SequenceCache cache(config), other(config);
  Step({&cache}, 150, StepKind::kPrompt);
  Step({&other}, 150, StepKind::kPrompt);
  const std::vector<std::byte> saved = cache.Serialize();
  std::filesystem::remove_all(folder_.path());
  EXPECT_EQ(Step({&cache}, 1, StepKind::kDecode), Step({&other}, 1, StepKind::kDecode));
  EXPECT_EQ(Step({&cache}, 50, StepKind::kPrompt), Step({&other}, 50, StepKind::kPrompt));
  SequenceCache late(config), restored(config);
  for (const std::function<void()>& refused :
       {std::function<void()>([&] { cache.Clone(); }),
        std::function<void()>([&] { late.BeginStep(100, StepKind::kPrompt); }),
        std::function<void()>([&] { restored.Restore(saved.data(), saved.size()); })}) {
    try {
      refused();
      ADD_FAILURE() << "there is no folder";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo);
      EXPECT_NE(std::string(error.what()).find("cannot make a file there"), std::string::npos) << error.what();
    }
  }
  std::filesystem::create_directory(folder_.path());
  restored.Restore(saved.data(), saved.size());
  EXPECT_TRUE(restored.Serialize() == saved);
  EXPECT_TRUE(cache.Clone()->Serialize() == cache.Serialize());
  Step({&late}, 150, StepKind::kPrompt);
  EXPECT_TRUE(late.Serialize() == saved);
}

// Codes whose scale is no number are refused wherever they are.
TEST(ClusterOffload, SavedScalesMustBeFinite) {
  const Folder folder;
  const Shape shape{3, 2, 2, 32};
  const ClusterOptions options{
      .budget = 21, .sinks = 4, .size = 6, .every = 10, .added = 3, .skip = 1, .folder = folder.path()};
  for (const RowTypes types : {RowTypes{RowType::kQ8, RowType::kF32}, RowTypes{RowType::kF32, RowType::kQ4}}) {
    ByteCounter counter, other;
    Driver driver = Make(shape, options, counter, types);
    driver.Step(70, true);
    for (int i = 0; i < 25; ++i) driver.Step(1, false);
    ByteWriter saved;
    driver.store->Save(saved);
    const size_t file = saved.bytes.size() - driver.store->recall().file_bytes;
    const auto load = [&](size_t at, size_t n) {  // with n bytes that are all ones
      std::vector<std::byte> bad = saved.bytes;
      std::fill_n(bad.begin() + static_cast<ptrdiff_t>(at), n, std::byte{0xff});
      ByteReader in{bad};
      Make(shape, options, other, types).store->Load(in, std::vector<size_t>(3 * shape.n_kv), 10000);
    };
    load(file, 0);
    const RowFormat keys{types.keys, RowSide::kKeys, shape.d}, values{types.values, RowSide::kValues, shape.d};
    const size_t n_keys = TileBytes(keys), n_values = TileBytes(values);
    const size_t last = saved.bytes.size() - RegionBytes(values, kTileRows);  // of the last window, a tile a head
    for (const auto& [at, n] :
         {std::pair{file, n_keys}, {last - RegionBytes(keys, kTileRows), n_keys}, {last, n_values}}) {
      const bool coded = n == n_keys ? types.keys == RowType::kQ8 : types.values == RowType::kQ4;
      if (!coded) {  // any bits are a float
        load(at, n);
        continue;
      }
      try {
        load(at, n);
        ADD_FAILURE() << "was taken";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kBadFile);
        EXPECT_NE(std::string(error.what()).find("scale"), std::string::npos) << error.what();
      }
    }
  }
}

TEST(ClusterSpec, IsRefusedWhereItMeansNothing) {
  const auto refusal = [](const std::string& spec) -> std::string {
    try {
      CacheConfig::Create(CacheSpec::Parse(spec),
                          CacheShape::Uniform(3, 4, 2, 32, 512, {.n_dims = 32, .frequency_factors = {}}));
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  for (const char* spec :
       {"cluster(64)", "full+cluster(64, share=group)+q8", "cluster(20%)+mix(k=f32, v=q4)+prefill(chunk=64)",
        "cluster(64)+q4(rotate=true)", "cluster(5, sinks=0, skip=0)"})
    EXPECT_EQ(refusal(spec), "") << spec;
  for (const auto& [spec, part] :
       {std::pair{"h2o(64)+cluster(64)", "'h2o' lets tokens leave, any of which 'cluster' may recall"},
        {"cluster(64)+kivi", "those of 'kivi' do not lie by themselves"},
        {"cluster(64)+pyramid", "nothing to do"},
        {"cluster(64)+less", "nothing to do"},
        {"cluster(64)+merge", "nothing to do"},
        {"cluster(64)+match", "nothing to do"},
        {"cluster", "such as cluster(1024)"},
        {"cluster(16)", "16 rows, which must be more than its 16 sinks"},
        {"cluster(64, skip=3)", "this model has only 3"},
        {"cluster(64, every=3)", "3 tokens cannot become 4 clusters"},
        {"cluster(64, share=all)", "one of: head group"},
        {"cluster(64, cache=128)", "give offload, too"},
        {"cluster(64, offload=\"/nowhere/at/all\")", "\"/nowhere/at/all\" is none"}})
    EXPECT_NE(refusal(spec).find(part), std::string::npos) << spec << ": " << refusal(spec);
}

}  // namespace
}  // namespace lesskv
