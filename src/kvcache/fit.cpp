#include "kvcache/fit.h"

#include <algorithm>

#include "base/threads.h"
#include "kernels/basic/rope.h"

namespace lesskv {
namespace {

// One KV head's block: the rows that nothing protects, those that stay first.
struct Block {
  std::vector<uint32_t> rows;
  std::vector<float> keys, values, weights, queries;
  FitBlock fit;
};

bool MayLeave(const PolicyCache& cache, const LayerStep& work, size_t h, uint32_t row) {
  const Selector& selector = *cache.policy.selector;
  const size_t budget = work.heads[h].budget, sinks = selector.Sinks();
  const size_t recent = selector.Window(budget) - std::min(sinks, selector.Window(budget));
  const auto at = static_cast<size_t>(ToInt(work.heads[h].positions[row]));
  return at >= sinks && at + recent < work.rows.tokens_seen && !cache.policy.protect.Contains(work.heads[h].positions[row]);
}

void NameRows(const PolicyCache& cache, const LayerStep& work, size_t h, Block& block) {
  std::vector<char> leaves(work.heads[h].n_rows());
  for (const Departure& departure : work.departures[h]) leaves[departure.row] = 1;
  for (uint32_t r = 0; r < leaves.size(); ++r)
    if (!leaves[r] && MayLeave(cache, work, h, r)) block.rows.push_back(r);
  block.fit.n_kept = block.rows.size();
  for (const Departure& departure : work.departures[h]) block.rows.push_back(departure.row);
  block.fit.n_rows = block.rows.size();
}

void ReadBlock(const PolicyCache& cache, size_t layer, const LayerStep& work, size_t h, Block& block) {
  const LayerShape& shape = cache.policy.layers[layer];
  const size_t n = block.rows.size(), d = shape.head_dim, group = shape.group();
  block.keys.resize(n * d);
  block.values.resize(n * d);
  cache.store->ReadRows(layer, h, block.rows, block.keys.data(), block.values.data());
  std::vector<int32_t> positions;
  for (const uint32_t row : block.rows) {
    positions.push_back(ToInt(work.heads[h].positions[row]));
    block.weights.push_back(work.heads[h].weights[row]);
  }
  if (cache.policy.unrotated_keys()) RotateRows(*shape.rope, block.keys.data(), n, d, 1, d, positions.data());

  // The group's queries, as if they were asked behind the text.
  const size_t n_queries = work.fit_queries.size() / shape.q_dim();
  positions.clear();
  for (size_t q = 0; q < n_queries; ++q) {
    const auto from = work.fit_queries.begin() + static_cast<ptrdiff_t>(q * shape.q_dim() + h * group * d);
    block.queries.insert(block.queries.end(), from, from + static_cast<ptrdiff_t>(group * d));
    positions.push_back(static_cast<int32_t>(work.rows.tokens_seen + q));
  }
  RotateRows(*shape.rope, block.queries.data(), n_queries, group * d, group, d, positions.data());
  FitBlock& fit = block.fit;
  fit.kv_head = h;
  fit.head_dim = d;
  fit.scale = shape.scale;
  fit.keys = block.keys.data();
  fit.values = block.values.data();
  fit.weights = block.weights.data();
  fit.queries = block.queries.data();
  fit.n_queries = n_queries * group;
  fit.kept_weights.assign(fit.weights, fit.weights + fit.n_kept);
  fit.kept_values.assign(fit.values, fit.values + fit.n_kept * d);
}

}  // namespace

void FitKept(PolicyCache& cache, size_t layer, LayerStep& work) {
  const FitRule rule = cache.ResidualFits();
  if (rule.n_queries == 0) return;
  const auto leaves_enough = [&](const auto& departures) { return departures.size() >= rule.least_leaving; };
  if (std::none_of(work.departures.begin(), work.departures.end(), leaves_enough)) return;
  if (cache.FitsKeptQueries()) work.fit_queries = cache.KeptQueries(layer);
  std::vector<Block> blocks(work.departures.size());
  ParallelFor(blocks.size(), [&](size_t h) {
    if (!leaves_enough(work.departures[h])) return;
    NameRows(cache, work, h, blocks[h]);
    if (blocks[h].fit.n_kept > 0) ReadBlock(cache, layer, work, h, blocks[h]);
  });
  std::vector<FitBlock> fits;
  for (Block& block : blocks)
    if (block.fit.n_kept > 0) fits.push_back(std::move(block.fit));
  if (fits.empty()) return;
  cache.policy.residual->Fit(fits);
  ParallelFor(fits.size(), [&](size_t i) {
    const FitBlock& fit = fits[i];
    if (!fit.fitted) return;
    const std::span<const uint32_t> kept = std::span(blocks[fit.kv_head].rows).first(fit.n_kept);
    for (size_t r = 0; r < kept.size(); ++r) work.heads[fit.kv_head].weights[kept[r]] = fit.kept_weights[r];
    cache.store->RewriteValues(layer, fit.kv_head, kept, fit.kept_values.data());
  });
  for (const FitBlock& fit : fits) ++(fit.fitted ? cache.fits.taken : cache.fits.refused);
}

}  // namespace lesskv
