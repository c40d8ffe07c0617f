#include "kvcache/codec/kivi_store.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/quants/half.h"
#include "kernels/rows/hadamard.h"
#include "kvcache/codec/head_job.h"

namespace lesskv {
namespace {

constexpr size_t kAtOnce = 4;  // queries, as the kernels take them

}  // namespace

// ---- Coded rows of one head

std::byte* KiviStore::Head::KeyUnit(size_t unit) const {
  const size_t row = unit * formats->keys.group;
  return const_cast<std::byte*>(blocks[row / block_rows].data()) +
         row % block_rows / formats->keys.group * UnitBytes(formats->keys);
}

std::byte* KiviStore::Head::ValueUnit(size_t unit) const {
  const size_t row = unit * kTileRows;
  return const_cast<std::byte*>(blocks[row / block_rows].data()) +
         block_rows / formats->keys.group * UnitBytes(formats->keys) +
         row % block_rows / kTileRows * UnitBytes(formats->values);
}

template <typename F>
void KiviStore::Head::ForBlocks(bool keys, size_t first, size_t n, F&& f) const {
  for (size_t done = 0; done < n;) {
    const size_t row = (first + done) % block_rows, block = (first + done) / block_rows * block_rows;
    const size_t count = std::min(n - done, block_rows - row);
    f(keys ? KeyUnit(block / formats->keys.group) : ValueUnit(block / kTileRows), row, count, done);
    done += count;
  }
}

// Channels that are stored come first, then each goes to its place, the last one first: no place is taken that is still
// to be read.
void KiviStore::Head::ExpandKeys(size_t first, size_t n, float* out, size_t stride) const {
  ForBlocks(true, first, n, [&](const std::byte* units, size_t row, size_t count, size_t done) {
    ExpandKeyUnits(formats->keys, units, row, count, out + done, stride);
  });
  const std::span<const uint16_t> channels = Channels();
  for (size_t c = formats->exact.keys.head_dim, left = channels.size(); c-- > 0 && !channels.empty();) {
    if (left == 0 || channels[left - 1] != c)
      std::fill_n(out + c * stride, n, 0.0f);
    else if (--left != c)
      std::copy_n(out + left * stride, n, out + c * stride);
  }
}

void KiviStore::Head::ExpandValues(size_t first, size_t n, float* out, size_t stride) const {
  ForBlocks(false, first, n, [&](const std::byte* units, size_t row, size_t count, size_t done) {
    ExpandValueUnits(formats->values, units, row, count, out + done * stride, stride);
  });
  const size_t d = formats->values.head_dim;
  for (size_t i = 0; i < n && formats->hadamard_block > 0; ++i) Hadamard(out + i * stride, d, formats->hadamard_block);
}

bool KiviStore::Head::Scores(size_t first, size_t n, const float* q, size_t stacked, float* scores,
                             size_t stride) const {
  const auto score = [&](const float* queries, size_t n_queries, float* to) {
    ForBlocks(true, first, n, [&](const std::byte* units, size_t row, size_t count, size_t done) {
      ScoreKeyUnits(formats->keys, units, row, count, queries, n_queries, to + done, stride);
    });
  };
  const std::span<const uint16_t> channels = Channels();
  if (channels.empty()) score(q, stacked, scores);
  for (size_t m = 0; m < stacked && !channels.empty(); m += kAtOnce) {
    const size_t count = std::min(kAtOnce, stacked - m);
    float some[kAtOnce * kMostGroupedChannels];
    for (size_t c = 0; c < channels.size(); ++c) std::copy_n(q + channels[c] * stacked + m, count, some + c * count);
    score(some, count, scores + m * stride);
  }
  return true;
}

void KiviStore::Head::AddCodedValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked,
                                     float* out, size_t out_stride) const {
  ForBlocks(false, first, n, [&](const std::byte* units, size_t row, size_t count, size_t done) {
    AddValueUnits(formats->values, units, row, count, weights + done, stride, stacked, out, out_stride);
  });
}

