// The vectors of the attention kernels on 64-bit ARM, by way of Highway. Part of attention_neon.cpp and
// attention_dotprod.cpp, inside their anonymous namespace; see attention_simd.h.
#pragma once

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::Full128<float>;
using DI = hn::Full128<int32_t>;
using DU = hn::Full128<uint32_t>;
using VF = hn::Vec<D>;
using VI = hn::Vec<DI>;

// The compiler's own type: with Highway's, calls of Round, Exp and so on would find Highway's functions as well.
using V = decltype(VF::raw);
constexpr size_t kW = 4;

inline V Zero() { return hn::Zero(D()).raw; }
inline V Splat(float x) { return hn::Set(D(), x).raw; }
inline V Load(const float* p) { return hn::LoadU(D(), p).raw; }
inline void Store(float* p, V x) { hn::StoreU(VF(x), D(), p); }
inline V Fma(V a, V b, V c) { return hn::MulAdd(VF(a), VF(b), VF(c)).raw; }
inline V Mul(V a, V b) { return hn::Mul(VF(a), VF(b)).raw; }
inline V Add(V a, V b) { return hn::Add(VF(a), VF(b)).raw; }
inline V Sub(V a, V b) { return hn::Sub(VF(a), VF(b)).raw; }
// Not hn::Max and hn::Min: those of ARM are NaN when either argument is.
inline V VMax(V a, V b) { return hn::IfThenElse(hn::Gt(VF(a), VF(b)), VF(a), VF(b)).raw; }
inline V VMin(V a, V b) { return hn::IfThenElse(hn::Lt(VF(a), VF(b)), VF(a), VF(b)).raw; }
inline V Round(V x) { return hn::Round(VF(x)).raw; }
inline V TimesPow2(V y, V n) {
  n = VMax(Splat(-127), n);  // the bits of 2^-127 are 0
  const VI exponent = hn::Add(hn::NearestInt(VF(n)), hn::Set(DI(), 127));
  return Mul(y, hn::BitCast(D(), hn::ShiftLeft<23>(exponent)).raw);
}
inline float ReduceMax(V x) { return hn::GetLane(hn::MaxOfLanes(D(), VF(x))); }
inline float ReduceAdd(V x) { return hn::GetLane(hn::SumOfLanes(D(), VF(x))); }
inline float HalfToFloat(uint16_t half) { return static_cast<float>(__builtin_bit_cast(__fp16, half)); }
inline V LoadF16(const uint16_t* p) {
  return hn::PromoteTo(D(), hn::LoadU(hn::Full64<hwy::float16_t>(), reinterpret_cast<const hwy::float16_t*>(p))).raw;
}
inline V LoadBF16(const uint16_t* p) {
  return hn::BitCast(D(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(hn::Full64<uint16_t>(), p)))).raw;
}
inline V Field(const uint8_t* p, int shift, int mask) {
  const auto x = hn::BitCast(DU(), hn::LoadU(hn::Full128<uint8_t>(), p));
  const auto field = hn::And(hn::ShiftRightSame(x, shift), hn::Set(DU(), static_cast<uint32_t>(mask)));
  return hn::ConvertTo(D(), hn::BitCast(DI(), field)).raw;
}
