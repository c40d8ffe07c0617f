#include "kvcache/codec/kivi_store.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/attention/attention_isa.h"
#include "kernels/basic/basic.h"
#include "kernels/quants/half.h"
#include "kernels/rows/hadamard.h"
#include "kvcache/codec/head_job.h"

namespace lesskv {
namespace {

constexpr size_t kAtOnce = KeyBases::kMostAtOnce;  // queries, as the kernels take them
constexpr size_t kTakenBack = 32;                  // rows that leave their basis at a time

}  // namespace

std::vector<GroupFormat> BalancedParts(size_t bits, size_t group, size_t head_dim) {
  const auto part = [&](size_t channels, size_t of_bits) { return GroupFormat{RowSide::kKeys, of_bits, group, channels}; };
  const size_t quarter = (head_dim / kGroupedChannels + 2) / 4 * kGroupedChannels;
  if (bits == 4 || head_dim < 2 * quarter || quarter == 0) return {part(head_dim, bits)};
  std::vector<GroupFormat> parts = {part(quarter, 4)};
  if (head_dim > 2 * quarter) parts.push_back(part(head_dim - 2 * quarter, bits));
  parts.push_back(part(quarter, bits == 2 ? 0 : 2));
  return parts;
}

std::vector<GroupFormat> KiviOptions::Keys(size_t head_dim) const {
  if (bases) return BalancedParts(key_bits, group, head_dim);
  return {{RowSide::kKeys, key_bits, group, KeptChannels(pruned, head_dim, kGroupedChannels)}};
}

// ---- Coded rows of one head

std::byte* KiviStore::Head::KeyUnit(size_t part, size_t row) const {
  const KeyPart& p = formats->keys[part];
  auto* units = const_cast<std::byte*>(blocks[row / block_rows].data());
  return units + block_rows / formats->group * p.bytes_before + row % block_rows / formats->group * p.bytes;
}

std::byte* KiviStore::Head::ValueUnit(size_t row) const {
  auto* units = const_cast<std::byte*>(blocks[row / block_rows].data());
  return units + block_rows / formats->group * formats->key_bytes + row % block_rows / kTileRows * formats->value_bytes;
}

// Decode scores the keys of a split, then adds its values.
const std::byte* KiviStore::Head::After(bool keys, size_t row) const {
  if (keys && (row % kSplitRows == 0 || row >= coded_keys)) return ValueUnit((row - 1) / kSplitRows * kSplitRows);
  if (row >= (keys ? coded_keys : coded_values)) return nullptr;
  return keys ? KeyUnit(0, row) : ValueUnit(row);
}

uint16_t* KiviStore::Head::Sink(RowSide side, size_t row) const {
  const size_t at = (side == RowSide::kKeys ? 0 : n_sinks) + row;
  return reinterpret_cast<uint16_t*>(const_cast<std::byte*>(sinks.data())) + at * formats->exact.keys.head_dim;
}

template <typename F>
void KiviStore::Head::ForBlocks(size_t first, size_t n, F&& f) const {
  for (size_t done = 0; done < n;) {
    const size_t row = (first + done) % block_rows, count = std::min(n - done, block_rows - row);
    f(first + done - row, row, count, done);
    done += count;
  }
}

void KiviStore::Head::ExpandKeys(size_t first, size_t n, float* out, size_t stride) const {
  const size_t d = formats->exact.keys.head_dim;
  if (formats->bases) {
    // Some rows at a time: they are not where they belong before they are taken back.
    float z[kMostGroupedChannels * kTakenBack];
    for (size_t done = 0, count; done < n; done += count) {
      count = std::min(n - done, kTakenBack);
      ExpandParts(first + done, count, z, kTakenBack);
      formats->bases->FromBasis(formats->layer, kv_head, count, z, kTakenBack, out + done, stride);
    }
  } else {
    ExpandParts(first, n, out, stride);
  }
  // Channels that are stored come first, then each goes to its place, the last one first: no place is taken that is still
  // to be read.
  const std::span<const uint16_t> channels = Channels();
  for (size_t c = d, left = channels.size(); c-- > 0 && !channels.empty();) {
    if (left == 0 || channels[left - 1] != c)
      std::fill_n(out + c * stride, n, 0.0f);
    else if (--left != c)
      std::copy_n(out + left * stride, n, out + c * stride);
  }
  for (size_t row = first; row < std::min(first + n, sink_keys); ++row)
    for (size_t c = 0; c < d; ++c) out[c * stride + row - first] = HalfToFloat(Sink(RowSide::kKeys, row)[c]);
}

void KiviStore::Head::ExpandParts(size_t first, size_t n, float* out, size_t stride) const {
  for (size_t part = 0; part < formats->keys.size(); ++part) {
    const GroupFormat& f = formats->keys[part].format;
    ForBlocks(first, n, [&](size_t block, size_t row, size_t count, size_t done) {
      ExpandKeyUnits(f, KeyUnit(part, block), row, count, out + done, stride);
    });
    out += f.head_dim * stride;
  }
}

void KiviStore::Head::ExpandValues(size_t first, size_t n, float* out, size_t stride) const {
  ForBlocks(first, n, [&](size_t block, size_t row, size_t count, size_t done) {
    ExpandValueUnits(formats->values, ValueUnit(block), row, count, out + done * stride, stride);
  });
  const size_t d = formats->values.head_dim;
  for (size_t i = 0; i < n && formats->hadamard_block > 0; ++i) Hadamard(out + i * stride, d, formats->hadamard_block);
  for (size_t row = first; row < std::min(first + n, sink_values); ++row)
    F16ToF32(Sink(RowSide::kValues, row), d, out + (row - first) * stride);
}

void KiviStore::Head::CodedScores(size_t first, size_t n, const float* q, size_t n_queries, float* scores,
                                  size_t stride) const {
  float more[kAtOnce * kMostScored];
  for (size_t part = 0; part < formats->keys.size(); ++part) {
    const GroupFormat& f = formats->keys[part].format;
    const bool last = part + 1 == formats->keys.size();
    float* to = part == 0 ? scores : more;
    const size_t to_stride = part == 0 ? stride : kMostScored;
    ForBlocks(first, n, [&](size_t block, size_t row, size_t count, size_t done) {
      const size_t end = first + done + count;
      ScoreKeyUnits(f, KeyUnit(part, block), row, count, q, n_queries, to + done, to_stride,
                    last ? After(true, end) : KeyUnit(part + 1, first + done));
    });
    for (size_t m = 0; m < n_queries && part > 0; ++m) Add(scores + m * stride, more + m * kMostScored, n);
    q += f.head_dim * n_queries;
  }
}

bool KiviStore::Head::Scores(size_t first, size_t n, const float* q, size_t stacked, float* scores,
                             size_t stride) const {
  const std::span<const uint16_t> channels = Channels();
  const bool as_they_are = channels.empty() && formats->bases == nullptr;
  for (size_t m = 0, count; m < stacked; m += count) {
    count = std::min(kAtOnce, stacked - m);
    if (as_they_are && count == stacked) {
      CodedScores(first, n, q, stacked, scores, stride);
      break;
    }
    float some[kAtOnce * kMostGroupedChannels];
    if (formats->bases) {
      formats->bases->Queries(formats->layer, kv_head, count, q + m, stacked, some);
    } else {
      for (size_t c = 0; c < formats->keys[0].format.head_dim; ++c)
        std::copy_n(q + (channels.empty() ? c : channels[c]) * stacked + m, count, some + c * count);
    }
    CodedScores(first, n, some, count, scores + m * stride, stride);
  }
  for (size_t row = first; row < std::min(first + n, sink_keys); ++row) ScoreSink(row, q, stacked, scores + row - first, stride);
  return true;
}

void KiviStore::Head::ScoreSink(size_t row, const float* q, size_t stacked, float* scores, size_t stride) const {
  float key[kMostGroupedChannels];
  F16ToF32(Sink(RowSide::kKeys, row), formats->exact.keys.head_dim, key);
  for (size_t m = 0; m < stacked; m += kAtOnce) {
    const size_t count = std::min(kAtOnce, stacked - m);
    float sums[kAtOnce] = {};
    for (size_t c = 0; c < formats->exact.keys.head_dim; ++c)
      for (size_t i = 0; i < count; ++i) sums[i] += q[c * stacked + m + i] * key[c];
    for (size_t i = 0; i < count; ++i) scores[(m + i) * stride] = sums[i];
  }
}

void KiviStore::Head::AddCodedValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked,
                                     float* out, size_t out_stride) const {
  ForBlocks(first, n, [&](size_t block, size_t row, size_t count, size_t done) {
    AddValueUnits(formats->values, ValueUnit(block), row, count, weights + done, stride, stacked, out, out_stride,
                  After(false, first + done + count));
  });
}

