// The attention kernels, written once over a vector type. Included by attention_scalar.cpp, attention_avx2.cpp and
// attention_avx512.cpp, inside their own anonymous namespace and after they have defined
//   V, kW (lanes: 1, 8 or 16)   Zero Splat Load Store LoadF16 LoadBF16   Fma(a, b, c) = a b + c   Mul Add Sub VMax VMin
//   Round (to nearest)  TimesPow2(y, whole number)  ZeroBelow(x, limit, y) = x < limit ? 0 : y
//   ReduceMax ReduceAdd   HalfToFloat(uint16_t)
//   Field(bytes, shift, mask): (32-bit lanes >> shift) & mask   SignedCodes(bytes): signed bytes
//   LowCodes, HighCodes(bytes): (byte & 15) - 8, (byte >> 4) - 8
// and, after it, FusedScores and FusedValues: decode over quantised rows where they lie, or false when there is none.
// Every arithmetic result belongs to one (query, row) or one (query, channel), and goes through the same operations in
// the same order wherever the row lies; sums over rows go in the order of the rows. That is what makes the results
// independent of how the rows are cut into spans.
//
// No standard library here, and nothing with external linkage: see attention_isa.h.

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.4028234663852886e38f;
constexpr size_t kKeyStride = kBlockRows + 16;     // of expanded keys; not a power of two, for the cache's sake
constexpr size_t kBlockStride = kBlockRows + 16;   // of the scores of a block
constexpr size_t kSplitStride = kSplitRows + 16;   // of the scores of a split
constexpr size_t kTileVectors = kTileRows / kW;    // vectors a key tile and channel

constexpr size_t Min(size_t a, size_t b) { return a < b ? a : b; }
constexpr size_t Max(size_t a, size_t b) { return a > b ? a : b; }
constexpr size_t Up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr size_t Padded(size_t n) { return Up(n, 16); }

// Element types. kStreams: the rows come from memory, so lines are fetched ahead.
struct F32Rows {
  using T = float;
  static constexpr bool kStreams = kW > 1;
  static V Load1(const T* p) { return Load(p); }
};
struct ExpandedRows {
  using T = float;
  static constexpr bool kStreams = false;
  static V Load1(const T* p) { return Load(p); }
};
struct F16Rows {
  using T = uint16_t;
  static constexpr bool kStreams = kW > 1;
  static V Load1(const T* p) { return LoadF16(p); }
};
struct BF16Rows {
  using T = uint16_t;
  static constexpr bool kStreams = kW > 1;
  static V Load1(const T* p) { return LoadBF16(p); }
};

// How far ahead of their use lines are fetched, in bytes. On Zen 5 anything from 2 to 32 KiB lifts decode over f16 rows
// from 60 % of a plain read's speed to 95 %.
constexpr size_t kAhead = 4096;

// Fetches the lines of [p + kAhead, p + kAhead + n).
template <size_t n>
inline void FetchAhead(const void* p) {
  for (size_t i = 0; i < n; i += 64) __builtin_prefetch(static_cast<const char*>(p) + kAhead + i);
}

// e^x within 2 units in the last place for x <= 88; 0 below the smallest normal result.
inline V Exp(V x) {
  const V n = Round(Mul(x, Splat(1.44269504f)));
  V r = Fma(n, Splat(-0.693359375f), x);
  r = Fma(n, Splat(2.12194440e-4f), r);
  V y = Splat(1.394111896e-3f);  // interpolates e^r on |r| <= ln(2)/2 to 2e-8
  y = Fma(y, r, Splat(8.375134319e-3f));
  y = Fma(y, r, Splat(4.166635126e-2f));
  y = Fma(y, r, Splat(1.666641533e-1f));
  y = Fma(y, r, Splat(0.5f));
  y = Fma(y, r, Splat(1.0f));
  y = Fma(y, r, Splat(1.0f));
  return ZeroBelow(x, Splat(-87.3f), TimesPow2(y, n));
}

inline float Exp1(float x) {
  alignas(64) float lanes[16] = {x};
  Store(lanes, Exp(Load(lanes)));
  return lanes[0];
}

// ---- Work memory and views

struct Scratch {
  float* queries;  // decode: [head_dim, stacked], times scale; prefill: [stacked, head_dim]
  float* scores;   // [stacked, kSplitStride] or [stacked, kBlockStride]
  float* edge;     // [stacked, 16]: the scores of a tile that belongs to the piece in part
  float* keys;     // [head_dim, kKeyStride]
  float* values;   // [kBlockRows, padded head_dim]
  float* tile;     // [head_dim, 16]: a key tile that belongs to the piece in part
  float* out;      // [stacked, padded head_dim]
  float* largest;  // [stacked]
  float* sum;      // [stacked]
  size_t floats;
};

