// What each KV head of each layer holds, for people and programs that look into a cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvcache/sequence_cache.h"

namespace lesskv {

// [layers][KV heads]: runs of positions as begin, end, begin, ..., ascending.
using ResidentRuns = std::vector<std::vector<std::vector<int32_t>>>;
ResidentRuns ReadResidentRuns(const SequenceCache& cache);
size_t CountRows(const std::vector<int32_t>& runs);

}  // namespace lesskv