// The transform is its own inverse and linear: of the sum rather than of every value.
bool KiviStore::Head::AddValues(size_t first, size_t n, const float* weights, size_t stride, size_t stacked,
                                float* out, size_t out_stride) const {
  if (formats->hadamard_block == 0) {
    AddCodedValues(first, n, weights, stride, stacked, out, out_stride);
    return true;
  }
  const size_t d = formats->values.head_dim;
  for (size_t m = 0; m < stacked; m += kAtOnce) {
    const size_t count = std::min(kAtOnce, stacked - m);
    float sums[kAtOnce * kMostGroupedChannels] = {};
    AddCodedValues(first, n, weights + m * stride, stride, count, sums, d);
    Hadamard(sums, count * d, formats->hadamard_block);
    for (size_t i = 0; i < count; ++i)
      for (size_t c = 0; c < d; ++c) out[(m + i) * out_stride + c] += sums[i * d + c];
  }
  return true;
}

// ---- Room

KiviStore::KiviStore(ByteCounter& counter, const StoreShape& shape, const KiviOptions& options)
    : counter_(&counter), shape_(shape), options_(options), table_(shape.layers), heads_(table_.size()) {
  for (const LayerShape& layer : shape.layers) {
    const size_t d = layer.head_dim;
    formats_.push_back(
        {options.Keys(d), options.Values(d), {{RowType::kF16, RowSide::kKeys, d}, {RowType::kF16, RowSide::kValues, d}},
         options.rotate ? HadamardBlock(d) : 0});
    most_heads_ = std::max(most_heads_, layer.n_kv_heads);
    if (d > formats_[widest_].exact.keys.head_dim) widest_ = formats_.size() - 1;
  }
  staging_.resize(most_heads_);
  if (options.pruned > 0) {
    std::vector<size_t> n_kept;
    for (const Formats& f : formats_) n_kept.push_back(f.keys.head_dim);
    sets_.emplace(shape.layers, n_kept);
  }
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].formats = &formats_[table_.LayerOf(i)];
    if (sets_) heads_[i].sets = &*sets_, heads_[i].index = i;
    if (shape.grows) heads_[i].block_rows = RoundUp(kKiviBlockRows, options.group);
  }
}

size_t KiviStore::BlockBytes(const Formats& formats, size_t rows) {
  return rows / formats.keys.group * UnitBytes(formats.keys) + rows / kTileRows * UnitBytes(formats.values);
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
  CountedBuffer block(*counter_, BlockBytes(f, rows));
  const size_t old_rows = head.blocks.empty() ? 0 : head.block_rows;
  const size_t key_bytes = std::min(rows, old_rows) / f.keys.group * UnitBytes(f.keys);
  if (key_bytes > 0 && block.data() != nullptr) {
    std::memcpy(block.data(), head.blocks[0].data(), key_bytes);
    std::memcpy(block.data() + rows / f.keys.group * UnitBytes(f.keys), head.ValueUnit(0),
                std::min(rows, old_rows) / kTileRows * UnitBytes(f.values));
  }
  head.blocks.clear();
  head.blocks.push_back(std::move(block));
  head.block_rows = rows;
}

void KiviStore::Grow(Head& head, size_t rows) {
  while (head.Capacity() < rows) head.blocks.emplace_back(*counter_, BlockBytes(*head.formats, head.block_rows));
}

// Gives back blocks without coded rows.
void KiviStore::Trim(Head& head) {
  while (!head.blocks.empty() && head.Capacity() - head.block_rows >= head.coded_keys) head.blocks.pop_back();
}

void KiviStore::ReserveHead(size_t i, const StepRoom& room) {
  Head& head = heads_[i];
  ResizeWindow(head, std::max(head.window.rows, WindowOf(i)));
  const size_t all = head.n_rows + room.n_step;
  if (shape_.grows) {
    if (!room.evicts)
      Grow(head, all - (head.n_rows - head.coded_keys + room.n_step) % WindowOf(i));
    else
      Grow(head, room.budgets_later ? head.coded_keys : std::min(all, std::max(head.n_rows, budgets_[i])));
  } else if (head.Capacity() < RoundUp(budgets_[i], options_.group)) {
    ResizeArena(head, RoundUp(budgets_[i], options_.group));
  }
}

