// How resident tokens are stored. A codec is immutable and shared; it makes one store a sequence.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "kvcache/cache_shape.h"
#include "kvcache/codec/kv_store.h"

namespace lesskv {

// What the cache must know of a codec before it combines it with other methods.
struct CodecTraits {
  // Rows leave only in groups of so many neighbours along the slots, chosen by the sum of their votes; 1: each by
  // itself. A head then keeps up to group_rows - 1 rows less than its budget.
  size_t group_rows = 1;
  // Rows at the end that never leave: at most so many, and at most half the budget rounded down to the group.
  size_t window_rows = 0;
  // Rows of a head that lie apart from the others: budgets that are divided at a prompt's end leave each head so many,
  // or its layer's mean where that is less.
  size_t apart_rows = 0;
  bool grows = false;           // rows pile up while decoding: not for selectors that bound them
  bool gives_full_keys = true;  // ReadRows gives keys with all their channels
  bool rewrites_rows = true;    // a row can be changed after it was written (Fate::kMerge)
  bool unrotated_keys = false;  // keys are kept unrotated whatever the selector wants, and rotated when read
};

// The layers that a store serves, and how.
struct StoreShape {
  std::vector<LayerShape> layers;
  ComputeType compute = ComputeType::kF32;
  bool unrotated_keys = false;  // keys come unrotated, and queries with read positions
  bool grows = false;           // no bound on the rows of a head while decoding
  bool packs = false;           // budgets differ between heads: they share memory of exactly so many rows
  bool exact_growth = false;    // room for the rows that stay is made when they are known (StepRoom::budgets_later)
  bool keeps_all = false;       // nothing ever leaves: what is full does not change, and clones share it
};

struct RowTypes;  // row_store.h

class Codec {
 public:
  virtual ~Codec() = default;
  virtual CodecTraits traits() const { return {}; }
  virtual std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const = 0;

  // Where each row lies by itself, in a RowStore: how. Null: not so.
  virtual const RowTypes* row_types() const { return nullptr; }
  // As what a text's first prompt, in one step, is attended: rows of these types in a RowStore. Null: in some other way.
  virtual const RowTypes* first_prompt_types() const { return row_types(); }

  // The trained artefact it reads: its fingerprint (empty: none) and bytes, shared by all sequences.
  virtual std::string artefact() const { return {}; }
  virtual size_t ArtefactBytes() const { return 0; }
};

}  // namespace lesskv
