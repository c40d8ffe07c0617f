// lesskv train csr: dictionaries of a model's keys (before rotation) and values, for the codec csr.
//
// Texts go through the model with a full cache; a sample of each global layer's keys and value halves trains a dictionary
// for each group of neighbouring layers (train_atoms.h), keys and values apart, all KV heads together.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "kvcache/residual/sidecar.h"
#include "tokenizer/tokenizer.h"
#include "train/train_atoms.h"

namespace lesskv::train {

struct TrainCsrOptions {
  std::vector<std::string> texts;  // files
  size_t sequences = 16;           // texts of `tokens` tokens each
  size_t tokens = 512;
  size_t samples = 12288;  // vectors a dictionary learns from, at most; and is judged by
  size_t group = 1;        // neighbouring layers that share a dictionary
  AtomOptions atoms;       // `dim` is the model's; `pairs` of a key, those of a value half are half of it
};

struct TrainCsrReport {
  SidecarDictionaries dictionaries;
  std::vector<TrainedAtoms> keys, values;  // a dictionary
  double collect_seconds = 0, seconds = 0;
};

// progress(phase, done): phase "collect" or "train". Throws Error for options that make no sense, models it does not fit
// and texts too short; `stop` set: Error kRuntime.
TrainCsrReport TrainCsr(const Engine& engine, const Tokenizer& tokenizer, const TrainCsrOptions& options,
                        const std::function<void(std::string_view phase, double done)>& progress,
                        const std::atomic<bool>* stop = nullptr);

}  // namespace lesskv::train
