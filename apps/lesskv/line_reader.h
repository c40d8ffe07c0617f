// Lines of text from a person or from a pipe. On a terminal they can be edited and called back (libedit).
#pragma once

#include <memory>
#include <optional>
#include <string>

namespace lesskv {

class LineReader {
 public:
  LineReader();
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  bool on_terminal() const { return editor_ != nullptr; }

  // The next line without its end; nothing when there are no more. `prompt` is shown on a terminal only.
  std::optional<std::string> Read(const std::string& prompt);

 private:
  struct Editor;
  std::unique_ptr<Editor> editor_;  // null: input or output is no terminal
};

}  // namespace lesskv
