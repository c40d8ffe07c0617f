// Decode over q8 and q4 rows where they lie, with integer products of their codes. Part of attention_avx512.cpp and
// attention_avx2.cpp, inside their own anonymous namespace and after they have defined, besides what attention_simd.h
// asks for,
//   Ints: kW 32-bit integers with the operators of unsigned ones (what codes of no number come to wraps around), which
//   ToFloat takes as signed   LoadInts(bytes)   ToFloat(Ints)   SumLanes(Ints)
//   LargerMagnitude(a, b), a >= 0: a or |b|   LoadLanes(p, lanes), which reads nothing where the bit of a lane is not
//   set, and LoadF16Lanes(p, lanes): 0 there
//   kShift, kQuadInts, StoreQuads(V*, uint32_t*): 16 whole numbers of up to 32512, to which kShift has been added in
//   float32, as four quads of kQuadInts words, of which two count; returns integers whose lanes have their sum
//   Bytes(Ints, word), LowHalves(Ints, word), HighHalves(Ints, word): a lane's codes of 8 bits or 4, as word 0 or 1 of
//   a quad takes them
//   Sums StartAt(uint32_t)   AddProducts(Sums&, codes, numbers, word)   Total(Sums): as Ints
//
// Scores: each query is rounded to 16 bits a block of 32 channels (scale = largest / 32512), and its products with the
// codes are summed up in 32 bits; the codes' offset is taken out by the sums' start. The integer sums are exact, so the
// scores are as good as with float32 queries (error about 2^-16 of the query's largest channel). 64 products take two
// instructions of AVX-512 VNNI, where a number is two signed bytes, value = 256 high + low, and float32 four and
// conversions; with AVX2, whose sums of products of bytes would overflow, codes become 16 bits: 32 products take four
// instructions of which only half multiply, and float32 four and conversions. Values: likewise with the weights, times
// the rows' scales, in place of the queries: they are rounded relative to the largest of a block and 128 rows, rows of one
// channel are added up by one instruction, and the integers become float32 once every 128 rows. Which 128 rows depends
// on their numbers only, and integer sums on no order, so the results do not depend on how the rows are cut into spans.
//
// Loops over codes are functions of their own: inlined, GCC 12 gives their registers to what surrounds them.
#pragma once

#include "kernels/attention/attention_prefill.h"

struct CodedQueries {
  uint32_t* quads;  // [head_dim / 4][stacked][2]
  uint32_t* start;  // [head_dim / 32][stacked]: -offset * sum of values
  float* scale;     // [head_dim / 32][stacked]; no number where a channel is not finite
};

// Lies in s.rows.keys, which the fused path does not use otherwise.
inline CodedQueries PlaceQueries(const DecodeScratch& s, size_t dim, size_t stacked) {
  CodedQueries q;
  q.scale = s.rows.keys;
  q.start = reinterpret_cast<uint32_t*>(q.scale + dim / kQuantBlock * stacked);
  q.quads = q.start + dim / kQuantBlock * stacked;
  return q;
}

