// What every cache promises, for random specs over random shapes, texts and lives: what contract_test.cpp holds for a
// list, this holds for whatever a user may combine. LESSKV_RANDOM_SPECS=FIRST:END tries these seeds, such as
// 1000:50000, instead of the first ones (random_spec.h).
#include "random_spec.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>

#include "base/check.h"
#include "base/error.h"
#include "base/threads.h"
#include "cache_harness.h"
#include "kvcache/cache_batch.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT

// ---- Models, texts and lives

constexpr TinyShape kShapes[] = {{2, 2, 2, 7},   {3, 4, 2, 5},  {2, 3, 1, 9},  {2, 4, 2, 32},
                                 {3, 6, 3, 16},  {2, 8, 2, 64}, {4, 4, 1, 48}, {2, 2, 1, 96},
                                 {1, 6, 2, 128}, {3, 4, 2, 8},  {2, 4, 4, 80}, {1, 1, 1, 32}};

const TempSidecar& SidecarOf(size_t shape) {
  static std::map<size_t, std::unique_ptr<TempSidecar>> made;
  auto& sidecar = made[shape];
  if (sidecar == nullptr) sidecar = std::make_unique<TempSidecar>(kShapes[shape]);
  return *sidecar;
}

constexpr size_t kMostLayers = 7, kMostTokens = 2000;

// n tokens of a long text of such a model, from somewhere on.
Text TextFor(size_t shape, size_t n_layers, size_t n, float scale, Rng& rng) {
  static std::map<size_t, Text> made;
  Text& all = made[shape];
  if (all.n == 0) {
    TinyShape most = kShapes[shape];
    most.n_layers = kMostLayers;
    all = RandomText(most, kMostTokens, shape + 1, 1.0f);
  }
  const size_t first = rng.Below(all.n - n);
  const auto take = [&](const std::vector<std::vector<float>>& from, float by) {
    std::vector<std::vector<float>> some;
    for (size_t l = 0; l < n_layers; ++l) {
      const size_t width = from[l].size() / all.n;
      const auto begin = from[l].begin() + static_cast<ptrdiff_t>(first * width);
      some.emplace_back(begin, begin + static_cast<ptrdiff_t>(n * width));
      for (float& x : some.back()) x *= by;
    }
    return some;
  };
  return {n, take(all.q, scale), take(all.k, scale), take(all.v, scale)};
}

struct RandomModel {
  size_t number;
  TinyShape tiny;  // with the local layers
  CacheShape shape;
  const TempSidecar* sidecar;

  explicit RandomModel(Rng& rng) {
    number = rng.Below(std::size(kShapes));
    tiny = kShapes[number];
    sidecar = &SidecarOf(number);
    constexpr size_t kContexts[] = {40, 96, 240, 240, 400, 1300};
    tiny.ctx = kContexts[rng.Below(std::size(kContexts))];
    const size_t rotated = Chance(0.7, rng) ? tiny.rotary_dims() : Chance(0.5, rng) ? tiny.head_dim / 4 * 2 : 0;
    shape = MakeCacheShape(tiny, rotated);
    constexpr ComputeType kTypes[] = {ComputeType::kF32, ComputeType::kF32, ComputeType::kBF16, ComputeType::kInt8};
    shape.compute = kTypes[rng.Below(std::size(kTypes))];
    if (!Chance(0.3, rng)) return;
    LayerShape local = shape.layers[0];
    local.rope =
        std::make_shared<RopeTable>(RopeConfig{.n_dims = tiny.rotary_dims(), .base = 7.0, .frequency_factors = {}});
    constexpr size_t kWindows[] = {1, 2, 9, 50, 1000};
    for (size_t n = 1 + rng.Below(3); n > 0; --n) {
      local.window = kWindows[rng.Below(std::size(kWindows))];
      shape.layers.insert(shape.layers.begin() + static_cast<ptrdiff_t>(rng.Below(shape.layers.size() + 1)), local);
    }
    tiny.n_layers = shape.n_layers();
  }

  std::shared_ptr<const CacheConfig> Config(const CacheSpec& spec, std::vector<ProtectedSpan> protect = {}) const {
    return CacheConfig::Create(spec, shape, std::move(protect), sidecar->source());
  }
};

