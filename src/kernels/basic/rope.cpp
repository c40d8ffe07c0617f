#include "kernels/basic/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/checked.h"
#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"

namespace lesskv {
namespace {

void CheckPositive(const char* what, double value) {
  if (!(value > 0) || !std::isfinite(value)) {
    Fail(ErrorCode::kInvalidArgument, "rotary embedding: {} must be positive and finite, found {}", what, value);
  }
}

// `step` is the distance between the two coordinates of a pair, `stride` between pairs.
void RotateHead(float* head, size_t n_pairs, size_t stride, size_t step, const float* cosine, const float* sine) {
  for (size_t i = 0; i < n_pairs; ++i) {
    float* a = head + i * stride;
    float* b = a + step;
    const float first = *a, second = *b;
    *a = first * cosine[i] - second * sine[i];
    *b = first * sine[i] + second * cosine[i];
  }
}

void RotateRow(RopeStyle style, size_t n_pairs, float* row, size_t n_heads, size_t head_dim, const float* cosine,
               const float* sine) {
  for (size_t h = 0; h < n_heads; ++h) {
    float* head = row + h * head_dim;
    // Constant strides let the compiler vectorise both loops.
    if (style == RopeStyle::kHalves) {
      RotateHead(head, n_pairs, 1, n_pairs, cosine, sine);
    } else {
      RotateHead(head, n_pairs, 2, 1, cosine, sine);
    }
  }
}

// How far pair i is stretched, 0 to 1, by YaRN's equations 18 and 23 with the bounds rounded outwards to whole pairs.
double YarnShare(const RopeConfig& config, size_t i) {
  if (config.yarn.original_ctx == 0) return 1;
  const double n = static_cast<double>(config.n_dims);
  const auto pair_that_turns = [&](double turns) {
    return n * std::log(config.yarn.original_ctx / (turns * 2 * std::numbers::pi)) / (2 * std::log(config.base));
  };
  const double low = std::max(0.0, std::floor(pair_that_turns(config.yarn.beta_fast)));
  const double high = std::min(n - 1, std::ceil(pair_that_turns(config.yarn.beta_slow)));
  return std::clamp((static_cast<double>(i) - low) / std::max(0.001, high - low), 0.0, 1.0);
}

}  // namespace

RopeTable::RopeTable(const RopeConfig& config) : style_(config.style), magnitude_(config.magnitude) {
  if (config.n_dims % 2 != 0) {
    Fail(ErrorCode::kInvalidArgument, "rotary embedding: an even number of dimensions expected, found {}",
         config.n_dims);
  }
  const size_t n_pairs = config.n_dims / 2;
  if (!config.frequency_factors.empty() && config.frequency_factors.size() != n_pairs) {
    Fail(ErrorCode::kMismatch, "rotary embedding: {} frequency factors expected, found {}", n_pairs,
         config.frequency_factors.size());
  }
  CheckPositive("the frequency base", config.base);
  CheckPositive("the linear scale", config.linear_scale);
  CheckPositive("the magnitude", config.magnitude);
  if (config.yarn.original_ctx != 0) {
    CheckPositive("YaRN's original context", config.yarn.original_ctx);
    CheckPositive("YaRN's fast bound", config.yarn.beta_fast);
    CheckPositive("YaRN's slow bound", config.yarn.beta_slow);
  }
  for (float factor : config.frequency_factors) CheckPositive("a frequency factor", factor);
  frequencies_.resize(n_pairs);
  for (size_t i = 0; i < n_pairs; ++i) {
    const double factor = config.frequency_factors.empty() ? 1.0 : config.frequency_factors[i];
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config.n_dims);
    const double share = YarnShare(config, i);
    frequencies_[i] = std::pow(config.base, exponent) / factor * (share / config.linear_scale + (1 - share));
  }
  turns_.resize(kDigits * kDigitValues * 2 * n_pairs);
  for (size_t row = 0; row < kDigits * kDigitValues; ++row) {
    const uint64_t position = uint64_t{row % kDigitValues} << (kDigitBits * (row / kDigitValues));
    for (size_t i = 0; i < n_pairs; ++i) {
      const double angle = static_cast<double>(position) * frequencies_[i];
      turns_[row * 2 * n_pairs + i] = std::cos(angle);
      turns_[(row * 2 + 1) * n_pairs + i] = std::sin(angle);
    }
  }
}

void RopeTable::Angles(int32_t position, float* cosine, float* sine) const {
  DCHECK(position >= 0, "position {}", position);
  const size_t n = frequencies_.size();
  constexpr size_t kChunk = 64;  // pairs whose double values fit the stack and the first cache
  for (size_t first = 0; first < n; first += kChunk) {
    const size_t count = std::min(kChunk, n - first);
    double re[kChunk], im[kChunk];
    const double* turn = turns_.data() + (static_cast<uint32_t>(position) % kDigitValues) * 2 * n + first;
    std::copy_n(turn, count, re);
    std::copy_n(turn + n, count, im);
    uint32_t rest = static_cast<uint32_t>(position) >> kDigitBits;
    for (size_t digit = 1; rest != 0; ++digit, rest >>= kDigitBits) {
      turn = turns_.data() + (digit * kDigitValues + rest % kDigitValues) * 2 * n + first;
      for (size_t i = 0; i < count; ++i) {
        const double a = re[i], b = im[i];
        re[i] = a * turn[i] - b * turn[n + i];
        im[i] = a * turn[n + i] + b * turn[i];
      }
    }
    for (size_t i = 0; i < count; ++i) {
      cosine[first + i] = static_cast<float>(re[i] * magnitude_);
      sine[first + i] = static_cast<float>(im[i] * magnitude_);
    }
  }
}

void RotateRows(const RopeTable& table, float* x, size_t n_rows, size_t row_stride, size_t n_heads, size_t head_dim,
                const int32_t* positions) {
  CHECK(table.n_dims() <= head_dim, "{} rotary dimensions of heads of {}", table.n_dims(), head_dim);
  const size_t n_pairs = table.n_dims() / 2;
  constexpr size_t kRowsPerTask = 16;
  const size_t n_tasks = CeilDiv(n_rows, kRowsPerTask);
  std::vector<float> angles(n_tasks * n_pairs * 2);
  ParallelFor(n_tasks, [&](size_t task) {
    float* cosine = angles.data() + task * n_pairs * 2;
    float* sine = cosine + n_pairs;
    const size_t end = std::min(n_rows, (task + 1) * kRowsPerTask);
    for (size_t r = task * kRowsPerTask; r < end; ++r) {
      const bool same = r > task * kRowsPerTask && positions[r] == positions[r - 1];
      if (!same) table.Angles(positions[r], cosine, sine);
      RotateRow(table.style(), n_pairs, x + r * row_stride, n_heads, head_dim, cosine, sine);
    }
  });
}

}  // namespace lesskv
