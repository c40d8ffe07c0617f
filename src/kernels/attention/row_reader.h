// The rows that a job of attention reads: spans of regions (rows.h), or of a codec's own layout behind a RowReader.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/rows/rows.h"

namespace lesskv {

// Rows of a layout of the codec's own, read by the kernels a piece at a time: expanded in cache to float32, once for the
// whole query group, or scored and summed up where they lie. Rows are named by slot, a number of the reader's own.
//
// Called inside parallel regions, from several threads at once: must not throw, should not allocate. What a row gives
// must not depend on how rows are cut into calls.
class RowReader {
 public:
  static constexpr size_t kMaxRows = 256;     // of any one call that expands rows
  static constexpr size_t kMostScored = 1024;  // of any one that scores or sums them up

  virtual ~RowReader();

  // Slots [first, first + n) as keys, 1 <= n <= kMaxRows: out[c * stride + i] = channel c of slot first + i. Unrotated
  // where the job has read positions, and never transformed: the kernel rotates, and takes nothing back.
  // A reader of values alone need not have it, nor one of keys the other: calling what is missing is a CHECK.
  virtual void ExpandKeys(size_t first, size_t n, float* out, size_t stride) const;

  // As values: out[i * stride + c] = channel c of slot first + i.
  virtual void ExpandValues(size_t first, size_t n, float* out, size_t stride) const;

  // For up to 4 queries, optional, n <= kMostScored: scores[m * stride + i] = q_m . k of slot first + i for `stacked` (queries times
  // group) scaled queries, channel c of which is q[c * stacked + m]. Not called for a job with read positions. False:
  // nothing was written, and the rows are expanded instead; the answer must be the same for every call.
  virtual bool Scores(size_t first, size_t n, const float* q, size_t stacked, float* scores, size_t stride) const;

  // For up to 4 queries, optional, n <= kMostScored: out[m * out_stride + c] += sum over i of weights[m * stride + i] * channel c of slot
  // first + i, row by row in order. False as above.
  virtual bool AddValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked, float* out,
                         size_t out_stride) const;
};

// Consecutive rows of one side, keys or values.
struct RowSpan {
  RowFormat format;                   // side and head_dim always hold; type is read where there is no reader
  const std::byte* rows = nullptr;    // a region of that format
  size_t first_slot = 0;              // rows lie in slots [first_slot, first_slot + n_rows) of the region or the reader
  size_t n_rows = 0;
  const RowReader* reader = nullptr;  // rows in a layout of the codec's own; null: in `rows`
  // Keys in a region only: the channels of the job that a row has, [format.head_dim], ascending; the others count as 0,
  // and are neither stored nor multiplied. Spans with the same channels share one list. Null: all.
  const uint16_t* channels = nullptr;
};

}  // namespace lesskv
