#include "kernels/rows/group_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>

#include "base/check.h"
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
#include "hwy/cache_control.h"
// clang-format on

#ifndef LESSKV_GROUP_CODES_LAYOUT
#define LESSKV_GROUP_CODES_LAYOUT
namespace lesskv {
namespace {

constexpr size_t kMostChannels = kMostGroupedChannels;
constexpr size_t kMostRows = 256;  // of a group of keys
constexpr size_t kWeightRows = 128;  // whose weights are rounded relative to their largest
constexpr float kLargestCode16 = 32767;

// Codes along the summed-up side that share a word (and, of 3 bits, its tail).
constexpr size_t CodesAWord(size_t bits) { return bits == 3 ? 16 : 32 / bits; }
// Pairs of codes that lie in the word whole; of 3 bits there are three more.
constexpr size_t PairsAWord(size_t bits) { return 16 / bits; }

// The parts of a unit.
struct Unit {
  const uint32_t* words;
  const uint16_t* tails;  // one a word where codes have 3 bits
  const uint16_t* scales;
  const uint16_t* minima;
};
inline Unit Parts(const GroupFormat& f, const std::byte* unit) {
  const size_t words = f.unit_rows() * f.head_dim / CodesAWord(f.bits);
  const size_t parameters = f.side == RowSide::kKeys ? f.head_dim : f.head_dim / f.group * kTileRows;
  const auto* tails = reinterpret_cast<const uint16_t*>(unit + words * 4);
  const uint16_t* scales = tails + (f.bits == 3 ? words : 0);
  return {reinterpret_cast<const uint32_t*>(unit), tails, scales, scales + parameters};
}

// What the kernels of a target are called with.
struct UnitRun {
  const std::byte* units;
  size_t unit_bytes;
  size_t bits, group, dim;
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
using D16 = hn::Rebind<int16_t, D>;

constexpr size_t kLanes = hn::MaxLanes(D());
constexpr size_t kVectors = kLanes < 16 ? 16 / kLanes : 1;  // of 16 outputs
static_assert(kLanes <= 16);

HWY_INLINE V LoadHalf(const uint16_t* p) {
  return hn::PromoteTo(D(), hn::LoadU(DHalf(), reinterpret_cast<const hwy::float16_t*>(p)));
}

// Sums of 32-bit integers. On x86 a type of the compiler's own, because GCC 12 copies sums of Highway's from one register
// to another around each addition in a loop.
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR
using Sums = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

HWY_INLINE Sums NoSums() { return Sums{}; }
HWY_INLINE VI Total(Sums sums) { return VI{__builtin_bit_cast(decltype(VI::raw), sums)}; }

// sums + low halves' products + high halves' products, lane by lane.
HWY_INLINE void AddPairs(VU codes, VI pairs, Sums& sums) {
  const hn::Repartition<int16_t, D> d16;
  VI unused = hn::Zero(DI());
  const VI both = hn::ReorderWidenMulAccumulate(DI(), hn::BitCast(d16, codes), hn::BitCast(d16, pairs), hn::Zero(DI()),
                                                unused);
  sums += __builtin_bit_cast(Sums, both.raw);
}
#else
using Sums = VI;

HWY_INLINE Sums NoSums() { return hn::Zero(DI()); }
HWY_INLINE VI Total(Sums sums) { return sums; }

HWY_INLINE void AddPairs(VU codes, VI pairs, Sums& sums) {
  const DU du;
  const DI di;
  const VI low = hn::BitCast(di, hn::And(codes, hn::Set(du, 0xffffu)));
  const VI high = hn::BitCast(di, hn::ShiftRight<16>(codes));
  sums = hn::Add(sums, hn::Mul(low, hn::ShiftRight<16>(hn::ShiftLeft<16>(pairs))));
  sums = hn::Add(sums, hn::Mul(high, hn::ShiftRight<16>(pairs)));
}
#endif

// Adds the products of MB lists of pairs with the lowest kPairs pairs of codes in each word, and shifts those out.
template <size_t kBits, size_t kPairs, int MB>
HWY_INLINE void AddWord(VU (&word)[kVectors], const int16_t*& pairs, size_t pair_stride, Sums (&sum)[MB][kVectors]) {
  const VU mask = hn::Set(DU(), ((1u << kBits) - 1) * 0x10001u);
  // Not unrolled: GCC 12 would add the unrolled products up in another order, keep them all and run out of registers.
  HWY_UNROLL(1)
  for (size_t j = 0; j < kPairs; ++j, pairs += 2) {
    VU code[kVectors];
    for (size_t v = 0; v < kVectors; ++v) {
      code[v] = hn::And(word[v], mask);
      word[v] = hn::ShiftRight<kBits>(word[v]);
    }
    for (int m = 0; m < MB; ++m) {
      int32_t both;
      hwy::CopyBytes<4>(pairs + static_cast<size_t>(m) * pair_stride, &both);
      const VI pair = hn::Set(DI(), both);
      for (size_t v = 0; v < kVectors; ++v) AddPairs(code[v], pair, sum[m][v]);
    }
  }
}

// The other three pairs of 3 bits: a byte of the tail in each half, above it the bit that five codes left of the word.
HWY_INLINE VU Rest(VU left, const uint16_t* tails) {
  const DU du;
  const VU tail = hn::PromoteTo(du, hn::LoadU(hn::Rebind<uint16_t, DU>(), tails));
  const VU bytes = hn::And(hn::Or(tail, hn::ShiftLeft<8>(tail)), hn::Set(du, 0x00ff00ffu));
  return hn::Or(bytes, hn::ShiftLeft<8>(hn::And(left, hn::Set(du, 0x00010001u))));
}

// sums[m * 16 + i] = products of MB lists of pairs with the codes of column i of 16: n_units times n_words words (and
// their tails), those of a column `columns` apart, units unit_bytes; the lists are pair_stride numbers apart.
template <size_t kBits, int MB>
HWY_NOINLINE void SumPairs(const uint32_t* words, const uint16_t* tails, size_t columns, size_t n_words,
                           size_t unit_bytes, size_t n_units, const int16_t* pairs, size_t pair_stride,
                           int32_t* HWY_RESTRICT sums) {
  const DU du;
  const DI di;
  Sums sum[MB][kVectors];
  for (int m = 0; m < MB; ++m)
    for (size_t v = 0; v < kVectors; ++v) sum[m][v] = NoSums();
  for (size_t u = 0; u < n_units; ++u, words += unit_bytes / 4, tails += unit_bytes / 2) {
    for (size_t w = 0; w < n_words; ++w) {
      VU word[kVectors];
      for (size_t v = 0; v < kVectors; ++v) word[v] = hn::LoadU(du, words + w * columns + v * kLanes);
      AddWord<kBits, PairsAWord(kBits), MB>(word, pairs, pair_stride, sum);
      if constexpr (kBits == 3) {
        for (size_t v = 0; v < kVectors; ++v) word[v] = Rest(word[v], tails + w * columns + v * kLanes);
        AddWord<kBits, 3, MB>(word, pairs, pair_stride, sum);
      }
    }
  }
  for (int m = 0; m < MB; ++m)
    for (size_t v = 0; v < kVectors; ++v) hn::StoreU(Total(sum[m][v]), di, sums + static_cast<size_t>(m) * 16 + v * kLanes);
}

// Rounds n floats (whole vectors) to 16 bits relative to the largest; returns what a code is worth.
HWY_INLINE float RoundTo16(const float* x, size_t n, V largest, int16_t* out) {
  const D d;
  const float most = hn::GetLane(hn::MaxOfLanes(d, largest));
  const V inverse = hn::Set(d, most > 0 ? kLargestCode16 / most : 0.0f);
  for (size_t i = 0; i < n; i += kLanes)
    hn::StoreU(hn::DemoteTo(D16(), hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse))), D16(), out + i);
  return most / kLargestCode16;
}

// Of so many that are left: there are kernels for 4, 2 and 1.
constexpr size_t QueriesAtOnce(size_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// ---- Keys

struct CodedQueries {
  HWY_ALIGN int16_t codes[4][kMostChannels];
  float worth[4];
  float start[4];  // the minima's part of the scores
};

void CodeQuery(const float* query, const float* scales, const float* minima, size_t dim, size_t m, CodedQueries& out) {
  const D d;
  HWY_ALIGN float scaled[kMostChannels];
  V largest = hn::Zero(d), start = hn::Zero(d);
  for (size_t c = 0; c < dim; c += kLanes) {
    const V q = hn::Load(d, query + c), x = hn::Mul(q, hn::Load(d, scales + c));
    start = hn::MulAdd(q, hn::Load(d, minima + c), start);
    largest = hn::Max(largest, hn::Abs(x));
    hn::Store(x, d, scaled + c);
  }
  out.worth[m] = RoundTo16(scaled, dim, largest, out.codes[m]);
  out.start[m] = hn::GetLane(hn::SumOfLanes(d, start));
}

template <int MB>
void CodeQueries(const float* queries, const Unit& unit, size_t dim, CodedQueries& out) {
  const D d;
  HWY_ALIGN float scales[kMostChannels], minima[kMostChannels];
  for (size_t c = 0; c < dim; c += kLanes) {
    hn::Store(LoadHalf(unit.scales + c), d, scales + c);
    hn::Store(LoadHalf(unit.minima + c), d, minima + c);
  }
  for (size_t m = 0; m < MB; ++m) CodeQuery(queries + m * kMostChannels, scales, minima, dim, m, out);
}

// Scores of one whole group, [m * stride + row].
template <size_t kBits, int MB>
void ScoreGroup(const Unit& unit, size_t group, size_t dim, const CodedQueries& q, float* scores, size_t stride) {
  const D d;
  HWY_ALIGN int32_t sums[MB * 16];
  for (size_t t = 0; t < group; t += 16) {
    SumPairs<kBits, MB>(unit.words + t, unit.tails + t, group, dim / CodesAWord(kBits), 0, 1, q.codes[0], kMostChannels,
                        sums);
    for (size_t m = 0; m < MB; ++m)
      for (size_t i = 0; i < 16; i += kLanes)
        hn::StoreU(hn::MulAdd(hn::ConvertTo(d, hn::Load(DI(), sums + m * 16 + i)), hn::Set(d, q.worth[m]),
                              hn::Set(d, q.start[m])),
                   d, scores + m * stride + t + i);
  }
}

template <size_t kBits, int MB>
void ScoreRows(const UnitRun& run, const GroupFormat& f, size_t first, size_t n, const float* queries,
                          float* scores, size_t stride) {
  CodedQueries coded;
  HWY_ALIGN float apart[4 * kMostRows];
  for (size_t row = first; row < first + n;) {
    const size_t unit_row = row / run.group * run.group;
    const std::byte* at = run.units + row / run.group * run.unit_bytes;
    for (size_t i = 0; i < run.unit_bytes; i += 64) hwy::Prefetch(at + 2 * run.unit_bytes + i);
    const Unit unit = Parts(f, at);
    CodeQueries<MB>(queries, unit, run.dim, coded);
    const size_t end = std::min(first + n, unit_row + run.group);
    if (row == unit_row && end == unit_row + run.group) {
      ScoreGroup<kBits, MB>(unit, run.group, run.dim, coded, scores + (row - first), stride);
    } else {
      ScoreGroup<kBits, MB>(unit, run.group, run.dim, coded, apart, run.group);
      for (int m = 0; m < MB; ++m)
        for (size_t r = row; r < end; ++r)
          scores[static_cast<size_t>(m) * stride + r - first] =
              apart[static_cast<size_t>(m) * run.group + r - unit_row];
    }
    row = end;
  }
}

template <size_t kBits>
void ScoreAll(const UnitRun& run, const GroupFormat& f, size_t first, size_t n, const float* q,
                         size_t stacked, float* scores, size_t stride) {
  HWY_ALIGN float queries[4 * kMostChannels];
  for (size_t m = 0, count; m < stacked; m += count) {
    count = QueriesAtOnce(stacked - m);
    for (size_t i = 0; i < count; ++i)
      for (size_t c = 0; c < run.dim; ++c) queries[i * kMostChannels + c] = q[c * stacked + m + i];
    float* to = scores + m * stride;
    switch (count) {
      case 1: ScoreRows<kBits, 1>(run, f, first, n, queries, to, stride); break;
      case 2: ScoreRows<kBits, 2>(run, f, first, n, queries, to, stride); break;
      default: ScoreRows<kBits, 4>(run, f, first, n, queries, to, stride); break;
    }
  }
}

void SimdScores(const UnitRun& run, const GroupFormat& f, size_t first, size_t n, const float* q, size_t stacked,
                float* scores, size_t stride) {
  switch (run.bits) {
    case 2: return ScoreAll<2>(run, f, first, n, q, stacked, scores, stride);
    case 3: return ScoreAll<3>(run, f, first, n, q, stacked, scores, stride);
    default: return ScoreAll<4>(run, f, first, n, q, stacked, scores, stride);
  }
}

// ---- Values

// The weights of up to kWeightRows rows and MB queries for one group of channels.
struct CodedWeights {
  HWY_ALIGN int16_t codes[4][kWeightRows];
  float worth[4];
  float start[4];  // the minima's part of each channel
};

// Weights of query m for the rows of n_units units, whole units; w is 0 where a unit has other rows.
void CodeWeight(const UnitRun& run, const GroupFormat& f, const std::byte* first, size_t n_units, size_t channel_group,
                const float* w, size_t m, CodedWeights& out) {
  const D d;
  HWY_ALIGN float scaled[kWeightRows];
  V largest = hn::Zero(d), start = hn::Zero(d);
  for (size_t u = 0; u < n_units; ++u) {
    const Unit unit = Parts(f, first + u * run.unit_bytes);
    for (size_t i = 0; i < kTileRows; i += kLanes) {
      const size_t at = channel_group * kTileRows + i;
      const V a = hn::LoadU(d, w + u * kTileRows + i), x = hn::Mul(a, LoadHalf(unit.scales + at));
      start = hn::MulAdd(a, LoadHalf(unit.minima + at), start);
      largest = hn::Max(largest, hn::Abs(x));
      hn::Store(x, d, scaled + u * kTileRows + i);
    }
  }
  out.worth[m] = RoundTo16(scaled, n_units * kTileRows, largest, out.codes[m]);
  out.start[m] = hn::GetLane(hn::SumOfLanes(d, start));
}

// Up to kWeightRows rows that lie in the same aligned block of as many.
template <size_t kBits, int MB>
void AddBlock(const UnitRun& run, const GroupFormat& f, size_t row, size_t n, const float* weights, size_t stride,
              float* out, size_t out_stride) {
  const D d;
  const std::byte* first = run.units + row / kTileRows * run.unit_bytes;
  const size_t lane = row % kTileRows, n_units = (lane + n + kTileRows - 1) / kTileRows;
  for (size_t i = 0; i < n_units * run.unit_bytes; i += 64) hwy::Prefetch(first + n_units * run.unit_bytes + i);
  HWY_ALIGN float padded[MB][kWeightRows] = {};
  const bool whole = lane == 0 && n == n_units * kTileRows;
  for (size_t m = 0; m < MB && !whole; ++m) std::copy_n(weights + m * stride, n, padded[m] + lane);
  const Unit unit = Parts(f, first);
  CodedWeights coded;
  HWY_ALIGN int32_t sums[MB * 16];
  for (size_t g = 0; g < run.dim / run.group; ++g) {
    for (size_t m = 0; m < MB; ++m)
      CodeWeight(run, f, first, n_units, g, whole ? weights + m * stride : padded[m], m, coded);
    for (size_t c = g * run.group; c < (g + 1) * run.group; c += 16) {
      SumPairs<kBits, MB>(unit.words + c, unit.tails + c, run.dim, kTileRows / CodesAWord(kBits), run.unit_bytes,
                          n_units, coded.codes[0], kWeightRows, sums);
      for (size_t m = 0; m < MB; ++m)
        for (size_t i = 0; i < 16; i += kLanes) {
          float* to = out + m * out_stride + c + i;
          const V old = hn::Add(hn::LoadU(d, to), hn::Set(d, coded.start[m]));
          hn::StoreU(hn::MulAdd(hn::ConvertTo(d, hn::Load(DI(), sums + m * 16 + i)), hn::Set(d, coded.worth[m]), old), d,
                     to);
        }
    }
  }
}

template <size_t kBits, int MB>
void AddRows(const UnitRun& run, const GroupFormat& f, size_t first, size_t n, const float* weights,
                        size_t stride, float* out, size_t out_stride) {
  for (size_t row = first; row < first + n;) {
    const size_t count = std::min(first + n, (row / kWeightRows + 1) * kWeightRows) - row;
    AddBlock<kBits, MB>(run, f, row, count, weights + (row - first), stride, out, out_stride);
    row += count;
  }
}

template <size_t kBits>
void AddAll(const UnitRun& run, const GroupFormat& f, size_t first, size_t n, const float* weights,
                       size_t stride, size_t stacked, float* out, size_t out_stride) {
  for (size_t m = 0, count; m < stacked; m += count) {
    count = QueriesAtOnce(stacked - m);
    const float* w = weights + m * stride;
    float* to = out + m * out_stride;
    switch (count) {
      case 1: AddRows<kBits, 1>(run, f, first, n, w, stride, to, out_stride); break;
      case 2: AddRows<kBits, 2>(run, f, first, n, w, stride, to, out_stride); break;
      default: AddRows<kBits, 4>(run, f, first, n, w, stride, to, out_stride); break;
    }
  }
}

void SimdAddValues(const UnitRun& run, const GroupFormat& f, size_t first, size_t n, const float* weights,
                   size_t stride, size_t stacked, float* out, size_t out_stride) {
  switch (run.bits) {
    case 2: return AddAll<2>(run, f, first, n, weights, stride, stacked, out, out_stride);
    case 3: return AddAll<3>(run, f, first, n, weights, stride, stacked, out, out_stride);
    default: return AddAll<4>(run, f, first, n, weights, stride, stacked, out, out_stride);
  }
}

// ---- Expansion

// The codes at one place of the words from `words` on.
HWY_INLINE VU CodesAt(const UnitRun& run, const uint32_t* words, const uint16_t* tails, size_t place) {
  const DU du;
  const size_t half = place % 2 * 16, pair = place / 2, whole = PairsAWord(run.bits);
  const VU word = hn::LoadU(du, words), mask = hn::Set(du, (1u << run.bits) - 1);
  if (pair < whole) return hn::And(hn::ShiftRightSame(word, static_cast<int>(half + pair * run.bits)), mask);
  const VU rest = Rest(hn::ShiftRight<15>(word), tails);
  return hn::And(hn::ShiftRightSame(rest, static_cast<int>(half + (pair - whole) * run.bits)), mask);
}

HWY_INLINE V Decode(VU codes, V scale, V minimum) {
  return hn::MulAdd(hn::ConvertTo(D(), hn::BitCast(DI(), codes)), scale, minimum);
}

// Whole tiles of 16 rows of one unit.
void SimdExpandKeys(const UnitRun& run, const GroupFormat& f, const std::byte* at, size_t row, size_t n, float* out,
                    size_t stride) {
  const D d;
  const Unit unit = Parts(f, at);
  const size_t codes = CodesAWord(run.bits);
  for (size_t c = 0; c < run.dim; ++c) {
    const V scale = hn::Set(d, HalfToFloat(unit.scales[c])), minimum = hn::Set(d, HalfToFloat(unit.minima[c]));
    const size_t word = c / codes * run.group + row;
    for (size_t i = 0; i < n; i += kLanes)
      hn::StoreU(Decode(CodesAt(run, unit.words + word + i, unit.tails + word + i, c % codes), scale, minimum), d,
                 out + c * stride + i);
  }
}

void SimdExpandValue(const UnitRun& run, const GroupFormat& f, const std::byte* at, size_t lane, float* out) {
  const D d;
  const Unit unit = Parts(f, at);
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

UnitRun Run(const GroupFormat& f, const std::byte* units) { return {units, UnitBytes(f), f.bits, f.group, f.head_dim}; }

// ---- The scalar reference: one number at a time

uint32_t CodeAt(const GroupFormat& f, const Unit& unit, size_t word, size_t place) {
  const size_t half = place % 2, pair = place / 2, whole = PairsAWord(f.bits);
  const uint32_t mask = (1u << f.bits) - 1;
  if (pair < whole) return unit.words[word] >> (half * 16 + pair * f.bits) & mask;
  const uint32_t last = unit.words[word] >> (half * 16 + 15) & 1;
  const uint32_t rest = (unit.tails[word] >> half * 8 & 0xffu) | last << 8;
  return rest >> (pair - whole) * f.bits & mask;
}

float KeyAt(const GroupFormat& f, const std::byte* units, size_t row, size_t c) {
  const Unit unit = Parts(f, units + row / f.group * UnitBytes(f));
  const size_t codes = CodesAWord(f.bits);
  const uint32_t code = CodeAt(f, unit, c / codes * f.group + row % f.group, c % codes);
  return static_cast<float>(code) * HalfToFloat(unit.scales[c]) + HalfToFloat(unit.minima[c]);
}

float ValueAt(const GroupFormat& f, const std::byte* units, size_t row, size_t c) {
  const Unit unit = Parts(f, units + row / kTileRows * UnitBytes(f));
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
  const size_t half = place % 2, pair = place / 2, whole = PairsAWord(f.bits);
  if (pair < whole) return PutBits(unit.words[word], half * 16 + pair * f.bits, f.bits, code);
  if (pair < 7) return PutBits(unit.tails[word], half * 8 + (pair - whole) * f.bits, f.bits, code);
  PutBits(unit.tails[word], half * 8 + 6, 2, code & 3);
  PutBits(unit.words[word], half * 16 + 15, 1, code >> 2);
}

}  // namespace

bool Supports(const GroupFormat& f) {
  return f.bits >= 2 && f.bits <= 4 && f.group > 0 && f.group % 16 == 0 && f.group <= kMostRows && f.head_dim > 0 &&
         f.head_dim % (f.side == RowSide::kKeys ? 16 : f.group) == 0 && f.head_dim <= kMostChannels;
}

size_t UnitBytes(const GroupFormat& f) {
  CHECK(Supports(f), "{} channels in groups of {} with {} bits", f.head_dim, f.group, f.bits);
  return f.unit_rows() * f.head_dim * (f.bits * f.group + 32) / f.group / 8;
}

void WriteKeyUnit(const GroupFormat& f, std::byte* at, const float* keys) {
  const Unit unit = Parts(f, at);
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
  const Unit unit = Parts(f, at);
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
  const bool simd = ActiveIsa() != Isa::kScalar;
  const UnitRun run = Run(f, units);
  for (size_t i = 0; i < n;) {
    const size_t row = first + i, lane = row % f.group;
    // Whole tiles inside one unit go to the vector kernel.
    const size_t tiles = simd && lane % kTileRows == 0 ? std::min(n - i, f.group - lane) / kTileRows * kTileRows : 0;
    if (tiles > 0) {
      HWY_DYNAMIC_DISPATCH(SimdExpandKeys)(run, f, units + row / f.group * run.unit_bytes, lane, tiles, out + i, stride);
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
      HWY_DYNAMIC_DISPATCH(SimdExpandValue)(run, f, units + row / kTileRows * run.unit_bytes, row % kTileRows,
                                            out + i * stride);
      continue;
    }
    for (size_t c = 0; c < f.head_dim; ++c) out[i * stride + c] = ValueAt(f, units, row, c);
  }
}

void ScoreKeyUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* q, size_t stacked,
                   float* scores, size_t stride) {
  if (ActiveIsa() == Isa::kScalar) return ScalarScores(f, units, first, n, q, stacked, scores, stride);
  HWY_DYNAMIC_DISPATCH(SimdScores)(Run(f, units), f, first, n, q, stacked, scores, stride);
}

void AddValueUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* weights,
                   size_t stride, size_t stacked, float* out, size_t out_stride) {
  if (ActiveIsa() == Isa::kScalar) return ScalarAddValues(f, units, first, n, weights, stride, stacked, out, out_stride);
  HWY_DYNAMIC_DISPATCH(SimdAddValues)(Run(f, units), f, first, n, weights, stride, stacked, out, out_stride);
}

}  // namespace lesskv
#endif  // HWY_ONCE
