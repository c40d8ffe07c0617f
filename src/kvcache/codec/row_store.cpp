#include "kvcache/codec/row_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/basic/basic.h"
#include "kernels/rows/hadamard.h"

namespace lesskv {
namespace {

// Transformed copies of the calling thread: nothing in them outlives a call.
struct TransformedRows {
  std::vector<float> keys, values, queries;
};

TransformedRows& Work() {
  thread_local TransformedRows rows;
  return rows;
}

}  // namespace

RowStore::RowStore(ByteCounter& counter, const CacheShape& shape, const RowStoreOptions& options)
    : counter_(&counter),
      shape_(shape),
      options_(options),
      key_format_{options.types.keys, RowSide::kKeys, shape.head_dim},
      value_format_{options.types.values, RowSide::kValues, shape.head_dim},
      hadamard_block_(options.types.rotate ? HadamardBlock(shape.head_dim) : 0),
      heads_(shape.n_layers * shape.n_kv_heads),
      staging_(shape.n_kv_heads) {
  if (!options.grows) return;
  for (Head& head : heads_) head.region_rows = kBlockRows;
}

size_t RowStore::BytesFor(size_t rows) const {
  return RegionBytes(key_format_, rows) + RegionBytes(value_format_, rows);
}

std::unique_ptr<KvStore> RowStore::Clone(ByteCounter& counter) const {
  auto copy = std::make_unique<RowStore>(counter, shape_, options_);
  const auto clone = [&](const std::vector<Head>& from, std::vector<Head>& to) {
    for (size_t i = 0; i < from.size(); ++i) {
      to[i].region_rows = from[i].region_rows;
      to[i].n_rows = from[i].n_rows;
      to[i].regions = Allocate(counter, from[i].regions.size(), from[i].region_rows);
      for (size_t r = 0; r < to[i].regions.size(); ++r)
        if (from[i].regions[r].data != nullptr)
          std::memcpy(to[i].regions[r].data, from[i].regions[r].data, BytesFor(from[i].region_rows));
    }
  };
  clone(heads_, copy->heads_);
  clone(staging_, copy->staging_);
  return copy;
}

std::byte* RowStore::Values(const Region& region, size_t region_rows) const {
  return Keys(region) + RegionBytes(key_format_, region_rows);
}

std::vector<RowStore::Region> RowStore::Allocate(ByteCounter& counter, size_t n, size_t rows) const {
  std::vector<Region> regions(n);
  if (n == 0) return regions;
  const size_t bytes = BytesFor(rows);
  const auto memory = std::make_shared<CountedBuffer>(counter, CheckedMul(n, bytes, "bytes of rows"));
  for (size_t i = 0; i < n; ++i)
    regions[i] = {memory, memory->data() == nullptr ? nullptr : memory->data() + i * bytes};
  return regions;
}

// A new arena of `rows` rows in place of the head's old one; rows in slots below both sizes keep their slots.
void RowStore::ResizeArena(Head& head, size_t rows) {
  const size_t old_rows = head.region_rows;
  if (old_rows == rows && !head.regions.empty()) return;
  std::vector<Region> arena = Allocate(*counter_, 1, rows);
  const size_t common = head.regions.empty() ? 0 : std::min(rows, old_rows);
  if (common > 0 && arena[0].data != nullptr) {
    const Region& from = head.regions[0];
    std::memcpy(arena[0].data, from.data, RegionBytes(key_format_, common));
    std::memcpy(Values(arena[0], rows), Values(from, old_rows), RegionBytes(value_format_, common));
  }
  head.region_rows = rows;
  head.regions = std::move(arena);
}

void RowStore::Grow(std::span<const size_t> rows) {
  const auto missing = [&](size_t i) {
    const size_t capacity = heads_[i].capacity();
    return rows[i] > capacity ? (rows[i] - capacity + kBlockRows - 1) / kBlockRows : 0;
  };
  size_t n_blocks = 0;
  for (size_t i = 0; i < heads_.size(); ++i) n_blocks += missing(i);
  const std::vector<Region> blocks = Allocate(*counter_, n_blocks, kBlockRows);
  for (size_t i = 0, next = 0; i < heads_.size(); ++i)
    for (size_t n = missing(i); n > 0; --n) heads_[i].regions.push_back(blocks[next++]);
}

// The arena as it was before Reserve. Without memory for a smaller copy the larger one stays, which the next step uses.
void RowStore::TakeBackArena(Head& head) {
  if (head.rows_before == 0) {
    head.regions.clear();
    head.region_rows = 0;
    return;
  }
  try {
    ResizeArena(head, head.rows_before);
  } catch (const Error&) {
  }
}

// Gives back blocks beyond the resident rows.
void RowStore::Trim(Head& head) {
  while (!head.regions.empty() && head.capacity() - head.region_rows >= head.n_rows) head.regions.pop_back();
}

void RowStore::Reserve(const StepRoom& room) {
  try {
    for (Head& head : heads_) head.rows_before = head.regions.empty() ? 0 : head.region_rows;
    std::vector<size_t> grown(heads_.size());
    for (size_t i = 0; i < heads_.size(); ++i) {
      Head& head = heads_[i];
      const size_t all = head.n_rows + room.n_step;
      if (!room.evicts)
        grown[i] = all;
      else if (options_.grows)
        grown[i] = std::max(head.n_rows, std::min(all, room.budgets[i]));
      else if (head.capacity() < room.budgets[i])
        ResizeArena(head, RoundUp(room.budgets[i], kTileRows));
    }
    Grow(grown);
    const size_t staging_rows = room.evicts ? RoundUp(room.n_step, kTileRows) : 0;
    for (Head& head : staging_) {
      if (staging_rows == 0)
        head = Head{};
      else if (head.capacity() != staging_rows)
        head = Head{}, ResizeArena(head, staging_rows);
    }
  } catch (...) {
    CancelStep();
    throw;
  }
  n_step_ = room.n_step;
  evicts_ = room.evicts;
  is_prompt_ = room.is_prompt;
  budgets_.assign(room.budgets.begin(), room.budgets.end());
}

void RowStore::CancelStep() {
  for (Head& head : heads_) {
    if (options_.grows)
      Trim(head);
    else
      TakeBackArena(head);
  }
  for (Head& head : staging_) head = Head{};
  n_step_ = 0;
}

void RowStore::Append(size_t layer, size_t first, size_t n, const float* keys, const float* values) {
  const size_t d = shape_.head_dim, stride = shape_.n_kv_heads * d;
  if (hadamard_block_ > 0) {
    const auto transformed = [&](const float* rows, std::vector<float>& copy) {
      copy.assign(rows, rows + n * stride);
      HadamardRows(copy.data(), n * shape_.n_kv_heads);
      return copy.data();
    };
    keys = transformed(keys, Work().keys);
    values = transformed(values, Work().values);
  }
  ParallelFor(shape_.n_kv_heads, [&](size_t h) {
    Head& head = evicts_ ? staging_[h] : At(layer, h);
    const size_t first_row = (evicts_ ? 0 : head.n_rows) + first;
    for (size_t done = 0; done < n;) {
      const size_t row = first_row + done, slot = row % head.region_rows;
      const size_t run = std::min(n - done, head.region_rows - slot);
      const Region& region = head.regions[row / head.region_rows];
      const size_t offset = done * stride + h * d;
      WriteRows(key_format_, Keys(region), slot, run, keys + offset, stride);
      WriteRows(value_format_, Values(region, head.region_rows), slot, run, values + offset, stride);
      done += run;
    }
  });
}

void RowStore::HadamardRows(float* rows, size_t n) const {
  constexpr size_t kRowsATask = 256;
  ParallelFor((n + kRowsATask - 1) / kRowsATask, [&](size_t task) {
    const size_t first = task * kRowsATask, count = std::min(kRowsATask, n - first);
    Hadamard(rows + first * shape_.head_dim, count * shape_.head_dim, hadamard_block_);
  });
}

void RowStore::AppendSpans(const Head& head, size_t n_rows, HeadSpans& spans) const {
  for (size_t row = 0; row < n_rows; row += head.region_rows) {
    const Region& region = head.regions[row / head.region_rows];
    const size_t n = std::min(head.region_rows, n_rows - row);
    spans.keys.push_back({.format = key_format_, .rows = Keys(region), .n_rows = n});
    spans.values.push_back({.format = value_format_, .rows = Values(region, head.region_rows), .n_rows = n});
  }
}

RowStore::HeadSpans RowStore::Spans(size_t layer, size_t kv_head, size_t n_step_rows) const {
  HeadSpans spans;
  const Head& head = At(layer, kv_head);
  AppendSpans(head, evicts_ ? head.n_rows : head.n_rows + n_step_rows, spans);
  if (evicts_) AppendSpans(staging_[kv_head], n_step_rows, spans);
  if (spans.keys.empty()) spans = {{{.format = key_format_}}, {{.format = value_format_}}};
  return spans;
}

AttentionJob RowStore::Job(const StoreQuery& query, size_t kv_head, const HeadSpans& spans) const {
  const size_t group = shape_.group(), d = shape_.head_dim;
  AttentionJob job;
  job.keys = spans.keys;
  job.values = spans.values;
  job.n_past = At(query.layer, kv_head).n_rows + query.first_query;
  job.n_queries = query.n_queries;
  job.q = query.queries + kv_head * group * d;
  job.q_stride = shape_.n_heads * d;
  job.group = group;
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  job.rope = query.read_positions == nullptr ? nullptr : &shape_.rope;
  job.read_positions = query.read_positions;
  if (query.read_positions != nullptr) job.key_hadamard_block = hadamard_block_;
  job.compute = shape_.compute;
  job.out = query.out + kv_head * group * d;
  job.out_stride = job.q_stride;
  job.lse = query.lse + kv_head * query.n_queries * group;
  if (!query.received.empty()) job.received = query.received[kv_head];
  return job;
}

StoreQuery RowStore::Transformed(const StoreQuery& query) const {
  StoreQuery stored = query;
  if (shape_.rope.n_dims() == 0) stored.read_positions = nullptr;  // then nothing depends on where a row is read
  if (hadamard_block_ == 0 || stored.read_positions != nullptr) return stored;
  std::vector<float>& queries = Work().queries;
  const size_t n = query.n_queries * shape_.n_heads;
  queries.assign(query.queries, query.queries + n * shape_.head_dim);
  HadamardRows(queries.data(), n);
  stored.queries = queries.data();
  return stored;
}

void RowStore::Attend(const StoreQuery& given) const {
  const StoreQuery query = Transformed(given);
  std::vector<HeadSpans> spans(shape_.n_kv_heads);
  std::vector<AttentionJob> jobs;
  for (size_t h = 0; h < shape_.n_kv_heads; ++h) {
    spans[h] = Spans(query.layer, h, query.first_query + query.n_queries);
    jobs.push_back(Job(query, h, spans[h]));
  }
  lesskv::Attend(jobs);
  if (hadamard_block_ > 0) HadamardRows(query.out, query.n_queries * shape_.n_heads);
}

void RowStore::AddColumnSums(const StoreQuery& given, size_t first, std::span<float* const> sums) const {
  const StoreQuery query = Transformed(given);
  const size_t n_kv = shape_.n_kv_heads;
  const auto tile_rows = [&](size_t h) { return At(query.layer, h).n_rows + query.first_query + query.n_queries; };
  const bool whole_step = query.n_queries == n_step_;  // nothing to add to: written in place
  std::vector<HeadSpans> spans(shape_.n_kv_heads);
  std::vector<std::vector<float>> tile_sums;
  std::vector<ColumnSumJob> jobs;
  for (size_t h = 0; h < n_kv; ++h) {
    spans[h] = Spans(query.layer, h, query.first_query + query.n_queries);
    tile_sums.emplace_back(whole_step ? 0 : tile_rows(h));
    ColumnSumJob job;
    job.attention = Job(query, h, spans[h]);
    job.lse = job.attention.lse;
    job.first_query = first;
    job.sums = whole_step ? sums[h] : tile_sums.back().data();
    jobs.push_back(job);
  }
  ColumnSums(jobs);
  if (whole_step) return;
  for (size_t h = 0; h < n_kv; ++h) Add(sums[h], tile_sums[h].data(), tile_rows(h));
}

RowStore::Place RowStore::Find(size_t layer, size_t kv_head, uint32_t row) const {
  const Head& own = At(layer, kv_head);
  const bool staged = evicts_ && row >= own.n_rows;
  const Head& head = staged ? staging_[kv_head] : own;
  const size_t r = staged ? row - own.n_rows : row;
  return {&head.regions[r / head.region_rows], head.region_rows, r % head.region_rows};
}

void RowStore::ReadRows(size_t layer, size_t kv_head, std::span<const uint32_t> rows, float* keys,
                        float* values) const {
  const size_t d = shape_.head_dim;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Place at = Find(layer, kv_head, rows[i]);
    lesskv::ReadRows(key_format_, Keys(*at.region), at.slot, 1, keys + i * d, d);
    lesskv::ReadRows(value_format_, Values(*at.region, at.region_rows), at.slot, 1, values + i * d, d);
  }
  if (hadamard_block_ == 0) return;
  Hadamard(keys, rows.size() * d, hadamard_block_);
  Hadamard(values, rows.size() * d, hadamard_block_);
}

