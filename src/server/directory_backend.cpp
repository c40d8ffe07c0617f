#include "server/directory_backend.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <utility>

#include "base/atomic_file.h"
#include "base/mmap.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;
constexpr std::string_view kEnding = ".session";

std::optional<SessionName> NameOf(std::string_view file) {
  if (!file.ends_with(kEnding)) return std::nullopt;
  return SessionName::Parse(file.substr(0, file.size() - kEnding.size()));
}

// Of a process that was killed while it wrote.
bool IsLeftover(const std::string& file) { return file.ends_with(".tmp") && file.find(kEnding) != std::string::npos; }

[[noreturn]] void FailUsing(const std::string& directory, const std::error_code& error) {
  Fail(ErrorCode::kIo, "the session store {} cannot be used: {}", directory, error.message());
}

}  // namespace

DirectoryBackend::DirectoryBackend(std::string directory, size_t max_bytes)
    : directory_(std::move(directory)), max_bytes_(max_bytes) {
  Make();
  lock_.emplace(directory_);
  Scan();
  Trim(0);
}

void DirectoryBackend::Make() {
  std::error_code error;
  // What was said is nobody else's business.
  if (fs::create_directories(directory_, error)) fs::permissions(directory_, fs::perms::owner_all, error);
  if (error) FailUsing(directory_, error);
}

// A second server would take the first one's unfinished files for leftovers, and each would count its own files only.
// Where the file system has no locks there is none.
DirectoryBackend::Lock::Lock(const std::string& directory)
    : fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (::flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
  ::close(fd);
  Fail(ErrorCode::kInvalidArgument, "the session store {} is another server's: give each a directory of its own",
       directory);
}

DirectoryBackend::Lock::~Lock() {
  if (fd >= 0) ::close(fd);
}

void DirectoryBackend::Scan() {
  struct Found {
    SessionName name;
    fs::file_time_type time;
    size_t bytes;
  };
  std::vector<Found> found;
  try {
    for (const fs::directory_entry& entry : fs::directory_iterator(directory_)) {
      const std::string file = entry.path().filename().string();
      if (!entry.is_regular_file()) continue;
      if (IsLeftover(file)) fs::remove(entry.path());
      if (const auto name = NameOf(file)) found.push_back({*name, entry.last_write_time(), entry.file_size()});
    }
  } catch (const fs::filesystem_error& error) {
    FailUsing(directory_, error.code());
  }
  if (::access(directory_.c_str(), W_OK | X_OK) != 0)
    Fail(ErrorCode::kIo, "the session store {} cannot be written", directory_);
  std::ranges::sort(found, {}, &Found::time);
  for (const Found& file : found) Add(file.name, file.bytes);
}

std::vector<size_t> DirectoryBackend::Lengths() {
  const std::lock_guard lock(mutex_);
  std::vector<size_t> lengths;
  for (const auto& [n, count] : lengths_) lengths.push_back(n);
  return lengths;
}

std::vector<bool> DirectoryBackend::Has(std::span<const SessionName> names) {
  const std::lock_guard lock(mutex_);
  std::vector<bool> there;
  for (const SessionName& name : names) there.push_back(files_.contains(name));
  return there;
}

bool DirectoryBackend::Read(const SessionName& name, const Use& use) {
  if (!Touch(name)) return false;
  use(MappedFile::Open(Where(name)).bytes());
  return true;
}

// In memory and, for the next start, at the file. Somebody may have taken that away.
bool DirectoryBackend::Touch(const SessionName& name) {
  const std::lock_guard lock(mutex_);
  const auto file = files_.find(name);
  if (file == files_.end()) return false;
  if (::utimensat(AT_FDCWD, Where(name).c_str(), nullptr, 0) != 0 && errno == ENOENT) {
    Forget(file);
    return false;
  }
  file->second.used = ++clock_;
  return true;
}

void DirectoryBackend::Write(const SessionName& name, std::span<const std::byte> bytes) {
  {
    const std::lock_guard lock(mutex_);
    Trim(bytes.size());
  }
  AtomicFile file(Where(name));
  file.Write(bytes);
  file.Commit();
  const std::lock_guard lock(mutex_);
  if (const auto there = files_.find(name); there != files_.end()) Forget(there);
  Add(name, bytes.size());
}

void DirectoryBackend::Add(const SessionName& name, size_t bytes) {
  files_[name] = {bytes, ++clock_};
  ++lengths_[name.n_tokens];
  usage_.bytes += bytes;
}

void DirectoryBackend::Forget(Files::iterator file) {
  usage_.bytes -= file->second.bytes;
  const auto length = lengths_.find(file->first.n_tokens);
  if (--length->second == 0) lengths_.erase(length);
  files_.erase(file);
}

void DirectoryBackend::Trim(size_t more) {
  while (!files_.empty() && usage_.bytes + more > max_bytes_) {
    const auto oldest = std::ranges::min_element(files_, {}, [](const auto& file) { return file.second.used; });
    ::unlink(Where(oldest->first).c_str());
    Forget(oldest);
    ++usage_.removed;
  }
}

std::optional<StoreUsage> DirectoryBackend::Usage() const {
  const std::lock_guard lock(mutex_);
  StoreUsage usage = usage_;
  usage.files = files_.size();
  return usage;
}

std::string DirectoryBackend::Where(const SessionName& name) const {
  return (fs::path(directory_) / (name.ToString() + std::string(kEnding))).string();
}

}  // namespace lesskv
