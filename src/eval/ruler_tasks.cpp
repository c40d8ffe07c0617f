#include "eval/ruler_tasks.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/rng.h"
#include "eval/json_lines.h"
#include "eval/recall_tasks.h"
#include "format/json_reader.h"

namespace lesskv {
namespace {

constexpr std::string_view kNoiseLine =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n";
constexpr size_t kHops = 4;                                       // copies of a chain of variables
constexpr size_t kCommonWords = 10;
constexpr size_t kFrequentAsked = 3;

constexpr std::pair<RulerKind, std::string_view> kNames[] = {
    {RulerKind::kSingle1, "niah_single_1"},       {RulerKind::kSingle2, "niah_single_2"},
    {RulerKind::kSingle3, "niah_single_3"},       {RulerKind::kMultiKey1, "niah_multikey_1"},
    {RulerKind::kMultiKey2, "niah_multikey_2"},   {RulerKind::kMultiKey3, "niah_multikey_3"},
    {RulerKind::kMultiValue, "niah_multivalue"},  {RulerKind::kMultiQuery, "niah_multiquery"},
    {RulerKind::kVariables, "vt"},                {RulerKind::kCommon, "cwe"},
    {RulerKind::kFrequent, "fwe"},                {RulerKind::kQuestion1, "qa_1"},
    {RulerKind::kQuestion2, "qa_2"}};

enum class Hay { kNoise, kText, kNeedles };
struct NeedleShape {
  Hay hay = Hay::kText;
  bool uuid_keys = false, uuid_values = false;
  size_t keys = 1, values = 1, asked = 1;  // keys hidden, values of each, keys asked for
};

NeedleShape ShapeOf(RulerKind kind) {
  switch (kind) {
    case RulerKind::kSingle1: return {.hay = Hay::kNoise};
    case RulerKind::kSingle3: return {.uuid_values = true};
    case RulerKind::kMultiKey1: return {.keys = 4};
    case RulerKind::kMultiKey2: return {.hay = Hay::kNeedles};
    case RulerKind::kMultiKey3: return {.hay = Hay::kNeedles, .uuid_keys = true, .uuid_values = true};
    case RulerKind::kMultiValue: return {.values = 4};
    case RulerKind::kMultiQuery: return {.keys = 4, .asked = 4};
    default: return {};
  }
}

std::string Uuid(Rng& rng) {
  std::string out;
  for (const int n : {8, 4, 4, 4, 12}) {
    if (!out.empty()) out += '-';
    for (int i = 0; i < n; ++i) out += "0123456789abcdef"[rng.Below(16)];
  }
  return out;
}

std::string Number(Rng& rng) { return std::to_string(1000000 + rng.Below(9000000)); }

// Two words, so that no document runs out of keys.
std::string WordKey(Rng& rng) {
  const auto words = EvalWords();
  return fmt::format("{}-{}", words[rng.Below(words.size())], words[rng.Below(words.size())]);
}

std::string Letters(Rng& rng, size_t n, char first) {
  std::string out;
  for (size_t i = 0; i < n; ++i) out += static_cast<char>(first + static_cast<int>(rng.Below(26)));
  return out;
}

template <typename Draw>
std::vector<std::string> Distinct(size_t n, Draw&& draw) {
  std::vector<std::string> out;
  std::set<std::string> seen;
  while (out.size() < n)
    if (std::string one = draw(); seen.insert(one).second) out.push_back(std::move(one));
  return out;
}

std::string Join(std::span<const std::string> items) {
  std::string out;
  for (size_t i = 0; i < items.size(); ++i) out += (i == 0 ? "" : i + 1 == items.size() ? " and " : ", ") + items[i];
  return out;
}

// Lines with others put between them, each at a place drawn for it, in the given order where `ordered`.
std::string Hide(Rng& rng, std::vector<std::string> lines, std::span<const std::string> hidden, bool ordered) {
  std::vector<size_t> places;
  for (size_t i = 0; i < hidden.size(); ++i) places.push_back(rng.Below(lines.size() + 1));
  if (ordered) std::sort(places.begin(), places.end());
  std::multimap<size_t, size_t> at;
  for (size_t i = 0; i < hidden.size(); ++i) at.emplace(places[i], i);
  std::string out;
  for (size_t i = 0; i <= lines.size(); ++i) {
    for (auto [it, end] = at.equal_range(i); it != end; ++it) out += hidden[it->second];
    if (i < lines.size()) out += lines[i];
  }
  return out;
}

std::vector<std::string> SplitSentences(std::string_view text) {
  std::vector<std::string> sentences;
  std::string now;
  for (const char c : text) {
    if (c == '\r') continue;
    if (c == '\n' && now.find_first_not_of(" \t") == std::string::npos) {
      now.clear();
      continue;
    }
    now += c;
    const bool ends = c == '\n' || (c == ' ' && now.size() > 1 && std::string_view(".!?").find(now[now.size() - 2]) != std::string_view::npos);
    if (!ends) continue;
    sentences.push_back(std::exchange(now, ""));
  }
  if (now.find_first_not_of(" \t") != std::string::npos) sentences.push_back(now + "\n");
  return sentences;
}

std::string Lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return out;
}

}  // namespace

