// Multiple choice by likelihood: the model is asked which of several continuations of a question it finds likeliest.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "eval/setup.h"

namespace lesskv {

// One question, split into what is shared and what is scored.
struct ChoiceQuestion {
  std::string prompt;
  std::vector<std::string> continuations;  // each begins with a space
  size_t label = 0;                        // index of the right one
};

// Reads JSON lines {"q": text, "choices": [texts], "label": index from 0}; empty lines are skipped. The prompt is made
// by:
//   q with "asks_for" ("cause" or "effect", COPA)  q without its full stop + " because" or " so"; choices begin in
//   lower
//                                                  case
//   q with one "_" as a blank (Winogrande)         q up to the blank; each choice continues with q's rest
//   any other q                                    `question_template` with "{q}" replaced
// Throws Error naming the line that is damaged.
std::vector<ChoiceQuestion> ParseChoices(std::string_view json_lines, const std::string& name,
                                         std::string_view question_template = "Question: {q}\nAnswer:");

struct ChoicesOptions {
  std::vector<ChoiceQuestion> questions;
  std::string source;  // file name, for the row
  size_t shots = 0;    // the first questions of the list stand solved before every other one, and are not asked
  size_t limit = 0;    // questions asked, evenly spaced over the rest; 0: all
};

// One row a subject: accuracy (the continuation of highest likelihood) and accuracy_normalised (highest likelihood per
// byte), each with _se; questions, skipped (longer than the context), shots. The prompt is read in one shot (or in
// chunks, as the spec says) and compressed once; every choice continues from a clone of that cache through the decode
// path, one token a step.
Report EvaluateChoices(const EvalSetup& setup, const ChoicesOptions& options);

}  // namespace lesskv
