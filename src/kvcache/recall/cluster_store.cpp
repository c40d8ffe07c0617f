#include "kvcache/recall/cluster_store.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/linear/linear.h"

namespace lesskv {

ClusterStore::ClusterStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types,
                           const ClusterOptions& options)
    : counter_(&counter),
      shape_(shape),
      types_(types),
      options_(options),
      table_(shape.layers),
      rows_(std::make_unique<RowStore>(counter, shape, types)) {}

std::unique_ptr<KvStore> ClusterStore::Clone(ByteCounter& counter) const {
  auto copy = std::make_unique<ClusterStore>(counter, shape_, types_, options_);
  copy->rows_.reset(static_cast<RowStore*>(rows_->Clone(counter).release()));
  copy->now_ = now_;
  for (const CountedBuffer& layer : clusters_) copy->clusters_.push_back(layer.Clone(counter));
  copy->stats_ = stats_;
  return copy;
}

// What is clustered when the step is closed. Depends on how many tokens came, and for prompts on where they end.
std::vector<ClusterStore::Batch> ClusterStore::PlanBatches(const StepRoom& room) const {
  std::vector<Batch> batches;
  if (!HasClusters(shape_.layers.size() - 1)) return batches;
  const size_t all = RowsOfAHead() + room.n_step, behind = all - std::min(all, options_.sinks);
  Clustered at = now_;
  const auto add = [&](size_t rows, size_t clusters) {
    batches.push_back({at, rows, clusters});
    at = {at.rows + rows, at.clusters + clusters};
  };
  if (room.is_prompt && behind > at.rows) {
    const size_t due = behind / options_.size - at.rows / options_.size;
    if (due > 0 || at.rows == 0) add(behind - at.rows, std::max<size_t>(due, 1));
  }
  while (behind - at.rows >= options_.every) add(options_.every, options_.added);
  return batches;
}

size_t ClusterStore::ClusterBytes(size_t layer, const Clustered& of) const {
  const LayerShape& shape = Layer(layer);
  return shape.n_kv_heads * of.clusters * (shape.head_dim * sizeof(float) + sizeof(uint32_t));
}

void ClusterStore::Reserve(const StepRoom& room) {
  std::vector<Batch> batches = shape_.layers.empty() ? std::vector<Batch>{} : PlanBatches(room);
  Clustered next = now_;
  for (const Batch& batch : batches) next = {next.rows + batch.rows, next.clusters + batch.clusters};
  rows_->Reserve(room);
  std::vector<CountedBuffer> clusters;
  try {
    for (size_t layer = 0; layer < shape_.layers.size() && !batches.empty(); ++layer)
      clusters.emplace_back(*counter_, HasClusters(layer) ? ClusterBytes(layer, next) : 0);
  } catch (...) {
    rows_->CancelStep();
    throw;
  }
  n_step_ = room.n_step;
  is_prompt_ = room.is_prompt;
  batches_ = std::move(batches);
  next_ = next;
  next_clusters_ = std::move(clusters);
}

void ClusterStore::SetBudgets(size_t, std::span<const size_t>) { CHECK(false, "no row leaves a store of clusters"); }

void ClusterStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  rows_->Append(layer, first, n, keys, values);
}

void ClusterStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                            float* values) const {
  rows_->ReadRows(layer, kv_head, rows, keys, values);
}

std::span<const float> ClusterStore::Centroids(const std::vector<CountedBuffer>& in, const Clustered& of, size_t layer,
                                               size_t h) const {
  if (of.clusters == 0 || !HasClusters(layer)) return {};
  const size_t floats = of.clusters * Layer(layer).head_dim;
  return in[layer].As<float>().subspan(h * floats, floats);
}

std::span<const uint32_t> ClusterStore::Ends(const std::vector<CountedBuffer>& in, const Clustered& of, size_t layer,
                                             size_t h) const {
  if (of.clusters == 0 || !HasClusters(layer)) return {};
  const LayerShape& shape = Layer(layer);
  const size_t first = shape.n_kv_heads * of.clusters * shape.head_dim;  // a float is as long as an end
  return in[layer].As<uint32_t>().subspan(first + h * of.clusters, of.clusters);
}

