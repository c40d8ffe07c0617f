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

// What queries and weights become, relative to the largest.
enum class Rounding {
  kTwoBytes,  // signed ones, high * 128 + low
  kCentred,   // a signed byte; what that loses of its products with the middle of the codes is put back
  kCarried,   // an unsigned byte; what it loses is added to the number 16 places on, so that sums keep what many lose
};
constexpr Rounding KeyRounding(size_t bits) { return bits == 2 ? Rounding::kCentred : Rounding::kTwoBytes; }
constexpr Rounding ValueRounding(size_t bits) { return bits == 2 ? Rounding::kCarried : Rounding::kTwoBytes; }
constexpr size_t Parts(Rounding r) { return r == Rounding::kTwoBytes ? 2 : 1; }
constexpr float Most(Rounding r) { return r == Rounding::kTwoBytes ? 127 * 128 : r == Rounding::kCentred ? 127 : 254; }
constexpr size_t LargestByte(Rounding r) { return r == Rounding::kCarried ? 255 : 127; }
constexpr float kMiddle = 1.5f;  // of codes of two bits

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

// Sums of products of codes with lists of bytes, signed or not, four neighbours in a 32-bit lane. Without an instruction
// for that x86 adds them up in 16 bits, which hold the products of WordsAFlush words, and then in 32.
#undef LESSKV_QUAD_TARGET
#if HWY_TARGET == HWY_AVX3
#define LESSKV_QUAD_TARGET __attribute__((target(HWY_TARGET_STR ",avx512vnni")))
using Sums = VI;
constexpr bool kSumsIn16 = false;

// The instruction set level promises VNNI where it lets Highway have AVX-512 (cpu.h).
template <bool kSigned>
HWY_INLINE LESSKV_QUAD_TARGET void AddQuads(VU codes, VI list, Sums& sums) {
  const __m512i c = codes.raw, x = list.raw;
  sums.raw = kSigned ? _mm512_dpbusd_epi32(sums.raw, c, x) : _mm512_dpbusd_epi32(sums.raw, x, c);
}
HWY_INLINE VI Total(Sums sums) { return sums; }
#elif HWY_TARGET == HWY_AVX2
#define LESSKV_QUAD_TARGET
using Sums = hn::Vec<hn::Repartition<int16_t, D>>;
constexpr bool kSumsIn16 = true;

template <bool kSigned>
HWY_INLINE void AddQuads(VU codes, VI list, Sums& sums) {
  const __m256i c = codes.raw, x = list.raw;
  sums.raw = _mm256_add_epi16(sums.raw, kSigned ? _mm256_maddubs_epi16(c, x) : _mm256_maddubs_epi16(x, c));
}
HWY_INLINE VI Total(Sums sums) { return VI{_mm256_madd_epi16(sums.raw, _mm256_set1_epi16(1))}; }
HWY_INLINE void Keep(Sums& sums) { asm("" : "+x"(sums.raw)); }
#else
#define LESSKV_QUAD_TARGET
using Sums = VI;
constexpr bool kSumsIn16 = false;

template <bool kSigned>
HWY_INLINE void AddQuads(VU codes, VI list, Sums& sums) {
#if HWY_ARCH_ARM_A64
  if (!kSigned) {
    const uint8x16_t c = vreinterpretq_u8_u32(codes.raw), x = vreinterpretq_u8_s32(list.raw);
    const uint16x8_t some = vpaddq_u16(vmull_u8(vget_low_u8(c), vget_low_u8(x)), vmull_high_u8(c, x));
    sums.raw = vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(sums.raw), some));
    return;
  }
  const int8x16_t c = vreinterpretq_s8_u32(codes.raw), x = vreinterpretq_s8_s32(list.raw);
  sums.raw = vpadalq_s16(sums.raw, vpaddq_s16(vmull_s8(vget_low_s8(c), vget_low_s8(x)), vmull_high_s8(c, x)));
#else
  const DU du;
  const DI di;
  for (int shift = 0; shift < 32; shift += 8) {
    const VI code = hn::BitCast(di, hn::And(hn::ShiftRightSame(codes, shift), hn::Set(du, 0xffu)));
    const VI signed_byte = hn::ShiftRight<24>(hn::ShiftLeftSame(list, 24 - shift));
    sums = hn::Add(sums, hn::Mul(code, kSigned ? signed_byte : hn::And(signed_byte, hn::Set(di, 0xff))));
  }