Outputs Step(SequenceCache& cache, const Text& text, const Piece& piece) {
  const size_t seen = cache.tokens_seen();
  const Outputs outputs = Feed(cache, text, seen, piece.n, piece.kind);
  if (piece.ends) cache.EndPrompt();
  return outputs;
}

// ---- One random spec

struct Subject {
  Rng rng;
  RandomModel model;
  CacheSpec spec;
  std::vector<ProtectedSpan> protect;
  std::string name;
  std::shared_ptr<const CacheConfig> config;
  Text text, other;
  RandomLife life;

  // What the life came to: outputs of each step, and the state before it.
  std::vector<Outputs> outputs;
  std::vector<std::vector<std::byte>> states;
  std::unique_ptr<SequenceCache> whole;

  // Of a random spec, or of a given one; `config` is null where a given one does not fit.
  explicit Subject(uint64_t seed, const char* given = nullptr) : rng(seed * 2 + 1), model(rng) {
    for (size_t tries = 0; config == nullptr; ++tries) {
      if (given != nullptr && tries > 0) return;
      spec = given != nullptr ? CacheSpec::Parse(given) : RandomSpec(model.tiny.ctx, rng);
      protect.clear();
      if (Chance(0.2, rng))
        for (size_t n = 1 + rng.Below(2); n > 0; --n) {
          const auto begin = static_cast<int32_t>(rng.Below(30));
          protect.push_back({begin, begin + static_cast<int32_t>(rng.Below(5))});
        }
      NameSubject(fmt::format("seed {}, being made: {}", seed, spec.ToString()));
      try {
        config = model.Config(spec, protect);
      } catch (const Error& error) {  // does not fit: a sentence
        EXPECT_GT(std::strlen(error.what()), 20u) << error.what();
        CHECK(tries < 1000, "no spec fits {}", model.tiny.Name());
      }
    }
    name = Name(seed);
    NameSubject(name);
    const size_t usual = std::min<size_t>(model.tiny.ctx, 260),
                 n = Chance(0.1, rng) ? model.tiny.ctx : 1 + rng.Below(usual);
    life = MakeLife(*config, n, rng);
    constexpr float kScales[] = {0.2f, 1.0f, 1.5f, 1.5f, 3.0f};
    text = TextFor(model.number, model.tiny.n_layers, std::max(n, usual), kScales[rng.Below(std::size(kScales))], rng);
    other = TextFor(model.number, model.tiny.n_layers, std::max(n, usual), 1.5f, rng);
  }

  std::string Name(uint64_t seed) const {
    std::string spans;
    for (const ProtectedSpan& span : protect) spans += fmt::format(" protected {}:{}", span.begin, span.end);
    return fmt::format("seed {}: {}, {}, context {}, {} local{}", seed, spec.ToString(), model.tiny.Name(),
                       model.tiny.ctx, CountLocal(model.shape).n_layers, spans);
  }
  const TinyShape& tiny() const { return model.tiny; }
  MethodTraits Select() const { return TraitsOf(*spec.Find(Stage::kSelect)); }
};

std::vector<std::vector<int32_t>> Held(const Subject& s, const SequenceCache& cache) {
  return AllResident(cache, s.tiny());
}

