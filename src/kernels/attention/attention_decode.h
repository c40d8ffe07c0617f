// Decode: up to kDecodeQueries queries against a split of kSplitRows rows, each read once for the whole query group;
// then the splits are merged. Part of the kernels of one instruction set, see attention_simd.h.
#pragma once

#include "kernels/attention/attention_simd.h"

constexpr size_t kSplitStride = kSplitRows + 16;  // of the scores of a split

// Rows of quantised values, counted from row 0, whose weights are rounded relative to their largest and whose products
// are summed up as integers where the instruction set has kernels for that: 128 weights of up to 32512 times unsigned
// codes of up to 255 stay below 2^31.
constexpr size_t kWeightRows = 128;

struct DecodeScratch {
  size_t begin, end;  // the split's rows
  float* queries;  // [head_dim, stacked], times scale
  float* some;     // their channels that keys with some of them have
  float* scores;   // [stacked, kSplitStride]
  float* edge;     // [stacked, 16]: the scores of a tile that belongs to the piece in part
  float* out;      // [stacked, padded head_dim]
  Expansion rows;
  size_t floats;
};

DecodeScratch CarveDecode(const AttentionView& view, size_t split, float* base) {
  const size_t stacked = view.n_queries * view.group;
  Arena arena = {base, 0};
  DecodeScratch s;
  s.begin = split * kSplitRows;
  s.end = Min(view.n_rows, s.begin + kSplitRows);
  s.queries = arena.Take(stacked * view.head_dim);
  s.some = arena.Take(view.narrow_keys ? stacked * view.head_dim : 0);
  s.scores = arena.Take(stacked * kSplitStride);
  s.edge = arena.Take(stacked * kTileRows);
  s.out = arena.Take(stacked * Padded(view.head_dim));
  s.rows = TakeExpansion(view, arena);
  s.floats = arena.used;
  return s;
}

size_t PartialFloats(const AttentionView& view) {
  return view.n_queries * view.group * (kPartialHeader + Padded(view.head_dim));
}

// Bytes of a row of a region; tiles are whole rows on the average.
inline size_t RowBytes(const RowFormat& format) { return TileBytes(format.type, format.head_dim) / kTileRows; }

// Fetches the first `left` bytes of rows [begin, end) while something else is computed.
void FetchFirst(const SideView& side, size_t begin, size_t end, size_t left) {
  ForEachPiece(side, begin, end, [&](const RowSpan& span, size_t slot, size_t n, size_t) {
    if (span.reader) return;
    const size_t row_bytes = RowBytes(span.format);
    const std::byte* rows = span.rows + slot * row_bytes;
    const size_t bytes = Min(left, n * row_bytes);
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(rows + i);
    left -= bytes;
  });
}

// What is read after n slots of a region: row `next` of the same side, or after the split's last keys its first values.
Ahead AfterSpan(const AttentionView& view, const DecodeScratch& s, const RowSpan& span, size_t slot, size_t n,
                size_t next) {
  const bool keys = span.format.side == RowSide::kKeys, same_side = next < s.end;
  if (!same_side && !keys) return kNothingAhead;
  const std::byte* stop = span.rows + (slot + n) * RowBytes(span.format);
  const std::byte* start = stop;
  const size_t row = same_side ? next : s.begin;
  ForEachPiece(same_side && keys ? view.keys : view.values, row, row + 1,
               [&](const RowSpan& after, size_t first, size_t, size_t) {
                 if (!after.reader) start = after.rows + first * RowBytes(after.format);
               });
  return {reinterpret_cast<const char*>(stop), start - stop};
}

// ---- Decode: scores of key tiles where they lie