constexpr size_t QueriesPerTile(size_t group) { return Max(1, kStackedQueries / group); }

Scratch Carve(const AttentionView& view, float* base) {
  const size_t dim = view.head_dim;
  const size_t queries = Min(view.n_queries, Max(kDecodeQueries, QueriesPerTile(view.group)));
  const size_t stacked = queries * view.group;
  size_t at = 0;
  auto take = [&](size_t n) {
    float* p = base + at;
    at += Padded(n);
    return p;
  };
  Scratch s;
  s.queries = take(stacked * dim);
  s.scores = take(stacked * (view.n_queries <= kDecodeQueries ? kSplitStride : kBlockStride));
  s.edge = take(stacked * 16);
  s.keys = take(dim * kKeyStride);
  s.values = take(kBlockRows * Padded(dim));
  s.tile = take(dim * kTileRows);
  s.out = take(stacked * Padded(dim));
  s.largest = take(stacked);
  s.sum = take(stacked);
  s.floats = at;
  return s;
}

size_t ScratchFloats(const AttentionView& view) { return Carve(view, nullptr).floats; }

size_t PartialFloats(const AttentionView& view) {
  return view.n_queries * view.group * (kPartialHeader + Padded(view.head_dim));
}

// Rows that query m sees: a prefix.
size_t VisibleRows(const AttentionView& view, size_t m) {
  return view.n_rows > view.n_past ? view.n_past + m + 1 : view.n_past;
}

// Calls f(span, first slot, n, first row) for the parts of rows [begin, end) that lie in one span each.
template <typename F>
inline void ForEachPiece(const AttentionView& view, size_t begin, size_t end, F f) {
  if (begin >= end) return;
  size_t low = 0, high = view.n_spans;
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (view.span_rows[middle] <= begin ? low : high) = middle;
  }
  for (size_t row = begin; row < end; ++low) {
    const size_t stop = Min(end, view.span_rows[low + 1]);
    if (stop <= row) continue;
    f(view.spans[low], view.spans[low].first_slot + row - view.span_rows[low], stop - row, row);
    row = stop;
  }
}

// ---- Expansion to float32

inline const uint16_t* TileScales(const std::byte* tile) { return reinterpret_cast<const uint16_t*>(tile); }
inline const uint8_t* TileCodes(const std::byte* tile, size_t dim) {
  return reinterpret_cast<const uint8_t*>(tile + TileScaleBytes(dim));
}

template <typename Rows>
inline void ExpandFloatKeyTile(const std::byte* tile, size_t dim, float* out, size_t stride) {
  const auto* keys = reinterpret_cast<const typename Rows::T*>(tile);
  for (size_t c = 0; c < dim; ++c) {
    for (size_t v = 0; v < kTileVectors; ++v) {
      Store(out + c * stride + v * kW, Rows::Load1(keys + c * kTileRows + v * kW));
    }
  }
}

inline void ExpandQuantKeyTile(const RowFormat& format, const std::byte* tile, float* out, size_t stride) {
  const size_t dim = format.head_dim;
  const bool q8 = format.type == RowType::kQ8;
  const uint8_t* codes = TileCodes(tile, dim);
  for (size_t v = 0; v < kTileRows; v += kW) {
    for (size_t c = 0; c < dim; ++c) {
      const size_t in_block = c % kQuantBlock;
      const uint8_t* four = q8 ? codes + Q8KeyCode(c / 4 * 4, v) : codes + Q4KeyByte(c / 32 * 32 + c % 16 / 4 * 4, v);
      const int shift = static_cast<int>(c % 4 * 8 + (!q8 && in_block >= 16 ? 4 : 0));
      const V code = Sub(Field(four, shift, q8 ? 255 : 15), Splat(q8 ? 128 : 8));
      Store(out + c * stride + v, Mul(code, LoadF16(TileScales(tile) + c / kQuantBlock * kTileRows + v)));
    }
  }
}

// A whole tile to [head_dim, 16], channels `stride` apart.
void ExpandKeyTile(const RowFormat& format, const std::byte* tile, float* out, size_t stride) {
  switch (format.type) {
    case RowType::kF32: return ExpandFloatKeyTile<F32Rows>(tile, format.head_dim, out, stride);
    case RowType::kF16: return ExpandFloatKeyTile<F16Rows>(tile, format.head_dim, out, stride);
    case RowType::kBF16: return ExpandFloatKeyTile<BF16Rows>(tile, format.head_dim, out, stride);
    default: return ExpandQuantKeyTile(format, tile, out, stride);
  }
}

