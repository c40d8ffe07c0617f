// The attention kernels, written once over a vector type. Included by attention_*.cpp of each instruction set, inside
// their own anonymous namespace and after they have defined
//   V, kW (lanes)   Zero Splat Load Store LoadF16 LoadBF16   Fma(a, b, c) = a b + c   Mul Add Sub VMax VMin
//   (VMax and VMin give their second argument when one is NaN)   Round (to nearest)
//   TimesPow2(y, n): y 2^n for whole n <= 127, 0 for n < -150   ReduceMax ReduceAdd   HalfToFloat(uint16_t)
//   Field(bytes, shift, mask): (32-bit lanes >> shift) & mask
// attention_decode.h and attention_prefill.h follow it there.
//
// Every arithmetic result belongs to one (query, row) or one (query, channel), and goes through the same operations in
// the same order wherever the row lies; sums over rows go in the order of the rows. That is what makes the results
// independent of how the rows are cut into spans.
//
// No standard library here, and nothing with external linkage: see attention_isa.h.
#pragma once

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLargest = 3.4028234663852886e38f;
constexpr size_t kKeyStride = kBlockRows + 16;   // of expanded keys; not a power of two, for the cache's sake
constexpr size_t kTileVectors = kTileRows / kW;  // vectors a key tile and channel

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

// Where to fetch from when what is kAhead further on lies behind the end of the rows in use: `jump` bytes further
// still.
struct Ahead {
  const char* end;
  ptrdiff_t jump;
};
constexpr Ahead kNothingAhead = {nullptr, 0};

// Fetches the n bytes that are used kAhead after those at p.
template <size_t n>
inline void FetchAhead(const void* p, Ahead ahead) {
  for (size_t i = 0; i < n; i += 64) {
    const char* line = static_cast<const char*>(p) + kAhead + i;
    // Into the second-level cache: 4 to 10 % faster on Sapphire Rapids than into the first.
    __builtin_prefetch(line + (line >= ahead.end ? ahead.jump : 0), 0, 2);
  }
}

// e^x within 2 units in the last place for x <= 0; 0 when that underflows. NaN stays NaN.
inline V Exp(V x) {
  x = VMin(Splat(0), VMax(Splat(-110), x));
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
  return TimesPow2(y, n);
}

// 2^x for x <= 126, likewise.
inline V Exp2(V x) {
  x = VMax(Splat(-160), x);
  const V n = Round(x), r = Sub(x, n);
  V y = Splat(1.546144631e-4f);  // interpolates 2^r on |r| <= 1/2 to 2e-8
  y = Fma(y, r, Splat(1.340043033e-3f));
  y = Fma(y, r, Splat(9.618056938e-3f));
  y = Fma(y, r, Splat(5.550327152e-2f));
  y = Fma(y, r, Splat(2.402265072e-1f));
  y = Fma(y, r, Splat(6.931471825e-1f));
  y = Fma(y, r, Splat(1.0f));
  return TimesPow2(y, n);
}

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// ---- Work memory and views

// Floats handed out one after the other; with no base it only counts them.
struct Arena {
  float* base;
  size_t used;
  float* Take(size_t n) {
    float* p = base == nullptr ? nullptr : base + used;
    used += Padded(n);
    return p;
  }
};

// Where rows are expanded to.
struct Expansion {
  float* keys;    // [head_dim, kKeyStride]
  float* values;  // [kBlockRows, padded head_dim]
  float* tile;    // [head_dim, 16]: a key tile that belongs to the piece in part
};

Expansion TakeExpansion(const AttentionView& view, Arena& arena) {
  Expansion e;
  e.keys = arena.Take(view.head_dim * kKeyStride);
  e.values = arena.Take(kBlockRows * Padded(view.head_dim));
  e.tile = arena.Take(view.head_dim * kTileRows);
  return e;
}

void Fill(float* x, size_t n, float value) {
  for (size_t i = 0; i < n; ++i) x[i] = value;
}

// Whole vectors.
void Copy(float* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; i += kW) Store(to + i, Load(from + i));
}

// Rows that query m may see: a prefix, of which a window hides some.
size_t VisibleRows(const AttentionView& view, size_t m) {
  return view.n_rows > view.n_past ? view.n_past + m + 1 : view.n_past;
}

// The last position that lies too far back for query m; -1: none does.
inline int32_t HiddenPosition(const AttentionView& view, size_t m) {
  const size_t position = static_cast<size_t>(view.first_position) + m;
  return position < view.window ? -1 : static_cast<int32_t>(position - view.window);
}

// Whether the window of query m, or of one after it, reaches rows of the block that begins with row `begin`.
inline bool WindowReaches(const AttentionView& view, size_t m, size_t begin) {
  return view.window == 0 || view.latest[begin / kBlockRows] > HiddenPosition(view, m);
}