// scores[m, row] for MB queries and NT tiles. Channels of a tile are channel_stride elements apart, tiles tile_stride;
// queries are [head_dim, stacked].
template <typename Rows, int MB, int NT>
inline void ScoreTiles(const typename Rows::T* keys, size_t tile_stride, size_t channel_stride, size_t dim,
                       const float* queries, size_t stacked, float* scores, size_t stride, Ahead ahead) {
  constexpr int kVectors = NT * static_cast<int>(kTileVectors);
  V sum[MB][kVectors];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Zero();
  }
  for (size_t c = 0; c < dim; ++c) {
    // NT tiles are dim such steps long.
    if constexpr (Rows::kStreams)
      FetchAhead<NT * kTileRows * sizeof(typename Rows::T)>(keys + c * NT * kTileRows, ahead);
    V key[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      key[v] = Rows::Load1(keys + v / kTileVectors * tile_stride + c * channel_stride + v % kTileVectors * kW);
    }
    for (int m = 0; m < MB; ++m) {
      const V query = Splat(queries[c * stacked + m]);
      for (int v = 0; v < kVectors; ++v) sum[m][v] = Fma(query, key[v], sum[m][v]);
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < kVectors; ++v) Store(scores + m * stride + v * kW, sum[m][v]);
  }
}

constexpr size_t kScoreQueries = kW == 16 ? 8 : 4;  // most queries at once
constexpr int ScoreTilesAtOnce(int mb) { return kW == 1 ? 1 : (kW == 16 ? (mb <= 4 ? 4 : 2) : (mb <= 2 ? 2 : 1)); }

template <typename Rows, int MB>
inline void ScoreTileRun(const typename Rows::T* keys, size_t n_tiles, size_t tile_stride, size_t channel_stride,
                         size_t dim, const float* queries, size_t stacked, float* scores, size_t stride, Ahead ahead) {
  constexpr int kNT = ScoreTilesAtOnce(MB);
  size_t t = 0;
  for (; t + kNT <= n_tiles; t += kNT) {
    ScoreTiles<Rows, MB, kNT>(keys + t * tile_stride, tile_stride, channel_stride, dim, queries, stacked,
                              scores + t * kTileRows, stride, ahead);
  }
  for (; t < n_tiles; ++t) {
    ScoreTiles<Rows, MB, 1>(keys + t * tile_stride, tile_stride, channel_stride, dim, queries, stacked,
                            scores + t * kTileRows, stride, ahead);
  }
}

// All stacked queries against n_tiles tiles.
template <typename Rows>
void ScoreAll(const typename Rows::T* keys, size_t n_tiles, size_t tile_stride, size_t channel_stride, size_t dim,
              const float* queries, size_t stacked, float* scores, size_t stride, Ahead ahead) {
  // A few tiles at a time, so that they are still in the nearest cache for the next queries.
  constexpr size_t kRun = 4;
  for (size_t t = 0; t < n_tiles; t += kRun) {
    const size_t n = Min(kRun, n_tiles - t);
    for (size_t m = 0; m < stacked; m += kScoreQueries) {
      const auto* k = keys + t * tile_stride;
      const float* q = queries + m;
      float* s = scores + m * stride + t * kTileRows;
      WithCount<kScoreQueries>(stacked - m, [&](auto count) {
        ScoreTileRun<Rows, count.value>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride, ahead);
      });
    }
  }
}

// Calls whole(tiles, n_tiles, first row, what to fetch ahead) and part(tile, first lane, n, first row) over the tiles
// of rows [begin, end).
template <typename Whole, typename Part>
inline void ForEachKeyTile(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, Whole whole,
                           Part part) {
  ForEachPiece(view.keys, begin, end, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    const size_t tile_bytes = TileBytes(span.format.type, span.format.head_dim);
    const Ahead ahead = AfterSpan(view, s, span, slot, n, row + n);
    while (n > 0) {
      const std::byte* tile = span.rows + slot / kTileRows * tile_bytes;
      const size_t lane = slot % kTileRows;
      size_t count = n / kTileRows * kTileRows;
      if (lane == 0 && count > 0) {
        whole(tile, count / kTileRows, row, ahead);
      } else {
        count = Min(n, kTileRows - lane);
        part(tile, lane, count, row);
      }
      slot += count;
      row += count;
      n -= count;
    }
  });
}

// The scores of lanes [lane, lane + n) of the tile in s.edge, to place `at`.
void CopyEdge(const DecodeScratch& s, size_t lane, size_t n, size_t at, size_t stacked) {
  for (size_t m = 0; m < stacked; ++m) {
    for (size_t i = 0; i < n; ++i) s.scores[m * kSplitStride + at + i] = s.edge[m * kTileRows + lane + i];
  }
}

