#include "kvcache/codec/head_job.h"

#include "kernels/basic/rope.h"

namespace lesskv {

AttentionJob GroupJob(const StoreQuery& query, const LayerShape& layer, size_t kv_head, size_t first, size_t n, ComputeType compute) {
  const size_t group = layer.group(), head = kv_head * group + first;
  AttentionJob job;
  job.n_queries = query.n_queries;
  job.q = query.queries + head * layer.head_dim;
  job.q_stride = job.out_stride = layer.q_dim();
  job.group = n;
  job.scale = layer.scale;
  // Nothing depends on where a row is read when nothing is rotated.
  if (!query.read_positions.empty() && layer.rope->n_dims() > 0) {
    job.rope = layer.rope.get();
    job.read_positions = query.read_positions[kv_head];
  }
  job.compute = compute;
  job.out = query.out + head * layer.head_dim;
  job.lse = query.lse + kv_head * query.n_queries * group + first;
  return job;
}

}  // namespace lesskv
