#include "base/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {
namespace {

// A symbolic link keeps being one: what it points to is replaced.
std::string FollowLink(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_symlink(path, ignored)) return path;
  const std::filesystem::path target = std::filesystem::weakly_canonical(path, ignored);
  return ignored ? path : target.string();
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path)
    : path_(FollowLink(path)), temporary_path_(fmt::format("{}.{}.tmp", path_, ::getpid())) {
  struct stat info;
  if (::stat(path_.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    Fail(ErrorCode::kIo, "cannot write {}: it exists and is not a regular file", path_);
  }
  const int fd = ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) Fail(ErrorCode::kIo, "cannot write {}: {}", path_, std::strerror(errno));
  file_ = ::fdopen(fd, "wb");
  CHECK(file_ != nullptr);
}

AtomicFile::~AtomicFile() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  ::unlink(temporary_path_.c_str());
}

void AtomicFile::Write(std::span<const std::byte> bytes) {
  CHECK(file_ != nullptr, "written after Commit");
  if (std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size()) FailWriting(errno);
}

void AtomicFile::Commit() {
  CHECK(file_ != nullptr, "committed twice");
  // A full disk may show only here, when the buffers are emptied.
  if (std::fflush(file_) != 0 || ::fsync(::fileno(file_)) != 0) FailWriting(errno);
  if (::rename(temporary_path_.c_str(), path_.c_str()) != 0) FailWriting(errno);
  std::fclose(file_);
  file_ = nullptr;
}

void AtomicFile::FailWriting(int error_number) const {
  Fail(ErrorCode::kIo, "cannot write {}: {}", path_, std::strerror(error_number));
}

}  // namespace lesskv