// The channels of a run of keys: how many, and of the scaled queries [dim, stacked].
struct RunChannels {
  size_t dim;
  const float* queries;
};
RunChannels ChannelsOf(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t stacked) {
  if (!run.channels) return {view.head_dim, s.queries};
  for (size_t c = 0; c < run.format.head_dim; ++c) {
    for (size_t m = 0; m < stacked; ++m) s.some[c * stacked + m] = s.queries[run.channels[c] * stacked + m];
  }
  return {run.format.head_dim, s.some};
}

template <typename Rows>
void ScoresInPlace(const AttentionView& view, const DecodeScratch& s, const RunChannels& channels, size_t begin,
                   size_t end, size_t stacked) {
  using T = typename Rows::T;
  const size_t dim = channels.dim, tile = kTileRows * dim;
  ForEachKeyTile(
      view, s, begin, end,
      [&](const std::byte* keys, size_t n_tiles, size_t row, Ahead ahead) {
        ScoreAll<Rows>(reinterpret_cast<const T*>(keys), n_tiles, tile, kTileRows, dim, channels.queries, stacked,
                       s.scores + (row - s.begin), kSplitStride, ahead);
      },
      [&](const std::byte* keys, size_t lane, size_t n, size_t row) {
        ScoreAll<Rows>(reinterpret_cast<const T*>(keys), 1, tile, kTileRows, dim, channels.queries, stacked, s.edge,
                       kTileRows, kNothingAhead);
        CopyEdge(s, lane, n, row - s.begin, stacked);
      });
}

// Writes up to 15 scores of nothing behind those of the last row.
void ScoresExpanded(const AttentionView& view, const DecodeScratch& s, const RunChannels& channels, size_t begin,
                    size_t end, size_t stacked) {
  for (size_t b = begin; b < end; b += kBlockRows) {
    const size_t n = Min(kBlockRows, end - b);
    if (channels.queries == s.queries)
      ExpandKeys(view, s.rows, b, b + n);
    else
      ExpandNarrowKeys(view, s.rows, b, b + n);
    ScoreAll<ExpandedRows>(s.rows.keys, Padded(n) / kTileRows, kTileRows, kKeyStride, channels.dim, channels.queries,
                           stacked, s.scores + (b - s.begin), kSplitStride, kNothingAhead);
  }
}

// Over quantised rows [begin, end) of one layout where they lie; false when this instruction set has none such.
bool FusedScores(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
                 size_t stacked);
bool FusedValues(const AttentionView& view, const DecodeScratch& s, RowType type, size_t begin, size_t end,
                 size_t stacked);

// Calls f(slot, n, first row) for pieces of at most RowReader::kMostScored of the rows [begin, end) of one reader, until it says
// false; whether it never did.
template <typename F>
inline bool ForEachReaderPiece(const SideView& side, size_t begin, size_t end, F f) {
  bool offered = true;
  ForEachPiece(side, begin, end, [&](const RowSpan&, size_t slot, size_t n, size_t row) {
    for (size_t i = 0; i < n && offered; i += RowReader::kMostScored)
      offered = f(slot + i, Min(RowReader::kMostScored, n - i), row + i);
  });
  return offered;
}

void ReaderScores(const AttentionView& view, const DecodeScratch& s, const RowReader& reader, size_t begin, size_t end,
                  size_t stacked) {
  const bool scored = ForEachReaderPiece(view.keys, begin, end, [&](size_t slot, size_t n, size_t row) {
    return reader.Scores(slot, n, s.queries, stacked, s.scores + (row - s.begin), kSplitStride);
  });
  if (!scored) ScoresExpanded(view, s, {view.head_dim, s.queries}, begin, end, stacked);
}

