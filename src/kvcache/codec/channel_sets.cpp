#include "kvcache/codec/channel_sets.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/checked.h"
#include "base/error.h"

namespace lesskv {

size_t KeptChannels(double ratio, size_t head_dim, size_t unit) {
  // The small term keeps whole products whole.
  const auto pruned = static_cast<size_t>(std::floor(ratio * static_cast<double>(head_dim) + 1e-9));
  return std::min(head_dim, RoundUp(head_dim - pruned, unit));
}

size_t ChannelUnit(RowType keys) {
  size_t unit = 1;
  while (!Supports(keys, unit)) ++unit;
  return unit;
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

ChannelSets::ChannelSets(std::span<const LayerShape> layers, std::span<const size_t> n_kept) : table_(layers) {
  for (size_t layer = 0; layer < layers.size(); ++layer)
    for (size_t h = 0; h < layers[layer].n_kv_heads; ++h) {
      Set set{layers[layer].head_dim, n_kept[layer]};
      if (!sets_.empty()) {
        set.sums_at = sets_.back().sums_at + sets_.back().head_dim;
        set.channels_at = sets_.back().channels_at + sets_.back().n_kept;
      }
      sets_.push_back(set);
    }
}

ChannelSets ChannelSets::Clone(ByteCounter& counter) const {
  ChannelSets copy({}, {});
  copy.table_ = table_;
  copy.sets_ = sets_;
  copy.channels_ = channels_.Clone(counter);
  copy.sums_ = sums_.Clone(counter);
  return copy;
}

std::span<const uint16_t> ChannelSets::Kept(size_t head) const {
  const Set& set = sets_[head];
  if (!set.chosen || channels_.data() == nullptr) return {};
  return channels_.As<uint16_t>().subspan(set.channels_at, set.n_kept);
}

bool ChannelSets::AllChosen() const {
  return std::all_of(sets_.begin(), sets_.end(), [](const Set& set) { return set.chosen; });
}

void ChannelSets::Reserve(ByteCounter& counter) {
  if (sets_.empty()) return;
  const Set& last = sets_.back();
  if (channels_.size() == 0) channels_ = CountedBuffer(counter, (last.channels_at + last.n_kept) * sizeof(uint16_t));
  if (!AllChosen() && sums_.size() == 0)
    sums_ = CountedBuffer(counter, (last.sums_at + last.head_dim) * sizeof(double));
}

void ChannelSets::EndStep() {
  if (AllChosen()) sums_ = CountedBuffer();
}

void ChannelSets::Free() { channels_ = CountedBuffer(), sums_ = CountedBuffer(); }

void ChannelSets::Observe(const LayerShape& layer, size_t n_step, const StoreQuery& query) {
  const size_t d = layer.head_dim, first = n_step - std::min(n_step, kThinkQueries);
  const size_t begin = std::max(query.first_query, first), end = query.first_query + query.n_queries;
  for (size_t h = 0; h < layer.n_kv_heads && begin < end; ++h) {
    const Set& set = sets_[table_(query.layer, h)];
    if (set.chosen) continue;
    double* sums = Sums(set);
    if (n_step >= kThinkQueries && begin == first) std::fill_n(sums, d, 0.0);
    for (size_t m = begin; m < end; ++m) {
      const float* q = query.queries + (m - query.first_query) * layer.q_dim() + h * layer.group() * d;
      for (size_t i = 0; i < layer.group() * d; ++i) sums[i % d] += static_cast<double>(q[i]) * q[i];
    }
  }
}

// Sums of squares rank as their means do.
void ChannelSets::Choose(size_t head, size_t n_keys, const std::function<void(size_t, float*)>& read_key) {
  Set& set = sets_[head];
  set.chosen = true;
  if (channels_.data() == nullptr) return;
  std::vector<double> scores(set.head_dim);
  std::vector<float> key(set.head_dim);
  for (size_t i = 0; i < n_keys; ++i) {
    read_key(i, key.data());
    for (size_t c = 0; c < key.size(); ++c) scores[c] += static_cast<double>(key[c]) * key[c];
  }
  for (size_t c = 0; c < key.size(); ++c) scores[c] *= Sums(set)[c];
  const std::vector<uint16_t> kept = ChooseChannels(scores, set.n_kept);
  std::copy(kept.begin(), kept.end(), Channels(set));
}

void ChannelSets::Save(size_t head, ByteWriter& out) const {
  const Set& set = sets_[head];
  out.Put<uint8_t>(set.chosen);
  if (set.chosen)
    out.Raw(Kept(head).data(), set.n_kept * sizeof(uint16_t));
  else
    out.Raw(sums_.As<double>().data() + set.sums_at, set.head_dim * sizeof(double));
}

void ChannelSets::Load(size_t head, ByteReader& in) {
  Set& set = sets_[head];
  const auto chosen = in.Get<uint8_t>();
  if (chosen > 1) Fail(ErrorCode::kBadFile, "saved cache: {} does not say whether channels were chosen", chosen);
  set.chosen = chosen == 1;
  if (!set.chosen) return in.Raw(Sums(set), set.head_dim * sizeof(double));
  uint16_t* channels = Channels(set);
  in.Raw(channels, set.n_kept * sizeof(uint16_t));
  for (size_t c = 0; c < set.n_kept; ++c)
    if (channels[c] >= set.head_dim || (c > 0 && channels[c] <= channels[c - 1]))
      Fail(ErrorCode::kBadFile, "saved cache: a head's kept channels are not ascending numbers below {}", set.head_dim);
}

}  // namespace lesskv