bool KiviStore::Head::AddValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked,
                                float* out, size_t out_stride) const {
  const size_t d = formats->values.head_dim, exact = std::min(n, sink_values - std::min(first, sink_values));
  if (formats->hadamard_block == 0 && exact == 0) {
    AddCodedValues(first, n, weights, stride, stacked, out, out_stride);
    return true;
  }
  for (size_t m = 0; m < stacked; m += kAtOnce) {
    const size_t count = std::min(kAtOnce, stacked - m);
    const float* from = weights + m * stride;
    // Rows that are exact do not weigh as they are coded: they would also coarsen the weights of the others.
    float others[kAtOnce * kMostScored];
    for (size_t i = 0; i < count && exact > 0; ++i) {
      std::fill_n(others + i * kMostScored, exact, 0.0f);
      std::copy_n(from + i * stride + exact, n - exact, others + i * kMostScored + exact);
    }
    // The transform is its own inverse and linear: of the sum rather than of every value.
    float sums[kAtOnce * kMostGroupedChannels] = {};
    AddCodedValues(first, n, exact > 0 ? others : from, exact > 0 ? kMostScored : stride, count, sums, d);
    if (formats->hadamard_block > 0) Hadamard(sums, count * d, formats->hadamard_block);
    for (size_t row = first; row < first + exact; ++row) {
      float value[kMostGroupedChannels];
      F16ToF32(Sink(RowSide::kValues, row), d, value);
      for (size_t i = 0; i < count; ++i) Axpy(sums + i * d, from[i * stride + row - first], value, d);
    }
    for (size_t i = 0; i < count; ++i) Add(out + (m + i) * out_stride, sums + i * d, d);
  }
  return true;
}

