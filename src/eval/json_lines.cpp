#include "eval/json_lines.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace lesskv {

void ReadJsonLines(std::string_view text, const std::string& name, std::string_view expected,
                   const std::function<void(std::string_view line, const std::string& where)>& read) {
  for (size_t line_number = 1; !text.empty(); ++line_number) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = fmt::format("{}, line {}", name, line_number);
    try {
      read(line, where);
    } catch (const nlohmann::json::exception& error) {
      Fail(ErrorCode::kBadFile, "{}: expected {}: {}", where, expected, error.what());
    }
  }
}

}  // namespace lesskv
