// Memory in pages of 2 MiB where the system has them (transparent huge pages). Streaming through hundreds of megabytes
// in pages of 4 KiB costs a third of the bandwidth on virtual machines, whose page tables are walked twice.
#pragma once

#include <cstddef>

namespace lesskv {

inline constexpr size_t kLargePage = size_t{2} << 20;

// Zeroed, private memory of `bytes` > 0 bytes that begins at a large page; null when there is none. Only its last page
// may be small. Give it back with FreeLargePages and the same size.
std::byte* AllocateLargePages(size_t bytes) noexcept;
void FreeLargePages(std::byte* data, size_t bytes) noexcept;

// Whether the system hands out large pages to who asks for them.
bool HasLargePages();

}  // namespace lesskv
