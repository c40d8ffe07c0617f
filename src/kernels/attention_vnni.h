// Decode over q8 and q4 rows where they lie, with the 8-bit dot products of AVX-512 VNNI. Part of
// attention_avx512.cpp, inside its anonymous namespace.
//
// Scores: each query is rounded to 16 bits a block of 32 channels (scale = largest / 32512) and kept as two signed
// bytes, value = 256 high + low. The instruction multiplies unsigned codes with signed bytes; the codes' offset is
// taken out by the accumulators' start. The integer sums are exact, so the scores are as good as with float32 queries
// (error about 2^-16 of the query's largest channel), at two instructions for 64 products where float32 needs four and
// conversions. Values: codes become float32 in registers, weights are multiplied with the rows' scales 16 rows at a
// time.
#pragma once

#include "kernels/attention_prefill.h"

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

void CodeQueries(const AttentionView& view, size_t stacked, int offset, const CodedQueries& out) {
  const size_t dim = view.head_dim;
  for (size_t m = 0; m < stacked; ++m) {
    const float* query = view.q + m / view.group * view.q_stride + m % view.group * dim;
    for (size_t block = 0; block < dim / kQuantBlock; ++block) {
      V x[2];
      for (int i = 0; i < 2; ++i) x[i] = Mul(Load(query + block * kQuantBlock + i * 16), Splat(view.scale));
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

// scores[m, row] of MB queries, from number m on, and NT tiles.
template <RowType kType, int MB, int NT>
inline void ScoreCodes(const std::byte* tiles, size_t tile_bytes, size_t dim, const CodedQueries& q, size_t stacked,
                       size_t m0, float* scores, size_t stride, Ahead ahead) {
  constexpr size_t kBlockBytes = kType == RowType::kQ8 ? 512 : 256;
  constexpr size_t kGroups = kBlockBytes / 64;
  const size_t scale_bytes = TileScaleBytes(dim);
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    __m512i high[MB][NT], low[MB][NT];
    for (int m = 0; m < MB; ++m) {
      for (int t = 0; t < NT; ++t) {
        high[m][t] = _mm512_setzero_si512();
        low[m][t] = _mm512_set1_epi32(q.start[block * stacked + m0 + m]);
      }
    }
    auto add = [&](const __m512i* codes, size_t four) {
      for (int m = 0; m < MB; ++m) {
        const size_t at = ((block * 8 + four) * stacked + m0 + m) * 4;
        const __m512i query_high = Broadcast4(q.high + at), query_low = Broadcast4(q.low + at);
        for (int t = 0; t < NT; ++t) {
          high[m][t] = _mm512_dpbusd_epi32(high[m][t], codes[t], query_high);
          low[m][t] = _mm512_dpbusd_epi32(low[m][t], codes[t], query_low);
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
        const __m512i total = _mm512_add_epi32(_mm512_slli_epi32(high[m][t], 8), low[m][t]);
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
      switch (Min(4, stacked - m)) {
        case 1:
          ScoreCodedTiles<kType, 1>(p, n, tile_bytes, dim, q, stacked, m, to, stride, ahead);
          break;
        case 2:
          ScoreCodedTiles<kType, 2>(p, n, tile_bytes, dim, q, stacked, m, to, stride, ahead);
          break;
        case 3:
          ScoreCodedTiles<kType, 3>(p, n, tile_bytes, dim, q, stacked, m, to, stride, ahead);
          break;
        default:
          ScoreCodedTiles<kType, 4>(p, n, tile_bytes, dim, q, stacked, m, to, stride, ahead);
          break;
      }
    }
  }
}

template <RowType kType>
void CodedScores(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  const size_t dim = view.head_dim, tile_bytes = TileBytes(kType, dim);
  const CodedQueries q = PlaceQueries(s, dim, stacked);
  CodeQueries(view, stacked, kType == RowType::kQ8 ? 128 : 8, q);
  ForEachKeyTile(
      view, begin, end,
      [&](const std::byte* keys, size_t n_tiles, size_t row, Ahead ahead) {
        ScoreAllCoded<kType>(keys, n_tiles, tile_bytes, dim, q, stacked, s.scores + (row - begin), kSplitStride, ahead);
      },
      [&](const std::byte* keys, size_t lane, size_t n, size_t row) {
        ScoreAllCoded<kType>(keys, 1, tile_bytes, dim, q, stacked, s.edge, kTileRows, kNothingAhead);
        CopyEdge(s, lane, n, row - begin, stacked);
      });
}

bool FusedScores(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  // The coded queries must fit the memory they borrow; they do for any sane group.
  const size_t dim = view.head_dim;
  if (dim * stacked * 2 + dim / kQuantBlock * stacked * 8 > dim * kKeyStride * sizeof(float)) return false;
  if (view.key_format.type == RowType::kQ8) {
    CodedScores<RowType::kQ8>(view, s, begin, end, stacked);
  } else {
    CodedScores<RowType::kQ4>(view, s, begin, end, stacked);
  }
  return true;
}

// out[m, NB blocks] += sum over rows, in order, of weight * scale * code, over rows [lane, lane + n) of a tile and the
// tiles that follow it, `n_tiles` in all, which are whole when they are several. `p` holds the weights from the first
// row on; first_block counts from the first channel.
template <RowType kType, int MB, int NB>
inline void AddCodes(const std::byte* tile, size_t n_tiles, size_t dim, size_t lane, size_t n, size_t first_block,
                     const float* p, size_t p_stride, float* out, size_t out_stride, Ahead ahead) {
  constexpr size_t kBlockBytes = kType == RowType::kQ8 ? 32 : 16;
  const size_t row_bytes = dim / kQuantBlock * kBlockBytes, tile_bytes = TileBytes(kType, dim);
  alignas(64) float weights[MB][NB][kTileRows];
  const __mmask16 rows = static_cast<__mmask16>((1u << n) - 1);
  V sum[MB][2 * NB];
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < 2 * NB; ++v) sum[m][v] = Load(out + m * out_stride + v * kW);
  }
  for (size_t t = 0; t < n_tiles; ++t, tile += tile_bytes, p += kTileRows) {
    for (int b = 0; b < NB; ++b) {
      const __m256i halves = _mm256_maskz_loadu_epi16(rows, TileScales(tile) + (first_block + b) * kTileRows + lane);
      const V scale = _mm512_cvtph_ps(halves);
      for (int m = 0; m < MB; ++m) Store(weights[m][b], Mul(_mm512_maskz_loadu_ps(rows, p + m * p_stride), scale));
    }
    const uint8_t* codes = TileCodes(tile, dim) + lane * row_bytes + first_block * kBlockBytes;
    for (size_t i = 0; i < n; ++i, codes += row_bytes) {
      V value[2 * NB];
      FetchAhead<64>(codes, ahead);
      for (int b = 0; b < NB; ++b) {
        if constexpr (kType == RowType::kQ8) {
          value[2 * b] = SignedCodes(codes + b * 32);
          value[2 * b + 1] = SignedCodes(codes + b * 32 + 16);
        } else {
          value[2 * b] = LowCodes(codes + b * 16);
          value[2 * b + 1] = HighCodes(codes + b * 16);
        }
      }
      for (int m = 0; m < MB; ++m) {
        for (int b = 0; b < NB; ++b) {
          const V weight = Splat(weights[m][b][i]);
          sum[m][2 * b] = Fma(weight, value[2 * b], sum[m][2 * b]);
          sum[m][2 * b + 1] = Fma(weight, value[2 * b + 1], sum[m][2 * b + 1]);
        }
      }
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (int v = 0; v < 2 * NB; ++v) Store(out + m * out_stride + v * kW, sum[m][v]);
  }
}

template <RowType kType, int MB>
inline void AddCodedTiles(const std::byte* tile, size_t n_tiles, size_t dim, size_t lane, size_t n, const float* p,
                          float* out, Ahead ahead) {
  const size_t out_stride = Padded(dim);
  size_t block = 0;
  for (; block + 2 <= dim / kQuantBlock; block += 2) {
    AddCodes<kType, MB, 2>(tile, n_tiles, dim, lane, n, block, p, kSplitStride, out + block * kQuantBlock, out_stride,
                           ahead);
  }
  if (block < dim / kQuantBlock) {
    AddCodes<kType, MB, 1>(tile, n_tiles, dim, lane, n, block, p, kSplitStride, out + block * kQuantBlock, out_stride,
                           ahead);
  }
}

template <RowType kType>
void CodedValues(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  constexpr size_t kRun = 4;  // tiles that stay in the nearest cache for the next queries and channels
  const size_t dim = view.head_dim, out_stride = Padded(dim), tile_bytes = TileBytes(kType, dim);
  ForEachPiece(view, begin, end, [&](const KvSpan& span, size_t slot, size_t n, size_t row) {
    const std::byte* rows = span.values + slot * tile_bytes / kTileRows;
    const Ahead ahead = AfterSpan(view, RowSide::kValues, rows, n, row + n, begin, end);
    while (n > 0) {
      const size_t lane = slot % kTileRows, count = Min(n, kTileRows - lane);
      const size_t n_tiles = count == kTileRows ? Min(kRun, n / kTileRows) : 1;
      const std::byte* tile = span.values + slot / kTileRows * tile_bytes;
      for (size_t m = 0; m < stacked; m += 4) {
        const float* p = s.scores + m * kSplitStride + (row - begin);
        float* out = s.out + m * out_stride;
        switch (Min(4, stacked - m)) {
          case 1:
            AddCodedTiles<kType, 1>(tile, n_tiles, dim, lane, count, p, out, ahead);
            break;
          case 2:
            AddCodedTiles<kType, 2>(tile, n_tiles, dim, lane, count, p, out, ahead);
            break;
          case 3:
            AddCodedTiles<kType, 3>(tile, n_tiles, dim, lane, count, p, out, ahead);
            break;
          default:
            AddCodedTiles<kType, 4>(tile, n_tiles, dim, lane, count, p, out, ahead);
            break;
        }
      }
      slot += n_tiles * count;
      row += n_tiles * count;
      n -= n_tiles * count;
    }
  });
}

bool FusedValues(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  if (view.value_format.type == RowType::kQ8) {
    CodedValues<RowType::kQ8>(view, s, begin, end, stacked);
  } else {
    CodedValues<RowType::kQ4>(view, s, begin, end, stacked);
  }
  return true;
}
