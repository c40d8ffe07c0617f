#include "kvcache/recall/cluster_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "base/error.h"

namespace lesskv {
namespace {

const auto kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

}  // namespace

ClusterFile::ClusterFile(std::string folder) : folder_(std::move(folder)) {
  std::string name = folder_ + "/lesskv-clusters-XXXXXX";
  file_ = mkostemp(name.data(), O_CLOEXEC);
  if (file_ < 0)
    Fail(ErrorCode::kIo, "the folder {} of offloaded clusters: cannot make a file there: {}", folder_, std::strerror(errno));
  unlink(name.c_str());
}

ClusterFile::~ClusterFile() {
  Unmap();
  close(file_);
}

void ClusterFile::FailIo(const char* what, size_t bytes, int error_number) const {
  Fail(ErrorCode::kIo, "the folder {} of offloaded clusters: cannot {} {} bytes of rows: {}", folder_, what, bytes,
       error_number == 0 ? "the file ends" : std::strerror(error_number));
}

void ClusterFile::Resize(size_t bytes) {
  Unmap();
  if (bytes > size_) {
    struct stat now = {};  // new room behind rows that are gone would have zeros for them
    if (fstat(file_, &now) != 0) FailIo("read", size_, errno);
    if (static_cast<size_t>(now.st_size) < size_) FailIo("read", size_, 0);
    const int error = posix_fallocate(file_, static_cast<off_t>(size_), static_cast<off_t>(bytes - size_));
    if (error != 0) {
      [[maybe_unused]] const int ignored = ftruncate(file_, static_cast<off_t>(size_));  // what was had of it
      FailIo("make room for", bytes - size_, error);
    }
  } else if (bytes < size_ && ftruncate(file_, static_cast<off_t>(bytes)) != 0) {
    return;  // room that is not given back is used by the next step
  }
  size_ = bytes;
}

void ClusterFile::Write(size_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = pwrite(file_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) FailIo("write", bytes.size(), errno);
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += static_cast<size_t>(n);
  }
}

void ClusterFile::Read(size_t offset, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t n = pread(file_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) FailIo("read", bytes.size(), n == 0 ? 0 : errno);
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += static_cast<size_t>(n);
  }
}

void ClusterFile::ReadPieces(size_t offset, std::span<std::byte* const> to, size_t bytes) const {
  constexpr size_t kMostPieces = 64;
  for (size_t first = 0; first < to.size(); first += kMostPieces) {
    iovec pieces[kMostPieces];
    const size_t n = std::min(kMostPieces, to.size() - first);
    for (size_t i = 0; i < n; ++i) pieces[i] = {to[first + i], bytes};
    const ssize_t got = preadv(file_, pieces, static_cast<int>(n), static_cast<off_t>(offset));
    if (got != static_cast<ssize_t>(n * bytes))  // rare: piece by piece, which says what is wrong
      for (size_t i = 0; i < n; ++i) Read(offset + i * bytes, {to[first + i], bytes});
    offset += n * bytes;
  }
}

// Mapped pages that cannot be had kill the program when they are touched, so the system is asked to have them first.
const std::byte* ClusterFile::Map(size_t offset, size_t bytes) const {
  const std::byte* const all = MapAll();
  const size_t first = offset / kPage * kPage;
  int failed = -1;
#ifdef MADV_POPULATE_READ  // Linux 5.14
  failed = madvise(const_cast<std::byte*>(all) + first, offset + bytes - first, MADV_POPULATE_READ);
#endif
  if (failed != 0) ReadThrough(offset, bytes);
  return all + offset;
}

// Says what is wrong with bytes that cannot be read, and has the system hold those that can.
void ClusterFile::ReadThrough(size_t offset, size_t bytes) const {
  std::vector<std::byte> piece(std::min<size_t>(bytes, 1 << 16));
  for (size_t done = 0; done < bytes; done += piece.size())
    Read(offset + done, std::span(piece).first(std::min(piece.size(), bytes - done)));
}

const std::byte* ClusterFile::MapAll() const {
  const std::lock_guard lock(mutex_);
  if (mapped_ == nullptr) {
    void* const memory = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_, 0);
    if (memory == MAP_FAILED) FailIo("map", size_, errno);
    mapped_ = memory;
  }
  return static_cast<const std::byte*>(mapped_);
}

void ClusterFile::Unmap() {
  if (mapped_ != nullptr) munmap(mapped_, size_);
  mapped_ = nullptr;
}

}  // namespace lesskv
