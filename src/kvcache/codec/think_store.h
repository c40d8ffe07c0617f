// The store of ThinK (Xu et al., ICLR 2025, arXiv 2407.21018): old keys without the channels that matter least to the
// queries, values and the most recent keys whole. Around the row types of row_store.h.
//
// A KV head's rows, in the order in which attention meets them: old rows, whose keys have kept_channels() of their
// channels and lie in a RowStore of that width; then the window, the newest rows in the order of the text, whole, in a
// ring. A step's own rows wait in a staging area, as whole rows, so that its queries meet them exactly. When the layer
// is closed what the window has no room for moves on into the old rows, where it leaves its pruned channels behind.
//
// Which channels stay (one set a KV head, kept for the sequence's life) is chosen when a head first has more rows than
// its window: those with the largest |Q_j|^2 |K_j|^2 over all rows that are kept and the last kThinkQueries queries. A
// shorter step adds its queries to those before; that is ours, for texts that begin token by token. Equal scores: the
// lower channel goes. Rows that leave the window later lose the same channels; with `generated_full` only those that do
// at a prompt's end, so that what is generated piles up whole (the paper's form).
//
// A row that is moved keeps its bits, but for q8 and q4 keys, which are rounded anew without the pruned channels. Where
// a later prompt gives a head a smaller budget and its window is short of rows, old rows go back there with zeros in
// place of what they lost: the same scores.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kvcache/codec/codec.h"
#include "kvcache/codec/exact_rows.h"
#include "kvcache/codec/row_store.h"

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

class ThinkStore final : public KvStore {
 public:
  // Every layer must have channels to prune (KeptChannels).
  ThinkStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types, const ThinkOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void Reserve(const StepRoom& room) override;
  void SetBudgets(size_t first_layer, std::span<const size_t> budgets) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void AddJobs(const StoreQuery& query, JobList& list) const override;
  void Observe(const StoreQuery& query) override;
  // Keys of old rows have zeros in their pruned channels.
  void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                float* values) const override;
  SlotMap Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) override;
  void EndStep() override;
  void CancelStep() override;
  size_t n_rows(size_t layer, size_t kv_head) const override;
  size_t SlackBytes(std::span<const size_t> budgets) const override;
  void Save(ByteWriter& out) const override;
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override;

  size_t old_rows(size_t layer, size_t kv_head) const { return old_->n_rows(layer, kv_head); }
  // The channels of a head's old keys, ascending; empty until they are chosen (and in plans).
  std::span<const uint16_t> kept_channels(size_t layer, size_t kv_head) const;

 private:
  struct Head {
    ExactRows ring;
    size_t first = 0, n = 0;                     // the oldest row's slot in the ring, and how many there are
    bool chosen = false;                         // which channels stay
    size_t window = 0;                           // rows that stay whole in the step in progress
    size_t bounded_window = 0;                   // in steps that evict; 0: not known yet
    size_t scores_at = 0, channels_at = 0;       // its places in sums_ and channels_
    size_t ring_before = 0, bounded_before = 0;  // what CancelStep goes back to
  };
  // What becomes of a head's rows when its step is closed.
  struct Cut {
    std::vector<Departure> old_leaving;  // rows of old_, those that go back to the window among them
    std::vector<uint32_t> back;          // rows of old_ that go back
    std::vector<uint32_t> whole;         // kept whole rows in the order of the text, counted from the ring's first
    size_t entering = 0;                 // of them, the first so many become old
    size_t n_rows = 0;
  };

  const LayerShape& Layer(size_t layer) const { return shape_.layers[layer]; }
  const ExactFormats& FormatsOf(size_t head) const { return formats_[table_.LayerOf(head)]; }
  const ExactRows& Staging(size_t layer, size_t kv_head) const {
    return staging_[defers_ ? table_(layer, kv_head) : kv_head];
  }
  size_t OldRows(size_t head) const;
  uint16_t* Channels(const Head& head) const {
    return const_cast<uint16_t*>(channels_.As<uint16_t>().data()) + head.channels_at;
  }
  double* Sums(const Head& head) { return sums_.As<double>().data() + head.scores_at; }
  bool Prunes() const { return is_prompt_ || !options_.generated_full; }
  size_t RingRows(const Head& head, size_t needed) const;
  void ResizeRing(size_t i, size_t rows);
  void FindWindows(const StepRoom& room);
  std::vector<size_t> OldBudgets(std::span<const size_t> budgets) const;
  void ReserveOld(const StepRoom& room);
  void ReserveStaging(const StepRoom& room);
  void ReserveChoice();
  // A whole row, counted from the ring's first; those behind the ring are the step's own.
  struct Place {
    const ExactRows* rows;
    size_t slot;
  };
  Place Find(size_t layer, size_t kv_head, size_t whole) const;
  Cut PlanCut(size_t layer, size_t kv_head, std::span<const Departure> leaving) const;
  void Choose(size_t layer, size_t kv_head, const Cut& cut);
  SlotMap MoveOn(size_t layer, size_t kv_head, const Cut& cut);
  void KeepWhole(size_t layer, size_t kv_head, const Cut& cut, std::span<const float> back);
  void Spread(const Head& head, size_t layer, const float* some, float* key) const;
  AttentionJob Job(const StoreQuery& query, size_t kv_head, JobList& list) const;
  void SaveWhole(size_t head, ByteWriter& out) const;
  void LoadWhole(size_t head, ByteReader& in);
  void LoadChoice(size_t head, ByteReader& in);

  ByteCounter* counter_;
  StoreShape shape_;
  RowTypes types_;
  ThinkOptions options_;
  HeadTable table_;
  std::vector<ExactFormats> formats_;  // [n_layers], of whole rows
  std::unique_ptr<RowStore> old_;
  size_t widest_ = 0, most_heads_ = 0;
  std::vector<Head> heads_;     // [heads]
  std::vector<ExactRows> staging_;  // a layer's heads, or all when the step defers
  // Both from the first step on; the sums until all heads have chosen.
  CountedBuffer channels_;  // uint16 [heads, kept channels]
  CountedBuffer sums_;      // double [heads, head_dim]: squares of the queries' channels
  // The step in progress.
  size_t n_step_ = 0;
  bool evicts_ = false, is_prompt_ = false, defers_ = false;
  std::vector<size_t> budgets_, budgets_before_;  // [heads], or empty
};

}  // namespace lesskv
