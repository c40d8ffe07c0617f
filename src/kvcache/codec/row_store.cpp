#include "kvcache/codec/row_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/rows/hadamard.h"
#include "kvcache/codec/head_job.h"

namespace lesskv {

RowStore::RowStore(ByteCounter& counter, const StoreShape& shape, const RowTypes& types, std::vector<size_t> key_dims,
                   size_t n_apart)
    : counter_(&counter),
      shape_(shape),
      types_(types),
      key_dims_(std::move(key_dims)),
      n_apart_(n_apart),
      table_(shape.layers),
      heads_(table_.size()) {
  for (const LayerShape& layer : shape.layers) {
    formats_.push_back({{types.keys, RowSide::kKeys, key_dims_.empty() ? layer.head_dim : key_dims_[formats_.size()]},
                        {types.values, RowSide::kValues, layer.head_dim},
                        types.rotate ? HadamardBlock(layer.head_dim) : 0});
    most_heads_ = std::max(most_heads_, layer.n_kv_heads);
    if (layer.head_dim > formats_[widest_].values.head_dim) widest_ = formats_.size() - 1;
  }
  staging_.resize(most_heads_);
  if (!shape.grows) return;
  for (Head& head : heads_) head.region_rows = shape.packs ? kTileRows : kBlockRows;
}

std::set<const CountedBuffer*> RowStore::Settled(const SettledRows& settled) const {
  std::set<const CountedBuffer*> full, others;
  for (size_t layer = 0; layer < shape_.layers.size() && shape_.keeps_all; ++layer) {
    for (size_t h = 0; h < Layer(layer).n_kv_heads; ++h) {
      const Head& head = At(layer, h);
      const size_t rows = std::min(head.n_rows, settled(layer, h));
      for (size_t r = 0; r < head.regions.size(); ++r)
        ((r + 1) * head.region_rows <= rows ? full : others).insert(head.regions[r].memory.get());
    }
  }
  for (const CountedBuffer* memory : others) full.erase(memory);
  return full;
}

std::unique_ptr<RowStore> RowStore::CloneWith(ByteCounter& counter, const SettledRows& settled) const {
  auto copy = std::make_unique<RowStore>(counter, shape_, types_, key_dims_, n_apart_);
  const std::set<const CountedBuffer*> stays = Settled(settled);
  std::map<const CountedBuffer*, std::shared_ptr<CountedBuffer>> copies;  // what regions lie in together stays so
  const auto copy_region = [&](Region& region) {
    if (region.memory == nullptr) return;
    const CountedBuffer& from = *region.memory;
    std::shared_ptr<CountedBuffer>& to = copies[&from];
    if (to == nullptr)
      to = std::make_shared<CountedBuffer>(stays.contains(&from) ? from.Share(counter) : from.Clone(counter));
    if (region.data != nullptr) region.data = to->data() + (region.data - from.data());
    region.memory = to;
  };
  copy->defers_ = defers_;
  copy->heads_ = heads_;
  copy->staging_ = staging_;
  for (std::vector<Head>* const heads : {&copy->heads_, &copy->staging_}) {
    for (Head& head : *heads) {
      copy_region(head.share.region);
      copy_region(head.tail.region);
      for (Region& region : head.regions) copy_region(region);
    }
  }
  return copy;
}

std::unique_ptr<KvStore> RowStore::Clone(ByteCounter& counter) const {
  return CloneWith(counter, [this](size_t layer, size_t kv_head) { return At(layer, kv_head).n_rows; });
}

void RowStore::AddShareable(const SettledRows& settled, std::vector<SharedPart>& parts) const {
  for (const CountedBuffer* memory : Settled(settled)) parts.push_back({memory->data(), memory->size()});
}

void RowStore::AddShareable(std::vector<SharedPart>& parts) const {
  AddShareable([this](size_t layer, size_t kv_head) { return At(layer, kv_head).n_rows; }, parts);
}

const RowStore::Region& RowStore::Writable(const Region& region) {
  CHECK(region.memory == nullptr || !region.memory->shared(), "rows of another cache would be written");
  return region;
}

std::byte* RowStore::Values(const Formats& formats, const Region& region, size_t region_rows) {
  return Keys(region) + RegionBytes(formats.keys, region_rows);
}

std::vector<RowStore::Region> RowStore::Allocate(ByteCounter& counter, std::span<const Formats* const> formats,
                                                 std::span<const size_t> rows) const {
  std::vector<Region> regions(formats.size());
  size_t bytes = 0;
  std::vector<size_t> offsets;
  for (size_t i = 0; i < regions.size(); ++i) {
    offsets.push_back(bytes);
    bytes = CheckedAdd(bytes, formats[i]->Bytes(rows[i]), "bytes of rows");
  }
  if (regions.empty()) return regions;
  const auto memory = std::make_shared<CountedBuffer>(counter, bytes);
  for (size_t i = 0; i < regions.size(); ++i)
    regions[i] = {memory, memory->data() == nullptr ? nullptr : memory->data() + offsets[i]};
  return regions;
}

// A new arena of `rows` rows in place of the head's old one; rows in slots below both sizes keep their slots.
void RowStore::ResizeArena(const Formats& formats, Head& head, size_t rows) {
  const size_t old_rows = head.region_rows;
  if (old_rows == rows && !head.regions.empty()) return;
  const Formats* const one[] = {&formats};
  std::vector<Region> arena = Allocate(*counter_, one, {&rows, 1});
  const size_t common = head.regions.empty() ? 0 : std::min(rows, old_rows);
  if (common > 0 && arena[0].data != nullptr) {
    const Region& from = head.regions[0];
    std::memcpy(arena[0].data, from.data, RegionBytes(formats.keys, common));
    std::memcpy(Values(formats, arena[0], rows), Values(formats, from, old_rows), RegionBytes(formats.values, common));
  }
  head.region_rows = rows;
  head.regions = std::move(arena);
}

void RowStore::Grow(std::span<const size_t> rows) {
  if (has_tails()) return FitAllTails(rows);
  if (n_apart_ >= table_.n_layers()) return GrowHeads(0, heads_.size(), rows);
  const size_t n_apart = table_(n_apart_, 0);
  std::vector<size_t> next(rows.size());
  for (bool more = true; more;) {  // a block of each head at a time
    more = false;
    for (size_t i = 0; i < next.size(); ++i) {
      next[i] = std::min(rows[i], heads_[i].capacity() + heads_[i].region_rows);
      more |= next[i] < rows[i];
    }
    GrowHeads(0, n_apart, next);
    GrowHeads(n_apart, heads_.size(), next);
  }
}

// Tails are fitted for those together that grow together: a layer's where its close says how many rows stay.
void RowStore::FitAllTails(std::span<const size_t> rows) {
  if (!shape_.exact_growth) return FitTails(0, rows);
  for (size_t layer = 0; layer < table_.n_layers(); ++layer)
    FitTails(table_(layer, 0), rows.subspan(table_(layer, 0), table_.n_heads(layer)));
}

void RowStore::GrowHeads(size_t first, size_t end, std::span<const size_t> rows) {
  for (const bool filled : {true, false}) {
    std::vector<size_t> missing(heads_.size());
    std::vector<const Formats*> formats;
    for (size_t i = first; i < end; ++i) {
      const size_t capacity = heads_[i].capacity(), block = heads_[i].region_rows;
      if (rows[i] <= capacity) continue;
      missing[i] = filled ? (rows[i] - capacity) / block : CeilDiv(rows[i] - capacity, block);
      formats.insert(formats.end(), missing[i], &FormatsOf(i));
    }
    const std::vector<size_t> block_rows(formats.size(), heads_.empty() ? 0 : heads_[0].region_rows);
    const std::vector<Region> blocks = Allocate(*counter_, formats, block_rows);
    for (size_t i = first, next = 0; i < end; ++i)
      for (size_t n = missing[i]; n > 0; --n) heads_[i].regions.push_back(blocks[next++]);
  }
}

// Room beside each other for rows[i] rows of head first_head + i. Layers of one head size share a region.
std::vector<RowStore::Share> RowStore::SideBySide(size_t first_head, std::span<const size_t> rows) const {
  std::map<size_t, std::pair<Region, size_t>> regions;  // by head size: what they share, and rows
  const auto size = [&](size_t i) { return FormatsOf(first_head + i).values.head_dim; };
  for (size_t i = 0; i < rows.size(); ++i) regions[size(i)].second += rows[i];
  std::map<size_t, size_t> next;
  std::vector<Share> shares;
  for (size_t i = 0; i < rows.size(); ++i) {
    auto& [region, n] = regions[size(i)];
    const size_t region_rows = RoundUp(n, kTileRows);
    const Formats* const formats[] = {&FormatsOf(first_head + i)};
    if (region.memory == nullptr && n > 0) region = Allocate(*counter_, formats, {&region_rows, 1})[0];
    size_t& first = next[size(i)];
    shares.push_back({region, region_rows, first, rows[i]});
    first += rows[i];
  }
  return shares;
}

void RowStore::FitTails(size_t first_head, std::span<const size_t> rows) {
  std::vector<size_t> whole(rows.size()), tails(rows.size());
  std::vector<const Formats*> formats;  // of blocks that are missing
  bool fit = true;
  for (size_t i = 0; i < rows.size(); ++i) {
    Head& head = heads_[first_head + i];
    const size_t all = std::max(rows[i], head.n_rows);
    const size_t behind = RoundUp(all - std::min(all, head.share.rows), kTailRows);
    whole[i] = behind / head.region_rows;
    tails[i] = behind % head.region_rows;
    fit &= whole[i] == head.regions.size() && tails[i] == head.tail.rows;
    if (whole[i] <= head.regions.size()) continue;
    formats.insert(formats.end(), whole[i] - head.regions.size(), &FormatsOf(first_head + i));
    head.regions.reserve(whole[i]);
  }
  if (fit) return;
  const std::vector<size_t> block_rows(formats.size(), heads_[first_head].region_rows);
  const std::vector<Region> blocks = Allocate(*counter_, formats, block_rows);
  const std::vector<Share> shares = SideBySide(first_head, tails);
  for (size_t i = 0, next = 0; i < rows.size(); ++i) {
    Head& head = heads_[first_head + i];
    const Formats& of = FormatsOf(first_head + i);
    const size_t kept = std::min(head.regions.size(), whole[i]), stay = head.share.rows + kept * head.region_rows;
    Head old;  // what lay behind the blocks that stay
    old.region_rows = head.region_rows;
    old.regions.assign(head.regions.begin() + static_cast<ptrdiff_t>(kept), head.regions.end());
    old.tail = head.tail;
    head.regions.resize(kept);
    while (head.regions.size() < whole[i]) head.regions.push_back(blocks[next++]);
    head.tail = shares[i];
    for (size_t row = stay; row < head.n_rows && !counter_->only_counts; ++row) {
      const Place from = FindIn(old, row - stay), to = FindIn(head, row);
      CopyRow(of.keys, DataAt(of, RowSide::kKeys, from), from.slot, DataAt(of, RowSide::kKeys, to), to.slot);
      CopyRow(of.values, DataAt(of, RowSide::kValues, from), from.slot, DataAt(of, RowSide::kValues, to), to.slot);
    }
  }
}

// The arena as it was before Reserve. Without memory for a smaller copy the larger one stays, which the next step uses.
void RowStore::TakeBackArena(const Formats& formats, Head& head) {
  if (head.rows_before == 0) {
    head.regions.clear();
    head.region_rows = 0;
    return;
  }
  try {
    ResizeArena(formats, head, head.rows_before);
  } catch (const std::exception&) {
  }
}

// Gives back blocks beyond the resident rows.
void RowStore::Trim(Head& head) {
  while (!head.regions.empty() && head.capacity() - head.region_rows >= head.n_rows) head.regions.pop_back();
}

// Without memory for shorter ones the longer stay.
void RowStore::ShrinkTails() {
  if (!has_tails()) return;
  try {
    FitAllTails(std::vector<size_t>(heads_.size()));
  } catch (const std::exception&) {
  }
}

void RowStore::ReserveStaging(const StepRoom& room) {
  const size_t rows = room.evicts ? RoundUp(room.n_step, kTileRows) : 0;
  const size_t n = room.defers ? table_.size() : most_heads_;
  if (staging_.size() != n || defers_ != room.defers) staging_ = std::vector<Head>(n);
  defers_ = room.defers;
  for (size_t i = 0; i < n; ++i) {
    Head& head = staging_[i];
    if (rows == 0)
      head = Head{};
    else if (head.capacity() != rows)
      head = Head{}, ResizeArena(StagingFormats(i), head, rows);
  }
}

// Room beside each other for heads [first_head, first_head + rows.size()), which move there when they are closed.
void RowStore::Pack(size_t first_head, std::span<const size_t> rows) {
  std::vector<Share> shares = SideBySide(first_head, rows);
  for (size_t i = 0; i < rows.size(); ++i) {
    heads_[first_head + i].moves = true;
    heads_[first_head + i].next = std::move(shares[i]);
  }
}

// Rows of a share for a head that gets n and may keep so many. A store that grows has other room for those to come.
size_t RowStore::ShareRows(size_t n, size_t budget) const { return shape_.grows ? std::min(n, budget) : RowsAhead(n, budget); }

// Where budgets come later a layer's sum is known, and SetBudgets divides it: room for any division, in which a head with few
// rows may leave its part to others. Across layers nothing is known yet.
void RowStore::ReserveShares(const StepRoom& room) {
  if (!room.evicts || (room.budgets_later && room.defers)) return;
  std::vector<size_t> rows(room.budgets.begin(), room.budgets.end());
  bool same = !room.budgets_later;
  for (size_t i = 0; i < heads_.size(); ++i) {
    rows[i] = ShareRows(heads_[i].most_rows, rows[i]);
    same &= heads_[i].share.rows == rows[i];
  }
  for (size_t layer = 0; layer < table_.n_layers() && room.budgets_later; ++layer) {
    const size_t first = table_(layer, 0), n = table_.n_heads(layer);
    const size_t all = std::accumulate(&room.budgets[first], &room.budgets[first] + n, size_t{0});
    size_t most = 0, given = 0;
    for (size_t i = first; i < first + n; ++i) most += ShareRows(heads_[i].most_rows, all), given += rows[i];
    rows[first] += std::min(all, most) - given;
  }
  if (!same) Pack(0, rows);
}

void RowStore::ReserveHeads(const StepRoom& room, std::span<const size_t> entering) {
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].rows_before = heads_[i].regions.empty() ? 0 : heads_[i].region_rows;
    heads_[i].most_rows = heads_[i].n_rows + entering[i];
  }
  if (shape_.packs) ReserveShares(room);
  std::vector<size_t> grown(heads_.size());
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    const size_t all = head.most_rows;
    if (!room.evicts)
      grown[i] = all;
    else if (shape_.packs)
      continue;
    else if (shape_.grows)
      grown[i] = room.budgets_later ? head.n_rows : std::max(head.n_rows, std::min(all, room.budgets[i]));
    else if (const size_t rows = RoundUp(RowsAhead(all, room.budgets[i]), kTileRows); head.capacity() < rows)
      ResizeArena(FormatsOf(i), head, rows);
  }
  if (shape_.grows || !room.evicts) Grow(grown);
  budgets_.assign(room.budgets.begin(), room.budgets.end());
}

