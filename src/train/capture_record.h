// What training needs of one text in one layer, as a file of its own (a GGUF with half-precision tensors): written as
// soon as the layer has been attended, so that capturing holds one layer of one text in memory, whatever the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kvcache/cache_config.h"
#include "train/less_layer.h"

namespace lesskv::train {

// One policy's life over the text: what stays exact, and when each token leaves.
struct CaptureView {
  std::string spec;               // "h2o(5%)"
  size_t step = 1;                // tokens a step while the text streams in
  size_t first_scored = 0;        // first query that follows an eviction; n_tokens when nothing leaves
  std::vector<float> exact_out;   // [n_tokens, n_heads, head_dim]
  std::vector<float> exact_lse;   // [n_tokens, n_heads]
  std::vector<int32_t> leave;     // [n_kv_heads, n_tokens]
  std::vector<float> plus_out;    // as exact_out for Baseline+ (more rows); empty in training texts
};

struct CaptureRecord {
  size_t n_tokens = 0;
  std::vector<float> q, k, v, target;  // as in LessExample
  std::vector<CaptureView> views;
};

// What a file of `views` views takes on disk, less a few KiB of its header; `plus`: with Baseline+'s outputs.
uint64_t RecordBytes(size_t n_tokens, size_t n_heads, size_t n_kv_heads, size_t head_dim, size_t views, bool plus);

std::string RecordPath(const std::string& folder, size_t sequence, size_t layer);

// Throws Error when a value does not fit half precision, or kIo.
void WriteRecord(const std::string& path, const CaptureRecord& record, size_t n_heads, size_t n_kv_heads);

// Reads one view as an example. `plus_out`, when given, receives Baseline+'s output. Throws Error when the file lacks it.
LessExample ReadExample(const std::string& path, size_t view, size_t n_heads, size_t n_kv_heads,
                        std::vector<float>* plus_out = nullptr);

}  // namespace lesskv::train
