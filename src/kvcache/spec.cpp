#include "kvcache/spec.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <map>

#include "base/check.h"
#include "base/error.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

bool IsWordChar(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.' || c == '%' || c == '-' || c == '/';
}

// Recursive descent over `term ('+' term)*`, `term = name [ '(' [argument (',' argument)*] ')' ]`.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  std::vector<SpecTerm> Run() {
    std::vector<SpecTerm> terms;
    do {
      terms.push_back(Term());
    } while (Take('+'));
    SkipSpace();
    if (at_ != text_.size()) Refuse("'+' or the end");
    return terms;
  }

 private:
  SpecTerm Term() {
    SpecTerm term{Word("a term's name"), {}};
    if (!Take('(')) return term;
    if (Take(')')) return term;
    do {
      term.arguments.push_back(Argument());
    } while (Take(','));
    if (!Take(')')) Refuse("',' or ')'");
    return term;
  }

  SpecArgument Argument() {
    SpecArgument argument;
    if (Peek() == '"') return {"", Quoted(), true};
    argument.value = Word("a value");
    if (!Take('=')) return argument;
    argument.key = std::move(argument.value);
    argument.quoted = Peek() == '"';
    argument.value = argument.quoted ? Quoted() : Word("a value");
    return argument;
  }

  std::string Word(const char* what) {
    SkipSpace();
    const size_t begin = at_;
    while (at_ < text_.size() && IsWordChar(text_[at_])) ++at_;
    if (begin == at_) Refuse(what);
    return std::string(text_.substr(begin, at_ - begin));
  }

  std::string Quoted() {
    const size_t begin = ++at_;
    const size_t end = text_.find('"', begin);
    if (end == std::string_view::npos) Refuse("a closing '\"'");
    at_ = end + 1;
    return std::string(text_.substr(begin, end - begin));
  }

  void SkipSpace() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }
  char Peek() {
    SkipSpace();
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool Take(char c) {
    if (Peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }
  [[noreturn]] void Refuse(const char* expected) {
    size_t end = at_ + 1;  // of the whole character, where it has several bytes
    while (end < text_.size() && (static_cast<unsigned char>(text_[end]) & 0xC0) == 0x80) ++end;
    Fail(ErrorCode::kInvalidArgument, "cache spec '{}': expected {} at character {}, found {}", text_, expected, at_ + 1,
         at_ < text_.size() ? fmt::format("'{}'", text_.substr(at_, end - at_)) : "the end");
  }

  std::string_view text_;
  size_t at_ = 0;
};

std::string ListMethods() {
  std::string names;
  for (const Method* method : Methods()) names += (names.empty() ? "" : ", ") + std::string(method->name);
  return names;
}

// Shortest text without an exponent that reads back as the same number.
std::string CanonicalNumber(double value) {
  char text[512];  // the smallest double has 1,074 decimals, but a percentage of a context that large is nothing
  const auto [end, error] = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed);
  CHECK(error == std::errc());
  return std::string(text, end);
}

[[noreturn]] void RefuseValue(const Method& method, const Parameter& parameter, const SpecArgument& argument,
                              std::string_view expected) {
  Fail(ErrorCode::kInvalidArgument, "cache spec: {}'s {} must be {}, not '{}'", method.name, parameter.name, expected,
       argument.value);
}

// Checks a number against the parameter's kind and range and returns its canonical text.
std::string CheckNumber(const Method& method, const Parameter& parameter, const SpecArgument& argument) {
  using Kind = Parameter::Kind;
  std::string_view text = argument.value;
  const bool percent = parameter.kind == Kind::kRows && text.ends_with('%');
  if (percent) text.remove_suffix(1);
  const double max = percent ? 100 : parameter.max;
  const bool whole = parameter.kind != Kind::kReal && !percent;
  const std::string expected =
      percent ? "a percentage of the context length above 0% and up to 100%, such as 5%, or a number of rows"
              : fmt::format("{} from {} to {}{}", whole ? "a whole number" : "a number", parameter.min, max,
                            parameter.kind == Kind::kRows ? " (rows), or a percentage of the context length such as 5%" : "");
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, std::chars_format::fixed);
  if (argument.quoted || error != std::errc() || end != text.data() + text.size() || !std::isfinite(value))
    RefuseValue(method, parameter, argument, expected);
  if ((!percent && value < parameter.min) || value > max || (whole && value != std::floor(value)) || (percent && value <= 0))
    RefuseValue(method, parameter, argument, expected);
  return CanonicalNumber(value) + (percent ? "%" : "");
}

