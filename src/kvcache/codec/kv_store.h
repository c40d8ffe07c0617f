// Where the exact keys and values of one sequence live: some layers, all their KV heads. A codec is a kind of store.
//
// Rows of a (layer, KV head) are indexed as attention sees them in a step: the resident rows first, in slot order, then
// the step's own rows in the order of their tokens. When a layer has been attended it is closed, whatever the spec:
// the cache says which rows depart and how, the store puts the others in order as suits its layout (and may encode),
// and hands back the slot map that positions and scores then follow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/attention/attention.h"
#include "kvcache/bytes.h"
#include "kvcache/kv_cache.h"
#include "kvcache/memory.h"

namespace lesskv {

// What becomes of a row that leaves: it is forgotten, folded into a residual state (the cache has read it by then),
// averaged into a row that stays, or moved to where it can be recalled.
enum class Fate : uint8_t { kDrop, kAbsorb, kMerge, kOffload };
inline constexpr size_t kFates = 4;

struct Departure {
  uint32_t row = 0;  // index before
  Fate fate = Fate::kDrop;
  // kMerge: the row that stays, and how much of the merged row is the departing one's:
  // target <- target * (1 - sum of shares) + sum of share * departing row.
  uint32_t target = 0;
  float share = 0;
};

struct RowMove {
  uint32_t from;  // row index before
  uint32_t to;    // slot after
};

// Where the rows are after a layer was closed: slots [0, n_rows) are in use. Rows that are in no move and do not depart
// stay where they are.
struct SlotMap {
  size_t n_rows = 0;
  std::vector<RowMove> moves;
  // Moves one after the other, each to a slot that is free by then; or all at once (any permutation).
  bool at_once = false;
};

// The usual map: newcomers take the slots of rows that leave; if there are fewer newcomers than holes, the last rows
// fill the rest, so that slots stay dense. leaving: row indices, ascending.
SlotMap PlanCompaction(size_t n_resident, size_t n_step, std::span<const Departure> leaving);

// What a step needs room for.
struct StepRoom {
  size_t n_step = 0;
  bool evicts = false;     // rows may leave when a layer is closed
  bool is_prompt = false;  // the step's own rows are freed at its end
  // All layers stay open to the step's end: each needs a staging area of its own.
  bool defers = false;
  // Rows that stay at most, a head; empty when nothing leaves in any step. Where budgets are decided during the step
  // SetBudgets says them before a layer is closed: of all layers together where the step defers, else a layer at a
  // time, whose sum is then that of these (StoreShape::exact_growth: at most these).
  std::span<const size_t> budgets;
  bool budgets_later = false;
};

// Queries of one layer against resident rows and the step's rows up to the last query.
struct StoreQuery {
  size_t layer = 0;
  const float* queries = nullptr;  // [n_queries, n_heads, head_dim], rotated by the caller
  size_t first_query = 0;          // index within the step of the first query
  size_t n_queries = 0;
  // Where keys are kept unrotated: for each KV head the position at which each resident and step row is read.
  std::span<const int32_t* const> read_positions = {};
  float* out = nullptr;  // [n_queries, n_heads, head_dim]
  float* lse = nullptr;  // [n_kv_heads][n_queries, group]
};

// Attention jobs of a step's queries, of one store or of many, and the memory they point to until Clear.
class JobList {
 public:
  std::vector<AttentionJob> jobs;

  // Lists that live until Clear; their elements do not move when other lists are made.
  std::vector<RowSpan>& NewSpans();
  std::vector<float>& NewFloats();
  std::vector<int32_t>& NewInts();
  void Clear();

