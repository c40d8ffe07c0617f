#include "kvcache/cache_batch.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/checked.h"
#include "base/threads.h"
#include "kernels/attention/attention.h"
#include "kernels/basic/basic.h"
#include "kvcache/eviction.h"
#include "kvcache/sequence_cache_impl.h"

namespace lesskv {
namespace {

// Queries (and keys) rotated and attended at a time: bounds the work memory of long steps. A sequence's tiles begin at
// multiples of it, whatever else is in the step.
constexpr size_t kTileQueries = 512;
// Sequences with fewer tokens in a step are prepared and closed side by side, each on one thread; longer ones one after
// the other, each on all threads.
constexpr size_t kShortStep = 64;

// Room for what an observer sees: sums that tiles are added to, or that the only tile overwrites.
void SizeSums(const PolicyCache& part, size_t layer, const Observation& wanted, std::vector<std::vector<float>>& sums) {
  const LayerShape& shape = part.policy.layers[layer];
  sums.resize(wanted.wanted() ? shape.n_kv_heads : 0);
  for (size_t h = 0; h < sums.size(); ++h) {
    const size_t n = (part.store->n_rows(layer, h) + part.step.n) * (wanted.by_query_head ? shape.group() : 1);
    if (part.step.n > kTileQueries)
      sums[h].assign(n, 0.0f);
    else
      sums[h].resize(n);
  }
}

// Ranks count back from the step's first token, which stands where the largest head ends.
size_t RankBase(const PolicyCache& part, size_t layer) {
  size_t most = 0;
  for (size_t h = 0; h < part.policy.heads.n_heads(layer); ++h) most = std::max(most, part.store->n_rows(layer, h));
  return most;
}

// For stores of unrotated keys: where each resident and step row of a KV head is read.
void ReadPositionsOf(const PolicyCache& part, size_t layer, size_t h, std::vector<int32_t>& out) {
  const size_t n_rows = part.store->n_rows(layer, h);
  out.resize(n_rows + part.step.n);
  if (!part.tracks()) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<int32_t>(i);
    return;
  }
  const std::span<const Position> positions = part.Ledger(layer, h).Positions();
  if (!part.policy.ranks_positions()) {
    for (size_t i = 0; i < n_rows; ++i) out[i] = ToInt(positions[i]);
    for (size_t i = n_rows; i < out.size(); ++i) out[i] = static_cast<int32_t>(part.step.seen + i - n_rows);
    return;
  }
  std::vector<uint32_t> order(n_rows);
  for (uint32_t r = 0; r < order.size(); ++r) order[r] = r;
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return ToInt(positions[a]) < ToInt(positions[b]); });
  const size_t before = RankBase(part, layer) - n_rows;
  for (uint32_t rank = 0; rank < order.size(); ++rank) out[order[rank]] = static_cast<int32_t>(before + rank);
  for (size_t i = n_rows; i < out.size(); ++i) out[i] = static_cast<int32_t>(before + i);
}

void FindReadPositions(const PolicyCache& part, size_t layer, LayerStep& work) {
  if (!part.policy.unrotated_keys()) return work.read_pointers.clear();
  const size_t n_kv = part.policy.layers[layer].n_kv_heads;
  const bool shared = !part.tracks() || part.policy.keeps_one_set();
  work.read_positions.resize(n_kv);
  work.read_pointers.resize(n_kv);
  for (size_t h = 0; h < n_kv; ++h) {
    if (h == 0 || !shared) ReadPositionsOf(part, layer, h, work.read_positions[h]);
    work.read_pointers[h] = work.read_positions[shared ? 0 : h].data();
  }
}

void PrepareLayer(const PolicyCache& part, size_t layer, LayerStep& work) {
  FindReadPositions(part, layer, work);
  SizeSums(part, layer, part.SelectorObserves(), work.attention);
  SizeSums(part, layer, part.BudgeterMeasures(), work.measured);
  work.fit_queries.clear();
}

