// Where the exact keys and values of one sequence live: all layers, all KV heads. A codec is a kind of store.
//
// Rows of a (layer, KV head) are indexed as attention sees them in a step: the resident rows first, in slot order, then
// the step's own rows in the order of their tokens. After the layer's attention a Compaction says which rows stay and
// where; the ledger (positions, scores) follows the same one, so that slots mean the same in both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvcache/bytes.h"
#include "kvcache/kv_cache.h"
#include "kvcache/memory.h"

namespace lesskv {

struct RowMove {
  uint32_t from;  // row index before
  uint32_t to;    // slot after
};

// What becomes of n_resident + n_step rows when some leave: `moves` in the order to be carried out, each to a slot that
// is free by then; rows not mentioned and not victims stay where they are. Newcomers take the victims' slots; if there
// are fewer newcomers than holes, the last rows fill the rest, so that slots [0, n_rows) are always dense.
struct Compaction {
  size_t n_rows = 0;
  std::vector<RowMove> moves;
};

// victims: row indices, ascending.
Compaction PlanCompaction(size_t n_resident, size_t n_step, std::span<const uint32_t> victims);

// What a step needs room for.
struct StepRoom {
  size_t n_step = 0;
  bool evicts = false;             // rows may leave after each layer
  bool is_prompt = false;          // the step's own rows are freed at its end
  std::span<const size_t> budgets;  // [n_layers * n_kv_heads] rows that stay at most; empty when nothing ever leaves
};

// Queries of one layer against resident rows and the step's rows up to the last query.
struct StoreQuery {
  size_t layer = 0;
  const float* queries = nullptr;  // [n_queries, n_heads, head_dim]; rotated unless read_positions is given
  size_t first_query = 0;          // index within the step of the first query
  size_t n_queries = 0;
  // For stores of unrotated keys: the read position of each resident and step row [n_resident + n_step]. Queries are
  // rotated by the caller.
  const int32_t* read_positions = nullptr;
  float* out = nullptr;  // [n_queries, n_heads, head_dim]
  float* lse = nullptr;  // [n_heads, n_queries]: grouped by KV head as [n_kv_heads][n_queries, group]
  // Optional, n_queries == 1: receives for each KV head the attention its rows received, summed over the group,
  // [n_resident + n_step]. Empty: not wanted.
  std::span<float* const> received = {};
};

class KvStore {
 public:
  virtual ~KvStore() = default;
  virtual std::unique_ptr<KvStore> Clone(ByteCounter& counter) const = 0;

  // Makes room for a step in every layer. Throws Error(kOutOfMemory) without having changed any row.
  virtual void Reserve(const StepRoom& room) = 0;

  // The step's rows of tokens [first, first + n) of a layer: keys, values [n, n_kv_heads, head_dim].
  virtual void Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) = 0;
  virtual void Attend(const StoreQuery& query) const = 0;
  // Attention received from those queries of `query`, which Attend has just answered, whose index in it is `first` or
  // more, summed over the group: added to sums, for each KV head [n_resident + n_step]. A query of the whole step
  // overwrites them.
  virtual void AddColumnSums(const StoreQuery& query, size_t first, std::span<float* const> sums) const = 0;

  // Rows of one KV head as stored, decoded: keys, values [rows.size(), head_dim].
  virtual void ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                        float* values) const = 0;
  // Carries out a compaction of one KV head; called once a step for each, from several threads for different heads.
  virtual void Commit(size_t layer, size_t kv_head, const Compaction& compaction) = 0;
  virtual void EndStep() = 0;
  // Takes back a Reserve: room that no resident row needs is freed.
  virtual void CancelStep() = 0;

  virtual size_t n_rows(size_t layer, size_t kv_head) const = 0;

  // Resident rows, slot order included. Load into a fresh store; `budgets` as in StepRoom.
  virtual void Save(ByteWriter& out) const = 0;
  virtual void Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) = 0;
};

}  // namespace lesskv
