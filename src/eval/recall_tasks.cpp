#include "eval/recall_tasks.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "base/rng.h"

namespace lesskv {
namespace {

constexpr std::string_view kEvalWords[] = {
#include "eval_words.inc"
};

constexpr size_t kMaxCopies = 2;   // of a chain of variables
constexpr size_t kCopyReach = 40;  // a copy's source is at most this many lines earlier
constexpr size_t kLineTokens = 8;  // of one assignment, about; the exact number is counted

size_t IndexAtDepth(double depth, size_t count) {
  return static_cast<size_t>(std::lround(depth * static_cast<double>(count - 1)));
}

// 2 to 5 digits, each length equally often, no leading zero.
std::string RandomNumber(Rng& rng) {
  uint64_t low = 10;
  for (uint64_t more = rng.Below(4); more > 0; --more) low *= 10;
  return std::to_string(low + rng.Below(9 * low));
}

// All names of variables, shuffled: a letter and a number from 1 to 99.
std::vector<std::string> ShuffledNames(Rng& rng) {
  std::vector<std::string> names;
  for (char letter = 'a'; letter <= 'z'; ++letter) {
    for (int number = 1; number <= 99; ++number) names.push_back(letter + std::to_string(number));
  }
  rng.Shuffle(names);
  return names;
}

// Which line each line of a program copies; nothing where it assigns a new value.
using Sources = std::vector<std::optional<size_t>>;

// Plants the asked chain: line `root` assigns, up to kMaxCopies later lines copy one another. Returns its last line.
size_t PlantChain(Rng& rng, size_t root, Sources& sources) {
  size_t last = root;
  for (uint64_t copies = rng.Below(kMaxCopies + 1); copies > 0 && last + 1 < sources.size(); --copies) {
    const size_t next = last + 1 + rng.Below(std::min(kCopyReach, sources.size() - 1 - last));
    sources[next] = last;
    last = next;
  }
  return last;
}

std::vector<std::string> SplitParagraphs(std::string_view text) {
  std::vector<std::string> paragraphs;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    while (line.ends_with('\r') || line.ends_with(' ')) line.remove_suffix(1);
    if (!line.empty()) paragraphs.emplace_back(line);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return paragraphs;
}

}  // namespace

struct RecallTasks::Draft {
  std::string prompt;
  std::string answer;
  size_t statement = 0;  // byte offset of what answers the question
  size_t question = 0;   // byte offset of the question
};

// Whole paragraphs of the text, the last one perhaps cut behind a word.
struct RecallTasks::Filler {
  std::vector<std::string> paragraphs;
  std::vector<size_t> ends = {0};  // tokens up to each paragraph break, the text's start included
};

std::string_view Name(RecallKind kind) {
  switch (kind) {
    case RecallKind::kKeyNumber:
      return "kv";
    case RecallKind::kKeyWord:
      return "kv_words";
    case RecallKind::kNeedle:
      return "needle";
    case RecallKind::kVariable:
      break;
  }
  return "variable";
}

RecallKind ParseRecallKind(const std::string& name) {
  for (const RecallKind kind : kRecallKinds) {
    if (Name(kind) == name) return kind;
  }
  Fail(ErrorCode::kInvalidArgument, "recall task '{}': expected kv, kv_words, needle or variable", name);
}

std::span<const std::string_view> EvalWords() { return kEvalWords; }

RecallTasks::RecallTasks(const Tokenizer& tokenizer, std::vector<std::string> words, std::string_view text)
    : tokenizer_(tokenizer), words_(std::move(words)), paragraphs_(SplitParagraphs(text)) {
  if (words_.size() < 2) Fail(ErrorCode::kInvalidArgument, "recall needs 2 words or more, found {}", words_.size());
  for (const std::string& paragraph : paragraphs_) paragraph_tokens_.push_back(CountTokens(paragraph + "\n\n"));
}

// Counted behind a line feed: SentencePiece puts a space before a text of its own.
size_t RecallTasks::CountTokens(std::string_view text) const {
  static constexpr std::string_view kBefore = "a\n";
  const auto count = [&](const std::string& s) { return tokenizer_.Encode(s, false, false).size(); };
  return count(std::string(kBefore) + std::string(text)) - count(std::string(kBefore));
}

RecallTasks::Draft RecallTasks::KeyValueList(size_t length, double depth, uint64_t seed, bool numbers) const {
  Rng rng(seed);
  std::vector<std::string> keys = words_;
  rng.Shuffle(keys);
  const auto statement = [](const std::string& key) { return "The code of " + key + " is"; };
  std::vector<std::pair<std::string, std::string>> pairs;
  size_t used = CountTokens("\n" + statement(keys[0])) + 1;  // a question of another key may take one token more
  for (size_t i = 0;; ++i) {
    // Beyond the words, numbers of six digits are keys: distinct, and no value has six.
    const std::string key = i < keys.size() ? keys[i] : std::to_string(100000 + i);
    const std::string value = " " + (numbers ? RandomNumber(rng) : words_[rng.Below(words_.size())]);
    used += CountTokens(statement(key) + value + ".\n");
    if (used > length) break;
    pairs.emplace_back(key, value);
  }
  if (pairs.size() < 2) return {};
  const auto& asked = pairs[IndexAtDepth(depth, pairs.size())];
  Draft draft;
  for (const auto& pair : pairs) {
    if (&pair == &asked) draft.statement = draft.prompt.size();
    draft.prompt += statement(pair.first) + pair.second + ".\n";
  }
  draft.question = draft.prompt.size();
  draft.prompt += "\n" + statement(asked.first);
  draft.answer = asked.second;
  return draft;
}

// The longest start of `paragraph`, whole words and a paragraph break, of at most `limit` tokens; empty when there is none.
std::string RecallTasks::CutParagraph(std::string paragraph, size_t tokens, size_t limit) const {
  while (!paragraph.empty() && tokens > limit) {
    const size_t excess = std::max<size_t>(1, (tokens - limit) * paragraph.size() / tokens);
    const size_t space = paragraph.rfind(' ', paragraph.size() - std::min(excess + 2, paragraph.size()));
    paragraph = space == std::string::npos || space == 0 ? "" : paragraph.substr(0, space) + "\n\n";
    tokens = CountTokens(paragraph);
  }
  return paragraph;
}

RecallTasks::Filler RecallTasks::FillerOf(size_t n_tokens, size_t first) const {
  Filler filler;
  for (size_t at = first; filler.ends.back() < n_tokens; at = (at + 1) % paragraphs_.size()) {
    const size_t left = n_tokens - filler.ends.back();
    const bool is_last = paragraph_tokens_[at] > left;
    const std::string paragraph = is_last ? CutParagraph(paragraphs_[at] + "\n\n", paragraph_tokens_[at], left)
                                          : paragraphs_[at] + "\n\n";
    if (paragraph.empty()) break;
    filler.paragraphs.push_back(paragraph);
    filler.ends.push_back(filler.ends.back() + (is_last ? CountTokens(paragraph) : paragraph_tokens_[at]));
    if (is_last) break;
  }
  return filler;
}

RecallTasks::Draft RecallTasks::Needle(size_t length, double depth, uint64_t seed) const {
  Rng rng(seed);
  const std::string question = "The secret word of " + words_[rng.Below(words_.size())] + " is";
  Draft draft;
  draft.answer = " " + words_[rng.Below(words_.size())];
  const std::string needle = question + draft.answer + ".\n\n";
  const size_t taken = CountTokens(question) + CountTokens(needle);
  if (taken + 8 > length) return {};

  const auto [paragraphs, ends] = FillerOf(length - taken, rng.Below(paragraphs_.size()));
  const double wanted = depth * static_cast<double>(ends.back());
  const auto nearer = [&](size_t a, size_t b) {
    return std::abs(static_cast<double>(a) - wanted) < std::abs(static_cast<double>(b) - wanted);
  };
  const size_t before = static_cast<size_t>(std::min_element(ends.begin(), ends.end(), nearer) - ends.begin());
  for (size_t i = 0; i <= paragraphs.size(); ++i) {
    if (i == before) {
      draft.statement = draft.prompt.size();
      draft.prompt += needle;
    }
    if (i < paragraphs.size()) draft.prompt += paragraphs[i];
  }
  draft.question = draft.prompt.size();
  draft.prompt += question;
  return draft;
}

// A program of exactly n_lines lines.
RecallTasks::Draft RecallTasks::Program(size_t n_lines, double depth, uint64_t seed) const {
  Rng rng(seed);
  const std::vector<std::string> names = ShuffledNames(rng);
  Sources sources(n_lines);
  const size_t root = IndexAtDepth(depth, n_lines);
  std::vector<bool> planted(n_lines, false);
  const size_t asked = PlantChain(rng, root, sources);
  for (size_t i = 0; i < n_lines; ++i) planted[i] = i == root || sources[i].has_value();

  std::vector<std::string> values(n_lines);
  std::vector<size_t> copies(n_lines, 0);
  Draft draft;
  for (size_t i = 0; i < n_lines; ++i) {
    if (!planted[i] && i > 0 && rng.Below(2) == 0) {
      const size_t source = i - 1 - rng.Below(std::min(kCopyReach, i));
      if (copies[source] < kMaxCopies) sources[i] = source;
    }
    if (i == root) draft.statement = draft.prompt.size();
    values[i] = sources[i] ? values[*sources[i]] : std::to_string(1000 + rng.Below(99000));
    copies[i] = sources[i] ? copies[*sources[i]] + 1 : 0;
    draft.prompt += names[i] + " = " + (sources[i] ? names[*sources[i]] : values[i]) + "\n";
  }
  draft.question = draft.prompt.size();
  draft.prompt += "\nThe value of " + names[asked] + " is";
  draft.answer = " " + values[asked];
  return draft;
}

RecallTasks::Draft RecallTasks::Variables(size_t length, double depth, uint64_t seed) const {
  constexpr size_t kNames = 26 * 99;
  size_t n_lines = std::clamp<size_t>(length / kLineTokens, 2, kNames);
  Draft best;
  size_t best_tokens = 0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    Draft draft = Program(n_lines, depth, seed);
    const size_t tokens = CountTokens(draft.prompt);
    if (tokens <= length && tokens > best_tokens) {
      best = std::move(draft);
      best_tokens = tokens;
    }
    const size_t off = tokens > length ? tokens - length : length - tokens;
    if (tokens <= length && off < 2 * kLineTokens) break;
    const size_t lines = std::max<size_t>(1, off / kLineTokens);
    const size_t next = tokens <= length ? n_lines + lines : n_lines - std::min(lines, n_lines - 2);
    if (std::clamp<size_t>(next, 2, kNames) == n_lines) break;
    n_lines = std::clamp<size_t>(next, 2, kNames);
  }
  return best;
}

