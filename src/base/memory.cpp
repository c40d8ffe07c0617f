#include "base/memory.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <string_view>

#include "base/error.h"

namespace lesskv {
namespace {

constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();

// The number that follows `key` at the start of a line; nothing if the file or the key is not there.
std::optional<size_t> ReadField(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    if (word == key) {
      size_t value = 0;
      if (file >> value) return value;
      return std::nullopt;
    }
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::nullopt;
}

// A file that holds one number; "max" (no limit) and a missing file give nothing.
std::optional<size_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  size_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

// What a control group still leaves: the limit, less what is used, file pages that can be dropped counted as unused.
size_t GroupHeadroom(const std::string& limit_path, const std::string& use_path, const std::string& stat_path) {
  const auto limit = ReadNumber(limit_path);
  const auto use = ReadNumber(use_path);
  if (!limit || !use) return kNoLimit;
  const size_t reclaimable = ReadField(stat_path, "inactive_file").value_or(0);
  const size_t held = *use > reclaimable ? *use - reclaimable : 0;
  return *limit > held ? *limit - held : 0;
}

// The path of this process in the unified hierarchy ("0::/some/group"), or empty.
std::string UnifiedGroup() {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line))
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  return {};
}

size_t ControlGroupHeadroom() {
  size_t headroom = GroupHeadroom("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                                  "/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.stat");
  std::string group = UnifiedGroup();  // limits of the parents count too
  for (;;) {
    const std::string base = "/sys/fs/cgroup" + (group == "/" ? "" : group);
    headroom = std::min(headroom, GroupHeadroom(base + "/memory.max", base + "/memory.current", base + "/memory.stat"));
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return headroom;
    group.resize(slash);
  }
}

}  // namespace

std::optional<size_t> AvailableMemory() {
  const auto kib = ReadField("/proc/meminfo", "MemAvailable:");
  const size_t available = std::min(kib ? *kib * 1024 : kNoLimit, ControlGroupHeadroom());
  if (available == kNoLimit) return std::nullopt;
  return available;
}

void RequireMemory(size_t bytes, const std::string& what) {
  const auto available = AvailableMemory();
  if (available && bytes > *available)
    Fail(ErrorCode::kOutOfMemory, "{} needs {}, but only {} of memory are available", what, HumanBytes(bytes),
         HumanBytes(*available));
}

std::string HumanBytes(size_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{:.{}f} {}", value, value < 10 ? 2 : 1, kUnits[unit]);
}

size_t ParseBytes(const std::string& text, const std::string& option) {
  constexpr std::string_view kUnits = "BKMGT";
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string_view unit = std::string_view(text).substr(static_cast<size_t>(end - text.data()));
  while (unit.starts_with(' ')) unit.remove_prefix(1);
  const size_t power = unit.empty() ? 0 : kUnits.find(unit[0]);
  const bool is_unit = unit.size() < 2 || (power != 0 && unit.substr(1) == "iB");
  if (error == std::errc() && power != std::string_view::npos && is_unit) {
    value = std::ldexp(value, 10 * static_cast<int>(power));
    if (value >= 1 && value <= std::ldexp(1.0, 60)) return static_cast<size_t>(value);
  }
  Fail(ErrorCode::kInvalidArgument, "{}: expected a number of bytes such as 500M or 4GiB, found \"{}\"", option, text);
}

}  // namespace lesskv