// ---- Room

KiviStore::KiviStore(ByteCounter& counter, const StoreShape& shape, const KiviOptions& options)
    : counter_(&counter),
      shape_(shape),
      options_(options),
      table_(shape.layers),
      heads_(table_.size()),
      staging_(shape.layers, RowType::kF16, RowType::kF16) {
  for (const LayerShape& layer : shape.layers) {
    const size_t d = layer.head_dim;
    Formats f{.keys = {}, .values = options.Values(d),
              .exact = {RowType::kF16, RowType::kF16, d},
              .layer = formats_.size(), .group = options.group, .bases = options.bases.get(),
              .hadamard_block = options.rotate ? HadamardBlock(d) : 0};
    for (const GroupFormat& part : options.Keys(d)) {
      f.keys.push_back({part, UnitBytes(part), f.key_bytes});
      f.key_bytes += UnitBytes(part);
    }
    f.value_bytes = UnitBytes(f.values);
    formats_.push_back(std::move(f));
  }
  if (options.pruned > 0) {
    std::vector<size_t> n_kept;
    for (const Formats& f : formats_) n_kept.push_back(f.keys[0].format.head_dim);
    sets_.emplace(shape.layers, n_kept);
  }
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].formats = &formats_[table_.LayerOf(i)];
    heads_[i].kv_head = i - table_(table_.LayerOf(i), 0);
    heads_[i].n_sinks = options.sinks;
    if (sets_) heads_[i].sets = &*sets_, heads_[i].index = i;
    if (shape.grows) heads_[i].block_rows = RoundUp(kKiviBlockRows, options.group);
  }
}

size_t KiviStore::BlockBytes(const Formats& formats, size_t rows) {
  return rows / formats.group * formats.key_bytes + rows / kTileRows * formats.value_bytes;
}

// A window of another size with the same exact rows.
void KiviStore::ResizeWindow(Head& head, size_t rows) {
  if (head.window.rows == rows) return;
  const Formats& f = *head.formats;
  ExactRows window = ExactRows::Make(*counter_, f.exact, rows);
  CopyRing(f.exact, RowSide::kKeys, head.window, 0, head.n_rows - head.coded_keys, window);
  CopyRing(f.exact, RowSide::kValues, head.window, head.first_value, head.n_rows - head.coded_values, window);
  head.window = std::move(window);
  head.first_value = 0;
}

// A bounded head's only block, with the same coded rows.
void KiviStore::ResizeArena(Head& head, size_t rows) {
  if (head.block_rows == rows && !head.blocks.empty()) return;
  const Formats& f = *head.formats;
  Head old;
  old.formats = &f;
  old.block_rows = head.block_rows;
  old.blocks.emplace_back(*counter_, BlockBytes(f, rows));
  std::swap(old.blocks, head.blocks);
  head.block_rows = rows;
  const size_t both = old.blocks.empty() ? 0 : std::min(rows, old.block_rows);
  if (both == 0 || head.blocks[0].data() == nullptr) return;
  for (size_t part = 0; part < f.keys.size(); ++part)
    std::memcpy(head.KeyUnit(part, 0), old.KeyUnit(part, 0), both / f.group * f.keys[part].bytes);
  std::memcpy(head.ValueUnit(0), old.ValueUnit(0), both / kTileRows * f.value_bytes);
}

