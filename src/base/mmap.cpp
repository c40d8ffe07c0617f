#include "base/mmap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/checked.h"
#include "base/error.h"

namespace lesskv {
namespace {

// Closes on every way out; a mapping outlives its descriptor.
struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

size_t RegularFileSize(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) Fail(ErrorCode::kIo, "cannot examine {}: {}", path, std::strerror(errno));
  if (S_ISDIR(info.st_mode)) Fail(ErrorCode::kBadFile, "{} is a directory, expected a file", path);
  if (!S_ISREG(info.st_mode)) Fail(ErrorCode::kBadFile, "{} is not a regular file", path);
  if (info.st_size == 0) Fail(ErrorCode::kBadFile, "{} is empty", path);
  return CheckedCast<size_t>(info.st_size, "file size");
}

}  // namespace

MappedFile MappedFile::Open(const std::string& path) {
  // O_NONBLOCK: opening a named pipe would otherwise wait for a writer; it has no effect on regular files.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) Fail(ErrorCode::kNotFound, "cannot open {}: {}", path, std::strerror(errno));
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

void MappedFile::Advise(Access access) const {
  if (data_ == nullptr) return;
  int advice = MADV_NORMAL;
  if (access == Access::kSequential) advice = MADV_SEQUENTIAL;
  if (access == Access::kRandom) advice = MADV_RANDOM;
  if (access == Access::kWillNeed) advice = MADV_WILLNEED;
  ::madvise(const_cast<std::byte*>(data_), size_, advice);
}

}  // namespace lesskv
