// The caches of one step, of one sequence or of many, as the model sees them: it appends and attends for all rows of the
// step at once. Attention of all sequences is one parallel region, whatever their lengths and specs; so is what reads
// residual states. Bits of a sequence do not depend on which others share the step.
//
// A sequence that fails in the middle of a step (memory for its eviction cannot be had) is left out from then on, and
// its outputs are zeros; the others go on. Its cache can then only be destroyed.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kvcache/codec/kv_store.h"
#include "kvcache/kv_cache.h"
#include "kvcache/sequence_cache.h"

namespace lesskv {

class CacheBatch final : public KvCache {
 public:
  CacheBatch();
  ~CacheBatch() override;

  // A new step of caches that have begun theirs, all for the same model. The step's rows are their tokens, one cache
  // after the other. `pause` is called between tiles of queries, where work of other batches may be done.
  // leaders[i] < i: cache i reads the rows of that cache, which is its own leader, and has none of its own; both read a
  // first prompt and CacheConfig::ReadsPromptsAs each other. Only what it observes is computed. leaders[i] = i: no leader;
  // an empty list says so of all. A cache whose leader fails fails with it.
  void Start(std::span<SequenceCache* const> caches, std::span<const size_t> leaders = {},
             std::function<void()> pause = {});

  // KvCache, for all rows of the step. What these throw concerns the whole step (work memory): all caches in it are
  // then broken.
  bool WantsInputs(size_t layer) const override;
  void ReadInputs(size_t layer, size_t first, size_t n, const float* x) override;
  void Append(size_t layer, const float* keys, const float* values) override;
  void Attend(size_t layer, const float* queries, float* out) override;

  // Leaves a cache out of the rest of the step.
  void Drop(size_t i, std::exception_ptr why);
  // Why cache i was left out; null while it is in.
  const std::exception_ptr& failure(size_t i) const;

 private:
  struct Item;
  struct Tile;
  struct Sums;

  template <typename Body>
  void ForItems(Body&& body);
  void FailWithLeaders();
  void AttendTiles(size_t layer, const float* queries, float* out);
  void RotateQueries(size_t layer, const float* queries);
  void AddJobs(size_t layer, float* out);
  void AddSums(const Tile& tile, const Observation& wanted, std::vector<std::vector<float>>& into, Sums& sums);
  static void KeepFitQueries(const Tile& tile, size_t layer, const float* queries);
  void ObserveTiles(size_t layer);
  void MergeResiduals(size_t layer);
  void AbsorbTogether(size_t layer);

  std::vector<std::unique_ptr<Item>> items_;
  size_t n_items_ = 0;
  std::function<void()> pause_;
  // Work memory of the tiles that are attended together.
  std::vector<Tile> tiles_;
  std::vector<float> rotated_, lse_, residual_out_, residual_lse_;
  std::vector<float> unread_;  // outputs of caches that have a leader
  std::vector<int32_t> positions_;
  JobList list_;
};

}  // namespace lesskv