void AppendRows(PolicyCache& part, size_t layer, const float* keys, const float* values) {
  const LayerShape& shape = part.policy.layers[layer];
  const size_t stride = shape.kv_dim();
  std::vector<float> rotated;
  std::vector<int32_t> positions;
  for (size_t first = 0; first < part.step.n; first += kTileQueries) {
    const size_t n = std::min(kTileQueries, part.step.n - first);
    const float* tile = keys + first * stride;
    if (!part.policy.unrotated_keys()) {
      rotated.assign(tile, tile + n * stride);
      positions.resize(n);
      for (size_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(part.step.seen + first + i);
      RotateRows(*shape.rope, rotated.data(), n, stride, shape.n_kv_heads, shape.head_dim, positions.data());
      tile = rotated.data();
    }
    part.store->Append(layer, first, n, tile, values + first * stride);
  }
}

// A local layer's jobs see the window before each query only. A single token sees all that its layer keeps.
void SetWindow(const PolicyCache& part, size_t layer, size_t first_query, std::span<AttentionJob> jobs, JobList& list) {
  const size_t window = part.policy.window;
  if (window == 0 || (part.step.n == 1 && window > 1)) return;
  for (size_t h = 0; h < jobs.size(); ++h) {
    const std::span<const Position> held = part.Ledger(layer, h).Positions();
    std::vector<int32_t>& past = list.NewInts();
    for (const Position position : held) past.push_back(ToInt(position));
    for (size_t i = 0; i < first_query; ++i) past.push_back(static_cast<int32_t>(part.step.seen + i));
    jobs[h].window = window;
    jobs[h].past_positions = past.data();
    jobs[h].first_position = static_cast<int32_t>(part.step.seen + first_query);
  }
}

// Weights of resident rows as a bias on their scores; the step's own rows weigh 1. Where all do there is none, so that the
// bits are those of a cache without weights.
void SetBias(const PolicyCache& part, size_t layer, std::span<AttentionJob> jobs, JobList& list) {
  if (part.policy.weights() != Weights::kInLogits) return;
  for (size_t h = 0; h < jobs.size(); ++h) {
    const std::span<const float> weights = part.Ledger(layer, h).Weights();
    if (std::all_of(weights.begin(), weights.end(), [](float w) { return w == 1; })) continue;
    std::vector<float>& bias = list.NewFloats();
    for (const float w : weights) bias.push_back(std::log(w));
    bias.resize(jobs[h].n_past + jobs[h].n_queries);
    jobs[h].bias = bias.data();
  }
}

}  // namespace

struct CacheBatch::Item {
  SequenceCache::Impl* cache = nullptr;
  const Item* leader = nullptr;  // whose rows it reads; null: it has its own
  size_t first_row = 0;
  LayerStep work;
  std::exception_ptr failure;

  size_t n_rows() const { return cache->step.n; }
  LayerPlace Place(size_t layer) const { return cache->config->place(layer); }
  PolicyCache& Part(size_t layer) const { return *cache->parts[Place(layer).policy]; }
  bool WantsInputs(size_t layer) const {
    const PolicyCache& part = Part(layer);
    return !failure && part.evicts && part.policy.selector->ReadsInputs();
  }
  // Whether something wants to see how the step's queries [first, first + n) attend, or the queries themselves.
  bool WantsQueries(size_t layer, size_t first, size_t n) const {
    const PolicyCache& part = Part(layer);
    const size_t end = first + n, from = std::min(part.SelectorObserves().First(n_rows()), part.BudgeterMeasures().First(n_rows()));
    return from < end || part.ResidualFits().n_queries > 0 || part.policy.bunches().rows > 1;
  }
};

// Some queries of one sequence that are attended together with others'.
struct CacheBatch::Tile {
  Item* item = nullptr;
  size_t first = 0, n = 0;  // queries of the item's step
  size_t row = 0;           // where they lie in the work memory
  StoreQuery query = {};
  size_t first_job = 0, n_jobs = 0;
};

