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

  // The next line without its end (LF or CR LF) and, at the beginning of a pipe, without a byte order mark; nothing
  // when there are no more. `prompt` is shown on a terminal only. Throws Error kIo where the input cannot be read.
  std::optional<std::string> Read(const std::string& prompt);

 private:
  struct Editor;
  std::optional<std::string> ReadPlain();

  std::unique_ptr<Editor> editor_;  // null: input or output is no terminal
  bool at_start_ = true;            // of the plain input
};

}  // namespace lesskv