// Exact attention in double of one KV head's group over rows at given positions of the text, for query `at` of a step
// that began at `seen`: true positions, or ranks.
void ExpectExact(const Subject& s, const std::vector<std::vector<int32_t>>& before, const Piece& piece, size_t seen,
                 const Outputs& outputs, double tolerance) {
  const size_t d = s.tiny().head_dim, n_kv = s.tiny().n_kv_heads, group = s.tiny().group();
  const size_t queries[] = {0, piece.n / 2, piece.n - 1};
  for (size_t layer = 0; layer < s.tiny().n_layers; ++layer) {
    const LayerShape& shape = s.model.shape.layers[layer];
    const bool ranks = shape.window == 0 && s.config->global().ranks_positions();
    double largest = 0;
    for (const float x : s.text.v[layer]) largest = std::max(largest, std::fabs(static_cast<double>(x)));
    for (size_t h = 0; h < n_kv; ++h) {
      const std::vector<int32_t>& held = before[layer * n_kv + h];
      for (const size_t i : queries) {
        const int32_t at = static_cast<int32_t>(seen + i), read_at = ranks ? static_cast<int32_t>(held.size() + i) : at;
        std::vector<std::pair<int32_t, int32_t>> rows;  // of the text, and where they are read
        for (size_t r = 0; r < held.size(); ++r) rows.push_back({held[r], ranks ? static_cast<int32_t>(r) : held[r]});
        for (size_t r = 0; r <= i; ++r)
          rows.push_back({static_cast<int32_t>(seen + r), static_cast<int32_t>(ranks ? held.size() + r : seen + r)});
        if (shape.window > 0)
          std::erase_if(rows, [&](const auto& row) { return row.first + static_cast<int64_t>(shape.window) <= at; });
        std::vector<float> keys;
        for (const auto& [row, read] : rows) {
          const float* k = &s.text.k[layer][(static_cast<size_t>(row) * n_kv + h) * d];
          keys.insert(keys.end(), k, k + d);
          RotateRows(*shape.rope, &keys[keys.size() - d], 1, d, 1, d, &read);
        }
        for (size_t g = 0; g < group; ++g) {
          const size_t head = h * group + g;
          std::vector<float> q(d);
          std::copy_n(&s.text.q[layer][(seen + i) * shape.q_dim() + head * d], d, q.begin());
          RotateRows(*shape.rope, q.data(), 1, d, 1, d, &read_at);
          std::vector<double> p(rows.size()), want(d);
          double most = -1e300, sum = 0;
          for (size_t r = 0; r < rows.size(); ++r) {
            for (size_t c = 0; c < d; ++c) p[r] += static_cast<double>(q[c]) * keys[r * d + c];
            most = std::max(most, p[r] *= shape.scale);
          }
          for (double& x : p) sum += x = std::exp(x - most);
          for (size_t r = 0; r < rows.size(); ++r)
            for (size_t c = 0; c < d; ++c)
              want[c] += p[r] / sum * s.text.v[layer][(static_cast<size_t>(rows[r].first) * n_kv + h) * d + c];
          for (size_t c = 0; c < d; ++c)
            ASSERT_NEAR(outputs[layer][i * shape.q_dim() + head * d + c], want[c], tolerance * largest)
                << "layer " << layer << ", KV head " << h << ", head " << g << ", query " << i << " after " << seen;
        }
      }
    }
  }
}

// How far outputs may be from exact attention over what is held; nothing where rows are not those of the text.
std::optional<double> ToleranceOf(const Subject& s) {
  const auto has = [&](const char* term) { return s.spec.Find(term) != nullptr; };
  if (has("less") || has("merge") || has("match") || has("cluster") || has("think") || has("recent"))
    return std::nullopt;
  if (const SpecTerm* elastic = s.spec.Find("elastic");
      elastic != nullptr && ToString(*elastic).find("merge=off") == std::string::npos)
    return std::nullopt;
  if (has("f32")) return s.model.shape.compute == ComputeType::kF32 ? 2e-4 : 0.2;
  if (s.spec.Find(Stage::kCodec) == nullptr) return s.model.shape.compute == ComputeType::kF32 ? 0.03 : 0.2;
  return std::nullopt;
}

