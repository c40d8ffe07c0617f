#include "kvcache/codec/window_store.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kvcache/codec/head_job.h"

namespace lesskv {
namespace {

// What rows are before they are coded: as the codec stores them, or in f16 where that is less.
RowType Whole(RowType coded) { return coded == RowType::kQ8 || coded == RowType::kQ4 ? RowType::kF16 : coded; }

}  // namespace

WindowFormats WholeRows(const RowTypes& types) { return {Whole(types.keys), Whole(types.values)}; }

WindowStore::WindowStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& old, std::vector<size_t> key_dims,
                         const WindowFormats& whole, const WindowOptions& options)
    : counter_(&counter),
      shape_(shape),
      options_(options),
      table_(shape.layers),
      old_(std::make_unique<RowStore>(counter, shape, old, std::move(key_dims))),
      heads_(table_.size()),
      staging_(shape.layers, whole.keys, whole.values) {
  CHECK(!shape.unrotated_keys && options.window > 0);
  for (const LayerShape& layer : shape.layers) formats_.emplace_back(whole.keys, whole.values, layer.head_dim);
}

size_t WindowStore::OldRows(size_t head) const {
  const size_t layer = table_.LayerOf(head);
  return old_->n_rows(layer, head - table_(layer, 0));
}

size_t WindowStore::n_rows(size_t layer, size_t kv_head) const {
  return old_->n_rows(layer, kv_head) + heads_[table_(layer, kv_head)].n;
}

// ---- Room

// The ring's room for `needed` rows: the window, and whole blocks where more pile up.
size_t WindowStore::RingRows(const Head& head, size_t needed) const {
  const size_t window = RoundUp(shape_.grows ? options_.window : head.bounded_window, kTileRows);
  return needed <= window ? window : window + RoundUp(needed - window, kBlockRows);
}

// A ring of another size with the same rows, the oldest in slot 0.
void WindowStore::ResizeRing(size_t i, size_t rows) {
  Head& head = heads_[i];
  if (head.ring.rows == rows) return;
  CHECK(head.n <= rows, "{} rows in a ring of {}", head.n, rows);
  const ExactFormats& f = FormatsOf(i);
  ExactRows ring = ExactRows::Make(*counter_, f, rows);
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues}) CopyRing(f, side, head.ring, head.first, head.n, ring);
  head.ring = std::move(ring);
  head.first = 0;
}

// A head's window is its budget where that is smaller. Where budgets are divided later, no head of a layer gets fewer
// rows than the least of it (CodecTraits::apart_rows): what is whole, and so the bytes, does not depend on the
// division.
void WindowStore::FindWindows(const StepRoom& room) {
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    head.window = options_.window;
    if (!room.evicts) continue;
    const size_t layer = table_.LayerOf(i);
    if (room.budgets_later) {
      const auto own = room.budgets.subspan(table_(layer, 0), table_.n_heads(layer));
      head.bounded_window = std::min(options_.window, *std::min_element(own.begin(), own.end()));
    } else if (head.bounded_window == 0 || budgets_.empty() || budgets_[i] != room.budgets[i]) {
      head.bounded_window = std::min(options_.window, room.budgets[i]);
    }
    head.window = head.bounded_window;
  }
}

// Old rows that a head may have under these budgets ([heads], or none).
std::vector<size_t> WindowStore::OldBudgets(std::span<const size_t> budgets) const {
  std::vector<size_t> old(budgets.begin(), budgets.end());
  for (size_t i = 0; i < old.size(); ++i)
    old[i] -= std::min(old[i], heads_[i].bounded_window > 0 ? heads_[i].bounded_window : options_.window);
  return old;
}

void WindowStore::ReserveOld(const StepRoom& room) {
  std::vector<size_t> entering(heads_.size());
  for (size_t i = 0; i < heads_.size(); ++i) {
    const size_t old = OldRows(i), all = old + heads_[i].n + room.n_step, window = heads_[i].window;
    if (MovesOn() && all > window + old) entering[i] = all - window - old;
  }
  const std::vector<size_t> budgets = OldBudgets(room.budgets);
  StepRoom own = room;
  own.budgets = budgets;
  old_->ReserveRows(own, entering);
}