std::string_view Name(RulerKind kind) {
  for (const auto& [own, name] : kNames)
    if (own == kind) return name;
  return "";  // unreachable: all kinds are named
}

RulerKind ParseRulerKind(const std::string& name) {
  std::string known;
  for (const auto& [kind, own] : kNames) {
    if (own == name) return kind;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", own);
  }
  Fail(ErrorCode::kInvalidArgument, "RULER task '{}': expected all or some of {}", name, known);
}

bool NeedsText(RulerKind kind) { return kind < RulerKind::kVariables && ShapeOf(kind).hay == Hay::kText; }

size_t AnswerTokens(RulerKind kind) {
  switch (kind) {
    case RulerKind::kVariables: return 30;
    case RulerKind::kCommon: return 120;
    case RulerKind::kFrequent: return 50;
    case RulerKind::kQuestion1:
    case RulerKind::kQuestion2: return 32;
    default: return 128;
  }
}

std::vector<RulerQuestion> ParseRulerQuestions(std::string_view json_lines, const std::string& name) {
  std::vector<RulerQuestion> questions;
  const auto read = [&](std::string_view line, const std::string& where) {
    const auto record = ParseJson(line);
    RulerQuestion question{record.at("question"), {}, record.at("answers")};
    const auto& context = record.at("context");
    if (context.is_array()) question.contexts = context.get<std::vector<std::string>>();
    else question.contexts.push_back(context);
    // Every text names an empty answer.
    for (const std::string& answer : question.answers)
      if (answer.empty()) Fail(ErrorCode::kBadFile, "{}: an answer is empty", where);
    if (question.answers.empty()) Fail(ErrorCode::kBadFile, "{}: no answers", where);
    if (question.contexts.empty()) Fail(ErrorCode::kBadFile, "{}: no context", where);
    questions.push_back(std::move(question));
  };
  ReadJsonLines(json_lines, name,
                "an object with a text, question, one or a list of them, context, and a list, answers", read);
  if (questions.empty()) Fail(ErrorCode::kBadFile, "{}: no questions in it", name);
  return questions;
}

double RulerScore(const RulerSample& sample, std::string_view text) {
  const std::string lower = Lower(text);
  size_t found = 0;
  for (const std::string& answer : sample.answers) found += lower.find(Lower(answer)) != std::string::npos;
  return sample.any ? (found > 0 ? 1.0 : 0.0) : static_cast<double>(found) / static_cast<double>(sample.answers.size());
}

RulerTasks::RulerTasks(const Tokenizer& tokenizer, std::string_view text, std::vector<RulerQuestion> questions)
    : tokenizer_(tokenizer), sentences_(SplitSentences(text)), questions_(std::move(questions)) {}

// Keys and values are drawn first, so that a longer document of the same seed hides the same.
RulerSample RulerTasks::Needles(RulerKind kind, size_t units, uint64_t seed) const {
  Rng rng(seed);
  const NeedleShape shape = ShapeOf(kind);
  const std::string what = shape.uuid_values ? "UUID" : "number";
  const auto key = [&] { return shape.uuid_keys ? Uuid(rng) : WordKey(rng); };
  const auto value = [&] { return shape.uuid_values ? Uuid(rng) : Number(rng); };
  const auto needle = [&](const std::string& k, const std::string& v) {
    return fmt::format("One of the special magic {}s for {} is: {}.\n", what, k, v);
  };
  const std::vector<std::string> keys = Distinct(shape.keys, key), values = Distinct(shape.keys * shape.values, value);
  std::vector<std::string> hidden;
  for (size_t i = 0; i < values.size(); ++i) hidden.push_back(needle(keys[i / shape.values], values[i]));

  std::vector<std::string> hay;
  if (shape.hay == Hay::kNeedles) {
    std::set<std::string> taken(keys.begin(), keys.end());
    while (hay.size() < units)
      if (const std::string k = key(); taken.insert(k).second) hay.push_back(needle(k, value()));
  } else {
    const size_t first = shape.hay == Hay::kText ? rng.Below(sentences_.size()) : 0;
    for (size_t i = 0; i < units; ++i)
      hay.push_back(shape.hay == Hay::kNoise ? std::string(kNoiseLine) : sentences_[(first + i) % sentences_.size()]);
    for (std::string& line : hidden)  // in running text a needle is a sentence like the others
      if (shape.hay == Hay::kText) line.back() = ' ';
  }
  RulerSample sample;
  const size_t n_asked = shape.asked * shape.values;
  const std::string plural = n_asked > 1 ? "s" : "", asked = Join(std::span(keys).first(shape.asked));
  sample.document = fmt::format("Some special magic {}s are hidden in the following text. Remember them: there will be a question about them.\n{}",
                                what, Hide(rng, std::move(hay), hidden, false));
  if (sample.document.back() != '\n') sample.document.back() = '\n';
  sample.question = fmt::format("\nWhat {} the special magic {}{} for {} in the text above?\nThe special magic {}{} for {} in the text above {}:",
                                n_asked > 1 ? "are" : "is", what, plural, asked, what, plural, asked, n_asked > 1 ? "are" : "is");
  sample.answers.assign(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(n_asked));
  return sample;
}

