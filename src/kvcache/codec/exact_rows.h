// Rows of a KV head as they came, keys and then values: what stores of coded rows keep as a window, and of a step in
// progress.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/threads.h"
#include "kernels/rows/rows.h"
#include "kvcache/cache_shape.h"
#include "kvcache/memory.h"

namespace lesskv {

struct ExactFormats {
  RowFormat keys, values;
  ExactFormats(RowType key_type, RowType value_type, size_t head_dim)
      : keys{key_type, RowSide::kKeys, head_dim}, values{value_type, RowSide::kValues, head_dim} {}
  const RowFormat& Of(RowSide side) const { return side == RowSide::kKeys ? keys : values; }
};

struct ExactRows {
  CountedBuffer memory;  // in a plan without bytes
  size_t rows = 0;       // its room

  static ExactRows Make(ByteCounter& counter, const ExactFormats& formats, size_t rows);
  ExactRows Clone(ByteCounter& counter) const { return {memory.Clone(counter), rows}; }
  bool has_bytes() const { return memory.data() != nullptr; }
  std::byte* Region(const ExactFormats& formats, RowSide side) const;
};

// Where a step's own rows wait until their layer is closed: an area a head, which all layers share one after the other,
// or, in a step that defers, one for each head of each layer.
class StagingArea {
 public:
  StagingArea(std::span<const LayerShape> layers, RowType keys, RowType values);
  void CopyFrom(const StagingArea& other, ByteCounter& counter);  // one of the same layers

  void Reserve(ByteCounter& counter, size_t n_step, bool defers);
  void Free();
  const ExactRows& At(size_t layer, size_t kv_head) const { return areas_[defers_ ? table_(layer, kv_head) : kv_head]; }

 private:
  HeadTable table_;
  std::vector<ExactFormats> formats_;  // [n_layers]
  size_t widest_ = 0, most_heads_ = 0;
  bool defers_ = false;
  std::vector<ExactRows> areas_;
};

// n rows of one side from slot `first` of a ring on, to slot 0 on of other rows.
void CopyRing(const ExactFormats& formats, RowSide side, const ExactRows& ring, size_t first, size_t n, const ExactRows& to);

// A layer's new rows [n, n_kv_heads, head_dim] to slots [first, first + n) of the rows that `of(kv_head)` names, heads side
// by side.
template <typename Of>
void WriteExact(const ExactFormats& formats, const LayerShape& layer, size_t first, size_t n, const float* keys,
                const float* values, Of&& of) {
  const size_t d = layer.head_dim, stride = layer.kv_dim();
  ParallelFor(layer.n_kv_heads, [&](size_t h) {
    const ExactRows& rows = of(h);
    WriteRows(formats.keys, rows.Region(formats, RowSide::kKeys), first, n, keys + h * d, stride);
    WriteRows(formats.values, rows.Region(formats, RowSide::kValues), first, n, values + h * d, stride);
  });
}

}  // namespace lesskv
