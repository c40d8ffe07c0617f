#include "kvcache/recall/cluster_offload.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/checked.h"

namespace lesskv {

size_t ClusterOffload::Extent::tiles() const { return CeilDiv(size_t{rows}, kTileRows); }

ClusterOffload::ClusterOffload(ByteCounter& counter, std::span<const LayerShape> layers, const RowTypes& types,
                               const Options& options)
    : counter_(&counter),
      layers_(layers),
      types_(types),
      options_(options),
      slots_(CeilDiv(options.cache_rows, kTileRows)) {
  for (const LayerShape& layer : layers)
    formats_.push_back(
        {{types.keys, RowSide::kKeys, layer.head_dim}, {types.values, RowSide::kValues, layer.head_dim}});
}

std::unique_ptr<ClusterOffload> ClusterOffload::Clone(ByteCounter& counter, std::span<const LayerShape> layers) const {
  auto copy = std::make_unique<ClusterOffload>(counter, layers, types_, options_);
  if (extents_.empty()) return copy;
  copy->extents_ = extents_;
  copy->extents_before_ = extents_.size();
  copy->rows_ = rows_;
  copy->caches_ = copy->MakeCaches();
  copy->file_ = std::make_unique<ClusterFile>(options_.folder);
  copy->file_->Resize(file_->size());
  std::vector<std::byte> piece(std::min<size_t>(file_->size(), 1 << 20));
  for (size_t at = 0; at < file_->size(); at += piece.size()) {
    const std::span<std::byte> some = std::span(piece).first(std::min(piece.size(), file_->size() - at));
    file_->Read(at, some);
    copy->file_->Write(at, some);
  }
  return copy;
}

size_t ClusterOffload::HeadBytes(size_t layer, size_t rows) const {
  const size_t capacity = RoundUp(rows, kTileRows);
  return RegionBytes(formats_[layer].keys, capacity) + RegionBytes(formats_[layer].values, capacity);
}

size_t ClusterOffload::ExtentBytes(size_t rows) const {
  size_t bytes = 0;
  for (size_t layer = options_.skip; layer < layers_.size(); ++layer)
    bytes += layers_[layer].n_kv_heads * HeadBytes(layer, rows);
  return bytes;
}

size_t ClusterOffload::Offset(const Extent& extent, size_t layer, size_t kv_head) const {
  size_t offset = extent.offset;
  for (size_t l = options_.skip; l < layer; ++l) offset += layers_[l].n_kv_heads * HeadBytes(l, extent.rows);
  return offset + kv_head * HeadBytes(layer, extent.rows);
}

// Of a head's regions, behind its keys.
size_t ClusterOffload::ValuesAt(const Extent& extent, size_t layer) const {
  return RegionBytes(formats_[layer].keys, extent.tiles() * kTileRows);
}

const ClusterOffload::Extent& ClusterOffload::Find(size_t row) const {
  const auto behind = std::upper_bound(extents_.begin(), extents_.end(), row,
                                       [](size_t r, const Extent& extent) { return r < extent.first_row; });
  return *(behind - 1);
}

// Behind those that are there.
void ClusterOffload::AddExtents(std::span<const size_t> batch_rows) {
  for (const size_t rows : batch_rows) {
    Extent next;
    if (!extents_.empty()) {
      const Extent& last = extents_.back();
      next = {last.first_row + last.rows, 0, last.first_tile + static_cast<uint32_t>(last.tiles()),
              last.offset + ExtentBytes(last.rows)};
    }
    next.rows = static_cast<uint32_t>(rows);
    extents_.push_back(next);
  }
}

std::vector<CountedBuffer> ClusterOffload::MakeCaches() const {
  std::vector<CountedBuffer> caches;
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const size_t a_head = HeadBytes(layer, slots_ * kTileRows) + 2 * slots_ * sizeof(uint32_t);
    caches.emplace_back(*counter_, layer < options_.skip ? 0 : layers_[layer].n_kv_heads * a_head);
  }
  return caches;
}

void ClusterOffload::Reserve(std::span<const size_t> batch_rows) {
  extents_before_ = extents_.size();
  bytes_before_ = file_bytes();
  if (batch_rows.empty()) return;
  std::vector<CountedBuffer> caches;
  if (caches_.empty()) caches = MakeCaches();
  AddExtents(batch_rows);
  try {
    if (!counter_->only_counts) {
      if (file_ == nullptr) file_ = std::make_unique<ClusterFile>(options_.folder);
      file_->Resize(extents_.back().offset + ExtentBytes(extents_.back().rows));
    }
  } catch (...) {
    extents_.resize(extents_before_);
    throw;
  }
  if (caches_.empty()) caches_ = std::move(caches);
}

void ClusterOffload::CancelStep() {
  if (extents_.size() == extents_before_) return;
  extents_.resize(extents_before_);
  if (file_ != nullptr) file_->Resize(bytes_before_);
  if (extents_.empty()) caches_.clear(), file_.reset();
}