std::span<float> ClusterStore::NextCentroids(size_t layer, size_t kv_head) {
  const std::span<const float> all = Centroids(next_clusters_, next_, layer, kv_head);
  return {const_cast<float*>(all.data()), all.size()};
}

std::span<uint32_t> ClusterStore::NextEnds(size_t layer, size_t kv_head) {
  const std::span<const uint32_t> all = Ends(next_clusters_, next_, layer, kv_head);
  return {const_cast<uint32_t*>(all.data()), all.size()};
}

SlotMap ClusterStore::Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) {
  CHECK(leaving.empty(), "no row leaves a store of clusters");
  SlotMap map = rows_->Close(layer, kv_head, leaving);
  if (batches_.empty() || !HasClusters(layer) || counter_->only_counts) return map;
  if (now_.clusters > 0) {
    const auto centroids = Centroids(layer, kv_head);
    const auto ends = Ends(layer, kv_head);
    std::copy(centroids.begin(), centroids.end(), NextCentroids(layer, kv_head).begin());
    std::copy(ends.begin(), ends.end(), NextEnds(layer, kv_head).begin());
  }
  map.at_once = true;
  for (const Batch& batch : batches_) Cluster(layer, kv_head, batch, map);
  return map;
}

void ClusterStore::Cluster(size_t layer, size_t kv_head, const Batch& batch, SlotMap& map) {
  const size_t d = Layer(layer).head_dim, first = options_.sinks + batch.before.rows;
  std::vector<uint32_t> rows(batch.rows), labels(batch.rows), order(batch.rows);
  std::iota(rows.begin(), rows.end(), static_cast<uint32_t>(first));
  std::vector<float> keys(batch.rows * d);
  {
    std::vector<float> values(batch.rows * d);
    rows_->ReadRows(layer, kv_head, rows, keys.data(), values.data());
  }
  // A seed of its own for every batch of every head, the same in every run.
  const uint64_t seed = table_(layer, kv_head) * 0x9E3779B97F4A7C15u + batch.before.clusters;
  const std::span<uint32_t> ends = NextEnds(layer, kv_head).subspan(batch.before.clusters, batch.clusters);
  ClusterKeys(keys.data(), batch.rows, d, batch.clusters, options_.passes, seed,
              &NextCentroids(layer, kv_head)[batch.before.clusters * d], labels);
  OrderByLabel(labels, order, ends);
  for (uint32_t& end : ends) end += static_cast<uint32_t>(batch.before.rows);
  rows_->Reorder(layer, kv_head, first, order);
  for (uint32_t i = 0; i < order.size(); ++i)
    if (order[i] != i)
      map.moves.push_back({static_cast<uint32_t>(first) + order[i], static_cast<uint32_t>(first) + i});
}

void ClusterStore::EndStep() {
  rows_->EndStep();
  if (!batches_.empty()) clusters_ = std::move(next_clusters_);
  now_ = next_;
  next_clusters_.clear();
  batches_.clear();
  n_step_ = 0;
}

void ClusterStore::CancelStep() {
  rows_->CancelStep();
  next_ = now_;
  next_clusters_.clear();
  batches_.clear();
  n_step_ = 0;
}

// Longer steps and prompts read every row.
bool ClusterStore::Chooses(const StoreQuery& query) const {
  return n_step_ == 1 && !is_prompt_ && HasClusters(query.layer) && now_.rows + options_.sinks > options_.budget;
}

std::vector<RowRange> ClusterStore::Select(size_t layer, size_t kv_head, size_t first, size_t n,
                                           const float* queries) const {
  const size_t d = Layer(layer).head_dim;
  std::vector<float> sum(queries + first * d, queries + (first + 1) * d), scores(now_.clusters);
  for (size_t g = 1; g < n; ++g) Add(sum.data(), queries + (first + g) * d, d);
  Linear({DType::kF32, now_.clusters, d, Centroids(layer, kv_head).data()}, sum.data(), d, 1, scores.data(),
         now_.clusters, ComputeType::kF32);
  return SelectRows(scores, Ends(layer, kv_head), options_.budget - options_.sinks);
}

