#include "kvcache/recall/cluster_store.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/linear/linear.h"
#include "kernels/rows/hadamard.h"
#include "kvcache/codec/head_job.h"

namespace lesskv {
namespace {

// Work memory that regions can lie in, zeroed.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t n) : bytes_(n + kRegionAlign) {
    void* at = bytes_.data();
    size_t room = bytes_.size();
    data_ = static_cast<std::byte*>(std::align(kRegionAlign, n, at, room));
  }
  std::byte* data() { return data_; }

 private:
  std::vector<std::byte> bytes_;
  std::byte* data_;
};

}  // namespace

ClusterStore::ClusterStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types,
                           const ClusterOptions& options)
    : counter_(&counter),
      shape_(shape),
      types_(types),
      options_(options),
      table_(shape.layers),
      rows_(std::make_unique<RowStore>(counter, shape, types, std::vector<size_t>{},
                                       options.folder.empty() ? SIZE_MAX : options.skip)),
      offload_(MakeOffload()) {}

std::unique_ptr<ClusterOffload> ClusterStore::MakeOffload() const {
  if (options_.folder.empty() || shape_.layers.empty()) return nullptr;
  const size_t readers = options_.by_group ? 1 : shape_.layers[0].group();
  const size_t rows = options_.cache_rows > 0 ? options_.cache_rows : 2 * readers * options_.budget;
  return std::make_unique<ClusterOffload>(*counter_, shape_.layers, types_,
                                          ClusterOffload::Options{options_.folder, std::min(rows, options_.ctx), options_.skip});
}

std::unique_ptr<KvStore> ClusterStore::Clone(ByteCounter& counter) const {
  auto copy = std::make_unique<ClusterStore>(counter, shape_, types_, options_);
  copy->rows_ = rows_->CloneWith(counter, Settled());
  if (offload_ != nullptr) copy->offload_ = offload_->Clone(counter, copy->shape_.layers);
  copy->n_tokens_ = n_tokens_;
  copy->now_ = copy->next_ = now_;
  for (const CountedBuffer& layer : clusters_) copy->clusters_.push_back(layer.Clone(counter));
  copy->stats_ = stats_;
  return copy;
}

// Rows that are in no cluster yet will be put in order, and where clusters go to a file all rows move.
RowStore::SettledRows ClusterStore::Settled() const {
  return [this](size_t layer, size_t) {
    if (offload_ != nullptr) return size_t{0};
    return HasClusters(layer) ? options_.sinks + now_.rows : n_tokens_;
  };
}

void ClusterStore::AddShareable(std::vector<SharedPart>& parts) const { rows_->AddShareable(Settled(), parts); }

// What is clustered when the step is closed. Depends on how many tokens came, and for prompts on where they end.
std::vector<ClusterStore::Batch> ClusterStore::PlanBatches(const StepRoom& room) const {
  std::vector<Batch> batches;
  if (!HasClusters(shape_.layers.size() - 1)) return batches;
  const size_t all = n_tokens_ + room.n_step, behind = all - std::min(all, options_.sinks);
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
  ReserveRows(room, next, !batches.empty());
  std::vector<CountedBuffer> clusters;
  try {
    if (offload_ != nullptr) {
      std::vector<size_t> rows;
      for (const Batch& batch : batches) rows.push_back(batch.rows);
      offload_->Reserve(rows);
    }
    for (size_t layer = 0; layer < shape_.layers.size() && !batches.empty(); ++layer)
      clusters.emplace_back(*counter_, HasClusters(layer) ? ClusterBytes(layer, next) : 0);
  } catch (...) {
    rows_->CancelStep();
    if (offload_ != nullptr) offload_->CancelStep();
    throw;
  }
  n_step_ = room.n_step;
  is_prompt_ = room.is_prompt;
  batches_ = std::move(batches);
  next_ = next;
  next_clusters_ = std::move(clusters);
}

