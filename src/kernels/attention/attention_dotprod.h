// Decode over q8 and q4 rows where they lie, with ARM's dot products of 8-bit numbers: the scheme of attention_codes.h,
// which says why it is exact enough and independent of how rows are cut into spans. The instruction multiplies signed
// numbers with signed ones, so codes lose their offset as they are loaded. Part of attention_dotprod.cpp, inside its
// anonymous namespace.
#pragma once

#include "kernels/attention/attention_neon.h"
#include "kernels/attention/attention_prefill.h"

using DI8 = hn::Full128<int8_t>;
using DU8 = hn::Full128<uint8_t>;
using VI8 = hn::Vec<DI8>;

constexpr size_t kTileFours = kTileRows / 4;  // vectors of four 32-bit sums for a tile
constexpr float kMostCoded = 32512;           // 127 * 256: two signed bytes hold it, rounded

// Debian 12's Highway has no operation for it.
inline VI AddProducts(VI sums, VI8 a, VI8 b) { return VI(vdotq_s32(sums.raw, a.raw, b.raw)); }

inline VI8 Broadcast4(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return hn::BitCast(DI8(), hn::Set(DI(), x));
}

// 16 codes: of q8, or of q4 the low or the high halves.
template <RowType kType>
inline VI8 LoadCodes(const uint8_t* p, bool high_halves) {
  const auto bytes = hn::LoadU(DU8(), p);
  if constexpr (kType == RowType::kQ8) return hn::BitCast(DI8(), hn::Xor(bytes, hn::Set(DU8(), uint8_t{128})));
  const auto halves = high_halves ? hn::ShiftRight<4>(bytes) : hn::And(bytes, hn::Set(DU8(), uint8_t{15}));
  return hn::BitCast(DI8(), hn::Sub(halves, hn::Set(DU8(), uint8_t{8})));
}

// n numbers, a multiple of 4, as 256 high + low in units of largest / 32512; returns the unit.
inline float CodeNumbers(const float* x, size_t n, int8_t* high, int8_t* low) {
  V most = Zero();
  for (size_t i = 0; i < n; i += kW) most = VMax(most, hn::Abs(VF(Load(x + i))).raw);
  const float largest = ReduceMax(most);
  const V inverse = Splat(largest > 1e-34f ? kMostCoded / largest : 0);  // finite
  for (size_t i = 0; i < n; i += kW) {
    int32_t values[kW];
    hn::StoreU(hn::NearestInt(VF(Mul(Load(x + i), inverse))), DI(), values);
    for (size_t j = 0; j < kW; ++j) {
      const int32_t up = (values[j] + 128) >> 8;
      high[i + j] = static_cast<int8_t>(up);
      low[i + j] = static_cast<int8_t>(values[j] - up * 256);
    }
  }
  return largest / kMostCoded;
}

inline V FromCoded(VI high, VI low) { return hn::ConvertTo(D(), hn::Add(hn::ShiftLeft<8>(high), low)).raw; }

// ---- Scores

struct CodedQueries {
  int8_t* high;  // [stacked][head_dim]
  int8_t* low;   // the same
  float* unit;   // [stacked][head_dim / 32]
};

// Lies in s.rows.keys, which the fused path does not use otherwise.
inline CodedQueries PlaceQueries(const DecodeScratch& s, size_t dim, size_t stacked) {
  CodedQueries q;
  q.unit = s.rows.keys;
  q.high = reinterpret_cast<int8_t*>(q.unit + dim / kQuantBlock * stacked);
  q.low = q.high + dim * stacked;
  return q;
}

// Of the channels that the run's keys have.
void CodeQueries(const AttentionView& view, const RowSpan& run, size_t stacked, const CodedQueries& out) {
  const size_t dim = run.format.head_dim;
  for (size_t m = 0; m < stacked; ++m) {
    const float* query = view.q + m / view.group * view.q_stride + m % view.group * view.head_dim;
    for (size_t block = 0; block < dim / kQuantBlock; ++block) {
      const size_t first = block * kQuantBlock;
      float values[kQuantBlock], zero = 0;
      for (size_t c = 0; c < kQuantBlock; ++c) {
        values[c] = query[run.channels ? run.channels[first + c] : first + c] * view.scale;
        zero += values[c] * 0;  // no number where a channel is not finite
      }
      out.unit[m * (dim / kQuantBlock) + block] =
          zero + CodeNumbers(values, kQuantBlock, out.high + m * dim + first, out.low + m * dim + first);
    }
  }
}

