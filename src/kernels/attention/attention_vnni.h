// Decode over q8 and q4 rows where they lie, with the 8-bit dot products of AVX-512 VNNI. Part of
// attention_avx512.cpp, inside its anonymous namespace.
//
// Scores: each query is rounded to 16 bits a block of 32 channels (scale = largest / 32512) and kept as two signed
// bytes, value = 256 high + low. The instruction multiplies unsigned codes with signed bytes; the codes' offset is
// taken out by the accumulators' start. The integer sums are exact, so the scores are as good as with float32 queries
// (error about 2^-16 of the query's largest channel), at two instructions for 64 products where float32 needs four and
// conversions. Values: likewise with the weights, times the rows' scales, in place of the queries: they are rounded
// relative to the largest of a block and 128 rows, four rows of one channel are added up by one instruction, and the
// integers become float32 once every 128 rows. Which 128 rows depends on their numbers only, and integer sums on no
// order, so the results do not depend on how the rows are cut into spans.
#pragma once

#include "kernels/attention/attention_prefill.h"

struct CodedQueries {
  int8_t* high;    // [head_dim / 4][stacked][4]
  int8_t* low;     // the same
  int32_t* start;  // [head_dim / 32][stacked]: -offset * sum of values
  float* scale;    // [head_dim / 32][stacked]
};

// Lies in s.rows.keys, which the fused path does not use otherwise.
inline CodedQueries PlaceQueries(const DecodeScratch& s, size_t dim, size_t stacked) {
  CodedQueries q;
  q.scale = s.rows.keys;
  q.start = reinterpret_cast<int32_t*>(q.scale + dim / kQuantBlock * stacked);
  q.high = reinterpret_cast<int8_t*>(q.start + dim / kQuantBlock * stacked);
  q.low = q.high + dim * stacked;
  return q;
}

// Of the channels that the run's keys have.
void CodeQueries(const AttentionView& view, const RowSpan& run, size_t stacked, int offset, const CodedQueries& out) {
  const size_t dim = run.format.head_dim;
  for (size_t m = 0; m < stacked; ++m) {
    const float* query = view.q + m / view.group * view.q_stride + m % view.group * view.head_dim;
    for (size_t block = 0; block < dim / kQuantBlock; ++block) {
      const float* values = query + block * kQuantBlock;
      float some[kQuantBlock];
      for (size_t c = 0; run.channels && c < kQuantBlock; ++c) some[c] = query[run.channels[block * kQuantBlock + c]];
      if (run.channels) values = some;
      V x[2];
      for (int i = 0; i < 2; ++i) x[i] = Mul(Load(values + i * 16), Splat(view.scale));
      const float largest = ReduceMax(VMax(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1])));
      const V inverse = Splat(largest > 0 ? 32512 / largest : 0);
      __m512i sum = _mm512_setzero_si512();
      for (int i = 0; i < 2; ++i) {
        const __m512i value = _mm512_cvtps_epi32(Mul(x[i], inverse));
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(128)), 8);
        const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 8));
        sum = _mm512_add_epi32(sum, value);
        alignas(16) int8_t bytes[2][16];
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0]), _mm512_cvtepi32_epi8(high));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes[1]), _mm512_cvtepi32_epi8(low));
        for (size_t four = 0; four < 4; ++four) {
          const size_t at = ((block * 8 + i * 4 + four) * stacked + m) * 4;
          __builtin_memcpy(out.high + at, bytes[0] + four * 4, 4);
          __builtin_memcpy(out.low + at, bytes[1] + four * 4, 4);
        }
      }
      out.scale[block * stacked + m] = largest / 32512;
      out.start[block * stacked + m] = -offset * _mm512_reduce_add_epi32(sum);
    }
  }
}

inline __m512i Broadcast4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

// Sums of 32-bit integers. A type of its own because GCC 12 copies sums of type __m512i from one register to another
// around each addition in a loop.
using Sums = int32_t __attribute__((vector_size(64)));

inline void AddProducts(Sums& sums, __m512i codes, __m512i bytes) {
  sums = reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), codes, bytes));
}

