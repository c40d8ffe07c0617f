#include "line_reader.h"

#include <histedit.h>
#include <langinfo.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/interrupt.h"

namespace lesskv {
namespace {

constexpr int kHistoryLines = 1000;

// libedit reads characters as the locale says; only their encoding is wanted of it, and UTF-8 whatever it is.
void UseUtf8() {
  std::setlocale(LC_CTYPE, "");
  if (std::strcmp(nl_langinfo(CODESET), "UTF-8") != 0) std::setlocale(LC_CTYPE, "C.UTF-8");
}

}  // namespace

struct LineReader::Editor {
  Editor() : line(el_init("lesskv", stdin, stdout, stderr)), history(history_init()) {
    if (line == nullptr || history == nullptr) Fail(ErrorCode::kRuntime, "the terminal cannot be set up for editing");
    HistEvent event;
    ::history(history, &event, H_SETSIZE, kHistoryLines);
    ::history(history, &event, H_SETUNIQUE, 1);
    el_set(line, EL_CLIENTDATA, this);
    el_set(
        line, EL_PROMPT, +[](EditLine* el) {
          void* self = nullptr;
          el_get(el, EL_CLIENTDATA, &self);
          return static_cast<Editor*>(self)->prompt.data();
        });
    el_set(line, EL_EDITOR, "emacs");
    el_set(line, EL_HIST, ::history, history);
    el_set(line, EL_SIGNAL, 1);  // a stopped or resized terminal is put right
    // While a line is edited Ctrl-C is a key that empties it, not a signal.
    el_set(line, EL_SETTY, "-d", "-isig", nullptr);
    el_set(line, EL_BIND, "^C", "em-kill-line", nullptr);
  }
  ~Editor() {
    history_end(history);
    el_end(line);
  }

  EditLine* line;
  History* history;
  std::string prompt;
};

LineReader::LineReader() {
  if (isatty(STDIN_FILENO) == 0 || isatty(STDOUT_FILENO) == 0) return;
  UseUtf8();
  editor_ = std::make_unique<Editor>();
}

LineReader::~LineReader() = default;

std::optional<std::string> LineReader::ReadPlain() {
  const InterruptsAsByDefault by_default;  // nothing runs that would have to be stopped
  std::string line;
  int c = 0;
  while ((c = std::getc(stdin)) != EOF && c != '\n') line += static_cast<char>(c);
  if (std::ferror(stdin) != 0) Fail(ErrorCode::kIo, "standard input cannot be read: {}", std::strerror(errno));
  if (c == EOF && line.empty()) return std::nullopt;
  if (line.ends_with('\r')) line.pop_back();
  constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
  if (std::exchange(at_start_, false) && line.starts_with(kByteOrderMark)) line.erase(0, kByteOrderMark.size());
  return line;
}

std::optional<std::string> LineReader::Read(const std::string& prompt) {
  if (editor_ == nullptr) return ReadPlain();
  std::string line;
  const KeyInterrupts keys;
  editor_->prompt = prompt;
  int size = 0;
  const char* read = el_gets(editor_->line, &size);
  if (read == nullptr || size <= 0) return std::nullopt;
  line.assign(read, static_cast<size_t>(size));
  while (line.ends_with('\n') || line.ends_with('\r')) line.pop_back();
  HistEvent event;
  if (!line.empty()) ::history(editor_->history, &event, H_ENTER, line.c_str());
  return line;
}

}  // namespace lesskv
