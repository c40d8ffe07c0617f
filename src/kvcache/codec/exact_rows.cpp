#include "kvcache/codec/exact_rows.h"

namespace lesskv {

ExactRows ExactRows::Make(ByteCounter& counter, const ExactFormats& formats, size_t rows) {
  return {CountedBuffer(counter, RegionBytes(formats.keys, rows) + RegionBytes(formats.values, rows)), rows};
}

std::byte* ExactRows::Region(const ExactFormats& formats, RowSide side) const {
  return const_cast<std::byte*>(memory.data()) + (side == RowSide::kKeys ? 0 : RegionBytes(formats.keys, rows));
}

void CopyRing(const ExactFormats& formats, RowSide side, const ExactRows& ring, size_t first, size_t n, const ExactRows& to) {
  for (size_t i = 0; i < n && to.has_bytes(); ++i)
    CopyRow(formats.Of(side), ring.Region(formats, side), (first + i) % ring.rows, to.Region(formats, side), i);
}

}  // namespace lesskv
