#include "kvcache/codec/think_store.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {
namespace {

std::vector<size_t> KeyDims(const StoreShape& shape, const RowTypes& types, double ratio) {
  std::vector<size_t> dims;
  for (const LayerShape& layer : shape.layers) dims.push_back(KeptChannels(ratio, layer.head_dim, types.keys));
  return dims;
}

}  // namespace

size_t KeptChannels(double ratio, size_t head_dim, RowType keys) {
  // The small term keeps whole products whole.
  size_t kept = head_dim - static_cast<size_t>(std::floor(ratio * static_cast<double>(head_dim) + 1e-9));
  while (kept < head_dim && !Supports(keys, kept)) ++kept;
  return kept;
}

std::vector<uint16_t> ChooseChannels(std::span<const double> scores, size_t n) {
  std::vector<uint16_t> channels(scores.size());
  std::iota(channels.begin(), channels.end(), uint16_t{0});
  const auto score = [&](uint16_t c) { return std::isnan(scores[c]) ? -1 : scores[c]; };
  std::sort(channels.begin(), channels.end(),
            [&](uint16_t a, uint16_t b) { return score(a) != score(b) ? score(a) > score(b) : a > b; });
  channels.resize(n);
  std::sort(channels.begin(), channels.end());
  return channels;
}

ThinkStore::ThinkStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types,
                       const ThinkOptions& options)
    : WindowStore(counter, shape, types, KeyDims(shape, types, options.ratio), {types.keys, types.values},
                  {options.window, options.generated_full}),
      types_(types),
      options_(options),
      choices_(table().size()) {
  CHECK(!types.rotate);
  for (size_t i = 1; i < choices_.size(); ++i) {
    const size_t before = table().LayerOf(i - 1);
    choices_[i].scores_at = choices_[i - 1].scores_at + Layer(before).head_dim;
    choices_[i].channels_at = choices_[i - 1].channels_at + old().key_format(before).head_dim;
  }
}

std::unique_ptr<WindowStore> ThinkStore::MakeEmpty(ByteCounter& counter) const {
  return std::make_unique<ThinkStore>(counter, shape(), types_, options_);
}

std::unique_ptr<KvStore> ThinkStore::Clone(ByteCounter& counter) const {
  std::unique_ptr<KvStore> copy = WindowStore::Clone(counter);
  auto& own = static_cast<ThinkStore&>(*copy);
  own.channels_ = channels_.Clone(counter);
  own.sums_ = sums_.Clone(counter);
  own.choices_ = choices_;
  return copy;
}

std::span<const uint16_t> ThinkStore::kept_channels(size_t layer, size_t kv_head) const {
  const Choice& choice = choices_[table()(layer, kv_head)];
  if (!choice.made || counter().only_counts) return {};
  return {Channels(choice), old().key_format(layer).head_dim};
}

bool ThinkStore::AllMade() const {
  return std::all_of(choices_.begin(), choices_.end(), [](const Choice& choice) { return choice.made; });
}

void ThinkStore::ReserveOwn() {
  if (choices_.empty()) return;
  const size_t last = choices_.size() - 1, layer = table().LayerOf(last);
  if (channels_.size() == 0) {
    const size_t n = choices_[last].channels_at + old().key_format(layer).head_dim;
    channels_ = CountedBuffer(counter(), n * sizeof(uint16_t));
  }
  if (!AllMade() && sums_.size() == 0)
    sums_ = CountedBuffer(counter(), (choices_[last].scores_at + Layer(layer).head_dim) * sizeof(double));
}

void ThinkStore::FreeOwn() { channels_ = CountedBuffer(), sums_ = CountedBuffer(); }

void ThinkStore::EndOwn() {
  if (AllMade()) sums_ = CountedBuffer();
}

void ThinkStore::Observe(const StoreQuery& query) {
  const LayerShape& layer = Layer(query.layer);
  const size_t d = layer.head_dim, first = n_step() - std::min(n_step(), kThinkQueries);
  const size_t begin = std::max(query.first_query, first), end = query.first_query + query.n_queries;
  for (size_t h = 0; h < layer.n_kv_heads && begin < end; ++h) {
    const Choice& choice = choices_[table()(query.layer, h)];
    if (choice.made) continue;
    double* sums = Sums(choice);
    if (n_step() >= kThinkQueries && begin == first) std::fill_n(sums, d, 0.0);
    for (size_t m = begin; m < end; ++m) {
      const float* q = query.queries + (m - query.first_query) * layer.q_dim() + h * layer.group() * d;
      for (size_t i = 0; i < layer.group() * d; ++i) sums[i % d] += static_cast<double>(q[i]) * q[i];
    }
  }
}

