// After a layer's attention: observe, allocate, choose, absorb, close. Internal to this folder.
#pragma once

#include "kvcache/policy_cache.h"

namespace lesskv {

// Observes a layer and, unless all layers wait for the model's budgets, names the rows that leave. `work` holds what was
// observed; a deferred layer takes it over. Few rows that are to be absorbed wait in work.evicted for those of other
// sequences: the caller has the residual absorb them before it closes the layer.
void CutLayer(PolicyCache& cache, size_t layer, LayerStep& work);
void CloseLayer(PolicyCache& cache, size_t layer, LayerStep& work);

// At the end of a step that deferred: budgets over the whole model, then each layer is cut and closed.
void CutDeferred(PolicyCache& cache);

}  // namespace lesskv
