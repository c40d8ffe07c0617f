// Verify, then time: the kernels in use against the scalar ones, through the whole model and cache.
#pragma once

#include <memory>

#include "engine/engine.h"

namespace lesskv {

// Bound on the normalised mean squared difference of logits between the kernels in use and the scalar ones. float32
// differs by the order of sums alone. bf16 rounds activations to bfloat16 or 8 bits, and the scalar kernels not always
// at the same places: the bound allows that and is still far below what one wrong block of rows or weights does.
double VerifyTolerance(ComputeType compute);

// Fills a cache of this configuration beyond its budget, then runs a short prompt and two decode steps, once with the
// kernels in use and once with the scalar ones. Returns the largest normalised mean squared difference of the logits;
// throws Error kRuntime when it is above the tolerance. Not to be called while anything else runs.
double VerifyAgainstScalar(Engine& engine, const std::shared_ptr<const CacheConfig>& config, uint64_t seed);

}  // namespace lesskv
