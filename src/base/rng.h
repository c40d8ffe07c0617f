// A small seeded generator with a fixed algorithm (xoshiro256++ by Blackman and Vigna, seeded through splitmix64), so
// that a seed means the same numbers on every platform and standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace lesskv {

class Rng {
 public:
  explicit Rng(uint64_t seed);

  uint64_t Next();                       // 64 uniform bits
  uint64_t Below(uint64_t n);            // uniform in [0, n), n >= 1, without modulo bias
  double Uniform();                      // uniform in [0, 1), 53 bits
  float UniformFloat(float low, float high) { return low + static_cast<float>(Uniform()) * (high - low); }
  float Normal();                        // standard normal (Box-Muller)

  template <typename Container>
  void Shuffle(Container& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[Below(i)]);
  }

 private:
  uint64_t state_[4];
  float spare_ = 0;
  bool has_spare_ = false;
};

}  // namespace lesskv
