#include "kvcache/codec/head_job.h"

#include <gtest/gtest.h>

namespace lesskv {
namespace {

// 6 query heads in groups of 3, heads of 4; the last two heads of the second group, two queries.
TEST(GroupJob, PointsToItsOwnHeads) {
  const LayerShape layer{6, 2, 4, UsualScale(4), nullptr, 0};
  std::vector<float> queries(2 * 24), out(2 * 24), lse(2 * 2 * 3);
  StoreQuery query;
  query.queries = queries.data();
  query.n_queries = 2;
  query.out = out.data();
  query.lse = lse.data();
  const AttentionJob job = GroupJob(query, layer, 1, 1, 2, ComputeType::kF32);
  EXPECT_EQ(job.q, queries.data() + 4 * 4);
  EXPECT_EQ(job.out, out.data() + 4 * 4);
  EXPECT_EQ(job.lse, lse.data() + 2 * 3 + 1);
  EXPECT_EQ(job.q_stride, 24u);
  EXPECT_EQ(job.out_stride, 24u);
  EXPECT_EQ(job.group, 2u);
  EXPECT_EQ(job.scale, layer.scale);
  const AttentionJob whole = HeadJob(query, layer, 1, ComputeType::kF32);
  EXPECT_EQ(whole.q, queries.data() + 3 * 4);
  EXPECT_EQ(whole.lse, lse.data() + 2 * 3);
  EXPECT_EQ(whole.group, 3u);
}

}  // namespace
}  // namespace lesskv
