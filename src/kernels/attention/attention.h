// Exact softmax attention of one KV head's whole query group over rows that lie in one or more spans.
//
// Row indices are global: the spans of a job, one after the other, hold rows 0 .. n_rows - 1. The first n_past rows are
// visible to every query; row n_past + i is the step's own row i and is visible to query m exactly when i <= m (so
// n_rows == n_past + n_queries when the step's keys are among them, n_rows == n_past when there are none).
//
// Guarantees that the cache relies on:
//  - The bits of every result depend on the rows, their order and the number of queries only: not on how the rows are
//    cut into spans, where in a region they lie, how many threads run, or which other jobs run beside.
//  - Each row of keys and values is read once for the whole query group; nothing is expanded to query heads.
//  - No visible row gives output 0 and log-mass -infinity: the identity of merging (see Merge below).
//  - Work memory, kept by the calling thread for its next call: up to 1 MiB or so a thread (a tile of queries, a block
//  of
//    rows in float32); with up to 4 queries a partial result of n_queries * group * (head_dim + 16) floats a 1,024
//    rows, and with read positions n_dims floats a row for the angles, once for all jobs that share them.
//
// Up to 4 queries rows are cut into splits (decode), with more queries into tiles (prefill): the two agree to rounding,
// not in bits. Errors against exact arithmetic, as normalised mean squares: at most 1e-10 in float32; with up to 4 queries
// where the processor has 8-bit dot products 1e-7 for q8 and q4 keys, whose queries are rounded to 16 bits a block of
// 32, and 1e-8 for q8 and q4 values, whose weights are rounded to 16 bits a block and 128 rows; 3e-5 with more queries
// and ComputeType::kBF16 where it has bfloat16 products.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/linear/linear.h"
#include "kernels/basic/rope.h"
#include "kernels/rows/rows.h"

namespace lesskv {

struct AttentionJob {
  RowFormat key_format, value_format;
  std::span<const KvSpan> spans;
  size_t n_past = 0;
  size_t n_queries = 0;

  // Queries [n_queries, group, head_dim]: query m of the group starts at q + m * q_stride, heads are contiguous.
  // Rotated, and not yet scaled by `scale` (1 / sqrt(head_dim)).
  const float* q = nullptr;
  size_t q_stride = 0;
  size_t group = 1;
  float scale = 1;

  // For stores that keep unrotated keys: key row r is rotated to read_positions[r] when it is read. Null: keys are
  // stored rotated.
  const RopeTable* rope = nullptr;
  const int32_t* read_positions = nullptr;
  // With read positions only: keys were stored transformed in blocks of this many channels (hadamard.h) and are taken
  // back before they are rotated. 0: as they are.
  size_t key_hadamard_block = 0;

  ComputeType compute = ComputeType::kF32;

  // Results. out [n_queries, group, head_dim] with out_stride like q; lse [n_queries, group]: the log of the softmax
  // mass, log sum_r exp(scale * q . k_r).
  float* out = nullptr;
  size_t out_stride = 0;
  float* lse = nullptr;
  // Optional, for n_queries == 1: the attention each row received, summed over the group, [n_rows]. The
  // probabilities that weigh the values are used once more, so this costs no second softmax.
  float* received = nullptr;
};

// Runs all jobs (the KV heads of a layer, of one or several sequences) in one parallel region.
void Attend(std::span<const AttentionJob> jobs);

// Attention received, by column: sums[r] = sum over queries m in [first_query, n_queries) and heads g of the group of
// weights[m - first_query] * exp(scale * q_mg . k_r - lse[m, g]), over visible (m, r) only. A second pass over the keys.
struct ColumnSumJob {
  AttentionJob attention;      // as given to Attend, which must have run: lse is read
  const float* lse = nullptr;  // [n_queries, group] normalisers; usually attention.lse
  size_t first_query = 0;
  const float* weights = nullptr;  // null: all 1
  float* sums = nullptr;           // [n_rows], overwritten
};
void ColumnSums(std::span<const ColumnSumJob> jobs);

// Merges a partial result (normalised output and log-mass) into another by log-sum-exp, in place:
// lse' = log(e^lse + e^other_lse), out' = (e^lse out + e^other_lse other_out) / e^lse'. A log-mass of -infinity is the
// identity on either side and leaves the other side's bits unchanged.
void Merge(float* out, float* lse, const float* other_out, float other_lse, size_t head_dim);

}  // namespace lesskv
