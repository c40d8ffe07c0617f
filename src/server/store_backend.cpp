#include "server/store_backend.h"

#include <fmt/format.h>

#include <charconv>

namespace lesskv {

std::string SessionName::ToString() const { return fmt::format("{:016x}-{:016x}-{}", text, setting, n_tokens); }

std::optional<SessionName> SessionName::Parse(std::string_view text) {
  constexpr size_t kHash = 16;
  SessionName name;
  const auto number = [&](size_t begin, size_t end, auto& value, int base) {
    const auto [stop, error] = std::from_chars(text.data() + begin, text.data() + end, value, base);
    return error == std::errc();
  };
  if (text.size() <= 2 * (kHash + 1) || !number(0, kHash, name.text, 16) ||
      !number(kHash + 1, 2 * kHash + 1, name.setting, 16) || !number(2 * (kHash + 1), text.size(), name.n_tokens, 10))
    return std::nullopt;
  return name.n_tokens > 0 && name.ToString() == text ? std::optional(name) : std::nullopt;
}

}  // namespace lesskv