// Rows [begin, end) of the keys as stored to [head_dim, end - begin], channels kKeyStride apart. `edge` takes one tile.
void ExpandStoredKeys(const AttentionView& view, size_t begin, size_t end, float* edge, float* out) {
  const RowFormat& format = view.key_format;
  const size_t tile_bytes = TileBytes(format.type, format.head_dim);
  ForEachPiece(view, begin, end, [&](const KvSpan& span, size_t slot, size_t n, size_t row) {
    float* to = out + (row - begin);
    while (n > 0) {
      const size_t lane = slot % kTileRows;
      const size_t count = Min(n, kTileRows - lane);
      const std::byte* tile = span.keys + slot / kTileRows * tile_bytes;
      if (count == kTileRows) {
        ExpandKeyTile(format, tile, to, kKeyStride);
      } else {
        ExpandKeyTile(format, tile, edge, kTileRows);
        for (size_t c = 0; c < format.head_dim; ++c) {
          for (size_t i = 0; i < count; ++i) to[c * kKeyStride + i] = edge[c * kTileRows + lane + i];
        }
      }
      to += count;
      slot += count;
      n -= count;
    }
  });
}

// Rotates n expanded keys, the first of which is row `begin`, a multiple of the tile.
void RotateKeys(const AttentionView& view, size_t begin, size_t n, float* keys) {
  const size_t pairs = view.rotary_pairs;
  const size_t step = view.interleaved ? 2 : 1, apart = view.interleaved ? 1 : pairs;
  for (size_t i = 0; i < n; i += kTileRows) {
    const float* cosines = view.angles + (begin + i) / kTileRows * pairs * 2 * kTileRows;
    const float* sines = cosines + pairs * kTileRows;
    for (size_t pair = 0; pair < pairs; ++pair) {
      float* first = keys + pair * step * kKeyStride + i;
      float* second = first + apart * kKeyStride;
      for (size_t v = 0; v < kTileRows; v += kW) {
        const V x = Load(first + v), y = Load(second + v);
        const V cosine = Load(cosines + pair * kTileRows + v), sine = Load(sines + pair * kTileRows + v);
        Store(first + v, Sub(Mul(x, cosine), Mul(y, sine)));
        Store(second + v, Add(Mul(x, sine), Mul(y, cosine)));
      }
    }
  }
}

// Rows [begin, end) of the keys, rotated, to s.keys.
void ExpandKeys(const AttentionView& view, const Scratch& s, size_t begin, size_t end) {
  ExpandStoredKeys(view, begin, end, s.tile, s.keys);
  if (view.angles) RotateKeys(view, begin, end - begin, s.keys);
}

template <typename Rows>
inline void ExpandFloatValues(const std::byte* region, size_t slot, size_t n, size_t dim, float* out) {
  const auto* values = reinterpret_cast<const typename Rows::T*>(region) + slot * dim;
  for (size_t i = 0; i < n; ++i) {
    for (size_t c = 0; c < dim; c += kW) Store(out + i * Padded(dim) + c, Rows::Load1(values + i * dim + c));
  }
}

inline void ExpandQuantValues(const RowFormat& format, const std::byte* region, size_t slot, size_t n, float* out) {
  const size_t dim = format.head_dim;
  for (size_t i = 0; i < n; ++i, ++slot, out += Padded(dim)) {
    const std::byte* tile = region + slot / kTileRows * TileBytes(format.type, dim);
    const size_t lane = slot % kTileRows;
    for (size_t block = 0; block < dim / kQuantBlock; ++block) {
      const V scale = Splat(HalfToFloat(TileScales(tile)[block * kTileRows + lane]));
      float* to = out + block * kQuantBlock;
      if (format.type == RowType::kQ8) {
        const uint8_t* codes = TileCodes(tile, dim) + lane * dim + block * kQuantBlock;
        for (size_t c = 0; c < kQuantBlock; c += kW) Store(to + c, Mul(scale, SignedCodes(codes + c)));
      } else {
        const uint8_t* codes = TileCodes(tile, dim) + lane * dim / 2 + block * 16;
        for (size_t c = 0; c < 16; c += kW) {
          Store(to + c, Mul(scale, LowCodes(codes + c)));
          Store(to + 16 + c, Mul(scale, HighCodes(codes + c)));
        }
      }
    }
  }
}

void ExpandValueRows(const RowFormat& format, const std::byte* region, size_t slot, size_t n, float* out) {
  switch (format.type) {
    case RowType::kF32: return ExpandFloatValues<F32Rows>(region, slot, n, format.head_dim, out);
    case RowType::kF16: return ExpandFloatValues<F16Rows>(region, slot, n, format.head_dim, out);
    case RowType::kBF16: return ExpandFloatValues<BF16Rows>(region, slot, n, format.head_dim, out);
    default: return ExpandQuantValues(format, region, slot, n, out);
  }
}