void ExpectRules(const Subject& s, const SequenceCache& cache, const Piece& piece,
                 const std::vector<std::vector<int32_t>>& before, const std::vector<std::vector<int32_t>>& now) {
  const size_t seen = cache.tokens_seen(), had = seen - piece.n, n_kv = s.tiny().n_kv_heads;
  const LayerPolicy& policy = s.config->global();
  const bool evicts = policy.selector->EvictsIn(piece.kind);
  const bool divides =
      s.spec.Find(Stage::kBudget) != nullptr || s.spec.Find(Stage::kShare) != nullptr || s.Select().divides_rows;
  const size_t rows = policy.selector->After(piece.kind, seen).rows;
  const auto budgets = evicts ? policy.Budgets(rows, s.config->shape().ctx) : std::vector<size_t>();
  double held = 0;
  for (size_t i = 0; i < now.size(); ++i) {
    for (size_t r = 0; r < now[i].size(); ++r) {
      const int32_t p = now[i][r];
      ASSERT_TRUE(p >= 0 && static_cast<size_t>(p) < seen && (r == 0 || now[i][r - 1] < p));
      if (static_cast<size_t>(p) < had) {
        ASSERT_TRUE(std::binary_search(before[i].begin(), before[i].end(), p)) << p << " came back";
      }
    }
    if (s.model.shape.layers[i / n_kv].window > 0) continue;
    held += static_cast<double>(now[i].size());
    for (const ProtectedSpan& span : s.protect)
      for (int32_t p = span.begin; p < span.end && static_cast<size_t>(p) < seen; ++p)
        ASSERT_TRUE(std::binary_search(now[i].begin(), now[i].end(), p)) << p << ", which is protected, left";
    if (!s.Select().evicts) {
      ASSERT_EQ(now[i].size(), seen);
    } else if (evicts && s.Select().says_how_many) {
      ASSERT_LE(now[i].size(), policy.RowsThatStay(seen, budgets[0]));
      ASSERT_GE(now[i].size(), policy.RowsThatAlwaysStay(seen));
    } else if (evicts && !divides) {
      ASSERT_EQ(now[i].size(), policy.RowsThatStay(seen, budgets[0]));
    } else if (!evicts) {
      ASSERT_EQ(now[i].size(), before[i].size() + piece.n);
    }
  }
  const auto n_heads = static_cast<double>(policy.heads.size());
  if (evicts) {
    ASSERT_LE(held, static_cast<double>(std::accumulate(budgets.begin(), budgets.end(), size_t{0})));
  }
  const CacheStats stats = cache.Stats();
  const double stay = stats.tokens_resident + stats.tokens_offloaded;
  ASSERT_NEAR(stay, held / n_heads, 1e-6);
  ASSERT_NEAR(stay + stats.tokens_dropped + stats.tokens_absorbed + stats.tokens_merged, static_cast<double>(seen),
              1e-6);
  ASSERT_EQ(stats.tokens_seen, seen);
  ASSERT_LE(stats.kv_bytes, stats.kv_bytes_peak);
  ASSERT_LE(stats.kv_bytes_slack, stats.kv_bytes);
}

size_t Shared(const SequenceCache& cache) {
  size_t bytes = 0;
  for (const SharedPart& part : cache.ShareableParts()) bytes += part.bytes;
  return bytes;
}

// Lives the whole life, holding what must be true after every step.
void LiveWhole(Subject& s) {
  s.whole = std::make_unique<SequenceCache>(s.config);
  const std::optional<double> tolerance = Chance(0.6, s.rng) ? ToleranceOf(s) : std::nullopt;
  std::vector<std::vector<int32_t>> before = Held(s, *s.whole);
  for (const Piece& piece : s.life) {
    s.states.push_back(s.whole->Serialize());
    const size_t seen = s.whole->tokens_seen();
    s.outputs.push_back(Step(*s.whole, s.text, piece));
    for (const auto& layer : s.outputs.back())
      for (const float x : layer) ASSERT_TRUE(std::isfinite(x)) << "after " << seen;
    if (tolerance) {
      ASSERT_NO_FATAL_FAILURE(ExpectExact(s, before, piece, seen, s.outputs.back(), *tolerance));
    }
    std::vector<std::vector<int32_t>> now = Held(s, *s.whole);
    ASSERT_NO_FATAL_FAILURE(ExpectRules(s, *s.whole, piece, before, now)) << "after " << seen;
    before = std::move(now);
  }
  EXPECT_GE(Shared(*s.whole), s.config->SharedBytes(s.whole->tokens_seen()));
}

// Goes on from before step `first` and ends where the whole life ended.
void ExpectGoesOn(const Subject& s, SequenceCache& cache, size_t first, bool same_bytes = true) {
  for (size_t i = first; i < s.life.size(); ++i)
    ASSERT_TRUE(Same(Step(cache, s.text, s.life[i]), s.outputs[i])) << "step " << i;
  EXPECT_TRUE(cache.Serialize() == s.whole->Serialize());
  if (same_bytes) {
    EXPECT_EQ(cache.Stats().kv_bytes, s.whole->Stats().kv_bytes);
  }
}

// Where heads of different budgets grow, their rows are restored beside each other, wherever they lay; and where rows
// leave together, only as much room as those that are there need.
bool KeepsBytes(const Subject& s) {
  const LayerPolicy& policy = s.config->global();
  if (policy.codec->traits().group_rows > 1 || policy.bunches().rows > 1) return false;
  return policy.selector->Bounded() || policy.budgeter->differ() == BudgetsDiffer::kNowhere;
}

