// The newest rows whole, older ones as the codec stores them. What a query needs most precisely is near it: rows of 4
// bits lose a fifth as much behind 32 whole ones. As KIVI's window (arXiv 2402.02750), for rows that lie by themselves.
#include "base/check.h"
#include "kvcache/codec/window_store.h"
#include "kvcache/registry.h"

namespace lesskv {
namespace {

class RecentCodec final : public Codec {
 public:
  RecentCodec(const RowTypes& types, size_t window) : types_(types), window_(window) {}
  CodecTraits traits() const override { return {.apart_rows = window_, .rewrites_rows = false}; }
  std::unique_ptr<KvStore> MakeStore(ByteCounter& counter, const StoreShape& shape) const override {
    return std::make_unique<WindowStore>(counter, shape, types_, std::vector<size_t>{}, WholeRows(types_),
                                         WindowOptions{.window = window_});
  }

 private:
  RowTypes types_;
  size_t window_;
};

std::unique_ptr<const Codec> Make(const Arguments& a, const MethodContext&, std::unique_ptr<const Codec> inner) {
  const RowTypes* types = inner->row_types();
  CHECK(types != nullptr, "a codec whose rows can be moved says how they are stored");
  const WindowFormats whole = WholeRows(*types);
  if (whole.keys == types->keys && whole.values == types->values) return inner;  // all rows are whole already
  return std::make_unique<RecentCodec>(*types, a.Count("rows"));
}

constexpr Parameter kParameters[] = {
    {.name = "rows",
     .kind = Parameter::Kind::kCount,
     .default_value = "32",
     .help = "newest rows of a head that are kept in f16 where the codec's are of fewer bits",
     .min = 1,
     .max = 65536,
     .positional = true},
};

}  // namespace

extern const Method kRecentMethod{
    .name = "recent",
    .stage = Stage::kWrap,
    .summary = "the newest rows are kept in f16, older ones as the codec stores them",
    .reference = "arXiv 2402.02750",
    .parameters = kParameters,
    .traits = [](const Arguments&) { return MethodTraits{.rewrites_rows = false, .fixes_rotation = true, .moves_rows = true}; },
    .make_wrapper = Make,
    .example = "recent",
};

}  // namespace lesskv
