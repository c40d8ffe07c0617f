// The store of KIVI (Liu et al., ICML 2024, arXiv 2402.02750): old keys coded per channel in groups of `group`
// neighbouring tokens, old values per token in groups of as many channels (a head's if it has fewer), and an exact recent
// window in f16.
//
// What is coded depends on how many tokens came, not on the steps they came in (l tokens, window R):
//   coded keys    R * floor(l / R): R of them at a time, once their window is full
//   coded values  max(0, l - R):    the oldest of more than R, one by one
// A step's own rows wait in a staging area, so that its queries meet them exactly; they are coded when the layer is
// closed. Nothing is coded twice. Where rows leave, they leave in whole groups of keys (with their values), never from
// the last R rows; R is then at most half the budget, rounded down to the group. Rows stay in the order of the text.
//
// With `pruned` coded keys lack that share of their channels (ThinK; channel_sets.h): one set a KV head, chosen when its
// first keys are coded, over those that are. Exact keys are whole; a row loses its channels as it is coded. From then on
// what is coded depends on the tokens alone, as above; the choice itself on the queries that the first step of at least R
// tokens, or of the last ones to make R, ends with.
//
// With `bases` keys are coded behind a trained matrix (key_bases.h), which puts their channels in the order of what they
// add to scores: parts of them have more bits, fewer, or none (their mean in each group). That is ours, as are two options
// for exact rows. `sinks` keeps the first rows of a head in f16 beside their codes for as long as their group stays: they
// receive much attention, or add keys that stand out to the first group. `lags` codes a group of keys only when a full
// window of newer ones is exact, not once the window is full: coded keys are then group * floor((l - R) / group).
//
// A head's coded rows lie in blocks: units of keys, part by part, then units of values (group_codes.h). Heads that grow own blocks of
// kKiviBlockRows rows, bounded ones a single block of their budget.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/checked.h"
#include "kernels/rows/group_codes.h"
#include "kvcache/codec/channel_sets.h"
#include "kvcache/codec/codec.h"
#include "kvcache/codec/exact_rows.h"
#include "kvcache/codec/key_bases.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/memory.h"

namespace lesskv {

inline constexpr size_t kKiviBlockRows = 256;

struct KiviOptions {
  size_t key_bits = 2, value_bits = 2;
  size_t group = 32;    // tokens of a key group, and channels of a value group where a head has so many
  size_t window = 128;  // exact rows, a multiple of the group
  // Values are coded behind a Hadamard transform (hadamard.h) and with fitted scales. The transform gains by itself;
  // fitted scales lose without it, as they cut off the same channel of every token.
  bool rotate = false;
  double pruned = 0;  // share of the channels that coded keys lack, so that a multiple of kGroupedChannels stays
  size_t sinks = 0;     // first rows that stay exact beside their codes; at most the group
  bool lags = false;    // keys wait until `window` newer ones are exact
  std::shared_ptr<const KeyBases> bases = nullptr;  // null: keys are coded as they are

  // The parts of a coded key's channels: one, but behind a matrix.
  std::vector<GroupFormat> Keys(size_t head_dim) const;
  GroupFormat Values(size_t head_dim) const {
    return {RowSide::kValues, value_bits, std::min(group, head_dim), head_dim,
            rotate ? GroupFit::kFitted : GroupFit::kExtremes};
  }
  // The exact rows of a head that may keep `budget` rows; 0 where that is too few.
  size_t Window(size_t budget) const { return std::min(window, budget / 2 / group * group); }
  // Of n keys that are exact, with a window of so many, those that stay so.
  size_t ExactKeys(size_t n, size_t exact_window) const {
    if (!lags) return n % exact_window;
    return n < exact_window + group ? n : exact_window + (n - exact_window) % group;
  }
  // Room for the most keys and values that are exact between steps.
  size_t WindowRoom(size_t exact_window) const { return RoundUp(exact_window + (lags ? group : 0), kTileRows); }
};

// The widths of the parts of a head's channels that keys of so many bits have behind a matrix, and the bits of each: a
// quarter more than the others, a quarter fewer, as many bits in all.
std::vector<GroupFormat> BalancedParts(size_t bits, size_t group, size_t head_dim);

class KiviStore final : public KvStore {
 public:
  KiviStore(ByteCounter& counter, const StoreShape& shape, const KiviOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void AddShareable(std::vector<SharedPart>& parts) const override;
  void Reserve(const StepRoom& room) override;
  void SetBudgets(size_t layer, std::span<const size_t> budgets) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void AddJobs(const StoreQuery& query, JobList& list) const override;
  void Observe(const StoreQuery& query) override;
  // Coded keys have zeros in their pruned channels.
  void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                float* values) const override;
  SlotMap Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) override;
  void EndStep() override;
  void CancelStep() override;
  size_t SlackBytes(std::span<const size_t> budgets) const override;
  size_t n_rows(size_t layer, size_t kv_head) const override { return At(layer, kv_head).n_rows; }
  size_t GroupedRows(size_t layer, size_t kv_head) const override;
  void Save(ByteWriter& out) const override;
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override;

  // Rows of a head that are coded: the first ones.
  size_t coded_keys(size_t layer, size_t kv_head) const { return At(layer, kv_head).coded_keys; }
  size_t coded_values(size_t layer, size_t kv_head) const { return At(layer, kv_head).coded_values; }
  // The channels of a head's coded keys, ascending; empty where they have all, and until they are chosen.
  std::span<const uint16_t> kept_channels(size_t layer, size_t kv_head) const { return At(layer, kv_head).Channels(); }