void WindowStore::Reserve(const StepRoom& room) {
  budgets_before_ = budgets_;
  begun_before_ = begun_;
  begun_ = true;
  for (Head& head : heads_) {
    head.ring_before = head.ring.rows;
    head.bounded_before = head.bounded_window;
  }
  is_prompt_ = room.is_prompt;
  evicts_ = room.evicts;
  try {
    FindWindows(room);
    ReserveOwn();
    for (size_t i = 0; i < heads_.size(); ++i) {
      const size_t needed = MovesOn() ? heads_[i].window : heads_[i].n + room.n_step;
      ResizeRing(i, std::max(heads_[i].ring.rows, RingRows(heads_[i], needed)));
    }
    ReserveOld(room);
    staging_.Reserve(*counter_, room.n_step, room.defers);
    budgets_.assign(room.budgets.begin(), room.budgets.end());
  } catch (...) {
    CancelStep();
    throw;
  }
  n_step_ = room.n_step;
}

void WindowStore::SetBudgets(size_t first_layer, std::span<const size_t> budgets) {
  const size_t first = table_(first_layer, 0);
  std::vector<size_t> old;
  for (size_t i = 0; i < budgets.size(); ++i) {
    const size_t window = heads_[first + i].window;
    CHECK(budgets[i] >= window, "a budget of {} rows where {} lie apart", budgets[i], window);
    budgets_[first + i] = budgets[i];
    old.push_back(budgets[i] - window);
  }
  old_->SetBudgets(first_layer, old);
}

// Without memory for a smaller ring the larger one stays, which the next step uses.
void WindowStore::CancelStep() {
  old_->CancelStep();
  size_t rows = 0;
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].bounded_window = heads_[i].bounded_before;
    rows += OldRows(i) + heads_[i].n;
    try {
      if (heads_[i].ring_before == 0)
        heads_[i].ring = ExactRows{};
      else
        ResizeRing(i, heads_[i].ring_before);
    } catch (const std::exception&) {
    }
  }
  staging_.Free();
  budgets_ = budgets_before_;
  n_step_ = 0;
  begun_ = begun_before_;
  if (rows == 0) FreeOwn();
}

void WindowStore::EndStep() {
  old_->EndStep();
  for (size_t i = 0; i < heads_.size(); ++i) ResizeRing(i, RingRows(heads_[i], heads_[i].n));
  EndOwn();
  if (is_prompt_) staging_.Free();
  n_step_ = 0;
}

size_t WindowStore::SlackBytes(std::span<const size_t> budgets) const {
  size_t bytes = old_->SlackBytes(OldBudgets(budgets));
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& head = heads_[i];
    const size_t needed = std::max(head.n, shape_.grows ? 0 : head.bounded_window);
    const size_t tile = TileBytes(FormatsOf(i).keys) + TileBytes(FormatsOf(i).values);
    bytes += (head.ring.rows - std::min(head.ring.rows, needed)) * tile / kTileRows;
  }
  return bytes;
}

std::unique_ptr<KvStore> WindowStore::Clone(ByteCounter& counter) const {
  auto copy = MakeEmpty(counter);
  copy->old_.reset(static_cast<RowStore*>(old_->Clone(counter).release()));
  copy->begun_ = begun_;
  copy->budgets_ = budgets_;
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& from = heads_[i];
    Head& to = copy->heads_[i];
    to.ring = from.ring.Clone(counter);
    to.first = from.first;
    to.n = from.n;
    to.window = from.window;
    to.bounded_window = from.bounded_window;
  }
  copy->staging_.CopyFrom(staging_, counter);
  return copy;
}

// ---- Steps

// Where old rows are transformed, whole ones are, too: one query serves both.
void WindowStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  std::vector<float> transformed;
  if (old_->transforms(layer)) {
    const size_t size = n * Layer(layer).kv_dim();
    transformed.assign(keys, keys + size);
    transformed.insert(transformed.end(), values, values + size);
    old_->HadamardRows(layer, transformed.data(), 2 * n * Layer(layer).n_kv_heads);
    keys = transformed.data();
    values = keys + size;
  }
  WriteExact(formats_[layer], Layer(layer), first, n, keys, values,
             [&](size_t h) -> const ExactRows& { return staging_.At(layer, h); });
}

