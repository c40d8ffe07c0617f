// Which channels of its keys each KV head keeps where stored keys lose some of them (ThinK, Xu et al., ICLR 2025, arXiv
// 2407.21018): one set a head, chosen once and kept for the sequence's life.
//
// Those with the largest |Q_j|^2 |K_j|^2 stay, over the keys that the store names and the last kThinkQueries queries. A
// shorter step adds its queries to those before; that is ours, for texts that begin token by token. Equal scores: the
// lower channel goes.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "kvcache/codec/codec.h"
#include "kvcache/codec/kv_store.h"
#include "kvcache/memory.h"

namespace lesskv {

inline constexpr size_t kThinkQueries = 32;

// How many of a head's key channels stay: all but floor(ratio * head_dim), and as many more as make a multiple of `unit`.
// head_dim: nothing is pruned.
size_t KeptChannels(double ratio, size_t head_dim, size_t unit);
// Of rows of this type: q8 and q4 keep a multiple of 32.
size_t ChannelUnit(RowType keys);
// The n channels of the largest scores, ascending. Ties: the lower channel goes. A score that is no number is the
// least.
std::vector<uint16_t> ChooseChannels(std::span<const double> scores, size_t n);

class ChannelSets {
 public:
  // n_kept: of each layer, how many channels stay.
  ChannelSets(std::span<const LayerShape> layers, std::span<const size_t> n_kept);
  ChannelSets Clone(ByteCounter& counter) const;

  // Before a step, which it may throw Error(kOutOfMemory); after one; when the first one was taken back.
  void Reserve(ByteCounter& counter);
  void EndStep();
  void Free();

  // The queries of a step of n_step tokens (KvStore::Observe).
  void Observe(const LayerShape& layer, size_t n_step, const StoreQuery& query);
  // Chooses a head's set by keys [0, n_keys), each read once. From several threads for different heads.
  void Choose(size_t head, size_t n_keys, const std::function<void(size_t, float*)>& read_key);

  bool chosen(size_t head) const { return sets_[head].chosen; }
  // The kept channels, ascending; empty until they are chosen (and in plans).
  std::span<const uint16_t> Kept(size_t head) const;

  void Save(size_t head, ByteWriter& out) const;
  void Load(size_t head, ByteReader& in);  // after Reserve

 private:
  struct Set {  // of a head
    size_t head_dim = 0, n_kept = 0;
    size_t sums_at = 0, channels_at = 0;  // its places in sums_ and channels_
    bool chosen = false;
  };

  double* Sums(const Set& set) { return sums_.As<double>().data() + set.sums_at; }
  uint16_t* Channels(const Set& set) { return channels_.As<uint16_t>().data() + set.channels_at; }
  bool AllChosen() const;

  HeadTable table_;
  std::vector<Set> sets_;  // [heads]
  // Both from the first step on; the sums until all heads have chosen.
  CountedBuffer channels_;  // uint16 [heads, kept channels]
  CountedBuffer sums_;      // double [heads, head_dim]: squares of the queries' channels
};

// A codec whose rows do not lie by themselves, but whose keys can lack channels all the same.
class PrunableCodec : public Codec {
 public:
  // Stored keys keep a multiple of so many.
  virtual size_t channel_unit() const = 0;
  // The same codec, whose stored keys lack that share of their channels.
  virtual std::unique_ptr<const Codec> Pruned(double ratio) const = 0;
};

}  // namespace lesskv