void RowStore::Reserve(const StepRoom& room) {
  try {
    ReserveHeads(room, std::vector<size_t>(heads_.size(), room.n_step));
    ReserveStaging(room);
  } catch (...) {
    CancelStep();
    throw;
  }
  n_step_ = room.n_step;
  evicts_ = room.evicts;
  is_prompt_ = room.is_prompt;
}

void RowStore::ReserveRows(const StepRoom& room, std::span<const size_t> entering) {
  try {
    ReserveHeads(room, entering);
  } catch (...) {
    CancelStep();
    throw;
  }
  n_step_ = 0;  // nothing waits here
  evicts_ = room.evicts;
  is_prompt_ = room.is_prompt;
  defers_ = room.defers;
}

void RowStore::SetBudgets(size_t first_layer, std::span<const size_t> budgets) {
  CHECK(shape_.packs || shape_.exact_growth, "budgets that come later are those of a packed store, or one that grows by them");
  const size_t first_head = table_(first_layer, 0);
  if (shape_.exact_growth) return FitTails(first_head, budgets);
  std::copy(budgets.begin(), budgets.end(), budgets_.begin() + static_cast<ptrdiff_t>(first_head));
  std::vector<size_t> rows(budgets.begin(), budgets.end());
  for (size_t h = 0; h < rows.size(); ++h) rows[h] = ShareRows(heads_[first_head + h].most_rows, rows[h]);
  if (defers_) return Pack(first_head, rows);
  size_t next = heads_[first_head].next.first;
  for (size_t h = 0; h < rows.size(); ++h) {
    heads_[first_head + h].next.first = next;
    heads_[first_head + h].next.rows = rows[h];
    next += rows[h];
  }
}

