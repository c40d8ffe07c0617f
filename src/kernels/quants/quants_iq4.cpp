// The encoder of IQ4_NL: our own search. The only real choice is the block's scale. Several are tried that send the
// value of largest magnitude to about one end of the code table; for each, the least-squares scale of the codes that it
// leads to is compared by how much it lowers the squared error.
#include <array>
#include <cmath>

#include "kernels/quants/code_tables.h"
#include "kernels/quants/half.h"
#include "kernels/quants/quants.h"

namespace lesskv::internal {
namespace {

constexpr int kBlock = 32;

constexpr std::array<float, 15> kMiddles = [] {
  std::array<float, 15> middles{};
  for (size_t i = 0; i < middles.size(); ++i) middles[i] = 0.5f * static_cast<float>(kIq4Codes[i] + kIq4Codes[i + 1]);
  return middles;
}();

// The code next to each value; the lower one in the middle between two.
void RoundToCodes(const float* x, float inverse, int q[kBlock]) {
  for (int i = 0; i < kBlock; ++i) {
    const float value = x[i] * inverse;
    int code = 0;
    for (const float middle : kMiddles) code += value > middle ? 1 : 0;
    q[i] = code;
  }
}

struct Fit {
  float scale = 0;
  double gain = 0;  // how much smaller than |x|^2 the squared error is
};

Fit BestScale(const float* x, const int q[kBlock]) {
  double sum_cc = 0, sum_xc = 0;
  for (int i = 0; i < kBlock; ++i) {
    const double code = kIq4Codes[q[i]];
    sum_cc += code * code;
    sum_xc += code * static_cast<double>(x[i]);
  }
  return {static_cast<float>(sum_xc / sum_cc), sum_xc * sum_xc / sum_cc};
}

float FitBlock(const float* x) {
  float largest = 0;
  for (int i = 0; i < kBlock; ++i)
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  if (std::fabs(largest) < kSmallestScale) return 0;
  Fit best;
  for (const int8_t end : {kIq4Codes[0], kIq4Codes[15]}) {
    for (int step = -8; step <= 8; step += 2) {
      int q[kBlock];
      RoundToCodes(x, static_cast<float>(end + step) / largest, q);
      const Fit fit = BestScale(x, q);
      if (fit.gain > best.gain) best = fit;
    }
  }
  return best.scale;
}

}  // namespace

void QuantizeBlock(const float* x, BlockIQ4_NL& block) {
  block.d = ScaleToHalf(FitBlock(x));
  const float d = HalfToFloat(block.d);
  int q[kBlock];
  RoundToCodes(x, d == 0 ? 0 : 1 / d, q);
  for (int i = 0; i < kBlock / 2; ++i) block.qs[i] = static_cast<uint8_t>(q[i] | q[i + kBlock / 2] << 4);
}

}  // namespace lesskv::internal
