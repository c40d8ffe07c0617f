#include "base/mmap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/large_pages.h"
#include "base/threads.h"

namespace lesskv {
namespace {

// Closes on every way out; a mapping outlives its descriptor.
struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

int OpenForReading(const std::string& path) {
  // O_NONBLOCK: opening a named pipe would otherwise wait for a writer; it has no effect on regular files.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) Fail(ErrorCode::kNotFound, "cannot open {}: {}", path, std::strerror(errno));
  return fd;
}

size_t RegularFileSize(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) Fail(ErrorCode::kIo, "cannot examine {}: {}", path, std::strerror(errno));
  if (S_ISDIR(info.st_mode)) Fail(ErrorCode::kBadFile, "{} is a directory, expected a file", path);
  if (!S_ISREG(info.st_mode)) Fail(ErrorCode::kBadFile, "{} is not a regular file", path);
  if (info.st_size == 0) Fail(ErrorCode::kBadFile, "{} is empty", path);
  return CheckedCast<size_t>(info.st_size, "file size");
}

// `size` bytes from `offset` on.
void ReadAll(int fd, std::byte* to, size_t size, size_t offset, const std::string& path) {
  for (size_t done = 0; done < size;) {
    const ssize_t n = ::pread(fd, to + done, size - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) Fail(ErrorCode::kIo, "cannot read {}: {}", path, n < 0 ? std::strerror(errno) : "it became shorter");
    done += static_cast<size_t>(n);
  }
}

}  // namespace

MappedFile MappedFile::Read(const std::string& path) {
  const Descriptor file{OpenForReading(path)};
  const size_t size = RegularFileSize(file.fd, path);
  std::byte* data = AllocateLargePages(size);
  if (data == nullptr) Fail(ErrorCode::kOutOfMemory, "no memory for the {} bytes of {}", size, path);
  MappedFile result(data, size);
  // Half of the time goes into making the pages, which the system does as they are first written to: a page a task.
  ParallelFor((size + kLargePage - 1) / kLargePage, [&](size_t page) {
    const size_t first = page * kLargePage;
    ReadAll(file.fd, data + first, std::min(kLargePage, size - first), first, path);
  });
  return result;
}

MappedFile MappedFile::Open(const std::string& path) {
  const Descriptor file{OpenForReading(path)};
  const size_t size = RegularFileSize(file.fd, path);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) Fail(ErrorCode::kIo, "cannot map {} ({} bytes): {}", path, size, std::strerror(errno));
  return MappedFile(static_cast<const std::byte*>(data), size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::Release(std::span<const std::byte> part) const {
  if (part.empty()) return;
  CHECK(part.data() >= data_ && part.data() + part.size() <= data_ + size_, "not of this file");
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t first = RoundUp(static_cast<size_t>(part.data() - data_), page);
  const size_t end = static_cast<size_t>(part.data() - data_) + part.size();
  if (end < first + page) return;
  ::madvise(const_cast<std::byte*>(data_) + first, (end - first) / page * page, MADV_DONTNEED);
}

}  // namespace lesskv