void RowStore::CancelStep() {
  for (size_t i = 0; i < heads_.size(); ++i) {
    heads_[i].moves = false;
    heads_[i].next = Share{};
    if (shape_.grows && !has_tails())
      Trim(heads_[i]);
    else if (!shape_.grows && !shape_.packs)
      TakeBackArena(FormatsOf(i), heads_[i]);
  }
  ShrinkTails();
  for (Head& head : staging_) head = Head{};
  n_step_ = 0;
}

void RowStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  const Formats& formats = formats_[layer];
  const size_t d = Layer(layer).head_dim, n_kv = Layer(layer).n_kv_heads, stride = n_kv * d;
  std::vector<float> transformed;
  if (formats.hadamard_block > 0) {
    transformed.assign(keys, keys + n * stride);
    transformed.insert(transformed.end(), values, values + n * stride);
    HadamardRows(layer, transformed.data(), 2 * n * n_kv);
    keys = transformed.data();
    values = keys + n * stride;
  }
  ParallelFor(n_kv, [&](size_t h) {
    Head& head = evicts_ ? Staging(layer, h) : At(layer, h);
    const size_t first_row = (evicts_ ? 0 : head.n_rows) + first;
    for (size_t done = 0; done < n;) {
      const Place at = FindIn(head, first_row + done);
      const size_t run = std::min(n - done, at.run);
      const size_t offset = done * stride + h * d;
      WriteRows(formats.keys, Keys(Writable(*at.region)), at.slot, run, keys + offset, stride);
      WriteRows(formats.values, Values(formats, *at.region, at.region_rows), at.slot, run, values + offset, stride);
      done += run;
    }
  });
}