CacheBatch::CacheBatch() = default;
CacheBatch::~CacheBatch() = default;

void CacheBatch::Start(std::span<SequenceCache* const> caches, std::span<const size_t> leaders,
                       std::function<void()> pause) {
  pause_ = std::move(pause);
  while (items_.size() < caches.size()) items_.push_back(std::make_unique<Item>());
  n_items_ = caches.size();
  size_t row = 0;
  for (size_t i = 0; i < n_items_; ++i) {
    Item& item = *items_[i];
    item.cache = caches[i]->impl_.get();
    CHECK(item.cache->in_step, "a cache takes part in a step that it has begun");
    item.leader = leaders.empty() || leaders[i] == i ? nullptr : items_[leaders[i]].get();
    item.first_row = item.leader == nullptr ? row : item.leader->first_row;
    item.failure = nullptr;
    if (item.leader == nullptr) row += item.n_rows();
  }
}

void CacheBatch::Drop(size_t i, std::exception_ptr why) { items_[i]->failure = std::move(why); }
const std::exception_ptr& CacheBatch::failure(size_t i) const { return items_[i]->failure; }

// Calls body(item) for all that are still in; what it throws concerns the item alone.
template <typename Body>
void CacheBatch::ForItems(Body&& body) {
  const auto guarded = [&](Item& item) {
    try {
      if (!item.failure) body(item);
    } catch (...) {
      item.failure = std::current_exception();
    }
  };
  std::vector<Item*> brief;
  for (size_t i = 0; i < n_items_; ++i) {
    if (n_items_ > 1 && items_[i]->n_rows() < kShortStep)
      brief.push_back(items_[i].get());
    else
      guarded(*items_[i]);
  }
  ParallelFor(brief.size(), [&](size_t i) { guarded(*brief[i]); });
}

bool CacheBatch::WantsInputs(size_t layer) const {
  return std::any_of(items_.begin(), items_.begin() + static_cast<ptrdiff_t>(n_items_),
                     [&](const std::unique_ptr<Item>& item) { return item->WantsInputs(layer); });
}

void CacheBatch::ReadInputs(size_t layer, size_t first, size_t n, const float* x) {
  ForItems([&](Item& item) {
    const size_t begin = std::max(first, item.first_row), end = std::min(first + n, item.first_row + item.n_rows());
    if (begin >= end || !item.WantsInputs(layer)) return;
    const size_t width = item.cache->config->shape().input_width, own = item.Place(layer).layer;
    const LayerPolicy& policy = item.Part(layer).policy;
    std::vector<float>& scores = item.Part(layer).input_scores;
    scores.resize(policy.heads.n_heads(own) * item.n_rows());
    ParallelFor(end - begin, [&](size_t i) {
      policy.selector->ScoreInput(own, x + (begin - first + i) * width, &scores[begin + i - item.first_row], item.n_rows());
    });
  });
}

void CacheBatch::Append(size_t layer, const float* keys, const float* values) {
  ForItems([&](Item& item) {
    const size_t stride = item.cache->config->shape().layers[layer].kv_dim(), offset = item.first_row * stride;
    AppendRows(item.Part(layer), item.Place(layer).layer, keys + offset, values + offset);
  });
}

void CacheBatch::FailWithLeaders() {
  for (size_t i = 0; i < n_items_; ++i)
    if (items_[i]->leader != nullptr && items_[i]->leader->failure) items_[i]->failure = items_[i]->leader->failure;
}