// Where clusters go to a file, the step's rows wait in a staging area, and what is left of a head is known.
void ClusterStore::ReserveRows(const StepRoom& room, const Clustered& next, bool clusters) {
  if (offload_ == nullptr || !clusters) return rows_->Reserve(room);
  std::vector<size_t> left(table_.size());
  for (size_t head = 0; head < left.size(); ++head)
    left[head] = n_tokens_ + room.n_step - (HasClusters(table_.LayerOf(head)) ? next.rows : 0);
  rows_->Reserve({room.n_step, true, true, false, left, false});
}

void ClusterStore::SetBudgets(size_t, std::span<const size_t>) { CHECK(false, "no row leaves a store of clusters"); }

void ClusterStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  rows_->Append(layer, first, n, keys, values);
}

void ClusterStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                            float* values) const {
  if (!Offloads(layer) || now_.rows == 0) return rows_->ReadRows(layer, kv_head, rows, keys, values);
  const size_t d = Layer(layer).head_dim, behind = options_.sinks + now_.rows;
  const RowFormat key_format{types_.keys, RowSide::kKeys, d}, value_format{types_.values, RowSide::kValues, d};
  AlignedBytes tile(RegionBytes(key_format, kTileRows) + RegionBytes(value_format, kTileRows));
  std::byte* const tile_values = tile.data() + RegionBytes(key_format, kTileRows);
  for (size_t i = 0; i < rows.size(); ++i) {
    float *const key = keys + i * d, *const value = values + i * d;
    if (rows[i] < options_.sinks || rows[i] >= behind) {
      const auto row = static_cast<uint32_t>(rows[i] < options_.sinks ? rows[i] : InStore(layer, rows[i]));
      rows_->ReadRows(layer, kv_head, {&row, 1}, key, value);
      continue;
    }
    offload_->ReadRow(layer, kv_head, rows[i] - options_.sinks, tile.data(), tile_values);
    lesskv::ReadRows(key_format, tile.data(), 0, 1, key, d);
    lesskv::ReadRows(value_format, tile_values, 0, 1, value, d);
    if (!types_.rotate) continue;
    Hadamard(key, d, HadamardBlock(d));
    Hadamard(value, d, HadamardBlock(d));
  }
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
  SlotMap map{n_tokens_ + n_step_, {}, true};
  if (batches_.empty() || !HasClusters(layer)) {
    rows_->Close(layer, kv_head, leaving);
    return map;
  }
  if (!counter_->only_counts) {
    if (now_.clusters > 0) {
      const auto centroids = Centroids(layer, kv_head);
      const auto ends = Ends(layer, kv_head);
      std::copy(centroids.begin(), centroids.end(), NextCentroids(layer, kv_head).begin());
      std::copy(ends.begin(), ends.end(), NextEnds(layer, kv_head).begin());
    }
    for (size_t b = 0; b < batches_.size(); ++b) Cluster(layer, kv_head, b, map);
  }
  std::vector<Departure> moved;  // to the file
  for (size_t row = now_.rows; Offloads(layer) && row < next_.rows; ++row)
    moved.push_back({static_cast<uint32_t>(InStore(layer, options_.sinks + row)), Fate::kDrop});
  rows_->Close(layer, kv_head, moved);
  return map;
}

// Rows are indexed as in the step's attention, those of the file left out where there is one.
void ClusterStore::Cluster(size_t layer, size_t kv_head, size_t b, SlotMap& map) {
  const Batch& batch = batches_[b];
  const size_t d = Layer(layer).head_dim, first = options_.sinks + batch.before.rows;
  std::vector<uint32_t> rows(batch.rows), labels(batch.rows), order(batch.rows);
  std::iota(rows.begin(), rows.end(), static_cast<uint32_t>(InStore(layer, first)));
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
  for (uint32_t i = 0; i < order.size(); ++i)
    if (order[i] != i) map.moves.push_back({static_cast<uint32_t>(first) + order[i], static_cast<uint32_t>(first) + i});
  if (!Offloads(layer)) return rows_->Reorder(layer, kv_head, first, order);
  for (uint32_t& row : order) row = rows[row];
  MoveToFile(layer, kv_head, b, order);
}

