// Prefill: a tile of queries, with their whole group stacked, against blocks of kBlockRows rows that are expanded once
// for all of them; online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). And the
// sums of probabilities by column. Part of the kernels of one instruction set, see attention_simd.h.
//
// Scores are kept times log2(e), so that weights are powers of two.
#pragma once

#include "kernels/attention/attention_decode.h"

constexpr size_t kBlockStride = kBlockRows + 16;  // of the scores of a block
size_t QueriesPerTile(const AttentionView& view) { return Max(1, view.prefill.stacked / view.group); }

struct PrefillScratch {
  float* queries;  // [stacked, head_dim], times scale and log2(e)
  float* scores;   // [chunk, kBlockStride]
  float* out;      // [stacked, padded head_dim]
  float* largest;  // [stacked]
  float* sum;      // [stacked]
  float* columns;  // [group, kBlockRows]
  float* bias;     // [kBlockRows], times log2(e)
  Expansion rows;
  // The same in bfloat16, two values along the summed-up dimension in 32 bits.
  uint32_t* pair_queries;  // [stacked, pairs of head_dim]
  uint32_t* pair_keys;     // [pairs of head_dim, kKeyStride]
  uint32_t* pair_weights;  // [chunk, kBlockStride / 2]
  uint32_t* pair_values;   // [kBlockRows / 2, padded head_dim]
  size_t floats;
};

PrefillScratch CarvePrefill(const AttentionView& view, float* base) {
  const PrefillShape& shape = view.prefill;
  const size_t dim = view.head_dim;
  const size_t stacked = Up(Min(view.n_queries, QueriesPerTile(view)) * view.group, shape.padding);
  Arena arena = {base, 0};
  PrefillScratch s;
  s.queries = arena.Take(stacked * dim);
  s.scores = arena.Take(shape.chunk * kBlockStride);
  s.out = arena.Take(stacked * Padded(dim));
  s.largest = arena.Take(stacked);
  s.sum = arena.Take(stacked);
  s.columns = arena.Take(view.group * kBlockRows);
  s.bias = arena.Take(kBlockRows);
  s.rows = TakeExpansion(view, arena);
  auto take_pairs = [&](size_t n) { return reinterpret_cast<uint32_t*>(arena.Take(shape.multiply_pairs ? n : 0)); };
  const size_t pairs = (dim + 1) / 2;
  s.pair_queries = take_pairs(stacked * pairs);
  s.pair_keys = take_pairs(pairs * kKeyStride);
  s.pair_weights = take_pairs(shape.chunk * kBlockStride / 2);
  s.pair_values = take_pairs(kBlockRows / 2 * Padded(dim));
  s.floats = arena.used;
  return s;
}

// ---- Products

// c[MB, NV vectors] (+)= a[MB, k] b[k, NV vectors]
template <int MB, int NV>
inline void Multiply(size_t k, const float* a, size_t a_stride, const float* b, size_t b_stride, float* c,
                     size_t c_stride, bool add) {
  V sum[MB][NV];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) sum[m][v] = add ? Load(c + m * c_stride + v * kW) : Zero();
  }
  for (size_t i = 0; i < k; ++i) {
    V right[NV];
    for (int v = 0; v < NV; ++v) right[v] = Load(b + i * b_stride + v * kW);
    for (int m = 0; m < MB; ++m) {
      const V left = Splat(a[m * a_stride + i]);
      for (int v = 0; v < NV; ++v) sum[m][v] = Fma(left, right[v], sum[m][v]);
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) Store(c + m * c_stride + v * kW, sum[m][v]);
  }
}

constexpr size_t kMultiplyRows = 6;
constexpr size_t kMultiplyVectors = kW == 8 ? 2 : 4;  // 24 of 32 registers sum up, or 12 of 16

template <int NV>
inline void MultiplyPanel(size_t m, size_t k, const float* a, size_t a_stride, const float* b, size_t b_stride,
                          float* c, size_t c_stride, bool add) {
  for (size_t i = 0; i < m; i += kMultiplyRows) {
    const float* left = a + i * a_stride;
    float* to = c + i * c_stride;
    WithCount<kMultiplyRows>(m - i, [&](auto count) {
      Multiply<count.value, NV>(k, left, a_stride, b, b_stride, to, c_stride, add);
    });
  }
}

