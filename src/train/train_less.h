// lesskv train less: feature maps for one model, from text (docs/less.md). Two phases, both
// resumable: capture (one file a text and layer, see capture_record.h), then training, layer by layer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/engine.h"
#include "kvcache/residual/sidecar.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::train {

struct TrainLessOptions {
  std::vector<std::string> texts;                // files
  std::vector<std::string> policies;             // specs of bare selectors; a text is captured under `views` of them
  std::vector<size_t> steps = {8};               // tokens a step, in turn
  size_t views = 2;
  size_t sequences = 200;                        // texts of `ctx` tokens, validation included
  size_t ctx = 0;                                // 0: the trained context
  double validation = 0.1;                       // share of the sequences
  size_t rank = 8;
  size_t hidden = 128;
  FeatureKind kind = FeatureKind::kExp;
  DType matrix_type = DType::kBF16;
  size_t epochs = 10;
  size_t batch = 4;
  double rate = 2e-3;
  bool halve = false;  // the paper's schedule: half the rate every 10 epochs; else a cosine to zero after a warm-up
  double dropout = 0;
  uint64_t seed = 0;
  size_t first_layer = 0, end_layer = 0;         // half-open; end 0: all
  // A sidecar from an earlier training: training texts then pass the model compressed with it (each under its first
  // view's policy), so that maps learn from what a compressed model sees; and its maps are where training starts.
  std::string from;
  std::string work_folder;                       // captures and states
  // Bytes that captures may take at once; 0: no limit. Layers then go in groups: captured, trained, their captures removed.
  uint64_t disk_bytes = 0;
  bool resume = false;
};

// What a training will take, known before it begins.
struct TrainLessPlan {
  uint64_t layer_bytes = 0;      // captures of one layer of all texts
  size_t n_layers = 0;           // to be trained
  size_t layers_at_once = 0;     // in a group
  uint64_t bytes_at_once() const { return layer_bytes * layers_at_once; }
  size_t n_groups() const { return (n_layers + layers_at_once - 1) / layers_at_once; }
};

// Where training stands, for people.
struct TrainProgress {
  std::string phase;  // "plan", once, before anything is done; "capture"; "train"
  TrainLessPlan plan;
  size_t layer = 0, epoch = 0;
  double done = 0;  // share of the phase
  double seconds_left = 0;
  double loss = 0, validation = 0, baseline = 0, baseline_plus = 0;  // mean squared errors; 0: not known yet
};

struct TrainLessReport {
  Sidecar sidecar;
  uint64_t capture_bytes = 0;       // on disk, at most at once
  double capture_seconds = 0, train_seconds = 0;
  std::vector<double> validation, baseline, baseline_plus;  // a trained layer
};

// Refuses (Error kInvalidArgument) a cache that loses nothing of a text of its context length before the text's last step
// of `step` tokens: nobody misses anything then, and there is nothing to learn. `command`: for the message.
void RequireLoss(const CacheConfig& config, size_t step, std::string_view command);

// Throws Error for options that make no sense, and when one layer takes more than disk_bytes.
TrainLessPlan PlanTraining(Engine& engine, const Tokenizer& tokenizer, const TrainLessOptions& options);

// Throws Error for options that make no sense, when the disk has not the room for a group, and when the work folder holds another training's files.
// `stop` set: ends between batches with Error kRuntime; what was done so far can be resumed.
TrainLessReport TrainLess(Engine& engine, const Tokenizer& tokenizer, const TrainLessOptions& options,
                          const std::function<void(const TrainProgress&)>& report,
                          const std::atomic<bool>* stop = nullptr);

}  // namespace lesskv::train
