#include "kernels/rows/group_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <type_traits>

#include "base/check.h"
#include "kernels/basic/basic.h"
#include "kernels/basic/cpu.h"
#include "kernels/quants/half.h"

// Levels below AVX2 run the scalar kernels (cpu.h), and those above AVX-512 have nothing more for this file: fewer
// targets, since each costs seconds to compile.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)

// clang-format off: this file is included again for each target, before the headers below it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rows/group_codes.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// clang-format on

#ifndef LESSKV_GROUP_CODES_LAYOUT
#define LESSKV_GROUP_CODES_LAYOUT
namespace lesskv {
namespace {

constexpr size_t kMostChannels = kMostGroupedChannels;
constexpr size_t kMostRows = 256;  // of a group of keys
constexpr size_t kWeightRows = 128;  // whose weights are rounded relative to their largest
constexpr size_t kQuad = 4;  // codes that a byte each of a lane holds

// Codes along the summed-up side that share a word (and, of 3 bits, its tail).
constexpr size_t CodesAWord(size_t bits) { return bits == 4 ? 8 : 16; }
constexpr size_t QuadsAWord(size_t bits) { return CodesAWord(bits) / kQuad; }
constexpr size_t WordBits(size_t bits) { return bits == 4 ? 4 : 2; }  // of a code: the third bit is in the tail

// Queries and weights are rounded relative to the largest to two signed bytes, high * 128 + low.
constexpr size_t kParts = 2;
constexpr float kMost = 127 * 128;

// The parts of a unit.
struct Unit {
  const uint32_t* words;
  const uint16_t* tails;  // one a word where codes have 3 bits
  const uint16_t* scales;
  const uint16_t* minima;
};

// Units of one format and where their parts lie, worked out once a call: divisions cost as much as a unit's products.
struct UnitRun {
  const std::byte* units;
  size_t unit_bytes;
  size_t bits, group, dim;
  size_t n_parameters, n_words;

  Unit At(size_t index) const {
    const auto* scales = reinterpret_cast<const uint16_t*>(units + index * unit_bytes);
    const auto* words = reinterpret_cast<const uint32_t*>(scales + 2 * n_parameters);
    return {words, reinterpret_cast<const uint16_t*>(words + n_words), scales, scales + n_parameters};
  }
};

}  // namespace
}  // namespace lesskv
#endif