void CacheBatch::Attend(size_t layer, const float* queries, float* out) {
  FailWithLeaders();
  ForItems([&](Item& item) { PrepareLayer(item.Part(layer), item.Place(layer).layer, item.work); });
  // Tiles of different sequences go together until there are kTileQueries queries or more.
  size_t rows = 0;
  tiles_.clear();
  for (size_t i = 0; i < n_items_; ++i) {
    Item& item = *items_[i];
    for (size_t first = 0; first < item.n_rows(); first += kTileQueries) {
      if (item.failure) break;
      const size_t n = std::min(kTileQueries, item.n_rows() - first);
      if (item.leader != nullptr && !item.WantsQueries(layer, first, n)) continue;
      tiles_.push_back({&item, first, n, rows});
      rows += n;
      if (rows < kTileQueries) continue;
      AttendTiles(layer, queries, out);
      if (pause_) pause_();
      tiles_.clear();
      rows = 0;
    }
  }
  if (rows > 0) AttendTiles(layer, queries, out);
  ForItems([&](Item& item) { CutLayer(item.Part(layer), item.Place(layer).layer, item.work); });
  AbsorbTogether(layer);
  ForItems([&](Item& item) { CloseLayer(item.Part(layer), item.Place(layer).layer, item.work); });
  FailWithLeaders();
  for (size_t i = 0; i < n_items_; ++i) {
    const size_t stride = items_[i]->cache->config->shape().layers[layer].q_dim();
    if (items_[i]->failure && items_[i]->leader == nullptr)
      std::fill_n(out + items_[i]->first_row * stride, items_[i]->n_rows() * stride, 0.0f);
  }
}

void CacheBatch::AttendTiles(size_t layer, const float* queries, float* out) {
  list_.Clear();
  RotateQueries(layer, queries);
  AddJobs(layer, out);
  lesskv::Attend(list_.jobs);
  ObserveTiles(layer);
  for (const Tile& tile : tiles_) KeepFitQueries(tile, layer, queries);
  for (const Tile& tile : tiles_) {
    if (tile.item->failure) continue;
    tile.item->Part(layer).store->Observe(tile.query);
    tile.item->Part(layer).store->Finish(tile.query);
  }
  MergeResiduals(layer);
}

void CacheBatch::RotateQueries(size_t layer, const float* queries) {
  const LayerShape& shape = tiles_[0].item->cache->config->shape().layers[layer];
  const size_t n = tiles_.back().row + tiles_.back().n, stride = shape.q_dim();
  rotated_.resize(std::max(rotated_.size(), n * stride));
  positions_.resize(n);
  for (const Tile& tile : tiles_) {
    const PolicyCache& part = tile.item->Part(layer);
    std::copy_n(queries + (tile.item->first_row + tile.first) * stride, tile.n * stride, &rotated_[tile.row * stride]);
    // Cache-relative: query i of the step reads at the position of its own key, behind the resident rows of every head.
    const size_t base = part.policy.ranks_positions() ? RankBase(part, tile.item->Place(layer).layer) : part.step.seen;
    for (size_t i = 0; i < tile.n; ++i) positions_[tile.row + i] = static_cast<int32_t>(base + tile.first + i);
  }
  RotateRows(*shape.rope, rotated_.data(), n, stride, shape.n_heads, shape.head_dim, positions_.data());
}