void ClusterOffload::EndStep() {
  extents_before_ = extents_.size();
  rows_ = extents_.empty() ? 0 : size_t{extents_.back().first_row} + extents_.back().rows;
  if (file_ != nullptr) file_->Unmap();
  ++step_;
}

void ClusterOffload::Write(size_t layer, size_t kv_head, size_t b, const std::byte* keys, const std::byte* values) {
  const Extent& extent = extents_[extents_before_ + b];
  const size_t capacity = extent.tiles() * kTileRows, key_bytes = RegionBytes(formats_[layer].keys, capacity);
  const size_t offset = Offset(extent, layer, kv_head);
  file_->Write(offset, {keys, key_bytes});
  file_->Write(offset + key_bytes, {values, RegionBytes(formats_[layer].values, capacity)});
}

ClusterOffload::Cache ClusterOffload::CacheOf(size_t layer, size_t kv_head) {
  CountedBuffer& memory = caches_[layer];
  const size_t capacity = slots_ * kTileRows, n_kv = layers_[layer].n_kv_heads, bytes = HeadBytes(layer, capacity);
  std::byte* const keys = memory.data() + kv_head * bytes;
  const auto lists = memory.As<uint32_t>().subspan(n_kv * bytes / sizeof(uint32_t) + kv_head * 2 * slots_, 2 * slots_);
  return {keys, keys + RegionBytes(formats_[layer].keys, capacity), lists.first(slots_), lists.subspan(slots_)};
}

// Where a tile lies in the cache: true if it was there, else its slot is to be filled, or is `slots_` where all slots
// hold what this step reads.
bool ClusterOffload::Place(Cache& cache, uint32_t tile, size_t& slot) {
  // Tiles count from 1, so that zeroed memory holds none.
  slot = static_cast<size_t>(std::find(cache.tile.begin(), cache.tile.end(), tile + 1) - cache.tile.begin());
  if (slot < slots_) {
    cache.used[slot] = step_;
    return true;
  }
  const auto oldest = std::min_element(cache.used.begin(), cache.used.end());
  if (oldest == cache.used.end() || *oldest == step_) return false;
  slot = static_cast<size_t>(oldest - cache.used.begin());
  cache.tile[slot] = tile + 1;
  cache.used[slot] = step_;
  return false;
}

// Tiles of an extent, one after the other, to slots of the cache.
void ClusterOffload::LoadTiles(size_t layer, size_t kv_head, const Cache& cache, const Extent& extent,
                               size_t first_tile, std::span<const size_t> slots) {
  if (slots.empty()) return;
  const Formats& formats = formats_[layer];
  const size_t key_bytes = TileBytes(formats.keys), value_bytes = TileBytes(formats.values);
  const size_t keys = Offset(extent, layer, kv_head), values = keys + ValuesAt(extent, layer);
  std::vector<std::byte*> to;
  for (const size_t slot : slots) to.push_back(cache.keys + slot * key_bytes);
  file_->ReadPieces(keys + first_tile * key_bytes, to, key_bytes);
  to.clear();
  for (const size_t slot : slots) to.push_back(cache.values + slot * value_bytes);
  file_->ReadPieces(values + first_tile * value_bytes, to, value_bytes);
}

namespace {

// Behind the last span where it goes on there.
void AddSpan(std::vector<RowSpan>& spans, const RowFormat& format, const std::byte* rows, size_t slot, size_t n) {
  if (!spans.empty() && spans.back().rows == rows && spans.back().first_slot + spans.back().n_rows == slot)
    spans.back().n_rows += n;
  else
    spans.push_back({format, rows, slot, n});
}

}  // namespace

// Rows [first, first + n) of one extent.
void ClusterOffload::AddPart(size_t layer, size_t kv_head, const Extent& extent, size_t first, size_t n,
                             std::vector<RowSpan>& keys, std::vector<RowSpan>& values, RecallStats& stats) {
  const Formats& formats = formats_[layer];
  const size_t tile_bytes = TileBytes(formats.keys) + TileBytes(formats.values);
  Cache cache = CacheOf(layer, kv_head);
  std::vector<size_t> missing;  // slots of neighbouring tiles up to the current one
  const auto load = [&](size_t end) {
    LoadTiles(layer, kv_head, cache, extent, end - missing.size(), missing);
    missing.clear();
  };
  const std::byte *region_keys = nullptr, *region_values = nullptr;  // from the first tile that has no slot on
  const auto map = [&](const RowFormat& format, size_t region, size_t tile) {
    const size_t at = tile * TileBytes(format), n_tiles = CeilDiv(first + n, kTileRows) - tile;
    return file_->Map(region + at, RegionBytes(format, n_tiles * kTileRows)) - at;
  };
  stats.rows_recalled += n;
  for (size_t row = first; row < first + n;) {
    const size_t tile = row / kTileRows, lane = row % kTileRows, count = std::min(kTileRows - lane, first + n - row);
    size_t slot = 0;
    const bool cached = Place(cache, static_cast<uint32_t>(extent.first_tile + tile), slot);
    if (cached || slot == slots_) load(tile);
    if (cached) stats.rows_cached += count;
    if (!cached) stats.bytes_read += tile_bytes;
    if (slot < slots_) {
      if (!cached) missing.push_back(slot);
      AddSpan(keys, formats.keys, cache.keys, slot * kTileRows + lane, count);
      AddSpan(values, formats.values, cache.values, slot * kTileRows + lane, count);
    } else {  // more than the cache holds: where it lies
      if (region_keys == nullptr) {
        const size_t region = Offset(extent, layer, kv_head);
        region_keys = map(formats.keys, region, tile);
        region_values = map(formats.values, region + ValuesAt(extent, layer), tile);
      }
      AddSpan(keys, formats.keys, region_keys, row, count);
      AddSpan(values, formats.values, region_values, row, count);
    }
    row += count;
  }
  load(CeilDiv(first + n, kTileRows));
}