void RowStore::HadamardRows(size_t layer, float* rows, size_t n) const {
  constexpr size_t kRowsATask = 256;
  const size_t d = Layer(layer).head_dim, block = formats_[layer].hadamard_block;
  ParallelFor(CeilDiv(n, kRowsATask), [&](size_t task) {
    const size_t first = task * kRowsATask, count = std::min(kRowsATask, n - first);
    Hadamard(rows + first * d, count * d, block);
  });
}

// Rows [first, end) of a head's own memory.
void RowStore::AppendSpans(const Formats& formats, const Head& head, size_t first, size_t end,
                           std::vector<RowSpan>& keys, std::vector<RowSpan>& values) {
  for (size_t row = first; row < end;) {
    const Place at = FindIn(head, row);
    const size_t n = std::min(at.run, end - row);
    keys.push_back({formats.keys, Keys(*at.region), at.slot, n});
    values.push_back({formats.values, Values(formats, *at.region, at.region_rows), at.slot, n});
    row += n;
  }
}

void RowStore::AddSpans(size_t layer, size_t kv_head, std::vector<RowSpan>& keys, std::vector<RowSpan>& values) const {
  AppendSpans(formats_[layer], At(layer, kv_head), 0, At(layer, kv_head).n_rows, keys, values);
}

