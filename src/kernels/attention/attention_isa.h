// Between attention.cpp, which checks, plans and hands out tasks, and the kernels, which exist once an instruction set.
// Plain structs and function pointers only: the kernels' translation units are compiled with flags of their own, and an
// inline function of a shared header that got compiled there could be picked by the linker for the whole program.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention/row_reader.h"

namespace lesskv {

// Up to this many queries a job is cut into splits of rows (decode): each row is read from memory once for all queries.
// Beyond, it is cut into tiles of queries (prefill).
inline constexpr size_t kDecodeQueries = 4;
inline constexpr size_t kSplitRows = 1024;  // rows of one decode task, counted from row 0
inline constexpr size_t kBlockRows = RowReader::kMaxRows;  // rows expanded to float32 at a time, counted from row 0

// c[m, n] (+)= sum over pairs of a[m, pairs] b[pairs, n], of bfloat16 pairs along the summed-up dimension, which share 32
// bits. n is rounded up to whole vectors of 16, which b and c must have.
using MultiplyPairsFunction = void (*)(size_t m, size_t n, size_t pairs, const uint32_t* a, size_t a_stride,
                                       const uint32_t* b, size_t b_stride, float* c, size_t c_stride, bool add);

namespace {  // not shared: each translation unit has its own

template <int n>
struct Count {
  static constexpr int value = n;
};

// f(Count<n>), 1 <= n; with n beyond kMost f(Count<kMost>): for kernels that are made once for each number of queries or
// vectors at a time.
template <int kMost, int k = 1, typename F>
inline void WithCount(size_t n, const F& f) {
  if constexpr (k == kMost) {
    f(Count<k>());
  } else if (n == k) {
    f(Count<k>());
  } else {
    WithCount<kMost, k + 1>(n, f);
  }
}

}  // namespace

// How prefill is cut: expanding a block of rows costs the same for few and for many queries, so a task takes as many as
// its products are worth.
struct PrefillShape {
  size_t stacked = 192;  // queries times group of one task
  size_t chunk = 24;     // of them, whose scores are computed, weighted and used before the next ones'
  size_t padding = 1;    // rows of a, and pairs, that multiply_pairs takes beyond m and pairs, to a multiple; zero pairs
  MultiplyPairsFunction multiply_pairs = nullptr;  // products in bfloat16; null: in float32
};

// The rows of one side.
struct SideView {
  const RowSpan* spans;
  const size_t* span_rows;  // [n_spans + 1]: span i holds rows [span_rows[i], span_rows[i + 1])
  size_t n_spans;
};

// An AttentionJob as the kernels see it.
struct AttentionView {
  SideView keys, values;
  size_t head_dim, n_rows, n_past, n_queries, group;
  bool narrow_keys;  // some keys have some of the channels only
  const float* q;
  size_t q_stride;
  float scale;
  // For keys that are stored unrotated, else null: the angles of the rows' read positions, [tile of 16 rows] of
  // cosines [rotary_pairs][16], then sines [rotary_pairs][16].
  const float* angles;
  size_t rotary_pairs;
  bool interleaved;  // pairs are (2 i, 2 i + 1); else (i, i + rotary_pairs)
  size_t hadamard_block;  // 0, or blocks of channels in which stored keys are transformed: taken back before the rotation
  float hadamard_scale;   // 1 / sqrt(hadamard_block)
  const float* bias;  // [n_rows] on scaled scores, or null
  size_t window;  // a query sees rows of so many positions, its own included; 0: all
  int32_t first_position;         // of query 0 and of the step's first row
  const int32_t* past_positions;  // [n_past]
  const int32_t* latest;          // with a window: the latest position of each block of kBlockRows rows
  PrefillShape prefill;
  float* out;
  size_t out_stride;
  float* lse;
  float* received;        // [n_rows], or [group, n_rows] where received_by_head, or null
  bool received_by_head;
  float* probabilities;  // work memory of a view with `received`: [group, probability_stride], relative to a split's largest
  size_t probability_stride;
};

struct ColumnView {
  AttentionView attention;
  const float* lse;
  size_t first_query;
  const float* weights;
  float* sums;
  bool by_head;
};

// What a decode task leaves for the merge, for each of n_queries * group stacked queries: PartialFloats floats, namely
// the largest score, the sum of exp(score - largest), the split's factor in the merge (written there), 13 unused, then
// the outputs before normalisation.
inline constexpr size_t kPartialHeader = 16;

struct AttentionKernels {
  size_t (*scratch_floats)(const AttentionView& view);  // work memory of any one task below
  size_t (*partial_floats)(const AttentionView& view);  // of one split: n_queries * group * (header + head_dim, padded)
  void (*decode)(const AttentionView& view, size_t split, float* scratch, float* partial);
  // Merges the partials of all splits, in order, into out and lse, and the probabilities into what rows received.
  void (*merge_splits)(const AttentionView& view, float* partials, size_t n_splits);
  // Queries [first_query, first_query + n).
  void (*prefill)(const AttentionView& view, size_t first_query, size_t n, float* scratch);
  // Rows [block * kBlockRows, ...) of one ColumnSumJob.
  void (*column_sums)(const ColumnView& view, size_t block, float* scratch);
};

namespace scalar {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
namespace neon {
extern const AttentionKernels kAttentionKernels;
}
namespace dotprod {
extern const AttentionKernels kAttentionKernels;
}

namespace amx {
// A MultiplyPairsFunction that reads a and writes c up to a multiple of 16 rows; pairs must be a multiple of 16.
void MultiplyPairs(size_t m, size_t n, size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b,
                   size_t b_stride, float* c, size_t c_stride, bool add);
}  // namespace amx

namespace avx512bf16 {
// A MultiplyPairsFunction.
void MultiplyPairs(size_t m, size_t n, size_t pairs, const uint32_t* a, size_t a_stride, const uint32_t* b,
                   size_t b_stride, float* c, size_t c_stride, bool add);
// x [n] to [(n + 1) / 2] pairs; an odd last one is joined with 0.
void RoundPairs(const float* x, size_t n, uint32_t* out);
// out[i] = (even[i], odd[i]) for i < n, a multiple of 16; odd may be null and then counts as 0.
void JoinPairs(const float* even, const float* odd, size_t n, uint32_t* out);
}  // namespace avx512bf16

}  // namespace lesskv