void CheckWord(const Method& method, const Parameter& parameter, const SpecArgument& argument) {
  std::string_view choices = parameter.choices;
  while (!choices.empty()) {
    const size_t bar = choices.find('|');
    if (choices.substr(0, bar) == argument.value) return;
    choices = bar == std::string_view::npos ? "" : choices.substr(bar + 1);
  }
  std::string list(parameter.choices);
  std::replace(list.begin(), list.end(), '|', ' ');
  RefuseValue(method, parameter, argument, "one of: " + list);
}

const Parameter& MatchParameter(const Method& method, const SpecArgument& argument, bool first) {
  for (const Parameter& parameter : method.parameters) {
    if (argument.key.empty() ? (parameter.positional && first) : parameter.name == argument.key) return parameter;
  }
  if (argument.key.empty())
    Fail(ErrorCode::kInvalidArgument, "cache spec: {} takes no{} value without a name, found '{}'", method.name,
         first ? "" : " further", argument.value);
  std::string known;
  for (const Parameter& parameter : method.parameters) known += (known.empty() ? "" : ", ") + std::string(parameter.name);
  Fail(ErrorCode::kInvalidArgument, "cache spec: {} has no option '{}' ({})", method.name, argument.key,
       known.empty() ? "it has none" : "it has: " + known);
}

// Names every argument, checks each value, drops those equal to their default, orders them as the method lists them.
SpecTerm CheckTerm(const Method& method, const SpecTerm& term) {
  std::map<std::string_view, SpecArgument> given;
  for (const SpecArgument& argument : term.arguments) {
    const Parameter& parameter = MatchParameter(method, argument, &argument == term.arguments.data());
    SpecArgument checked{std::string(parameter.name), argument.value, argument.quoted};
    if (parameter.kind == Parameter::Kind::kWord) CheckWord(method, parameter, argument);
    else if (parameter.kind != Parameter::Kind::kText) checked.value = CheckNumber(method, parameter, argument);
    else checked.quoted = true;
    if (!given.emplace(parameter.name, std::move(checked)).second)
      Fail(ErrorCode::kInvalidArgument, "cache spec: {}'s {} is given twice", method.name, parameter.name);
  }
  SpecTerm result{term.name, {}};
  for (const Parameter& parameter : method.parameters) {
    const auto found = given.find(parameter.name);
    if (found != given.end() && found->second.value != parameter.default_value)
      result.arguments.push_back(found->second);
  }
  if (method.validate != nullptr) method.validate(Arguments(method.parameters, result));
  return result;
}

bool IsPositional(const Method& method, const SpecArgument& argument) {
  return std::any_of(method.parameters.begin(), method.parameters.end(),
                     [&](const Parameter& p) { return p.name == argument.key && p.positional; });
}

using TermsByStage = std::map<Stage, SpecTerm>;

// Checked, one a stage; `full` where no term selects.
TermsByStage ByStage(const std::vector<SpecTerm>& terms, std::string_view text) {
  TermsByStage by_stage;
  for (const SpecTerm& term : terms) {
    const Method* method = FindMethod(term.name);
    if (method == nullptr)
      Fail(ErrorCode::kInvalidArgument, "cache spec '{}': unknown term '{}'; known terms: {}", text, term.name,
           ListMethods());
    const auto [at, inserted] = by_stage.emplace(method->stage, CheckTerm(*method, term));
    if (!inserted)
      Fail(ErrorCode::kInvalidArgument, "cache spec '{}': '{}' and '{}' answer the same question ({}); give one", text,
           at->second.name, term.name, Name(method->stage));
  }
  by_stage.emplace(Stage::kSelect, SpecTerm{"full", {}});
  return by_stage;
}

void RefuseConflicts(const TermsByStage& by_stage, std::string_view text) {
  const bool divided = by_stage.contains(Stage::kBudget) || by_stage.contains(Stage::kShare);
  const auto traits_of = [&](const SpecTerm& term) {
    MethodTraits traits = TraitsOf(term);
    traits.divides_rows &= !divided;
    return traits;
  };
  for (auto a = by_stage.begin(); a != by_stage.end(); ++a) {
    for (auto b = std::next(a); b != by_stage.end(); ++b) {
      const Method& ma = *FindMethod(a->second.name);
      const Method& mb = *FindMethod(b->second.name);
      if (const auto reason = Conflict(ma, traits_of(a->second), mb, traits_of(b->second)))
        Fail(ErrorCode::kInvalidArgument, "cache spec '{}': {}", text, *reason);
    }
  }
}

}  // namespace