void RowStore::Commit(size_t layer, size_t kv_head, const Compaction& compaction) {
  Head& head = At(layer, kv_head);
  for (const RowMove& move : compaction.moves) {
    const Place from = Find(layer, kv_head, move.from);
    const Region& to = head.regions[move.to / head.region_rows];
    const size_t slot = move.to % head.region_rows;
    CopyRow(key_format_, Keys(*from.region), from.slot, Keys(to), slot);
    CopyRow(value_format_, Values(*from.region, from.region_rows), from.slot, Values(to, head.region_rows), slot);
  }
  head.n_rows = compaction.n_rows;
}

void RowStore::EndStep() {
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    if (!evicts_)
      head.n_rows += n_step_;
    else if (options_.grows)
      Trim(head);
    else
      ResizeArena(head, RoundUp(budgets_[i], kTileRows));
  }
  if (is_prompt_)
    for (Head& head : staging_) head = Head{};
  n_step_ = 0;
}

// One tile of a region, slots from n_rows on written as zeros: what left the cache does not leave in a file.
void RowStore::SaveTile(const RowFormat& format, const std::byte* tile, size_t n_rows, ByteWriter& out) const {
  const size_t bytes = TileBytes(format);
  if (n_rows >= kTileRows) return out.Raw(tile, bytes);
  ByteCounter scratch;
  CountedBuffer copy(scratch, RegionBytes(format, kTileRows));
  std::memcpy(copy.data(), tile, bytes);
  const std::vector<float> zeros(shape_.head_dim, 0.0f);
  WriteRows(format, copy.data(), n_rows, kTileRows - n_rows, zeros.data(), 0);
  out.Raw(copy.data(), bytes);
}

