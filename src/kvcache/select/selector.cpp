#include "kvcache/select/selector.h"

#include "base/check.h"
#include "base/threads.h"

namespace lesskv {

void Selector::Choose(const LayerRows& layer, VictimLists& victims) const {
  ParallelFor(layer.heads.size(), [&](size_t h) { ChooseHead(layer, layer.heads[h], victims[h]); });
}

void Selector::ChooseHead(const LayerRows&, const HeadRows&, std::vector<uint32_t>&) const {
  CHECK(false, "a selector overrides Choose or ChooseHead");
}

}  // namespace lesskv
