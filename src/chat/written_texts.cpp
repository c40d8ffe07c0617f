#include "chat/written_texts.h"

#include <algorithm>
#include <cctype>
#include <optional>

namespace lesskv {
namespace {

bool IsWord(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

std::string_view Trimmed(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const size_t begin = std::min(text.find_first_not_of(kSpace), text.size());
  return text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

bool Has(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

std::string_view FirstWord(std::string_view text) {
  return text.substr(0, static_cast<size_t>(std::find_if_not(text.begin(), text.end(), IsWord) - text.begin()));
}

// Behind the string that begins at `at` with a quote.
size_t BehindString(std::string_view text, size_t at) {
  const char quote = text[at++];
  while (at < text.size() && text[at] != quote) at += text[at] == '\\' ? 2 : 1;
  return std::min(at + 1, text.size());
}

// Where `end` stands outside of strings, from `at` on.
size_t FindOutside(std::string_view text, std::string_view end, size_t at) {
  while (at < text.size() && !text.substr(at).starts_with(end))
    at = text[at] == '\'' || text[at] == '"' ? BehindString(text, at) : at + 1;
  return std::min(at, text.size());
}

std::string WithoutStrings(std::string_view text) {
  std::string result;
  for (size_t at = 0; at < text.size();) {
    const bool is_string = text[at] == '\'' || text[at] == '"';
    if (!is_string) result += text[at];
    at = is_string ? BehindString(text, at) : at + 1;
  }
  return result;
}

std::string Unescaped(std::string_view text) {
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      result += text[i];
    } else {
      const char c = text[++i];
      result += c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c;
    }
  }
  return result;
}

// ---- Conditions ----------------------------------------------------------------------------------------------------

enum class When { kNever, kMaybe, kAlways };  // in the plain case

When Not(When when) {
  return when == When::kNever ? When::kAlways : when == When::kAlways ? When::kNever : When::kMaybe;
}

// The parts of a condition between the words `word`, outside of parentheses and strings.
std::vector<std::string_view> SplitAt(std::string_view text, std::string_view word) {
  std::vector<std::string_view> parts;
  int depth = 0;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    if (c == '\'' || c == '"') {
      at = BehindString(text, at);
      continue;
    }
    depth += c == '(' || c == '[' ? 1 : c == ')' || c == ']' ? -1 : 0;
    const bool is_word = depth == 0 && text.substr(at).starts_with(word) && at > 0 && !IsWord(text[at - 1]) &&
                         at + word.size() < text.size() && !IsWord(text[at + word.size()]);
    if (!is_word) {
      ++at;
      continue;
    }
    parts.push_back(text.substr(begin, at - begin));
    begin = at += word.size();
  }
  parts.push_back(text.substr(begin));
  return parts;
}

// What only conversations have that are more than people's words.
bool IsOptional(std::string_view condition) {
  for (const std::string_view word : {"tool", "function", "image", "video", "audio", "think", "reason", "document", "builtin",
                                      "code_interpreter", "ipython", "observation", "strftime", "date_string"})
    if (Has(condition, word)) return true;
  return false;
}

size_t Count(std::string_view text, std::string_view part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

// Conditions in parentheses that lie deeper than those of any real template are not looked into: each level reads the
// rest again, and the calls take the stack.
constexpr size_t kDeepestCondition = 32;

When ConditionHolds(std::string_view condition, size_t depth = 0);

When AtomHolds(std::string_view atom, size_t depth) {
  atom = Trimmed(atom);
  if (atom.starts_with("not ") || atom.starts_with("not(")) {
    const std::string_view rest = Trimmed(atom.substr(3));
    if (rest.starts_with('(') && FindOutside(rest, ")", 0) + 1 <= rest.size() && rest.ends_with(')'))
      return Not(ConditionHolds(rest, depth + 1));
  }
  if (atom.starts_with('(') && atom.ends_with(')')) return ConditionHolds(atom.substr(1, atom.size() - 2), depth + 1);
  if (atom == "false" || atom == "False" || atom.starts_with("false ==")) return When::kNever;
  if (atom == "true" || atom == "True" || atom == "true == true") return When::kAlways;
  if (!IsOptional(atom)) return When::kMaybe;
  const std::string spaced = " " + std::string(atom) + " ";
  const size_t negations = Count(spaced, " not ") + Count(spaced, " none ") + Count(spaced, " None ") +
                           Count(spaced, " undefined ") + Count(spaced, "!=");
  return negations % 2 == 1 ? When::kAlways : When::kNever;
}

When ConditionHolds(std::string_view condition, size_t depth) {
  if (depth > kDeepestCondition) return When::kMaybe;
  const std::vector<std::string_view> choices = SplitAt(Trimmed(condition), "or");
  if (choices.size() > 1) {
    bool all_never = true;
    for (const std::string_view choice : choices) {
      const When when = ConditionHolds(choice, depth + 1);
      if (when == When::kAlways) return when;
      all_never = all_never && when == When::kNever;
    }
    return all_never ? When::kNever : When::kMaybe;
  }
  const std::vector<std::string_view> parts = SplitAt(Trimmed(condition), "and");
  if (parts.size() == 1) return AtomHolds(condition, depth);
  bool all_always = true;
  for (const std::string_view part : parts) {
    const When when = AtomHolds(part, depth);
    if (when == When::kNever) return when;
    all_always = all_always && when == When::kAlways;
  }
  return all_always ? When::kAlways : When::kMaybe;
}

// ---- Templates -----------------------------------------------------------------------------------------------------

class Reader {
 public:
  WrittenTexts Read(std::string_view jinja) {
    for (size_t at = 0; at < jinja.size();) {
      size_t tag = at;
      while (tag < jinja.size() && !(jinja[tag] == '{' && tag + 1 < jinja.size() && Has("{%#", jinja.substr(tag + 1, 1)))) ++tag;
      Text(jinja.substr(at, tag - at));
      if (tag == jinja.size()) break;
      const char kind = jinja[tag + 1];
      const std::string_view close = kind == '{' ? "}}" : kind == '%' ? "%}" : "#}";
      const size_t end = kind == '#' ? std::min(jinja.find(close, tag), jinja.size()) : FindOutside(jinja, close, tag + 2);
      std::string_view inside = jinja.substr(tag + 2, end - tag - 2);
      if (inside.starts_with('-') || inside.starts_with('+')) inside.remove_prefix(1);
      if (inside.ends_with('-') || inside.ends_with('+')) inside.remove_suffix(1);
      if (kind == '{') Output(inside);
      if (kind == '%') Statement(Trimmed(inside));
      at = std::min(end + 2, jinja.size());
    }
    return std::move(written_);
  }

 private:
  struct Block {
    bool is_read = true;
    bool is_loop = false, asks_for_first = false;
    bool taken = false;  // a branch that is always taken came before
  };

  bool IsRead() const {
    return std::all_of(blocks_.begin(), blocks_.end(), [](const Block& block) { return block.is_read; });
  }

  void Text(std::string_view text) {
    if (IsRead() && !Trimmed(text).empty()) written_.texts.emplace_back(text);
  }

  void Output(std::string_view expression) {
    if (!IsRead() || IsOptional(WithoutStrings(expression))) return;
    if (Has(expression, "bos_token")) {
      const bool every = std::any_of(blocks_.begin(), blocks_.end(), [](const Block& b) { return b.is_loop; }) &&
                         std::none_of(blocks_.begin(), blocks_.end(), [](const Block& b) { return b.asks_for_first; });
      if (every || written_.bos == WrittenTexts::Bos::kNever)
        written_.bos = every ? WrittenTexts::Bos::kInMessages : WrittenTexts::Bos::kFirst;
    }
    Strings(expression, written_.texts);
  }

  void Branch(Block& block, std::string_view condition) {
    const When when = ConditionHolds(condition);
    block.is_read = !block.taken && when != When::kNever;
    block.taken = block.taken || when == When::kAlways;
    block.asks_for_first = Has(condition, "loop.first") || Has(condition, "loop.index");
  }

  void Statement(std::string_view statement) {
    const std::string_view word = FirstWord(statement), rest = Trimmed(statement.substr(word.size()));
    if (word == "if") {
      Branch(blocks_.emplace_back(), rest);
    } else if (word == "elif" && !blocks_.empty()) {
      Branch(blocks_.back(), rest);
    } else if (word == "else" && !blocks_.empty()) {
      blocks_.back().is_read = !blocks_.back().taken;
      blocks_.back().asks_for_first = false;
    } else if (word == "for") {
      blocks_.push_back({.is_read = !IsOptional(rest), .is_loop = true});
    } else if (word == "macro") {
      blocks_.push_back({.is_read = false});
    } else if (word == "set") {
      Assign(rest);
    } else if (word == "call" || word == "filter") {
      blocks_.emplace_back();
    } else if (word.starts_with("end") && word != "endgeneration" && !blocks_.empty()) {
      blocks_.pop_back();
    }
  }

  void Assign(std::string_view rest) {
    const size_t equals = FindOutside(rest, "=", 0);
    if (equals == rest.size()) {
      blocks_.emplace_back();
      return;
    }
    const std::string names = WithoutStrings(rest);  // a prompt may speak of updates and have no date
    const bool dated = Has(names, "today") || Has(names, "date");
    if (IsRead()) Strings(rest.substr(equals + 1), dated ? written_.dated : written_.assigned);
  }

  // The strings of an expression that may become its value.
  static void Strings(std::string_view text, std::vector<std::string>& strings) {
    std::vector<bool> aside;  // of each bracket around: a call, a subscript, a list
    const auto before = [&](size_t at) { return Trimmed(text.substr(0, at)); };
    for (size_t at = 0; at < text.size();) {
      const char c = text[at];
      if (c == '(' || c == '[' || c == '{') {
        const std::string_view head = before(at);
        const bool behind_value = !head.empty() && (IsWord(head.back()) || head.back() == ')' || head.back() == ']');
        const size_t word = static_cast<size_t>(std::find_if_not(head.rbegin(), head.rend(), IsWord) - head.rbegin());
        const std::string_view last = head.substr(head.size() - word);
        const bool keyword = last == "and" || last == "or" || last == "not" || last == "if" || last == "else" || last == "in";
        aside.push_back(c != '(' || (behind_value && !keyword) || (!aside.empty() && aside.back()));
      }
      if ((c == ')' || c == ']' || c == '}') && !aside.empty()) aside.pop_back();
      if (c != '\'' && c != '"') {
        ++at;
        continue;
      }
      const size_t end = BehindString(text, at);
      const std::string_view head = before(at), tail = Trimmed(text.substr(end));
      const bool compared = head.ends_with("==") || head.ends_with("!=") || head.ends_with(" in") || tail.starts_with("==") ||
                            tail.starts_with("!=") || tail.starts_with("in ") || tail.starts_with("not in ");
      if (!compared && (aside.empty() || !aside.back())) strings.push_back(Unescaped(text.substr(at + 1, end - at - 2)));
      at = end;
    }
  }

  WrittenTexts written_;
  std::vector<Block> blocks_;
};

}  // namespace

WrittenTexts ReadWrittenTexts(std::string_view jinja) { return Reader().Read(jinja); }

}  // namespace lesskv