void ClusterOffload::AddCached(size_t layer, size_t kv_head, RowRange rows, std::vector<RowSpan>& keys,
                               std::vector<RowSpan>& values, RecallStats& stats) {
  while (rows.n > 0) {
    const Extent& extent = Find(rows.first);
    const size_t first = rows.first - extent.first_row, n = std::min<size_t>(rows.n, extent.rows - first);
    AddPart(layer, kv_head, extent, first, n, keys, values, stats);
    rows = {rows.first + n, rows.n - n};
  }
}

void ClusterOffload::AddAll(size_t layer, size_t kv_head, std::vector<RowSpan>& keys,
                            std::vector<RowSpan>& values) const {
  for (size_t i = 0; i < extents_before_; ++i) {
    const Extent& extent = extents_[i];
    const std::byte* const region = file_->Map(Offset(extent, layer, kv_head), HeadBytes(layer, extent.rows));
    keys.push_back({formats_[layer].keys, region, 0, extent.rows});
    values.push_back({formats_[layer].values, region + ValuesAt(extent, layer), 0, extent.rows});
  }
}

void ClusterOffload::ReadRow(size_t layer, size_t kv_head, size_t row, std::byte* keys, std::byte* values) const {
  const Extent& extent = Find(row);
  const Formats& formats = formats_[layer];
  const std::byte* const region = file_->Map(Offset(extent, layer, kv_head), HeadBytes(layer, extent.rows));
  const size_t slot = row - extent.first_row;
  CopyRow(formats.keys, region, slot, keys, 0);
  CopyRow(formats.values, region + ValuesAt(extent, layer), slot, values, 0);
}

void ClusterOffload::Save(ByteWriter& out) const {
  out.Put<uint64_t>(extents_.size());
  for (const Extent& extent : extents_) out.Put<uint64_t>(extent.rows);
  const size_t at = out.bytes.size();
  out.bytes.resize(at + file_bytes());
  if (file_ != nullptr) file_->Read(0, std::span(out.bytes).subspan(at));
}

void ClusterOffload::RequireFiniteScales(std::span<const std::byte> file) const {
  ByteCounter scratch;
  const auto require = [&](const RowFormat& format, size_t region, size_t tiles) {
    CountedBuffer tile(scratch, RegionBytes(format, kTileRows));
    for (size_t t = 0; t < tiles; ++t) {
      std::memcpy(tile.data(), &file[region + t * TileBytes(format)], TileBytes(format));
      lesskv::RequireFiniteScales(format, tile.data());
    }
  };
  for (const Extent& extent : extents_)
    for (size_t layer = options_.skip; layer < layers_.size(); ++layer)
      for (size_t h = 0; h < layers_[layer].n_kv_heads; ++h) {
        const size_t region = Offset(extent, layer, h);
        require(formats_[layer].keys, region, extent.tiles());
        require(formats_[layer].values, region + ValuesAt(extent, layer), extent.tiles());
      }
}

void ClusterOffload::Load(ByteReader& in, size_t max_rows) {
  const size_t n = in.Count(max_rows, "the number of batches of clusters");
  std::vector<size_t> rows;
  size_t sum = 0;
  for (size_t i = 0; i < n; ++i) {
    rows.push_back(in.Count(max_rows - sum, "the rows of a batch of clusters"));
    sum += rows.back();
    if (rows.back() == 0) Fail(ErrorCode::kBadFile, "saved cache: a batch of clusters without rows");
  }
  size_t bytes = 0;
  for (const size_t r : rows) bytes = CheckedAdd(bytes, ExtentBytes(r), "bytes of offloaded rows");
  if (bytes > in.rest.size())
    Fail(ErrorCode::kBadFile, "saved cache: {} more bytes expected, {} found", bytes, in.rest.size());
  Reserve(rows);
  RequireFiniteScales(in.rest.first(bytes));
  if (n > 0) file_->Write(0, in.rest.first(bytes));
  in.rest = in.rest.subspan(bytes);
  EndStep();
}

}  // namespace lesskv
