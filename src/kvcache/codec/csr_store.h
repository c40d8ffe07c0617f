// The store of CSR (Cache Sparse Representation, arXiv 2412.11741): each key before rotation, and each half of a value,
// is the sum of a few atoms of a trained dictionary, kept as (index, coefficient) pairs (atom_codes.h): 8 * pairs bytes a
// row (6 with 8-bit coefficients), whatever the head size, each row for itself. `window` most recent rows of a head may
// stay exact, in f16.
//
// A step's own rows wait in a staging area, so that its queries meet them exactly; they are coded when the next layer
// begins or the step ends, all threads at once, and only those that stay. Rows that leave make room for others: coded
// rows as in PlanCompaction, exact ones in the order they came.
//
// Online atoms (section 5 of the paper), a head's own:
//   sample   the last vectors of the sequence's first step, of length 1; taken before anything is coded
//   guard    vectors that are coded badly, of length 1: at the end of the first step the worst ones for three quarters
//            of the places, later each one whose residual is above half its length, while places remain
// Atoms never change or move, so that codes stay valid. Where both are 0, codes do not depend on steps or order.
//
// In memory: for blocks of kCsrBlockRows rows (heads that grow) or a head's budget, indices and coefficients of keys, then
// of values, [rows, pairs] each; atoms as f16 rows.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/rows/atom_codes.h"
#include "kvcache/codec/codec.h"
#include "kvcache/codec/exact_rows.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/memory.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {

inline constexpr size_t kCsrBlockRows = 128;

struct CsrOptions {
  size_t pairs = 8;   // of a key, and of the chunks of a value together: a multiple of their number
  size_t window = 0;  // exact rows
  size_t sample = 0, guard = 0;  // atoms of keys, and of value chunks, a head
  CoefficientType coefficients = CoefficientType::kF16;

  // The exact rows of a head that may keep `budget` rows.
  size_t Window(size_t budget) const { return std::min(window, budget / 2); }
  size_t own() const { return sample + guard; }
};

// The first n_atoms of a sidecar's dictionaries, as encoding and decoding read them; shared by all sequences.
class CsrDictionaries {
 public:
  CsrDictionaries(const SidecarDictionaries& from, size_t n_atoms);

  size_t n_layers() const { return key_of_.size(); }
  size_t n_atoms() const { return n_atoms_; }
  size_t Bytes() const;
  Atoms Keys(size_t layer) const { return View(keys_[key_of_[layer]], head_dim_); }
  Atoms Values(size_t layer) const {
    return View(values_[value_of_[layer]], head_dim_ / SidecarDictionaries::kValueChunks);
  }

 private:
  struct Dictionary {
    std::vector<uint16_t> rows, lanes;
  };
  Atoms View(const Dictionary& d, size_t dim) const { return {dim, {d.rows.data(), d.lanes.data(), n_atoms_}, {}}; }

  size_t head_dim_, n_atoms_;
  std::vector<uint32_t> key_of_, value_of_;
  std::vector<Dictionary> keys_, values_;
};

class CsrStore final : public KvStore {
 public:
  CsrStore(ByteCounter& counter, const StoreShape& shape, const CsrOptions& options,
           std::shared_ptr<const CsrDictionaries> dictionaries);