void KiviStore::Grow(Head& head, size_t rows) {
  while (head.Capacity() < rows) head.blocks.emplace_back(*counter_, BlockBytes(*head.formats, head.block_rows));
}

// Gives back blocks without coded rows.
void KiviStore::Trim(Head& head) {
  const size_t coded = std::max(head.coded_keys, head.coded_values);
  while (!head.blocks.empty() && head.Capacity() - head.block_rows >= coded) head.blocks.pop_back();
}

void KiviStore::ReserveHead(size_t i, const StepRoom& room) {
  Head& head = heads_[i];
  const size_t window = WindowOf(i);
  ResizeWindow(head, std::max(head.window.rows, options_.WindowRoom(window)));
  if (head.sinks.size() == 0)
    head.sinks = CountedBuffer(*counter_, 2 * options_.sinks * head.formats->exact.keys.head_dim * sizeof(uint16_t));
  const size_t all = head.n_rows + room.n_step;
  if (shape_.grows) {
    if (!room.evicts)
      Grow(head, std::max(all - options_.ExactKeys(head.n_rows - head.coded_keys + room.n_step, window), all - std::min(all, window)));
    else
      Grow(head, room.budgets_later ? head.coded_keys : std::min(all, std::max(head.n_rows, budgets_[i])));
  } else if (const size_t rows = RoundUp(RowsAhead(all, budgets_[i]), options_.group); head.Capacity() < rows) {
    ResizeArena(head, rows);
  }
}

size_t KiviStore::SlackBytes(std::span<const size_t> budgets) const {
  size_t bytes = 0;
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& head = heads_[i];
    const auto unused = [&](size_t coded) {
      return head.Capacity() - std::min(head.Capacity(), std::max(coded, budgets.empty() ? 0 : budgets[i]));
    };
    bytes += unused(head.coded_keys) * head.formats->key_bytes / head.formats->group;
    bytes += unused(head.coded_values) * head.formats->value_bytes / kTileRows;
  }
  return bytes;
}

void KiviStore::Reserve(const StepRoom& room) {
  const std::vector<size_t> before = budgets_;
  for (Head& head : heads_) {
    head.rows_before = head.blocks.empty() ? 0 : head.block_rows;
    head.window_before = head.window.rows;
  }
  try {
    budgets_.assign(room.budgets.begin(), room.budgets.end());
    if (sets_) sets_->Reserve(*counter_);
    for (size_t i = 0; i < heads_.size(); ++i) ReserveHead(i, room);
    staging_.Reserve(*counter_, room.n_step, room.defers);
  } catch (...) {
    budgets_ = before;
    CancelStep();
    throw;
  }
  n_step_ = room.n_step;
  evicts_ = room.evicts;
  is_prompt_ = room.is_prompt;
}

void KiviStore::SetBudgets(size_t layer, std::span<const size_t> budgets) {
  for (size_t h = 0; h < budgets.size(); ++h) {
    const size_t i = table_(layer, h);
    if (options_.Window(budgets[h]) == 0)
      Fail(ErrorCode::kInvalidArgument, "kivi: a head's budget of {} rows is below two groups of {}", budgets[h],
           options_.group);
    budgets_[i] = budgets[h];
    ResizeWindow(heads_[i], std::max(heads_[i].window.rows, options_.WindowRoom(WindowOf(i))));
    if (shape_.grows)
      Grow(heads_[i], std::min(heads_[i].n_rows + n_step_, budgets[h]));
    else if (const size_t rows = RoundUp(RowsAhead(heads_[i].n_rows + n_step_, budgets[h]), options_.group); heads_[i].Capacity() < rows)
      ResizeArena(heads_[i], rows);
  }
}

// Without memory for a smaller copy the larger one stays, which the next step uses.
void KiviStore::CancelStep() {
  for (Head& head : heads_) {
    try {
      if (shape_.grows)
        Trim(head);
      else if (head.rows_before == 0)
        head.blocks.clear(), head.block_rows = 0;
      else
        ResizeArena(head, head.rows_before);
      if (head.window_before == 0)
        head.window = ExactRows{}, head.first_value = 0, head.sinks = CountedBuffer();
      else
        ResizeWindow(head, head.window_before);
    } catch (const std::exception&) {
    }
  }
  staging_.Free();
  const bool has_rows = std::any_of(heads_.begin(), heads_.end(), [](const Head& head) { return head.n_rows > 0; });
  if (sets_ && !has_rows) sets_->Free();
  n_step_ = 0;
}