// scores[m * stride + lane] of MB queries, from number m0 on, and a tile.
template <RowType kType, int MB>
inline void ScoreCodes(const std::byte* tile, size_t dim, const CodedQueries& q, size_t m0, float* scores,
                       size_t stride, Ahead ahead) {
  V total[MB][kTileFours];
  for (int m = 0; m < MB; ++m) {
    for (size_t v = 0; v < kTileFours; ++v) total[m][v] = Zero();
  }
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    VI high[MB][kTileFours], low[MB][kTileFours];
    for (int m = 0; m < MB; ++m) {
      for (size_t v = 0; v < kTileFours; ++v) high[m][v] = low[m][v] = hn::Zero(DI());
    }
    for (size_t four = 0; four < 8; ++four) {  // of the block's channels
      const size_t c = block * kQuantBlock + four * 4;
      const bool high_halves = kType == RowType::kQ4 && four >= 4;
      const uint8_t* codes = TileCodes(tile, dim) + (kType == RowType::kQ8 ? Q8KeyCode(c, 0) : Q4KeyByte(c, 0));
      if (!high_halves) FetchAhead<64>(codes, ahead);
      for (size_t v = 0; v < kTileFours; ++v) {
        const VI8 code = LoadCodes<kType>(codes + v * 16, high_halves);
        for (int m = 0; m < MB; ++m) {
          const size_t at = (m0 + static_cast<size_t>(m)) * dim + c;
          high[m][v] = AddProducts(high[m][v], code, Broadcast4(q.high + at));
          low[m][v] = AddProducts(low[m][v], code, Broadcast4(q.low + at));
        }
      }
    }
    for (size_t v = 0; v < kTileFours; ++v) {
      const V row_scale = LoadF16(TileScales(tile) + block * kTileRows + v * kW);
      for (int m = 0; m < MB; ++m) {
        const float unit = q.unit[(m0 + static_cast<size_t>(m)) * (dim / kQuantBlock) + block];
        total[m][v] = Fma(FromCoded(high[m][v], low[m][v]), Mul(row_scale, Splat(unit)), total[m][v]);
      }
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (size_t v = 0; v < kTileFours; ++v) Store(scores + static_cast<size_t>(m) * stride + v * kW, total[m][v]);
  }
}

template <RowType kType>
void ScoreCodedTile(const std::byte* tile, size_t dim, const CodedQueries& q, size_t stacked, float* scores,
                    size_t stride, Ahead ahead) {
  for (size_t m = 0; m < stacked; m += 2) {
    WithCount<2>(stacked - m, [&](auto count) {
      ScoreCodes<kType, count.value>(tile, dim, q, m, scores + m * stride, stride, ahead);
    });
  }
}

template <RowType kType>
void CodedScores(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
                 size_t stacked) {
  const size_t dim = run.format.head_dim, tile_bytes = TileBytes(kType, dim);
  const CodedQueries q = PlaceQueries(s, dim, stacked);
  CodeQueries(view, run, stacked, q);
  ForEachKeyTile(
      view, s, begin, end,
      [&](const std::byte* keys, size_t n_tiles, size_t row, Ahead ahead) {
        for (size_t t = 0; t < n_tiles; ++t)
          ScoreCodedTile<kType>(keys + t * tile_bytes, dim, q, stacked, s.scores + (row - s.begin) + t * kTileRows,
                                kSplitStride, ahead);
      },
      [&](const std::byte* keys, size_t lane, size_t n, size_t row) {
        ScoreCodedTile<kType>(keys, dim, q, stacked, s.edge, kTileRows, kNothingAhead);
        CopyEdge(s, lane, n, row - s.begin, stacked);
      });
}

bool FusedScores(const AttentionView& view, const DecodeScratch& s, const RowSpan& run, size_t begin, size_t end,
                 size_t stacked) {
  // The coded queries must fit the memory they borrow; they do for any sane group.
  const size_t dim = view.head_dim;
  if (dim * stacked * 2 + dim / kQuantBlock * stacked * sizeof(float) > dim * kKeyStride * sizeof(float)) return false;
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
  size_t lane, count;
  size_t row;  // of its first lane, counted from the split's first
};

