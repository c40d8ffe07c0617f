// Products on any 64-bit ARM processor.
#if defined(__aarch64__)

#include "kernels/linear/linear_neon-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lesskv::internal {
namespace {

inline VI32 Dot(VI32 sums, VI8 a, VI8 b) {
  const hn::Full128<int16_t> d16;
  const hn::Full64<int8_t> half;
  const auto a_low = hn::PromoteTo(d16, hn::LowerHalf(a)), a_high = hn::PromoteTo(d16, hn::UpperHalf(half, a));
  const auto b_low = hn::PromoteTo(d16, hn::LowerHalf(b)), b_high = hn::PromoteTo(d16, hn::UpperHalf(half, b));
  VI32 other = hn::Zero(DI32());
  sums = hn::ReorderWidenMulAccumulate(DI32(), a_low, b_low, sums, other);
  sums = hn::ReorderWidenMulAccumulate(DI32(), a_high, b_high, sums, other);
  return hn::Add(sums, other);
}

}  // namespace

const LinearKernels& NeonLinearKernels() {
  static const LinearKernels kernels = MakeKernels();
  return kernels;
}

}  // namespace lesskv::internal
HWY_AFTER_NAMESPACE();

#endif  // defined(__aarch64__)
