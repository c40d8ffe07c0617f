#include "kvcache/codec/think_store.h"

#include <algorithm>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {
namespace {

std::vector<size_t> KeyDims(const StoreShape& shape, const RowTypes& types, double ratio) {
  std::vector<size_t> dims;
  for (const LayerShape& layer : shape.layers) dims.push_back(KeptChannels(ratio, layer.head_dim, ChannelUnit(types.keys)));
  return dims;
}

}  // namespace

ThinkStore::ThinkStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types,
                       const ThinkOptions& options)
    : WindowStore(counter, shape, types, KeyDims(shape, types, options.ratio), {types.keys, types.values},
                  {options.window, options.generated_full}),
      types_(types),
      options_(options),
      sets_(shape.layers, KeyDims(shape, types, options.ratio)) {
  CHECK(!types.rotate);
}

std::unique_ptr<WindowStore> ThinkStore::MakeEmpty(ByteCounter& counter) const {
  return std::make_unique<ThinkStore>(counter, shape(), types_, options_);
}

std::unique_ptr<KvStore> ThinkStore::Clone(ByteCounter& counter) const {
  std::unique_ptr<KvStore> copy = WindowStore::Clone(counter);
  auto& own = static_cast<ThinkStore&>(*copy);
  own.sets_ = sets_.Clone(counter);
  return copy;
}

void ThinkStore::Observe(const StoreQuery& query) { sets_.Observe(Layer(query.layer), n_step(), query); }

void ThinkStore::BeforeRowsEnter(size_t layer, size_t kv_head, const Cut& cut) {
  const size_t head = table()(layer, kv_head);
  if (sets_.chosen(head)) return;
  sets_.Choose(head, cut.whole.size(),
               [&](size_t i, float* key) { ReadWholeKey(layer, Find(layer, kv_head, cut.whole[i]), key); });
}

void ThinkStore::WriteOld(size_t layer, size_t kv_head, const Place& from, std::byte* keys, std::byte* values,
                          size_t slot) const {
  const size_t d = Layer(layer).head_dim;
  const ExactFormats f(types_.keys, types_.values, d);
  CopyChannels(f.keys, from.rows->Region(f, RowSide::kKeys), from.slot, kept_channels(layer, kv_head).data(),
               old().key_format(layer), keys, slot);
  CopyRow(f.values, from.rows->Region(f, RowSide::kValues), from.slot, values, slot);
}

// The kept channels, with zeros in place of the others.
void ThinkStore::ReadOld(size_t layer, size_t kv_head, uint32_t row, float* key, float* value) const {
  std::vector<float> some(old().key_format(layer).head_dim);
  old().ReadRows(layer, kv_head, {&row, 1}, some.data(), value);
  const uint16_t* channels = kept_channels(layer, kv_head).data();
  std::fill_n(key, Layer(layer).head_dim, 0.0f);
  for (size_t c = 0; c < some.size(); ++c) key[channels[c]] = some[c];
}

void ThinkStore::MarkOldSpans(size_t layer, size_t kv_head, std::span<RowSpan> keys) const {
  for (RowSpan& span : keys) span.channels = kept_channels(layer, kv_head).data();
}

// ---- Saved state

void ThinkStore::SaveOwn(size_t head, ByteWriter& out) const { sets_.Save(head, out); }

void ThinkStore::LoadOwn(size_t head, ByteReader& in) { sets_.Load(head, in); }

void ThinkStore::CheckLoaded() {
  for (size_t head = 0; head < table().size(); ++head)
    if (OldRows(head) > 0 && !sets_.chosen(head))
      Fail(ErrorCode::kBadFile, "saved cache: a head has old rows, but its channels were not chosen");
  EndOwn();
}

}  // namespace lesskv
