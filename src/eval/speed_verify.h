// Verify, then time: the kernels in use against the scalar ones, each on the same inputs. Whole models are no yardstick:
// a trained network over a cache of random rows is chaotic, and rounding alone changes what it says.
#pragma once

#include <memory>

#include "engine/engine.h"

namespace lesskv {

// Bound on the normalised mean squared difference of what single kernels give. float32 differs by the order of sums
// alone; bf16 rounds activations to bfloat16 or 8 bits, and the scalar kernels not always at the same places. Both are
// far below what one wrong block of rows or weights does. A layer where rounding queries, keys and values to bfloat16
// alone does more than an eighth of the bound may differ by eight times what that does, up to 0.05.
double VerifyTolerance(ComputeType compute);

// Fills a cache of this configuration beyond its budget, then runs a short prompt and two decode steps through the
// model: in each layer a copy of the cache answers the same queries with the scalar kernels. Also products with some rows
// of the first layer's matrices, for one token and for many. Returns the normalised mean squared difference that came
// nearest to its bound; throws Error kRuntime when it is above it. Not to be called while anything else runs.
double VerifyAgainstScalar(Engine& engine, const std::shared_ptr<const CacheConfig>& config, uint64_t seed);

}  // namespace lesskv
