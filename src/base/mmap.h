// A read-only view of a whole file, mapped into memory: pages are read when they are first touched and shared with
// every other process that maps the same file.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace lesskv {

// Move-only owner of one mapping. The bytes stay valid, at the same address, until the owner is destroyed; moving the
// owner does not move them. Reading is thread-safe. Whoever truncates the file while it is mapped causes SIGBUS on the
// next access to the missing pages: replace files by renaming (atomic_file.h), never in place.
class MappedFile {
 public:
  // Maps a regular, non-empty file. Throws Error: kNotFound when it cannot be opened, kBadFile for a directory, a pipe
  // or device, or an empty file, kIo when mapping fails.
  static MappedFile Open(const std::string& path);

  // The same bytes, read into memory of this process at once, by all threads (large_pages.h): slower to open, and
  // quicker to stream through than a file's 4 KiB pages. Throws Error as Open does, and kOutOfMemory.
  static MappedFile Read(const std::string& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  // The file's bytes; page-aligned.
  std::span<const std::byte> bytes() const { return {data_, size_}; }

  // Takes the whole pages of `part`, which lies inside bytes(), out of this process's memory; touching them brings them
  // back. Only for a file that was mapped, not read (Read): its bytes would be lost.
  void Release(std::span<const std::byte> part) const;

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lesskv
