// Between the choice of what leaves a layer and its close: rows that stay are fitted to answer for those that leave, where
// the residual does that. Internal to this folder.
#pragma once

#include "kvcache/policy_cache.h"

namespace lesskv {

// Departures are decided; the store still holds all rows. Rewrites weights and values of rows that stay.
void FitKept(PolicyCache& cache, size_t layer, LayerStep& work);

}  // namespace lesskv