#endif
}
HWY_INLINE VI Total(Sums sums) { return sums; }
#endif

HWY_INLINE Sums NoSums() { return __builtin_bit_cast(Sums, hn::Zero(DI())); }

// Words whose products 16 bits hold: two bytes times the largest code a quad.
constexpr size_t WordsAFlush(size_t bits, Rounding rounding) {
  return 32767 / (2 * LargestByte(rounding) * ((size_t{1} << bits) - 1)) / QuadsAWord(bits);
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

// What is fetched while bytes are read: those `distance` further on, or behind `stop` those of the units read next.
struct Ahead {
  uintptr_t stop;
  uintptr_t distance, jump;  // modulo 2^64

  // While units [first, last) of a run are read, and then those from `next` on (none: null).
  static Ahead While(const UnitRun& run, size_t last, size_t distance, const std::byte* next) {
    const auto stop = reinterpret_cast<uintptr_t>(run.units + last * run.unit_bytes);
    return {stop, distance, next == nullptr ? -distance : reinterpret_cast<uintptr_t>(next) - stop};
  }
  // The line of p.
  HWY_INLINE void Fetch(const void* p) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p) + distance;
    __builtin_prefetch(reinterpret_cast<const char*>(at < stop ? at : at + jump));
  }
};

// The third bits of the 16 codes of a word: bit 2 of the bytes of the first quad, bit 3 of the second's, and so on.
HWY_INLINE VU HighBits(const uint16_t* tails) {
  const DU du;
  const VU tail = hn::PromoteTo(du, hn::LoadU(hn::Rebind<uint16_t, DU>(), tails));
  const VU bytes = hn::And(hn::Or(tail, hn::ShiftLeft<8>(tail)), hn::Set(du, 0x00ff00ffu));
  return hn::ShiftLeft<2>(hn::And(hn::Or(bytes, hn::ShiftLeft<4>(bytes)), hn::Set(du, 0x0f0f0f0fu)));
}

// Adds the products of the lists, which are list_stride bytes apart, with the codes of one word (and its tail) in each lane.
template <size_t kBits, bool kSigned, size_t kLists, size_t kVectors>
HWY_INLINE LESSKV_QUAD_TARGET void AddWord(const uint32_t* words, const uint16_t* tails, const int8_t* lists,
                                           size_t list_stride, const Ahead& ahead, Sums (&sum)[kLists][kVectors]) {
  const DU du;
  constexpr uint32_t kMask = ((1u << WordBits(kBits)) - 1) * 0x01010101u;
  VU word[kVectors], high[kVectors];
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) {
    if (v * kLanes % 16 == 0) ahead.Fetch(words + v * kLanes);
    word[v] = hn::LoadU(du, words + v * kLanes);
    if constexpr (kBits == 3) high[v] = HighBits(tails + v * kLanes);
  }
  if (kBits == 3) ahead.Fetch(tails);
  for (size_t quad = 0; quad < QuadsAWord(kBits); ++quad) {
    VU code[kVectors];
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) {
      code[v] = hn::And(word[v], hn::Set(du, kMask));
      word[v] = hn::ShiftRight<static_cast<int>(WordBits(kBits))>(word[v]);
      if constexpr (kBits == 3) {
        code[v] = hn::OrAnd(code[v], high[v], hn::Set(du, 0x04040404u));
        high[v] = hn::ShiftRight<1>(high[v]);
      }
    }
#pragma GCC unroll 16
    for (size_t l = 0; l < kLists; ++l) {
      int32_t four;
      hwy::CopyBytes<4>(lists + l * list_stride + quad * kQuad, &four);
      const VI list = hn::Set(DI(), four);
#pragma GCC unroll 16
      for (size_t v = 0; v < kVectors; ++v) {
        AddQuads<kSigned>(code[v], list, sum[l][v]);
#if HWY_TARGET == HWY_AVX2
        // GCC would add up the products of a word apart; four quads need more registers than there are.
        if (kBits != 4) Keep(sum[l][v]);
#endif
      }
    }
  }
}

