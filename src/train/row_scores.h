// Which rows of a text a model needs, measured.
//
// A text is fed twice, one copy behind the other, and attended in full. What the second copy reads of the first shows
// which rows a model needs to keep (KVzip, arXiv 2505.23416); a row's score is the largest weight that any query of its
// group gives it, times the length of what it then adds to the layer's output, over the length of the layer's input
// (KVzip+, arXiv 2601.07891; the input's length as its norm weights have it):
//
//   y_i = max over queries j and heads h of (s_ji - lse_j + ln |W_O^h v_i|) - ln |w_norm|
#pragma once

#include <cstdint>
#include <vector>

#include "engine/engine.h"

namespace lesskv::train {

struct RowScores {
  std::vector<std::vector<float>> scores;  // [global heads][n_tokens] of the first copy
  std::vector<std::vector<float>> inputs;  // [global layers][n_tokens, width] likewise, where wanted
};

RowScores MeasureRows(const Engine& engine, const std::vector<int32_t>& text, bool wants_inputs = false);

}  // namespace lesskv::train
