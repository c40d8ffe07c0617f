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
  std::error_code error;
  if (!std::filesystem::is_symlink(path, error)) return path;
  const std::filesystem::path target = std::filesystem::weakly_canonical(path, error);
  if (error) Fail(ErrorCode::kIo, "cannot write {}: {}", path, error.message());
  return target.string();
}

// Beside the file, and no longer a name than the system allows.
std::string TemporaryPath(const std::filesystem::path& path) {
  constexpr size_t kMostOfName = 200;
  const std::string name = path.filename().string().substr(0, kMostOfName);
  return (path.parent_path() / fmt::format("{}.{}.tmp", name, ::getpid())).string();
}

}  // namespace

bool IsReadOnlyFile(const std::string& path) {
  struct stat info;
  if (::stat(path.c_str(), &info) != 0) return false;
  return (info.st_mode & (S_IWUSR | S_IWGRP | S_IWOTH)) == 0 || ::access(path.c_str(), W_OK) != 0;
}

AtomicFile::AtomicFile(const std::string& path)
    : path_(FollowLink(path)), temporary_path_(TemporaryPath(path_)) {
  struct stat info;
  const bool replaces = ::stat(path_.c_str(), &info) == 0;
  if (!replaces && errno != ENOENT) FailWriting(errno);  // such as a name that is too long
  if (replaces && !S_ISREG(info.st_mode))
    Fail(ErrorCode::kIo, "cannot write {}: it exists and is not a regular file", path_);
  if (IsReadOnlyFile(path_)) Fail(ErrorCode::kIo, "cannot write {}: it is read-only", path_);
  ::unlink(temporary_path_.c_str());  // of a process that had our number and was killed
  const int fd = ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, replaces ? 0600 : 0666);
  if (fd < 0) Fail(ErrorCode::kIo, "cannot write {}: {}", path_, std::strerror(errno));
  if (replaces) ::fchmod(fd, info.st_mode & 0777);  // where it is refused, the file stays its owner's alone
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
