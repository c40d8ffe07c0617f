// The README's commands are run: every line of a block marked "```sh test", from the checkout, must succeed.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace lesskv {
namespace {

std::vector<std::string> MarkedLines(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  std::string line;
  bool inside = false;
  while (std::getline(file, line)) {
    if (line.starts_with("```")) {
      inside = line == "```sh test";
    } else if (inside && !line.empty()) {
      lines.push_back(line);
    }
  }
  return lines;
}

TEST(Readme, ItsCommandsRun) {
  const std::string source = LESSKV_SOURCE_DIR;
  const std::string folder = std::filesystem::path(LESSKV_PROGRAM).parent_path().string();
  const std::vector<std::string> lines = MarkedLines(source + "/README.md");
  EXPECT_GE(lines.size(), 5u);
  for (const std::string& line : lines) {
    const std::string command = "cd '" + source + "' && PATH='" + folder + "':$PATH && { " + line + " ; } >/dev/null";
    const int status = std::system(command.c_str());
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << line;
  }
}

TEST(Readme, ItsLinksLeadSomewhere) {
  const std::string source = LESSKV_SOURCE_DIR;
  for (const std::string page : {"README.md", "docs/overview.md"}) {
    std::ifstream file(source + "/" + page);
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    const auto folder = std::filesystem::path(source + "/" + page).parent_path();
    for (size_t at = text.find("]("); at != std::string::npos; at = text.find("](", at + 1)) {
      const std::string target = text.substr(at + 2, text.find_first_of(")#", at) - at - 2);
      if (target.empty() || target.starts_with("http")) continue;
      EXPECT_TRUE(std::filesystem::exists(folder / target)) << page << ": " << target;
    }
  }
}

}  // namespace
}  // namespace lesskv
