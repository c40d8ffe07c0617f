// How fast this machine reads memory: the limit that decoding is compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lesskv {

// A buffer larger than last-level caches, in large pages, read from end to end on all threads. Other programs come and go, so it is
// read beside each thing that is timed.
class PlainRead {
 public:
  // Throws Error(kOutOfMemory).
  explicit PlainRead(size_t bytes = size_t{256} << 20);
  ~PlainRead();
  PlainRead(const PlainRead&) = delete;
  PlainRead& operator=(const PlainRead&) = delete;

  // Reads the whole buffer once; bytes a second.
  double Measure();

 private:
  std::span<uint64_t> data_;
};

}  // namespace lesskv