void Restored(Subject& s) {
  for (size_t n = 0; n < 3; ++n) {
    const size_t moment = s.rng.Below(s.life.size());
    SCOPED_TRACE(testing::Message() << "restored before step " << moment);
    SequenceCache cache(s.config);
    if (Chance(0.3, s.rng)) Step(cache, s.other, s.life[0]);  // forgotten
    cache.Restore(s.states[moment].data(), s.states[moment].size());
    ASSERT_TRUE(cache.Serialize() == s.states[moment]);
    const size_t bytes = cache.Stats().kv_bytes;
    const auto clone = cache.Clone();
    EXPECT_EQ(clone->Stats().kv_bytes, bytes);
    ExpectGoesOn(s, cache, moment, KeepsBytes(s));
    EXPECT_TRUE(clone->Serialize() == s.states[moment]);
    if (n == 0) ExpectGoesOn(s, *clone, moment, KeepsBytes(s));
  }
}

void Cloned(Subject& s) {
  const size_t moment = s.rng.Below(s.life.size());
  SCOPED_TRACE(testing::Message() << "cloned before step " << moment);
  SequenceCache cache(s.config);
  for (size_t i = 0; i < moment; ++i) Step(cache, s.text, s.life[i]);
  const auto clone = cache.Clone(), strayed = clone->Clone(), apart = cache.CloneApart();
  for (size_t i = moment; i < s.life.size(); ++i) {
    Step(*strayed, s.other, s.life[i]);
    if (i == moment) {
      ASSERT_TRUE(clone->Serialize() == s.states[moment]);
    }
  }
  ExpectGoesOn(s, cache, moment);
  EXPECT_TRUE(clone->Serialize() == s.states[moment]);
  ExpectGoesOn(s, *clone, moment);
  // The other text's life on memory of its own alone.
  for (size_t i = moment; i < s.life.size(); ++i) Step(*apart, s.other, s.life[i]);
  EXPECT_TRUE(apart->Serialize() == strayed->Serialize());
  EXPECT_EQ(apart->Stats().kv_bytes, strayed->Stats().kv_bytes);
}

// Steps that were begun and taken back never were.
void Cancelled(Subject& s) {
  SequenceCache cache(s.config);
  for (size_t i = 0; i < s.life.size(); ++i) {
    if (Chance(0.2, s.rng)) {
      const size_t bytes = cache.Stats().kv_bytes, room = s.tiny().ctx - cache.tokens_seen();
      const size_t n = 1 + s.rng.Below(Chance(0.5, s.rng) ? std::min<size_t>(3, room) : room);
      constexpr StepKind kKinds[] = {StepKind::kDecode, StepKind::kPrompt, StepKind::kStream};
      cache.BeginStep(n, kKinds[s.rng.Below(3)]);
      cache.CancelStep();
      EXPECT_TRUE(cache.Serialize() == s.states[i]) << "before step " << i;
      EXPECT_LE(cache.Stats().kv_bytes, bytes) << "before step " << i;
    }
    ASSERT_TRUE(Same(Step(cache, s.text, s.life[i]), s.outputs[i])) << "step " << i;
  }
  EXPECT_TRUE(cache.Serialize() == s.whole->Serialize());
  EXPECT_EQ(cache.Stats().kv_bytes, s.whole->Stats().kv_bytes);
}

// One step of several caches at once, each with tokens of its own.
struct Taking {
  SequenceCache* cache;
  const Text* text;
  Piece piece;
};