RulerSample RulerTasks::Variables(size_t units, uint64_t seed) const {
  Rng rng(seed);
  const std::vector<std::string> names = Distinct(kHops + 1, [&] { return Letters(rng, 5, 'A'); });
  const std::string value = std::to_string(10000 + rng.Below(90000));
  std::vector<std::string> hidden = {fmt::format("VAR {} = {}\n", names[0], value)};
  for (size_t i = 1; i < names.size(); ++i) hidden.push_back(fmt::format("VAR {} = VAR {}\n", names[i], names[i - 1]));
  RulerSample sample;
  sample.document = "Remember and follow the chains of variables that are hidden in the following text.\n" +
                    Hide(rng, std::vector<std::string>(units, std::string(kNoiseLine)), hidden, true);
  sample.question = fmt::format("\nWhich variables have the value {} in the text above?\nThese {} variables have the value {}:", value,
                                names.size(), value);
  sample.answers = names;
  return sample;
}

RulerSample RulerTasks::CommonWords(size_t units, bool is_short, uint64_t seed) const {
  Rng rng(seed);
  const size_t common_times = is_short ? 6 : 30, rare_times = is_short ? 1 : 3;
  std::vector<std::string> words(EvalWords().begin(), EvalWords().end());
  rng.Shuffle(words);
  std::vector<std::string> list;
  for (size_t i = 0; i < kCommonWords + units; ++i)
    list.insert(list.end(), i < kCommonWords ? common_times : rare_times, words[i]);
  rng.Shuffle(list);
  RulerSample sample;
  sample.document = "Below is a numbered list of words. Some of them stand in it far more often than the others. Remember those.\n";
  for (size_t i = 0; i < list.size(); ++i) sample.document += fmt::format("{}. {}{}", i + 1, list[i], i + 1 < list.size() ? " " : "\n");
  sample.question = fmt::format("\nWhich are the {} most common words in the list above?\nThe {} most common words in the list are:", kCommonWords,
                                kCommonWords);
  sample.answers.assign(words.begin(), words.begin() + kCommonWords);
  return sample;
}

// The word of rank r stands about units / (r^2 zeta(2)) times; that of rank 1 is "...", a noise that is not asked for.
RulerSample RulerTasks::FrequentWords(size_t units, uint64_t seed) const {
  Rng rng(seed);
  const std::vector<std::string> ranked = Distinct(units, [&] { return Letters(rng, 6, 'a'); });
  constexpr double kZeta2 = 1.6449340668482264;
  std::vector<std::string> text;
  for (size_t r = 1; text.size() < units; ++r) {
    const auto times = static_cast<size_t>(std::max(1.0, std::round(static_cast<double>(units) / kZeta2 / static_cast<double>(r * r))));
    text.insert(text.end(), std::min(times, units - text.size()), r == 1 ? "..." : ranked[r - 2]);
  }
  rng.Shuffle(text);
  RulerSample sample;
  sample.document = "The following text is in code. Keep count of how often each coded word appears in it; the dots mean nothing.\n";
  for (const std::string& word : text) sample.document += word + " ";
  sample.document.back() = '\n';
  sample.question = fmt::format("\nWhich are the {} coded words that appear most often in the text above?\nThe {} coded words that appear most often are:",
                                kFrequentAsked, kFrequentAsked);
  sample.answers.assign(ranked.begin(), ranked.begin() + kFrequentAsked);
  return sample;
}