// scores += bias. An overflowed score counts as the largest float, so that a bias of -infinity hides it too.
void AddBias(const float* bias, size_t n, float* scores) {
  for (size_t i = 0; i < n; ++i) scores[i] = (scores[i] > kLargest ? kLargest : scores[i]) + bias[i];
}

// Scores of those of rows [begin, begin + n) that lie too far back for query m become -infinity.
void HideOld(const AttentionView& view, size_t m, size_t begin, size_t n, float* scores) {
  if (view.window == 0) return;
  const int32_t hidden = HiddenPosition(view, m);
  const size_t end = begin + n, past = Min(end, view.n_past);
  for (size_t r = begin; r < past; ++r)
    scores[r - begin] = view.past_positions[r] > hidden ? scores[r - begin] : -kInfinity;
  // Of the step's own rows the first m + 1 - window.
  const size_t old = view.n_past + (m < view.window ? 0 : m + 1 - view.window);
  for (size_t r = Max(begin, view.n_past); r < Min(end, old); ++r) scores[r - begin] = -kInfinity;
}

// Calls f(span, first slot, n, first row) for the parts of rows [begin, end) that lie in one span each.
template <typename F>
inline void ForEachPiece(const SideView& side, size_t begin, size_t end, F f) {
  if (begin >= end) return;
  size_t low = 0, high = side.n_spans;
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (side.span_rows[middle] <= begin ? low : high) = middle;
  }
  for (size_t row = begin; row < end; ++low) {
    const size_t stop = Min(end, side.span_rows[low + 1]);
    if (stop <= row) continue;
    f(side.spans[low], side.spans[low].first_slot + row - side.span_rows[low], stop - row, row);
    row = stop;
  }
}

inline bool SameLayout(const RowSpan& a, const RowSpan& b) {
  return a.reader == b.reader && (a.reader || (a.format.type == b.format.type && a.channels == b.channels));
}

// Calls f(a span of that layout, first row, last row + 1) for the longest runs of rows of one layout in [begin, end), in
// order. Where runs begin depends on the rows' layouts only, not on how they are cut into spans.
template <typename F>
inline void ForEachRun(const SideView& side, size_t begin, size_t end, F f) {
  const RowSpan* run = nullptr;
  size_t first = begin;
  ForEachPiece(side, begin, end, [&](const RowSpan& span, size_t, size_t, size_t row) {
    if (run && !SameLayout(*run, span)) {
      f(*run, first, row);
      first = row;
    }
    run = &span;
  });
  if (run) f(*run, first, end);
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
    case RowType::kF32:
      return ExpandFloatKeyTile<F32Rows>(tile, format.head_dim, out, stride);
    case RowType::kF16:
      return ExpandFloatKeyTile<F16Rows>(tile, format.head_dim, out, stride);
    case RowType::kBF16:
      return ExpandFloatKeyTile<BF16Rows>(tile, format.head_dim, out, stride);
    default:
      return ExpandQuantKeyTile(format, tile, out, stride);
  }
}

// n slots of a span of keys to [head_dim, n], channels kKeyStride apart. `edge` takes one tile.
void ExpandKeySpan(const RowSpan& span, size_t slot, size_t n, float* edge, float* out) {
  const RowFormat& format = span.format;
  const size_t tile_bytes = TileBytes(format.type, format.head_dim);
  while (n > 0) {
    const size_t lane = slot % kTileRows;
    const size_t count = Min(n, kTileRows - lane);
    const std::byte* tile = span.rows + slot / kTileRows * tile_bytes;
    if (count == kTileRows) {
      ExpandKeyTile(format, tile, out, kKeyStride);
    } else {
      ExpandKeyTile(format, tile, edge, kTileRows);
      for (size_t c = 0; c < format.head_dim; ++c) {
        for (size_t i = 0; i < count; ++i) out[c * kKeyStride + i] = edge[c * kTileRows + lane + i];
      }
    }
    out += count;
    slot += count;
    n -= count;
  }
}

