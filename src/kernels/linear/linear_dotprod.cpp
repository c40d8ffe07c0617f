// Products on 64-bit ARM processors with dot products of 8-bit numbers. Built with those flags; see linear_avx512.cpp
// for the rules.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "kernels/linear/linear_neon-inl.h"

HWY_BEFORE_NAMESPACE();
namespace lesskv::internal {
namespace {

// Debian 12's Highway has no operation for it.
inline VI32 Dot(VI32 sums, VI8 a, VI8 b) { return VI32(vdotq_s32(sums.raw, a.raw, b.raw)); }

}  // namespace

const LinearKernels& DotprodLinearKernels() {
  static const LinearKernels kernels = MakeKernels();
  return kernels;
}

}  // namespace lesskv::internal
HWY_AFTER_NAMESPACE();

#endif  // defined(__aarch64__)