// The codes of some columns: n_words words (and their tails) of n_units units; those of a column are `pitch` apart.
struct Columns {
  const uint32_t* words;
  const uint16_t* tails;
  size_t pitch, n_words, unit_bytes, n_units;
};

// Calls put(m, i, sums) with the sums of products of MB rounded queries or weights from m0 on with the codes of kLanes
// columns from i on. Lists are kRoom bytes apart, Parts(kRounding) a query.
template <size_t kBits, Rounding kRounding, size_t MB, size_t kColumns, size_t kRoom, class Put>
HWY_NOINLINE LESSKV_QUAD_TARGET void SumQuads(const Columns& from, const int8_t* lists, size_t m0, const Ahead& ahead,
                                              const Put& put) {
  constexpr size_t kParts = Parts(kRounding), kVectors = kColumns / kLanes, kLists = MB * kParts;
  constexpr size_t kFlush = WordsAFlush(kBits, kRounding);
  Sums sum[kLists][kVectors];
  VI total[kLists][kVectors];
#pragma GCC unroll 16
  for (size_t l = 0; l < kLists; ++l)
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sum[l][v] = NoSums();
  const uint32_t* words = from.words;
  const uint16_t* tails = from.tails;
  lists += m0 * kParts * kRoom;
  const Ahead local = ahead;
  size_t left = kFlush;
  bool flushed = false;
  const auto flush = [&]() HWY_ATTR {
#pragma GCC unroll 16
    for (size_t l = 0; l < kLists; ++l)
#pragma GCC unroll 16
      for (size_t v = 0; v < kVectors; ++v) {
        const VI some = Total(sum[l][v]);
        total[l][v] = flushed ? hn::Add(total[l][v], some) : some;
        sum[l][v] = NoSums();
      }
    flushed = true;
  };
  for (size_t u = 0; u < from.n_units; ++u, words += from.unit_bytes / 4, tails += from.unit_bytes / 2)
    for (size_t w = 0; w < from.n_words; ++w, lists += CodesAWord(kBits)) {
      if (kSumsIn16 && left-- == 0) {
        flush();
        left = kFlush - 1;
      }
      const size_t at = w * from.pitch;
      AddWord<kBits, kRounding != Rounding::kCarried>(words + at, tails + at, lists, kRoom, local, sum);
    }
  if (kSumsIn16) flush();
  const auto of = [&](size_t l, size_t v) HWY_ATTR { return kSumsIn16 ? total[l][v] : Total(sum[l][v]); };
#pragma GCC unroll 16
  for (size_t m = 0; m < MB; ++m)
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v)
      put(m0 + m, v * kLanes,
          kParts == 1 ? of(m, v) : hn::Add(hn::ShiftLeft<7>(of(m * kParts, v)), of((m + 1) * kParts - 1, v)));
}

// The same for any MB.
template <size_t kBits, Rounding kRounding, size_t MB, size_t kColumns, size_t kRoom, class Put>
HWY_INLINE void SumAll(const Columns& from, const int8_t* lists, const Ahead& ahead, const Put& put) {
  constexpr size_t kNow = std::min(MB, kMostLists / Parts(kRounding));
  for (size_t m = 0; m + kNow <= MB; m += kNow) SumQuads<kBits, kRounding, kNow, kColumns, kRoom>(from, lists, m, ahead, put);
  if constexpr (MB % kNow != 0)
    SumQuads<kBits, kRounding, MB % kNow, kColumns, kRoom>(from, lists, MB - MB % kNow, ahead, put);
}

struct MaxOf {
  template <class DV>
  HWY_INLINE hn::Vec<DV> operator()(DV, hn::Vec<DV> a, hn::Vec<DV> b) const { return hn::Max(a, b); }
};
struct SumOf {
  template <class DV>
  HWY_INLINE hn::Vec<DV> operator()(DV, hn::Vec<DV> a, hn::Vec<DV> b) const { return hn::Add(a, b); }
};

using D4 = hn::CappedTag<float, 4>;