void KiviStore::EndStep() {
  if (sets_) sets_->EndStep();
  for (size_t i = 0; i < heads_.size(); ++i) {
    if (shape_.grows)
      Trim(heads_[i]);
    else if (evicts_)
      ResizeArena(heads_[i], RoundUp(std::clamp(heads_[i].Capacity(), RowsAhead(heads_[i].n_rows, budgets_[i]), budgets_[i]), options_.group));
    if (evicts_) ResizeWindow(heads_[i], options_.WindowRoom(WindowOf(i)));
  }
  if (is_prompt_) staging_.Free();
  n_step_ = 0;
}

std::unique_ptr<KvStore> KiviStore::Clone(ByteCounter& counter) const {
  auto copy = std::make_unique<KiviStore>(counter, shape_, options_);
  copy->budgets_ = budgets_;
  if (sets_) *copy->sets_ = sets_->Clone(counter);
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& from = heads_[i];
    Head& to = copy->heads_[i];
    for (size_t b = 0; b < from.blocks.size(); ++b)
      to.blocks.push_back(b < SettledBlocks(from) ? from.blocks[b].Share(counter) : from.blocks[b].Clone(counter));
    to.block_rows = from.block_rows;
    to.n_rows = from.n_rows;
    to.coded_keys = from.coded_keys;
    to.coded_values = from.coded_values;
    to.window = from.window.Clone(counter);
    to.first_value = from.first_value;
    to.sinks = from.sinks.Clone(counter);
    to.sink_keys = from.sink_keys;
    to.sink_values = from.sink_values;
  }
  copy->staging_.CopyFrom(staging_, counter);
  return copy;
}

void KiviStore::AddShareable(std::vector<SharedPart>& parts) const {
  for (const Head& head : heads_)
    for (size_t b = 0; b < SettledBlocks(head); ++b) parts.push_back({head.blocks[b].data(), head.blocks[b].size()});
}

// ---- Steps

void KiviStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  WriteExact(formats_[layer].exact, Layer(layer), first, n, keys, values,
             [&](size_t h) -> const ExactRows& { return staging_.At(layer, h); });
}

AttentionJob KiviStore::Job(const StoreQuery& query, size_t kv_head, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const Head& head = At(query.layer, kv_head);
  const Formats& f = *head.formats;
  const ExactRows &window = head.window, &staging = staging_.At(query.layer, kv_head);
  const size_t n_step = query.first_query + query.n_queries;
  std::vector<RowSpan>&keys = list.NewSpans(), &values = list.NewSpans();
  keys.push_back({f.exact.keys, nullptr, 0, head.coded_keys, &head});
  keys.push_back({f.exact.keys, window.Region(f.exact, RowSide::kKeys), 0, head.n_rows - head.coded_keys});
  keys.push_back({f.exact.keys, staging.Region(f.exact, RowSide::kKeys), 0, n_step});
  values.push_back({f.exact.values, nullptr, 0, head.coded_values, &head});
  const size_t exact = head.n_rows - head.coded_values, straight = std::min(exact, window.rows - head.first_value);
  values.push_back({f.exact.values, window.Region(f.exact, RowSide::kValues), head.first_value, straight});
  values.push_back({f.exact.values, window.Region(f.exact, RowSide::kValues), 0, exact - straight});
  values.push_back({f.exact.values, staging.Region(f.exact, RowSide::kValues), 0, n_step});
  AttentionJob job = HeadJob(query, layer, kv_head, shape_.compute);
  job.keys = keys;
  job.values = values;
  job.n_past = head.n_rows + query.first_query;
  return job;
}

void KiviStore::AddJobs(const StoreQuery& query, JobList& list) const {
  for (size_t h = 0; h < Layer(query.layer).n_kv_heads; ++h) list.jobs.push_back(Job(query, h, list));
}

void KiviStore::Observe(const StoreQuery& query) {
  if (sets_) sets_->Observe(Layer(query.layer), n_step_, query);
}

// A row that is not coded: in the window, or the step's own.
void KiviStore::ReadExact(const Head& head, const ExactRows& staging, RowSide side, size_t row, float* out) const {
  const Formats& f = *head.formats;
  const bool own = row >= head.n_rows;
  const ExactRows& from = own ? staging : head.window;
  size_t slot = row - head.n_rows;
  if (!own) slot = side == RowSide::kKeys ? row - head.coded_keys : (head.first_value + row - head.coded_values) % from.rows;
  lesskv::ReadRows(f.exact.Of(side), from.Region(f.exact, side), slot, 1, out, f.exact.keys.head_dim);
}

void KiviStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                         float* values) const {
  const Head& head = At(layer, kv_head);
  const size_t d = Layer(layer).head_dim;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < head.coded_keys)
      head.ExpandKeys(rows[i], 1, keys + i * d, 1);
    else
      ReadExact(head, staging_.At(layer, kv_head), RowSide::kKeys, rows[i], keys + i * d);
    if (rows[i] < head.coded_values)
      head.ExpandValues(rows[i], 1, values + i * d, d);
    else
      ReadExact(head, staging_.At(layer, kv_head), RowSide::kValues, rows[i], values + i * d);
  }
}

size_t KiviStore::GroupedRows(size_t layer, size_t kv_head) const {
  const size_t all = At(layer, kv_head).n_rows + n_step_, window = WindowOf(table_(layer, kv_head));
  return all > window ? (all - window) / options_.group * options_.group : 0;
}

SlotMap KiviStore::Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) {
  Head& head = At(layer, kv_head);
  const size_t i = table_(layer, kv_head), all = head.n_rows + n_step_, window = WindowOf(i);
  Kept kept{all - leaving.size(), leaving.empty() ? all : leaving[0].row, {}};
  SlotMap map{kept.n, {}};
  size_t next = 0;
  for (size_t row = std::min(kept.first, head.n_rows); row < all && evicts_; ++row) {
    if (next < leaving.size() && leaving[next].row == row) {
      ++next;
      continue;
    }
    map.moves.push_back({static_cast<uint32_t>(row), static_cast<uint32_t>(row - next)});
    if (row >= kept.first) kept.rest.push_back(static_cast<uint32_t>(row));
  }
  const size_t keys = kept.n - std::min(kept.n, options_.ExactKeys(head.n_rows - head.coded_keys + n_step_, window));
  if (sets_ && keys > 0 && !sets_->chosen(i))
    sets_->Choose(i, keys, [&](size_t row, float* key) {
      ReadExact(head, staging_.At(layer, kv_head), RowSide::kKeys, kept.Old(row), key);
    });
  const size_t values = kept.n - std::min({kept.n, head.n_rows - head.coded_values + n_step_, window});
  if (!counter_->only_counts) {
    CHECK(leaving.size() % options_.group == 0 && (leaving.empty() || leaving.back().row < GroupedRows(layer, kv_head)),
          "{} rows leave in groups of {}", leaving.size(), options_.group);
    CodeRows(head, staging_.At(layer, kv_head), kept, keys, values);
  }
  head.n_rows = kept.n;
  head.coded_keys = keys;
  head.coded_values = values;
  return map;
}

// Brings the head's rows to `keys` coded keys and `values` coded values of those kept.
void KiviStore::CodeRows(Head& head, const ExactRows& staging, const Kept& kept, size_t keys, size_t values) {
  CHECK(keys % options_.group == 0 && std::max(keys, values) <= head.Capacity(), "{} keys and {} values to be coded with room for {}",
        keys, values, head.Capacity());
  CodeKeys(head, staging, kept, keys);
  CodeValues(head, staging, kept, values);
  head.sink_keys = std::min(head.sink_keys, keys);
  head.sink_values = std::min(head.sink_values, values);
  KeepExactKeys(head, staging, kept.n - keys);
  KeepExactValues(head, staging, kept.n - values);
}

void KiviStore::CodeKeys(Head& head, const ExactRows& staging, const Kept& kept, size_t keys) {
  const Formats& f = *head.formats;
  const size_t d = f.exact.keys.head_dim;
  std::vector<float> rows(f.group * d), part_rows(f.group * d);
  for (size_t unit = std::min(kept.first, head.coded_keys) / f.group; unit < keys / f.group; ++unit) {
    const size_t old = kept.Old(unit * f.group);
    if (old < head.coded_keys) {
      if (old == unit * f.group) continue;
      if (unit == 0) head.sink_keys = 0;  // they left
      for (size_t part = 0; part < f.keys.size(); ++part)
        std::memmove(head.KeyUnit(part, unit * f.group), head.KeyUnit(part, old), f.keys[part].bytes);
      continue;
    }
    for (size_t i = 0; i < f.group; ++i)
      ReadExact(head, staging, RowSide::kKeys, kept.Old(unit * f.group + i), &rows[i * d]);
    if (unit == 0) {
      head.sink_keys = head.n_sinks;
      for (size_t row = 0; row < head.n_sinks; ++row) F32ToF16(&rows[row * d], d, head.Sink(RowSide::kKeys, row));
      // Codes of exact rows are not read. They are those of a neighbour, so that they widen no channel.
      for (size_t row = 0; row < head.n_sinks; ++row) std::copy_n(&rows[head.n_sinks * d], d, &rows[row * d]);
    }
    if (f.bases) {
      std::swap(rows, part_rows);
      f.bases->ToBasis(f.layer, head.kv_head, f.group, part_rows.data(), rows.data());
    }
    const std::span<const uint16_t> channels = head.Channels();
    for (size_t part = 0, first = 0; part < f.keys.size(); first += f.keys[part++].format.head_dim) {
      const size_t width = f.keys[part].format.head_dim;
      for (size_t i = 0; i < f.group; ++i)
        for (size_t c = 0; c < width; ++c)
          part_rows[i * width + c] = rows[i * d + (channels.empty() ? first + c : channels[c])];
      WriteKeyUnit(f.keys[part].format, head.KeyUnit(part, unit * f.group), part_rows.data());
    }
  }
}

