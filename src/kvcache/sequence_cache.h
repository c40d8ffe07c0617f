// The cache of one sequence: all layers, all KV heads, everything that changes while text is processed.
//
// Lifecycle, driven by the engine (the model only appends and attends in between):
//
//   BeginStep(n, kind)   reserves everything the step can need in every layer; throws Error and changes nothing if it
//                        does not fit
//   Append, Attend       once a layer, layers in increasing order; when a layer has been attended it is committed:
//                        observed, cut to its budget, evicted tokens folded into the residual state
//   EndStep()            the tokens count as seen
//   EndPrompt()          once at the end of each prompt (a turn), after its last step
//
// Steps of several sequences go through a CacheBatch (cache_batch.h), which attends for all of them at once; Append and
// Attend here are a batch of one. What fails between BeginStep and EndStep, for lack of memory, leaves a broken cache
// that can only be destroyed. Between steps the cache may be cloned, saved or dropped. Not thread safe; different
// sequences may be used by different threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvcache/cache_config.h"
#include "kvcache/kv_cache.h"

namespace lesskv {

struct CacheStats {
  size_t tokens_seen = 0;
  double tokens_resident = 0;  // mean rows a (global layer, KV head)
  // Tokens that left, by what became of them; means likewise. Resident and these together are the tokens seen.
  double tokens_dropped = 0, tokens_absorbed = 0, tokens_merged = 0, tokens_offloaded = 0;
  size_t kv_bytes = 0;         // allocated for the sequence's cache now
  size_t kv_bytes_peak = 0;    // the largest kv_bytes so far
  size_t kv_bytes_slack = 0;   // of kv_bytes, what rounding rows to tiles and blocks costs
  size_t kv_bytes_full = 0;    // CacheConfig::FullBytes of the tokens seen
  RecallStats recall;          // of the global layers
  FitStats fits;               // likewise
};

class SequenceCache final : public KvCache {
 public:
  explicit SequenceCache(std::shared_ptr<const CacheConfig> config);
  ~SequenceCache() override;
  // Goes on as this one would, bit for bit. Blocks of rows that will not change (of heads that nothing ever leaves) are
  // held once by both and by further clones, which may be used and freed on different threads; all else is copied. Each
  // counts all of its kv_bytes, as if it were alone.
  std::unique_ptr<SequenceCache> Clone() const;
  // The same with memory of its own alone.
  std::unique_ptr<SequenceCache> CloneApart() const;
  // Of kv_bytes, those that clones made now would share or that earlier ones do: each part once, by address.
  std::vector<SharedPart> ShareableParts() const;

  void BeginStep(size_t n_tokens, StepKind kind);
  // Takes back a BeginStep whose first Append has not come: another sequence of the same step could not begin.
  void CancelStep();
  bool WantsInputs(size_t layer) const override;
  void ReadInputs(size_t layer, size_t first, size_t n, const float* x) override;
  void Append(size_t layer, const float* keys, const float* values) override;
  void Attend(size_t layer, const float* queries, float* out) override;
  // Throws Error(kOutOfMemory) where budgets of the whole model are decided here; the cache is then broken.
  void EndStep();
  void EndPrompt();

  // For measurements: brings a new cache into the state it has after a prompt of n_tokens >= 1, without a prompt.
  // Budgets, rows, positions, scores and bytes are what the spec's own rules give (fill_random.cpp says how); keys,
  // values and the tokens that happen to stay are random, and only a sample of those that left is absorbed. Going on
  // from there costs what it costs after a real prompt; what is generated means nothing. Throws Error like BeginStep
  // when memory is short; the cache can then only be destroyed.
  void FillRandom(size_t n_tokens, uint64_t seed);

  const CacheConfig& config() const;
  size_t tokens_seen() const;
  CacheStats Stats() const;

  // Positions held by one (layer, KV head), ascending. For tests and inspection.
  std::vector<Position> ResidentPositions(size_t layer, size_t kv_head) const;

  // The state as bytes, independent of the configuration object; Restore refuses (Error) bytes that do not fit it.
  std::vector<std::byte> Serialize() const;
  void Restore(const std::byte* data, size_t size);

 private:
  friend class CacheBatch;
  friend class CacheConfig;
  struct Impl;
  struct RandomFill;
  explicit SequenceCache(std::unique_ptr<Impl> impl);
  std::unique_ptr<SequenceCache> Copy(bool apart) const;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lesskv