// out[m] = Op over the lanes of v[m].
#if HWY_TARGET == HWY_SCALAR
template <class Op>
HWY_INLINE void OverLanes(const V (&v)[4], float* HWY_RESTRICT out) {
  for (size_t m = 0; m < 4; ++m) out[m] = hn::GetLane(v[m]);
}
#else
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
template <Rounding kRounding, size_t kRoom>
struct Rounded {
  HWY_ALIGN int8_t codes[4 * Parts(kRounding)][kRoom];
  HWY_ALIGN float worth[4];    // of a code
  HWY_ALIGN float start[4];    // what is added to a sum: the minima's part of it
  HWY_ALIGN float inverse[4];  // of worth
};

// Scales and minima of n numbers, 16 neighbours at a time.
struct Parameters {
  const uint16_t* scales;
  const uint16_t* minima;
  size_t pitch;  // halves from one 16 to the next

  size_t At(size_t i) const { return i / 16 * pitch + i % 16; }
};

// Whole numbers in the lowest 16 bits of the lanes of four vectors, as bytes of one part or two, `room` apart.
template <size_t kParts>
HWY_INLINE void StoreParts(const VU (&x)[4], int8_t* to, size_t room) {
#if HWY_TARGET == HWY_SCALAR
  for (size_t i = 0; i < 4; ++i) {
    const auto one = static_cast<int16_t>(hn::GetLane(x[i]));
    to[i] = static_cast<int8_t>(kParts == 1 ? one : one >> 7);
    if (kParts == 2) to[room + i] = static_cast<int8_t>(one & 127);
  }
#else
  const hn::Repartition<int16_t, D> d16;
  const hn::Repartition<int8_t, D> d8;
  const auto a = hn::ConcatEven(d16, hn::BitCast(d16, x[1]), hn::BitCast(d16, x[0]));
  const auto b = hn::ConcatEven(d16, hn::BitCast(d16, x[3]), hn::BitCast(d16, x[2]));
  const auto bytes = [&](auto first, auto second) HWY_ATTR {
    return hn::ConcatEven(d8, hn::BitCast(d8, second), hn::BitCast(d8, first));
  };
  if constexpr (kParts == 1) {
    hn::StoreU(bytes(a, b), d8, to);
  } else {
    const auto low = hn::Set(d16, 127);
    hn::StoreU(bytes(hn::ShiftRight<7>(a), hn::ShiftRight<7>(b)), d8, to);
    hn::StoreU(bytes(hn::And(a, low), hn::And(b, low)), d8, to + room);
  }
#endif
}

// Rounding MB lists of n numbers, a multiple of 16 and `stride` apart, times scales relative to the largest of each list
// takes two steps, Scale and Round. The first one looks for the largest while the sums of lists before go on.
template <bool kSigned, size_t MB, Rounding kRounding, size_t kRoom>
HWY_NOINLINE void Scale(const float* numbers, size_t stride, const Parameters& p, size_t n, const Ahead& ahead,
                        float (&scaled)[MB][kRoom], Rounded<kRounding, kRoom>& out) {
  const D d;
  const DI di;
  V start[4], most[4];
  VI largest[4];  // numbers that are not negative compare as their bits do
  for (size_t m = 0; m < 4; ++m) start[m] = hn::Zero(d), largest[m] = hn::Zero(di);
  for (size_t i = 0; i < n; i += kLanes) {
    const size_t at = p.At(i);
    if (i % 16 == 0) {
      ahead.Fetch(p.scales + at);
      ahead.Fetch(p.minima + at);
    }
    const V scale = LoadHalf(p.scales + at);
    V base = LoadHalf(p.minima + at);
    if (kRounding == Rounding::kCentred) base = hn::MulAdd(scale, hn::Set(d, kMiddle), base);
    for (size_t m = 0; m < MB; ++m) {
      const V number = hn::LoadU(d, numbers + m * stride + i), x = hn::Mul(number, scale);
      start[m] = hn::MulAdd(number, base, start[m]);
      largest[m] = hn::Max(largest[m], hn::BitCast(di, kSigned ? hn::Abs(x) : x));
      hn::Store(x, d, scaled[m] + i);
    }
  }
  OverLanes<SumOf>(start, out.start);
  for (size_t m = 0; m < 4; ++m) most[m] = hn::BitCast(d, largest[m]);
  OverLanes<MaxOf>(most, out.inverse);
  const D4 d4;
  for (size_t m = 0; m < 4; m += hn::MaxLanes(d4)) {
    const auto four = hn::Load(d4, out.inverse + m), finite = hn::Max(four, hn::Set(d4, 1e-34f));
    hn::Store(hn::Mul(four, hn::Set(d4, 1 / Most(kRounding))), d4, out.worth + m);
    hn::Store(hn::Div(hn::Set(d4, Most(kRounding)), finite), d4, out.inverse + m);
  }
}

