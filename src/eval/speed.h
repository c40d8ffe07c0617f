// How fast a model runs with each cache, as llama-bench measures it: prompts (pp), generated tokens (tg), both at a
// depth of tokens already in the cache. The cache is filled at that depth with random rows (SequenceCache::FillRandom),
// so that no prompt has to be computed to get there. Every path is verified against the scalar kernels before anything
// is timed (speed_verify.h). docs/benchmarks.md says what the results mean.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "base/plain_read.h"
#include "eval/report.h"

namespace lesskv {

// Feature maps with random weights, for measuring `less` on a model that nobody has trained any for.
struct RandomMaps {
  size_t rank = 8;
  size_t hidden = 512;
};

struct SpeedOptions {
  std::vector<CacheSpec> specs = {};
  std::vector<size_t> prompts = {512};   // prompt lengths, a test each; 0 is none
  std::vector<size_t> predicts = {128};  // numbers of generated tokens, a test each; 0 is none
  std::vector<size_t> depths = {0};      // tokens that the cache has seen before the test
  std::vector<size_t> batches = {1};     // sequences processed together
  size_t memory_bytes = 0;               // not 0: as many sequences as fit into it instead of `batches`
  size_t repeat = 3;
  size_t ctx = 0;  // context length that percentages refer to; 0: what the longest test needs, at least 64
  uint64_t seed = 0;
  std::optional<RandomMaps> random_maps = {};
  const std::atomic<bool>* stop = nullptr;    // set from anywhere: Error kRuntime; rows finished so far are in the report
  std::function<void(double)> progress = {};  // share done, in [0, 1]
};

// Throws Error for options that make no sense: no test, a context too small, a spec that the model cannot have.
// Throws Error kRuntime when a path does not agree with the scalar one; nothing was timed then.
// Rows are appended to report, one a (spec, depth, test, batch).
void MeasureSpeed(Engine& engine, const SpeedOptions& options, PlainRead& plain_read, Report& report);

// The columns of a report of speeds.
std::vector<Column> SpeedColumns();

}  // namespace lesskv
