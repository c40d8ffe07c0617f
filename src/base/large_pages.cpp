#include "base/large_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

#include "base/checked.h"

namespace lesskv {
namespace {

// 4 KiB, but 16 or 64 on some ARM systems.
size_t SmallPage() { return static_cast<size_t>(::sysconf(_SC_PAGESIZE)); }

}  // namespace

std::byte* AllocateLargePages(size_t bytes) noexcept {
  if (bytes > std::numeric_limits<size_t>::max() - 2 * kLargePage) return nullptr;
  const size_t used = RoundUp(bytes, SmallPage()), reserved = used + kLargePage;
  void* all = ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(all);
  const size_t before = (kLargePage - reinterpret_cast<uintptr_t>(begin) % kLargePage) % kLargePage;
  if (before > 0) ::munmap(begin, before);
  ::munmap(begin + before + used, reserved - before - used);
#ifdef MADV_HUGEPAGE
  ::madvise(begin + before, used, MADV_HUGEPAGE);
#endif
  return begin + before;
}

void FreeLargePages(std::byte* data, size_t bytes) noexcept { ::munmap(data, RoundUp(bytes, SmallPage())); }

bool HasLargePages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");  // such as "always [madvise] never"
  std::string word;
  while (file >> word)
    if (word == "[always]" || word == "[madvise]") return true;
  return false;
}

}  // namespace lesskv