// c[m, n] (+)= a[m, k] b[k, n]; n is rounded up to whole vectors, which b and c must have.
void MultiplyAll(size_t m, size_t n, size_t k, const float* a, size_t a_stride, const float* b, size_t b_stride,
                 float* c, size_t c_stride, bool add) {
  for (size_t j = 0; j < n; j += kMultiplyVectors * kW) {
    WithCount<kMultiplyVectors>((n - j + kW - 1) / kW, [&](auto count) {
      MultiplyPanel<count.value>(m, k, a, a_stride, b + j, b_stride, c + j, c_stride, add);
    });
  }
}

void LoadQueries(const AttentionView& view, size_t first, size_t n, const PrefillScratch& s) {
  const size_t dim = view.head_dim, width = view.group * dim;
  const float scale = view.scale * kLog2E;
  for (size_t i = 0; i < n; ++i) {
    const float* q = view.q + (first + i) * view.q_stride;
    for (size_t c = 0; c < width; ++c) s.queries[i * width + c] = q[c] * scale;
  }
  if (!view.prefill.multiply_pairs) return;
  for (size_t m = 0; m < n * view.group; ++m) {
    avx512bf16::RoundPairs(s.queries + m * dim, dim, s.pair_queries + m * ((dim + 1) / 2));
  }
}

void LoadKeys(const AttentionView& view, const PrefillScratch& s, size_t begin, size_t n) {
  ExpandKeys(view, s.rows, begin, begin + n);
  for (size_t r = 0; view.bias && r < n; ++r) s.bias[r] = view.bias[begin + r] * kLog2E;
  if (!view.prefill.multiply_pairs) return;
  const size_t dim = view.head_dim;
  for (size_t c = 0; c < dim; c += 2) {
    const float* even = s.rows.keys + c * kKeyStride;
    avx512bf16::JoinPairs(even, c + 1 < dim ? even + kKeyStride : nullptr, Padded(n), s.pair_keys + c / 2 * kKeyStride);
  }
}

// Pairs of n rows in a product that sums over rows.
size_t ValuePairs(const AttentionView& view, size_t n) { return Up((n + 1) / 2, view.prefill.padding); }

void LoadValues(const AttentionView& view, const PrefillScratch& s, size_t begin, size_t n) {
  ExpandValues(view, begin, begin + n, s.rows.values);
  if (!view.prefill.multiply_pairs) return;
  const size_t width = Padded(view.head_dim);
  for (size_t i = 0; i < n; i += 2) {
    const float* even = s.rows.values + i * width;
    avx512bf16::JoinPairs(even, i + 1 < n ? even + width : nullptr, width, s.pair_values + i / 2 * width);
  }
  for (size_t pair = (n + 1) / 2; pair < ValuePairs(view, n); ++pair)
    for (size_t c = 0; c < width; ++c) s.pair_values[pair * width + c] = 0;
}

// Scores, with their bias, of stacked queries [m, m + count) and n loaded keys.
void ChunkScores(const AttentionView& view, const PrefillScratch& s, size_t m, size_t count, size_t n) {
  const size_t dim = view.head_dim, pairs = (dim + 1) / 2;
  if (view.prefill.multiply_pairs) {
    view.prefill.multiply_pairs(count, n, pairs, s.pair_queries + m * pairs, pairs, s.pair_keys, kKeyStride, s.scores,
                              kBlockStride, false);
  } else {
    MultiplyAll(count, n, dim, s.queries + m * dim, dim, s.rows.keys, kKeyStride, s.scores, kBlockStride, false);
  }
  for (size_t i = 0; view.bias && i < count; ++i) AddBias(s.bias, n, s.scores + i * kBlockStride);
}