 private:
  std::vector<std::unique_ptr<std::vector<RowSpan>>> spans_;
  std::vector<std::unique_ptr<std::vector<float>>> floats_;
  std::vector<std::unique_ptr<std::vector<int32_t>>> ints_;
  size_t n_spans_ = 0, n_floats_ = 0, n_ints_ = 0;
};

// What queries read of a store that recalls some rows a query, since the sequence began; all 0 for others.
struct RecallStats {
  uint64_t queries = 0;     // query heads of single tokens, in layers where they chose
  uint64_t rows_read = 0;   // rows that they attended
  uint64_t rows_recalled = 0, rows_cached = 0;  // of offloaded rows that they chose: all, and those found in memory
  uint64_t bytes_read = 0;  // of the others, from where they are
  uint64_t rows_offloaded = 0;                  // now, of all heads
  uint64_t file_bytes = 0;                      // now
};

// Rows that a head of bounded rows has memory for while it holds, or is to hold, n of at most `budget`: a text shorter than
// the budget does not take the budget's memory. In blocks of 128, or of an eighth where it is large, as it has to be
// copied to grow.
size_t RowsAhead(size_t n, size_t budget);

class KvStore {
 public:
  virtual ~KvStore() = default;
  // May hold memory together with this one: such as neither will write to (CountedBuffer::Share).
  virtual std::unique_ptr<KvStore> Clone(ByteCounter& counter) const = 0;
  // Adds the memory that clones made now would share.
  virtual void AddShareable(std::vector<SharedPart>& /*parts*/) const {}

  // Makes room for a step in every layer. Throws Error(kOutOfMemory) without having changed any row.
  virtual void Reserve(const StepRoom& room) = 0;
  // budgets_later: the rows that may stay in each KV head of a layer, or (defers) of this layer and all behind it; makes
  // room for them. Throws Error(kOutOfMemory).
  virtual void SetBudgets(size_t first_layer, std::span<const size_t> budgets) = 0;

  // The step's rows of tokens [first, first + n) of a layer: keys, values [n, n_kv_heads, head_dim]; keys rotated to
  // their positions, or as they came where the store was made for unrotated ones.
  virtual void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) = 0;

  // Adds one job a KV head (scores, softmax and values are the kernels' work; a store of another layout gives spans
  // with a RowReader). What has been attended then passes through Finish, once.
  virtual void AddJobs(const StoreQuery& query, JobList& list) const = 0;
  virtual void Finish(const StoreQuery&) const {}
  // For stores that learn from queries: those of the step, in order, after they were attended (before Finish) and before
  // their layer is closed.
  virtual void Observe(const StoreQuery&) {}

  // Rows of one KV head, decoded: keys, values [rows.size(), head_dim], in the space they were appended in.
  virtual void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                        float* values) const = 0;

  // Replaces the values of rows that stay, values [rows.size(), head_dim], between the step's attention and its Close; only
  // where the codec rewrites rows. From several threads for different heads.
  virtual void RewriteValues(size_t layer, size_t kv_head, std::span<const uint32_t> rows, const float* values);

  // Closes one KV head's step in a layer: the rows of `leaving` (ascending by row) depart, the others stay. Called once
  // a step for every head of every layer, from several threads for different heads. Throws only what allocation throws.
  virtual SlotMap Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) = 0;
  virtual void EndStep() = 0;
  // Takes back a Reserve before anything was appended: room that no resident row needs is freed.
  virtual void CancelStep() = 0;

  virtual size_t n_rows(size_t layer, size_t kv_head) const = 0;
  // Bytes of rows that are allocated between steps and that neither a resident row nor a budget needs: what rounding to
  // tiles and blocks costs. `budgets` as in StepRoom.
  virtual size_t SlackBytes(std::span<const size_t> /*budgets*/) const { return 0; }
  // For codecs whose rows leave in groups (CodecTraits::group_rows), in a step that has been attended: the first so many
  // rows, a multiple of the group, may leave, each with its whole group; those behind them stay for now.
  virtual size_t GroupedRows(size_t layer, size_t kv_head) const { return n_rows(layer, kv_head); }

  virtual RecallStats recall() const { return {}; }

  // Resident rows, slot order included. Load into a fresh store; `budgets` as in StepRoom.
  virtual void Save(ByteWriter& out) const = 0;
  virtual void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) = 0;
};

}  // namespace lesskv
