// How fast this machine reads memory: the limit that decoding is compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lesskv {

// Seconds to add up `data` on all threads, in tasks of a megabyte of which each reads its two halves side by side:
// memory serves two streams a core faster than one.
double PlainReadSeconds(std::span<const std::byte> data);

// A buffer larger than last-level caches, in large pages. Other programs come and go, so it is read beside each thing
// that is timed.
class PlainRead {
 public:
  // Throws Error(kOutOfMemory).
  explicit PlainRead(size_t bytes = size_t{256} << 20);
  ~PlainRead();
  PlainRead(const PlainRead&) = delete;
  PlainRead& operator=(const PlainRead&) = delete;

  // Reads the whole buffer once; bytes a second.
  double Measure() { return static_cast<double>(data_.size()) / PlainReadSeconds(data_); }

 private:
  std::span<std::byte> data_;
};

}  // namespace lesskv
