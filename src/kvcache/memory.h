// Memory of one sequence's cache. Every byte goes through a ByteCounter, so that the bytes reported are the bytes
// allocated: rows, positions, scores, residual state, slack.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <utility>

#include "base/error.h"
#include "base/large_pages.h"
#include "kernels/rows/rows.h"

namespace lesskv {

struct ByteCounter {
  size_t now = 0;
  size_t peak = 0;
  bool only_counts = false;  // for plans: buffers have a size but no memory
  bool apart = false;        // of a copy that has memory of its own: what it might share it copies
};

// Memory that caches may hold together, by its address.
struct SharedPart {
  const void* memory = nullptr;
  size_t bytes = 0;
};

// One aligned allocation, counted while it lives; of 2 MiB and more in large pages. Move-only. The counter must outlive it.
// Several buffers may hold the same memory (Share): each counts all of it, as if it were alone; the last one frees it.
class CountedBuffer {
 public:
  CountedBuffer() = default;
  // Zeroed memory. Throws Error(kOutOfMemory).
  CountedBuffer(ByteCounter& counter, size_t bytes) : counter_(&counter), size_(bytes) {
    if (bytes > 0 && !counter.only_counts) Allocate(bytes);
    counter.now += bytes;
    counter.peak = std::max(counter.peak, counter.now);
  }
  CountedBuffer(CountedBuffer&& other) noexcept { *this = std::move(other); }
  CountedBuffer& operator=(CountedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(counter_, other.counter_);
    std::swap(owners_, other.owners_);
    return *this;
  }
  ~CountedBuffer() {
    if (counter_ != nullptr) counter_->now -= size_;
    if (data_ == nullptr) return;
    if (owners_ != nullptr) {
      if (owners_->fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      delete owners_;
    }
    if (size_ >= kLargePage)
      FreeLargePages(data_, size_);
    else
      ::operator delete(data_, std::align_val_t{kRegionAlign});
  }

  CountedBuffer Clone(ByteCounter& counter) const {
    CountedBuffer copy(counter, size_);
    if (data_ != nullptr) std::memcpy(copy.data_, data_, size_);
    return copy;
  }

  // The same memory once more, counted by `counter` too, for who will only read it as long as it is shared(). Buffers of
  // one memory may be freed, and shared again, on different threads.
  CountedBuffer Share(ByteCounter& counter) const {
    if (data_ == nullptr || counter.apart) return Clone(counter);
    CountedBuffer same;
    same.owners_ = &Owners();
    same.owners_->fetch_add(1, std::memory_order_relaxed);
    same.counter_ = &counter;
    same.size_ = size_;
    same.data_ = data_;
    counter.now += size_;
    counter.peak = std::max(counter.peak, counter.now);
    return same;
  }
  bool shared() const { return owners_ != nullptr && owners_->load(std::memory_order_acquire) > 1; }

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  // [size() / sizeof(T)]; empty where the buffer only counts.
  template <typename T>
  std::span<T> As() {
    return {reinterpret_cast<T*>(data_), data_ == nullptr ? 0 : size_ / sizeof(T)};
  }
  template <typename T>
  std::span<const T> As() const {
    return {reinterpret_cast<const T*>(data_), data_ == nullptr ? 0 : size_ / sizeof(T)};
  }

 private:
  void Allocate(size_t bytes) {
    const bool large = bytes >= kLargePage;
    data_ = large ? AllocateLargePages(bytes)
                  : static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kRegionAlign}, std::nothrow));
    if (data_ == nullptr) Fail(ErrorCode::kOutOfMemory, "the cache needs {} more bytes, which cannot be had", bytes);
    if (!large) std::memset(data_, 0, bytes);
  }

  // Who is first, of several threads that share this buffer, makes the count.
  std::atomic<uint32_t>& Owners() const {
    const std::atomic_ref<std::atomic<uint32_t>*> owners(owners_);
    std::atomic<uint32_t>* held = owners.load(std::memory_order_acquire);
    if (held != nullptr) return *held;
    auto* const made = new std::atomic<uint32_t>(1);
    if (owners.compare_exchange_strong(held, made, std::memory_order_acq_rel)) return *made;
    delete made;
    return *held;
  }

  ByteCounter* counter_ = nullptr;
  size_t size_ = 0;
  std::byte* data_ = nullptr;
  mutable std::atomic<uint32_t>* owners_ = nullptr;  // how many buffers have this memory; null while it is one
};

// Counts bytes that were allocated elsewhere (a vector's), while it lives. Move-only.
class CountedBytes {
 public:
  CountedBytes() = default;
  CountedBytes(ByteCounter& counter, size_t bytes) : counter_(&counter), bytes_(bytes) {
    counter.now += bytes;
    counter.peak = std::max(counter.peak, counter.now);
  }
  CountedBytes(CountedBytes&& other) noexcept { *this = std::move(other); }
  CountedBytes& operator=(CountedBytes&& other) noexcept {
    std::swap(counter_, other.counter_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~CountedBytes() {
    if (counter_ != nullptr) counter_->now -= bytes_;
  }

 private:
  ByteCounter* counter_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace lesskv