template <size_t MB, Rounding kRounding, size_t kRoom>
HWY_NOINLINE void Round(float (&scaled)[MB][kRoom], size_t n, Rounded<kRounding, kRoom>& out) {
  const D d;
  const DI di;
  // Added to 1.5 * 2^23 a number is rounded to a whole one, which lies in the lowest bits.
  const V rounding = hn::Set(d, 12582912);
  constexpr size_t kTile = std::max<size_t>(16 / kLanes, 4);  // vectors
  V carried[MB][kTile];
  VI sum[4];
  for (size_t m = 0; m < 4; ++m) sum[m] = hn::Zero(di);
#pragma GCC unroll 4
  for (size_t m = 0; m < MB; ++m)
#pragma GCC unroll 4
    for (size_t v = 0; v < kTile; ++v) carried[m][v] = hn::Zero(d);
  // Four vectors at a time: zeros behind the last number.
  for (size_t i = n; i % (4 * kLanes) != 0; i += kLanes)
    for (size_t m = 0; m < MB; ++m) hn::Store(hn::Zero(d), d, scaled[m] + i);
  for (size_t i = 0; i < n; i += 4 * kLanes)
#pragma GCC unroll 4
    for (size_t m = 0; m < MB; ++m) {
      VU code[4];
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; ++v) {
        const V x = hn::Load(d, scaled[m] + i + v * kLanes), inverse = hn::Set(d, out.inverse[m]);
        V shifted;
        if (kRounding == Rounding::kCarried) {
          V& carry = carried[m][16 / kLanes > 4 ? (i / kLanes + v) % kTile : v % (16 / kLanes)];
          const V number = hn::MulAdd(x, inverse, carry);
          shifted = hn::Add(number, rounding);
          carry = hn::Sub(number, hn::Sub(shifted, rounding));
        } else {
          shifted = hn::MulAdd(x, inverse, rounding);
        }
        code[v] = hn::BitCast(DU(), shifted);
        if (kRounding == Rounding::kCentred)
          sum[m] = hn::Add(sum[m], hn::Sub(hn::BitCast(di, shifted), hn::BitCast(di, rounding)));
      }
      StoreParts<Parts(kRounding)>(code, out.codes[m * Parts(kRounding)] + i, kRoom);
    }
  if (kRounding != Rounding::kCentred) return;
  V sums[4];
  for (size_t m = 0; m < 4; ++m) sums[m] = hn::ConvertTo(d, sum[m]);
  HWY_ALIGN float sum_of[4];
  OverLanes<SumOf>(sums, sum_of);
  for (size_t m = 0; m < MB; ++m) out.start[m] -= kMiddle * out.worth[m] * sum_of[m];
}

// Of so many that are left.
constexpr size_t QueriesAtOnce(size_t left) { return std::min<size_t>(left, 4); }

// ---- Keys

template <size_t kBits>
using RoundedQueries = Rounded<KeyRounding(kBits), kMostChannels>;

constexpr size_t kKeysAhead = 2048;  // bytes

// Scores of one whole group, [m * stride + row].
template <size_t kBits, size_t MB>
void ScoreGroup(const UnitRun& run, size_t index, const RoundedQueries<kBits>& q, const Ahead& ahead, float* scores,
                size_t stride) {
  const Unit unit = run.At(index);
  ForColumns(run.group, [&](size_t t, auto columns) {
    const Columns from = {unit.words + t, unit.tails + t, run.group, run.dim / CodesAWord(kBits), 0, 1};
    const auto put = [&](size_t m, size_t i, VI sums) HWY_ATTR {
      const D d;
      hn::StoreU(hn::MulAdd(hn::ConvertTo(d, sums), hn::Set(d, q.worth[m]), hn::Set(d, q.start[m])), d,
                 scores + m * stride + t + i);
    };
    SumAll<kBits, KeyRounding(kBits), MB, columns, kMostChannels>(from, q.codes[0], ahead, put);
  });
}

