// Vectors that begin with a cache line, for floats that vector instructions read over and over: a large std::vector's
// begin 16 bytes behind one, so that every load of 64 bytes touches two lines, of which products of several tokens take
// many.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace lesskv {

template <typename T>
struct CacheLineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  CacheLineAllocator() = default;
  template <typename U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(size_t n) {
    if (n > SIZE_MAX / sizeof(T)) throw std::bad_array_new_length();
    return static_cast<T*>(::operator new(n * sizeof(T), kLine));
  }
  void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
  template <typename U>
  bool operator==(const CacheLineAllocator<U>&) const {
    return true;
  }
};

template <typename T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

}  // namespace lesskv
