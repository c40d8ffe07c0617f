// f16 rows, each by itself: how codecs of old rows keep local layers, whose window they would take rows of.
#pragma once

#include <memory>

#include "kvcache/codec/codec.h"
#include "kvcache/codec/row_store.h"

namespace lesskv {

class ExactCodec final : public Codec {
 public:
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<RowStore>(counter, shape, RowTypes{});
  }
};

}  // namespace lesskv