AttentionJob WindowStore::Job(const StoreQuery& query, size_t kv_head, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const Head& head = heads_[table_(query.layer, kv_head)];
  const ExactFormats& f = formats_[query.layer];
  const ExactRows& staging = staging_.At(query.layer, kv_head);
  const size_t n_step = query.first_query + query.n_queries;
  std::vector<RowSpan>&keys = list.NewSpans(), &values = list.NewSpans();
  old_->AddSpans(query.layer, kv_head, keys, values);
  MarkOldSpans(query.layer, kv_head, keys);
  const size_t straight = std::min(head.n, head.ring.rows - head.first);
  for (const auto& [slot, n] : {std::pair{head.first, straight}, {size_t{0}, head.n - straight}}) {
    if (n == 0) continue;
    keys.push_back({f.keys, head.ring.Region(f, RowSide::kKeys), slot, n});
    values.push_back({f.values, head.ring.Region(f, RowSide::kValues), slot, n});
  }
  keys.push_back({f.keys, staging.Region(f, RowSide::kKeys), 0, n_step});
  values.push_back({f.values, staging.Region(f, RowSide::kValues), 0, n_step});
  AttentionJob job = HeadJob(query, layer, kv_head, shape_.compute);
  job.keys = keys;
  job.values = values;
  job.n_past = n_rows(query.layer, kv_head) + query.first_query;
  return job;
}

void WindowStore::AddJobs(const StoreQuery& given, JobList& list) const {
  CHECK(given.read_positions.empty(), "keys are stored rotated");
  const StoreQuery query = old_->Transformed(given, list);
  for (size_t h = 0; h < Layer(query.layer).n_kv_heads; ++h) list.jobs.push_back(Job(query, h, list));
}

void WindowStore::Finish(const StoreQuery& query) const { old_->Finish(query); }

WindowStore::Place WindowStore::Find(size_t layer, size_t kv_head, size_t whole) const {
  const Head& head = heads_[table_(layer, kv_head)];
  if (whole >= head.n) return {&staging_.At(layer, kv_head), whole - head.n};
  return {&head.ring, (head.first + whole) % head.ring.rows};
}

std::unique_ptr<WindowStore> WindowStore::MakeEmpty(ByteCounter& counter) const {
  return std::make_unique<WindowStore>(counter, shape_, old_->types(), std::vector<size_t>{},
                                       WindowFormats{formats_[0].keys.type, formats_[0].values.type}, options_);
}

void WindowStore::WriteOld(size_t layer, size_t /*kv_head*/, const Place& from, std::byte* keys, std::byte* values,
                           size_t slot) const {
  const ExactFormats& f = formats_[layer];
  std::vector<float> row(Layer(layer).head_dim);
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues}) {
    const RowFormat& to = side == RowSide::kKeys ? old_->key_format(layer) : old_->value_format(layer);
    lesskv::ReadRows(f.Of(side), from.rows->Region(f, side), from.slot, 1, row.data(), row.size());
    WriteRows(to, side == RowSide::kKeys ? keys : values, slot, 1, row.data(), row.size());
  }
}

void WindowStore::ReadWholeKey(size_t layer, const Place& at, float* key) const {
  const ExactFormats& f = formats_[layer];
  lesskv::ReadRows(f.keys, at.rows->Region(f, RowSide::kKeys), at.slot, 1, key, Layer(layer).head_dim);
}

void WindowStore::ReadOld(size_t layer, size_t kv_head, uint32_t row, float* key, float* value) const {
  old_->ReadRows(layer, kv_head, {&row, 1}, key, value);
}

void WindowStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                           float* values) const {
  const ExactFormats& f = formats_[layer];
  const size_t d = Layer(layer).head_dim, old = old_->n_rows(layer, kv_head);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < old) {
      ReadOld(layer, kv_head, rows[i], keys + i * d, values + i * d);
      continue;
    }
    const Place at = Find(layer, kv_head, rows[i] - old);
    lesskv::ReadRows(f.keys, at.rows->Region(f, RowSide::kKeys), at.slot, 1, keys + i * d, d);
    lesskv::ReadRows(f.values, at.rows->Region(f, RowSide::kValues), at.slot, 1, values + i * d, d);
    if (!old_->transforms(layer)) continue;
    old_->HadamardRows(layer, keys + i * d, 1);
    old_->HadamardRows(layer, values + i * d, 1);
  }
}

