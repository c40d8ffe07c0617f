// The store of codecs that keep each row by itself (f32, f16, bf16, q8, q4; keys and values may differ).
//
// A head whose rows are bounded owns one arena of exactly that many rows (rounded up to a tile); a head that grows owns
// blocks of kBlockRows rows, and the blocks that all heads take in one step share one allocation, so that large pages
// can hold them (two, where some layers may give theirs back before the others); those that the step fills and the last
// ones have one each, because full ones are shared with clones where nothing ever leaves (StoreShape::keeps_all). Where
// budgets differ between heads (StoreShape::packs) all heads share one region, in which each has exactly its budget side
// by side with the others', so that only the whole is rounded up; rows that a growing head takes beyond its budget lie
// in blocks of a tile. When budgets change, a new region is made and rows move when their head is closed. Where a
// selector says how many rows stay (StoreShape::exact_growth) heads grow a layer at a time to what its close leaves, by
// whole blocks. In both cases the rows behind the last whole block, a head's tail, lie beside those of the other heads
// (of the layer's), kTailRows at a time, so that what heads take depends on their rows alone and a whole tile of each is
// not waited for. Where rows may leave after a step, the step's own rows wait in a staging area that all layers share,
// one after the other: a one-shot prompt holds one layer in full, a chunk one layer's chunk. Only where budgets wait for
// all layers does each have an area of its own.
//
// Types that rotate store H k and H v for keys and values, H the Hadamard transform of hadamard.h. Scores are those of
// H q, and outputs come back by H, its own inverse: once a query rather than once a row. Everything outside the store
// (queries, outputs, ReadRows) is untransformed. Unrotated keys (read positions) are taken back row by row instead, in
// cache, because RoPE does not commute with H.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "kernels/attention/attention.h"
#include "kvcache/codec/codec.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/memory.h"

namespace lesskv {

inline constexpr size_t kBlockRows = 128;
// By which tails grow: few beside any budget, and copied that seldom.
inline constexpr size_t kTailRows = 4;

struct RowTypes {
  RowType keys = RowType::kF16;
  RowType values = RowType::kF16;
  bool rotate = false;  // keys and values are stored transformed by hadamard.h