// Adds the chunk's weights times n loaded values to what was summed up for stacked queries [m, m + count).
void ChunkValues(const AttentionView& view, const PrefillScratch& s, size_t m, size_t count, size_t n) {
  const size_t dim = view.head_dim, width = Padded(dim), pairs = ValuePairs(view, n);
  if (view.prefill.multiply_pairs) {
    for (size_t i = 0; i < count; ++i) {
      float* weights = s.scores + i * kBlockStride;
      for (size_t r = n; r < 2 * pairs; ++r) weights[r] = 0;
      avx512bf16::RoundPairs(weights, 2 * pairs, s.pair_weights + i * (kBlockStride / 2));
    }
    view.prefill.multiply_pairs(count, dim, pairs, s.pair_weights, kBlockStride / 2, s.pair_values, width,
                              s.out + m * width, width, true);
  } else {
    MultiplyAll(count, dim, n, s.scores, kBlockStride, s.rows.values, width, s.out + m * width, width, true);
  }
}

// Calls f(m, count, n) for chunks of stacked queries that may see the first n, at least one, of the rows [begin, end) of
// a block.
template <typename F>
inline void ForEachChunk(const AttentionView& view, size_t first, size_t stacked, size_t begin, size_t end, F f) {
  for (size_t m = 0; m < stacked; m += view.prefill.chunk) {
    const size_t count = Min(view.prefill.chunk, stacked - m);
    const size_t seen = VisibleRows(view, first + (m + count - 1) / view.group);
    if (seen > begin && WindowReaches(view, first + m / view.group, begin)) f(m, count, Min(end, seen) - begin);
  }
}

// ---- Softmax

// scores = 2^(scores - largest) over the visible ones and 0 up to n, or the vectors that hold them; returns the sum.
float Exp2AndSum(float* scores, size_t visible, size_t n, float largest) {
  const V shift = Splat(largest == -kInfinity ? 0 : largest);
  V sum = Zero();
  for (size_t i = 0; i < Padded(visible); i += kW) {
    const V p = Exp2(VMin(Zero(), Sub(Load(scores + i), shift)));
    Store(scores + i, p);
    sum = Add(sum, p);
  }
  for (size_t i = Padded(visible); i < Padded(n); ++i) scores[i] = 0;
  return ReduceAdd(sum);
}

// Turns the chunk's scores into weights relative to the largest score so far, and scales down what was summed up
// before.
void ChunkSoftmax(const AttentionView& view, const PrefillScratch& s, size_t first, size_t m, size_t count,
                  size_t begin, size_t n) {
  const size_t width = Padded(view.head_dim);
  for (size_t i = 0; i < count; ++i) {
    float* scores = s.scores + i * kBlockStride;
    float& largest = s.largest[m + i];
    float& sum = s.sum[m + i];
    const size_t query = first + (m + i) / view.group, seen = VisibleRows(view, query);
    const size_t visible = seen > begin ? Min(n, seen - begin) : 0;
    HideOld(view, query, begin, visible, scores);
    const float block = MaxScore(scores, visible);
    if (block > largest) {
      if (largest != -kInfinity) {
        const float shrink = __builtin_exp2f(largest - block);
        float* out = s.out + (m + i) * width;
        for (size_t c = 0; c < width; c += kW) Store(out + c, Mul(Load(out + c), Splat(shrink)));
        sum *= shrink;
      }
      largest = block;
    }
    sum += Exp2AndSum(scores, visible, n, largest);
  }
}

void FinishPrefill(const AttentionView& view, const PrefillScratch& s, size_t first, size_t stacked) {
  const size_t dim = view.head_dim;
  for (size_t m = 0; m < stacked; ++m) {
    const size_t query = first + m / view.group, head = m % view.group;
    const bool nothing = s.sum[m] == 0;
    float* out = view.out + query * view.out_stride + head * dim;
    const float inverse = nothing ? 0 : 1 / s.sum[m];
    for (size_t c = 0; c < dim; ++c) out[c] = s.out[m * Padded(dim) + c] * inverse;
    view.lse[query * view.group + head] = nothing ? -kInfinity : (s.largest[m] + __builtin_log2f(s.sum[m])) * kLn2;
  }
}