// Those of rows [from, to), all of one type, of the split that begins with row `begin`.
size_t ListParts(const AttentionView& view, size_t begin, size_t from, size_t to, TilePart* parts) {
  size_t n_parts = 0;
  ForEachPiece(view.values, from, to, [&](const RowSpan& span, size_t slot, size_t n, size_t row) {
    const size_t tile_bytes = TileBytes(span.format.type, view.head_dim);
    while (n > 0) {
      const size_t lane = slot % kTileRows, count = Min(n, kTileRows - lane);
      parts[n_parts++] = {span.rows + slot / kTileRows * tile_bytes, lane, count, row - begin};
      slot += count;
      row += count;
      n -= count;
    }
  });
  return n_parts;
}

// A query's weights times the rows' scales for one block of channels: [part][lane], 0 in the lanes of other rows.
struct CodedWeights {
  alignas(16) int8_t high[kWeightRows * kTileRows];
  alignas(16) int8_t low[kWeightRows * kTileRows];
  float unit;
};

void CodeWeights(const TilePart* parts, size_t n_parts, size_t block, const float* p, CodedWeights& out) {
  alignas(16) float scaled[kWeightRows * kTileRows];
  Fill(scaled, n_parts * kTileRows, 0);
  for (size_t i = 0; i < n_parts; ++i) {
    const TilePart& part = parts[i];
    const uint16_t* scales = TileScales(part.tile) + block * kTileRows + part.lane;
    float* to = scaled + i * kTileRows + part.lane;
    for (size_t r = 0; r < part.count; ++r) to[r] = p[part.row + r] * HalfToFloat(scales[r]);
  }
  out.unit = CodeNumbers(scaled, n_parts * kTileRows, out.high, out.low);
}

// out[m * out_stride + c] += sum over the parts' rows of weight * scale * code, for the 16 channels of half a block.
template <RowType kType, int MB>
inline void AddHalfBlock(const TilePart* parts, size_t n_parts, size_t dim, size_t block, size_t half,
                         const CodedWeights* weights, float* out, size_t out_stride) {
  VI high[MB][kTileFours], low[MB][kTileFours];
  for (int m = 0; m < MB; ++m) {
    for (size_t v = 0; v < kTileFours; ++v) high[m][v] = low[m][v] = hn::Zero(DI());
  }
  const size_t c = block * kQuantBlock + half * 16;
  for (size_t i = 0; i < n_parts; ++i) {
    for (size_t lane = 0; lane < kTileRows; lane += 4) {
      const uint8_t* codes =
          TileCodes(parts[i].tile, dim) + (kType == RowType::kQ8 ? Q8ValueCode(c, lane) : Q4ValueByte(c, lane));
      for (size_t v = 0; v < kTileFours; ++v) {
        const VI8 code = LoadCodes<kType>(codes + v * 16, half == 1);
        for (int m = 0; m < MB; ++m) {
          high[m][v] = AddProducts(high[m][v], code, Broadcast4(weights[m].high + i * kTileRows + lane));
          low[m][v] = AddProducts(low[m][v], code, Broadcast4(weights[m].low + i * kTileRows + lane));
        }
      }
    }
  }
  for (int m = 0; m < MB; ++m) {
    for (size_t v = 0; v < kTileFours; ++v) {
      float* to = out + static_cast<size_t>(m) * out_stride + c + v * kW;
      Store(to, Fma(FromCoded(high[m][v], low[m][v]), Splat(weights[m].unit), Load(to)));
    }
  }
}

template <RowType kType, int MB>
void AddParts(const TilePart* parts, size_t n_parts, size_t dim, const float* p, float* out) {
  CodedWeights weights[MB];
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    for (int m = 0; m < MB; ++m) CodeWeights(parts, n_parts, block, p + m * kSplitStride, weights[m]);
    for (size_t half = 0; half < 2; ++half)
      AddHalfBlock<kType, MB>(parts, n_parts, dim, block, half, weights, out, Padded(dim));
  }
}

template <RowType kType>
void CodedValues(const AttentionView& view, const DecodeScratch& s, size_t begin, size_t end, size_t stacked) {
  const size_t dim = view.head_dim;
  TilePart parts[kWeightRows];
  for (size_t from = begin; from < end;) {
    const size_t to = Min(end, Up(from + 1, kWeightRows));
    const size_t n_parts = ListParts(view, s.begin, from, to, parts);
    for (size_t m = 0; m < stacked; m += 2) {
      const float* p = s.scores + m * kSplitStride;
      float* out = s.out + m * Padded(dim);
      WithCount<2>(stacked - m, [&](auto count) { AddParts<kType, count.value>(parts, n_parts, dim, p, out); });
    }
    from = to;
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
