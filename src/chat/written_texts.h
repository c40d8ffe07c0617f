// What a Jinja chat template writes, without running it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

struct WrittenTexts {
  std::vector<std::string> texts;     // of the template's output, its escapes resolved
  std::vector<std::string> assigned;  // strings that {% set %} keeps for later ...
  std::vector<std::string> dated;     // ... and those where it speaks of a date
  enum class Bos { kNever, kFirst, kInMessages } bos = Bos::kNever;  // where bos_token is written
};

// In the plain case: people's words only, no tools, pictures, documents, and nobody asked for thinking or none. Branches
// and expressions for anything else are left out, where their names tell them; of two branches that both may be taken both count. Texts
// in comparisons, subscripts and calls are not written, and macros are not looked into.
WrittenTexts ReadWrittenTexts(std::string_view jinja);

}  // namespace lesskv