void ThinkStore::BeforeRowsEnter(size_t layer, size_t kv_head, const Cut& cut) {
  Choice& choice = choices_[table()(layer, kv_head)];
  if (choice.made) return;
  if (!counter().only_counts) Choose(layer, kv_head, cut);
  choice.made = true;
}

// Scores of the channels are |Q_j|^2 |K_j|^2: sums and means rank alike.
void ThinkStore::Choose(size_t layer, size_t kv_head, const Cut& cut) {
  const Choice& choice = choices_[table()(layer, kv_head)];
  const size_t d = Layer(layer).head_dim;
  std::vector<double> scores(d);
  std::vector<float> key(d);
  for (const uint32_t row : cut.whole) {
    ReadWholeKey(layer, Find(layer, kv_head, row), key.data());
    for (size_t c = 0; c < d; ++c) scores[c] += static_cast<double>(key[c]) * key[c];
  }
  for (size_t c = 0; c < d; ++c) scores[c] *= Sums(choice)[c];
  const std::vector<uint16_t> kept = ChooseChannels(scores, old().key_format(layer).head_dim);
  std::copy(kept.begin(), kept.end(), Channels(choice));
}

void ThinkStore::WriteOld(size_t layer, size_t kv_head, const Place& from, std::byte* keys, std::byte* values,
                          size_t slot) const {
  const size_t d = Layer(layer).head_dim;
  const ExactFormats f = {{types_.keys, RowSide::kKeys, d}, {types_.values, RowSide::kValues, d}};
  CopyChannels(f.keys, from.rows->Region(f, RowSide::kKeys), from.slot, Channels(choices_[table()(layer, kv_head)]),
               old().key_format(layer), keys, slot);
  CopyRow(f.values, from.rows->Region(f, RowSide::kValues), from.slot, values, slot);
}

// The kept channels, with zeros in place of the others.
void ThinkStore::ReadOld(size_t layer, size_t kv_head, uint32_t row, float* key, float* value) const {
  std::vector<float> some(old().key_format(layer).head_dim);
  old().ReadRows(layer, kv_head, {&row, 1}, some.data(), value);
  const uint16_t* channels = Channels(choices_[table()(layer, kv_head)]);
  std::fill_n(key, Layer(layer).head_dim, 0.0f);
  for (size_t c = 0; c < some.size(); ++c) key[channels[c]] = some[c];
}

void ThinkStore::MarkOldSpans(size_t layer, size_t kv_head, std::span<RowSpan> keys) const {
  for (RowSpan& span : keys) span.channels = Channels(choices_[table()(layer, kv_head)]);
}

// ---- Saved state

void ThinkStore::SaveOwn(size_t i, ByteWriter& out) const {
  const Choice& choice = choices_[i];
  const size_t layer = table().LayerOf(i);
  out.Put<uint8_t>(choice.made);
  if (choice.made)
    out.Raw(Channels(choice), old().key_format(layer).head_dim * sizeof(uint16_t));
  else
    out.Raw(sums_.As<double>().data() + choice.scores_at, Layer(layer).head_dim * sizeof(double));
}

void ThinkStore::LoadOwn(size_t i, ByteReader& in) {
  Choice& choice = choices_[i];
  const size_t layer = table().LayerOf(i), d = Layer(layer).head_dim, kept = old().key_format(layer).head_dim;
  const auto made = in.Get<uint8_t>();
  if (made > 1) Fail(ErrorCode::kBadFile, "saved cache: {} does not say whether channels were chosen", made);
  choice.made = made == 1;
  if (!choice.made) return in.Raw(Sums(choice), d * sizeof(double));
  uint16_t* channels = Channels(choice);
  in.Raw(channels, kept * sizeof(uint16_t));
  for (size_t c = 0; c < kept; ++c)
    if (channels[c] >= d || (c > 0 && channels[c] <= channels[c - 1]))
      Fail(ErrorCode::kBadFile, "saved cache: a head's kept channels are not ascending numbers below {}", d);
}

void ThinkStore::CheckLoaded() {
  for (size_t i = 0; i < choices_.size(); ++i)
    if (OldRows(i) > 0 && !choices_[i].made)
      Fail(ErrorCode::kBadFile, "saved cache: a head has old rows, but its channels were not chosen");
  EndOwn();
}

}  // namespace lesskv