// Nothing depends on where a row is read when nothing is rotated.
bool RowStore::ReadsAtPositions(const StoreQuery& query) const {
  return !query.read_positions.empty() && Layer(query.layer).rope->n_dims() > 0;
}

bool RowStore::Transforms(const StoreQuery& query) const {
  return formats_[query.layer].hadamard_block > 0 && !ReadsAtPositions(query);
}

AttentionJob RowStore::Job(const StoreQuery& query, size_t kv_head, JobList& list) const {
  const LayerShape& layer = Layer(query.layer);
  const Formats& formats = formats_[query.layer];
  const Head& head = At(query.layer, kv_head);
  const size_t n_step = query.first_query + query.n_queries;
  std::vector<RowSpan>&keys = list.NewSpans(), &values = list.NewSpans();
  AddSpans(query.layer, kv_head, 0, head.n_rows + n_step, keys, values);
  AttentionJob job = HeadJob(query, layer, kv_head, shape_.compute);
  job.keys = keys;
  job.values = values;
  job.n_past = head.n_rows + query.first_query;
  if (job.rope != nullptr) job.key_hadamard_block = formats.hadamard_block;
  return job;
}

void RowStore::AddSpans(size_t layer, size_t kv_head, size_t first, size_t n, std::vector<RowSpan>& keys,
                        std::vector<RowSpan>& values) const {
  const Formats& formats = formats_[layer];
  const Head& head = At(layer, kv_head);
  const size_t end = first + n, own = evicts_ ? head.n_rows : end;
  if (first < own) AppendSpans(formats, head, first, std::min(end, own), keys, values);
  if (end > own) AppendSpans(formats, Staging(layer, kv_head), std::max(first, own) - own, end - own, keys, values);
}

StoreQuery RowStore::Transformed(const StoreQuery& given, JobList& list) const {
  StoreQuery query = given;
  if (!Transforms(query)) return query;
  const LayerShape& layer = Layer(query.layer);
  std::vector<float>& queries = list.NewFloats();
  queries.assign(query.queries, query.queries + query.n_queries * layer.q_dim());
  HadamardRows(query.layer, queries.data(), query.n_queries * layer.n_heads);
  query.queries = queries.data();
  return query;
}

void RowStore::AddJobs(const StoreQuery& given, JobList& list) const {
  const StoreQuery query = Transformed(given, list);
  for (size_t h = 0; h < Layer(query.layer).n_kv_heads; ++h) list.jobs.push_back(Job(query, h, list));
}

// Values are stored transformed also where keys are taken back row by row.
void RowStore::Finish(const StoreQuery& query) const {
  if (formats_[query.layer].hadamard_block > 0)
    HadamardRows(query.layer, query.out, query.n_queries * Layer(query.layer).n_heads);
}

RowStore::Place RowStore::FindIn(const Head& head, size_t row) {
  const Share& share = head.share;
  if (row < share.rows) return {&share.region, share.region_rows, share.first + row, share.rows - row};
  const size_t behind = row - share.rows, region = behind / head.region_rows, slot = behind % head.region_rows;
  if (region < head.regions.size()) return {&head.regions[region], head.region_rows, slot, head.region_rows - slot};
  return {&head.tail.region, head.tail.region_rows, head.tail.first + slot, head.tail.rows - slot};
}

RowStore::Place RowStore::Find(size_t layer, size_t kv_head, uint32_t row) const {
  const Head& own = At(layer, kv_head);
  if (evicts_ && row >= own.n_rows) return FindIn(Staging(layer, kv_head), row - own.n_rows);
  return FindIn(own, row);
}

void RowStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                        float* values) const {
  const Formats& formats = formats_[layer];
  const size_t d = Layer(layer).head_dim, key_dim = formats.keys.head_dim;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Place at = Find(layer, kv_head, rows[i]);
    lesskv::ReadRows(formats.keys, Keys(*at.region), at.slot, 1, keys + i * key_dim, key_dim);
    lesskv::ReadRows(formats.values, Values(formats, *at.region, at.region_rows), at.slot, 1, values + i * d, d);
  }
  if (formats.hadamard_block == 0) return;
  Hadamard(keys, rows.size() * d, formats.hadamard_block);
  Hadamard(values, rows.size() * d, formats.hadamard_block);
}

void RowStore::RewriteValues(size_t layer, size_t kv_head, std::span<const uint32_t> rows, const float* values) {
  const Formats& formats = formats_[layer];
  const size_t d = Layer(layer).head_dim;
  std::vector<float> own(values, values + rows.size() * d);
  if (formats.hadamard_block > 0) Hadamard(own.data(), own.size(), formats.hadamard_block);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Place at = Find(layer, kv_head, rows[i]);
    WriteRows(formats.values, Values(formats, Writable(*at.region), at.region_rows), at.slot, 1, &own[i * d], d);
  }
}