// scores[m, row] of MB queries, from number m on, and NT tiles.
template <RowType kType, int MB, int NT>
inline void ScoreCodes(const std::byte* tiles, size_t tile_bytes, size_t dim, const CodedQueries& q, size_t stacked,
                       size_t m0, float* scores, size_t stride, Ahead ahead) {
  constexpr size_t kBlockBytes = kType == RowType::kQ8 ? 512 : 256;
  constexpr size_t kGroups = kBlockBytes / 64;
  const size_t scale_bytes = TileScaleBytes(dim);
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    Sums high[MB][NT], low[MB][NT];
    for (int m = 0; m < MB; ++m) {
      for (int t = 0; t < NT; ++t) {
        high[m][t] = Sums{};
        low[m][t] = Sums{} + q.start[block * stacked + m0 + m];
      }
    }
    auto add = [&](const __m512i* codes, size_t four) {
      for (int m = 0; m < MB; ++m) {
        const size_t at = ((block * 8 + four) * stacked + m0 + m) * 4;
        const __m512i query_high = Broadcast4(q.high + at), query_low = Broadcast4(q.low + at);
        for (int t = 0; t < NT; ++t) {
          AddProducts(high[m][t], codes[t], query_high);
          AddProducts(low[m][t], codes[t], query_low);
        }
      }
    };
    const std::byte* codes = tiles + scale_bytes + block * kBlockBytes;
    for (size_t g = 0; g < kGroups; ++g) {
      __m512i code[NT];
      for (int t = 0; t < NT; ++t) {
        const std::byte* p = codes + t * tile_bytes + g * 64;
        FetchAhead<64>(p, ahead);
        code[t] = _mm512_loadu_si512(p);
      }
      if constexpr (kType == RowType::kQ8) {
        add(code, g);
      } else {
        const __m512i mask = _mm512_set1_epi8(15);
        __m512i half[NT];
        for (int t = 0; t < NT; ++t) half[t] = _mm512_and_si512(code[t], mask);
        add(half, g);
        for (int t = 0; t < NT; ++t) half[t] = _mm512_and_si512(_mm512_srli_epi16(code[t], 4), mask);
        add(half, g + 4);
      }
    }
    for (int t = 0; t < NT; ++t) {
      const V row_scale = LoadF16(TileScales(tiles + t * tile_bytes) + block * kTileRows);
      for (int m = 0; m < MB; ++m) {
        const __m512i total = reinterpret_cast<__m512i>((high[m][t] << 8) + low[m][t]);
        const V scale = Mul(row_scale, Splat(q.scale[block * stacked + m0 + m]));
        // The sums wait in memory: the registers are full.
        float* to = scores + m * stride + t * kTileRows;
        Store(to, Fma(_mm512_cvtepi32_ps(total), scale, block == 0 ? Zero() : Load(to)));
      }
    }
  }
}

template <RowType kType, int MB>
inline void ScoreCodedTiles(const std::byte* tiles, size_t n_tiles, size_t tile_bytes, size_t dim,
                            const CodedQueries& q, size_t stacked, size_t m0, float* scores, size_t stride,
                            Ahead ahead) {
  constexpr size_t kNT = 2;
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
  __mmask16 lanes;
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
                          static_cast<__mmask16>(((1u << count) - 1) << lane)};
      slot += count;
      row += count;
      n -= count;
    }
  });
  return n_parts;
}

inline V PartScales(const TilePart& part, size_t block) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(part.lanes, TileScales(part.tile) + block * kTileRows));
}

// Weights times scales; 0 in the lanes of other rows, whatever they hold, where nothing is read.
inline V PartWeights(const TilePart& part, const float* p, V scales) {
  return Mul(_mm512_maskz_loadu_ps(part.lanes, p + part.row), scales);
}

// What a block's weights (weight * scale of its codes) become: 16-bit integers in two bytes each, times a unit.
template <int MB>
struct BlockWeights {
  alignas(64) int8_t bytes[kWeightRows][MB][4][16];  // [part][m][four rows]: low bytes, then high bytes
  float unit[MB];
  __m512i total[MB];  // sums of the integers, a lane each
};

// For each of MB queries the largest magnitude among a block's weights, a lane each.
template <int MB>
inline void LargestWeights(const TilePart* parts, size_t n_parts, size_t block, const float* p, V* largest) {
  for (int m = 0; m < MB; ++m) largest[m] = Zero();
  for (size_t i = 0; i < n_parts; ++i) {
    __builtin_prefetch(TileScales(parts[i].next) + block * kTileRows, 0, 2);
    const V scales = PartScales(parts[i], block);
    for (int m = 0; m < MB; ++m) {
      constexpr int kLargerMagnitude = 0b1011;
      largest[m] = _mm512_range_ps(largest[m], PartWeights(parts[i], p + m * kSplitStride, scales), kLargerMagnitude);
    }
  }
}

