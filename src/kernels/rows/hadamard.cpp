#include "kernels/rows/hadamard.h"

#include <cmath>

#include "base/check.h"
#include "kernels/basic/cpu.h"

// clang-format off: this file is included again for each target, before the headers below it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/rows/hadamard.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace lesskv {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

constexpr size_t kMaxLanes = HWY_MAX_BYTES / sizeof(float);

// Butterflies inside a vector: lane i meets lane i ^ apart, apart = 2^stage.
struct LaneButterflies {
  HWY_ALIGN int32_t partners[16][kMaxLanes];
  HWY_ALIGN float signs[16][kMaxLanes];

  void Fill() {
    for (size_t stage = 0, apart = 1; apart < hn::Lanes(D()); ++stage, apart *= 2) {
      for (size_t i = 0; i < hn::Lanes(D()); ++i) {
        partners[stage][i] = static_cast<int32_t>(i ^ apart);
        signs[stage][i] = (i & apart) != 0 ? -1.0f : 1.0f;
      }
    }
  }
  // Sums and differences as a scalar loop has them: the product with the sign is exact.
  HWY_INLINE V Apply(V v, size_t stage) const {
    const D d;
    const V other = hn::TableLookupLanes(v, hn::SetTableIndices(d, partners[stage]));
    return hn::MulAdd(v, hn::Load(d, signs[stage]), other);
  }
};

// n is a multiple of block, and of the vector's length.
void SimdHadamard(float* x, size_t n, size_t block, float scale) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  LaneButterflies lane_butterflies;
  lane_butterflies.Fill();
  for (size_t i = 0; i < n; i += lanes) {
    V v = hn::LoadU(d, x + i);
    for (size_t stage = 0, apart = 1; apart < lanes && apart < block; ++stage, apart *= 2)
      v = lane_butterflies.Apply(v, stage);
    if (block <= lanes) v = hn::Mul(v, hn::Set(d, scale));
    hn::StoreU(v, d, x + i);
  }
  for (float* end = x + n; x < end && block > lanes; x += block) {
    for (size_t apart = lanes; apart < block; apart *= 2) {
      const V factor = hn::Set(d, apart * 2 == block ? scale : 1.0f);
      for (size_t i = 0; i < block; i += 2 * apart) {
        for (size_t j = i; j < i + apart; j += lanes) {
          const V a = hn::LoadU(d, x + j), b = hn::LoadU(d, x + j + apart);
          hn::StoreU(hn::Mul(hn::Add(a, b), factor), d, x + j);
          hn::StoreU(hn::Mul(hn::Sub(a, b), factor), d, x + j + apart);
        }
      }
    }
  }
}

size_t VectorLanes() { return hn::Lanes(D()); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace lesskv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace lesskv {
namespace {

HWY_EXPORT(SimdHadamard);
HWY_EXPORT(VectorLanes);

void ScalarHadamard(float* x, size_t n, size_t block, float scale) {
  for (float* end = x + n; x < end; x += block) {
    for (size_t apart = 1; apart < block; apart *= 2) {
      for (size_t i = 0; i < block; ++i) {
        if ((i & apart) != 0) continue;
        const float a = x[i], b = x[i + apart];
        x[i] = a + b;
        x[i + apart] = a - b;
      }
    }
    for (size_t i = 0; i < block; ++i) x[i] *= scale;
  }
}

}  // namespace

size_t HadamardBlock(size_t dim) {
  CHECK(dim > 0);
  return dim & ~(dim - 1);
}

void Hadamard(float* x, size_t n, size_t block) {
  CHECK(block > 0 && (block & (block - 1)) == 0 && n % block == 0, "{} floats in blocks of {}", n, block);
  if (block == 1) return;
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(block)));
  size_t vectors = 0;  // a rest shorter than a vector holds whole blocks, too
  if (ActiveIsa() != Isa::kScalar) {
    vectors = n - n % HWY_DYNAMIC_DISPATCH(VectorLanes)();
    HWY_DYNAMIC_DISPATCH(SimdHadamard)(x, vectors, block, scale);
  }
  ScalarHadamard(x + vectors, n - vectors, block, scale);
}

}  // namespace lesskv
#endif  // HWY_ONCE