// Of the channels that the run's keys have.
void CodeQueries(const AttentionView& view, const RowSpan& run, size_t stacked, uint32_t offset,
                 const CodedQueries& out) {
  constexpr size_t kVectors = kQuantBlock / kW;
  const size_t dim = run.format.head_dim;
  for (size_t m = 0; m < stacked; ++m) {
    const float* query = view.q + m / view.group * view.q_stride + m % view.group * view.head_dim;
    for (size_t block = 0; block < dim / kQuantBlock; ++block) {
      const float* values = query + block * kQuantBlock;
      float some[kQuantBlock];
      for (size_t c = 0; run.channels && c < kQuantBlock; ++c) some[c] = query[run.channels[block * kQuantBlock + c]];
      if (run.channels) values = some;
      V x[kVectors], most = Zero(), zeros = Zero();
      for (size_t v = 0; v < kVectors; ++v) {
        x[v] = Mul(Load(values + v * kW), Splat(view.scale));
        most = LargerMagnitude(most, x[v]);
        zeros = Fma(x[v], Zero(), zeros);  // unless it is not finite
      }
      const float largest = ReduceMax(most);
      const V inverse = Splat(largest > 1e-34f ? 32512 / largest : 0);  // finite
      for (size_t v = 0; v < kVectors; ++v) x[v] = Add(Round(Mul(x[v], inverse)), Splat(kShift));
      Ints sum = {};
      for (size_t half = 0; half < 2; ++half) {
        alignas(64) uint32_t quads[4][kQuadInts];
        sum += StoreQuads(x + half * kTileVectors, quads[0]);
        for (size_t four = 0; four < 4; ++four) {
          const size_t at = (block * 8 + half * 4 + four) * stacked + m;
          __builtin_memcpy(out.quads + at * 2, quads[four], 8);
        }
      }
      out.scale[block * stacked + m] = largest / 32512 + ReduceAdd(zeros);
      out.start[block * stacked + m] = 0 - offset * SumLanes(sum);
    }
  }
}

template <RowType kType>
inline Ints CodesIn(Ints bytes, int half, int word) {
  if constexpr (kType == RowType::kQ8) return Bytes(bytes, word);
  return half == 0 ? LowHalves(bytes, word) : HighHalves(bytes, word);
}