std::vector<Outputs> StepTogether(const TinyShape& shape, const std::vector<Taking>& all) {
  std::vector<SequenceCache*> caches;
  size_t n = 0;
  for (const Taking& taking : all) {
    taking.cache->BeginStep(taking.piece.n, taking.piece.kind);
    caches.push_back(taking.cache);
    n += taking.piece.n;
  }
  CacheBatch batch;
  batch.Start(caches);
  std::vector<Outputs> outputs(all.size());
  const size_t kv = shape.n_kv_heads * shape.head_dim, qs = shape.n_heads * shape.head_dim;
  for (size_t l = 0; l < shape.n_layers; ++l) {
    std::vector<float> k, v, q, out(n * qs, std::nanf(""));
    for (const Taking& taking : all) {
      const size_t first = taking.cache->tokens_seen(), end = first + taking.piece.n;
      const auto add = [&](const std::vector<float>& from, size_t width, std::vector<float>& to) {
        to.insert(to.end(), from.begin() + static_cast<ptrdiff_t>(first * width),
                  from.begin() + static_cast<ptrdiff_t>(end * width));
      };
      add(taking.text->k[l], kv, k);
      add(taking.text->v[l], kv, v);
      add(taking.text->q[l], qs, q);
    }
    if (batch.WantsInputs(l)) {  // in two tiles
      batch.ReadInputs(l, 0, n / 2, v.data());
      batch.ReadInputs(l, n / 2, n - n / 2, v.data() + n / 2 * kv);
    }
    batch.Append(l, k.data(), v.data());
    batch.Attend(l, q.data(), out.data());
    size_t row = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const auto begin = out.begin() + static_cast<ptrdiff_t>(row * qs);
      outputs[i].emplace_back(begin, begin + static_cast<ptrdiff_t>(all[i].piece.n * qs));
      row += all[i].piece.n;
    }
  }
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(batch.failure(i), nullptr);
    all[i].cache->EndStep();
    if (all[i].piece.ends) all[i].cache->EndPrompt();
  }
  return outputs;
}

// Another random spec for the same model.
std::pair<std::shared_ptr<const CacheConfig>, RandomLife> Neighbour(Subject& s) {
  while (true) {
    try {
      const CacheSpec spec = RandomSpec(s.tiny().ctx, s.rng);
      NameSubject(s.name + ", beside " + spec.ToString());
      auto config = s.model.Config(spec);
      RandomLife life = MakeLife(*config, std::min(s.tiny().ctx, 1 + s.rng.Below(200)), s.rng);
      return {std::move(config), std::move(life)};
    } catch (const Error&) {
    }
  }
}

// Beside a sequence of another spec, and one of the same.
void Batched(Subject& s) {
  const auto [config, life] = Neighbour(s);
  SCOPED_TRACE("beside " + config->spec().ToString());
  SequenceCache own(s.config), twin(s.config), neighbour(config), alone(config);
  size_t next = 0;
  for (size_t i = 0; i < s.life.size(); ++i) {
    std::vector<Taking> all = {{&own, &s.text, s.life[i]}};
    if (next < life.size()) all.push_back({&neighbour, &s.other, life[next++]});
    if (i % 2 == 0) all.insert(all.begin(), {&twin, &s.text, s.life[i / 2]});
    const std::vector<Outputs> together = StepTogether(s.tiny(), all);
    for (size_t t = 0; t < all.size(); ++t) {
      const bool is_neighbour = all[t].cache == &neighbour;
      const Outputs want =
          is_neighbour ? Step(alone, s.other, all[t].piece) : s.outputs[all[t].cache == &own ? i : i / 2];
      ASSERT_TRUE(Same(together[t], want)) << "step " << i << (is_neighbour ? " of the other" : "");
    }
  }
  EXPECT_TRUE(own.Serialize() == s.whole->Serialize());
  EXPECT_TRUE(neighbour.Serialize() == alone.Serialize());
  EXPECT_EQ(own.Stats().kv_bytes, s.whole->Stats().kv_bytes);
}

// A first prompt read with another cache's rows.
void ReadWithAnother(Subject& s) {
  if (s.life[0].kind != StepKind::kPrompt) return;
  std::shared_ptr<const CacheConfig> leads;
  for (size_t tries = 0; tries < 20 && leads == nullptr; ++tries) {
    const auto config = Neighbour(s).first;
    if (s.config->ReadsPromptsAs(*config)) leads = config;
  }
  if (leads == nullptr) return;
  SCOPED_TRACE("read with " + leads->spec().ToString());
  SequenceCache leader(leads), alone(leads), other(s.config);
  SequenceCache* caches[] = {&leader, &other};
  const size_t leaders[] = {0, 0};
  for (SequenceCache* cache : caches) cache->BeginStep(s.life[0].n, StepKind::kPrompt);
  CacheBatch batch;
  batch.Start(caches, leaders);
  const Outputs outputs = RunLayers(batch, s.tiny(), s.text, 0, s.life[0].n);
  for (SequenceCache* cache : caches) cache->EndStep(), cache->EndPrompt();
  EXPECT_TRUE(Same(outputs, s.outputs[0]));
  EXPECT_TRUE(Same(outputs, Step(alone, s.text, s.life[0])));
  EXPECT_TRUE(leader.Serialize() == alone.Serialize());
  ExpectGoesOn(s, other, 1);
}

