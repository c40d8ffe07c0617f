// Recall tasks: a question at the end of a prompt whose answer stands once, at a chosen depth, earlier in it. The exact
// text is described in docs/evaluation.md; a model has to have learned to answer in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace lesskv {

enum class RecallKind {
  kKeyNumber,  // "kv": a list "The code of <key> is <number>."; one key is asked for
  kKeyWord,    // "kv_words": the same with words as values
  kNeedle,     // "needle": one sentence "The secret word of <key> is <word>." in real text
  kVariable,   // "variable": assignments and copies "x12 = 4821", "x3 = x12"; the end of a chain is asked for
};

inline constexpr RecallKind kRecallKinds[] = {RecallKind::kKeyNumber, RecallKind::kKeyWord, RecallKind::kNeedle,
                                              RecallKind::kVariable};
std::string_view Name(RecallKind kind);
RecallKind ParseRecallKind(const std::string& name);  // Error naming the kinds otherwise

// One question. The prompt ends right before the answer's first token, which carries the space before the answer.
struct RecallSample {
  std::string prompt_text;
  std::string answer_text;  // " 4821"
  std::vector<int32_t> prompt;
  std::vector<int32_t> answer;
  // Index into prompt: what comes before it are whole tokens of the document, without the question.
  size_t question = 0;
  double depth = 0;  // where the answer really stands: byte offset of its statement over the prompt's bytes
};

// The 400 words that no training document of the reference model uses as a key or value.
std::span<const std::string_view> EvalWords();

class RecallTasks {
 public:
  // `text` is the real text of needle tasks (paragraphs separated by line feeds); may be empty when none is made.
  // Throws Error when fewer than two words are given. The tokenizer outlives the tasks.
  RecallTasks(const Tokenizer& tokenizer, std::vector<std::string> words, std::string_view text);

  // A prompt of at most `length` tokens, BOS included, and at least all but one statement's (or paragraph break's)
  // worth. depth in [0, 1]: 0 puts the answer's statement first, 1 last before the question; of a chain of copies, its
  // first line. A pure function of its arguments. Throws Error when the length has no room for two statements, or the
  // text is too short.
  RecallSample Make(RecallKind kind, size_t length, double depth, uint64_t seed) const;

 private:
  struct Draft;
  struct Filler;

  // Prompts of at most `length` tokens without BOS; an empty prompt when it does not fit.
  Draft MakeDraft(RecallKind kind, size_t length, double depth, uint64_t seed) const;
  Draft KeyValueList(size_t length, double depth, uint64_t seed, bool numbers) const;
  Draft Needle(size_t length, double depth, uint64_t seed) const;
  Filler FillerOf(size_t n_tokens, size_t first) const;  // from paragraph `first` on, at most n_tokens
  std::string CutParagraph(std::string paragraph, size_t tokens, size_t limit) const;
  Draft Variables(size_t length, double depth, uint64_t seed) const;
  Draft Program(size_t n_lines, double depth, uint64_t seed) const;
  size_t CountTokens(std::string_view text) const;
  RecallSample Finish(const Draft& draft) const;

  const Tokenizer& tokenizer_;
  std::vector<std::string> words_;
  std::vector<std::string> paragraphs_;
  std::vector<size_t> paragraph_tokens_;
};

}  // namespace lesskv