void KiviStore::CodeValues(Head& head, const ExactRows& staging, const Kept& kept, size_t values) {
  const GroupFormat& f = head.formats->values;
  std::vector<float> value(f.head_dim);
  for (size_t row = std::min(kept.first, head.coded_values); row < values;) {
    const size_t old = kept.Old(row);
    if (row == 0 && old != 0) head.sink_values = 0;  // they left
    if (old >= head.coded_values) {
      ReadExact(head, staging, RowSide::kValues, old, value.data());
      if (row < head.n_sinks && row == head.sink_values) {
        F32ToF16(value.data(), value.size(), head.Sink(RowSide::kValues, row));
        ++head.sink_values;
      }
      if (head.formats->hadamard_block > 0) Hadamard(value.data(), value.size(), head.formats->hadamard_block);
      WriteValueRow(f, head.ValueUnit(row), row % kTileRows, value.data());
      ++row;
      continue;
    }
    // Whole units move: what leaves are whole groups, and a group is a number of units.
    if (old != row) std::memmove(head.ValueUnit(row), head.ValueUnit(old), head.formats->value_bytes);
    row += std::min(kTileRows, head.coded_values - old);
  }
}

// The last n rows' keys move to the front of the window, the step's from the staging area.
void KiviStore::KeepExactKeys(Head& head, const ExactRows& staging, size_t n) {
  const ExactFormats& f = head.formats->exact;
  std::byte* const window = head.window.Region(f, RowSide::kKeys);
  const size_t all = head.n_rows + n_step_;
  for (size_t i = 0; i < n; ++i) {
    const size_t old = all - n + i;
    if (old >= head.n_rows)
      CopyRow(f.keys, staging.Region(f, RowSide::kKeys), old - head.n_rows, window, i);
    else if (old - head.coded_keys != i)
      CopyRow(f.keys, window, old - head.coded_keys, window, i);
  }
}

// The last n rows' values: older ones leave the ring, the step's enter it.
void KiviStore::KeepExactValues(Head& head, const ExactRows& staging, size_t n) {
  const ExactFormats& f = head.formats->exact;
  std::byte* const window = head.window.Region(f, RowSide::kValues);
  const size_t from_step = std::min(n, n_step_), stay = n - from_step;
  head.first_value = (head.first_value + head.n_rows - head.coded_values - stay) % head.window.rows;
  for (size_t i = stay; i < n; ++i)
    CopyRow(f.values, staging.Region(f, RowSide::kValues), n_step_ - n + i, window, (head.first_value + i) % head.window.rows);
}

// ---- Saved state

void KiviStore::SaveSinks(const Head& head, ByteWriter& out) {
  for (const size_t n : {head.sink_keys, head.sink_values}) out.Put<uint64_t>(n);
  const size_t row_bytes = head.formats->exact.keys.head_dim * sizeof(uint16_t);
  for (size_t row = 0; row < head.sink_keys; ++row) out.Raw(head.Sink(RowSide::kKeys, row), row_bytes);
  for (size_t row = 0; row < head.sink_values; ++row) out.Raw(head.Sink(RowSide::kValues, row), row_bytes);
}

