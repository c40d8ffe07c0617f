// The store of ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): old keys without the channels that matter least to the
// queries, values and the most recent keys whole (window_store.h). Around the row types of row_store.h.
//
// Old rows' keys have kept_channels() of their channels and lie in a RowStore of that width. Which channels stay
// (channel_sets.h) is chosen when a head first has more rows than its window, over all rows that are kept. Rows that
// leave the window later lose the same channels; with `generated_full` only those that do at a prompt's end, so that what
// is generated piles up whole (the paper's form).
//
// A row that is moved keeps its bits, but for q8 and q4 keys, which are rounded anew without the pruned channels. Old rows
// that go back to the window have zeros in place of what they lost: the same scores.
#pragma once

#include "kvcache/codec/channel_sets.h"
#include "kvcache/codec/window_store.h"

namespace lesskv {

struct ThinkOptions {
  double ratio = 0.4;  // of the channels that are pruned, rounded down
  size_t window = 32;  // whole rows of a head, at least 1
  bool generated_full = false;
};

class ThinkStore final : public WindowStore {
 public:
  // Every layer must have channels to prune (KeptChannels); types that rotate have none of their own (CHECK).
  ThinkStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types, const ThinkOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void Observe(const StoreQuery& query) override;

  // The channels of a head's old keys, ascending; empty until they are chosen (and in plans).
  std::span<const uint16_t> kept_channels(size_t layer, size_t kv_head) const {
    return sets_.Kept(table()(layer, kv_head));
  }

 private:
  std::unique_ptr<WindowStore> MakeEmpty(ByteCounter& counter) const override;
  void ReserveOwn() override { sets_.Reserve(counter()); }
  void FreeOwn() override { sets_.Free(); }
  void EndOwn() override { sets_.EndStep(); }
  void SaveOwn(size_t head, ByteWriter& out) const override;
  void LoadOwn(size_t head, ByteReader& in) override;
  void CheckLoaded() override;
  void BeforeRowsEnter(size_t layer, size_t kv_head, const Cut& cut) override;
  void WriteOld(size_t layer, size_t kv_head, const Place& from, std::byte* keys, std::byte* values, size_t slot) const override;
  // Keys of old rows have zeros in their pruned channels.
  void ReadOld(size_t layer, size_t kv_head, uint32_t row, float* key, float* value) const override;
  void MarkOldSpans(size_t layer, size_t kv_head, std::span<RowSpan> keys) const override;

  RowTypes types_;
  ThinkOptions options_;
  ChannelSets sets_;
};

}  // namespace lesskv
