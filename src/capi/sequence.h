#pragma once

#include <memory>

#include "capi/handles.h"

struct lesskv_sequence {
  std::shared_ptr<lesskv::capi::LoadedModel> loaded;
  lesskv::Sequence sequence;
};

namespace lesskv::capi {

std::shared_ptr<lesskv_sequence> Live(const lesskv_sequence* sequence);
lesskv_stats StatsOf(const CacheStats& stats);

}  // namespace lesskv::capi
