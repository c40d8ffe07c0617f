// The full cache: every token stays. The reference that every other selector is measured against.
#include "base/check.h"
#include "kvcache/registry.h"
#include "kvcache/select/selector.h"

namespace lesskv {
namespace {

class FullSelector final : public Selector {
 public:
  Growth After(StepKind, size_t) const override { return {}; }
  size_t Window(size_t) const override { return 0; }
  void Choose(const LayerRows&, size_t, std::vector<uint32_t>&) const override {
    CHECK(false, "nothing leaves the full cache");
  }
};

}  // namespace

extern const Method kFullMethod{
    .name = "full",
    .stage = Stage::kSelect,
    .summary = "every token stays",
    .reference = "",
    .make_selector = [](const Arguments&, const MethodContext&) -> std::unique_ptr<const Selector> {
      return std::make_unique<FullSelector>();
    },
};

}  // namespace lesskv
