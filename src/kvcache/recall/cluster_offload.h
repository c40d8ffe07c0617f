// Clustered rows of one sequence in a file, and the tiles of them that were read last in memory: a bounded number a KV
// head, the one not used for the longest time making room. Rows of a batch that was clustered together lie side by side
// in the file, a region of keys and one of values a KV head, in the layout of rows.h.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvcache/bytes.h"
#include "kvcache/cache_shape.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/codec/row_store.h"
#include "kvcache/memory.h"
#include "kvcache/recall/cluster_file.h"
#include "kvcache/recall/clustering.h"

namespace lesskv {

class ClusterOffload {
 public:
  struct Options {
    std::string folder = {};
    size_t cache_rows = 0;  // a KV head; rounded up to tiles
    size_t skip = 0;        // first layers, whose rows are not here
  };
  // The layers must outlive it.
  ClusterOffload(ByteCounter& counter, std::span<const LayerShape> layers, const RowTypes& types,
                 const Options& options);

  // The same rows of the same shapes in a file of its own, nothing cached.
  std::unique_ptr<ClusterOffload> Clone(ByteCounter& counter, std::span<const LayerShape> layers) const;

  // A step that adds batches of so many rows to every head: room for them. Throws Error and changes nothing.
  void Reserve(std::span<const size_t> batch_rows);
  void CancelStep();
  void EndStep();

  // Batch b of the step: keys, values are regions of RoundUp(rows, kTileRows) rows. From several threads.
  void Write(size_t layer, size_t kv_head, size_t b, const std::byte* keys, const std::byte* values);

  // Spans of rows [first, first + n), counted over all batches that were there before the step, through the cache;
  // valid until the step ends, in which a head's rows are asked for by one thread at a time. Adds to the counts of rows
  // and bytes.
  void AddCached(size_t layer, size_t kv_head, RowRange rows, std::vector<RowSpan>& keys, std::vector<RowSpan>& values,
                 RecallStats& stats);
  // Spans of all rows, read where they lie, past the cache; valid until the step ends.
  void AddAll(size_t layer, size_t kv_head, std::vector<RowSpan>& keys, std::vector<RowSpan>& values) const;
  // One row as it is stored, in slot 0 of regions of a tile.
  void ReadRow(size_t layer, size_t kv_head, size_t row, std::byte* keys, std::byte* values) const;

  size_t rows() const { return rows_; }
  size_t file_bytes() const { return file_ == nullptr ? 0 : file_->size(); }

  void Save(ByteWriter& out) const;
  void Load(ByteReader& in, size_t max_rows);

 private:
  // Rows that were clustered together, of all heads.
  struct Extent {
    uint32_t first_row = 0, rows = 0, first_tile = 0;
    size_t offset = 0;  // in the file
    size_t tiles() const;
  };
  struct Formats {  // of one layer
    RowFormat keys, values;
  };
  // A head's part of a layer's cache: tiles in slots.
  struct Cache {
    std::byte *keys, *values;
    std::span<uint32_t> tile, used;  // [slots]: which tile, and the step that read it last
  };
  static constexpr uint32_t kNoTile = UINT32_MAX;

  size_t HeadBytes(size_t layer, size_t rows) const;
  size_t ExtentBytes(size_t rows) const;
  size_t Offset(const Extent& extent, size_t layer, size_t kv_head) const;
  size_t ValuesAt(const Extent& extent, size_t layer) const;
  const Extent& Find(size_t row) const;
  void RequireFiniteScales(std::span<const std::byte> file) const;
  void AddExtents(std::span<const size_t> batch_rows);
  std::vector<CountedBuffer> MakeCaches() const;
  Cache CacheOf(size_t layer, size_t kv_head);
  bool Place(Cache& cache, uint32_t tile, size_t& slot);
  void LoadTiles(size_t layer, size_t kv_head, const Cache& cache, const Extent& extent, size_t first_tile,
                 std::span<const size_t> slots);
  void AddPart(size_t layer, size_t kv_head, const Extent& extent, size_t first, size_t n, std::vector<RowSpan>& keys,
               std::vector<RowSpan>& values, RecallStats& stats);

  ByteCounter* counter_;
  std::span<const LayerShape> layers_;
  RowTypes types_;
  Options options_;
  size_t slots_;
  std::vector<Formats> formats_;  // [n_layers]
  std::unique_ptr<ClusterFile> file_;
  std::vector<Extent> extents_;  // those of the step in progress last
  size_t rows_ = 0;              // without the step in progress
  // A layer: regions of keys and values a head, then tiles and steps, uint32 [n_kv_heads, 2, slots]; empty until
  // needed.
  std::vector<CountedBuffer> caches_;
  uint32_t step_ = 1;
  // The step in progress.
  size_t extents_before_ = 0, bytes_before_ = 0;
};

}  // namespace lesskv
