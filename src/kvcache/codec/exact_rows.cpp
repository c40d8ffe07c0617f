#include "kvcache/codec/exact_rows.h"

#include <algorithm>

#include "base/checked.h"

namespace lesskv {

ExactRows ExactRows::Make(ByteCounter& counter, const ExactFormats& formats, size_t rows) {
  return {CountedBuffer(counter, RegionBytes(formats.keys, rows) + RegionBytes(formats.values, rows)), rows};
}

std::byte* ExactRows::Region(const ExactFormats& formats, RowSide side) const {
  return const_cast<std::byte*>(memory.data()) + (side == RowSide::kKeys ? 0 : RegionBytes(formats.keys, rows));
}

StagingArea::StagingArea(std::span<const LayerShape> layers, RowType keys, RowType values) : table_(layers) {
  for (const LayerShape& layer : layers) {
    formats_.emplace_back(keys, values, layer.head_dim);
    most_heads_ = std::max(most_heads_, layer.n_kv_heads);
    if (layer.head_dim > formats_[widest_].keys.head_dim) widest_ = formats_.size() - 1;
  }
  areas_.resize(most_heads_);
}

void StagingArea::CopyFrom(const StagingArea& other, ByteCounter& counter) {
  defers_ = other.defers_;
  areas_.clear();
  for (const ExactRows& area : other.areas_) areas_.push_back(area.Clone(counter));
}

void StagingArea::Reserve(ByteCounter& counter, size_t n_step, bool defers) {
  const size_t rows = RoundUp(n_step, kTileRows), n = defers ? table_.size() : most_heads_;
  if (areas_.size() != n || defers_ != defers) areas_ = std::vector<ExactRows>(n);
  defers_ = defers;
  for (size_t i = 0; i < n; ++i) {
    if (areas_[i].rows == rows) continue;
    areas_[i] = ExactRows{};
    // Layers that share an area: it has room for rows of the widest.
    areas_[i] = ExactRows::Make(counter, formats_[defers ? table_.LayerOf(i) : widest_], rows);
  }
}

void StagingArea::Free() {
  for (ExactRows& area : areas_) area = ExactRows{};
}

void CopyRing(const ExactFormats& formats, RowSide side, const ExactRows& ring, size_t first, size_t n, const ExactRows& to) {
  for (size_t i = 0; i < n && to.has_bytes(); ++i)
    CopyRow(formats.Of(side), ring.Region(formats, side), (first + i) % ring.rows, to.Region(formats, side), i);
}

}  // namespace lesskv
