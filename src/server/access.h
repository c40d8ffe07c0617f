// Who may ask, and how much at once.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

// Whether the two are the same, in a time that does not tell where they differ.
bool SameSecret(std::string_view a, std::string_view b);
bool IsLoopback(const std::string& host);
// Whether a Host header, with or without a port, names this machine: as localhost, as its loopback address, or as the
// address that is listened at. A page may have its own name lead here, and then is no page of another server; the name
// it asked for is what gives it away.
bool IsOwnHost(std::string_view host, std::string_view bound);
// Whether a page of another server sent the request: its Origin is not the host that was asked. Browsers let any page
// send requests to any address, also to this machine's own, and hide the answers only.
bool IsForeignOrigin(std::string_view origin, std::string_view host);

// The keys, and how many texts of each are in work. Thread-safe. Without keys everybody is one nameless user.
class KeyRing {
 public:
  // `most`: texts of a key at once; 0: any number.
  KeyRing(std::vector<std::string> keys, size_t most);

  // The number of the key in an Authorization header; nothing when it is missing or wrong. Compares with all keys,
  // whichever it is.
  std::optional<size_t> Find(std::string_view authorization) const;
  // Held while so many texts of that key are in work; null: then there would be more than may be.
  std::shared_ptr<void> Enter(size_t key, size_t texts);
  size_t most() const { return most_; }

 private:
  const std::vector<std::string> keys_;
  const size_t most_;
  std::mutex mutex_;
  std::vector<size_t> in_work_;
};

}  // namespace lesskv