std::vector<ClusterStore::Read> ClusterStore::ChooseRows(const StoreQuery& query) const {
  const LayerShape& layer = Layer(query.layer);
  const size_t group = layer.group(), heads = options_.by_group ? group : 1;
  std::vector<Read> reads(layer.n_heads / heads);
  ParallelFor(layer.n_kv_heads, [&](size_t h) {
    for (size_t first = 0; first < group; first += heads)
      reads[(h * group + first) / heads] = {
          h, first, heads, Select(query.layer, h, first, heads, query.queries + h * group * layer.head_dim)};
  });
  return reads;
}

void ClusterStore::AddJob(const StoreQuery& query, const Read& read, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const size_t group = layer.group(), held = rows_->n_rows(query.layer, read.kv_head);
  std::vector<RowSpan>&keys = list.NewSpans(), &values = list.NewSpans();
  size_t n_rows = 0;
  const auto add = [&](size_t first, size_t n) {
    rows_->AddSpans(query.layer, read.kv_head, first, n, keys, values);
    n_rows += n;
  };
  if (options_.sinks > 0) add(0, options_.sinks);
  for (const RowRange& range : read.clusters) add(options_.sinks + range.first, range.n);
  const size_t rest = options_.sinks + now_.rows;
  add(rest, held + 1 - rest);
  AttentionJob job;
  job.keys = keys;
  job.values = values;
  job.n_past = n_rows - 1;
  job.n_queries = 1;
  const size_t head = read.kv_head * group + read.first;
  job.q = query.queries + head * layer.head_dim;
  job.q_stride = job.out_stride = layer.q_dim();
  job.group = read.n;
  job.scale = layer.scale;
  job.compute = shape_.compute;
  job.out = query.out + head * layer.head_dim;
  job.lse = query.lse + head;
  list.jobs.push_back(job);
  stats_.queries += read.n;
  stats_.rows_read += read.n * n_rows;
}

void ClusterStore::AddJobs(const StoreQuery& query, JobList& list) const {
  if (!Chooses(query)) return rows_->AddJobs(query, list);
  const std::vector<Read> reads = ChooseRows(query);
  const StoreQuery transformed = rows_->Transformed(query, list);
  for (const Read& read : reads) AddJob(transformed, read, list);
}

void ClusterStore::Save(ByteWriter& out) const {
  rows_->Save(out);
  out.Put<uint64_t>(now_.rows);
  out.Put<uint64_t>(now_.clusters);
  for (const CountedBuffer& layer : clusters_) out.Raw(layer.data(), layer.size());
}

void ClusterStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  rows_->Load(in, budgets, max_rows);
  const size_t held = RowsOfAHead();
  for (size_t layer = 0; layer < shape_.layers.size(); ++layer)
    for (size_t h = 0; h < table_.n_heads(layer); ++h)
      if (rows_->n_rows(layer, h) != held) Fail(ErrorCode::kBadFile, "saved cache: heads have different numbers of rows");
  now_.rows = in.Count(held - std::min(held, options_.sinks), "the number of clustered rows");
  now_.clusters = in.Count(now_.rows, "the number of clusters");
  if (now_.rows > 0 && (now_.clusters == 0 || !HasClusters(shape_.layers.size() - 1)))
    Fail(ErrorCode::kBadFile, "saved cache: {} rows in no cluster", now_.rows);
  next_ = now_;
  for (size_t layer = 0; layer < shape_.layers.size() && now_.clusters > 0; ++layer) {
    clusters_.emplace_back(*counter_, HasClusters(layer) ? ClusterBytes(layer, now_) : 0);
    in.Raw(clusters_.back().data(), clusters_.back().size());
    for (size_t h = 0; h < table_.n_heads(layer) && HasClusters(layer); ++h) {
      const std::span<const uint32_t> ends = Ends(layer, h);
      if (!std::is_sorted(ends.begin(), ends.end()) || ends.back() != now_.rows)
        Fail(ErrorCode::kBadFile, "saved cache: clusters that do not hold the {} clustered rows", now_.rows);
    }
  }
}

}  // namespace lesskv
