// The synthetic tasks of RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), written after the paper's descriptions: a document
// of a wanted length, a question, the beginning of an answer, and the texts that the answer has to name. The wording is
// our own, so scores compare caches with each other here, not with the paper's tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace lesskv {

enum class RulerKind {
  kSingle1,     // "niah_single_1": a number hidden in one sentence that repeats
  kSingle2,     // a number hidden in real text
  kSingle3,     // a UUID hidden in real text
  kMultiKey1,   // three more needles of other keys
  kMultiKey2,   // nothing but needles: numbers
  kMultiKey3,   // nothing but needles: UUIDs for UUIDs
  kMultiValue,  // four values of one key, all asked for
  kMultiQuery,  // four keys, all asked for
  kVariables,   // "vt": variable tracking, one chain of four copies in a sentence that repeats
  kCommon,      // "cwe": ten words stand 30 times each in a numbered list, the others 3 times (below 4,096 tokens 6 and 1)
  kFrequent,    // "fwe": made-up words by Zipf's law of exponent 2; the three most frequent are asked for
  kQuestion1,   // "qa_1": a question about one of many paragraphs, from a file (RULER: SQuAD)
  kQuestion2,   // "qa_2": a question that takes several of them, from a file (RULER: HotpotQA)
};
inline constexpr RulerKind kRulerKinds[] = {RulerKind::kSingle1,    RulerKind::kSingle2,    RulerKind::kSingle3,   RulerKind::kMultiKey1,
                                            RulerKind::kMultiKey2,  RulerKind::kMultiKey3,  RulerKind::kMultiValue, RulerKind::kMultiQuery,
                                            RulerKind::kVariables,  RulerKind::kCommon,     RulerKind::kFrequent,  RulerKind::kQuestion1,
                                            RulerKind::kQuestion2};
std::string_view Name(RulerKind kind);
RulerKind ParseRulerKind(const std::string& name);  // Error naming the kinds otherwise
bool NeedsText(RulerKind kind);                     // real text to hide needles in
size_t AnswerTokens(RulerKind kind);                // generated at most: 128, of vt 30, cwe 120, fwe 50, qa_1 and qa_2 32, as in RULER

struct RulerQuestion {
  std::string question;
  std::vector<std::string> contexts;  // paragraphs: one (qa_1), or several that the answer takes (qa_2)
  std::vector<std::string> answers;   // any of them is right

  RulerKind kind() const { return contexts.size() == 1 ? RulerKind::kQuestion1 : RulerKind::kQuestion2; }
};
// JSON lines {"question": TEXT, "context": TEXT or [TEXT, ...], "answers": [TEXT, ...]}. Throws Error naming file and line.
std::vector<RulerQuestion> ParseRulerQuestions(std::string_view json_lines, const std::string& name);

struct RulerSample {
  std::string document, question;  // the question ends with the beginning of an answer
  std::vector<std::string> answers;
  bool any = false;  // one of the answers is enough (qa_1, qa_2); else the score is the share of them that was named
  std::vector<int32_t> document_ids, question_ids;  // BOS included where the vocabulary wants one
};

// The share of the answers that stand in the text, upper and lower case alike; with `any`, 1 when one does.
double RulerScore(const RulerSample& sample, std::string_view text);

class RulerTasks {
 public:
  // `text`: paragraphs to hide needles in; may be empty where no task needs it. The tokenizer outlives the tasks.
  RulerTasks(const Tokenizer& tokenizer, std::string_view text, std::vector<RulerQuestion> questions);

  // As long as document and question together can be in at most `length` tokens. A pure function of its arguments. Throws
  // Error where the shortest such document is longer, or what the kind needs is missing.
  RulerSample Make(RulerKind kind, size_t length, uint64_t seed) const;

 private:
  RulerSample Draft(RulerKind kind, size_t length, size_t units, uint64_t seed) const;
  RulerSample Needles(RulerKind kind, size_t units, uint64_t seed) const;
  RulerSample Variables(size_t units, uint64_t seed) const;
  RulerSample CommonWords(size_t units, bool is_short, uint64_t seed) const;
  RulerSample FrequentWords(size_t units, uint64_t seed) const;
  RulerSample Question(RulerKind kind, size_t units, uint64_t seed) const;
  size_t MostUnits(RulerKind kind) const;
  void Tokenize(RulerSample& sample) const;

  const Tokenizer& tokenizer_;
  std::vector<std::string> sentences_;
  std::vector<RulerQuestion> questions_;
};

}  // namespace lesskv
