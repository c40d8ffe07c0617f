#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace lesskv {

void CheckFailed(const char* file, int line, const char* expression, const std::string& message) {
  std::fprintf(stderr, "%s:%d: CHECK failed: %s%s%s\n", file, line, expression, message.empty() ? "" : ": ",
               message.c_str());
  std::abort();
}

}  // namespace lesskv
