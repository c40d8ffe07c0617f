// Accuracy of answers to questions about something far back in the prompt, by length and depth.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "eval/recall_tasks.h"
#include "eval/setup.h"

namespace lesskv {

struct RecallOptions {
  std::vector<RecallKind> kinds = {RecallKind::kKeyNumber};
  std::vector<size_t> lengths;                           // tokens of a prompt; empty: the context less kAnswerRoom
  std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};  // in [0, 1]
  size_t samples = 20;                                   // of each kind, length and depth
  std::vector<std::string> words = {};                   // empty: EvalWords()
  std::string text = {};                                 // real text of needle tasks, not a path
  // kContinue: the prompt in one shot (or in chunks, as the spec says). kStream: protocol.step tokens a step. Answers
  // are decoded greedily, one token a step, in both.
  Protocol protocol = {.mode = Protocol::Mode::kContinue};
  // kContinue only. kWithPrompt: the question is part of the prompt, so a method that cuts at the prompt's end knows
  // what is asked, and the answer's first token is predicted before anything has left. kAfterPrompt: the prompt is the
  // document; the question is read behind it through the compressed cache, one token a step.
  enum class Ask { kWithPrompt, kAfterPrompt };
  Ask ask = Ask::kWithPrompt;

  static constexpr size_t kAnswerRoom = 16;
};

// One row a subject, kind and length: task, length, samples, accuracy (with accuracy_se): every token of the answer is
// the greedy choice; first_token_accuracy; depths and accuracy_by_depth, arrays of the same length. All caches are
// asked the same questions. Throws Error when a length does not fit the context or a task does not fit a length.
Report EvaluateRecall(const EvalSetup& setup, const RecallOptions& options);

}  // namespace lesskv
