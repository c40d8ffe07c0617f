// Files of this folder that are part of the program (CMakeLists.txt).
#pragma once

#include <string_view>

namespace lesskv {

std::string_view PageHtml();     // page.html
std::string_view OpenApiText();  // openapi.json

}  // namespace lesskv