HWY_BEFORE_NAMESPACE();
namespace lesskv {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
using DI = hn::Rebind<int32_t, D>;
using VI = hn::Vec<DI>;
using DU = hn::Rebind<uint32_t, D>;
using VU = hn::Vec<DU>;
using DHalf = hn::Rebind<hwy::float16_t, D>;

constexpr size_t kLanes = hn::MaxLanes(D());
static_assert(kLanes <= 16);

HWY_INLINE V LoadHalf(const uint16_t* p) {
  return hn::PromoteTo(D(), hn::LoadU(DHalf(), reinterpret_cast<const hwy::float16_t*>(p)));
}

// Sums of products of codes with lists of signed bytes, four neighbours in a 32-bit lane. Without an instruction for that
// x86 adds them up in 16 bits, which hold the products of WordsAFlush words, and then in 32.
#undef LESSKV_QUAD_TARGET
#if HWY_TARGET == HWY_AVX3
#define LESSKV_QUAD_TARGET __attribute__((target(HWY_TARGET_STR ",avx512vnni")))
using Sums = int32_t __attribute__((vector_size(64)));
constexpr bool kSumsIn16 = false;

// The instruction set level promises VNNI where it lets Highway have AVX-512 (cpu.h).
HWY_INLINE LESSKV_QUAD_TARGET void AddQuads(VU codes, VI list, Sums& sums) {
  sums = __builtin_bit_cast(Sums, _mm512_dpbusd_epi32(__builtin_bit_cast(__m512i, sums), codes.raw, list.raw));
}
HWY_INLINE VI Total(Sums sums) { return VI{__builtin_bit_cast(__m512i, sums)}; }
#elif HWY_TARGET == HWY_AVX2
#define LESSKV_QUAD_TARGET
using Sums = int16_t __attribute__((vector_size(32)));
constexpr bool kSumsIn16 = true;

HWY_INLINE void AddQuads(VU codes, VI list, Sums& sums) {
  sums += __builtin_bit_cast(Sums, _mm256_maddubs_epi16(codes.raw, list.raw));
}
HWY_INLINE VI Total(Sums sums) {
  return VI{_mm256_madd_epi16(__builtin_bit_cast(__m256i, sums), _mm256_set1_epi16(1))};
}
#else
#define LESSKV_QUAD_TARGET
using Sums = VI;
constexpr bool kSumsIn16 = false;

HWY_INLINE void AddQuads(VU codes, VI list, Sums& sums) {
#if HWY_ARCH_ARM_A64
  const int8x16_t c = vreinterpretq_s8_u32(codes.raw), x = vreinterpretq_s8_s32(list.raw);
  sums.raw = vpadalq_s16(sums.raw, vpaddq_s16(vmull_s8(vget_low_s8(c), vget_low_s8(x)), vmull_high_s8(c, x)));
#else
  const DU du;
  const DI di;
  for (int shift = 0; shift < 32; shift += 8) {
    const VI code = hn::BitCast(di, hn::And(hn::ShiftRightSame(codes, shift), hn::Set(du, 0xffu)));
    sums = hn::Add(sums, hn::Mul(code, hn::ShiftRight<24>(hn::ShiftLeftSame(list, 24 - shift))));
  }
#endif
}
HWY_INLINE VI Total(Sums sums) { return sums; }
#endif

HWY_INLINE Sums NoSums() { return __builtin_bit_cast(Sums, hn::Zero(DI()).raw); }

// Words whose products 16 bits hold: 2 * 127 * the largest code a quad.
constexpr size_t WordsAFlush(size_t bits) {
  return 32767 / (2 * 127 * ((size_t{1} << bits) - 1)) / QuadsAWord(bits);
}
// What is multiplied at once: as many sums as registers hold, of lists and of columns.
constexpr size_t kMostLists = kLanes == 16 ? 8 : 4;
constexpr size_t kMostColumns = kLanes == 16 ? 32 : 16;

// Calls f(first, how many at compile time) for pieces of n columns, a multiple of 16.
template <typename F>
HWY_INLINE void ForColumns(size_t n, F&& f) {
  size_t c = 0;
  for (; c + kMostColumns <= n; c += kMostColumns) f(c, std::integral_constant<size_t, kMostColumns>());
  if (c < n) f(c, std::integral_constant<size_t, 16>());
}

// The third bits of the 16 codes of a word: bit 2 of the bytes of the first quad, bit 3 of the second's, and so on.
HWY_INLINE VU HighBits(const uint16_t* tails) {
  const DU du;
  const VU tail = hn::PromoteTo(du, hn::LoadU(hn::Rebind<uint16_t, DU>(), tails));
  const VU bytes = hn::And(hn::Or(tail, hn::ShiftLeft<8>(tail)), hn::Set(du, 0x00ff00ffu));
  return hn::ShiftLeft<2>(hn::And(hn::Or(bytes, hn::ShiftLeft<4>(bytes)), hn::Set(du, 0x0f0f0f0fu)));
}

// Adds the products of the lists, which are list_stride bytes apart, with the codes of one word (and its tail) in each lane.
template <size_t kBits, size_t kLists, size_t kVectors>
HWY_INLINE LESSKV_QUAD_TARGET void AddWord(const uint32_t* words, const uint16_t* tails, const int8_t* lists,
                                           size_t list_stride, Sums (&sum)[kLists][kVectors]) {
  const DU du;
  constexpr uint32_t kMask = ((1u << WordBits(kBits)) - 1) * 0x01010101u;
  VU word[kVectors], high[kVectors];
  for (size_t v = 0; v < kVectors; ++v) {
    word[v] = hn::LoadU(du, words + v * kLanes);
    if constexpr (kBits == 3) high[v] = HighBits(tails + v * kLanes);
  }
  for (size_t quad = 0; quad < QuadsAWord(kBits); ++quad) {
    VU code[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      code[v] = hn::And(word[v], hn::Set(du, kMask));
      word[v] = hn::ShiftRight<static_cast<int>(WordBits(kBits))>(word[v]);
      if constexpr (kBits == 3) {
        code[v] = hn::OrAnd(code[v], high[v], hn::Set(du, 0x04040404u));
        high[v] = hn::ShiftRight<1>(high[v]);
      }
    }
    for (size_t l = 0; l < kLists; ++l) {
      int32_t four;
      hwy::CopyBytes<4>(lists + l * list_stride + quad * kQuad, &four);
      const VI list = hn::Set(DI(), four);
      for (size_t v = 0; v < kVectors; ++v) AddQuads(code[v], list, sum[l][v]);
    }
  }
}

// sums[l * columns + i] += products of list l with the codes of column i: n_units times n_words words (and their tails), those
// of a column `pitch` apart, units unit_bytes; of the lists, which are list_stride apart, the first kLists.
template <size_t kBits, size_t kLists, size_t kColumns>
HWY_NOINLINE LESSKV_QUAD_TARGET void SumQuads(const uint32_t* words, const uint16_t* tails, size_t pitch, size_t n_words,
                                              size_t unit_bytes, size_t n_units, const int8_t* lists, size_t list_stride,
                                              int32_t* HWY_RESTRICT sums) {
  const DI di;
  constexpr size_t kVectors = kColumns / kLanes;
  Sums sum[kLists][kVectors];
  for (size_t l = 0; l < kLists; ++l)
    for (size_t v = 0; v < kVectors; ++v) sum[l][v] = NoSums();
  size_t left = WordsAFlush(kBits);
  for (size_t u = 0; u < n_units; ++u, words += unit_bytes / 4, tails += unit_bytes / 2)
    for (size_t w = 0; w < n_words; ++w, lists += CodesAWord(kBits)) {
      if (kSumsIn16 && left-- == 0) {
        for (size_t l = 0; l < kLists; ++l)
          for (size_t v = 0; v < kVectors; ++v) {
            int32_t* to = sums + l * kColumns + v * kLanes;
            hn::Store(hn::Add(hn::Load(di, to), Total(sum[l][v])), di, to);
            sum[l][v] = NoSums();
          }
        left = WordsAFlush(kBits) - 1;
      }
      AddWord<kBits, kLists, kVectors>(words + w * pitch, tails + w * pitch, lists, list_stride, sum);
    }
  for (size_t l = 0; l < kLists; ++l)
    for (size_t v = 0; v < kVectors; ++v) {
      int32_t* to = sums + l * kColumns + v * kLanes;
      hn::Store(kSumsIn16 ? hn::Add(hn::Load(di, to), Total(sum[l][v])) : Total(sum[l][v]), di, to);
    }
}

// The same for any number of lists, into sums that hold nothing yet.
template <size_t kBits, size_t kLists, size_t kColumns>
HWY_INLINE void SumLists(const uint32_t* words, const uint16_t* tails, size_t pitch, size_t n_words, size_t unit_bytes,
                         size_t n_units, const int8_t* lists, size_t list_stride, int32_t* HWY_RESTRICT sums) {
  constexpr size_t kNow = kLists < kMostLists ? kLists : kMostLists;
  for (size_t i = 0; kSumsIn16 && i < kLists * kColumns; i += kLanes) hn::Store(hn::Zero(DI()), DI(), sums + i);
  for (size_t l = 0; l < kLists; l += kNow)
    SumQuads<kBits, kNow, kColumns>(words, tails, pitch, n_words, unit_bytes, n_units, lists + l * list_stride, list_stride,
                                    sums + l * kColumns);
}

struct MaxOf {
  template <class DV>
  HWY_INLINE hn::Vec<DV> operator()(DV, hn::Vec<DV> a, hn::Vec<DV> b) const { return hn::Max(a, b); }
};
struct SumOf {
  template <class DV>
  HWY_INLINE hn::Vec<DV> operator()(DV, hn::Vec<DV> a, hn::Vec<DV> b) const { return hn::Add(a, b); }
};

// out[m] = Op over the lanes of v[m].
#if HWY_TARGET == HWY_SCALAR
template <class Op>
HWY_INLINE void OverLanes(const V (&v)[4], float* HWY_RESTRICT out) {
  for (size_t m = 0; m < 4; ++m) out[m] = hn::GetLane(v[m]);
}
#else
using D4 = hn::CappedTag<float, 4>;

template <class Op, class DV>
HWY_INLINE hn::Vec<D4> ToFour(DV, hn::Vec<DV> v) {
  if constexpr (hn::MaxLanes(DV()) == 4) {
    return v;
  } else {
    const hn::Half<DV> half;
    return ToFour<Op>(half, Op()(half, hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}
template <class Op>
HWY_INLINE void OverLanes(const V (&v)[4], float* HWY_RESTRICT out) {
  const D4 d;
  const Op op;
  const auto a = ToFour<Op>(D(), v[0]), b = ToFour<Op>(D(), v[1]), c = ToFour<Op>(D(), v[2]), e = ToFour<Op>(D(), v[3]);
  const auto ab = op(d, hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const auto ce = op(d, hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  hn::Store(op(d, hn::ConcatLowerLower(d, ce, ab), hn::ConcatUpperUpper(d, ce, ab)), d, out);
}
#endif

// Numbers rounded, [query][part][kRoom].
template <size_t kRoom>
struct Rounded {
  HWY_ALIGN int8_t codes[4 * 2][kRoom];
  HWY_ALIGN float worth[4];  // of a code
  HWY_ALIGN float start[4];  // what is added to a sum: the minima's part of it
};

constexpr float kRounding = 12582912;

// The lowest byte of each lane.
HWY_INLINE void StoreBytes(VU lanes, int8_t* to) {
  const hn::Rebind<uint8_t, D> d8;
  hn::StoreU(hn::TruncateTo(d8, lanes), d8, reinterpret_cast<uint8_t*>(to));
}

// MB lists of n numbers (whole vectors), `stride` apart, times scales and rounded relative to the largest of each list.
template <size_t MB, size_t kRoom>
HWY_INLINE void Round(const float* numbers, size_t stride, const float* scales, const float* minima, size_t n,
                      Rounded<kRoom>& out) {
  const D d;
  HWY_ALIGN float scaled[MB][kRoom];
  V largest[4], start[4];
  for (size_t m = 0; m < 4; ++m) largest[m] = start[m] = hn::Zero(d);
  for (size_t i = 0; i < n; i += kLanes) {
    const V scale = hn::Load(d, scales + i), minimum = hn::Load(d, minima + i);
    for (size_t m = 0; m < MB; ++m) {
      const V number = hn::LoadU(d, numbers + m * stride + i), x = hn::Mul(number, scale);
      start[m] = hn::MulAdd(number, minimum, start[m]);
      largest[m] = hn::Max(largest[m], hn::Abs(x));
      hn::Store(x, d, scaled[m] + i);
    }
  }
  HWY_ALIGN float most[4];
  OverLanes<MaxOf>(largest, most);
  OverLanes<SumOf>(start, out.start);
  for (size_t m = 0; m < MB; ++m) {
    out.worth[m] = most[m] / kMost;
    const V inverse = hn::Set(d, most[m] > 0 ? kMost / most[m] : 0.0f);
    int8_t* high = out.codes[m * kParts];
    int8_t* low = out.codes[m * kParts + 1];
    for (size_t i = 0; i < n; i += kLanes) {
      // Added to 1.5 * 2^23 a number is rounded to a whole one, which lies in the lowest bits.
      const VU code = hn::BitCast(DU(), hn::MulAdd(hn::Load(d, scaled[m] + i), inverse, hn::Set(d, kRounding)));
      StoreBytes(hn::ShiftRight<7>(code), high + i);
      StoreBytes(hn::And(code, hn::Set(DU(), 127u)), low + i);
    }
  }
}

// n halves at a time, whole vectors.
HWY_INLINE void LoadHalves(const uint16_t* from, size_t n, float* to) {
  for (size_t i = 0; i < n; i += kLanes) hn::Store(LoadHalf(from + i), D(), to + i);
}

// The sums of query m in the columns from i on, as floats.
template <size_t kColumns>
HWY_INLINE V Products(const int32_t* sums, size_t m, size_t i, float worth) {
  const DI di;
  const VI high = hn::Load(di, sums + m * kParts * kColumns + i), low = hn::Load(di, sums + (m * kParts + 1) * kColumns + i);
  const VI sum = hn::Add(hn::ShiftLeft<7>(high), low);
  return hn::Mul(hn::ConvertTo(D(), sum), hn::Set(D(), worth));
}

// Of so many that are left: there are kernels for 4, 2 and 1.
constexpr size_t QueriesAtOnce(size_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// ---- Keys

using RoundedQueries = Rounded<kMostChannels>;

// Scores of one whole group, [m * stride + row].
template <size_t kBits, size_t MB>
void ScoreGroup(const Unit& unit, size_t group, size_t dim, const RoundedQueries& q, float* scores, size_t stride) {
  const D d;
  HWY_ALIGN int32_t sums[MB * kParts * kMostColumns];
  ForColumns(group, [&](size_t t, auto columns) {
    SumLists<kBits, MB * kParts, columns>(unit.words + t, unit.tails + t, group, dim / CodesAWord(kBits), 0, 1, q.codes[0],
                                          kMostChannels, sums);
    for (size_t m = 0; m < MB; ++m)
      for (size_t i = 0; i < columns; i += kLanes)
        hn::StoreU(hn::Add(Products<columns>(sums, m, i, q.worth[m]), hn::Set(d, q.start[m])), d,
                   scores + m * stride + t + i);
  });
}

template <size_t kBits, size_t MB>
void ScoreRows(const UnitRun& run, size_t first, size_t n, const float* queries, float* scores,
               size_t stride) {
  RoundedQueries rounded;
  HWY_ALIGN float scales[kMostChannels], minima[kMostChannels];
  HWY_ALIGN float apart[4 * kMostRows];
  size_t index = first / run.group, unit_row = index * run.group;
  for (size_t row = first; row < first + n; ++index, unit_row += run.group) {
    const Unit unit = run.At(index);
    LoadHalves(unit.scales, run.dim, scales);
    LoadHalves(unit.minima, run.dim, minima);
    Round<MB>(queries, kMostChannels, scales, minima, run.dim, rounded);
    const size_t end = std::min(first + n, unit_row + run.group);
    if (row == unit_row && end == unit_row + run.group) {
      ScoreGroup<kBits, MB>(unit, run.group, run.dim, rounded, scores + (row - first), stride);
    } else {
      ScoreGroup<kBits, MB>(unit, run.group, run.dim, rounded, apart, run.group);
      for (size_t m = 0; m < MB; ++m)
        for (size_t r = row; r < end; ++r) scores[m * stride + r - first] = apart[m * run.group + r - unit_row];
    }
    row = end;
  }
}

// Four queries whose channels alternate, one behind the other.
void Unstack(const float* q, size_t dim, float* out) {
  const D d;
  for (size_t c = 0; c < dim; c += kLanes) {
    V query[4];
    hn::LoadInterleaved4(d, q + c * 4, query[0], query[1], query[2], query[3]);
    for (size_t m = 0; m < 4; ++m) hn::Store(query[m], d, out + m * kMostChannels + c);
  }
}

template <size_t kBits>
void ScoreAll(const UnitRun& run, size_t first, size_t n, const float* q, size_t stacked,
              float* scores, size_t stride) {
  HWY_ALIGN float queries[4 * kMostChannels];
  for (size_t m = 0, count; m < stacked; m += count) {
    count = QueriesAtOnce(stacked - m);
    if (stacked == 4) {
      Unstack(q, run.dim, queries);
    } else {
      for (size_t i = 0; i < count; ++i)
        for (size_t c = 0; c < run.dim; ++c) queries[i * kMostChannels + c] = q[c * stacked + m + i];
    }
    float* to = scores + m * stride;
    switch (count) {
      case 1: ScoreRows<kBits, 1>(run, first, n, queries, to, stride); break;
      case 2: ScoreRows<kBits, 2>(run, first, n, queries, to, stride); break;
      default: ScoreRows<kBits, 4>(run, first, n, queries, to, stride); break;
    }
  }
}

void SimdScores(const UnitRun& run, size_t first, size_t n, const float* q, size_t stacked,
                float* scores, size_t stride) {
  switch (run.bits) {
    case 2: return ScoreAll<2>(run, first, n, q, stacked, scores, stride);
    case 3: return ScoreAll<3>(run, first, n, q, stacked, scores, stride);
    default: return ScoreAll<4>(run, first, n, q, stacked, scores, stride);
  }
}

// ---- Values

using RoundedWeights = Rounded<kWeightRows>;

// Up to kWeightRows rows that lie in the same aligned block of as many.
template <size_t kBits, size_t MB>
void AddBlock(const UnitRun& run, size_t row, size_t n, const float* weights, size_t stride,
              float* out, size_t out_stride) {
  const D d;
  const size_t first = row / kTileRows, lane = row % kTileRows, n_units = (lane + n + kTileRows - 1) / kTileRows;
  HWY_ALIGN float padded[MB * kWeightRows];
  if (lane > 0 || n < n_units * kTileRows) {
    std::fill_n(padded, MB * kWeightRows, 0.0f);
    for (size_t m = 0; m < MB; ++m) std::copy_n(weights + m * stride, n, padded + m * kWeightRows + lane);
    weights = padded;
    stride = kWeightRows;
  }
  const Unit unit = run.At(first);
  RoundedWeights rounded;
  HWY_ALIGN float scales[kWeightRows], minima[kWeightRows];
  HWY_ALIGN int32_t sums[MB * kParts * kMostColumns];
  for (size_t g = 0; g < run.dim / run.group; ++g) {
    for (size_t u = 0; u < n_units; ++u) {
      const Unit at = run.At(first + u);
      LoadHalves(at.scales + g * kTileRows, kTileRows, scales + u * kTileRows);
      LoadHalves(at.minima + g * kTileRows, kTileRows, minima + u * kTileRows);
    }
    Round<MB>(weights, stride, scales, minima, n_units * kTileRows, rounded);
    ForColumns(run.group, [&](size_t in_group, auto columns) {
      const size_t c = g * run.group + in_group;
      SumLists<kBits, MB * kParts, columns>(unit.words + c, unit.tails + c, run.dim, kTileRows / CodesAWord(kBits),
                                                  run.unit_bytes, n_units, rounded.codes[0], kWeightRows, sums);
      for (size_t m = 0; m < MB; ++m)
        for (size_t i = 0; i < columns; i += kLanes) {
          float* to = out + m * out_stride + c + i;
          const V old = hn::Add(hn::LoadU(d, to), hn::Set(d, rounded.start[m]));
          hn::StoreU(hn::Add(Products<columns>(sums, m, i, rounded.worth[m]), old), d, to);
        }
    });
  }
}

template <size_t kBits, size_t MB>
void AddRows(const UnitRun& run, size_t first, size_t n, const float* weights, size_t stride,
             float* out, size_t out_stride) {
  for (size_t row = first; row < first + n;) {
    const size_t count = std::min(first + n, (row / kWeightRows + 1) * kWeightRows) - row;
    AddBlock<kBits, MB>(run, row, count, weights + (row - first), stride, out, out_stride);
    row += count;
  }
}

template <size_t kBits>
void AddAll(const UnitRun& run, size_t first, size_t n, const float* weights, size_t stride,
            size_t stacked, float* out, size_t out_stride) {
  for (size_t m = 0, count; m < stacked; m += count) {
    count = QueriesAtOnce(stacked - m);
    const float* w = weights + m * stride;
    float* to = out + m * out_stride;
    switch (count) {
      case 1: AddRows<kBits, 1>(run, first, n, w, stride, to, out_stride); break;
      case 2: AddRows<kBits, 2>(run, first, n, w, stride, to, out_stride); break;
      default: AddRows<kBits, 4>(run, first, n, w, stride, to, out_stride); break;
    }
  }
}

void SimdAddValues(const UnitRun& run, size_t first, size_t n, const float* weights, size_t stride,
                   size_t stacked, float* out, size_t out_stride) {
  switch (run.bits) {
    case 2: return AddAll<2>(run, first, n, weights, stride, stacked, out, out_stride);
    case 3: return AddAll<3>(run, first, n, weights, stride, stacked, out, out_stride);
    default: return AddAll<4>(run, first, n, weights, stride, stacked, out, out_stride);
  }
}

// ---- Expansion

// The codes at one place of the words from `words` on.
HWY_INLINE VU CodesAt(const UnitRun& run, const uint32_t* words, const uint16_t* tails, size_t place) {
  const DU du;
  const size_t byte = place % kQuad * 8, quad = place / kQuad, bits = WordBits(run.bits);
  const VU mask = hn::Set(du, (1u << bits) - 1);
  const VU code = hn::And(hn::ShiftRightSame(hn::LoadU(du, words), static_cast<int>(byte + quad * bits)), mask);
  if (run.bits != 3) return code;
  return hn::OrAnd(code, hn::ShiftRightSame(HighBits(tails), static_cast<int>(byte + quad)), hn::Set(du, 4u));
}

HWY_INLINE V Decode(VU codes, V scale, V minimum) {
  return hn::MulAdd(hn::ConvertTo(D(), hn::BitCast(DI(), codes)), scale, minimum);
}

// Whole tiles of 16 rows of one unit.
void SimdExpandKeys(const UnitRun& run, size_t index, size_t row, size_t n, float* out, size_t stride) {
  const D d;
  const Unit unit = run.At(index);
  const size_t codes = CodesAWord(run.bits);
  for (size_t c = 0; c < run.dim; ++c) {
    const V scale = hn::Set(d, HalfToFloat(unit.scales[c])), minimum = hn::Set(d, HalfToFloat(unit.minima[c]));
    const size_t word = c / codes * run.group + row;
    for (size_t i = 0; i < n; i += kLanes)
      hn::StoreU(Decode(CodesAt(run, unit.words + word + i, unit.tails + word + i, c % codes), scale, minimum), d,
                 out + c * stride + i);
  }
}

void SimdExpandValue(const UnitRun& run, size_t index, size_t lane, float* out) {
  const D d;
  const Unit unit = run.At(index);
  const size_t codes = CodesAWord(run.bits), word = lane / codes * run.dim;
  for (size_t c = 0; c < run.dim; c += kLanes) {
    const size_t parameter = c / run.group * kTileRows + lane;
    hn::StoreU(Decode(CodesAt(run, unit.words + word + c, unit.tails + word + c, lane % codes),
                      hn::Set(d, HalfToFloat(unit.scales[parameter])), hn::Set(d, HalfToFloat(unit.minima[parameter]))),
               d, out + c);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace lesskv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lesskv {
namespace {

HWY_EXPORT(SimdScores);
HWY_EXPORT(SimdAddValues);
HWY_EXPORT(SimdExpandKeys);
HWY_EXPORT(SimdExpandValue);

UnitRun Run(const GroupFormat& f, const std::byte* units) {
  return {units, UnitBytes(f), f.bits, f.group, f.head_dim, f.side == RowSide::kKeys ? f.head_dim : f.head_dim / f.group * kTileRows,
          f.unit_rows() * f.head_dim / CodesAWord(f.bits)};
}

// ---- The scalar reference: one number at a time

uint32_t CodeAt(const GroupFormat& f, const Unit& unit, size_t word, size_t place) {
  const size_t byte = place % kQuad, quad = place / kQuad, bits = WordBits(f.bits);
  const uint32_t code = unit.words[word] >> (byte * 8 + quad * bits) & ((1u << bits) - 1);
  return f.bits == 3 ? code | (unit.tails[word] >> (byte * 4 + quad) & 1u) << 2 : code;
}

float KeyAt(const GroupFormat& f, const std::byte* units, size_t row, size_t c) {
  const Unit unit = Run(f, units).At(row / f.group);
  const size_t codes = CodesAWord(f.bits);
  const uint32_t code = CodeAt(f, unit, c / codes * f.group + row % f.group, c % codes);
  return static_cast<float>(code) * HalfToFloat(unit.scales[c]) + HalfToFloat(unit.minima[c]);
}

float ValueAt(const GroupFormat& f, const std::byte* units, size_t row, size_t c) {
  const Unit unit = Run(f, units).At(row / kTileRows);
  const size_t codes = CodesAWord(f.bits), lane = row % kTileRows, parameter = c / f.group * kTileRows + lane;
  const uint32_t code = CodeAt(f, unit, lane / codes * f.head_dim + c, lane % codes);
  return static_cast<float>(code) * HalfToFloat(unit.scales[parameter]) + HalfToFloat(unit.minima[parameter]);
}

void ScalarScores(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* q, size_t stacked,
                  float* scores, size_t stride) {
  for (size_t i = 0; i < n; ++i) {
    for (size_t m = 0; m < stacked; ++m) scores[m * stride + i] = 0;
    for (size_t c = 0; c < f.head_dim; ++c) {
      const float key = KeyAt(f, units, first + i, c);
      for (size_t m = 0; m < stacked; ++m) scores[m * stride + i] += q[c * stacked + m] * key;
    }
  }
}

void ScalarAddValues(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* weights,
                     size_t stride, size_t stacked, float* out, size_t out_stride) {
  for (size_t i = 0; i < n; ++i)
    for (size_t c = 0; c < f.head_dim; ++c) {
      const float value = ValueAt(f, units, first + i, c);
      for (size_t m = 0; m < stacked; ++m) out[m * out_stride + c] += weights[m * stride + i] * value;
    }
}

// ---- Keys that are their means

const uint16_t* Means(const GroupFormat& f, const std::byte* units, size_t row) {
  return reinterpret_cast<const uint16_t*>(units) + row / f.group * f.head_dim;
}

// Calls f(means, first row from `first` on, how many) for the groups of rows [first, first + n).
template <typename F>
void ForMeans(const GroupFormat& format, const std::byte* units, size_t first, size_t n, F&& f) {
  for (size_t i = 0, count; i < n; i += count) {
    count = std::min(n - i, format.group - (first + i) % format.group);
    float means[kMostChannels];
    F16ToF32(Means(format, units, first + i), format.head_dim, means);
    f(means, i, count);
  }
}

void WriteMeans(const GroupFormat& f, std::byte* at, const float* keys) {
  auto* means = reinterpret_cast<uint16_t*>(at);
  for (size_t c = 0; c < f.head_dim; ++c) {
    float sum = 0;
    for (size_t t = 0; t < f.group; ++t) sum += keys[t * f.head_dim + c];
    means[c] = FloatToHalf(sum / static_cast<float>(f.group));
  }
}

void ScoreMeans(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* q, size_t stacked,
                float* scores, size_t stride) {
  ForMeans(f, units, first, n, [&](const float* means, size_t i, size_t count) {
    for (size_t m = 0; m < stacked; ++m) {
      float score = 0;
      for (size_t c = 0; c < f.head_dim; ++c) score += q[c * stacked + m] * means[c];
      std::fill_n(scores + m * stride + i, count, score);
    }
  });
}

// ---- Encoding

// The stored parameters of a group, and its codes.
struct Encoder {
  uint16_t scale = 0, minimum = 0;
  float step = 0, base = 0, most;

  // A constant group has scale 0 and is its minimum; one that holds NaN is NaN.
  Encoder(std::span<const float> x, size_t bits, GroupFit fit) : most(static_cast<float>((1u << bits) - 1)) {
    float low = x[0], high = x[0];
    bool numbers = true;
    for (const float v : x) {
      low = std::min(low, v);
      high = std::max(high, v);
      numbers = numbers && v == v;
    }
    if (!numbers) low = high = std::nanf("");
    Store((high - low) / most, low);
    if (fit == GroupFit::kFitted && step > 0) Fit(x, low, high);
  }

  float Code(float x) const {
    return step == 0 ? 0 : std::nearbyint(std::max(0.0f, std::min(most, (x - base) / step)));
  }

 private:
  void Store(float new_step, float new_base) {
    minimum = FloatToHalf(new_base);
    base = HalfToFloat(minimum);
    scale = std::isnan(base) ? uint16_t{0} : FloatToHalf(new_step);
    step = HalfToFloat(scale);
    if (!std::isfinite(step) || !std::isfinite(base)) scale = 0, step = 0;
  }

  // The best parameters for the codes, then the codes for these, and so on. It starts from a narrower range, as three
  // rounds from the whole one end farther from the least error.
  void Fit(std::span<const float> x, float low, float high) {
    const float cut = (high - low) / (most + 1) / 2;
    const Encoder extremes = *this;
    Store((high - low - 2 * cut) / most, low + cut);
    for (int i = 0; i < 3; ++i) Regress(x, false);
    Regress(x, true);
    if (step == 0) *this = extremes;  // beyond the range of f16
  }

  // The line of numbers over codes with the least squared error; or, unbiased, of codes over numbers.
  void Regress(std::span<const float> x, bool unbiased) {
    const auto n = static_cast<float>(x.size());
    float sum_x = 0, sum_code = 0, xx = 0, x_code = 0, code_code = 0;
    for (const float v : x) {
      const float from_base = v - base, code = Code(v);
      sum_x += from_base;
      sum_code += code;
      xx += from_base * from_base;
      x_code += from_base * code;
      code_code += code * code;
    }
    const float both = n * x_code - sum_x * sum_code;
    const float above = unbiased ? n * xx - sum_x * sum_x : both;
    const float below = unbiased ? both : n * code_code - sum_code * sum_code;
    if (!(above > 0) || !(below > 0)) return;
    const float new_step = above / below;
    Store(new_step, base + (sum_x - new_step * sum_code) / n);
  }
};

template <typename T>
void PutBits(const T& word, size_t bit, size_t n, uint32_t bits) {
  const auto mask = ((1u << n) - 1) << bit;
  const_cast<T&>(word) = static_cast<T>((word & ~mask) | bits << bit);
}

void PutCode(const GroupFormat& f, const Unit& unit, size_t word, size_t place, uint32_t code) {
  const size_t byte = place % kQuad, quad = place / kQuad, bits = WordBits(f.bits);
  PutBits(unit.words[word], byte * 8 + quad * bits, bits, code & ((1u << bits) - 1));
  if (f.bits == 3) PutBits(unit.tails[word], byte * 4 + quad, 1, code >> 2);
}

}  // namespace

bool Supports(const GroupFormat& f) {
  const bool means = f.bits == 0 && f.side == RowSide::kKeys;
  return (means || (f.bits >= 2 && f.bits <= 4)) && f.group > 0 && f.group % 16 == 0 && f.group <= kMostRows && f.head_dim > 0 &&
         f.head_dim % (f.side == RowSide::kKeys ? kGroupedChannels : f.group) == 0 && f.head_dim <= kMostChannels;
}

size_t UnitBytes(const GroupFormat& f) {
  CHECK(Supports(f), "{} channels in groups of {} with {} bits", f.head_dim, f.group, f.bits);
  if (f.bits == 0) return f.head_dim * sizeof(uint16_t);
  return f.unit_rows() * f.head_dim * (f.bits * f.group + 32) / f.group / 8;
}

void WriteKeyUnit(const GroupFormat& f, std::byte* at, const float* keys) {
  if (f.bits == 0) return WriteMeans(f, at, keys);
  const Unit unit = Run(f, at).At(0);
  const size_t codes = CodesAWord(f.bits);
  std::memset(at, 0, UnitBytes(f));
  float channel[kMostRows];
  for (size_t c = 0; c < f.head_dim; ++c) {
    for (size_t t = 0; t < f.group; ++t) channel[t] = keys[t * f.head_dim + c];
    const Encoder encoder({channel, f.group}, f.bits, f.fit);
    const_cast<uint16_t*>(unit.scales)[c] = encoder.scale;
    const_cast<uint16_t*>(unit.minima)[c] = encoder.minimum;
    for (size_t t = 0; t < f.group; ++t)
      PutCode(f, unit, c / codes * f.group + t, c % codes, static_cast<uint32_t>(encoder.Code(channel[t])));
  }
}

void WriteValueRow(const GroupFormat& f, std::byte* at, size_t lane, const float* value) {
  if (lane == 0) std::memset(at, 0, UnitBytes(f));
  const Unit unit = Run(f, at).At(0);
  const size_t codes = CodesAWord(f.bits);
  for (size_t g = 0; g < f.head_dim / f.group; ++g) {
    const Encoder encoder({value + g * f.group, f.group}, f.bits, f.fit);
    const_cast<uint16_t*>(unit.scales)[g * kTileRows + lane] = encoder.scale;
    const_cast<uint16_t*>(unit.minima)[g * kTileRows + lane] = encoder.minimum;
    for (size_t c = g * f.group; c < (g + 1) * f.group; ++c)
      PutCode(f, unit, lane / codes * f.head_dim + c, lane % codes, static_cast<uint32_t>(encoder.Code(value[c])));
  }
}

void ExpandKeyUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, float* out, size_t stride) {
  if (f.bits == 0)
    return ForMeans(f, units, first, n, [&](const float* means, size_t i, size_t count) {
      for (size_t c = 0; c < f.head_dim; ++c) std::fill_n(out + c * stride + i, count, means[c]);
    });
  const bool simd = ActiveIsa() != Isa::kScalar;
  const UnitRun run = Run(f, units);
  for (size_t i = 0; i < n;) {
    const size_t row = first + i, lane = row % f.group;
    // Whole tiles inside one unit go to the vector kernel.
    const size_t tiles = simd && lane % kTileRows == 0 ? std::min(n - i, f.group - lane) / kTileRows * kTileRows : 0;
    if (tiles > 0) {
      HWY_DYNAMIC_DISPATCH(SimdExpandKeys)(run, row / f.group, lane, tiles, out + i, stride);
      i += tiles;
      continue;
    }
    for (size_t c = 0; c < f.head_dim; ++c) out[c * stride + i] = KeyAt(f, units, row, c);
    ++i;
  }
}

void ExpandValueUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, float* out, size_t stride) {
  const bool simd = ActiveIsa() != Isa::kScalar;
  const UnitRun run = Run(f, units);
  for (size_t i = 0; i < n; ++i) {
    const size_t row = first + i;
    if (simd) {
      HWY_DYNAMIC_DISPATCH(SimdExpandValue)(run, row / kTileRows, row % kTileRows, out + i * stride);
      continue;
    }
    for (size_t c = 0; c < f.head_dim; ++c) out[i * stride + c] = ValueAt(f, units, row, c);
  }
}

void ScoreKeyUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* q, size_t stacked,
                   float* scores, size_t stride) {
  if (f.bits == 0) return ScoreMeans(f, units, first, n, q, stacked, scores, stride);
  if (ActiveIsa() == Isa::kScalar) return ScalarScores(f, units, first, n, q, stacked, scores, stride);
  HWY_DYNAMIC_DISPATCH(SimdScores)(Run(f, units), first, n, q, stacked, scores, stride);
}

void AddValueUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* weights,
                   size_t stride, size_t stacked, float* out, size_t out_stride) {
  if (ActiveIsa() == Isa::kScalar) return ScalarAddValues(f, units, first, n, weights, stride, stacked, out, out_stride);
  HWY_DYNAMIC_DISPATCH(SimdAddValues)(Run(f, units), first, n, weights, stride, stacked, out, out_stride);
}

}  // namespace lesskv
#endif  // HWY_ONCE
