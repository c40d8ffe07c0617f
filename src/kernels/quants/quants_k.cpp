// The encoders of the K formats: our own search. The format leaves three things to choose, and we choose them in turn
// by least squares: a real scale and minimum a group (trying several grids, each followed by the best line through its
// rounded numbers), the two half-precision factors of the block, and the 6- or 8-bit scales next to the rounded ones.
#include <algorithm>
#include <cmath>

#include "kernels/quants/half.h"
#include "kernels/quants/quants.h"

namespace lesskv::internal {
namespace {

// ---- Q4_K, Q5_K: x = scale * q - minimum, q in [0, levels], scale and minimum not negative

constexpr int kGroup = 32;

struct Line {
  float scale = 0, minimum = 0;
};

// The numbers that represent the group best under a given line.
void RoundToLine(const float* x, const Line& line, int levels, int q[kGroup]) {
  const float inverse = line.scale > kSmallestScale ? 1.0f / line.scale : 0.0f, top = static_cast<float>(levels);
  for (int i = 0; i < kGroup; ++i) {
    q[i] = static_cast<int>(std::clamp((x[i] + line.minimum) * inverse, 0.0f, top) + 0.5f);
  }
}

float SquaredError(const float* x, const Line& line, const int q[kGroup]) {
  float sum = 0;
  for (int i = 0; i < kGroup; ++i) {
    const float error = line.scale * static_cast<float>(q[i]) - line.minimum - x[i];
    sum += error * error;
  }
  return sum;
}

// The least-squares line through the points (q, x), held to what the format can express.
Line BestLine(const float* x, const int q[kGroup]) {
  double sum_q = 0, sum_qq = 0, sum_x = 0, sum_xq = 0;
  for (int i = 0; i < kGroup; ++i) {
    sum_q += q[i];
    sum_qq += q[i] * q[i];
    sum_x += x[i];
    sum_xq += static_cast<double>(x[i]) * q[i];
  }
  const double determinant = kGroup * sum_qq - sum_q * sum_q;
  double scale = determinant > 0 ? (kGroup * sum_xq - sum_q * sum_x) / determinant : 0;
  double minimum = (scale * sum_q - sum_x) / kGroup;
  if (minimum < 0) {
    minimum = 0;
    scale = sum_qq > 0 ? sum_xq / sum_qq : 0;
  }
  return {static_cast<float>(std::max(scale, 0.0)), static_cast<float>(minimum)};
}

Line FitGroup(const float* x, int levels) {
  const auto [lowest, highest] = std::minmax_element(x, x + kGroup);
  const float low = std::min(*lowest, 0.0f), range = *highest - low;
  if (range <= 0) return {0, -low};
  Line best;
  float best_error = -1;
  // Grids a little coarser and finer than the one that just spans the range: clipping an outlier can pay.
  for (int step = -8; step <= 4; ++step) {
    Line line{range / (static_cast<float>(levels) - 0.2f * static_cast<float>(step)), -low};
    int q[kGroup];
    for (int round = 0; round < 2; ++round) {
      RoundToLine(x, line, levels, q);
      line = BestLine(x, q);
    }
    RoundToLine(x, line, levels, q);
    const float error = SquaredError(x, line, q);
    if (best_error < 0 || error < best_error) {
      best_error = error;
      best = line;
    }
  }
  return best;
}

struct CodedLine {
  uint8_t scale = 0, minimum = 0;
};

// `line` in 6-bit steps of d and dmin: the best of the rounded codes and their neighbours. Leaves its numbers in q.
CodedLine EncodeLine(const float* x, const Line& line, float d, float dmin, int levels, int q[kGroup]) {
  const int scale = d > kSmallestScale ? RoundClamped(line.scale / d, 0, 63) : 0;
  const int minimum = dmin > kSmallestScale ? RoundClamped(line.minimum / dmin, 0, 63) : 0;
  CodedLine best;
  float best_error = -1;
  for (int s = std::max(scale - 1, 0); s <= std::min(scale + 1, 63); ++s) {
    for (int m = std::max(minimum - 1, 0); m <= std::min(minimum + 1, 63); ++m) {
      const Line tried{d * static_cast<float>(s), dmin * static_cast<float>(m)};
      int numbers[kGroup];
      RoundToLine(x, tried, levels, numbers);
      const float error = SquaredError(x, tried, numbers);
      if (best_error >= 0 && error >= best_error) continue;
      best_error = error;
      best = {static_cast<uint8_t>(s), static_cast<uint8_t>(m)};
      std::copy_n(numbers, kGroup, q);
    }
  }
  return best;
}

// Fills d, dmin and scales of the block and the numbers of its eight groups.
template <typename Block>
void EncodeGroups(const float* x, int levels, Block& block, int q[8][kGroup]) {
  Line lines[8];
  float top_scale = 0, top_minimum = 0;
  for (int g = 0; g < 8; ++g) {
    lines[g] = FitGroup(x + g * kGroup, levels);
    top_scale = std::max(top_scale, lines[g].scale);
    top_minimum = std::max(top_minimum, lines[g].minimum);
  }
  block.d = ScaleToHalf(top_scale / 63.0f);
  block.dmin = ScaleToHalf(top_minimum / 63.0f);
  const float d = HalfToFloat(block.d), dmin = HalfToFloat(block.dmin);
  uint8_t scales[8], minima[8];
  for (int g = 0; g < 8; ++g) {
    const CodedLine coded = EncodeLine(x + g * kGroup, lines[g], d, dmin, levels, q[g]);
    scales[g] = coded.scale;
    minima[g] = coded.minimum;
  }
  PackScales(scales, minima, block.scales);
}

// The low four bits of all groups: group 2r in the low halves of run r, 2r + 1 in the high halves.
void PackLowHalves(const int q[8][kGroup], uint8_t qs[128]) {
  for (int r = 0; r < 4; ++r) {
    for (int l = 0; l < kGroup; ++l) {
      qs[kGroup * r + l] = static_cast<uint8_t>((q[2 * r][l] & 15) | (q[2 * r + 1][l] & 15) << 4);
    }
  }
}

// ---- Q6_K: x = scale * q, q in [-32, 31]

constexpr int kSmallGroup = 16;

void RoundToScale(const float* x, float scale, int q[kSmallGroup]) {
  const float inverse = std::fabs(scale) > kSmallestScale ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kSmallGroup; ++i) {
    q[i] = static_cast<int>(std::clamp(x[i] * inverse, -32.0f, 31.0f) + 32.5f) - 32;
  }
}

float FitSmallGroup(const float* x) {
  float largest = 0;
  for (int i = 0; i < kSmallGroup; ++i)
    if (std::fabs(x[i]) > std::fabs(largest)) largest = x[i];
  float best = 0;
  double best_gain = 0;
  for (int step = -9; step <= 9; ++step) {
    int q[kSmallGroup];
    RoundToScale(x, largest / (-32.0f + 0.1f * static_cast<float>(step)), q);
    double sum_qq = 0, sum_xq = 0;
    for (int i = 0; i < kSmallGroup; ++i) {
      sum_qq += q[i] * q[i];
      sum_xq += static_cast<double>(x[i]) * q[i];
    }
    // The best scale for these numbers lowers the squared error from |x|^2 by exactly this much.
    const double gain = sum_qq > 0 ? sum_xq * sum_xq / sum_qq : 0;
    if (gain <= best_gain) continue;
    best_gain = gain;
    best = static_cast<float>(sum_xq / sum_qq);
  }
  return best;
}

int8_t EncodeScale(const float* x, float scale, float d, int q[kSmallGroup]) {
  const int rounded = std::fabs(d) > kSmallestScale ? RoundClamped(scale / d, -128, 127) : 0;
  int best = 0;
  float best_error = -1;
  for (int s = std::max(rounded - 1, -128); s <= std::min(rounded + 1, 127); ++s) {
    const float tried = d * static_cast<float>(s);
    int numbers[kSmallGroup];
    RoundToScale(x, tried, numbers);
    float error = 0;
    for (int i = 0; i < kSmallGroup; ++i) {
      const float difference = tried * static_cast<float>(numbers[i]) - x[i];
      error += difference * difference;
    }
    if (best_error >= 0 && error >= best_error) continue;
    best_error = error;
    best = s;
    std::copy_n(numbers, kSmallGroup, q);
  }
  return static_cast<int8_t>(best);
}

}  // namespace

