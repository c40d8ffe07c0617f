// Scores of the RULER tasks through a cache: what is generated in answer, and whether it names what was asked for.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "eval/recall.h"
#include "eval/ruler_tasks.h"
#include "eval/setup.h"

namespace lesskv {

struct RulerOptions {
  std::vector<RulerKind> kinds = {};
  size_t length = 0;   // tokens of document and question; 0: the context less kAnswerRoom
  size_t samples = 20;  // of each kind
  std::string text = {};
  std::vector<RulerQuestion> questions = {};
  // kWithPrompt: document and question are one prompt. kAfterPrompt: the question is read through the compressed cache.
  RecallOptions::Ask ask = RecallOptions::Ask::kAfterPrompt;

  static constexpr size_t kAnswerRoom = 128;  // the most that AnswerTokens is
};

// One row a subject: length, ask, samples (of each task), score_TASK and score_TASK_se in [0, 1], tasks_averaged and average
// (with average_se, of other documents for the same tasks): of those on which the full cache reaches half, where it is among
// the subjects, else of all. Answers are greedy, of at most AnswerTokens; they end early where more cannot change the score.
// All caches get the same documents.
// Throws Error where a length does not fit the context or a task does not fit a length.
Report EvaluateRuler(const EvalSetup& setup, const RulerOptions& options);

}  // namespace lesskv