// Rows [begin, end) of the values to [end - begin, padded head_dim]; the padding holds anything.
void ExpandValues(const AttentionView& view, size_t begin, size_t end, float* out) {
  const size_t stride = Padded(view.head_dim);
  ForEachPiece(view, begin, end, [&](const KvSpan& span, size_t slot, size_t n, size_t row) {
    ExpandValueRows(view.value_format, span.values, slot, n, out + (row - begin) * stride);
  });
}

// ---- Softmax of a row of scores

// Hides scores[visible, n) and returns the largest; n is rounded up to whole vectors, which the buffer must have. An
// overflowed score counts as the largest float, so that it wins instead of giving NaN.
float MaskAndMax(float* scores, size_t visible, size_t n) {
  n = Padded(n);
  for (size_t i = visible; i < n; ++i) scores[i] = -kInfinity;
  V largest = Splat(-kInfinity);
  for (size_t i = 0; i < n; i += kW) {
    const V x = VMin(Load(scores + i), Splat(kLargest));
    Store(scores + i, x);
    largest = VMax(largest, x);
  }
  return ReduceMax(largest);
}

// scores = exp(scores - largest), 0 when nothing is visible; returns their sum.
float ExpAndSum(float* scores, size_t n, float largest) {
  const V shift = Splat(largest == -kInfinity ? 0 : largest);
  V sum = Zero();
  for (size_t i = 0; i < Padded(n); i += kW) {
    const V p = Exp(Sub(Load(scores + i), shift));
    Store(scores + i, p);
    sum = Add(sum, p);
  }
  return ReduceAdd(sum);
}

// ---- Decode: scores of key tiles where they lie

