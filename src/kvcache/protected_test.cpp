#include "kvcache/protected.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace lesskv {
namespace {

TEST(ProtectedSet, SpansJoin) {
  const ProtectedSet set({{10, 12}, {0, 3}, {11, 15}, {15, 16}, {20, 20}});
  EXPECT_EQ(set.size(), 9u);
  EXPECT_EQ(set.spans().size(), 2u);
  for (int p = 0; p < 25; ++p) EXPECT_EQ(set.Contains(Position(p)), p < 3 || (p >= 10 && p < 16)) << p;
  EXPECT_EQ(set.CountFrom(2), 7u);
  EXPECT_EQ(set.CountFrom(12), 4u);
  EXPECT_EQ(set.CountFrom(16), 0u);
  EXPECT_TRUE(ProtectedSet({{7, 7}}).empty());
}

TEST(ProtectedSet, RefusesReversedSpans) {
  EXPECT_THROW(ProtectedSet({{-1, 3}}), Error);
  EXPECT_THROW(ProtectedSet({{3, 2}}), Error);
}

}  // namespace
}  // namespace lesskv
