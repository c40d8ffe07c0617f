// The store of codecs that keep each row by itself (f32, f16, bf16, q8, q4; keys and values may differ).
//
// A head whose rows are bounded owns one arena of exactly that many rows (rounded up to a tile); a head that grows owns
// blocks of kBlockRows rows, and the blocks that all heads take in one step share one allocation, so that large pages
// can hold them. Where rows may leave after a step, the step's own rows wait in a staging area that all
// layers share, one after the other: a one-shot prompt holds one layer in full, a chunk one layer's chunk.
//
// Types that rotate store H k and H v for keys and values, H the Hadamard transform of hadamard.h. Scores are those of
// H q, and outputs come back by H, its own inverse: once a query rather than once a row. Everything outside the store
// (queries, outputs, ReadRows) is untransformed. Unrotated keys (read positions) are taken back row by row instead, in
// cache, because RoPE does not commute with H.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/attention/attention.h"
#include "kvcache/cache_config.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/memory.h"

namespace lesskv {

inline constexpr size_t kBlockRows = 128;

struct RowStoreOptions {
  RowTypes types;
  bool grows = false;  // no bound on the rows of a head
};

class RowStore final : public KvStore {
 public:
  RowStore(ByteCounter& counter, const CacheShape& shape, const RowStoreOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void Reserve(const StepRoom& room) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void Attend(const StoreQuery& query) const override;
  void AddColumnSums(const StoreQuery& query, size_t first, std::span<float* const> sums) const override;
  void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                float* values) const override;
  void Commit(size_t layer, size_t kv_head, const Compaction& compaction) override;
  void EndStep() override;
  void CancelStep() override;
  size_t n_rows(size_t layer, size_t kv_head) const override { return At(layer, kv_head).n_rows; }
  void Save(ByteWriter& out) const override;
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override;

 private:
  struct Region {  // keys, then values, of a number of rows; in a plan `data` is null
    std::shared_ptr<CountedBuffer> memory;
    std::byte* data = nullptr;
  };
  struct Head {
    std::vector<Region> regions;  // of region_rows rows each
    size_t region_rows = 0;
    size_t n_rows = 0;
    size_t rows_before = 0;  // an arena's size before the step: what CancelStep goes back to
    size_t capacity() const { return regions.size() * region_rows; }
  };
  struct Place {  // where a row lies
    const Region* region;
    size_t region_rows;
    size_t slot;
  };

  Head& At(size_t layer, size_t kv_head) { return heads_[layer * shape_.n_kv_heads + kv_head]; }
  const Head& At(size_t layer, size_t kv_head) const { return heads_[layer * shape_.n_kv_heads + kv_head]; }
  Place Find(size_t layer, size_t kv_head, uint32_t row) const;

  size_t BytesFor(size_t rows) const;  // keys and values of a region
  static std::byte* Keys(const Region& region) { return region.data; }
  std::byte* Values(const Region& region, size_t region_rows) const;
  // `n` regions of `rows` rows side by side in one allocation.
  std::vector<Region> Allocate(ByteCounter& counter, size_t n, size_t rows) const;
  void ResizeArena(Head& head, size_t rows);
  void TakeBackArena(Head& head);
  void SaveTile(const RowFormat& format, const std::byte* tile, size_t n_rows, ByteWriter& out) const;
  void Grow(std::span<const size_t> rows);  // [heads]: blocks until each head has room for so many
  void Trim(Head& head);
  struct HeadSpans {
    std::vector<RowSpan> keys, values;
  };
  void AppendSpans(const Head& head, size_t n_rows, HeadSpans& spans) const;
  HeadSpans Spans(size_t layer, size_t kv_head, size_t n_step_rows) const;
  AttentionJob Job(const StoreQuery& query, size_t kv_head, const HeadSpans& spans) const;
  // The query as attention of the stored rows takes it; transformed queries lie in the calling thread's memory.
  StoreQuery Transformed(const StoreQuery& query) const;
  void HadamardRows(float* rows, size_t n) const;  // n rows of head_dim floats, in place

  ByteCounter* counter_;
  CacheShape shape_;
  RowStoreOptions options_;
  RowFormat key_format_, value_format_;
  size_t hadamard_block_ = 0;  // 0: rows are stored as they are
  std::vector<Head> heads_;    // [n_layers, n_kv_heads]
  std::vector<Head> staging_;  // [n_kv_heads], empty regions outside evicting steps
  // The step in progress.
  size_t n_step_ = 0;
  bool evicts_ = false;
  bool is_prompt_ = false;
  std::vector<size_t> budgets_;
};

}  // namespace lesskv
