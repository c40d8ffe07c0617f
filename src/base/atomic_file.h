// Writing a file so that nobody ever sees half of it: the bytes go to a temporary file in the same folder, which takes
// the final name only when everything was written.
#pragma once

#include <cstddef>
#include <cstdio>
#include <span>
#include <string>

namespace lesskv {

// Where bytes go in order. Write throws Error(kIo) when they cannot be stored.
class ByteSink {
 public:
  virtual ~ByteSink() = default;
  virtual void Write(std::span<const std::byte> bytes) = 0;
};

// Used once: construct, Write any number of times, Commit. Without Commit the destructor removes the temporary file and
// whatever had the final name before stays as it was. A file that is replaced hands on its permissions, and is not
// replaced when it is read-only. Throws Error(kIo) when the folder or disk refuses, also when the final name is taken by
// something that is not a regular file (a symbolic link is followed).
class AtomicFile final : public ByteSink {
 public:
  explicit AtomicFile(const std::string& path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() override;

  void Write(std::span<const std::byte> bytes) override;
  void Commit();

 private:
  [[noreturn]] void FailWriting(int error_number) const;

  std::string path_;
  std::string temporary_path_;
  std::FILE* file_ = nullptr;
};

// Whether there is a file of that name that must not be written. Root may write everywhere: for it too, a file without
// any permission to write is meant to stay.
bool IsReadOnlyFile(const std::string& path);

}  // namespace lesskv
