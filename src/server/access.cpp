#include "server/access.h"

#include <algorithm>
#include <utility>

namespace lesskv {

bool SameSecret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size(); ++i)
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(i < b.size() ? b[i] : 0);
  return difference == 0;
}

bool IsLoopback(const std::string& host) {
  return host == "localhost" || host == "::1" ||
         (host.starts_with("127.") && host.find_first_not_of("0123456789.") == std::string::npos);
}

bool IsOwnHost(std::string_view host, std::string_view bound) {
  const size_t colon = host.rfind(':');
  const bool has_port = colon != std::string_view::npos &&
                        host.find_first_not_of("0123456789", colon + 1) == std::string_view::npos;
  std::string name(host.substr(0, has_port ? colon : host.size()));
  if (name.starts_with('[') && name.ends_with(']')) name = name.substr(1, name.size() - 2);
  for (char& c : name)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return name == "localhost" || name == "127.0.0.1" || name == "::1" || name == bound;
}

bool IsForeignOrigin(std::string_view origin, std::string_view host) {
  if (origin.empty()) return false;
  const size_t scheme = origin.find("://");
  return scheme == std::string_view::npos || origin.substr(scheme + 3) != host;
}

KeyRing::KeyRing(std::vector<std::string> keys, size_t most)
    : keys_(std::move(keys)), most_(most), in_work_(std::max<size_t>(keys_.size(), 1)) {}

std::optional<size_t> KeyRing::Find(std::string_view authorization) const {
  if (keys_.empty()) return 0;
  constexpr std::string_view kScheme = "bearer ";  // in any case
  const auto same = [](char a, char b) { return (a >= 'A' && a <= 'Z' ? a - 'A' + 'a' : a) == b; };
  const std::string_view scheme = authorization.substr(0, kScheme.size());
  if (!std::ranges::equal(scheme, kScheme, same)) return std::nullopt;
  std::optional<size_t> found;
  for (size_t i = 0; i < keys_.size(); ++i)
    if (SameSecret(authorization.substr(kScheme.size()), keys_[i])) found = i;
  return found;
}

std::shared_ptr<void> KeyRing::Enter(size_t key, size_t texts) {
  const std::lock_guard lock(mutex_);
  if (most_ != 0 && in_work_[key] + texts > most_) return nullptr;
  in_work_[key] += texts;
  return std::shared_ptr<void>(this, [key, texts](void* ring) {
    KeyRing& self = *static_cast<KeyRing*>(ring);
    const std::lock_guard leave(self.mutex_);
    self.in_work_[key] -= texts;
  });
}

}  // namespace lesskv