void RowStore::Save(ByteWriter& out) const {
  const size_t key_tile = TileBytes(key_format_), value_tile = TileBytes(value_format_);
  for (const Head& head : heads_) {
    out.Put<uint64_t>(head.n_rows);
    for (size_t row = 0; row < head.n_rows; row += kTileRows) {
      const Region& region = head.regions[row / head.region_rows];
      const size_t tile = row % head.region_rows / kTileRows;
      SaveTile(key_format_, Keys(region) + tile * key_tile, head.n_rows - row, out);
      SaveTile(value_format_, Values(region, head.region_rows) + tile * value_tile, head.n_rows - row, out);
    }
  }
}

void RowStore::Load(ByteReader& in, std::span<const size_t> budgets, size_t max_rows) {
  const size_t key_tile = TileBytes(key_format_), value_tile = TileBytes(value_format_);
  for (size_t i = 0; i < heads_.size(); ++i) {
    Head& head = heads_[i];
    const size_t n_rows = in.Count(options_.grows ? max_rows : budgets[i], "a head's number of rows");
    if (options_.grows)
      head.regions = Allocate(*counter_, (n_rows + kBlockRows - 1) / kBlockRows, kBlockRows);
    else
      ResizeArena(head, RoundUp(budgets[i], kTileRows));
    for (size_t row = 0; row < n_rows; row += kTileRows) {
      const Region& region = head.regions[row / head.region_rows];
      const size_t tile = row % head.region_rows / kTileRows;
      in.Raw(Keys(region) + tile * key_tile, key_tile);
      in.Raw(Values(region, head.region_rows) + tile * value_tile, value_tile);
    }
    head.n_rows = n_rows;
  }
}

}  // namespace lesskv