void ClusterStore::MoveToFile(size_t layer, size_t kv_head, size_t b, std::span<const uint32_t> rows) {
  const size_t d = Layer(layer).head_dim, capacity = RoundUp(rows.size(), kTileRows);
  const size_t key_bytes = RegionBytes({types_.keys, RowSide::kKeys, d}, capacity);
  AlignedBytes regions(key_bytes + RegionBytes({types_.values, RowSide::kValues, d}, capacity));
  rows_->CopyRows(layer, kv_head, rows, regions.data(), regions.data() + key_bytes);
  offload_->Write(layer, kv_head, b, regions.data(), regions.data() + key_bytes);
}

void ClusterStore::EndStep() {
  rows_->EndStep();
  if (offload_ != nullptr) offload_->EndStep();
  n_tokens_ += n_step_;
  if (!batches_.empty()) clusters_ = std::move(next_clusters_);
  now_ = next_;
  next_clusters_.clear();
  batches_.clear();
  n_step_ = 0;
}

void ClusterStore::CancelStep() {
  rows_->CancelStep();
  if (offload_ != nullptr) offload_->CancelStep();
  next_ = now_;
  next_clusters_.clear();
  batches_.clear();
  n_step_ = 0;
}

// Longer steps and prompts read every row.
bool ClusterStore::Chooses(const StoreQuery& query) const {
  return n_step_ == 1 && !is_prompt_ && HasClusters(query.layer) && now_.rows > 0 && (!AllFit() || offload_ != nullptr);
}

std::vector<RowRange> ClusterStore::Select(size_t layer, size_t kv_head, size_t first, size_t n,
                                           const float* queries) const {
  if (AllFit()) return {{0, now_.rows}};
  const size_t d = Layer(layer).head_dim;
  std::vector<float> sum(queries + first * d, queries + (first + 1) * d), scores(now_.clusters);
  for (size_t g = 1; g < n; ++g) Add(sum.data(), queries + (first + g) * d, d);
  Linear({DType::kF32, now_.clusters, d, Centroids(layer, kv_head).data()}, sum.data(), d, 1, scores.data(),
         now_.clusters, ComputeType::kF32);
  return SelectRows(scores, Ends(layer, kv_head), options_.budget - options_.sinks);
}

ClusterStore::Read ClusterStore::ReadFor(const StoreQuery& query, size_t kv_head, size_t first, size_t n,
                                         const float* queries) const {
  Read read{kv_head, first, n, {}, {}, {}};
  const size_t layer = query.layer, sinks = options_.sinks, behind = sinks + now_.rows;
  if (sinks > 0) rows_->AddSpans(layer, kv_head, 0, sinks, read.keys, read.values);
  for (const RowRange& range : Select(layer, kv_head, first, n, queries)) {
    if (Offloads(layer))
      offload_->AddCached(layer, kv_head, range, read.keys, read.values, read.stats);
    else
      rows_->AddSpans(layer, kv_head, sinks + range.first, range.n, read.keys, read.values);
  }
  rows_->AddSpans(layer, kv_head, InStore(layer, behind), n_tokens_ + 1 - behind, read.keys, read.values);
  if (AllFit()) return read;
  read.stats.queries = n;
  for (const RowSpan& span : read.keys) read.stats.rows_read += n * span.n_rows;
  return read;
}

// Past the cache: what a whole prompt reads would drive everything out of it.
ClusterStore::Read ClusterStore::ReadAll(const StoreQuery& query, size_t kv_head) const {
  Read read{kv_head, 0, Layer(query.layer).group(), {}, {}, {}};
  const size_t behind = options_.sinks + now_.rows, end = n_tokens_ + query.first_query + query.n_queries;
  if (options_.sinks > 0) rows_->AddSpans(query.layer, kv_head, 0, options_.sinks, read.keys, read.values);
  offload_->AddAll(query.layer, kv_head, read.keys, read.values);
  rows_->AddSpans(query.layer, kv_head, options_.sinks, end - behind, read.keys, read.values);
  return read;
}