// Averages rows that depart by Fate::kMerge into their targets, in floats, each target written once.
void RowStore::Merge(size_t layer, size_t kv_head, std::span<const Departure> leaving) {
  const size_t d = Layer(layer).head_dim;
  std::map<uint32_t, std::vector<const Departure*>> by_target;
  for (const Departure& departure : leaving)
    if (departure.fate == Fate::kMerge) by_target[departure.target].push_back(&departure);
  std::vector<float> keys(d), values(d), merged_keys(d), merged_values(d);
  for (const auto& [target, parts] : by_target) {
    const Formats& formats = formats_[layer];
    ReadRows(layer, kv_head, {&target, 1}, merged_keys.data(), merged_values.data());
    float rest = 1;
    for (const Departure* part : parts) rest -= part->share;
    Scale(merged_keys.data(), rest, d);
    Scale(merged_values.data(), rest, d);
    for (const Departure* part : parts) {
      ReadRows(layer, kv_head, {&part->row, 1}, keys.data(), values.data());
      for (size_t c = 0; c < d; ++c) merged_keys[c] += part->share * keys[c];
      for (size_t c = 0; c < d; ++c) merged_values[c] += part->share * values[c];
    }
    if (formats.hadamard_block > 0) {
      Hadamard(merged_keys.data(), d, formats.hadamard_block);
      Hadamard(merged_values.data(), d, formats.hadamard_block);
    }
    const Place at = Find(layer, kv_head, target);
    WriteRows(formats.keys, Keys(Writable(*at.region)), at.slot, 1, merged_keys.data(), d);
    WriteRows(formats.values, Values(formats, *at.region, at.region_rows), at.slot, 1, merged_values.data(), d);
  }
}

// A row of the head, or one that enters, to a slot.
void RowStore::Bring(size_t layer, size_t kv_head, size_t row, const Region& to, size_t to_rows, size_t slot,
                     const WriteRow* write) {
  const Formats& formats = formats_[layer];
  const size_t n_rows = At(layer, kv_head).n_rows;
  if (write != nullptr && row >= n_rows) return (*write)(row - n_rows, Keys(to), Values(formats, to, to_rows), slot);
  const Place from = Find(layer, kv_head, static_cast<uint32_t>(row));
  CopyRow(formats.keys, Keys(*from.region), from.slot, Keys(to), slot);
  CopyRow(formats.values, Values(formats, *from.region, from.region_rows), from.slot, Values(formats, to, to_rows),
          slot);
}

// Rows in the order of the slot map to the head's new share.
void RowStore::Move(Head& head, size_t layer, size_t kv_head, const SlotMap& map, const WriteRow* write) {
  CHECK(map.n_rows <= head.next.rows, "{} rows for a share of {}", map.n_rows, head.next.rows);
  std::vector<uint32_t> rows(counter_->only_counts ? 0 : map.n_rows);
  for (uint32_t slot = 0; slot < rows.size(); ++slot) rows[slot] = slot;
  for (const RowMove& move : map.moves)
    if (move.to < rows.size()) rows[move.to] = move.from;
  const Share& to = head.next;
  for (size_t slot = 0; slot < rows.size(); ++slot)
    Bring(layer, kv_head, rows[slot], to.region, to.region_rows, to.first + slot, write);
  head.left = std::move(head.regions);
  head.left.push_back(std::move(head.share.region));
  head.left.push_back(std::exchange(head.tail, Share{}).region);
  head.regions.clear();
  head.share = std::exchange(head.next, Share{});
  head.moves = false;
}

void RowStore::CopyRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, std::byte* keys,
                        std::byte* values) const {
  const Formats& formats = formats_[layer];
  for (size_t i = 0; i < rows.size(); ++i) {
    const Place from = Find(layer, kv_head, rows[i]);
    CopyRow(formats.keys, Keys(*from.region), from.slot, keys, i);
    CopyRow(formats.values, Values(formats, *from.region, from.region_rows), from.slot, values, i);
  }
}