// The bytes of a prompt and of what is generated behind it are those of the plan; also where the cache was filled at
// random.
void Planned(Subject& s) {
  const size_t n_prompt = s.rng.Below(std::min<size_t>(s.text.n, 200)), n_most = s.text.n - n_prompt;
  const size_t n_decode = std::max<size_t>(n_prompt == 0 ? 1 : 0, std::min(n_most, s.rng.Below(60)));
  SCOPED_TRACE(testing::Message() << n_prompt << " + " << n_decode << " tokens");
  const CachePlan plan = s.config->Plan(n_prompt, n_decode);
  SequenceCache cache(s.config);
  RandomLife life;
  if (n_prompt > 0) AddPrompt(life, n_prompt, *s.config);
  for (const Piece& piece : life) Step(cache, s.text, piece);
  const bool varies = s.Select().says_how_many;
  if (varies)
    EXPECT_LE(cache.Stats().kv_bytes, plan.bytes_after_prompt);
  else
    EXPECT_EQ(cache.Stats().kv_bytes, plan.bytes_after_prompt);
  for (size_t i = 0; i < n_decode; ++i) Step(cache, s.text, {1, StepKind::kDecode});
  const CacheStats stats = cache.Stats();
  if (varies) {
    EXPECT_LE(stats.kv_bytes, plan.bytes_end);
    EXPECT_GE(stats.kv_bytes, plan.bytes_end_least);
    EXPECT_LE(stats.kv_bytes_peak, plan.bytes_peak);
    EXPECT_LE(stats.tokens_resident, plan.rows_end);
    EXPECT_GE(stats.tokens_resident, plan.rows_end_least);
  } else {
    EXPECT_EQ(stats.kv_bytes, plan.bytes_end);
    EXPECT_EQ(stats.kv_bytes_peak, plan.bytes_peak);
    EXPECT_DOUBLE_EQ(stats.tokens_resident, plan.rows_end);
    EXPECT_EQ(stats.kv_bytes_slack, plan.bytes_slack);
    EXPECT_EQ(plan.bytes_end_least, plan.bytes_end);
  }
  if (n_prompt == 0 || Chance(0.7, s.rng)) return;
  SequenceCache filled(s.config);
  filled.FillRandom(n_prompt, 1);
  EXPECT_EQ(filled.tokens_seen(), n_prompt);
  if (varies)
    EXPECT_LE(filled.Stats().kv_bytes, plan.bytes_after_prompt);
  else
    EXPECT_EQ(filled.Stats().kv_bytes, plan.bytes_after_prompt);
  if (s.config->policies().size() == 1) {  // else global layers are filled before local ones begin
    EXPECT_LE(filled.Stats().kv_bytes_peak, plan.bytes_peak);
  }
  for (size_t i = 0; i < std::min<size_t>(n_decode, 3); ++i)
    for (const auto& layer : Step(filled, s.text, {1, StepKind::kDecode}))
      for (const float x : layer) ASSERT_TRUE(std::isfinite(x)) << "after " << filled.tokens_seen();
}

// Bytes with some bits turned are refused, or are a cache that goes on.
void Damaged(Subject& s) {
  for (size_t n = 0; n < 20; ++n) {
    std::vector<std::byte> bad = s.states[s.rng.Below(s.states.size())];
    for (size_t flips = 1 + s.rng.Below(3); flips > 0; --flips)
      bad[s.rng.Below(n % 2 == 0 ? std::min<size_t>(bad.size(), 120) : bad.size())] ^=
          static_cast<std::byte>(1u << s.rng.Below(8));
    if (n % 5 == 0) bad.resize(s.rng.Below(bad.size() + 1));
    const std::unique_ptr<std::byte[]> exact(new std::byte[bad.size()]);
    std::copy(bad.begin(), bad.end(), exact.get());
    SequenceCache cache(s.config);
    try {
      cache.Restore(exact.get(), bad.size());
    } catch (const Error& error) {
      EXPECT_EQ(cache.tokens_seen(), 0u);
      continue;
    }
    if (cache.tokens_seen() + 40 > s.text.n) continue;  // an engine would not go on beyond the context
    RandomLife more;
    for (size_t i = 0; i < 12; ++i) more.push_back({1, StepKind::kDecode});
    AddPrompt(more, 20, *s.config);
    for (const Piece& piece : more) Step(cache, s.text, piece);
  }
}