void Prefill(const AttentionView& view, size_t first, size_t n, float* scratch) {
  const PrefillScratch s = CarvePrefill(view, scratch);
  const size_t stacked = n * view.group, end = VisibleRows(view, first + n - 1);
  LoadQueries(view, first, n, s);
  Fill(s.largest, stacked, -kInfinity);
  Fill(s.sum, stacked, 0);
  Fill(s.out, stacked * Padded(view.head_dim), 0);
  for (size_t b = 0; b < end; b += kBlockRows) {
    if (!WindowReaches(view, first, b)) continue;
    const size_t stop = Min(end, b + kBlockRows);
    LoadKeys(view, s, b, stop - b);
    LoadValues(view, s, b, stop - b);
    ForEachChunk(view, first, stacked, b, stop, [&](size_t m, size_t count, size_t rows) {
      ChunkScores(view, s, m, count, rows);
      ChunkSoftmax(view, s, first, m, count, b, rows);
      ChunkValues(view, s, m, count, rows);
    });
  }
  FinishPrefill(view, s, first, stacked);
}

// ---- Column sums

// sums += weight * 2^(scores - shift) over whole vectors.
inline void AddWeights(const float* scores, size_t n, float shift, float weight, float* sums) {
  const V shifts = Splat(shift), weights = Splat(weight);
  for (size_t i = 0; i < Padded(n); i += kW) {
    const V x = VMin(Splat(126), Sub(Load(scores + i), shifts));
    Store(sums + i, Fma(weights, Exp2(x), Load(sums + i)));
  }
}

void ChunkColumns(const ColumnView& job, const PrefillScratch& s, size_t first, size_t m, size_t count, size_t begin,
                  size_t n) {
  const AttentionView& view = job.attention;
  for (size_t i = 0; i < count; ++i) {
    const size_t query = first + (m + i) / view.group, head = (m + i) % view.group;
    const size_t seen = VisibleRows(view, query);
    const float lse = job.lse[query * view.group + head];
    if (seen <= begin || lse == -kInfinity) continue;
    float* scores = s.scores + i * kBlockStride;
    const size_t visible = Min(n, seen - begin);
    HideOld(view, query, begin, visible, scores);
    for (size_t r = visible; r < Padded(visible); ++r) scores[r] = -kInfinity;
    const float weight = job.weights ? job.weights[query - job.first_query] : 1;
    AddWeights(scores, visible, lse * kLog2E, weight, s.columns + (job.by_head ? head * kBlockRows : 0));
  }
}

void ColumnSums(const ColumnView& job, size_t block, float* scratch) {
  const AttentionView& view = job.attention;
  const PrefillScratch s = CarvePrefill(view, scratch);
  const size_t begin = block * kBlockRows, end = Min(view.n_rows, begin + kBlockRows);
  const size_t n_sums = job.by_head ? view.group : 1;
  Fill(s.columns, n_sums * kBlockRows, 0);
  bool loaded = false;
  const size_t step = QueriesPerTile(view);
  for (size_t first = job.first_query; first < view.n_queries; first += step) {
    const size_t n = Min(step, view.n_queries - first);
    if (VisibleRows(view, first + n - 1) <= begin || !WindowReaches(view, first, begin)) continue;
    if (!loaded) LoadKeys(view, s, begin, end - begin);
    loaded = true;
    LoadQueries(view, first, n, s);
    ForEachChunk(view, first, n * view.group, begin, end, [&](size_t m, size_t count, size_t rows) {
      ChunkScores(view, s, m, count, rows);
      ChunkColumns(job, s, first, m, count, begin, rows);
    });
  }
  for (size_t g = 0; g < n_sums; ++g)
    for (size_t r = begin; r < end; ++r) job.sums[g * view.n_rows + r] = s.columns[g * kBlockRows + r - begin];
}

size_t ScratchFloats(const AttentionView& view) {
  const size_t decode = view.n_queries <= kDecodeQueries ? CarveDecode(view, 0, nullptr).floats : 0;
  return Max(decode, CarvePrefill(view, nullptr).floats);
}