WindowStore::Cut WindowStore::PlanCut(size_t layer, size_t kv_head, std::span<const Departure> leaving) const {
  const size_t i = table_(layer, kv_head), old = old_->n_rows(layer, kv_head), n_whole = heads_[i].n + n_step_;
  Cut cut;
  cut.n_rows = old + n_whole - leaving.size();
  size_t next = 0;
  while (next < leaving.size() && leaving[next].row < old) cut.old_leaving.push_back(leaving[next++]);
  for (uint32_t row = 0; row < n_whole; ++row) {
    if (next < leaving.size() && leaving[next].row == old + row)
      ++next;
    else
      cut.whole.push_back(row);
  }
  CHECK(next == leaving.size(), "rows leave that are not there, or not in order");
  const size_t old_kept = old - cut.old_leaving.size(), window = heads_[i].window;
  if (MovesOn() && cut.n_rows > window + old_kept) cut.entering = cut.n_rows - window - old_kept;
  const size_t room = evicts_ ? budgets_[i] - std::min(budgets_[i], window) : old_kept;
  size_t n_back = cut.entering > 0 ? 0 : old_kept - std::min(old_kept, room);
  for (size_t row = old, left = cut.old_leaving.size(); n_back > 0; --n_back) {
    while (left > 0 && cut.old_leaving[left - 1].row == row - 1) --row, --left;
    cut.back.push_back(static_cast<uint32_t>(--row));
  }
  std::reverse(cut.back.begin(), cut.back.end());
  for (const uint32_t row : cut.back) cut.old_leaving.push_back({row, Fate::kDrop});
  std::sort(cut.old_leaving.begin(), cut.old_leaving.end(),
            [](const Departure& a, const Departure& b) { return a.row < b.row; });
  return cut;
}

// The ring gets the whole rows that stay whole, behind those that came back (`back`: [rows][key, value]).
void WindowStore::KeepWhole(size_t layer, size_t kv_head, const Cut& cut, std::span<const float> back) {
  Head& head = heads_[table_(layer, kv_head)];
  const ExactFormats& f = formats_[layer];
  const size_t d = Layer(layer).head_dim, n = head.ring.rows, n_back = cut.back.size();
  if (n == 0) return;
  const bool has_own = cut.entering < cut.whole.size() && cut.whole[cut.entering] < head.n;
  const size_t base = has_own ? cut.whole[cut.entering] : 0;
  // Towards the ring's oldest row: a place is free by the time a row comes there.
  for (size_t i = cut.entering, to = base; i < cut.whole.size(); ++i, ++to) {
    if (cut.whole[i] == to && to < head.n) continue;
    const Place from = Find(layer, kv_head, cut.whole[i]);
    const size_t slot = (head.first + to) % n;
    CopyRow(f.keys, from.rows->Region(f, RowSide::kKeys), from.slot, head.ring.Region(f, RowSide::kKeys), slot);
    CopyRow(f.values, from.rows->Region(f, RowSide::kValues), from.slot, head.ring.Region(f, RowSide::kValues), slot);
  }
  head.first = (head.first + base + n - n_back) % n;
  for (size_t i = 0; i < n_back; ++i) {
    const size_t slot = (head.first + i) % n;
    WriteRows(f.keys, head.ring.Region(f, RowSide::kKeys), slot, 1, &back[i * 2 * d], d);
    WriteRows(f.values, head.ring.Region(f, RowSide::kValues), slot, 1, &back[i * 2 * d + d], d);
  }
}

// Moves rows to where they are after the step.
SlotMap WindowStore::MoveOn(size_t layer, size_t kv_head, const Cut& cut) {
  Head& head = heads_[table_(layer, kv_head)];
  const size_t old = old_->n_rows(layer, kv_head), n_before = head.n, d = Layer(layer).head_dim;
  std::vector<float> back(counter_->only_counts ? 0 : cut.back.size() * 2 * d);
  for (size_t i = 0; i * 2 * d < back.size(); ++i)
    ReadRows(layer, kv_head, {&cut.back[i], 1}, &back[i * 2 * d], &back[i * 2 * d + d]);
  if (old_->transforms(layer)) old_->HadamardRows(layer, back.data(), back.size() / d);
  const auto write = [&](size_t i, std::byte* keys, std::byte* values, size_t slot) {
    WriteOld(layer, kv_head, Find(layer, kv_head, cut.whole[i]), keys, values, slot);
  };
  const SlotMap moved = old_->CloseWith(layer, kv_head, cut.old_leaving, cut.entering, write);
  if (!counter_->only_counts) KeepWhole(layer, kv_head, cut, back);
  head.n = cut.n_rows - moved.n_rows;
  SlotMap map{cut.n_rows, {}, !cut.back.empty()};
  if (!evicts_) return map;  // old rows grow into the slots of those that were pruned: nothing moves
  for (const RowMove& move : moved.moves)
    map.moves.push_back(
        {move.from < old ? move.from : static_cast<uint32_t>(old + cut.whole[move.from - old]), move.to});
  auto to = static_cast<uint32_t>(moved.n_rows);
  for (const uint32_t row : cut.back) map.moves.push_back({row, to++});
  for (size_t i = cut.entering; i < cut.whole.size(); ++i, ++to) {
    const auto from = static_cast<uint32_t>(old + cut.whole[i]);
    if (from != to || cut.whole[i] >= n_before) map.moves.push_back({from, to});
  }
  return map;
}