RecallSample RecallTasks::Finish(const Draft& draft) const {
  RecallSample sample;
  sample.prompt_text = draft.prompt;
  sample.answer_text = draft.answer;
  std::vector<int32_t> prompt = tokenizer_.Encode(draft.prompt, false, false);
  const std::vector<int32_t> whole = tokenizer_.Encode(draft.prompt + draft.answer, false, false);
  if (whole.size() <= prompt.size() || !std::equal(prompt.begin(), prompt.end(), whole.begin())) {
    Fail(ErrorCode::kMismatch, "this tokenizer joins the question with its answer '{}', so recall cannot be asked",
         draft.answer);
  }
  sample.answer.assign(whole.begin() + static_cast<std::ptrdiff_t>(prompt.size()), whole.end());
  const std::vector<int32_t> document = tokenizer_.Encode(draft.prompt.substr(0, draft.question), false, false);
  const auto differ = std::mismatch(document.begin(), document.end(), prompt.begin(), prompt.end());
  if (tokenizer_.add_bos()) sample.prompt.push_back(tokenizer_.bos());
  sample.question = sample.prompt.size() + static_cast<size_t>(differ.first - document.begin());
  sample.prompt.insert(sample.prompt.end(), prompt.begin(), prompt.end());
  sample.depth = static_cast<double>(draft.statement) / static_cast<double>(draft.prompt.size());
  return sample;
}

