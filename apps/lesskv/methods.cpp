// lesskv methods: the registry and the table of legal pairs, as text, Markdown (docs/methods.md is made from it) or JSON.
#include "kvcache/registry.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "engine/run_info.h"
#include "kvcache/select/selector.h"

namespace lesskv {
namespace {

std::string Signature(const Method& method) {
  std::string text(method.name);
  for (size_t i = 0; i < method.parameters.size(); ++i) {
    const Parameter& p = method.parameters[i];
    text += i == 0 ? "(" : ", ";
    text += p.name;
    if (!p.default_value.empty()) text += fmt::format("={}", p.default_value);
    else if (!p.positional) text += "=…";
  }
  return method.parameters.empty() ? text : text + ")";
}

bool IsDefault(const Method& method) { return method.name == DefaultTerm(method.stage); }

// "`rows`, `gamma`": options that may be given without their names, before all others.
std::string PositionalNames() {
  std::vector<std::string> names;
  for (const Method* method : Methods())
    for (const Parameter& p : method->parameters) {
      const std::string name = fmt::format("`{}`", p.name);
      if (p.positional && std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  return fmt::format("{}", fmt::join(names, ", "));
}

struct ConflictingTerms {
  std::string a, b, reason;
};

// Pairs of terms of different stages that cannot be combined, each once, in registry order: the methods' examples, then
// variants of one with what its example can be combined with.
std::vector<ConflictingTerms> Conflicts() {
  std::vector<ConflictingTerms> all;
  const auto methods = Methods();
  for (size_t i = 0; i < methods.size(); ++i)
    for (size_t j = i + 1; j < methods.size(); ++j)
      if (methods[i]->stage != methods[j]->stage)
        if (const auto reason = Conflict(*methods[i], *methods[j]))
          all.push_back({std::string(methods[i]->Example()), std::string(methods[j]->Example()), *reason});
  for (const Method* a : methods)
    for (const Method* b : methods)
      if (!a->variant.empty() && !Conflict(*a, *b))
        if (const auto reason = Conflict(ParseTerm(a->variant), ParseTerm(b->Example())))
          all.push_back({std::string(a->variant), std::string(b->Example()), *reason});
  return all;
}

bool HasMethods(Stage stage) {
  const auto methods = Methods();
  return std::any_of(methods.begin(), methods.end(), [&](const Method* method) { return method->stage == stage; });
}

// What a selector's growth law says of the rows of a head.
std::string RowsText(const Method& method, std::string_view example) {
  const SpecTerm term = ParseTerm(example);
  const SidecarSource no_sidecar;
  const auto selector = method.make_selector(Arguments(method.parameters, term), {{}, 4096, ComputeType::kF32, no_sidecar});
  if (!selector->Evicts()) return "all tokens seen";
  if (selector->SaysHowMany()) return "a number of each head's own that depends on the text";
  if (TraitsOf(term).divides_rows) return "a fixed number on average, which all heads share at a prompt's end";
  if (selector->Bounded()) return "a fixed number";
  return selector->EvictsIn(StepKind::kDecode) ? "a number that grows with the text" : "a fixed number of a prompt, and all generated ones";
}

constexpr const char* kLocalLayers =
    "A spec is about a model's global layers. Local ones (gemma3), which see a window of the text only, keep that window.";

std::string MarkdownText() {
  std::string text =
      "# Cache methods\n\n"
      "A cache is written as terms joined by `+`, at most one a stage, in any order. This page is the output of\n"
      "`lesskv methods -o md`. Behind `=` stands what holds where an option is not given, `…` where its text tells.\n"
      "A first option may go without its name where that is " +
      PositionalNames() + ": `pyramid(10)` is `pyramid(beta=10)`.\n\n" +
      std::string(kLocalLayers) + "\n";
  for (Stage stage : kStages) {
    if (!HasMethods(stage)) continue;
    text += fmt::format("\n## {}\n\n| term | what it does | source |\n|---|---|---|\n", Name(stage));
    for (const Method* method : Methods())
      if (method->stage == stage)
        text += fmt::format("| `{}`{} | {} | {} |\n", Signature(*method), IsDefault(*method) ? " (default)" : "",
                            method->summary, method->reference);
    for (const Method* method : Methods()) {
      if (method->stage != stage || method->parameters.empty()) continue;
      text += fmt::format("\n`{}`:", method->name);
      for (const Parameter& p : method->parameters) text += fmt::format(" `{}` {};", p.name, p.help);
      text.back() = '.';
      text += "\n";
    }
  }
  text += "\n## How many rows a head keeps\n\n";
  for (const Method* method : Methods()) {
    if (method->stage != Stage::kSelect) continue;
    const std::string rows = RowsText(*method, method->Example());
    text += fmt::format("- `{}`: {}\n", method->name, rows);
    if (method->variant.empty()) continue;
    const std::string other = RowsText(*method, method->variant);
    if (other != rows) text += fmt::format("- `{}`: {}\n", method->variant, other);
  }
  text += "\n## What cannot be combined\n\nTwo terms of one stage, and:\n\n";
  for (const auto& [a, b, reason] : Conflicts()) text += fmt::format("- `{}` + `{}`: {}\n", a, b, reason);
  return text;
}

std::string PlainText() {
  std::string text;
  for (Stage stage : kStages) {
    if (!HasMethods(stage)) continue;
    text += fmt::format("{}{}\n", text.empty() ? "" : "\n", Name(stage));
    for (const Method* method : Methods())
      if (method->stage == stage)
        text += fmt::format("  {:<52} {}{}\n", Signature(*method), method->summary, IsDefault(*method) ? " (default)" : "");
  }
  text += "\nCannot be combined (besides two terms of one stage)\n";
  for (const auto& [a, b, reason] : Conflicts()) text += fmt::format("  {} + {}: {}\n", a, b, reason);
  text += fmt::format("\n{}\nWhat the options mean: lesskv methods -o md\n", kLocalLayers);
  return text;
}

Json ParameterJson(const Parameter& p) {
  static constexpr const char* kKinds[] = {"rows", "count", "real", "word", "text"};
  Json json{{"name", p.name}, {"kind", kKinds[static_cast<size_t>(p.kind)]}, {"help", p.help},
            {"positional", p.positional}};
  if (!p.default_value.empty()) json["default"] = p.default_value;
  if (!p.choices.empty()) json["choices"] = p.choices;
  return json;
}

std::string JsonText() {
  Json methods = Json::array(), conflicts = Json::array();
  for (const Method* method : Methods()) {
    Json parameters = Json::array();
    for (const Parameter& p : method->parameters) parameters.push_back(ParameterJson(p));
    methods.push_back({{"name", method->name}, {"stage", Name(method->stage)}, {"default", IsDefault(*method)},
                       {"summary", method->summary}, {"reference", method->reference},
                       {"example", method->Example()}, {"parameters", parameters}});
    if (method->stage == Stage::kSelect) methods.back()["rows"] = RowsText(*method, method->Example());
    if (!method->variant.empty()) methods.back()["variant"] = method->variant;
  }
  for (const auto& [a, b, reason] : Conflicts()) conflicts.push_back({{"a", a}, {"b", b}, {"reason", reason}});
  return Dump({{"methods", methods}, {"conflicts", conflicts}, {"version", Version()}}) + "\n";
}

}  // namespace

void AddMethodsCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("methods", "List the terms of cache specs and which of them can be combined");
  auto format = std::make_shared<std::string>("text");
  command->add_option("-o,--output", *format, "text, md or json")->capture_default_str()->option_text("FORMAT");
  command->callback([format] {
    if (*format == "text") WriteResult(PlainText());
    else if (*format == "md") WriteResult(MarkdownText());
    else if (*format == "json") WriteResult(JsonText());
    else Fail(ErrorCode::kInvalidArgument, "-o: expected text, md or json, found \"{}\"", *format);
    FlushResults();
  });
}

}  // namespace lesskv