template <int MB>
inline void CodeBlockWeights(const TilePart* parts, size_t n_parts, size_t block, const float* p, BlockWeights<MB>& out) {
  V largest[MB], inverse[MB];
  LargestWeights<MB>(parts, n_parts, block, p, largest);
  // Adding 1.5 * 2^23 leaves the rounded weight in the low bits; 128 more, and the second byte is `high`, the first
  // `low` + 128.
  constexpr float kShift = 12582912.0f + 128;
  constexpr int32_t kShiftBits = __builtin_bit_cast(int32_t, kShift);
  const __m512i gather = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m512i flip = _mm512_broadcast_i32x4(_mm_setr_epi32(static_cast<int>(0x80808080u), 0, 0, 0));
  for (int m = 0; m < MB; ++m) {
    const float x = ReduceMax(largest[m]);
    out.unit[m] = x * (1.0f / 32512);
    inverse[m] = Splat(x > 1e-34f ? 32512 / x : 0);  // finite
    out.total[m] = _mm512_setzero_si512();
  }
  for (size_t i = 0; i < n_parts; ++i) {
    const V scales = PartScales(parts[i], block);
    for (int m = 0; m < MB; ++m) {
      const V shifted = Fma(PartWeights(parts[i], p + m * kSplitStride, scales), inverse[m], Splat(kShift));
      const __m512i bits = _mm512_castps_si512(shifted);
      out.total[m] = _mm512_add_epi32(out.total[m], _mm512_sub_epi32(bits, _mm512_set1_epi32(kShiftBits)));
      _mm512_store_si512(out.bytes[i][m], _mm512_xor_si512(_mm512_shuffle_epi8(bits, gather), flip));
    }
  }
}

// The codes of four rows of a block, a byte each.
template <RowType kType>
inline void LoadFourRows(const uint8_t* codes, __m512i* code) {
  code[0] = _mm512_loadu_si512(codes);
  if constexpr (kType == RowType::kQ8) {
    code[1] = _mm512_loadu_si512(codes + 64);
  } else {
    const __m512i mask = _mm512_set1_epi8(15);
    code[1] = _mm512_and_si512(_mm512_srli_epi16(code[0], 4), mask);
    code[0] = _mm512_and_si512(code[0], mask);
  }
}

// out[m, block] += sum over the parts' rows of weight * scale * code. `p` holds the weights from the split's first row
// on.
template <RowType kType, int MB>
inline void AddBlock(const TilePart* parts, size_t n_parts, size_t dim, size_t block, const float* p,
                     float* out) {
  constexpr size_t kBlockBytes = kType == RowType::kQ8 ? 512 : 256;
  constexpr size_t kFourBytes = kBlockBytes / 4;  // of four rows
  constexpr int32_t kOffset = kType == RowType::kQ8 ? 128 : 8;
  BlockWeights<MB> weights;
  CodeBlockWeights<MB>(parts, n_parts, block, p, weights);
  // Few queries need several sums each to keep the multipliers busy.
  constexpr int kSums = MB == 1 ? 4 : (MB == 2 ? 2 : 1);
  Sums high[kSums][MB][2] = {}, low[kSums][MB][2] = {};
  for (size_t i = 0; i < n_parts; ++i) {
    const uint8_t* codes = TileCodes(parts[i].tile, dim) + block * kBlockBytes;
    const uint8_t* next = TileCodes(parts[i].next, dim) + block * kBlockBytes;
#pragma GCC unroll 1
    for (int first = 0; first < 4; first += kSums) {
      for (int s = 0; s < kSums; ++s, codes += kFourBytes, next += kFourBytes) {
        for (size_t line = 0; line < kFourBytes; line += 64) __builtin_prefetch(next + line, 0, 2);
        __m512i code[2];
        LoadFourRows<kType>(codes, code);
        for (int m = 0; m < MB; ++m) {
          const int8_t* weight = weights.bytes[i][m][first + s];
          const __m512i weight_low = Broadcast4(weight), weight_high = Broadcast4(weight + 4);
          for (int v = 0; v < 2; ++v) {
            AddProducts(high[s][m][v], code[v], weight_high);
            AddProducts(low[s][m][v], code[v], weight_low);
          }
        }
      }
    }
  }
  for (int m = 0; m < MB; ++m) {
    const int32_t sum = _mm512_reduce_add_epi32(weights.total[m]);
    for (int v = 0; v < 2; ++v) {
      for (int s = 1; s < kSums; ++s) {
        high[0][m][v] += high[s][m][v];
        low[0][m][v] += low[s][m][v];
      }
      const Sums x = (high[0][m][v] << 8) + low[0][m][v] - kOffset * sum;
      float* to = out + m * Padded(dim) + v * kW;
      Store(to, Fma(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)), Splat(weights.unit[m]), Load(to)));
    }
  }
}

template <RowType kType, int MB>
void AddParts(const TilePart* parts, size_t n_parts, size_t dim, const float* p, float* out) {
  for (size_t block = 0; block < dim / kQuantBlock; ++block)
    AddBlock<kType, MB>(parts, n_parts, dim, block, p, out + block * kQuantBlock);
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
