// Which rows of a text a model needs, measured.
//
// A text is fed twice, one copy behind the other, and attended in full. What the second copy reads of the first shows
// which rows a model needs to keep (KVzip, arXiv 2505.23416); a row's score is the largest that any query of its group
// gives it: its weight, times the length of what it then adds to the layer's output, over the length of what enters the
// layer at that query, behind the layer's norm (KVzip+, arXiv 2601.07891):
//
//   y_i = max over queries j and heads h of (s_ji - lse_j + ln |W_O^h v_i| - ln |x_j|)
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/engine.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

struct RowScores {
  std::vector<std::vector<float>> scores;  // [global heads][n_tokens] of the first copy
  std::vector<std::vector<float>> inputs;  // [global layers][n_tokens, width] likewise, where wanted
};

// Tokens in front of the first copy and between the two.
struct RepeatFrame {
  std::vector<int32_t> before, between;
};

// A model with a chat template is asked to repeat the text, and the second copy is its answer; without one a line break
// lies between the copies. BOS, where the vocabulary wants one, is in front of all, so that the text has none of its own.
RepeatFrame MakeRepeatFrame(const Model& model, const Tokenizer& tokenizer);

// The first rows of a text, which nothing is fitted to: every selector worth its name keeps them.
inline constexpr size_t kSinkRows = 4;

RowScores MeasureRows(const Engine& engine, const std::vector<int32_t>& text, const RepeatFrame& frame,
                      bool wants_inputs = false);

// One query head's query raises the scores of rows: ln of the weight it gives each, of the length of what each adds to the
// output, and of the length of what entered the layer at the query.
void RaiseScores(std::span<const float> log_weights, std::span<const float> log_added, float log_input,
                 std::span<float> scores);

// ln of a length; finite also for 0, as where a head's values add nothing.
float LogLength(float length);

}  // namespace lesskv::train
