#pragma once

#include <memory>

#include "capi/handles.h"

struct lesskv_sequence {
  std::shared_ptr<lesskv::capi::LoadedModel> loaded;
  lesskv::Sequence sequence;
};

namespace lesskv::capi {

lesskv_sequence& Live(lesskv_sequence* sequence);
const lesskv_sequence& Live(const lesskv_sequence* sequence);
lesskv_stats StatsOf(const CacheStats& stats);

}  // namespace lesskv::capi