 private:
  struct KeyPart {
    GroupFormat format;
    size_t bytes, bytes_before;  // of a unit, and of those of the parts before it
  };
  struct Formats {  // of one layer
    std::vector<KeyPart> keys;  // the channels that are stored, in parts
    GroupFormat values;
    ExactFormats exact;
    size_t layer = 0, group = 0;
    const KeyBases* bases = nullptr;  // of coded keys
    size_t hadamard_block = 0;  // of coded values; 0: they lie as they are
    size_t key_bytes = 0, value_bytes = 0;  // of a group of keys, all parts, and of a unit of values
  };
  struct Head final : RowReader {
    const Formats* formats = nullptr;
    const ChannelSets* sets = nullptr;  // where coded keys lack channels
    size_t index = 0;                   // the head's in `sets`
    size_t kv_head = 0, n_sinks = 0;    // its number in the layer; its room for exact first rows
    std::vector<CountedBuffer> blocks;
    size_t block_rows = 0;
    size_t n_rows = 0, coded_keys = 0, coded_values = 0;
    ExactRows window;        // keys from slot 0 on, values in a ring
    size_t first_value = 0;  // slot of its oldest value
    CountedBuffer sinks;     // f16 [2 (keys, values), options.sinks, head_dim]
    size_t sink_keys = 0, sink_values = 0;  // rows in it, the head's first ones
    size_t rows_before = 0, window_before = 0;  // what CancelStep goes back to

    // Of a part of a key's channels, and of values: the unit that a coded row lies in.
    std::byte* KeyUnit(size_t part, size_t row) const;
    std::byte* ValueUnit(size_t row) const;
    std::span<const uint16_t> Channels() const { return sets == nullptr ? std::span<const uint16_t>() : sets->Kept(index); }
    // Where a decode step reads on after the coded row before `row`: units of either side, or null.
    const std::byte* After(bool keys, size_t row) const;
    size_t Capacity() const { return blocks.size() * block_rows; }
    uint16_t* Sink(RowSide side, size_t row) const;
    // Calls f(first row of a block, first row in it, n, rows done) for the stretches of rows [first, first + n).
    template <typename F>
    void ForBlocks(size_t first, size_t n, F&& f) const;

    // Scores of at most KeyBases::kMostAtOnce queries, q[c * n_queries + m], with the channels as they are coded.
    void CodedScores(size_t first, size_t n, const float* q, size_t n_queries, float* scores, size_t stride) const;
    void ScoreSink(size_t row, const float* q, size_t stacked, float* scores, size_t stride) const;
    void ExpandParts(size_t first, size_t n, float* out, size_t stride) const;
    // AddValues in the space that values are coded in.
    void AddCodedValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked, float* out,
                        size_t out_stride) const;
    void ExpandKeys(size_t first, size_t n, float* out, size_t stride) const override;
    void ExpandValues(size_t first, size_t n, float* out, size_t stride) const override;
    bool Scores(size_t first, size_t n, const float* q, size_t stacked, float* scores, size_t stride) const override;
    bool AddValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked, float* out,
                   size_t out_stride) const override;
  };
  // Which rows of a head, indexed as before the step was closed, stay.
  struct Kept {
    size_t n = 0;
    size_t first = 0;            // rows before it all stay
    std::vector<uint32_t> rest;  // the kept ones of those behind
    size_t Old(size_t row) const { return row < first ? row : rest[row - first]; }
  };

  const LayerShape& Layer(size_t layer) const { return shape_.layers[layer]; }
  Head& At(size_t layer, size_t kv_head) { return heads_[table_(layer, kv_head)]; }
  const Head& At(size_t layer, size_t kv_head) const { return heads_[table_(layer, kv_head)]; }
  // A head's first blocks that are full of coded rows, where these stay.
  size_t SettledBlocks(const Head& head) const {
    return shape_.keeps_all && head.block_rows > 0 ? std::min(head.coded_keys, head.coded_values) / head.block_rows : 0;
  }
  size_t WindowOf(size_t head) const { return budgets_.empty() ? options_.window : options_.Window(budgets_[head]); }
  // Of a block with room for so many rows.
  static size_t BlockBytes(const Formats& formats, size_t rows);
  void ResizeWindow(Head& head, size_t rows);
  void ResizeArena(Head& head, size_t rows);
  void Grow(Head& head, size_t rows);
  void Trim(Head& head);
  void ReserveHead(size_t i, const StepRoom& room);
  void ReadExact(const Head& head, const ExactRows& staging, RowSide side, size_t row, float* out) const;
  void CodeRows(Head& head, const ExactRows& staging, const Kept& kept, size_t keys, size_t values);
  void CodeKeys(Head& head, const ExactRows& staging, const Kept& kept, size_t keys);
  void CodeValues(Head& head, const ExactRows& staging, const Kept& kept, size_t values);
  void KeepExactKeys(Head& head, const ExactRows& staging, size_t n);
  void KeepExactValues(Head& head, const ExactRows& staging, size_t n);
  static void SaveSinks(const Head& head, ByteWriter& out);
  void LoadSinks(Head& head, size_t keys, size_t values, ByteReader& in);
  AttentionJob Job(const StoreQuery& query, size_t kv_head, JobList& list) const;

  ByteCounter* counter_;
  StoreShape shape_;
  KiviOptions options_;
  HeadTable table_;
  std::optional<ChannelSets> sets_;  // where coded keys lack channels
  std::vector<Formats> formats_;  // [n_layers]
  std::vector<Head> heads_;      // [heads]
  StagingArea staging_;
  // The step in progress.
  size_t n_step_ = 0;
  bool is_prompt_ = false;
  bool evicts_ = false;
  std::vector<size_t> budgets_;  // [heads], or empty
};

}  // namespace lesskv