void KiviStore::Save(ByteWriter& out) const {
  for (const Head& head : heads_) {
    const Formats& f = *head.formats;
    for (const size_t n : {head.n_rows, head.coded_keys, head.coded_values}) out.Put<uint64_t>(n);
    if (sets_ && head.n_rows > 0) sets_->Save(head.index, out);
    if (head.n_sinks > 0) SaveSinks(head, out);
    for (size_t unit = 0; unit < head.coded_keys / f.group; ++unit)
      for (size_t part = 0; part < f.keys.size(); ++part) out.Raw(head.KeyUnit(part, unit * f.group), f.keys[part].bytes);
    for (size_t unit = 0; unit < CeilDiv(head.coded_values, kTileRows); ++unit)
      out.Raw(head.ValueUnit(unit * kTileRows), f.value_bytes);
    std::vector<float> row(f.exact.keys.head_dim);
    const auto save = [&](RowSide side, size_t first) {
      for (size_t i = first; i < head.n_rows; ++i) {
        ReadExact(head, head.window, side, i, row.data());
        for (const float x : row) out.Put<uint16_t>(FloatToHalf(x));
      }
    };
    save(RowSide::kKeys, head.coded_keys);
    save(RowSide::kValues, head.coded_values);
  }
}

void KiviStore::LoadSinks(Head& head, size_t keys, size_t values, ByteReader& in) {
  head.sinks = CountedBuffer(*counter_, 2 * head.n_sinks * head.formats->exact.keys.head_dim * sizeof(uint16_t));
  head.sink_keys = in.Count(std::min(keys, head.n_sinks), "a head's number of exact first keys");
  head.sink_values = in.Count(std::min(values, head.n_sinks), "a head's number of exact first values");
  const size_t row_bytes = head.formats->exact.keys.head_dim * sizeof(uint16_t);
  for (size_t row = 0; row < head.sink_keys; ++row) in.Raw(head.Sink(RowSide::kKeys, row), row_bytes);
  for (size_t row = 0; row < head.sink_values; ++row) in.Raw(head.Sink(RowSide::kValues, row), row_bytes);
}

void KiviStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  if (std::any_of(budgets.begin(), budgets.end(), [](size_t rows) { return rows > 0; })) {
    for (const size_t rows : budgets)
      if (options_.Window(rows) == 0)
        Fail(ErrorCode::kBadFile, "saved cache: a budget of {} rows is below two groups of {}", rows, options_.group);
    budgets_.assign(budgets.begin(), budgets.end());
  }
  if (sets_ && max_rows > 0) sets_->Reserve(*counter_);
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    const Formats& f = *head.formats;
    const size_t n_rows = in.Count(shape_.grows ? max_rows : budgets[i], "a head's number of rows");
    const size_t keys = in.Count(n_rows, "a head's number of coded keys");
    const size_t values = in.Count(n_rows, "a head's number of coded values");
    if (keys % options_.group != 0 || n_rows - values > WindowOf(i) || n_rows - keys > options_.WindowRoom(WindowOf(i)))
      Fail(ErrorCode::kBadFile, "saved cache: {} keys and {} values of {} are coded, which cannot be", keys, values, n_rows);
    if (sets_ && n_rows > 0) sets_->Load(i, in);
    if (sets_ && keys > 0 && !sets_->chosen(i))
      Fail(ErrorCode::kBadFile, "saved cache: a head has coded keys, but its channels were not chosen");
    if (shape_.grows)
      Grow(head, std::max(keys, values));
    else
      ResizeArena(head, RoundUp(RowsAhead(n_rows, budgets[i]), options_.group));
    if (max_rows > 0) ResizeWindow(head, options_.WindowRoom(WindowOf(i)));
    if (head.n_sinks > 0) LoadSinks(head, keys, values, in);
    head.n_rows = n_rows;
    head.coded_keys = keys;
    head.coded_values = values;
    for (size_t unit = 0; unit < keys / f.group; ++unit)
      for (size_t part = 0; part < f.keys.size(); ++part) in.Raw(head.KeyUnit(part, unit * f.group), f.keys[part].bytes);
    for (size_t unit = 0; unit < CeilDiv(values, kTileRows); ++unit) in.Raw(head.ValueUnit(unit * kTileRows), f.value_bytes);
    std::vector<float> row(f.exact.keys.head_dim);
    const auto load = [&](const RowFormat& format, std::byte* region, size_t n) {
      for (size_t slot = 0; slot < n; ++slot) {
        for (float& x : row) x = HalfToFloat(in.Get<uint16_t>());
        WriteRows(format, region, slot, 1, row.data(), row.size());
      }
    };
    load(f.exact.keys, head.window.Region(f.exact, RowSide::kKeys), n_rows - keys);
    load(f.exact.values, head.window.Region(f.exact, RowSide::kValues), n_rows - values);
  }
  if (sets_) sets_->EndStep();
}

}  // namespace lesskv
