// A session store's values as session files (docs/formats.md) of a directory: nobody else's, and one server's only.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "server/store_backend.h"

namespace lesskv {

class DirectoryBackend final : public StoreBackend {
 public:
  // Takes up what the directory holds; it is made where there is none. Its files take `max_bytes` together; the ones
  // not used for longest are removed. Throws Error(kIo) when it cannot be made or read, kInvalidArgument while another
  // server has it.
  DirectoryBackend(std::string directory, size_t max_bytes);

  bool remote() const override { return false; }
  size_t MaxBytes() const override { return max_bytes_; }
  std::vector<size_t> Lengths() override;
  std::vector<bool> Has(std::span<const SessionName> names) override;
  bool Read(const SessionName& name, const Use& use) override;
  bool Touch(const SessionName& name) override;
  void Write(const SessionName& name, std::span<const std::byte> bytes) override;
  std::optional<StoreUsage> Usage() const override;
  std::string Where(const SessionName& name) const override;

 private:
  struct File {
    size_t bytes = 0;
    uint64_t used = 0;  // larger: later
  };
  using Files = std::map<SessionName, File>;

  // Open and locked, so that what dies lets go of it.
  struct Lock {
    explicit Lock(const std::string& directory);
    ~Lock();
    int fd;
  };

  void Make();
  void Scan();
  void Add(const SessionName& name, size_t bytes);
  void Trim(size_t more);
  void Forget(Files::iterator file);

  const std::string directory_;
  const size_t max_bytes_;
  std::optional<Lock> lock_;
  mutable std::mutex mutex_;  // of what follows
  Files files_;
  std::map<size_t, size_t> lengths_;  // tokens -> files of that many
  uint64_t clock_ = 0;
  StoreUsage usage_;
};

}  // namespace lesskv