// Rows [begin, end) of one layout, to be called in the order of the rows: see ScoresExpanded.
void RunScores(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
               size_t stacked) {
  if (run.reader) return ReaderScores(view, s, *run.reader, begin, end, stacked);
  const RunChannels channels = ChannelsOf(view, s, run, stacked);
  switch (run.format.type) {
    case RowType::kF32:
      return ScoresInPlace<F32Rows>(view, s, channels, begin, end, stacked);
    case RowType::kF16:
      return ScoresInPlace<F16Rows>(view, s, channels, begin, end, stacked);
    case RowType::kBF16:
      return ScoresInPlace<BF16Rows>(view, s, channels, begin, end, stacked);
    default:
      if (!FusedScores(view, s, run, begin, end, stacked)) ScoresExpanded(view, s, channels, begin, end, stacked);
  }
}

void SplitScores(const AttentionView& view, const DecodeScratch& s, size_t stacked) {
  if (view.angles) return ScoresExpanded(view, s, {view.head_dim, s.queries}, s.begin, s.end, stacked);
  ForEachRun(view.keys, s.begin, s.end,
             [&](const RowSpan& run, size_t begin, size_t end) { RunScores(view, s, run, begin, end, stacked); });
}

// ---- Decode: values

// out[m, NV vectors] += sum over rows, in order, of p[m, row] * values[row].
template <typename Rows, int MB, int NV>
inline void AddRows(const typename Rows::T* values, size_t row_stride, size_t n, const float* p, size_t p_stride,
                    float* out, size_t out_stride, Ahead ahead) {
  V sum[MB][NV];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) sum[m][v] = Load(out + m * out_stride + v * kW);
  }
  for (size_t i = 0; i < n; ++i) {
    if constexpr (Rows::kStreams) FetchAhead<NV * kW * sizeof(typename Rows::T)>(values + i * row_stride, ahead);
    V value[NV];
    for (int v = 0; v < NV; ++v) value[v] = Rows::Load1(values + i * row_stride + v * kW);
    for (int m = 0; m < MB; ++m) {
      const V weight = Splat(p[m * p_stride + i]);
      for (int v = 0; v < NV; ++v) sum[m][v] = Fma(weight, value[v], sum[m][v]);
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) Store(out + m * out_stride + v * kW, sum[m][v]);
  }
}

constexpr size_t kAddQueries = 4;
constexpr size_t kAddVectors = kW == 16 ? 4 : 2;

template <typename Rows, int MB>
inline void AddRowsOfQueries(const typename Rows::T* values, size_t dim, size_t row_stride, size_t n, const float* p,
                             size_t p_stride, float* out, size_t out_stride, Ahead ahead) {
  for (size_t c = 0; c < dim; c += kAddVectors * kW) {
    WithCount<kAddVectors>((dim - c + kW - 1) / kW, [&](auto count) {
      AddRows<Rows, MB, count.value>(values + c, row_stride, n, p, p_stride, out + c, out_stride, ahead);
    });
  }
}

template <typename Rows>
void AddAll(const typename Rows::T* values, size_t dim, size_t row_stride, size_t n, const float* p, size_t p_stride,
            size_t stacked, float* out, Ahead ahead) {
  constexpr size_t kRun = 32;  // rows that stay in the nearest cache while all queries and channels use them
  const size_t out_stride = Padded(dim);
  for (size_t i = 0; i < n; i += kRun) {
    const size_t run = Min(kRun, n - i);
    const auto* v = values + i * row_stride;
    for (size_t m = 0; m < stacked; m += kAddQueries) {
      const float* w = p + m * p_stride + i;
      float* o = out + m * out_stride;
      WithCount<kAddQueries>(stacked - m, [&](auto count) {
        AddRowsOfQueries<Rows, count.value>(v, dim, row_stride, run, w, p_stride, o, out_stride, ahead);
      });
    }
  }
}

template <typename Rows>
void ValuesInPlace(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  const size_t dim = view.head_dim;
  ForEachPiece(view.values, begin, end, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    const auto* values = reinterpret_cast<const typename Rows::T*>(span.rows) + slot * dim;
    AddAll<Rows>(values, dim, dim, n, s.scores + (row - s.begin), kSplitStride, stacked, s.out,
                 AfterSpan(view, s, span, slot, n, row + n));
  });
}