RulerSample RulerTasks::Question(RulerKind kind, size_t units, uint64_t seed) const {
  Rng rng(seed);
  std::vector<const RulerQuestion*> of_kind;
  std::set<std::string> paragraphs;
  for (const RulerQuestion& question : questions_) {
    if (question.kind() == kind) of_kind.push_back(&question);
    paragraphs.insert(question.contexts.begin(), question.contexts.end());
  }
  const RulerQuestion& asked = *of_kind[rng.Below(of_kind.size())];
  for (const std::string& own : asked.contexts) paragraphs.erase(own);
  std::vector<std::string> others(paragraphs.begin(), paragraphs.end());
  rng.Shuffle(others);
  others.resize(std::min(units, others.size()));
  for (const std::string& own : asked.contexts)
    others.insert(others.begin() + static_cast<std::ptrdiff_t>(rng.Below(others.size() + 1)), own);
  RulerSample sample;
  sample.document = "Answer a question by the following documents, in a few words.\n";
  for (size_t i = 0; i < others.size(); ++i) sample.document += fmt::format("\nDocument {}:\n{}\n", i + 1, others[i]);
  sample.question = fmt::format("\nQuestion: {}\nAnswer:", asked.question);
  sample.answers = asked.answers;
  sample.any = true;
  return sample;
}

RulerSample RulerTasks::Draft(RulerKind kind, size_t length, size_t units, uint64_t seed) const {
  switch (kind) {
    case RulerKind::kVariables: return Variables(units, seed);
    case RulerKind::kCommon: return CommonWords(units, length < 4096, seed);
    case RulerKind::kFrequent: return FrequentWords(units, seed);
    case RulerKind::kQuestion1:
    case RulerKind::kQuestion2: return Question(kind, units, seed);
    default: return Needles(kind, units, seed);
  }
}

size_t RulerTasks::MostUnits(RulerKind kind) const {
  constexpr size_t kNoLimit = size_t{1} << 20;
  if (kind == RulerKind::kCommon) return EvalWords().size() - kCommonWords;
  if (kind < RulerKind::kQuestion1) return kNoLimit;
  size_t paragraphs = 0;
  for (const RulerQuestion& question : questions_) paragraphs += question.contexts.size();
  return paragraphs;
}

void RulerTasks::Tokenize(RulerSample& sample) const {
  sample.document_ids = tokenizer_.Encode(sample.document, false, false);
  if (tokenizer_.add_bos()) sample.document_ids.insert(sample.document_ids.begin(), tokenizer_.bos());
  sample.question_ids = tokenizer_.Encode(sample.question, false, false, tokenizer_.IsAtStart(sample.document_ids));
}

RulerSample RulerTasks::Make(RulerKind kind, size_t length, uint64_t seed) const {
  if (NeedsText(kind) && sentences_.empty())
    Fail(ErrorCode::kInvalidArgument, "RULER task {}: --text FILE is needed, real text to hide needles in", Name(kind));
  const auto asks = [&](const RulerQuestion& question) { return question.kind() == kind; };
  if (kind >= RulerKind::kQuestion1 && std::none_of(questions_.begin(), questions_.end(), asks))
    Fail(ErrorCode::kInvalidArgument, "RULER task {}: --qa FILE is needed, JSON lines with question, answers and, as context, {}", Name(kind),
         kind == RulerKind::kQuestion1 ? "a paragraph" : "a list of paragraphs");
  const auto make = [&](size_t units) {
    RulerSample sample = Draft(kind, length, units, seed);
    Tokenize(sample);
    return sample;
  };
  const auto fits = [&](const RulerSample& s) { return s.document_ids.size() + s.question_ids.size() <= length; };
  const size_t least = kind == RulerKind::kFrequent ? 100 : 1;  // from 73 on the third word is more frequent than the fourth
  RulerSample best = make(least);
  if (!fits(best))
    Fail(ErrorCode::kInvalidArgument, "RULER task {}: a length of {} tokens has no room for it; its shortest document takes {}", Name(kind), length,
         best.document_ids.size() + best.question_ids.size());
  // Documents grow with their units: the most that fit, by doubling and then by halves.
  size_t low = least, high = least;
  const size_t most = MostUnits(kind);
  while (high < most) {
    high = std::min(2 * high, most);
    RulerSample next = make(high);
    if (!fits(next)) break;
    best = std::move(next);
    low = high;
  }
  while (low + 1 < high) {
    const size_t middle = low + (high - low) / 2;
    RulerSample next = make(middle);
    (fits(next) ? low : high) = middle;
    if (low == middle) best = std::move(next);
  }
  return best;
}

}  // namespace lesskv
