// JSON lines, as sets of questions come.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace lesskv {

// Calls read(line, where) for each line that is not blank, with its name for messages: "NAME, line N". What reading its
// JSON throws becomes an Error (kBadFile) that says what was `expected` there.
void ReadJsonLines(std::string_view text, const std::string& name, std::string_view expected,
                   const std::function<void(std::string_view line, const std::string& where)>& read);

}  // namespace lesskv
