// The file that offloaded rows of one sequence lie in. It has no name: it is unlinked as soon as it is open, so that
// nothing stays behind however the program ends. Reading and writing different places is safe from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>

namespace lesskv {

class ClusterFile {
 public:
  // In a folder that exists. Throws Error(kIo).
  explicit ClusterFile(std::string folder);
  ~ClusterFile();
  ClusterFile(const ClusterFile&) = delete;
  ClusterFile& operator=(const ClusterFile&) = delete;

  size_t size() const { return size_; }
  // Has the disk hold so many bytes, so that writing them cannot fail for want of room; or gives back those beyond.
  // Throws Error(kIo), and the file stays as it was.
  void Resize(size_t bytes);
  void Write(size_t offset, std::span<const std::byte> bytes);
  void Read(size_t offset, std::span<std::byte> bytes) const;
  // The next bytes to several places, each of `bytes` bytes.
  void ReadPieces(size_t offset, std::span<std::byte* const> to, size_t bytes) const;

  // Bytes [offset, offset + bytes) in memory that the system can take back; until Unmap or Resize. Throws Error(kIo)
  // where they cannot be read, which would otherwise be a signal when they are used.
  const std::byte* Map(size_t offset, size_t bytes) const;
  void Unmap();

 private:
  const std::byte* MapAll() const;
  void ReadThrough(size_t offset, size_t bytes) const;
  [[noreturn]] void FailIo(const char* what, size_t bytes, int error_number) const;

  std::string folder_;
  int file_ = -1;
  size_t size_ = 0;
  mutable std::mutex mutex_;
  mutable void* mapped_ = nullptr;
};

}  // namespace lesskv
