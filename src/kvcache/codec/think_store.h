// The store of ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): old keys without the channels that matter least to the
// queries, values and the most recent keys whole (window_store.h). Around the row types of row_store.h.
//
// Old rows' keys have kept_channels() of their channels and lie in a RowStore of that width. Which channels stay (one set
// a KV head, kept for the sequence's life) is chosen when a head first has more rows than its window: those with the
// largest |Q_j|^2 |K_j|^2 over all rows that are kept and the last kThinkQueries queries. A shorter step adds its queries
// to those before; that is ours, for texts that begin token by token. Equal scores: the lower channel goes. Rows that
// leave the window later lose the same channels; with `generated_full` only those that do at a prompt's end, so that what
// is generated piles up whole (the paper's form).
//
// A row that is moved keeps its bits, but for q8 and q4 keys, which are rounded anew without the pruned channels. Old rows
// that go back to the window have zeros in place of what they lost: the same scores.
#pragma once

#include "kvcache/codec/window_store.h"

namespace lesskv {

inline constexpr size_t kThinkQueries = 32;

struct ThinkOptions {
  double ratio = 0.4;  // of the channels that are pruned, rounded down
  size_t window = 32;  // whole rows of a head, at least 1
  bool generated_full = false;
};

// How many of a head's key channels stay: all but floor(ratio * head_dim), and as many more as the row type needs (q8
// and q4 keep a multiple of 32). head_dim: nothing is pruned.
size_t KeptChannels(double ratio, size_t head_dim, RowType keys);
// The n channels of the largest scores, ascending. Ties: the lower channel goes. A score that is no number is the
// least.
std::vector<uint16_t> ChooseChannels(std::span<const double> scores, size_t n);

class ThinkStore final : public WindowStore {
 public:
  // Every layer must have channels to prune (KeptChannels); types that rotate have none of their own (CHECK).
  ThinkStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types, const ThinkOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void Observe(const StoreQuery& query) override;

  // The channels of a head's old keys, ascending; empty until they are chosen (and in plans).
  std::span<const uint16_t> kept_channels(size_t layer, size_t kv_head) const;

 private:
  struct Choice {          // of a head
    bool made = false;     // which channels stay
    size_t scores_at = 0, channels_at = 0;  // its places in sums_ and channels_
  };

  std::unique_ptr<WindowStore> MakeEmpty(ByteCounter& counter) const override;
  void ReserveOwn() override;
  void FreeOwn() override;
  void EndOwn() override;
  void SaveOwn(size_t head, ByteWriter& out) const override;
  void LoadOwn(size_t head, ByteReader& in) override;
  void CheckLoaded() override;
  void BeforeRowsEnter(size_t layer, size_t kv_head, const Cut& cut) override;
  void WriteOld(size_t layer, size_t kv_head, const Place& from, std::byte* keys, std::byte* values, size_t slot) const override;
  // Keys of old rows have zeros in their pruned channels.
  void ReadOld(size_t layer, size_t kv_head, uint32_t row, float* key, float* value) const override;
  void MarkOldSpans(size_t layer, size_t kv_head, std::span<RowSpan> keys) const override;

  bool AllMade() const;
  void Choose(size_t layer, size_t kv_head, const Cut& cut);
  uint16_t* Channels(const Choice& choice) const {
    return const_cast<uint16_t*>(channels_.As<uint16_t>().data()) + choice.channels_at;
  }
  double* Sums(const Choice& choice) { return sums_.As<double>().data() + choice.scores_at; }

  RowTypes types_;
  ThinkOptions options_;
  std::vector<Choice> choices_;  // [heads]
  // Both from the first step on; the sums until all heads have chosen.
  CountedBuffer channels_;  // uint16 [heads, kept channels]
  CountedBuffer sums_;      // double [heads, head_dim]: squares of the queries' channels
};

}  // namespace lesskv