void CacheBatch::AddJobs(size_t layer, float* out) {
  const LayerShape& shape = tiles_[0].item->cache->config->shape().layers[layer];
  const size_t n = tiles_.back().row + tiles_.back().n;
  lse_.resize(std::max(lse_.size(), n * shape.n_heads));
  if (std::any_of(tiles_.begin(), tiles_.end(), [](const Tile& tile) { return tile.item->leader != nullptr; }))
    unread_.resize(std::max(unread_.size(), n * shape.q_dim()));
  for (Tile& tile : tiles_) {
    PolicyCache& part = tile.item->Part(layer);
    LayerStep& work = tile.item->work;
    StoreQuery& query = tile.query;
    query.layer = tile.item->Place(layer).layer;
    query.queries = &rotated_[tile.row * shape.q_dim()];
    query.first_query = tile.first;
    query.n_queries = tile.n;
    query.read_positions = work.read_pointers;
    query.out = tile.item->leader != nullptr ? &unread_[tile.row * shape.q_dim()]
                                             : out + (tile.item->first_row + tile.first) * shape.q_dim();
    query.lse = &lse_[tile.row * shape.n_heads];
    tile.first_job = list_.jobs.size();
    try {
      part.store->AddJobs(query, list_);
    } catch (...) {  // rows that cannot be read are this sequence's misfortune alone
      tile.item->failure = std::current_exception();
      list_.jobs.erase(list_.jobs.begin() + static_cast<ptrdiff_t>(tile.first_job), list_.jobs.end());
    }
    tile.n_jobs = list_.jobs.size() - tile.first_job;
    const std::span<AttentionJob> jobs = std::span(list_.jobs).subspan(tile.first_job);
    SetWindow(part, query.layer, tile.first, jobs, list_);
    SetBias(part, query.layer, jobs, list_);
    const Observation wanted = part.SelectorObserves();
    for (size_t h = 0; h < jobs.size() && part.step.n == 1 && wanted.wanted(); ++h) {
      jobs[h].received = work.attention[h].data();
      jobs[h].received_by_head = wanted.by_query_head;
    }
  }
}

// Column sums of tiles that wait to be added to those of their step.
struct CacheBatch::Sums {
  struct Addition {
    std::vector<float>* to;
    const std::vector<float>* from;
    size_t to_stride, stride, rows;
  };
  std::vector<ColumnSumJob> jobs;
  std::vector<Addition> additions;
};

// What an observer wants of a tile: in place where the tile is the whole step, else to be added up.
void CacheBatch::AddSums(const Tile& tile, const Observation& wanted, std::vector<std::vector<float>>& into, Sums& sums) {
  const size_t n_step = tile.item->n_rows(), first_observed = wanted.First(n_step);
  if (first_observed >= tile.first + tile.n) return;
  const size_t first = std::max(first_observed, tile.first) - tile.first;
  const float* weights = nullptr;
  if (wanted.decay != 1) {
    std::vector<float>& list = list_.NewFloats();
    for (size_t m = first; m < tile.n; ++m)
      list.push_back(std::pow(wanted.decay, static_cast<float>(n_step - 1 - tile.first - m)));
    weights = list.data();
  }
  for (size_t h = 0; h < tile.n_jobs; ++h) {
    const AttentionJob& job = list_.jobs[tile.first_job + h];
    const size_t n_rows = job.n_past + job.n_queries, heads = wanted.by_query_head ? job.group : 1;
    float* to = into[h].data();
    if (tile.n != n_step) {
      std::vector<float>& part = list_.NewFloats();
      part.resize(heads * n_rows);
      sums.additions.push_back({&into[h], &part, into[h].size() / heads, n_rows, heads});
      to = part.data();
    }
    sums.jobs.push_back({job, job.lse, first, weights, to, wanted.by_query_head});
  }
}

// Evenly spread over the step, its last one among them; as the model gave them.
void CacheBatch::KeepFitQueries(const Tile& tile, size_t layer, const float* queries) {
  PolicyCache& part = tile.item->Part(layer);
  const size_t most = part.ResidualFits().n_queries, n = tile.item->n_rows();
  const size_t width = part.policy.layers[tile.query.layer].q_dim();
  if (part.policy.bunches().rows > 1)
    part.KeepQueries(tile.query.layer, tile.first, tile.n, queries + (tile.item->first_row + tile.first) * width);
  if (most == 0 || part.FitsKeptQueries()) return;
  const size_t apart = CeilDiv(n, most);
  std::vector<float>& kept = tile.item->work.fit_queries;
  for (size_t i = tile.first; i < tile.first + tile.n; ++i) {
    if ((n - 1 - i) % apart != 0) continue;
    const float* row = queries + (tile.item->first_row + i) * width;
    kept.insert(kept.end(), row, row + width);
  }
}

