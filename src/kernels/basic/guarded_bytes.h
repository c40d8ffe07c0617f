// For the tests of kernels: memory that ends where a page begins that must not be touched, so that reading or writing a
// byte too many ends the program, whatever it was compiled with.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <utility>

#include "base/check.h"

namespace lesskv {

class GuardedBytes {
 public:
  GuardedBytes() = default;
  // Zeroed.
  explicit GuardedBytes(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t own = (bytes + page - 1) / page * page;
    mapped_ = own + page;
    void* const memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "no memory for a test");
    memory_ = static_cast<std::byte*>(memory);
    CHECK(mprotect(memory_ + own, page, PROT_NONE) == 0, "a page cannot be guarded");
    data_ = memory_ + own - bytes;
  }
  GuardedBytes(GuardedBytes&& other) noexcept { *this = std::move(other); }
  GuardedBytes& operator=(GuardedBytes&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  ~GuardedBytes() {
    if (memory_ != nullptr) munmap(memory_, mapped_);
  }

  std::byte* data() const { return data_; }
  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte *memory_ = nullptr, *data_ = nullptr;
  size_t mapped_ = 0;
};

}  // namespace lesskv