// scores[m, row] of MB queries, from number m0 on, and NT tiles.
template <RowType kType, int MB, int NT>
inline void ScoreCodes(const std::byte* tiles, size_t tile_bytes, size_t dim, CodedQueries q, size_t stacked,
                       size_t m0, float* scores, size_t stride, Ahead ahead) {
  constexpr size_t kBlockBytes = kType == RowType::kQ8 ? 512 : 256;
  constexpr size_t kGroups = kBlockBytes / 64;
  constexpr int kVectors = NT * static_cast<int>(kTileVectors);
  const size_t scale_bytes = TileScaleBytes(dim);
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    Sums sums[MB][kVectors];
    for (int m = 0; m < MB; ++m) {
      for (int v = 0; v < kVectors; ++v) sums[m][v] = StartAt(q.start[block * stacked + m0 + m]);
    }
    for (int t = 0; t < NT; ++t)
      FetchAhead<kTileRows * 2>(TileScales(tiles + t * tile_bytes) + block * kTileRows, ahead);
    const std::byte* first = tiles + scale_bytes + block * kBlockBytes;
    for (size_t g = 0; g < kGroups; ++g) {
      Ints bytes[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const std::byte* p = first + v / kTileVectors * tile_bytes + g * 64 + v % kTileVectors * kW * 4;
        if (v % kTileVectors == 0) FetchAhead<64>(p, ahead);
        bytes[v] = LoadInts(p);
      }
      for (int half = 0; half < (kType == RowType::kQ8 ? 1 : 2); ++half) {
        for (int word = 0; word < 2; ++word) {
          Ints codes[kVectors];
          for (int v = 0; v < kVectors; ++v) codes[v] = CodesIn<kType>(bytes[v], half, word);
          for (int m = 0; m < MB; ++m) {
            const size_t four = block * 8 + half * 4 + g;
            const Ints query = Ints{} + q.quads[(four * stacked + m0 + m) * 2 + word];
            for (int v = 0; v < kVectors; ++v) AddProducts(sums[m][v], codes[v], query, word);
          }
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const size_t lane = v % kTileVectors * kW;
      const V row_scale = LoadF16(TileScales(tiles + v / kTileVectors * tile_bytes) + block * kTileRows + lane);
      for (int m = 0; m < MB; ++m) {
        const size_t at = block * stacked + m0 + m;
        const V scale = Mul(row_scale, Splat(q.scale[at]));
        // The sums wait in memory: the registers are full.
        float* to = scores + m * stride + v * kW;
        Store(to, Fma(ToFloat(Total(sums[m][v])), scale, block == 0 ? Zero() : Load(to)));
      }
    }
  }
}

template <RowType kType, int MB>
[[gnu::noinline]] void ScoreCodedTiles(const std::byte* tiles, size_t n_tiles, size_t tile_bytes, size_t dim,
                                       const CodedQueries& q, size_t stacked, size_t m0, float* scores, size_t stride,
                                       Ahead ahead) {
  constexpr size_t kNT = kW == 16 ? 2 : 1;
  size_t t = 0;
  for (; t + kNT <= n_tiles; t += kNT) {
    ScoreCodes<kType, MB, kNT>(tiles + t * tile_bytes, tile_bytes, dim, q, stacked, m0, scores + t * kTileRows, stride,
                               ahead);
  }
  if (t < n_tiles) {
    ScoreCodes<kType, MB, 1>(tiles + t * tile_bytes, tile_bytes, dim, q, stacked, m0, scores + t * kTileRows, stride,
                             ahead);
  }
}

template <RowType kType>
void ScoreAllCoded(const std::byte* tiles, size_t n_tiles, size_t tile_bytes, size_t dim, const CodedQueries& q,
                   size_t stacked, float* scores, size_t stride, Ahead ahead) {
  constexpr size_t kRun = 4;  // tiles that stay in the nearest cache for the next queries
  for (size_t t = 0; t < n_tiles; t += kRun) {
    const std::byte* p = tiles + t * tile_bytes;
    const size_t n = Min(kRun, n_tiles - t);
    for (size_t m = 0; m < stacked; m += 4) {
      float* to = scores + m * stride + t * kTileRows;
      WithCount<4>(stacked - m, [&](auto count) {
        ScoreCodedTiles<kType, count.value>(p, n, tile_bytes, dim, q, stacked, m, to, stride, ahead);
      });
    }
  }
}

template <RowType kType>
void CodedScores(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
                 size_t stacked) {
  const size_t dim = run.format.head_dim, tile_bytes = TileBytes(kType, dim);
  const CodedQueries q = PlaceQueries(s, dim, stacked);
  CodeQueries(view, run, stacked, kType == RowType::kQ8 ? 128 : 8, q);
  ForEachKeyTile(
      view, s, begin, end,
      [&](const std::byte* keys, size_t n_tiles, size_t row, Ahead ahead) {
        ScoreAllCoded<kType>(keys, n_tiles, tile_bytes, dim, q, stacked, s.scores + (row - s.begin), kSplitStride,
                             ahead);
      },
      [&](const std::byte* keys, size_t lane, size_t n, size_t row) {
        ScoreAllCoded<kType>(keys, 1, tile_bytes, dim, q, stacked, s.edge, kTileRows, kNothingAhead);
        CopyEdge(s, lane, n, row - s.begin, stacked);
      });
}

bool FusedScores(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
                 size_t stacked) {
  // The coded queries must fit the memory they borrow; they do for any sane group.
  const size_t dim = view.head_dim;
  if (dim * stacked * 2 + dim / kQuantBlock * stacked * 8 > dim * kKeyStride * sizeof(float)) return false;
  if (run.format.type == RowType::kQ8) {
    CodedScores<RowType::kQ8>(view, s, run, begin, end, stacked);
  } else {
    CodedScores<RowType::kQ4>(view, s, run, begin, end, stacked);
  }
  return true;
}

// ---- Values

// The rows of one tile that belong to the chunk of kWeightRows rows at hand.
struct TilePart {
  const std::byte* tile;
  const std::byte* next;  // the tile to be fetched meanwhile
  ptrdiff_t row;          // of lane 0, counted from the split's first; may lie before it
  uint32_t lanes;         // a bit each
};

// Those of rows [from, to), all of one type, of the split that begins with row `begin`.
size_t ListParts(const AttentionView& view, size_t begin, size_t from, size_t to, TilePart* parts) {
  size_t n_parts = 0;
  ForEachPiece(view.values, from, to, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    const size_t tile_bytes = TileBytes(span.format.type, view.head_dim);
    while (n > 0) {
      const size_t lane = slot % kTileRows, count = Min(n, kTileRows - lane);
      const std::byte* tile = span.rows + slot / kTileRows * tile_bytes;
      parts[n_parts++] = {tile, tile, static_cast<ptrdiff_t>(row - begin) - static_cast<ptrdiff_t>(lane),
                          ((1u << count) - 1) << lane};
      slot += count;
      row += count;
      n -= count;
    }
  });
  return n_parts;
}