// Cycle by cycle, the first row of each held aside.
void RowStore::Reorder(size_t layer, size_t kv_head, size_t first, std::span<const uint32_t> from) {
  const Formats& formats = formats_[layer];
  const Head& head = At(layer, kv_head);
  const size_t key_bytes = RegionBytes(formats.keys, kTileRows), value_bytes = RegionBytes(formats.values, kTileRows);
  std::vector<std::byte> space(key_bytes + value_bytes + kRegionAlign);
  void* aside = space.data();
  size_t room = space.size();
  auto* const aside_keys = static_cast<std::byte*>(std::align(kRegionAlign, key_bytes + value_bytes, aside, room));
  std::byte* const aside_values = aside_keys + key_bytes;
  std::vector<char> done(from.size());
  for (size_t start = 0; start < from.size(); ++start) {
    if (done[start] != 0 || from[start] == start) continue;
    Place to = FindIn(head, first + start);
    CopyRow(formats.keys, Keys(*to.region), to.slot, aside_keys, 0);
    CopyRow(formats.values, Values(formats, *to.region, to.region_rows), to.slot, aside_values, 0);
    size_t i = start;
    for (; from[i] != start; i = from[i]) {
      const Place next = FindIn(head, first + from[i]);
      CopyRow(formats.keys, Keys(*next.region), next.slot, Keys(Writable(*to.region)), to.slot);
      CopyRow(formats.values, Values(formats, *next.region, next.region_rows), next.slot,
              Values(formats, *to.region, to.region_rows), to.slot);
      done[i] = 1;
      to = next;
    }
    done[i] = 1;
    CopyRow(formats.keys, aside_keys, 0, Keys(Writable(*to.region)), to.slot);
    CopyRow(formats.values, aside_values, 0, Values(formats, *to.region, to.region_rows), to.slot);
  }
}

SlotMap RowStore::Close(size_t layer, size_t kv_head, std::span<const Departure> leaving) {
  Head& head = At(layer, kv_head);
  if (!evicts_) {
    CHECK(leaving.empty(), "{} rows leave in a step that evicts nothing", leaving.size());
    head.n_rows += n_step_;
    return {head.n_rows, {}};
  }
  for (const Departure& departure : leaving) {
    CHECK(departure.fate != Fate::kOffload, "rows of this store cannot be offloaded");
    if (departure.fate == Fate::kMerge && counter_->only_counts == false) {
      Merge(layer, kv_head, leaving);
      break;
    }
  }
  return Compact(layer, kv_head, leaving, n_step_, nullptr);
}

SlotMap RowStore::CloseWith(size_t layer, size_t kv_head, std::span<const Departure> leaving, size_t n_entering,
                            const WriteRow& write) {
  return Compact(layer, kv_head, leaving, n_entering, &write);
}

SlotMap RowStore::Compact(size_t layer, size_t kv_head, std::span<const Departure> leaving, size_t n_new,
                          const WriteRow* write) {
  Head& head = At(layer, kv_head);
  SlotMap map = PlanCompaction(head.n_rows, n_new, leaving);
  if (head.moves) {
    Move(head, layer, kv_head, map, write);
  } else {
    for (size_t i = 0; i < map.moves.size() && !counter_->only_counts; ++i) {
      const Place to = FindIn(head, map.moves[i].to);
      Bring(layer, kv_head, map.moves[i].from, Writable(*to.region), to.region_rows, to.slot, write);
    }
  }
  head.n_rows = map.n_rows;
  return map;
}

void RowStore::EndStep() {
  for (size_t i = 0; i < heads_.size() && evicts_; ++i) {
    Head& head = heads_[i];
    head.left.clear();
    if (shape_.grows && !has_tails())
      Trim(head);
    else if (!shape_.grows && !shape_.packs)
      ResizeArena(FormatsOf(i), head, RoundUp(std::clamp(head.capacity(), RowsAhead(head.n_rows, budgets_[i]), budgets_[i]), kTileRows));
  }
  if (is_prompt_)
    for (Head& head : staging_) head = Head{};
  n_step_ = 0;
}

size_t RowStore::SlackBytes(std::span<const size_t> budgets) const {
  size_t bytes = 0;
  std::map<const CountedBuffer*, size_t> shared;  // bytes of a region that no head has
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& head = heads_[i];
    const size_t tile = TileBytes(FormatsOf(i).keys) + TileBytes(FormatsOf(i).values);
    const size_t needed = std::max(head.n_rows, budgets.empty() ? 0 : budgets[i]);
    bytes += (head.capacity() - std::min(head.capacity(), needed)) * tile / kTileRows;
    for (const Share* share : {&head.share, &head.tail}) {
      if (share->region_rows == 0) continue;
      const auto [at, first] = shared.try_emplace(share->region.memory.get(), share->region_rows * tile / kTileRows);
      at->second -= share->rows * tile / kTileRows;
    }
  }
  for (const auto& [region, rest] : shared) bytes += rest;
  return bytes;
}

std::byte* RowStore::DataAt(const Formats& formats, RowSide side, const Place& at) {
  return side == RowSide::kKeys ? Keys(*at.region) : Values(formats, *at.region, at.region_rows);
}

std::byte* RowStore::WholeTile(const Formats& formats, RowSide side, const Head& head, size_t row) const {
  const Place first = FindIn(head, row);
  if (head.n_rows - row < kTileRows || first.slot % kTileRows != 0 || first.run < kTileRows) return nullptr;
  const RowFormat& format = side == RowSide::kKeys ? formats.keys : formats.values;
  return DataAt(formats, side, first) + first.slot / kTileRows * TileBytes(format);
}