  std::unique_ptr<KvStore> Clone(ByteCounter& counter) const override;
  void AddShareable(std::vector<SharedPart>& parts) const override;
  void Reserve(const StepRoom& room) override;
  void SetBudgets(size_t first_layer, std::span<const size_t> budgets) override;
  void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) override;
  void AddJobs(const StoreQuery& query, JobList& list) const override;
  void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                float* values) const override;
  SlotMap Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) override;
  void EndStep() override;
  void CancelStep() override;
  size_t n_rows(size_t layer, size_t kv_head) const override { return At(layer, kv_head).n_rows(); }
  size_t SlackBytes(std::span<const size_t> budgets) const override;
  void Save(ByteWriter& out) const override;
  void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) override;

  // Rows of a head that are coded: those in its first slots. Between steps.
  size_t coded_rows(size_t layer, size_t kv_head) const { return At(layer, kv_head).n_coded; }
  // Atoms of a head's own in use, of keys and of values.
  size_t own_atoms(size_t layer, size_t kv_head, RowSide side) const { return At(layer, kv_head).Of(side).n_own; }
  std::span<const uint16_t> Indices(size_t layer, size_t kv_head, RowSide side, size_t row) const;

 private:
  // Keys or values of a layer: a row is n_chunks vectors of atoms.dim channels with `pairs` pairs each.
  struct Coding {
    Atoms atoms;  // those of all sequences
    size_t n_chunks = 1, pairs = 0;
  };
  struct Formats {  // of one layer
    ExactFormats exact;
    Coding keys, values;
    CoefficientType coefficients = CoefficientType::kF16;
    const Coding& Of(RowSide side) const { return side == RowSide::kKeys ? keys : values; }
    size_t RowPairs() const { return keys.pairs; }
    size_t CoefficientBytes() const { return RowPairs() * (coefficients == CoefficientType::kF16 ? sizeof(uint16_t) : 1); }
    size_t SideBytes() const { return RowPairs() * sizeof(uint16_t) + CoefficientBytes(); }  // of a row's keys, or values
    size_t RowBytes() const { return 2 * SideBytes(); }
  };
  // A head's own atoms: the first n_sampled the sample, then the guard.
  struct Own {
    CountedBuffer memory;
    size_t n_own = 0, n_sampled = 0;
  };
  // What Close leaves to be coded. Rows as before the step was closed, those behind the coded ones that stay.
  struct Open {
    size_t was_coded = 0, was_exact = 0;
    bool first_step = false;
    std::vector<uint32_t> rows;
    std::vector<uint32_t> slots;  // of the first ones, which are coded
    std::vector<float> residuals[2];  // keys, values: [slots, chunks]; only with a guard
  };
  struct Codes {
    uint16_t* indices;
    std::byte* coefficients;  // as their type has it
  };
  struct Head final : RowReader {
    const Formats* formats = nullptr;
    std::vector<CountedBuffer> blocks;
    size_t block_rows = 0;
    size_t n_coded = 0, n_exact = 0;
    ExactRows window;        // a ring
    size_t first_exact = 0;  // slot of its oldest row
    Own keys, values;
    size_t rows_before = 0, window_before = 0;  // what CancelStep goes back to

    size_t n_rows() const { return n_coded + n_exact; }
    size_t Capacity() const { return blocks.size() * block_rows; }
    const Own& Of(RowSide side) const { return side == RowSide::kKeys ? keys : values; }
    Own& Of(RowSide side) { return side == RowSide::kKeys ? keys : values; }
    Atoms AllAtoms(RowSide side) const;
    Codes At(RowSide side, size_t row) const;
    void Decode(RowSide side, size_t first, size_t n, float* out, size_t stride) const;

    void ExpandKeys(size_t first, size_t n, float* out, size_t stride) const override;
    void ExpandValues(size_t first, size_t n, float* out, size_t stride) const override;
  };

  const LayerShape& Layer(size_t layer) const { return shape_.layers[layer]; }
  Head& At(size_t layer, size_t kv_head) { return heads_[table_(layer, kv_head)]; }
  const Head& At(size_t layer, size_t kv_head) const { return heads_[table_(layer, kv_head)]; }
  // A head's first blocks that are full, where rows stay.
  size_t SettledBlocks(const Head& head) const {
    return shape_.keeps_all && head.block_rows > 0 ? head.n_coded / head.block_rows : 0;
  }
  const ExactRows& Staging(size_t kv_head) const { return staging_.At(0, kv_head); }  // of any layer: no step defers
  size_t WindowOf(size_t head) const { return budgets_.empty() ? options_.window : options_.Window(budgets_[head]); }
  void ResizeWindow(Head& head, size_t rows);
  void ResizeArena(Head& head, size_t rows);
  void Grow(Head& head, size_t rows);
  void Trim(Head& head);
  void ReserveHead(size_t i, const StepRoom& room);
  void ReserveOwn(Head& head);
  AttentionJob Job(const StoreQuery& query, size_t kv_head, JobList& list) const;
  // A row that is not coded, by its index among those: in the window, or the step's own. n_exact: how many are not the step's.
  void ReadExact(const Head& head, size_t kv_head, RowSide side, size_t n_exact, size_t row, float* out) const;

  void CodeLayer();
  void TakeSample(Head& head, size_t kv_head);
  void CodeRows(Head& head, size_t kv_head, size_t first, size_t n);
  void CodeAgain(Head& head, size_t kv_head, RowSide side, size_t at);
  void FillGuard(Head& head, size_t kv_head);
  void KeepExact(Head& head, size_t kv_head);
  // Whether there was room and the vector has a direction.
  bool AddAtom(Head& head, RowSide side, const float* x) const;

  void LoadHead(size_t i, ByteReader& in, size_t most_rows, bool begun);
  void LoadCodes(Head& head, RowSide side, ByteReader& in) const;
  void LoadOwn(Head& head, RowSide side, ByteReader& in) const;

  ByteCounter* counter_;
  StoreShape shape_;
  CsrOptions options_;
  std::shared_ptr<const CsrDictionaries> dictionaries_;
  HeadTable table_;
  std::vector<Formats> formats_;  // [n_layers]
  std::vector<Head> heads_;    // [heads]
  StagingArea staging_;
  // The step in progress.
  size_t n_step_ = 0;
  bool evicts_ = false, is_prompt_ = false;
  // The layer that was appended to, whose rows wait to be coded once it is closed, and what is known of its heads.
  bool has_open_ = false;
  size_t open_layer_ = 0;
  std::vector<Open> open_;  // [its KV heads]
  std::vector<size_t> budgets_;  // [heads], or empty
};

}  // namespace lesskv
