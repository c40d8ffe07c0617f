// The attention kernels for 64-bit ARM.
#include "kernels/attention/attention_isa.h"

#ifdef __aarch64__
#include <hwy/highway.h>

#include "kernels/rows/rows_layout.h"

HWY_BEFORE_NAMESPACE();
namespace lesskv::neon {
namespace {

#include "kernels/attention/attention_neon.h"
#include "kernels/attention/attention_prefill.h"

bool FusedScores(const AttentionView&, const DecodeScratch&, const RowSpan&, size_t, size_t, size_t) { return false; }
bool FusedValues(const AttentionView&, const DecodeScratch&, RowType, size_t, size_t, size_t) { return false; }

}  // namespace

const AttentionKernels kAttentionKernels = {ScratchFloats, PartialFloats, Decode, MergeSplits, Prefill, ColumnSums};

}  // namespace lesskv::neon
HWY_AFTER_NAMESPACE();

#endif