// Takes n expanded keys back from the Hadamard transform they were stored in. Works on whole vectors, so that up to
// kW - 1 keys behind them change: they are expanded later.
void RestoreKeys(const AttentionView& view, size_t n, float* keys) {
  const size_t block = view.hadamard_block;
  const auto butterfly = [&](float* a, float* b, V factor) {
    for (size_t i = 0; i < n; i += kW) {
      const V x = Load(a + i), y = Load(b + i);
      Store(a + i, Mul(Add(x, y), factor));
      Store(b + i, Mul(Sub(x, y), factor));
    }
  };
  for (size_t apart = 1; apart < block; apart *= 2) {
    const V factor = Splat(apart * 2 == block ? view.hadamard_scale : 1.0f);
    for (size_t c = 0; c < view.head_dim; ++c)
      if ((c & apart) == 0) butterfly(keys + c * kKeyStride, keys + (c + apart) * kKeyStride, factor);
  }
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

// n expanded keys with some of the channels take their places among all of them.
void SpreadChannels(const RowSpan& span, size_t dim, size_t n, float* keys) {
  size_t c = span.format.head_dim;
  for (size_t channel = dim; channel-- > 0;) {
    float* to = keys + channel * kKeyStride;
    if (c == 0 || span.channels[c - 1] != channel) {
      Fill(to, n, 0);
      continue;
    }
    const float* from = keys + --c * kKeyStride;
    for (size_t i = 0; i < n && from != to; ++i) to[i] = from[i];
  }
}

// Rows [begin, end) of the keys, at most kBlockRows, rotated, to e.keys.
void ExpandKeys(const AttentionView& view, const Expansion& e, size_t begin, size_t end) {
  ForEachPiece(view.keys, begin, end, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    float* to = e.keys + (row - begin);
    if (span.reader) return span.reader->ExpandKeys(slot, n, to, kKeyStride);
    ExpandKeySpan(span, slot, n, e.tile, to);
    if (view.hadamard_block > 0) RestoreKeys(view, n, to);
    if (span.channels) SpreadChannels(span, view.head_dim, n, to);
  });
  if (view.angles) RotateKeys(view, begin, end - begin, e.keys);
}

// The same of a run of keys with one list of channels, as they lie: [format.head_dim, rows].
void ExpandNarrowKeys(const AttentionView& view, const Expansion& e, size_t begin, size_t end) {
  ForEachPiece(view.keys, begin, end, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    ExpandKeySpan(span, slot, n, e.tile, e.keys + (row - begin));
  });
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
  const bool q8 = format.type == RowType::kQ8;
  const V offset = Splat(q8 ? 128 : 8);
  for (size_t i = 0; i < n; ++i, ++slot, out += Padded(dim)) {
    const std::byte* tile = region + slot / kTileRows * TileBytes(format.type, dim);
    const size_t lane = slot % kTileRows;
    const int shift = static_cast<int>(lane % 4 * 8);
    for (size_t block = 0; block < dim / kQuantBlock; ++block) {
      const V scale = Splat(HalfToFloat(TileScales(tile)[block * kTileRows + lane]));
      float* to = out + block * kQuantBlock;
      const size_t first = block * kQuantBlock, four = lane / 4 * 4;
      const uint8_t* codes = TileCodes(tile, dim) + (q8 ? Q8ValueCode(first, four) : Q4ValueByte(first, four));
      for (size_t c = 0; c < 16; c += kW) {
        const V low = Field(codes + c * 4, shift, q8 ? 255 : 15);
        const V high = q8 ? Field(codes + (16 + c) * 4, shift, 255) : Field(codes + c * 4, shift + 4, 15);
        Store(to + c, Mul(scale, Sub(low, offset)));
        Store(to + 16 + c, Mul(scale, Sub(high, offset)));
      }
    }
  }
}

void ExpandValueRows(const RowFormat& format, const std::byte* region, size_t slot, size_t n, float* out) {
  switch (format.type) {
    case RowType::kF32:
      return ExpandFloatValues<F32Rows>(region, slot, n, format.head_dim, out);
    case RowType::kF16:
      return ExpandFloatValues<F16Rows>(region, slot, n, format.head_dim, out);
    case RowType::kBF16:
      return ExpandFloatValues<BF16Rows>(region, slot, n, format.head_dim, out);
    default:
      return ExpandQuantValues(format, region, slot, n, out);
  }
}

// Rows [begin, end) of the values, at most kBlockRows, to [end - begin, padded head_dim]; the padding holds anything.
void ExpandValues(const AttentionView& view, size_t begin, size_t end, float* out) {
  const size_t stride = Padded(view.head_dim);
  ForEachPiece(view.values, begin, end, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    float* to = out + (row - begin) * stride;
    if (span.reader) return span.reader->ExpandValues(slot, n, to, stride);
    ExpandValueRows(span.format, span.rows, slot, n, to);
  });
}

// ---- Softmax of a row of scores

// The largest of the first `visible` scores; an overflowed one counts as the largest float, so that it wins instead of
// giving NaN. Scores behind them, up to a whole vector of 16, become -infinity.
float MaxScore(float* scores, size_t visible) {
  const size_t n = Padded(visible);
  for (size_t i = visible; i < n; ++i) scores[i] = -kInfinity;
  V largest = Splat(-kInfinity);
  for (size_t i = 0; i < n; i += kW) largest = VMax(largest, Load(scores + i));
  const float x = ReduceMax(largest);
  return x < kLargest ? x : kLargest;
}
