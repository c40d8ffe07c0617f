// A store whose newest rows are whole: a window in front of a RowStore that holds the older rows in a cheaper form.
//
// A KV head's rows, in the order in which attention meets them: old rows, in the RowStore; then the window, the newest
// rows in the order of the text, in a ring. A step's own rows wait in a staging area, as whole rows, so that its queries
// meet them exactly. When the layer is closed what the window has no room for moves on into the old rows, where it is
// coded once. Rows are coded alike whatever the steps they came in.
//
// Where a later prompt gives a head a smaller budget and its window is short of rows, old rows go back there as what they
// decode to. Old rows that are transformed (hadamard.h) meet whole ones that are: one query serves both.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kvcache/codec/codec.h"
#include "kvcache/codec/exact_rows.h"
#include "kvcache/codec/row_store.h"

namespace lesskv {

struct WindowOptions {
  size_t window = 64;             // whole rows of a head, at least 1
  bool generated_piles_up = false;  // rows move on at a prompt's end only
};

struct WindowFormats {
  RowType keys = RowType::kF16, values = RowType::kF16;
};
// f16 for rows of 8 and 4 bits, else the rows' own types.
WindowFormats WholeRows(const RowTypes& types);

class WindowStore : public KvStore {
 public:
  // old, key_dims: those of the RowStore.
  WindowStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& old, std::vector<size_t> key_dims,
              const WindowFormats& whole, const WindowOptions& options);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void AddShareable(std::vector<SharedPart>& parts) const override { old_->AddShareable(parts); }
  void Reserve(const StepRoom& room) override;
  void SetBudgets(size_t first_layer, std::span<const size_t> budgets) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void AddJobs(const StoreQuery& query, JobList& list) const override;
  void Finish(const StoreQuery& query) const override;
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

 protected:
  // What becomes of a head's rows when its step is closed.
  struct Cut {
    std::vector<Departure> old_leaving;  // rows of old_, those that go back to the window among them
    std::vector<uint32_t> back;          // rows of old_ that go back
    std::vector<uint32_t> whole;         // kept whole rows in the order of the text, counted from the ring's first
    size_t entering = 0;                 // of them, the first so many become old
    size_t n_rows = 0;
  };
  // A whole row, counted from the ring's first; those behind the ring are the step's own.
  struct Place {
    const ExactRows* rows;
    size_t slot;
  };

  // For stores whose old rows are more than another type of row. Own state: made room for in Reserve, freed where a step that
  // was taken back had been the first, looked at after each step; saved for each head before its whole rows.
  virtual std::unique_ptr<WindowStore> MakeEmpty(ByteCounter& counter) const;
  virtual void ReserveOwn() {}
  virtual void FreeOwn() {}
  virtual void EndOwn() {}
  virtual void SaveOwn(size_t /*head*/, ByteWriter&) const {}
  virtual void LoadOwn(size_t /*head*/, ByteReader&) {}
  virtual void CheckLoaded() {}
  // Before rows of a head become old, or leave where they would have; from several threads for different heads.
  virtual void BeforeRowsEnter(size_t /*layer*/, size_t /*kv_head*/, const Cut&) {}
  virtual void WriteOld(size_t layer, size_t kv_head, const Place& from, std::byte* keys, std::byte* values, size_t slot) const;
  virtual void ReadOld(size_t layer, size_t kv_head, uint32_t row, float* key, float* value) const;
  virtual void MarkOldSpans(size_t /*layer*/, size_t /*kv_head*/, std::span<RowSpan> /*keys*/) const {}

  const LayerShape& Layer(size_t layer) const { return shape_.layers[layer]; }
  const HeadTable& table() const { return table_; }
  const RowStore& old() const { return *old_; }
  const StoreShape& shape() const { return shape_; }
  ByteCounter& counter() const { return *counter_; }
  size_t n_step() const { return n_step_; }
  size_t OldRows(size_t head) const;
  Place Find(size_t layer, size_t kv_head, size_t whole) const;
  void ReadWholeKey(size_t layer, const Place& at, float* key) const;  // as it is stored

 private:
  struct Head {
    ExactRows ring;
    size_t first = 0, n = 0;                     // the oldest row's slot in the ring, and how many there are
    size_t window = 0;                           // rows that stay whole in the step in progress
    size_t bounded_window = 0;                   // in steps that evict; 0: not known yet
    size_t ring_before = 0, bounded_before = 0;  // what CancelStep goes back to
  };

  const ExactFormats& FormatsOf(size_t head) const { return formats_[table_.LayerOf(head)]; }
  bool MovesOn() const { return is_prompt_ || !options_.generated_piles_up; }
  size_t RingRows(const Head& head, size_t needed) const;
  void ResizeRing(size_t i, size_t rows);
  void FindWindows(const StepRoom& room);
  std::vector<size_t> OldBudgets(std::span<const size_t> budgets) const;
  void ReserveOld(const StepRoom& room);
  Cut PlanCut(size_t layer, size_t kv_head, std::span<const Departure> leaving) const;
  SlotMap MoveOn(size_t layer, size_t kv_head, const Cut& cut);
  void KeepWhole(size_t layer, size_t kv_head, const Cut& cut, std::span<const float> back);
  AttentionJob Job(const StoreQuery& query, size_t kv_head, JobList& list) const;
  void SaveWhole(size_t head, ByteWriter& out) const;
  void LoadWhole(size_t head, ByteReader& in);

  ByteCounter* counter_;
  StoreShape shape_;
  WindowOptions options_;
  HeadTable table_;
  std::vector<ExactFormats> formats_;  // [n_layers], of whole rows
  std::unique_ptr<RowStore> old_;
  std::vector<Head> heads_;         // [heads]
  StagingArea staging_;
  bool begun_ = false, begun_before_ = false;  // a step has been
  // The step in progress.
  size_t n_step_ = 0;
  bool evicts_ = false, is_prompt_ = false;
  std::vector<size_t> budgets_, budgets_before_;  // [heads], or empty
};

}  // namespace lesskv