template <size_t kBits, size_t MB>
void ScoreRows(const UnitRun& run, size_t first, size_t n, const float* queries, float* scores, size_t stride,
               const std::byte* next) {
  RoundedQueries<kBits> rounded[2];
  HWY_ALIGN float scaled[MB][kMostChannels], apart[4 * kMostRows];
  const size_t begin = first / run.group, end = (first + n + run.group - 1) / run.group;
  const Ahead ahead = Ahead::While(run, end, kKeysAhead, next);
  const auto scale = [&](size_t index) {
    const Unit unit = run.At(index);
    Scale<true>(queries, kMostChannels, {unit.scales, unit.minima, 16}, run.dim, ahead, scaled, rounded[index % 2]);
  };
  scale(begin);
  for (size_t index = begin, row = first; index < end; ++index) {
    RoundedQueries<kBits>& q = rounded[index % 2];
    Round(scaled, run.dim, q);
    if (index + 1 < end) scale(index + 1);
    const size_t unit_row = index * run.group, stop = std::min(first + n, unit_row + run.group);
    if (stop - row == run.group) {
      ScoreGroup<kBits, MB>(run, index, q, ahead, scores + (row - first), stride);
    } else {
      ScoreGroup<kBits, MB>(run, index, q, ahead, apart, run.group);
      for (size_t m = 0; m < MB; ++m)
        for (size_t r = row; r < stop; ++r) scores[m * stride + r - first] = apart[m * run.group + r - unit_row];
    }
    row = stop;
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
              float* scores, size_t stride, const std::byte* next) {
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
      case 1: ScoreRows<kBits, 1>(run, first, n, queries, to, stride, next); break;
      case 2: ScoreRows<kBits, 2>(run, first, n, queries, to, stride, next); break;
      case 3: ScoreRows<kBits, 3>(run, first, n, queries, to, stride, next); break;
      default: ScoreRows<kBits, 4>(run, first, n, queries, to, stride, next); break;
    }
  }
}

void SimdScores(const UnitRun& run, size_t first, size_t n, const float* q, size_t stacked,
                float* scores, size_t stride, const std::byte* next) {
  switch (run.bits) {
    case 2: return ScoreAll<2>(run, first, n, q, stacked, scores, stride, next);
    case 3: return ScoreAll<3>(run, first, n, q, stacked, scores, stride, next);
    default: return ScoreAll<4>(run, first, n, q, stacked, scores, stride, next);
  }
}

// ---- Values

template <size_t kBits>
using RoundedWeights = Rounded<ValueRounding(kBits), kWeightRows>;

// Up to kWeightRows rows that lie in the same aligned block of as many.
template <size_t kBits, size_t MB>
void AddBlock(const UnitRun& run, size_t row, size_t n, const float* weights, size_t stride, const Ahead& ahead,
              float* out, size_t out_stride) {
  const size_t first = row / kTileRows, lane = row % kTileRows, n_units = (lane + n + kTileRows - 1) / kTileRows;
  HWY_ALIGN float padded[MB * kWeightRows];
  if (lane > 0 || n < n_units * kTileRows) {
    std::fill_n(padded, MB * kWeightRows, 0.0f);
    for (size_t m = 0; m < MB; ++m) std::copy_n(weights + m * stride, n, padded + m * kWeightRows + lane);
    weights = padded;
    stride = kWeightRows;
  }
  const Unit unit = run.At(first);
  const size_t n_groups = run.dim / run.group;
  RoundedWeights<kBits> rounded[2];
  HWY_ALIGN float scaled[MB][kWeightRows];
  const auto scale = [&](size_t g) {
    Scale<false>(weights, stride, {unit.scales + g * kTileRows, unit.minima + g * kTileRows, run.unit_bytes / 2},
          n_units * kTileRows, ahead, scaled, rounded[g % 2]);
  };
  scale(0);
  for (size_t g = 0; g < n_groups; ++g) {
    RoundedWeights<kBits>& w = rounded[g % 2];
    Round(scaled, n_units * kTileRows, w);
    if (g + 1 < n_groups) scale(g + 1);
    ForColumns(run.group, [&](size_t in_group, auto columns) {
      const size_t c = g * run.group + in_group;
      const size_t n_words = kTileRows / CodesAWord(kBits);
      const Columns from = {unit.words + c, unit.tails + c, run.dim, n_words, run.unit_bytes, n_units};
      const auto put = [&](size_t m, size_t i, VI sums) HWY_ATTR {
        const D d;
        float* to = out + m * out_stride + c + i;
        const V old = hn::Add(hn::LoadU(d, to), hn::Set(d, w.start[m]));
        hn::StoreU(hn::MulAdd(hn::ConvertTo(d, sums), hn::Set(d, w.worth[m]), old), d, to);
      };
      SumAll<kBits, ValueRounding(kBits), MB, columns, kWeightRows>(from, w.codes[0], ahead, put);
    });
  }
}