// scores[m, row] for MB queries and NT tiles. Channels of a tile are channel_stride elements apart, tiles tile_stride;
// queries are [head_dim, stacked].
template <typename Rows, int MB, int NT>
inline void ScoreTiles(const typename Rows::T* keys, size_t tile_stride, size_t channel_stride, size_t dim,
                       const float* queries, size_t stacked, float* scores, size_t stride) {
  constexpr int kVectors = NT * static_cast<int>(kTileVectors);
  V sum[MB][kVectors];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Zero();
  }
  for (size_t c = 0; c < dim; ++c) {
    // NT tiles are dim such steps long.
    if constexpr (Rows::kStreams) FetchAhead<NT * kTileRows * sizeof(typename Rows::T)>(keys + c * NT * kTileRows);
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

constexpr size_t kScoreQueries = kW == 16 ? 8 : 4;                            // most queries at once
constexpr int ScoreTilesAtOnce(int mb) { return kW == 1 ? 1 : (kW == 16 ? (mb <= 4 ? 4 : 2) : (mb <= 2 ? 2 : 1)); }

template <typename Rows, int MB>
inline void ScoreTileRun(const typename Rows::T* keys, size_t n_tiles, size_t tile_stride, size_t channel_stride,
                         size_t dim, const float* queries, size_t stacked, float* scores, size_t stride) {
  constexpr int kNT = ScoreTilesAtOnce(MB);
  size_t t = 0;
  for (; t + kNT <= n_tiles; t += kNT) {
    ScoreTiles<Rows, MB, kNT>(keys + t * tile_stride, tile_stride, channel_stride, dim, queries, stacked,
                              scores + t * kTileRows, stride);
  }
  for (; t < n_tiles; ++t) {
    ScoreTiles<Rows, MB, 1>(keys + t * tile_stride, tile_stride, channel_stride, dim, queries, stacked,
                            scores + t * kTileRows, stride);
  }
}

// All stacked queries against n_tiles tiles.
template <typename Rows>
void ScoreAll(const typename Rows::T* keys, size_t n_tiles, size_t tile_stride, size_t channel_stride, size_t dim,
              const float* queries, size_t stacked, float* scores, size_t stride) {
  // A few tiles at a time, so that they are still in the nearest cache for the next queries.
  constexpr size_t kRun = 4;
  for (size_t t = 0; t < n_tiles; t += kRun) {
    const size_t n = Min(kRun, n_tiles - t);
    for (size_t m = 0; m < stacked; m += kScoreQueries) {
      const auto* k = keys + t * tile_stride;
      const float* q = queries + m;
      float* s = scores + m * stride + t * kTileRows;
      switch (Min(kScoreQueries, stacked - m)) {
        case 1: ScoreTileRun<Rows, 1>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        case 2: ScoreTileRun<Rows, 2>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        case 3: ScoreTileRun<Rows, 3>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        case 4: ScoreTileRun<Rows, 4>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        case 5: ScoreTileRun<Rows, 5>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        case 6: ScoreTileRun<Rows, 6>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        case 7: ScoreTileRun<Rows, 7>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
        default: ScoreTileRun<Rows, 8>(k, n, tile_stride, channel_stride, dim, q, stacked, s, stride); break;
      }
    }
  }
}

// Calls whole(tiles, n_tiles, first row) and part(tile, first lane, n, first row) over the tiles of rows [begin, end).
template <typename Whole, typename Part>
inline void ForEachKeyTile(const AttentionView& view, size_t begin, size_t end, Whole whole, Part part) {
  const size_t tile_bytes = TileBytes(view.key_format.type, view.head_dim);
  ForEachPiece(view, begin, end, [&](const KvSpan& span, size_t slot, size_t n, size_t row) {
    while (n > 0) {
      const std::byte* tile = span.keys + slot / kTileRows * tile_bytes;
      const size_t lane = slot % kTileRows;
      size_t count = n / kTileRows * kTileRows;
      if (lane == 0 && count > 0) {
        whole(tile, count / kTileRows, row);
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
void CopyEdge(const Scratch& s, size_t lane, size_t n, size_t at, size_t stacked) {
  for (size_t m = 0; m < stacked; ++m) {
    for (size_t i = 0; i < n; ++i) s.scores[m * kSplitStride + at + i] = s.edge[m * kTileRows + lane + i];
  }
}

template <typename Rows>
void ScoresInPlace(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked) {
  using T = typename Rows::T;
  const size_t dim = view.head_dim, tile = kTileRows * dim;
  ForEachKeyTile(
      view, begin, end,
      [&](const std::byte* keys, size_t n_tiles, size_t row) {
        ScoreAll<Rows>(reinterpret_cast<const T*>(keys), n_tiles, tile, kTileRows, dim, s.queries, stacked,
                       s.scores + (row - begin), kSplitStride);
      },
      [&](const std::byte* keys, size_t lane, size_t n, size_t row) {
        ScoreAll<Rows>(reinterpret_cast<const T*>(keys), 1, tile, kTileRows, dim, s.queries, stacked, s.edge, kTileRows);
        CopyEdge(s, lane, n, row - begin, stacked);
      });
}

void ScoresExpanded(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked) {
  for (size_t b = begin; b < end; b += kBlockRows) {
    const size_t n = Min(kBlockRows, end - b);
    ExpandKeys(view, s, b, b + n);
    ScoreAll<ExpandedRows>(s.keys, Padded(n) / kTileRows, kTileRows, kKeyStride, view.head_dim, s.queries, stacked,
                      s.scores + (b - begin), kSplitStride);
  }
}

bool FusedScores(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked);
bool FusedValues(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked);

void SplitScores(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked) {
  if (view.angles) return ScoresExpanded(view, s, begin, end, stacked);
  switch (view.key_format.type) {
    case RowType::kF32: return ScoresInPlace<F32Rows>(view, s, begin, end, stacked);
    case RowType::kF16: return ScoresInPlace<F16Rows>(view, s, begin, end, stacked);
    case RowType::kBF16: return ScoresInPlace<BF16Rows>(view, s, begin, end, stacked);
    default:
      if (!FusedScores(view, s, begin, end, stacked)) ScoresExpanded(view, s, begin, end, stacked);
  }
}

// ---- Decode: values

// out[m, NV vectors] += sum over rows, in order, of p[m, row] * values[row].
template <typename Rows, int MB, int NV>
inline void AddRows(const typename Rows::T* values, size_t row_stride, size_t n, const float* p, size_t p_stride,
                    float* out, size_t out_stride) {
  V sum[MB][NV];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < NV; ++v) sum[m][v] = Load(out + m * out_stride + v * kW);
  }
  for (size_t i = 0; i < n; ++i) {
    if constexpr (Rows::kStreams) FetchAhead<NV * kW * sizeof(typename Rows::T)>(values + i * row_stride);
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
                             size_t p_stride, float* out, size_t out_stride) {
  for (size_t c = 0; c < dim; c += kAddVectors * kW) {
    switch (Min(kAddVectors, (dim - c + kW - 1) / kW)) {
      case 1: AddRows<Rows, MB, 1>(values + c, row_stride, n, p, p_stride, out + c, out_stride); break;
      case 2: AddRows<Rows, MB, 2>(values + c, row_stride, n, p, p_stride, out + c, out_stride); break;
      case 3: AddRows<Rows, MB, 3>(values + c, row_stride, n, p, p_stride, out + c, out_stride); break;
      default: AddRows<Rows, MB, 4>(values + c, row_stride, n, p, p_stride, out + c, out_stride); break;
    }
  }
}

template <typename Rows>
void AddAll(const typename Rows::T* values, size_t dim, size_t row_stride, size_t n, const float* p, size_t p_stride,
            size_t stacked, float* out) {
  constexpr size_t kRun = 32;  // rows that stay in the nearest cache while all queries and channels use them
  const size_t out_stride = Padded(dim);
  for (size_t i = 0; i < n; i += kRun) {
    const size_t run = Min(kRun, n - i);
    const auto* v = values + i * row_stride;
    for (size_t m = 0; m < stacked; m += kAddQueries) {
      const float* w = p + m * p_stride + i;
      float* o = out + m * out_stride;
      switch (Min(kAddQueries, stacked - m)) {
        case 1: AddRowsOfQueries<Rows, 1>(v, dim, row_stride, run, w, p_stride, o, out_stride); break;
        case 2: AddRowsOfQueries<Rows, 2>(v, dim, row_stride, run, w, p_stride, o, out_stride); break;
        case 3: AddRowsOfQueries<Rows, 3>(v, dim, row_stride, run, w, p_stride, o, out_stride); break;
        default: AddRowsOfQueries<Rows, 4>(v, dim, row_stride, run, w, p_stride, o, out_stride); break;
      }
    }
  }
}

template <typename Rows>
void ValuesInPlace(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked) {
  const size_t dim = view.head_dim;
  ForEachPiece(view, begin, end, [&](const KvSpan& span, size_t slot, size_t n, size_t row) {
    AddAll<Rows>(reinterpret_cast<const typename Rows::T*>(span.values) + slot * dim, dim, dim, n,
                 s.scores + (row - begin), kSplitStride, stacked, s.out);
  });
}

void SplitValues(const AttentionView& view, const Scratch& s, size_t begin, size_t end, size_t stacked) {
  switch (view.value_format.type) {
    case RowType::kF32: return ValuesInPlace<F32Rows>(view, s, begin, end, stacked);
    case RowType::kF16: return ValuesInPlace<F16Rows>(view, s, begin, end, stacked);
    case RowType::kBF16: return ValuesInPlace<BF16Rows>(view, s, begin, end, stacked);
    default: break;
  }
  if (FusedValues(view, s, begin, end, stacked)) return;
  for (size_t b = begin; b < end; b += kBlockRows) {
    const size_t n = Min(kBlockRows, end - b);
    ExpandValues(view, b, b + n, s.values);
    AddAll<ExpandedRows>(s.values, view.head_dim, Padded(view.head_dim), n, s.scores + (b - begin), kSplitStride, stacked,
                    s.out);
  }
}

void Fill(float* x, size_t n, float value) {
  for (size_t i = 0; i < n; ++i) x[i] = value;
}

// Fetches the start of the split's keys or values while something else is computed.
void FetchFirst(const AttentionView& view, const RowFormat& format, size_t begin, size_t end) {
  const size_t row_bytes = TileBytes(format.type, format.head_dim) / kTileRows;
  size_t left = kAhead;
  ForEachPiece(view, begin, end, [&](const KvSpan& span, size_t slot, size_t n, size_t) {
    const std::byte* rows = (format.side == RowSide::kKeys ? span.keys : span.values) + slot * row_bytes;
    const size_t bytes = Min(left, n * row_bytes);
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(rows + i);
    left -= bytes;
  });
}

void Decode(const AttentionView& view, size_t split, float* scratch, float* partial) {
  Scratch s = Carve(view, scratch);
  const size_t dim = view.head_dim, stacked = view.n_queries * view.group;
  const size_t begin = split * kSplitRows, end = Min(view.n_rows, begin + kSplitRows), n = end - begin;
  FetchFirst(view, view.key_format, begin, end);
  for (size_t m = 0; m < stacked; ++m) {
    const float* q = view.q + m / view.group * view.q_stride + m % view.group * dim;
    for (size_t c = 0; c < dim; ++c) s.queries[c * stacked + m] = q[c] * view.scale;
  }
  SplitScores(view, s, begin, end, stacked);
  FetchFirst(view, view.value_format, begin, end);
  const size_t partial_stride = kPartialHeader + Padded(dim);
  for (size_t m = 0; m < stacked; ++m) {
    float* scores = s.scores + m * kSplitStride;
    if (view.scores) {
      for (size_t i = 0; i < n; ++i) view.scores[m * view.n_rows + begin + i] = scores[i];
    }
    const size_t seen = VisibleRows(view, m / view.group);
    float* header = partial + m * partial_stride;
    header[0] = MaskAndMax(scores, seen > begin ? Min(n, seen - begin) : 0, n);
    header[1] = ExpAndSum(scores, n, header[0]);
  }
  Fill(s.out, stacked * Padded(dim), 0);
  SplitValues(view, s, begin, end, stacked);
  for (size_t m = 0; m < stacked; ++m) {
    float* to = partial + m * partial_stride + kPartialHeader;
    for (size_t c = 0; c < dim; c += kW) Store(to + c, Load(s.out + m * Padded(dim) + c));
  }
}

void MergeSplits(const AttentionView& view, const float* partials, size_t n_splits) {
  const size_t dim = view.head_dim, stride = kPartialHeader + Padded(dim);
  const size_t split_stride = PartialFloats(view);
  for (size_t m = 0; m < view.n_queries * view.group; ++m) {
    const float* first = partials + m * stride;
    float* out = view.out + m / view.group * view.out_stride + m % view.group * dim;
    float largest = -kInfinity, sum = 0;
    for (size_t i = 0; i < n_splits; ++i) {
      const float x = first[i * split_stride];
      largest = x > largest ? x : largest;
    }
    Fill(out, dim, 0);
    for (size_t i = 0; i < n_splits; ++i) {
      const float* from = first + i * split_stride;
      if (from[0] == -kInfinity) continue;
      const float weight = Exp1(from[0] - largest);
      sum += weight * from[1];
      for (size_t c = 0; c < dim; ++c) out[c] += weight * from[kPartialHeader + c];
    }
    if (sum > 0) {
      for (size_t c = 0; c < dim; ++c) out[c] /= sum;
    }
    view.lse[m] = sum > 0 ? largest + __builtin_logf(sum) : -kInfinity;
  }
}

// ---- Prefill

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
    switch (Min(kMultiplyRows, m - i)) {
      case 1: Multiply<1, NV>(k, left, a_stride, b, b_stride, to, c_stride, add); break;
      case 2: Multiply<2, NV>(k, left, a_stride, b, b_stride, to, c_stride, add); break;
      case 3: Multiply<3, NV>(k, left, a_stride, b, b_stride, to, c_stride, add); break;
      case 4: Multiply<4, NV>(k, left, a_stride, b, b_stride, to, c_stride, add); break;
      case 5: Multiply<5, NV>(k, left, a_stride, b, b_stride, to, c_stride, add); break;
      default: Multiply<6, NV>(k, left, a_stride, b, b_stride, to, c_stride, add); break;
    }
  }
}

// c[m, n] (+)= a[m, k] b[k, n]; n is rounded up to whole vectors, which b and c must have.
void MultiplyAll(size_t m, size_t n, size_t k, const float* a, size_t a_stride, const float* b, size_t b_stride,
                 float* c, size_t c_stride, bool add) {
  for (size_t j = 0; j < n; j += kMultiplyVectors * kW) {
    switch (Min(kMultiplyVectors, (n - j + kW - 1) / kW)) {
      case 1: MultiplyPanel<1>(m, k, a, a_stride, b + j, b_stride, c + j, c_stride, add); break;
      case 2: MultiplyPanel<2>(m, k, a, a_stride, b + j, b_stride, c + j, c_stride, add); break;
      case 3: MultiplyPanel<3>(m, k, a, a_stride, b + j, b_stride, c + j, c_stride, add); break;
      default: MultiplyPanel<4>(m, k, a, a_stride, b + j, b_stride, c + j, c_stride, add); break;
    }
  }
}

void LoadQueries(const AttentionView& view, size_t first, size_t n, float* out) {
  const size_t width = view.group * view.head_dim;
  for (size_t i = 0; i < n; ++i) {
    const float* q = view.q + (first + i) * view.q_stride;
    for (size_t c = 0; c < width; ++c) out[i * width + c] = q[c] * view.scale;
  }
}

// Scores of the loaded queries and rows [begin, end), at most kBlockRows of them.
void BlockScores(const AttentionView& view, const Scratch& s, size_t stacked, size_t begin, size_t end) {
  MultiplyAll(stacked, end - begin, view.head_dim, s.queries, view.head_dim, s.keys, kKeyStride, s.scores, kBlockStride,
              false);
}

// Turns the scores of a block into weights relative to the largest score so far, and scales down what was summed up
// before (the online softmax of Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
void BlockSoftmax(const AttentionView& view, const Scratch& s, size_t first, size_t stacked, size_t begin, size_t n) {
  const size_t dim = view.head_dim;
  for (size_t m = 0; m < stacked; ++m) {
    float* scores = s.scores + m * kBlockStride;
    const size_t seen = VisibleRows(view, first + m / view.group);
    const float block = MaskAndMax(scores, seen > begin ? Min(n, seen - begin) : 0, n);
    const float largest = block > s.largest[m] ? block : s.largest[m];
    if (largest != s.largest[m] && s.largest[m] != -kInfinity) {
      const float shrink = Exp1(s.largest[m] - largest);
      s.sum[m] *= shrink;
      float* out = s.out + m * Padded(dim);
      for (size_t c = 0; c < dim; c += kW) Store(out + c, Mul(Load(out + c), Splat(shrink)));
    }
    s.largest[m] = largest;
    s.sum[m] += ExpAndSum(scores, n, largest);
  }
}

void Prefill(const AttentionView& view, size_t first, size_t n, float* scratch) {
  const Scratch s = Carve(view, scratch);
  const size_t dim = view.head_dim, stacked = n * view.group;
  LoadQueries(view, first, n, s.queries);
  Fill(s.largest, stacked, -kInfinity);
  Fill(s.sum, stacked, 0);
  Fill(s.out, stacked * Padded(dim), 0);
  const size_t end = VisibleRows(view, first + n - 1);
  for (size_t b = 0; b < end; b += kBlockRows) {
    const size_t rows = Min(kBlockRows, end - b);
    ExpandKeys(view, s, b, b + rows);
    BlockScores(view, s, stacked, b, b + rows);
    BlockSoftmax(view, s, first, stacked, b, rows);
    ExpandValues(view, b, b + rows, s.values);
    MultiplyAll(stacked, dim, rows, s.scores, kBlockStride, s.values, Padded(dim), s.out, Padded(dim), true);
  }
  for (size_t m = 0; m < stacked; ++m) {
    const size_t query = first + m / view.group, head = m % view.group;
    float* out = view.out + query * view.out_stride + head * dim;
    const float inverse = s.sum[m] > 0 ? 1 / s.sum[m] : 0;
    for (size_t c = 0; c < dim; ++c) out[c] = s.out[m * Padded(dim) + c] * inverse;
    view.lse[query * view.group + head] = s.sum[m] > 0 ? s.largest[m] + __builtin_logf(s.sum[m]) : -kInfinity;
  }
}

// ---- Column sums

// sums += weight * exp(scores - lse) over whole vectors.
inline void AddProbabilities(const float* scores, size_t n, float lse, float weight, float* sums) {
  const V shift = Splat(lse), w = Splat(weight);
  for (size_t i = 0; i < n; i += kW) {
    Store(sums + i, Fma(w, Exp(Sub(Load(scores + i), shift)), Load(sums + i)));
  }
}

void ColumnSums(const ColumnView& job, size_t block, float* scratch) {
  const AttentionView& view = job.attention;
  const Scratch s = Carve(view, scratch);
  const size_t begin = block * kBlockRows, rows = Min(kBlockRows, view.n_rows - begin);
  alignas(64) float sums[kBlockRows];
  ExpandKeys(view, s, begin, begin + rows);
  for (size_t g = 0; g < view.group; ++g) Fill(job.sums + g * view.n_rows + begin, rows, 0);
  const size_t step = QueriesPerTile(view.group);
  for (size_t first = job.first_query; first < view.n_queries; first += step) {
    const size_t n = Min(step, view.n_queries - first);
    if (VisibleRows(view, first + n - 1) <= begin) continue;
    LoadQueries(view, first, n, s.queries);
    BlockScores(view, s, n * view.group, begin, begin + rows);
    for (size_t g = 0; g < view.group; ++g) {
      float* to = job.sums + g * view.n_rows + begin;
      for (size_t i = 0; i < kBlockRows; ++i) sums[i] = i < rows ? to[i] : 0;
      for (size_t i = 0; i < n; ++i) {
        const size_t query = first + i, seen = VisibleRows(view, query);
        if (seen <= begin) continue;
        float* scores = s.scores + (i * view.group + g) * kBlockStride;
        for (size_t r = Min(rows, seen - begin); r < Padded(rows); ++r) scores[r] = -kInfinity;
        const float weight = job.weights ? job.weights[query - job.first_query] : 1;
        AddProbabilities(scores, Padded(rows), job.lse[query * view.group + g], weight, sums);
      }
      for (size_t i = 0; i < rows; ++i) to[i] = sums[i];
    }
  }
}

void ColumnSumsKept(const ColumnView& job, size_t block) {
  const AttentionView& view = job.attention;
  const size_t begin = block * kBlockRows, rows = Min(kBlockRows, view.n_rows - begin);
  const float weight = job.weights ? job.weights[0] : 1;
  alignas(64) float scores[kBlockRows], sums[kBlockRows];
  for (size_t g = 0; g < view.group; ++g) {
    Fill(scores, kBlockRows, -kInfinity);
    Fill(sums, kBlockRows, 0);
    for (size_t i = 0; i < rows; ++i) scores[i] = view.scores[g * view.n_rows + begin + i];
    AddProbabilities(scores, Padded(rows), job.lse[g], weight, sums);
    for (size_t i = 0; i < rows; ++i) job.sums[g * view.n_rows + begin + i] = sums[i];
  }
}
