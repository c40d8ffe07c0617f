// Exact softmax attention of one KV head's whole query group over rows that lie in one or more spans.
//
// Row indices are global: the spans of a side (keys or values), one after the other, hold rows 0 .. n_rows - 1. Keys and
// values may be cut at different rows and lie in different formats, and so may the spans of one side: one normaliser
// covers them all. The first n_past rows are visible to every query; row n_past + i is the step's own row i and is
// visible to query m exactly when i <= m (so n_rows == n_past + n_queries when the step's keys are among them, n_rows ==
// n_past when there are none). A sliding window hides rows that lie too far back.
//
// Guarantees that the cache relies on:
//  - The bits of every result depend on the rows and their formats, their order and the number of queries only: not on
//    how the rows are cut into spans, where in a region they lie, how many threads run, or which other jobs run beside.
//  - Each row of keys and values is read once for the whole query group; nothing is expanded to query heads.
//  - No visible row gives output 0 and log-mass -infinity: the identity of merging (see Merge below).
//  - Work memory, kept by the calling thread for its next call. For each of the Threads() threads: up to 1 MiB or so (a
//    tile of queries, a block of rows in float32); so a program that calls from several threads keeps as many times
//    Threads() shares. With up to 4 queries a partial result of n_queries * group * (head_dim + 16) floats a 1,024 rows;
//    with `received` group floats a row; with read positions n_dims floats a row for the angles, once for all jobs that
//    share them.
//
// Up to 4 queries rows are cut into splits (decode), with more queries into tiles (prefill): the two agree to rounding,
// not in bits. Errors against exact arithmetic, as normalised mean squares: at most 1e-10 in float32; with up to 4 queries
// and AVX2, AVX-512 or ARM's dot products 1e-7 for q8 and q4 keys, whose queries are rounded to 16 bits a block of
// 32, and 2e-8 for q8 and q4 values, whose weights are rounded to 16 bits a block and 128 rows; 3e-5 with more queries
// and a ComputeType other than kF32 where it has bfloat16 products.
//
// What a job must keep to is checked, and breaking it is a mistake of the calling code (CHECK), not an Error. Pointers
// need hold until the call returns. Work memory that cannot be had is std::bad_alloc, before anything is written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/attention/row_reader.h"
#include "kernels/basic/rope.h"
#include "kernels/linear/linear.h"

namespace lesskv {

struct AttentionJob {
  // Both cover the same rows in the same order, n_rows in all; all formats have the same head_dim, but those of keys
  // with some of the channels only (RowSpan::channels). A job without rows has an empty span on each side, which says
  // head_dim.
  std::span<const RowSpan> keys, values;
  size_t n_past = 0;
  size_t n_queries = 0;

  // Queries [n_queries, group, head_dim]: query m of the group starts at q + m * q_stride, heads are contiguous.
  // Rotated, and not yet scaled by `scale` (1 / sqrt(head_dim)). Attention that differs by query head is a job a head:
  // `group` 1, `q` and `out` at the head.
  const float* q = nullptr;
  size_t q_stride = 0;
  size_t group = 1;
  float scale = 1;

  // For stores that keep unrotated keys: key row r is rotated to read_positions[r], at least 0, when it is read. Null:
  // keys are stored rotated.
  const RopeTable* rope = nullptr;
  const int32_t* read_positions = nullptr;  // [n_rows]
  // With read positions only: keys in regions were stored transformed in blocks of this many channels (hadamard.h) and
  // are taken back before they are rotated. 0: as they are. Keys of a reader are never transformed.
  size_t key_hadamard_block = 0;

  // Added to the scaled scores of every query, [n_rows]: the logarithm of a row's weight; -infinity hides the row. Null:
  // nothing.
  const float* bias = nullptr;

  // A sliding window of so many tokens; 0: none. Query m stands at position first_position + m and sees a row at
  // position p only if p > first_position + m - window. The step's row i stands at first_position + i; past_positions
  // [n_past], needed where there are past rows, says where those stand, in any order. Positions are at least 0.
  size_t window = 0;
  int32_t first_position = 0;
  const int32_t* past_positions = nullptr;

  ComputeType compute = ComputeType::kF32;

  // Results. out [n_queries, group, head_dim] with out_stride like q; lse [n_queries, group]: the log of the softmax
  // mass, log sum_r exp(scale * q . k_r + bias_r).
  float* out = nullptr;
  size_t out_stride = 0;
  float* lse = nullptr;
  // Optional, for n_queries == 1: the attention each row received, summed over the group, [n_rows]; with
  // received_by_head that of each query head, [group, n_rows]. A row that is not visible received 0. The probabilities
  // that weigh the values are used once more, so this costs no second softmax.
  float* received = nullptr;
  bool received_by_head = false;
};

// Runs all jobs (the KV heads of a layer, of one or several sequences, hundreds if need be) in one parallel region.
void Attend(std::span<const AttentionJob> jobs);

// Attention received, by column: sums[r] = sum over queries m in [first_query, n_queries) and heads g of the group of
// weights[m - first_query] * exp(scale * q_mg . k_r + bias_r - lse[m, g]), over visible (m, r) only. A second pass over
// the keys.
struct ColumnSumJob {
  AttentionJob attention;      // as given to Attend, which must have run: lse is read
  const float* lse = nullptr;  // [n_queries, group] normalisers; usually attention.lse
  size_t first_query = 0;
  const float* weights = nullptr;  // [n_queries - first_query]; null: all 1
  float* sums = nullptr;           // [n_rows], overwritten; with by_head [group, n_rows], without the sum over heads
  bool by_head = false;
};
void ColumnSums(std::span<const ColumnSumJob> jobs);

// Merges a partial result (normalised output and log-mass) into another by log-sum-exp, in place:
// lse' = log(e^lse + e^other_lse), out' = (e^lse out + e^other_lse other_out) / e^lse'. A log-mass of -infinity is the
// identity on either side and leaves the other side's bits unchanged.
void Merge(float* out, float* lse, const float* other_out, float other_lse, size_t head_dim);

}  // namespace lesskv
