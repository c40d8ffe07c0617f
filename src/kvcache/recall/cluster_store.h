// The store of ClusterKV (arXiv 2412.03213): rows of a RowStore, put in the order of clusters of their keys, so that a
// cluster is one span. A single token's queries read the sinks, the clusters that fit them best, and what is not in a
// cluster yet; a longer step (a prompt, a chunk) reads everything. Nothing ever leaves.
//
// Slots of a head:  [ sinks | clusters, one after the other | rows of no cluster ]
// All heads of all layers have as many rows, clustered rows and clusters, so that what a step needs is known before it.
// When a prompt ends, all rows behind the sinks that are in no cluster become clusters, one for every `size` of all
// clustered rows; else whenever there are `every` such rows they become `added` ones. Clusters that exist stay as they
// are. The first `skip` layers have none and are always read whole.
//
// With `folder` clustered rows lie in a file instead (cluster_offload.h), and the RowStore holds the others. A prompt
// is then clustered a layer at a time, from a staging area.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvcache/codec/codec.h"
#include "kvcache/codec/row_store.h"
#include "kvcache/memory.h"
#include "kvcache/recall/cluster_offload.h"
#include "kvcache/recall/clustering.h"

namespace lesskv {

struct ClusterOptions {
  size_t budget = 0;      // rows that a query reads, sinks included, rows of no cluster not
  bool by_group = false;  // query heads of a group read the same rows, those that their sum asks for
  size_t sinks = 16;
  size_t size = 80;  // rows a cluster of a prompt, on the average
  size_t every = 320, added = 4;
  size_t passes = 4;        // of k-means
  size_t skip = 2;          // layers
  std::string folder = {};  // where clustered rows go; empty: they stay in memory
  size_t cache_rows = 0;    // of those, how many a KV head has in memory; 0: two tokens' worth
  size_t ctx = SIZE_MAX;    // a head never has more rows, so that a cache of more would be memory for nothing
};

class ClusterStore final : public KvStore {
 public:
  ClusterStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types, const ClusterOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void AddShareable(std::vector<SharedPart>& parts) const override;
  void Reserve(const StepRoom& room) override;
  void SetBudgets(size_t first_layer, std::span<const size_t> budgets) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void AddJobs(const StoreQuery& query, JobList& list) const override;
  void Finish(const StoreQuery& query) const override { rows_->Finish(query); }
  void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                float* values) const override;
  SlotMap Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) override;
  void EndStep() override;
  void CancelStep() override;
  size_t n_rows(size_t layer, size_t kv_head) const override {
    return rows_->n_rows(layer, kv_head) + (Offloads(layer) ? now_.rows : 0);
  }
  size_t SlackBytes(std::span<const size_t> budgets) const override { return rows_->SlackBytes(budgets); }
  RecallStats recall() const override;
  void Save(ByteWriter& out) const override;
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override;

  // Of every head in a layer that has clusters.
  size_t clustered_rows() const { return now_.rows; }
  size_t n_clusters() const { return now_.clusters; }
  std::span<const float> Centroids(size_t layer, size_t kv_head) const {
    return Centroids(clusters_, now_, layer, kv_head);
  }
  // [n_clusters]: rows of a cluster and of those before it, counted from the first one behind the sinks.
  std::span<const uint32_t> Ends(size_t layer, size_t kv_head) const { return Ends(clusters_, now_, layer, kv_head); }
  // The rows that query heads [first, first + n) of a KV head read of its clusters, counted likewise; queries
  // [group, head_dim].
  std::vector<RowRange> Select(size_t layer, size_t kv_head, size_t first, size_t n, const float* queries) const;

 private:
  struct Clustered {  // of a head
    size_t rows = 0, clusters = 0;
  };
  // Rows that become clusters when the step's layers are closed.
  struct Batch {
    Clustered before;
    size_t rows, clusters;
  };
  // What query heads [first, first + n) of a KV head read.
  struct Read {
    size_t kv_head, first, n;
    std::vector<RowSpan> keys, values;
    RecallStats stats;
  };

  const LayerShape& Layer(size_t layer) const { return shape_.layers[layer]; }
  bool HasClusters(size_t layer) const { return layer >= options_.skip; }
  bool Chooses(const StoreQuery& query) const;
  bool AllFit() const { return now_.rows + options_.sinks <= options_.budget; }
  bool Offloads(size_t layer) const { return offload_ != nullptr && HasClusters(layer); }
  std::unique_ptr<ClusterOffload> MakeOffload() const;
  void ReserveRows(const StepRoom& room, const Clustered& next, bool clusters);
  RowStore::SettledRows Settled() const;
  // Of a head's rows behind the sinks, where the RowStore has them.
  size_t InStore(size_t layer, size_t row) const { return row - (Offloads(layer) ? now_.rows : 0); }
  std::vector<Batch> PlanBatches(const StepRoom& room) const;
  size_t ClusterBytes(size_t layer, const Clustered& of) const;
  std::span<const float> Centroids(const std::vector<CountedBuffer>& in, const Clustered& of, size_t layer,
                                   size_t h) const;
  std::span<const uint32_t> Ends(const std::vector<CountedBuffer>& in, const Clustered& of, size_t layer,
                                 size_t h) const;
  std::span<float> NextCentroids(size_t layer, size_t kv_head);
  std::span<uint32_t> NextEnds(size_t layer, size_t kv_head);
  void Cluster(size_t layer, size_t kv_head, size_t b, SlotMap& map);
  void MoveToFile(size_t layer, size_t kv_head, size_t b, std::span<const uint32_t> rows);
  Read ReadFor(const StoreQuery& query, size_t kv_head, size_t first, size_t n, const float* queries) const;
  Read ReadAll(const StoreQuery& query, size_t kv_head) const;
  void AddJob(const StoreQuery& query, const Read& read, JobList& list) const;

  ByteCounter* counter_;
  StoreShape shape_;
  RowTypes types_;
  ClusterOptions options_;
  HeadTable table_;
  std::unique_ptr<RowStore> rows_;
  std::unique_ptr<ClusterOffload> offload_;  // null: none
  size_t n_tokens_ = 0;                      // without the step in progress
  Clustered now_;
  // A layer: centroids, float [n_kv_heads, n_clusters, head_dim], then ends, uint32 [n_kv_heads, n_clusters].
  std::vector<CountedBuffer> clusters_;
  mutable RecallStats stats_;
  // The step in progress.
  size_t n_step_ = 0;
  bool is_prompt_ = false;
  std::vector<Batch> batches_;
  Clustered next_;
  std::vector<CountedBuffer> next_clusters_;  // where the step makes some
};

}  // namespace lesskv
