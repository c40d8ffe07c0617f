#include "convert/hf_pre_tokenizer.h"

#include <fmt/ranges.h>

#include "base/error.h"
#include "format/gguf.h"  // Quoted
#include "tokenizer/pre_tokenizer.h"

namespace lesskv {
namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581

// The steps of a normalizer or pre_tokenizer, sequences in sequences laid out flat.
void Flatten(const JsonReader& step, const char* list, std::vector<JsonReader>& steps) {
  if (step.Text("type") != "Sequence") {
    steps.push_back(step);
    return;
  }
  const nlohmann::json& parts = step.Array(list);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].is_object()) step.Refuse(list, "an array of objects");
    Flatten({parts[i], fmt::format("{}: {}", step.where(), i)}, list, steps);
  }
}

std::vector<JsonReader> Steps(const JsonReader& tokenizer, const char* key, const char* list) {
  std::vector<JsonReader> steps;
  if (tokenizer.Has(key)) Flatten(tokenizer.Object(key), list, steps);
  return steps;
}
std::vector<JsonReader> Normalizers(const JsonReader& tokenizer) {
  return Steps(tokenizer, "normalizer", "normalizers");
}
std::vector<JsonReader> PreTokenizers(const JsonReader& tokenizer) {
  return Steps(tokenizer, "pre_tokenizer", "pretokenizers");
}

// A pattern given as a regular expression or as plain text; empty when it is the other one.
std::string Pattern(const JsonReader& step, const char* kind) { return step.Object("pattern").TextOr(kind, ""); }

// The expression of a Split whose matches become pieces. "Removed" and inverted says the same of patterns that match
// everything, as all known ones do.
std::string SplitPattern(const JsonReader& step) {
  const std::string behavior = step.Text("behavior");
  const bool invert = step.TruthOr("invert", false);
  if (!(behavior == "Isolated" && !invert) && !(behavior == "Removed" && invert))
    step.Refuse("behavior", "\"Isolated\", or \"Removed\" and inverted",
                Quoted(behavior) + (invert ? " and inverted" : ""));
  const std::string pattern = Pattern(step, "Regex");
  if (pattern.empty()) step.Refuse("pattern", "a Regex");
  return pattern;
}

// Appends what a step means in the patterns of our pre-tokenizers.
void AppendPattern(const JsonReader& step, std::vector<std::string>& patterns) {
  const std::string type = step.Text("type");
  if (type == "Split") {
    patterns.push_back(SplitPattern(step));
  } else if (type == "ByteLevel") {
    if (step.TruthOr("add_prefix_space", true)) step.Refuse("add_prefix_space", "false");
    if (step.TruthOr("use_regex", true)) patterns.emplace_back(kGpt2Pattern);
  } else if (type == "Digits") {
    // Falcon has this step behind GPT-2's pattern, where runs of digits are pieces already but for a space before them,
    // with which a vocabulary of such pieces merges no digit. llama.cpp's "falcon" leaves it out for that reason.
    if (step.TruthOr("individual_digits", false)) {
      patterns.emplace_back(kDigitPattern);
    } else if (patterns.empty() || patterns.back() != kGpt2Pattern) {
      patterns.emplace_back(R"(\p{N}+)");
    }
  } else if (type == "Punctuation") {
    if (step.TextOr("behavior", "Isolated") != "Contiguous") step.Refuse("behavior", "\"Contiguous\"");
    patterns.emplace_back(kPunctuationPattern);
  } else {
    step.Refuse("type", "a step of a known pre-tokenizer (Split, ByteLevel, Digits, Punctuation)", Quoted(type));
  }
}

bool ReplacesSpaces(const JsonReader& step) {
  return step.Text("type") == "Replace" && Pattern(step, "String") == " " && step.Text("content") == kSpaceMark;
}

}  // namespace

bool IsByteLevel(const JsonReader& tokenizer) {
  for (const JsonReader& step : PreTokenizers(tokenizer))
    if (step.Text("type") == "ByteLevel") return true;
  return false;
}

std::string RecognisePreTokenizer(const JsonReader& tokenizer, bool ignore_merges) {
  for (const JsonReader& step : Normalizers(tokenizer))
    if (step.Text("type") != "NFC") step.Refuse("type", "\"NFC\" or no normalizer", Quoted(step.Text("type")));
  std::vector<std::string> patterns;
  for (const JsonReader& step : PreTokenizers(tokenizer)) AppendPattern(step, patterns);
  const auto name = PreTokenizer::FindName(patterns, ignore_merges);
  if (name) return std::string(*name);
  Fail(ErrorCode::kBadFile, "{}: pre_tokenizer: no known pre-tokenizer cuts text by {} with ignore_merges {}",
       tokenizer.where(), Quoted(fmt::format("{}", fmt::join(patterns, " "))), ignore_merges);
}

SpaceRules ReadSpaceRules(const JsonReader& tokenizer) {
  SpaceRules rules;
  bool replaced = false;
  for (const JsonReader& step : Normalizers(tokenizer)) {
    if (ReplacesSpaces(step)) {
      replaced = true;
    } else if (step.Text("type") == "Prepend" && step.Text("prepend") == kSpaceMark) {
      rules.prefix = true;
    } else {
      step.Refuse("type", "a Prepend of U+2581 or a Replace of spaces by it", Quoted(step.Text("type")));
    }
  }
  for (const JsonReader& step : PreTokenizers(tokenizer)) {
    const std::string type = step.Text("type");
    if (type == "Split" && replaced && Pattern(step, "String") == " ") continue;  // Gemma: no space is left to find
    if (type != "Metaspace") step.Refuse("type", "\"Metaspace\" or no pre-tokenizer", Quoted(type));
    if (step.Text("replacement") != kSpaceMark) step.Refuse("replacement", "U+2581");
    if (step.TruthOr("split", true)) step.Refuse("split", "false");
    const std::string scheme = step.TextOr("prepend_scheme", "always");
    if (scheme != "always" && scheme != "first" && scheme != "never")
      step.Refuse("prepend_scheme", R"("always", "first" or "never")");
    rules = {.prefix = scheme != "never", .only_at_start = scheme == "first"};
    replaced = true;
  }
  if (!replaced)
    Fail(ErrorCode::kBadFile, "{}: neither normalizer nor pre_tokenizer writes spaces as U+2581", tokenizer.where());
  return rules;
}

}  // namespace lesskv
