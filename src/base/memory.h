// How much memory this process may still take, so that what cannot fit is refused with a sentence before it is tried.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace lesskv {

// The smaller of the machine's available memory (MemAvailable of /proc/meminfo) and what control groups leave (limit
// minus use, reclaimable file pages counted as free). Nothing where the system tells neither.
std::optional<size_t> AvailableMemory();

// Throws Error kOutOfMemory ("WHAT needs X, but only Y is available") when `bytes` exceed AvailableMemory().
void RequireMemory(size_t bytes, const std::string& what);

// "512 B", "3.4 MiB", "1.20 GiB".
std::string HumanBytes(size_t bytes);

// The opposite, for options: a number and B, KiB, MiB, GiB, TiB, the same as K, M, G, T, or nothing (bytes), such as
// "256M" or "1.5 GiB". Throws Error naming the option for anything else, for 0 and for what no machine has.
size_t ParseBytes(const std::string& text, const std::string& option);

}  // namespace lesskv