template <size_t kBits, size_t MB>
void AddRows(const UnitRun& run, size_t first, size_t n, const float* weights, size_t stride,
             float* out, size_t out_stride, const std::byte* next) {
  const size_t last = (first + n + kTileRows - 1) / kTileRows, block_bytes = kWeightRows / kTileRows * run.unit_bytes;
  const Ahead ahead = Ahead::While(run, last, block_bytes, next);
  for (size_t row = first; row < first + n;) {
    const size_t count = std::min(first + n, (row / kWeightRows + 1) * kWeightRows) - row;
    AddBlock<kBits, MB>(run, row, count, weights + (row - first), stride, ahead, out, out_stride);
    row += count;
  }
}

template <size_t kBits>
void AddAll(const UnitRun& run, size_t first, size_t n, const float* weights, size_t stride,
            size_t stacked, float* out, size_t out_stride, const std::byte* next) {
  for (size_t m = 0, count; m < stacked; m += count) {
    count = QueriesAtOnce(stacked - m);
    const float* w = weights + m * stride;
    float* to = out + m * out_stride;
    switch (count) {
      case 1: AddRows<kBits, 1>(run, first, n, w, stride, to, out_stride, next); break;
      case 2: AddRows<kBits, 2>(run, first, n, w, stride, to, out_stride, next); break;
      case 3: AddRows<kBits, 3>(run, first, n, w, stride, to, out_stride, next); break;
      default: AddRows<kBits, 4>(run, first, n, w, stride, to, out_stride, next); break;
    }
  }
}

void SimdAddValues(const UnitRun& run, size_t first, size_t n, const float* weights, size_t stride,
                   size_t stacked, float* out, size_t out_stride, const std::byte* next) {
  switch (run.bits) {
    case 2: return AddAll<2>(run, first, n, weights, stride, stacked, out, out_stride, next);
    case 3: return AddAll<3>(run, first, n, weights, stride, stacked, out, out_stride, next);
    default: return AddAll<4>(run, first, n, weights, stride, stacked, out, out_stride, next);
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

// Of a format that is supported.
UnitRun Run(const GroupFormat& f, const std::byte* units) {
  const size_t n_parameters = f.side == RowSide::kKeys ? f.head_dim : f.head_dim / f.group * kTileRows;
  const size_t n_codes = f.unit_rows() * f.head_dim, n_words = n_codes / CodesAWord(f.bits);
  return {units, n_codes * f.bits / 8 + n_parameters * 4, f.bits, f.group, f.head_dim, n_parameters, n_words};
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
  return Run(f, nullptr).unit_bytes;
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
                   float* scores, size_t stride, const std::byte* next) {
  if (f.bits == 0) return ScoreMeans(f, units, first, n, q, stacked, scores, stride);
  if (ActiveIsa() == Isa::kScalar) return ScalarScores(f, units, first, n, q, stacked, scores, stride);
  HWY_DYNAMIC_DISPATCH(SimdScores)(Run(f, units), first, n, q, stacked, scores, stride, next);
}

void AddValueUnits(const GroupFormat& f, const std::byte* units, size_t first, size_t n, const float* weights,
                   size_t stride, size_t stacked, float* out, size_t out_stride, const std::byte* next) {
  if (ActiveIsa() == Isa::kScalar) return ScalarAddValues(f, units, first, n, weights, stride, stacked, out, out_stride);
  HWY_DYNAMIC_DISPATCH(SimdAddValues)(Run(f, units), first, n, weights, stride, stacked, out, out_stride, next);
}

}  // namespace lesskv
#endif  // HWY_ONCE