void ValuesExpanded(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  for (size_t b = begin; b < end; b += kBlockRows) {
    const size_t n = Min(kBlockRows, end - b);
    ExpandValues(view, b, b + n, s.rows.values);
    AddAll<ExpandedRows>(s.rows.values, view.head_dim, Padded(view.head_dim), n, s.scores + (b - s.begin), kSplitStride,
                         stacked, s.out, kNothingAhead);
  }
}

void ReaderValues(const AttentionView& view, const DecodeScratch& s, const RowReader& reader, size_t begin, size_t end,
                  size_t stacked) {
  const bool added = ForEachReaderPiece(view.values, begin, end, [&](size_t slot, size_t n, size_t row) {
    return reader.AddValues(slot, n, s.scores + (row - s.begin), kSplitStride, stacked, s.out, Padded(view.head_dim));
  });
  if (!added) ValuesExpanded(view, s, begin, end, stacked);
}

// Rows [begin, end) of one layout.
void RunValues(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
               size_t stacked) {
  if (run.reader) return ReaderValues(view, s, *run.reader, begin, end, stacked);
  switch (run.format.type) {
    case RowType::kF32:
      return ValuesInPlace<F32Rows>(view, s, begin, end, stacked);
    case RowType::kF16:
      return ValuesInPlace<F16Rows>(view, s, begin, end, stacked);
    case RowType::kBF16:
      return ValuesInPlace<BF16Rows>(view, s, begin, end, stacked);
    default:
      if (!FusedValues(view, s, run.format.type, begin, end, stacked)) ValuesExpanded(view, s, begin, end, stacked);
  }
}

void SplitValues(const AttentionView& view, const DecodeScratch& s, size_t stacked) {
  ForEachRun(view.values, s.begin, s.end,
             [&](const RowSpan& run, size_t begin, size_t end) { RunValues(view, s, run, begin, end, stacked); });
}

// scores = exp(scores - largest) over the visible ones and 0 up to n, or the vectors that hold them; returns the sum.
float ExpAndSum(float* scores, size_t visible, size_t n, float largest) {
  const V shift = Splat(largest == -kInfinity ? 0 : largest);
  V sum = Zero();
  for (size_t i = 0; i < Padded(visible); i += kW) {
    const V p = Exp(Sub(Load(scores + i), shift));
    Store(scores + i, p);
    sum = Add(sum, p);
  }
  for (size_t i = Padded(visible); i < Padded(n); ++i) scores[i] = 0;
  return ReduceAdd(sum);
}

// The first values, while the softmax is computed. The keys have fetched kAhead bytes of them; quantised ones are fetched
// a chunk ahead, but the first.
void FetchFirstValues(const AttentionView& view, const DecodeScratch& s) {
  ForEachPiece(view.values, s.begin, s.begin + 1, [&](const RowSpan& span, size_t, size_t, size_t) {
    if (!span.reader && IsQuantised(span.format.type))
      FetchFirst(view.values, s.begin, Min(s.end, s.begin + kWeightRows), SIZE_MAX);
  });
}

// Whether any query sees a row of the split.
bool SplitSeen(const AttentionView& view, const DecodeScratch& s) {
  bool seen = false;
  for (size_t b = s.begin; b < s.end; b += kBlockRows) seen = seen || WindowReaches(view, 0, b);
  return seen;
}

// The partial result of a split that no query sees.
void DecodeNothing(const AttentionView& view, const DecodeScratch& s, float* partial) {
  for (size_t m = 0; m < view.n_queries * view.group; ++m) {
    float* header = partial + m * (kPartialHeader + Padded(view.head_dim));
    header[0] = -kInfinity;
    header[1] = 0;
    if (view.received) Fill(view.probabilities + m * view.probability_stride + s.begin, Padded(s.end - s.begin), 0);
  }
}