inline V PartScales(const TilePart& part, size_t block, size_t v) {
  return LoadF16Lanes(TileScales(part.tile) + block * kTileRows + v * kW, part.lanes >> v * kW);
}

// Weights times scales; 0 in the lanes of other rows, whatever they hold, where nothing is read.
inline V PartWeights(const TilePart& part, const float* p, size_t v, V scales) {
  return Mul(LoadLanes(p + part.row + v * kW, part.lanes >> v * kW), scales);
}

// What the weights of a block (weight * scale of its codes) become: 16-bit integers, times a unit.
template <int MB>
struct BlockWeights {
  alignas(64) uint32_t quads[kWeightRows][MB][4][kQuadInts];  // [part][m][four rows]
  float unit[MB];
  uint32_t sum[MB];  // of the integers
};

template <int MB>
[[gnu::noinline]] void CodeBlockWeights(const TilePart* parts, size_t n_parts, size_t block, const float* p,
                                        BlockWeights<MB>& out) {
  alignas(64) float weights[kWeightRows][MB][kTileRows];  // [part][m][lane]
  V largest[MB];
  for (int m = 0; m < MB; ++m) largest[m] = Zero();
  for (size_t i = 0; i < n_parts; ++i) {
    __builtin_prefetch(TileScales(parts[i].next) + block * kTileRows, 0, 2);
    for (size_t v = 0; v < kTileVectors; ++v) {
      const V scales = PartScales(parts[i], block, v);
      for (int m = 0; m < MB; ++m) {
        const V x = PartWeights(parts[i], p + m * kSplitStride, v, scales);
        Store(weights[i][m] + v * kW, x);
        largest[m] = LargerMagnitude(largest[m], x);
      }
    }
  }
  V inverse[MB];
  Ints sum[MB] = {};
  for (int m = 0; m < MB; ++m) {
    const float x = ReduceMax(largest[m]);
    out.unit[m] = x * (1.0f / 32512);
    inverse[m] = Splat(x > 1e-34f ? 32512 / x : 0);  // finite
  }
  for (size_t i = 0; i < n_parts; ++i) {
    for (int m = 0; m < MB; ++m) {
      V shifted[kTileVectors];
      for (size_t v = 0; v < kTileVectors; ++v)
        shifted[v] = Fma(Load(weights[i][m] + v * kW), inverse[m], Splat(kShift));
      sum[m] += StoreQuads(shifted, out.quads[i][m][0]);
    }
  }
  for (int m = 0; m < MB; ++m) out.sum[m] = SumLanes(sum[m]);
}