void ClusterStore::AddJob(const StoreQuery& query, const Read& read, JobList& list) const {
  std::vector<RowSpan>&keys = list.NewSpans(), &values = list.NewSpans();
  keys = read.keys;
  values = read.values;
  AttentionJob job = GroupJob(query, Layer(query.layer), read.kv_head, read.first, read.n, shape_.compute);
  job.keys = keys;
  job.values = values;
  for (const RowSpan& span : keys) job.n_past += span.n_rows;
  job.n_past -= query.n_queries;
  list.jobs.push_back(job);
}

void ClusterStore::AddJobs(const StoreQuery& query, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const bool chooses = Chooses(query);
  if (!chooses && !(Offloads(query.layer) && now_.rows > 0)) return rows_->AddJobs(query, list);
  const size_t group = layer.group(), heads = chooses && !AllFit() && !options_.by_group ? 1 : group;
  std::vector<Read> reads(layer.n_heads / heads);
  ParallelFor(layer.n_kv_heads, [&](size_t h) {
    for (size_t first = 0; first < group; first += heads)
      reads[(h * group + first) / heads] =
          chooses ? ReadFor(query, h, first, heads, query.queries + h * group * layer.head_dim) : ReadAll(query, h);
  });
  const StoreQuery transformed = rows_->Transformed(query, list);
  for (const Read& read : reads) {
    AddJob(transformed, read, list);
    stats_.queries += read.stats.queries;
    stats_.rows_read += read.stats.rows_read;
    stats_.rows_recalled += read.stats.rows_recalled;
    stats_.rows_cached += read.stats.rows_cached;
    stats_.bytes_read += read.stats.bytes_read;
  }
}

RecallStats ClusterStore::recall() const {
  RecallStats stats = stats_;
  if (offload_ == nullptr) return stats;
  for (size_t layer = 0; layer < shape_.layers.size(); ++layer)
    if (HasClusters(layer)) stats.rows_offloaded += now_.rows * table_.n_heads(layer);
  stats.file_bytes = offload_->file_bytes();
  return stats;
}

void ClusterStore::Save(ByteWriter& out) const {
  rows_->Save(out);
  out.Put<uint64_t>(n_tokens_);
  out.Put<uint64_t>(now_.rows);
  out.Put<uint64_t>(now_.clusters);
  for (const CountedBuffer& layer : clusters_) out.Raw(layer.data(), layer.size());
  if (offload_ != nullptr) offload_->Save(out);
}

void ClusterStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  rows_->Load(in, budgets, max_rows);
  n_tokens_ = in.Count(max_rows, "the number of rows of a head");
  now_.rows = in.Count(n_tokens_ - std::min(n_tokens_, options_.sinks), "the number of clustered rows");
  now_.clusters = in.Count(now_.rows, "the number of clusters");
  next_ = now_;
  for (size_t layer = 0; layer < shape_.layers.size(); ++layer)
    for (size_t h = 0; h < table_.n_heads(layer); ++h)
      if (n_rows(layer, h) != n_tokens_) Fail(ErrorCode::kBadFile, "saved cache: heads have different numbers of rows");
  if (now_.rows > 0 && (now_.clusters == 0 || !HasClusters(shape_.layers.size() - 1)))
    Fail(ErrorCode::kBadFile, "saved cache: {} rows in no cluster", now_.rows);
  for (size_t layer = 0; layer < shape_.layers.size() && now_.clusters > 0; ++layer) {
    clusters_.emplace_back(*counter_, HasClusters(layer) ? ClusterBytes(layer, now_) : 0);
    in.Raw(clusters_.back().data(), clusters_.back().size());
    for (size_t h = 0; h < table_.n_heads(layer) && HasClusters(layer); ++h) {
      const std::span<const uint32_t> ends = Ends(layer, h);
      if (!std::is_sorted(ends.begin(), ends.end()) || ends.back() != now_.rows)
        Fail(ErrorCode::kBadFile, "saved cache: clusters that do not hold the {} clustered rows", now_.rows);
    }
  }
  if (offload_ == nullptr) return;
  offload_->Load(in, now_.rows);
  if (offload_->rows() != now_.rows)
    Fail(ErrorCode::kBadFile, "saved cache: {} rows in the clusters of a file, {} expected", offload_->rows(),
         now_.rows);
}

}  // namespace lesskv
