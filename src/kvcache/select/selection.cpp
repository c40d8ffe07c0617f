#include "kvcache/select/selection.h"

#include "kernels/basic.h"

namespace lesskv {

void AddOverGroup(std::span<const float> attention, size_t group, std::span<float> out) {
  CHECK(attention.size() == group * out.size());
  for (size_t g = 0; g < group; ++g) Add(out.data(), attention.data() + g * out.size(), out.size());
}

}  // namespace lesskv