void KiviStore::ReserveStaging(const StepRoom& room) {
  const size_t rows = RoundUp(room.n_step, kTileRows), n = room.defers ? table_.size() : most_heads_;
  if (staging_.size() != n || defers_ != room.defers) staging_ = std::vector<ExactRows>(n);
  defers_ = room.defers;
  for (size_t i = 0; i < n; ++i) {
    if (staging_[i].rows == rows) continue;
    staging_[i] = ExactRows{};
    // Layers that share a staging area: it has room for rows of the widest.
    staging_[i] = ExactRows::Make(*counter_, formats_[defers_ ? table_.LayerOf(i) : widest_].exact, rows);
  }
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
    ReserveStaging(room);
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
    ResizeWindow(heads_[i], std::max(heads_[i].window.rows, WindowOf(i)));
    if (shape_.grows)
      Grow(heads_[i], std::min(heads_[i].n_rows + n_step_, budgets[h]));
    else if (heads_[i].Capacity() < budgets[h])
      ResizeArena(heads_[i], RoundUp(budgets[h], options_.group));
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
        head.window = ExactRows{}, head.first_value = 0;
      else
        ResizeWindow(head, head.window_before);
    } catch (const std::exception&) {
    }
  }
  for (ExactRows& staging : staging_) staging = ExactRows{};
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
      ResizeArena(heads_[i], RoundUp(budgets_[i], options_.group));
    if (evicts_) ResizeWindow(heads_[i], WindowOf(i));
  }
  if (is_prompt_)
    for (ExactRows& staging : staging_) staging = ExactRows{};
  n_step_ = 0;
}

std::unique_ptr<KvStore> KiviStore::Clone(ByteCounter& counter) const {
  auto copy = std::make_unique<KiviStore>(counter, shape_, options_);
  copy->defers_ = defers_;
  copy->budgets_ = budgets_;
  if (sets_) *copy->sets_ = sets_->Clone(counter);
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& from = heads_[i];
    Head& to = copy->heads_[i];
    for (const CountedBuffer& block : from.blocks) to.blocks.push_back(block.Clone(counter));
    to.block_rows = from.block_rows;
    to.n_rows = from.n_rows;
    to.coded_keys = from.coded_keys;
    to.coded_values = from.coded_values;
    to.window = from.window.Clone(counter);
    to.first_value = from.first_value;
  }
  copy->staging_.clear();
  for (const ExactRows& staging : staging_) copy->staging_.push_back(staging.Clone(counter));
  return copy;
}

// ---- Steps

void KiviStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  WriteExact(formats_[layer].exact, Layer(layer), first, n, keys, values,
             [&](size_t h) -> const ExactRows& { return Staging(layer, h); });
}

AttentionJob KiviStore::Job(const StoreQuery& query, size_t kv_head, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const Head& head = At(query.layer, kv_head);
  const Formats& f = *head.formats;
  const ExactRows &window = head.window, &staging = Staging(query.layer, kv_head);
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
      ReadExact(head, Staging(layer, kv_head), RowSide::kKeys, rows[i], keys + i * d);
    if (rows[i] < head.coded_values)
      head.ExpandValues(rows[i], 1, values + i * d, d);
    else
      ReadExact(head, Staging(layer, kv_head), RowSide::kValues, rows[i], values + i * d);
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
  const size_t keys = kept.n - std::min(kept.n, (head.n_rows - head.coded_keys + n_step_) % window);
  if (sets_ && keys > 0 && !sets_->chosen(i))
    sets_->Choose(i, keys, [&](size_t row, float* key) {
      ReadExact(head, Staging(layer, kv_head), RowSide::kKeys, kept.Old(row), key);
    });
  const size_t values = kept.n - std::min({kept.n, head.n_rows - head.coded_values + n_step_, window});
  if (!counter_->only_counts) {
    CHECK(leaving.size() % options_.group == 0 && (leaving.empty() || leaving.back().row < GroupedRows(layer, kv_head)),
          "{} rows leave in groups of {}", leaving.size(), options_.group);
    CodeRows(head, Staging(layer, kv_head), kept, keys, values);
  }
  head.n_rows = kept.n;
  head.coded_keys = keys;
  head.coded_values = values;
  return map;
}