std::string ToString(const SpecTerm& term) {
  const Method& method = *FindMethod(term.name);
  std::string text = term.name;
  for (size_t i = 0; i < term.arguments.size(); ++i) {
    const SpecArgument& argument = term.arguments[i];
    text += i == 0 ? "(" : ", ";
    if (!IsPositional(method, argument)) text += argument.key + "=";
    text += argument.quoted ? '"' + argument.value + '"' : argument.value;
  }
  return term.arguments.empty() ? text : text + ")";
}

SpecTerm ParseTerm(std::string_view text) {
  const std::vector<SpecTerm> terms = Parser(text).Run();
  const Method* method = terms.size() == 1 ? FindMethod(terms[0].name) : nullptr;
  if (method == nullptr) Fail(ErrorCode::kInvalidArgument, "cache spec: '{}' is not one known term", text);
  return CheckTerm(*method, terms[0]);
}

CacheSpec::CacheSpec() : terms_{{"full", {}}}, canonical_("full") {}

const SpecTerm* CacheSpec::Find(std::string_view name) const {
  for (const SpecTerm& term : terms_)
    if (term.name == name) return &term;
  return nullptr;
}

const SpecTerm* CacheSpec::Find(Stage stage) const {
  for (const SpecTerm& term : terms_)
    if (FindMethod(term.name)->stage == stage) return &term;
  return nullptr;
}

std::string CacheSpec::ToString(const std::vector<Artefact>& artefacts) const {
  std::string text;
  for (SpecTerm term : terms_) {
    for (const Artefact& artefact : artefacts) {
      if (term.name != artefact.term) continue;
      std::erase_if(term.arguments, [](const SpecArgument& a) { return a.key == "file" || a.key == "sidecar"; });
      const auto named = std::find_if(term.arguments.begin(), term.arguments.end(), [&](const SpecArgument& argument) {
        return !IsPositional(*FindMethod(term.name), argument);
      });
      term.arguments.insert(named, {"sidecar", artefact.fingerprint, true});
    }
    text += (text.empty() ? "" : "+") + lesskv::ToString(term);
  }
  return text;
}

CacheSpec CacheSpec::Without(Stage stage) const {
  std::vector<SpecTerm> terms = terms_;
  std::erase_if(terms, [&](const SpecTerm& term) { return FindMethod(term.name)->stage == stage; });
  return Make(terms, canonical_);
}

bool CacheSpec::TakesExtraRows() const {
  const SpecTerm* term = Find(Stage::kSelect);
  if (term == nullptr) return false;
  for (const Parameter& parameter : FindMethod(term->name)->parameters)
    if (parameter.name == "extra") return true;
  return false;
}

CacheSpec CacheSpec::WithExtraRows(size_t extra) const {
  if (!TakesExtraRows()) Fail(ErrorCode::kInvalidArgument, "cache spec '{}': its selector takes no extra rows", canonical_);
  std::vector<SpecTerm> terms = terms_;
  for (SpecTerm& term : terms) {
    const Method& method = *FindMethod(term.name);
    if (method.stage != Stage::kSelect) continue;
    const size_t sum = Arguments(method.parameters, term).Count("extra") + extra;
    std::erase_if(term.arguments, [](const SpecArgument& argument) { return argument.key == "extra"; });
    if (sum > 0) term.arguments.push_back({"extra", std::to_string(sum), false});
  }
  return Make(terms, canonical_);
}

CacheSpec CacheSpec::Parse(std::string_view text) { return Make(Parser(text).Run(), text); }

CacheSpec CacheSpec::Make(const std::vector<SpecTerm>& terms, std::string_view text) {
  const TermsByStage by_stage = ByStage(terms, text);
  RefuseConflicts(by_stage, text);
  CacheSpec spec;
  spec.terms_.clear();
  spec.canonical_.clear();
  for (Stage stage : kStages) {
    const auto found = by_stage.find(stage);
    if (found == by_stage.end()) continue;
    const SpecTerm& term = found->second;
    // `uniform` says something beside a selector that would divide.
    const bool says = stage == Stage::kBudget && TraitsOf(by_stage.at(Stage::kSelect)).divides_rows;
    if (stage != Stage::kSelect && term.name == DefaultTerm(stage) && !says) continue;
    spec.canonical_ += (spec.canonical_.empty() ? "" : "+") + lesskv::ToString(term);
    spec.terms_.push_back(term);
  }
  return spec;
}

}  // namespace lesskv
