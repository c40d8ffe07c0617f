// Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864, equation 34): pairs of coordinates of a query or
// key are rotated by position times a frequency that falls with the pair's index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lesskv {

enum class RopeStyle {
  kInterleaved,  // pairs (0, 1), (2, 3), ...: GGUF's "NORM", architecture llama
  kHalves,       // pairs (0, n/2), (1, n/2 + 1), ...: "NEOX", architecture qwen2
};

// YaRN (Peng et al., arXiv 2309.00071, section 3.2): pairs that turn more than `beta_fast` times within the original
// context are not stretched, those that turn less than `beta_slow` times are stretched in full (by linear_scale), and
// between them the share of stretching rises linearly with the pair's index.
struct YarnConfig {
  double original_ctx = 0;  // tokens the model was first trained for; 0: no YaRN
  double beta_fast = 32, beta_slow = 1;
};

struct RopeConfig {
  size_t n_dims = 0;  // coordinates rotated, even, at most head_dim; the rest pass through
  RopeStyle style = RopeStyle::kInterleaved;
  double base = 10000.0;                      // frequency of pair i: base^(-2 i / n_dims)
  double linear_scale = 1.0;                  // angles are divided by it (a context stretched 4 times has 4)
  std::vector<float> frequency_factors = {};  // empty, or n_dims / 2 divisors: the tensor rope_freqs.weight
  YarnConfig yarn = {};
  double magnitude = 1.0;  // rotated coordinates are multiplied by it too (the attention factor of YaRN and LongRoPE)
};

// Frequencies, fixed for a model. Immutable and shared.
class RopeTable {
 public:
  // Throws Error when n_dims is odd, the factors' count is not n_dims / 2, or a number is not positive and finite.
  explicit RopeTable(const RopeConfig& config);

  size_t n_dims() const { return frequencies_.size() * 2; }
  RopeStyle style() const { return style_; }

  double magnitude() const { return magnitude_; }

  // Radians a position, in double: angle = position * frequency must keep its fraction at position two billion.
  const std::vector<double>& frequencies() const { return frequencies_; }

  // cos and sin of each pair's angle at `position`, times the magnitude, n_dims / 2 floats each.
  void Angles(int32_t position, float* cosine, float* sine) const;

 private:
  // A position is a number of four digits of eight bits, and its rotation the product of its digits' rotations: a few
  // multiplications in double instead of a sine and a cosine, exact to 1e-15 and cheap for caches that rotate every row
  // anew at each step.
  static constexpr int kDigitBits = 8;
  static constexpr size_t kDigits = 4;
  static constexpr size_t kDigitValues = size_t{1} << kDigitBits;

  RopeStyle style_;
  double magnitude_;
  std::vector<double> frequencies_;
  std::vector<double> turns_;  // [kDigits, kDigitValues, 2 (cosine, sine), n_pairs]
};

// Rotates in place.
//   x          [n_rows, n_heads, head_dim] float32, rows row_stride floats apart, heads head_dim apart
//   positions  [n_rows], each >= 0
void RotateRows(const RopeTable& table, float* x, size_t n_rows, size_t row_stride, size_t n_heads, size_t head_dim,
                const int32_t* positions);

}  // namespace lesskv
