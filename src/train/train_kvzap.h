// lesskv train kvzap: a linear score of what enters a layer, one a KV head, for the selector kvzap (KVzap, arXiv
// 2601.07891). Its target is measured (row_scores.h); the fit is a ridge regression a layer, whose strength is chosen by
// cross-validation over whole texts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "kvcache/residual/sidecar.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

struct TrainKvzapOptions {
  std::vector<std::string> texts;  // files
  size_t sequences = 24;           // texts of `tokens` tokens each
  size_t tokens = 1024;            // the model sees twice as many
  uint64_t seed = 0;
};

struct TrainKvzapReport {
  SidecarScores scores;
  std::vector<double> lambda;  // a layer
  double seconds = 0;
};

// Throws Error for options that make no sense and for texts too short; `stop` set: Error kRuntime between texts.
TrainKvzapReport TrainKvzap(const Engine& engine, const Tokenizer& tokenizer, const TrainKvzapOptions& options,
                            const std::function<void(double done)>& progress, const std::atomic<bool>* stop = nullptr);

}  // namespace lesskv::train