// out[m, channel] += sum over the parts' rows of weight * scale * code, for the `slice`-th 2 kW channels of a block.
template <RowType kType, int MB>
[[gnu::noinline]] void AddColumns(const TilePart* parts, size_t n_parts, size_t dim, size_t block, size_t slice,
                                  const BlockWeights<MB>& weights, float* out) {
  constexpr size_t kBlockBytes = kType == RowType::kQ8 ? 512 : 256;
  constexpr size_t kFourBytes = kBlockBytes / 4;  // of four rows
  constexpr size_t kSliceBytes = kFourBytes / kTileVectors;
  constexpr uint32_t kOffset = kType == RowType::kQ8 ? 128 : 8;
  // Few queries need several sums each to keep the multipliers of AVX-512 busy.
  constexpr int kSums = kW < 16 || MB > 2 ? 1 : (MB == 1 ? 4 : 2);
  Sums sums[kSums][MB][2];
  for (auto& of_queries : sums) {
    for (auto& of_query : of_queries) of_query[0] = of_query[1] = StartAt(0);
  }
  const size_t first_byte = block * kBlockBytes + slice * kSliceBytes;
  for (size_t i = 0; i < n_parts; ++i) {
    const uint8_t* bytes = TileCodes(parts[i].tile, dim) + first_byte;
    const uint8_t* next = TileCodes(parts[i].next, dim) + first_byte;
#pragma GCC unroll 1
    for (int first = 0; first < 4; first += kSums) {
      for (int s = 0; s < kSums; ++s, bytes += kFourBytes, next += kFourBytes) {
        for (size_t line = 0; line < kSliceBytes; line += 64) __builtin_prefetch(next + line, 0, 2);
        // Of q8 the second vector follows, of q4 it lies in the high halves.
        const Ints four_rows[2] = {LoadInts(bytes), LoadInts(bytes + (kType == RowType::kQ8 ? kW * 4 : 0))};
        for (int word = 0; word < 2; ++word) {
          const Ints codes[2] = {CodesIn<kType>(four_rows[0], 0, word), CodesIn<kType>(four_rows[1], 1, word)};
          for (int m = 0; m < MB; ++m) {
            const Ints weight = Ints{} + weights.quads[i][m][first + s][word];
            for (int v = 0; v < 2; ++v) AddProducts(sums[s][m][v], codes[v], weight, word);
          }
        }
      }
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (size_t v = 0; v < 2; ++v) {
      Ints x = Total(sums[0][m][v]) - kOffset * weights.sum[m];
      for (int s = 1; s < kSums; ++s) x += Total(sums[s][m][v]);
      float* to = out + m * Padded(dim) + (kType == RowType::kQ8 ? (slice * 2 + v) * kW : slice * kW + v * 16);
      Store(to, Fma(ToFloat(x), Splat(weights.unit[m]), Load(to)));
    }
  }
}

// `p` holds the weights from the split's first row on.
template <RowType kType, int MB>
void AddParts(const TilePart* parts, size_t n_parts, size_t dim, const float* p, float* out) {
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    BlockWeights<MB> weights;
    CodeBlockWeights<MB>(parts, n_parts, block, p, weights);
    for (size_t slice = 0; slice < kTileVectors; ++slice)
      AddColumns<kType, MB>(parts, n_parts, dim, block, slice, weights, out + block * kQuantBlock);
  }
}

template <RowType kType>
void CodedValues(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  const size_t dim = view.head_dim;
  TilePart memory[2][kWeightRows];
  TilePart *parts = memory[0], *next = memory[1];
  size_t from = Min(end, Up(begin + 1, kWeightRows));  // the next chunk's first row
  size_t n_parts = ListParts(view, s.begin, begin, from, parts);
  while (n_parts > 0) {
    const size_t to = Min(end, from + kWeightRows);
    const size_t n_next = ListParts(view, s.begin, from, to, next);
    from = to;
    for (size_t i = 0; i < Min(n_parts, n_next); ++i) parts[i].next = next[i].tile;
    for (size_t m = 0; m < stacked; m += 4) {
      const float* p = s.scores + m * kSplitStride;
      float* out = s.out + m * Padded(dim);
      WithCount<4>(stacked - m, [&](auto count) { AddParts<kType, count.value>(parts, n_parts, dim, p, out); });
    }
    TilePart* const done = parts;
    parts = next;
    next = done;
    n_parts = n_next;
  }
}

bool FusedValues(const AttentionView& view, const DecodeScratch& s, RowType type, size_t begin, size_t end,
                 size_t stacked) {
  if (type == RowType::kQ8) {
    CodedValues<RowType::kQ8>(view, s, begin, end, stacked);
  } else {
    CodedValues<RowType::kQ4>(view, s, begin, end, stacked);
  }
  return true;
}
