// What the attention jobs of all stores have in common: whose queries they are, and where the results go.
#pragma once

#include "kvcache/cache_shape.h"
#include "kvcache/codec/kv_store.h"

namespace lesskv {

// The job of query heads [first, first + n) of one KV head's group, but for what they read: keys, values and n_past.
AttentionJob GroupJob(const StoreQuery& query, const LayerShape& layer, size_t kv_head, size_t first, size_t n, ComputeType compute);

// Of the whole group.
inline AttentionJob HeadJob(const StoreQuery& query, const LayerShape& layer, size_t kv_head, ComputeType compute) {
  return GroupJob(query, layer, kv_head, 0, layer.group(), compute);
}

}  // namespace lesskv