RecallTasks::Draft RecallTasks::MakeDraft(RecallKind kind, size_t length, double depth, uint64_t seed) const {
  switch (kind) {
    case RecallKind::kKeyNumber:
      return KeyValueList(length, depth, seed, true);
    case RecallKind::kKeyWord:
      return KeyValueList(length, depth, seed, false);
    case RecallKind::kNeedle:
      return Needle(length, depth, seed);
    case RecallKind::kVariable:
      break;
  }
  return Variables(length, depth, seed);
}

RecallSample RecallTasks::Make(RecallKind kind, size_t length, double depth, uint64_t seed) const {
  CHECK(depth >= 0 && depth <= 1, "depth {}", depth);
  if (kind == RecallKind::kNeedle && paragraphs_.empty()) {
    Fail(ErrorCode::kInvalidArgument, "needle tasks hide a sentence in real text: give a file with --text");
  }
  // Pieces are counted one by one, and the question before it is known what is asked; should the whole need more tokens,
  // the next attempt has less room.
  size_t room = length - std::min<size_t>(length, tokenizer_.add_bos() ? 1 : 0);
  for (Draft draft; !(draft = MakeDraft(kind, room, depth, seed)).prompt.empty();) {
    RecallSample sample = Finish(draft);
    if (sample.prompt.size() <= length) return sample;
    room -= std::min(room, sample.prompt.size() - length);
  }
  Fail(ErrorCode::kInvalidArgument, "a {} task does not fit {} tokens", Name(kind), length);
}

}  // namespace lesskv