void Decode(const AttentionView& view, size_t split, float* scratch, float* partial) {
  const DecodeScratch s = CarveDecode(view, split, scratch);
  const size_t dim = view.head_dim, stacked = view.n_queries * view.group, n = s.end - s.begin;
  if (!SplitSeen(view, s)) return DecodeNothing(view, s, partial);
  FetchFirst(view.keys, s.begin, s.end, kAhead);
  for (size_t m = 0; m < stacked; ++m) {
    const float* q = view.q + m / view.group * view.q_stride + m % view.group * dim;
    for (size_t c = 0; c < dim; ++c) s.queries[c * stacked + m] = q[c] * view.scale;
  }
  SplitScores(view, s, stacked);
  FetchFirstValues(view, s);
  const size_t partial_stride = kPartialHeader + Padded(dim);
  for (size_t m = 0; m < stacked; ++m) {
    float* scores = s.scores + m * kSplitStride;
    const size_t seen = VisibleRows(view, m / view.group), visible = seen > s.begin ? Min(n, seen - s.begin) : 0;
    float* header = partial + m * partial_stride;
    if (view.bias) AddBias(view.bias + s.begin, visible, scores);
    HideOld(view, m / view.group, s.begin, visible, scores);
    header[0] = MaxScore(scores, visible);
    header[1] = ExpAndSum(scores, visible, n, header[0]);
    if (view.received) Copy(view.probabilities + m * view.probability_stride + s.begin, scores, Padded(n));
  }
  Fill(s.out, stacked * Padded(dim), 0);
  SplitValues(view, s, stacked);
  for (size_t m = 0; m < stacked; ++m) {
    float* to = partial + m * partial_stride + kPartialHeader;
    for (size_t c = 0; c < dim; c += kW) Store(to + c, Load(s.out + m * Padded(dim) + c));
  }
}

// received[r] = sum over heads [first, last) of probability times its split's factor, which MergeSplits has left in the
// header.
void SumReceived(const AttentionView& view, const float* partials, size_t n_splits, size_t first, size_t last,
                 float* received) {
  const size_t stride = kPartialHeader + Padded(view.head_dim), split_stride = PartialFloats(view);
  for (size_t split = 0; split < n_splits; ++split) {
    const size_t begin = split * kSplitRows, end = Min(view.n_rows, begin + kSplitRows);
    const float* factors = partials + split * split_stride + 2;
    for (size_t r = begin; r < end; r += kW) {
      V sum = Zero();
      for (size_t g = first; g < last; ++g)
        sum = Fma(Splat(factors[g * stride]), Load(view.probabilities + g * view.probability_stride + r), sum);
      if (r + kW <= end) {
        Store(received + r, sum);
        continue;
      }
      alignas(64) float rest[kW];
      Store(rest, sum);
      for (size_t i = r; i < end; ++i) received[i] = rest[i - r];
    }
  }
}

void GiveReceived(const AttentionView& view, const float* partials, size_t n_splits) {
  if (!view.received_by_head) return SumReceived(view, partials, n_splits, 0, view.group, view.received);
  for (size_t g = 0; g < view.group; ++g)
    SumReceived(view, partials, n_splits, g, g + 1, view.received + g * view.n_rows);
}

void MergeSplits(const AttentionView& view, float* partials, size_t n_splits) {
  const size_t dim = view.head_dim, stride = kPartialHeader + Padded(dim);
  const size_t split_stride = PartialFloats(view);
  for (size_t m = 0; m < view.n_queries * view.group; ++m) {
    float* first = partials + m * stride;
    float* out = view.out + m / view.group * view.out_stride + m % view.group * dim;
    float largest = -kInfinity, sum = 0;
    for (size_t i = 0; i < n_splits; ++i) {
      const float x = first[i * split_stride];
      largest = x > largest ? x : largest;
    }
    Fill(out, dim, 0);
    for (size_t i = 0; i < n_splits; ++i) {
      float* from = first + i * split_stride;
      from[2] = 0;
      if (from[1] == 0) continue;  // nothing visible
      const float weight = from[2] = __builtin_expf(from[0] - largest);
      sum += weight * from[1];
      for (size_t c = 0; c < dim; ++c) out[c] += weight * from[kPartialHeader + c];
    }
    if (sum != 0) {
      for (size_t c = 0; c < dim; ++c) out[c] /= sum;
    }
    view.lse[m] = sum != 0 ? largest + __builtin_logf(sum) : -kInfinity;
    for (size_t i = 0; view.received && sum != 0 && i < n_splits; ++i) first[i * split_stride + 2] /= sum;
  }
  if (view.received) GiveReceived(view, partials, n_splits);
}