void QuantizeBlock(const float* x, BlockQ4_K& block) {
  int q[8][kGroup];
  EncodeGroups(x, 15, block, q);
  PackLowHalves(q, block.qs);
}

void QuantizeBlock(const float* x, BlockQ5_K& block) {
  int q[8][kGroup];
  EncodeGroups(x, 31, block, q);
  PackLowHalves(q, block.qs);
  for (int l = 0; l < kGroup; ++l) {
    int bits = 0;
    for (int g = 0; g < 8; ++g) bits |= (q[g][l] >> 4) << g;
    block.qh[l] = static_cast<uint8_t>(bits);
  }
}

void QuantizeBlock(const float* x, BlockQ6_K& block) {
  float scales[16], top = 0;
  for (int g = 0; g < 16; ++g) {
    scales[g] = FitSmallGroup(x + g * kSmallGroup);
    if (std::fabs(scales[g]) > std::fabs(top)) top = scales[g];
  }
  // -128 is the scale with one more step, as in Q4_0.
  block.d = ScaleToHalf(top / -128.0f);
  const float d = HalfToFloat(block.d);
  int q[16][kSmallGroup];
  for (int g = 0; g < 16; ++g) block.scales[g] = EncodeScale(x + g * kSmallGroup, scales[g], d, q[g]);
  std::fill(std::begin(block.ql), std::end(block.ql), uint8_t{0});
  std::fill(std::begin(block.qh), std::end(block.qh), uint8_t{0});
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, s = i % 128 / 32, l = i % 32, number = q[i / kSmallGroup][i % kSmallGroup] + 32;
    block.ql[64 * half + 32 * (s % 2) + l] |= static_cast<uint8_t>((number & 15) << (s < 2 ? 0 : 4));
    block.qh[32 * half + l] |= static_cast<uint8_t>((number >> 4) << (2 * s));
  }
}

}  // namespace lesskv::internal