// Brings the head's rows to `keys` coded keys and `values` coded values of those kept.
void KiviStore::CodeRows(Head& head, const ExactRows& staging, const Kept& kept, size_t keys, size_t values) {
  CHECK(keys % options_.group == 0 && keys <= head.Capacity(), "{} keys to be coded with room for {}", keys,
        head.Capacity());
  CodeKeys(head, staging, kept, keys);
  CodeValues(head, staging, kept, values);
  KeepExactKeys(head, staging, kept.n - keys);
  KeepExactValues(head, staging, kept.n - values);
}

void KiviStore::CodeKeys(Head& head, const ExactRows& staging, const Kept& kept, size_t keys) {
  const GroupFormat& f = head.formats->keys;
  const std::span<const uint16_t> channels = head.Channels();
  std::vector<float> rows(f.group * f.head_dim), key(head.formats->exact.keys.head_dim);
  for (size_t unit = std::min(kept.first, head.coded_keys) / f.group; unit < keys / f.group; ++unit) {
    const size_t old = kept.Old(unit * f.group);
    if (old < head.coded_keys) {
      if (old != unit * f.group) std::memmove(head.KeyUnit(unit), head.KeyUnit(old / f.group), UnitBytes(f));
      continue;
    }
    for (size_t i = 0; i < f.group; ++i) {
      ReadExact(head, staging, RowSide::kKeys, kept.Old(unit * f.group + i), key.data());
      for (size_t c = 0; c < f.head_dim; ++c) rows[i * f.head_dim + c] = key[channels.empty() ? c : channels[c]];
    }
    WriteKeyUnit(f, head.KeyUnit(unit), rows.data());
  }
}

void KiviStore::CodeValues(Head& head, const ExactRows& staging, const Kept& kept, size_t values) {
  const GroupFormat& f = head.formats->values;
  std::vector<float> value(f.head_dim);
  for (size_t row = std::min(kept.first, head.coded_values); row < values;) {
    const size_t old = kept.Old(row);
    if (old >= head.coded_values) {
      ReadExact(head, staging, RowSide::kValues, old, value.data());
      if (head.formats->hadamard_block > 0) Hadamard(value.data(), value.size(), head.formats->hadamard_block);
      WriteValueRow(f, head.ValueUnit(row / kTileRows), row % kTileRows, value.data());
      ++row;
      continue;
    }
    // Whole units move: what leaves are whole groups, and a group is a number of units.
    if (old != row) std::memmove(head.ValueUnit(row / kTileRows), head.ValueUnit(old / kTileRows), UnitBytes(f));
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

void KiviStore::Save(ByteWriter& out) const {
  for (const Head& head : heads_) {
    const Formats& f = *head.formats;
    for (const size_t n : {head.n_rows, head.coded_keys, head.coded_values}) out.Put<uint64_t>(n);
    if (sets_ && head.n_rows > 0) sets_->Save(head.index, out);
    for (size_t unit = 0; unit < head.coded_keys / f.keys.group; ++unit) out.Raw(head.KeyUnit(unit), UnitBytes(f.keys));
    for (size_t unit = 0; unit < CeilDiv(head.coded_values, kTileRows); ++unit)
      out.Raw(head.ValueUnit(unit), UnitBytes(f.values));
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
    const size_t values = in.Count(keys, "a head's number of coded values");
    if (keys % options_.group != 0 || n_rows - values > WindowOf(i))
      Fail(ErrorCode::kBadFile, "saved cache: {} keys and {} values of {} are coded, which cannot be", keys, values, n_rows);
    if (sets_ && n_rows > 0) sets_->Load(i, in);
    if (sets_ && keys > 0 && !sets_->chosen(i))
      Fail(ErrorCode::kBadFile, "saved cache: a head has coded keys, but its channels were not chosen");
    if (shape_.grows)
      Grow(head, keys);
    else
      ResizeArena(head, RoundUp(budgets[i], options_.group));
    if (max_rows > 0) ResizeWindow(head, WindowOf(i));
    head.n_rows = n_rows;
    head.coded_keys = keys;
    head.coded_values = values;
    for (size_t unit = 0; unit < keys / f.keys.group; ++unit) in.Raw(head.KeyUnit(unit), UnitBytes(f.keys));
    for (size_t unit = 0; unit < CeilDiv(values, kTileRows); ++unit) in.Raw(head.ValueUnit(unit), UnitBytes(f.values));
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