void CacheBatch::ObserveTiles(size_t layer) {
  Sums sums;
  for (const Tile& tile : tiles_) {
    const PolicyCache& part = tile.item->Part(layer);
    const Observation selector = part.SelectorObserves();
    if (tile.item->n_rows() > 1) AddSums(tile, selector, tile.item->work.attention, sums);
    AddSums(tile, part.BudgeterMeasures(), tile.item->work.measured, sums);
  }
  ColumnSums(sums.jobs);
  for (const Sums::Addition& a : sums.additions)
    for (size_t i = 0; i < a.rows; ++i)
      Add(a.to->data() + i * a.to_stride, a.from->data() + i * a.stride, a.stride);
}

// What left the layer, of all sequences that have the same residual in one region. Where that fails, half of it may be in
// the states: it concerns all of these, and no other.
void CacheBatch::AbsorbTogether(size_t layer) {
  const auto items = std::span(items_).first(n_items_);
  const auto residual_of = [&](const Item& item) { return item.Part(layer).policy.residual.get(); };
  const auto waits = [](const Item& item) { return !item.failure && !item.work.evicted.empty(); };
  for (size_t first = 0; first < n_items_; ++first) {
    if (!waits(*items[first])) continue;
    const Residual* const residual = residual_of(*items[first]);
    const auto for_each = [&](auto&& body) {
      for (const std::unique_ptr<Item>& item : items.subspan(first))
        if (waits(*item) && residual_of(*item) == residual) body(*item);
    };
    std::exception_ptr failure;
    try {
      std::vector<EvictedRows> together;
      for_each([&](const Item& item) {
        together.insert(together.end(), item.work.evicted.begin(), item.work.evicted.end());
      });
      residual->Absorb(items[first]->Place(layer).layer, together);
    } catch (...) {
      failure = std::current_exception();
    }
    for_each([&](Item& item) {
      item.failure = failure;
      item.work.evicted.clear();
    });
  }
}

// Adds the residual states' parts to `out` under one normaliser with the exact rows.
void CacheBatch::MergeResiduals(size_t layer) {
  const LayerShape& shape = tiles_[0].item->cache->config->shape().layers[layer];
  const size_t n_heads = shape.n_heads, d = shape.head_dim, group = shape.group(), q_dim = shape.q_dim();
  std::vector<const Tile*> reading;
  std::vector<const Residual*> residuals;
  for (const Tile& tile : tiles_) {
    const PolicyCache& part = tile.item->Part(layer);
    if (!part.ReadsState(tile.query.layer)) continue;
    reading.push_back(&tile);
    const Residual* residual = part.policy.residual.get();
    if (std::find(residuals.begin(), residuals.end(), residual) == residuals.end()) residuals.push_back(residual);
  }
  if (reading.empty()) return;
  const size_t n = tiles_.back().row + tiles_.back().n;
  residual_out_.resize(std::max(residual_out_.size(), n * q_dim));
  residual_lse_.resize(std::max(residual_lse_.size(), n * n_heads));
  for (const Residual* residual : residuals) {
    std::vector<ResidualQuery> queries;
    for (const Tile* tile : reading) {
      PolicyCache& part = tile->item->Part(layer);
      if (part.policy.residual.get() != residual) continue;
      queries.push_back({tile->query.queries, tile->n, part.State(part.policy.heads(tile->query.layer, 0)),
                         &residual_out_[tile->row * q_dim], &residual_lse_[tile->row * n_heads]});
    }
    residual->Attend(tiles_[0].query.layer, queries);
  }
  ParallelFor(reading.size() * n_heads, [&](size_t task) {
    const Tile& tile = *reading[task / n_heads];
    const size_t head = task % n_heads, h = head / group, g = head % group;
    for (size_t m = 0; m < tile.n; ++m) {
      const size_t row = tile.row + m;
      Merge(tile.query.out + m * q_dim + head * d, &tile.query.lse[(h * tile.n + m) * group + g],
            &residual_out_[row * q_dim + head * d], residual_lse_[row * n_heads + head], d);
    }
  });
}

}  // namespace lesskv