// One tile of a head's keys or values from `row` on. Rows beyond the last are written as zeros: what left the cache does
// not leave in a file.
void RowStore::SaveTile(const Formats& formats, RowSide side, const Head& head, size_t row, ByteWriter& out) const {
  const RowFormat& format = side == RowSide::kKeys ? formats.keys : formats.values;
  if (const std::byte* tile = WholeTile(formats, side, head, row)) return out.Raw(tile, TileBytes(format));
  ByteCounter scratch;
  CountedBuffer copy(scratch, RegionBytes(format, kTileRows));
  const std::vector<float> zeros(format.head_dim, 0.0f);
  WriteRows(format, copy.data(), 0, kTileRows, zeros.data(), 0);
  for (size_t i = 0; i < std::min(kTileRows, head.n_rows - row); ++i) {
    const Place from = FindIn(head, row + i);
    CopyRow(format, DataAt(formats, side, from), from.slot, copy.data(), i);
  }
  out.Raw(copy.data(), TileBytes(format));
}

void RequireFiniteScales(const RowFormat& format, const std::byte* tile) {
  if (format.type != RowType::kQ8 && format.type != RowType::kQ4) return;
  std::vector<float> rows(kTileRows * format.head_dim);
  ReadRows(format, tile, 0, kTileRows, rows.data(), format.head_dim);
  if (!std::ranges::all_of(rows, [](float x) { return std::isfinite(x); }))
    Fail(ErrorCode::kBadFile, "saved cache: a row of {} has a scale that is not finite", Name(format.type));
}

void RowStore::LoadTile(const Formats& formats, RowSide side, const Head& head, size_t row, ByteReader& in) const {
  const RowFormat& format = side == RowSide::kKeys ? formats.keys : formats.values;
  if (std::byte* tile = WholeTile(formats, side, head, row)) {
    in.Raw(tile, TileBytes(format));
    return RequireFiniteScales(format, tile);
  }
  ByteCounter scratch;
  CountedBuffer copy(scratch, RegionBytes(format, kTileRows));
  in.Raw(copy.data(), TileBytes(format));
  RequireFiniteScales(format, copy.data());
  for (size_t i = 0; i < std::min(kTileRows, head.n_rows - row); ++i) {
    const Place to = FindIn(head, row + i);
    CopyRow(format, copy.data(), i, DataAt(formats, side, to), to.slot);
  }
}

void RowStore::Save(ByteWriter& out) const {
  for (size_t i = 0; i < heads_.size(); ++i) {
    const Head& head = heads_[i];
    const Formats& formats = FormatsOf(i);
    out.Put<uint64_t>(head.n_rows);
    for (size_t row = 0; row < head.n_rows; row += kTileRows) {
      SaveTile(formats, RowSide::kKeys, head, row, out);
      SaveTile(formats, RowSide::kValues, head, row, out);
    }
  }
}

// How many rows each head has, of what Load is about to read.
std::vector<size_t> RowStore::SavedRows(ByteReader in, std::span<const size_t> budgets, size_t max_rows) const {
  std::vector<size_t> rows;
  for (size_t i = 0; i < heads_.size(); ++i) {
    rows.push_back(in.Count(shape_.grows ? max_rows : std::min(max_rows, budgets[i]), "a head's number of rows"));
    in.Skip(CeilDiv(rows[i], kTileRows) * (TileBytes(FormatsOf(i).keys) + TileBytes(FormatsOf(i).values)));
  }
  return rows;
}

void RowStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  const std::vector<size_t> saved = SavedRows(in, budgets, max_rows);
  if (shape_.packs) {
    std::vector<size_t> rows(budgets.begin(), budgets.end());
    for (size_t& n : rows) n = ShareRows(max_rows, n);
    std::vector<Share> shares = SideBySide(0, rows);
    for (size_t i = 0; i < heads_.size(); ++i) heads_[i].share = std::move(shares[i]);
  }
  if (has_tails()) FitAllTails(saved);
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    const Formats& formats = FormatsOf(i);
    in.Skip(sizeof(uint64_t));
    if (shape_.grows && !has_tails()) {
      const size_t filled = saved[i] / head.region_rows;
      head.regions.clear();
      const size_t all = CeilDiv(saved[i], head.region_rows), most = n_apart_ < table_.n_layers() ? 1 : all;
      for (size_t done = 0, n; done < all; done += n) {  // a full block lies with such only
        n = std::min(most, done < filled ? filled - done : all - done);
        const std::vector<const Formats*> blocks(n, &formats);
        for (Region& region : Allocate(*counter_, blocks, std::vector<size_t>(n, head.region_rows)))
          head.regions.push_back(std::move(region));
      }
    } else if (!shape_.grows && !shape_.packs) {
      ResizeArena(formats, head, RoundUp(RowsAhead(saved[i], budgets[i]), kTileRows));
    }
    head.n_rows = saved[i];
    for (size_t row = 0; row < head.n_rows; row += kTileRows) {
      LoadTile(formats, RowSide::kKeys, head, row, in);
      LoadTile(formats, RowSide::kValues, head, row, in);
    }
  }
}

}  // namespace lesskv