SlotMap WindowStore::Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) {
  for (const Departure& departure : leaving)
    CHECK(departure.fate == Fate::kDrop || departure.fate == Fate::kAbsorb, "rows of this store are not rewritten");
  const Cut cut = PlanCut(layer, kv_head, leaving);
  // Not only where rows enter: how many stay is the division's, what memory the store takes is not.
  const Head& head = heads_[table_(layer, kv_head)];
  if (cut.entering > 0 || (MovesOn() && head.n + n_step_ > head.window)) BeforeRowsEnter(layer, kv_head, cut);
  return MoveOn(layer, kv_head, cut);
}

// ---- Saved state

// Whole tiles of the window's rows in the order of the text; rows beyond the last are zeros.
void WindowStore::SaveWhole(size_t head, ByteWriter& out) const {
  const Head& own = heads_[head];
  const ExactFormats& f = FormatsOf(head);
  ByteCounter scratch;
  const size_t rows = RoundUp(own.n, kTileRows);
  const ExactRows copy = ExactRows::Make(scratch, f, rows);
  for (const RowSide side : {RowSide::kKeys, RowSide::kValues}) CopyRing(f, side, own.ring, own.first, own.n, copy);
  out.Raw(copy.Region(f, RowSide::kKeys), rows / kTileRows * TileBytes(f.keys));
  out.Raw(copy.Region(f, RowSide::kValues), rows / kTileRows * TileBytes(f.values));
}

void WindowStore::LoadWhole(size_t head, ByteReader& in) {
  const ExactFormats& f = FormatsOf(head);
  const size_t tiles = CeilDiv(heads_[head].n, kTileRows);
  in.Raw(heads_[head].ring.Region(f, RowSide::kKeys), tiles * TileBytes(f.keys));
  in.Raw(heads_[head].ring.Region(f, RowSide::kValues), tiles * TileBytes(f.values));
}

void WindowStore::Save(ByteWriter& out) const {
  const bool begun = begun_ && !heads_.empty();
  out.Put<uint8_t>(begun);
  for (size_t i = 0; i < heads_.size() && begun; ++i) {
    for (const size_t n : {heads_[i].n, heads_[i].bounded_window}) out.Put<uint64_t>(n);
    SaveOwn(i, out);
    SaveWhole(i, out);
  }
  old_->Save(out);
}

void WindowStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  const auto begun = in.Get<uint8_t>();
  if (begun != (max_rows > 0 && !heads_.empty()))
    Fail(ErrorCode::kBadFile, "saved cache: {} does not say whether there are rows", begun);
  begun_ = begun;
  if (begun) ReserveOwn();
  const bool bounds = std::any_of(budgets.begin(), budgets.end(), [](size_t rows) { return rows > 0; });
  for (size_t i = 0; i < heads_.size() && begun; ++i) {
    Head& head = heads_[i];
    const size_t n = in.Count(options_.generated_piles_up ? max_rows : options_.window, "a head's number of whole rows");
    head.bounded_window = in.Count(bounds ? std::min(options_.window, budgets[i]) : 0, "a head's window");
    if (!shape_.grows && n > head.bounded_window)
      Fail(ErrorCode::kBadFile, "saved cache: {} whole rows in a window of {}", n, head.bounded_window);
    ResizeRing(i, RingRows(head, n));
    head.n = n;
    LoadOwn(i, in);
    LoadWhole(i, in);
  }
  if (bounds) budgets_.assign(budgets.begin(), budgets.end());
  old_->Load(in, OldBudgets(budgets), max_rows);
  CheckLoaded();
}

}  // namespace lesskv