  bool operator==(const RowTypes&) const = default;
};
inline constexpr RowTypes kF16Rows;

// Of rows that were read from a file. Throws Error(kBadFile) where codes of a tile have a scale that is no finite number,
// as their sums would overflow.
void RequireFiniteScales(const RowFormat& format, const std::byte* tile);

class RowStore final : public KvStore {
 public:
  // key_dims: the channels that keys have, a layer, where they are not all of the head's (think_store.h).
  // n_apart: first layers that keep blocks that the others may give back (cluster_store.h), each by itself; SIZE_MAX:
  // none does.
  RowStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types, std::vector<size_t> key_dims = {},
           size_t n_apart = SIZE_MAX);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void AddShareable(std::vector<SharedPart>& parts) const override;
  void Reserve(const StepRoom& room) override;
  void SetBudgets(size_t first_layer, std::span<const size_t> budgets) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void AddJobs(const StoreQuery& query, JobList& list) const override;
  void Finish(const StoreQuery& query) const override;
  void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                float* values) const override;
  void RewriteValues(size_t layer, size_t kv_head, std::span<const uint32_t> rows, const float* values) override;
  SlotMap Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) override;
  void EndStep() override;
  void CancelStep() override;
  size_t n_rows(size_t layer, size_t kv_head) const override { return At(layer, kv_head).n_rows; }
  size_t SlackBytes(std::span<const size_t> budgets) const override;
  void Save(ByteWriter& out) const override;
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override;

  // For stores around this one that change rows they have already (Reorder): how many of a head's first rows they will
  // not change.
  using SettledRows = std::function<size_t(size_t layer, size_t kv_head)>;
  std::unique_ptr<RowStore> CloneWith(ByteCounter& counter, const SettledRows& settled) const;
  void AddShareable(const SettledRows& settled, std::vector<SharedPart>& parts) const;

  // For stores around this one that read some rows only.
  // The query as jobs over spans of this store need it: transformed where rows are. Its memory is the list's.
  StoreQuery Transformed(const StoreQuery& query, JobList& list) const;
  // Spans of rows [first, first + n), indexed as in the step's attention, are added to the lists.
  void AddSpans(size_t layer, size_t kv_head, size_t first, size_t n, std::vector<RowSpan>& keys,
                std::vector<RowSpan>& values) const;
  // Rows to slots 0, 1, ... of regions of the store's own formats, bit for bit.
  void CopyRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, std::byte* keys, std::byte* values) const;
  // Where nothing leaves, between the step's attention and its Close: resident row first + i becomes what row first + from[i] was; `from` is a permutation.
  // The step's own rows count as resident. From several threads for different heads.
  void Reorder(size_t layer, size_t kv_head, size_t first, std::span<const uint32_t> from);
  // For a store in front of this one that holds a step's rows itself and hands some over when a layer is closed: instead
  // of Reserve, with room for entering[i] rows of head i more, and instead of Close. WriteRow writes the i-th row that
  // enters to a slot of a region of keys and one of values.
  using WriteRow = std::function<void(size_t i, std::byte* keys, std::byte* values, size_t slot)>;
  void ReserveRows(const StepRoom& room, std::span<const size_t> entering);
  SlotMap CloseWith(size_t layer, size_t kv_head, std::span<const Departure> leaving, size_t n_entering,
                    const WriteRow& write);
  // Adds the spans of a head's resident rows.
  void AddSpans(size_t layer, size_t kv_head, std::vector<RowSpan>& keys, std::vector<RowSpan>& values) const;
  const RowTypes& types() const { return types_; }
  const RowFormat& key_format(size_t layer) const { return formats_[layer].keys; }
  const RowFormat& value_format(size_t layer) const { return formats_[layer].values; }
  bool transforms(size_t layer) const { return formats_[layer].hadamard_block > 0; }
  void HadamardRows(size_t layer, float* rows, size_t n) const;  // n rows of head_dim floats, in place

 private:
  struct Region {  // keys, then values, of a number of rows; in a plan `data` is null
    std::shared_ptr<CountedBuffer> memory;
    std::byte* data = nullptr;
  };
  // Slots [first, first + rows) of a region of region_rows that heads share.
  struct Share {
    Region region;
    size_t region_rows = 0;
    size_t first = 0, rows = 0;
  };
  struct Head {
    Share share;                  // packed stores: the head's first rows
    std::vector<Region> regions;  // of region_rows rows each: those behind
    Share tail;                   // of fewer than region_rows rows: those behind these (has_tails)
    size_t region_rows = 0;
    size_t n_rows = 0;
    size_t rows_before = 0;  // an arena's size before the step: what CancelStep goes back to
    size_t most_rows = 0;    // with all that enters in the step
    // A packed head whose budget changes in the step moves when it is closed; what it leaves is freed after the step.
    bool moves = false;
    Share next;
    std::vector<Region> left;
    size_t capacity() const { return share.rows + regions.size() * region_rows + tail.rows; }
  };
  struct Place {  // where a row lies
    const Region* region;
    size_t region_rows;
    size_t slot;
    size_t run;  // rows from here that lie side by side
  };
  struct Formats {  // of one layer
    RowFormat keys, values;
    size_t hadamard_block = 0;  // 0: rows are stored as they are
    size_t Bytes(size_t rows) const { return RegionBytes(keys, rows) + RegionBytes(values, rows); }
  };

  const LayerShape& Layer(size_t layer) const { return shape_.layers[layer]; }
  Head& At(size_t layer, size_t kv_head) { return heads_[table_(layer, kv_head)]; }
  const Head& At(size_t layer, size_t kv_head) const { return heads_[table_(layer, kv_head)]; }
  Head& Staging(size_t layer, size_t kv_head) { return staging_[defers_ ? table_(layer, kv_head) : kv_head]; }
  const Head& Staging(size_t layer, size_t kv_head) const {
    return staging_[defers_ ? table_(layer, kv_head) : kv_head];
  }
  const Formats& FormatsOf(size_t head) const { return formats_[table_.LayerOf(head)]; }
  // Layers that share a staging area: it has room for rows of the widest.
  const Formats& StagingFormats(size_t head) const { return defers_ ? FormatsOf(head) : formats_[widest_]; }
  Place Find(size_t layer, size_t kv_head, uint32_t row) const;
  static Place FindIn(const Head& head, size_t row);

  // The memory of blocks that all are full, of rows that will not change.
  std::set<const CountedBuffer*> Settled(const SettledRows& settled) const;
  static const Region& Writable(const Region& region);
  static std::byte* Keys(const Region& region) { return region.data; }
  static std::byte* Values(const Formats& formats, const Region& region, size_t region_rows);
  // A region each of rows[i] rows for formats[i], side by side in one allocation.
  std::vector<Region> Allocate(ByteCounter& counter, std::span<const Formats* const> formats,
                               std::span<const size_t> rows) const;
  void ResizeArena(const Formats& formats, Head& head, size_t rows);
  void TakeBackArena(const Formats& formats, Head& head);
  void ReserveStaging(const StepRoom& room);
  void ReserveShares(const StepRoom& room);
  std::vector<Share> SideBySide(size_t first_head, std::span<const size_t> rows) const;
  void Pack(size_t first_head, std::span<const size_t> rows);
  size_t ShareRows(size_t n, size_t budget) const;
  void Move(Head& head, size_t layer, size_t kv_head, const SlotMap& map, const WriteRow* write);
  void Bring(size_t layer, size_t kv_head, size_t row, const Region& to, size_t to_rows, size_t slot,
             const WriteRow* write);
  SlotMap Compact(size_t layer, size_t kv_head, std::span<const Departure> leaving, size_t n_new, const WriteRow* write);
  void ReserveHeads(const StepRoom& room, std::span<const size_t> entering);
  void Grow(std::span<const size_t> rows);  // [heads]: blocks until each head has room for so many
  void GrowHeads(size_t first, size_t end, std::span<const size_t> rows);
  bool has_tails() const { return shape_.grows && (shape_.packs || shape_.exact_growth); }
  // Whole blocks, and tails as long as they must be, for `rows` rows or those that are there, of heads from first_head on.
  void FitTails(size_t first_head, std::span<const size_t> rows);
  void FitAllTails(std::span<const size_t> rows);
  void ShrinkTails();
  void Trim(Head& head);
  static std::byte* DataAt(const Formats& formats, RowSide side, const Place& at);
  // The tile of the rows from `row` on where they lie as one; null where they are scattered or fewer.
  std::byte* WholeTile(const Formats& formats, RowSide side, const Head& head, size_t row) const;
  void SaveTile(const Formats& formats, RowSide side, const Head& head, size_t row, ByteWriter& out) const;
  std::vector<size_t> SavedRows(ByteReader in, std::span<const size_t> budgets, size_t max_rows) const;
  void LoadTile(const Formats& formats, RowSide side, const Head& head, size_t row, ByteReader& in) const;
  static void AppendSpans(const Formats& formats, const Head& head, size_t first, size_t end, std::vector<RowSpan>& keys,
                          std::vector<RowSpan>& values);
  AttentionJob Job(const StoreQuery& query, size_t kv_head, JobList& list) const;
  bool Transforms(const StoreQuery& query) const;                // queries go through H, outputs come back
  bool ReadsAtPositions(const StoreQuery& query) const;
  void Merge(size_t layer, size_t kv_head, std::span<const Departure> leaving);

  ByteCounter* counter_;
  StoreShape shape_;
  RowTypes types_;
  std::vector<size_t> key_dims_;
  size_t n_apart_;
  HeadTable table_;
  std::vector<Formats> formats_;  // [n_layers]
  size_t widest_ = 0, most_heads_ = 0;
  std::vector<Head> heads_;       // [heads]
  std::vector<Head> staging_;     // a layer's heads, or all when the step defers; empty regions outside evicting steps
  // The step in progress.
  size_t n_step_ = 0;
  bool evicts_ = false;
  bool is_prompt_ = false;
  bool defers_ = false;
  std::vector<size_t> budgets_;  // [heads], or empty
};

}  // namespace lesskv
