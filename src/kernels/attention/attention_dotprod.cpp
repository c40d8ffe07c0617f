// The attention kernels for 64-bit ARM processors with dot products of 8-bit numbers. Compiled with flags of its own:
// see attention_isa.h.
#include "kernels/attention/attention_isa.h"

#ifdef __aarch64__
#include <arm_neon.h>
#include <hwy/highway.h>

#include "kernels/rows/rows_layout.h"

HWY_BEFORE_NAMESPACE();
namespace lesskv::dotprod {
namespace {

#include "kernels/attention/attention_dotprod.h"

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode, MergeSplits, Prefill, ColumnSums};

}  // namespace lesskv::dotprod
HWY_AFTER_NAMESPACE();

#endif
