#include "base/large_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace lesskv {
namespace {

TEST(LargePages, MemoryIsZeroAlignedAndWritableToItsLastByte) {
  for (const size_t bytes : {size_t{1}, size_t{4096}, kLargePage - 1, kLargePage, 3 * kLargePage + 4097}) {
    std::byte* data = AllocateLargePages(bytes);
    ASSERT_NE(data, nullptr);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % kLargePage, 0u);
    EXPECT_TRUE(std::all_of(data, data + bytes, [](std::byte b) { return b == std::byte{0}; }));
    std::fill(data, data + bytes, std::byte{1});
    FreeLargePages(data, bytes);
  }
}

TEST(LargePages, WhatNoMachineHasIsRefused) {
  EXPECT_EQ(AllocateLargePages(std::numeric_limits<size_t>::max()), nullptr);
  EXPECT_EQ(AllocateLargePages(std::numeric_limits<size_t>::max() / 2), nullptr);
}

}  // namespace
}  // namespace lesskv