// By two threads, under a config that was given its spans later.
void Threaded(Subject& s) {
  const ThreadPool pool(2);
  const ThreadScope scope(pool);
  SequenceCache cache(s.model.Config(s.spec)->WithProtected(s.protect));
  ExpectGoesOn(s, cache, 0);
}

void CanonicalTexts(const Subject& s) {
  const std::string canonical = s.spec.ToString();
  EXPECT_EQ(CacheSpec::Parse(canonical).ToString(), canonical);
  const auto again = s.model.Config(CacheSpec::Parse(s.config->spec_text()), s.protect);
  EXPECT_EQ(again->spec_text(), s.config->spec_text());
}

// The machine's other cores are not ours: with one thread no test waits for a pool.
class RandomSpecs : public testing::Test {
 protected:
  const ThreadPool pool_{1};
  const ThreadScope scope_{pool_};
};

void ExpectEach(Subject& s) {
  CanonicalTexts(s);
  ASSERT_NO_FATAL_FAILURE(LiveWhole(s));
  Planned(s);
  Restored(s);
  Cloned(s);
  Cancelled(s);
  Batched(s);
  ReadWithAnother(s);
  if (Chance(0.2, s.rng)) Damaged(s);
  if (Chance(0.1, s.rng)) Threaded(s);
}

void ExpectPromises(Subject& s) {
  try {
    ExpectEach(s);
  } catch (const Error& error) {
    ADD_FAILURE() << error.what();
  }
}

TEST_F(RandomSpecs, KeepWhatEveryCachePromises) {
  const Seeds seeds(300);
  for (uint64_t seed = seeds.first; seed < seeds.end; ++seed) {
    Subject s(seed);
    SCOPED_TRACE(s.name);
    ExpectPromises(s);
  }
}

TEST_F(RandomSpecs, NameEveryMethod) {
  std::set<std::string> named;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Rng rng(seed);
    const CacheSpec spec = RandomSpec(240, rng);
    for (const SpecTerm& term : spec.terms()) named.insert(term.name);
  }
  for (const Method* method : Methods())
    EXPECT_TRUE(named.contains(std::string(method->name)) || method->name == DefaultTerm(method->stage))
        << method->name;
}

// Those that once did not keep them.
TEST_F(RandomSpecs, KeepThemSince) {
  for (const char* const spec :
       {"window(12, sinks=2, positions=cache)+split(2)+f32", "snapkv(56)+ada", "h2o(400)+ada", "h2o(200, extra=3)+less",
        "window(100000, sinks=3900)", "snapkv(17, pool=avg)+split+ada+think(window=17)",
        "tova(160)+match(every=112)+f32", "tova(177)+less+balanced(4, v=3, window=1)",
        "tova(10)+pyramid(1000000)+csr(4, sample=8, guard=5)",
        "full+cluster(1000000, sinks=0, every=130, skip=1, offload=\"/tmp\")+prefill(chunk=13)"}) {
    size_t lives = 0;
    for (uint64_t seed = 0; lives < 8; ++seed) {
      ASSERT_LT(seed, 1000u) << spec << " fits no model";
      Subject s(seed, spec);
      if (s.config == nullptr) continue;
      SCOPED_TRACE(s.name);
      ExpectPromises(s);
      ++lives;
    }
  }
}

// Whatever is written, a spec is taken or refused with a sentence.
TEST_F(RandomSpecs, AreRefusedWithASentence) {
  const Seeds seeds(3000);
  for (uint64_t seed = seeds.first; seed < seeds.end; ++seed) {
    Rng rng(seed * 2);
    const RandomModel model(rng);
    const std::string text = Garbled(RandomSpec(model.tiny.ctx, rng).ToString(), rng);
    NameSubject(fmt::format("seed {}, garbled: {}", seed, text));
    try {
      const CacheSpec spec = CacheSpec::Parse(text);
      ASSERT_EQ(CacheSpec::Parse(spec.ToString()).ToString(), spec.ToString()) << text;
      const auto config = model.Config(spec);
      config->Plan(20, 3);
    } catch (const Error& error) {
      ASSERT_GT(std::strlen(error.what()), 20u) << error.what();
    }
  }
}

}  // namespace
}  // namespace lesskv
