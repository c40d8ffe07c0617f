// The cache alone, for another engine's layers.
#include <algorithm>
#include <cmath>
#include <optional>

#include "base/threads.h"
#include "capi/sequence.h"
#include "kvcache/sequence_cache.h"

using namespace lesskv;        // NOLINT
using namespace lesskv::capi;  // NOLINT

// A cache and where it stands in a step: calls in another order are refused here, before the cache sees them.
struct lesskv_cache {
  std::shared_ptr<ThreadPool> threads;
  std::unique_ptr<SequenceCache> cache;
  bool in_step = false, appended = false, broken = false;
  size_t next_layer = 0;
};

namespace {

constexpr lesskv_cache_shape kDefaults{
    sizeof kDefaults, 1, 1, 1, 64, 2048, 64, false, 10000.0, 1.0, 0, nullptr, 1.0, nullptr, 10000.0};
constexpr size_t kMost = 1 << 16;       // layers, heads, coordinates
constexpr size_t kMostCtx = 1u << 30;

std::shared_ptr<lesskv_cache> Live(const lesskv_cache* cache) {
  auto live = std::static_pointer_cast<lesskv_cache>(FindLive(cache, Kind::kCache, "cache"));
  Require(!live->broken, "a cache whose step failed can only be freed");
  return live;
}

std::shared_ptr<lesskv_cache> LiveBetweenSteps(const lesskv_cache* cache) {
  auto live = Live(cache);
  Require(!live->in_step, "a step is in progress");
  return live;
}

// Inside a step a failure leaves a cache that can only be destroyed.
template <typename Body>
void InStep(lesskv_cache& c, Body&& body) {
  const ThreadScope scope(*c.threads);
  try {
    body();
  } catch (...) {
    c.broken = true;
    throw;
  }
}

void SetWindows(const lesskv_cache_shape& o, CacheShape& shape) {
  RopeConfig local;
  local.n_dims = o.rope_dims;
  local.style = o.rope_halves ? RopeStyle::kHalves : RopeStyle::kInterleaved;
  local.base = o.local_rope_theta;
  const auto table = std::make_shared<const RopeTable>(local);
  for (size_t l = 0; l < shape.n_layers(); ++l) {
    if (o.windows[l] == 0) continue;
    if (o.windows[l] > kMostCtx)
      Fail(ErrorCode::kInvalidArgument, "windows[{}]: expected 0 (global) to {}, found {}", l, kMostCtx, o.windows[l]);
    shape.layers[l].window = o.windows[l];
    shape.layers[l].rope = table;
  }
}

CacheShape ShapeOf(const lesskv_cache_shape& o) {
  const auto within = [](const char* name, size_t value, size_t most) {
    if (value < 1 || value > most) Fail(ErrorCode::kInvalidArgument, "{}: expected 1 to {}, found {}", name, most, value);
  };
  within("n_layers", o.n_layers, kMost);
  within("n_heads", o.n_heads, kMost);
  within("n_kv_heads", o.n_kv_heads, kMost);
  within("head_dim", o.head_dim, kMost);
  within("ctx", o.ctx, kMostCtx);
  if (o.n_heads % o.n_kv_heads != 0)
    Fail(ErrorCode::kInvalidArgument, "{} query heads cannot share {} KV heads evenly", o.n_heads, o.n_kv_heads);
  if (o.rope_dims > o.head_dim)
    Fail(ErrorCode::kInvalidArgument, "rope_dims: expected at most the head's {}, found {}", o.head_dim, o.rope_dims);
  if (!std::isfinite(o.scale) || o.scale < 0)
    Fail(ErrorCode::kInvalidArgument, "scale: expected a positive number or 0 (1 / sqrt(head_dim)), found {}", o.scale);
  RopeConfig rope;
  rope.n_dims = o.rope_dims;
  rope.style = o.rope_halves ? RopeStyle::kHalves : RopeStyle::kInterleaved;
  rope.base = o.rope_theta;
  rope.linear_scale = o.rope_linear;
  rope.magnitude = o.rope_magnitude;
  if (o.rope_factors != nullptr) rope.frequency_factors.assign(o.rope_factors, o.rope_factors + o.rope_dims / 2);
  CacheShape shape = CacheShape::Uniform(o.n_layers, o.n_heads, o.n_kv_heads, o.head_dim, o.ctx, rope);
  for (LayerShape& layer : shape.layers)
    if (o.scale > 0) layer.scale = o.scale;
  if (o.windows != nullptr) SetWindows(o, shape);
  return shape;
}

StepKind KindOf(lesskv_step_kind kind) {
  switch (kind) {
    case LESSKV_STEP_PROMPT: return StepKind::kPrompt;
    case LESSKV_STEP_STREAM: return StepKind::kStream;
    case LESSKV_STEP_DECODE: return StepKind::kDecode;
  }
  Fail(ErrorCode::kInvalidArgument, "kind: expected prompt (0), stream (1) or decode (2), found {}", static_cast<int>(kind));
}

void RequireChunk(const CacheConfig& config, size_t n_tokens, StepKind kind) {
  // The blocks that a selector would read a prompt in are the caller's to choose.
  if (config.spec().Find(Stage::kPrefill) == nullptr || kind == StepKind::kDecode) return;
  const size_t chunk = config.prefill_chunk();
  if (kind == StepKind::kPrompt || n_tokens > chunk)
    Fail(ErrorCode::kInvalidArgument, "'{}' reads text in stream steps of at most {} tokens, found a {} step of {}",
         config.spec_text(), chunk, kind == StepKind::kPrompt ? "prompt" : "stream", n_tokens);
}

void RequireLayer(const lesskv_cache& c, size_t layer, bool appended) {
  Require(c.in_step, "no step is in progress");
  if (c.next_layer != layer || c.appended != appended)
    Fail(ErrorCode::kInvalidArgument, "layer {} cannot be {} now: {} of layer {} is next", layer,
         appended ? "attended" : "appended to", c.appended ? "attending" : "appending", c.next_layer);
}

}  // namespace

extern "C" {

lesskv_status lesskv_cache_shape_init(lesskv_cache_shape* shape, size_t size) { return Init(shape, size, kDefaults); }

lesskv_status lesskv_cache_new(const lesskv_cache_shape* shape, const char* spec, int32_t n_threads, lesskv_cache** cache) {
  return Guard([&] {
    Require(shape != nullptr && cache != nullptr, "a shape and a place for the cache are needed");
    const CacheShape s = ShapeOf(Options(shape, kDefaults));
    if (n_threads < 0 || n_threads > ThreadPool::kMaxThreads)
      Fail(ErrorCode::kInvalidArgument, "n_threads: expected 0 (all CPUs) to {}, found {}", ThreadPool::kMaxThreads, n_threads);
    const auto made = std::make_shared<lesskv_cache>();
    made->threads = std::make_shared<ThreadPool>(n_threads);
    made->cache = std::make_unique<SequenceCache>(CacheConfig::Create(CacheSpec::Parse(spec == nullptr ? "full" : spec), s));
    Hand(made, Kind::kCache, cache);
  });
}

lesskv_status lesskv_cache_clone(const lesskv_cache* cache, lesskv_cache** clone) {
  return Guard([&] {
    const auto from = LiveBetweenSteps(cache);
    Require(clone != nullptr, "there is nowhere to write the cache");
    const auto made = std::make_shared<lesskv_cache>();
    made->threads = from->threads;
    made->cache = from->cache->Clone();
    Hand(made, Kind::kCache, clone);
  });
}

void lesskv_cache_free(lesskv_cache* cache) { Release(cache, Kind::kCache); }

lesskv_status lesskv_cache_begin_step(lesskv_cache* cache, size_t n_tokens, lesskv_step_kind kind) {
  return Guard([&] {
    const auto live = LiveBetweenSteps(cache);
    lesskv_cache& c = *live;
    const size_t ctx = c.cache->config().shape().ctx, seen = c.cache->tokens_seen();
    if (n_tokens == 0 || n_tokens > ctx - seen)
      Fail(ErrorCode::kInvalidArgument, "a step of {} tokens does not fit: {} of {} tokens are seen", n_tokens, seen, ctx);
    const StepKind step_kind = KindOf(kind);
    RequireChunk(c.cache->config(), n_tokens, step_kind);
    const ThreadScope scope(*c.threads);
    c.cache->BeginStep(n_tokens, step_kind);
    c.in_step = true;
    c.appended = false;
    c.next_layer = 0;
  });
}

lesskv_status lesskv_cache_append(lesskv_cache* cache, size_t layer, const float* keys, const float* values) {
  return Guard([&] {
    const auto live = Live(cache);
    lesskv_cache& c = *live;
    RequireLayer(c, layer, false);
    if (layer >= c.cache->config().shape().n_layers())
      Fail(ErrorCode::kInvalidArgument, "all {} layers have been attended: the step ends next", layer);
    Require(keys != nullptr && values != nullptr, "keys and values are needed");
    InStep(c, [&] { c.cache->Append(layer, keys, values); });
    c.appended = true;
  });
}

lesskv_status lesskv_cache_attend(lesskv_cache* cache, size_t layer, const float* queries, float* out) {
  return Guard([&] {
    const auto live = Live(cache);
    lesskv_cache& c = *live;
    RequireLayer(c, layer, true);
    Require(queries != nullptr && out != nullptr, "queries and room for the output are needed");
    InStep(c, [&] { c.cache->Attend(layer, queries, out); });
    c.appended = false;
    ++c.next_layer;
  });
}

lesskv_status lesskv_cache_end_step(lesskv_cache* cache) {
  return Guard([&] {
    const auto live = Live(cache);
    lesskv_cache& c = *live;
    Require(c.in_step, "no step is in progress");
    const size_t n_layers = c.cache->config().shape().n_layers();
    if (c.next_layer != n_layers)
      Fail(ErrorCode::kInvalidArgument, "{} of {} layers have been attended: the step goes on", c.next_layer, n_layers);
    InStep(c, [&] { c.cache->EndStep(); });
    c.in_step = false;
  });
}

lesskv_status lesskv_cache_end_prompt(lesskv_cache* cache) {
  return Guard([&] {
    const auto live = LiveBetweenSteps(cache);
    lesskv_cache& c = *live;
    const ThreadScope scope(*c.threads);
    c.cache->EndPrompt();
  });
}

lesskv_status lesskv_cache_get_stats(const lesskv_cache* cache, lesskv_stats* stats) {
  return Guard([&] { Give(stats, StatsOf(LiveBetweenSteps(cache)->cache->Stats())); });
}

lesskv_status lesskv_cache_get_positions(const lesskv_cache* cache, size_t layer, size_t kv_head, int32_t* positions,
                                         size_t capacity, size_t* n_positions) {
  return Guard([&] {
    const auto live = LiveBetweenSteps(cache);
    const lesskv_cache& c = *live;
    const CacheShape& shape = c.cache->config().shape();
    if (layer >= shape.n_layers() || kv_head >= shape.layers[layer].n_kv_heads)
      Fail(ErrorCode::kInvalidArgument, "there is no KV head {} of layer {}", kv_head, layer);
    std::vector<int32_t> held;
    for (const Position position : c.cache->ResidentPositions(layer, kv_head)) held.push_back(ToInt(position));
    GiveArray(held, positions, capacity, n_positions);
  });
}

lesskv_status lesskv_cache_save(const lesskv_cache* cache, void* bytes, size_t capacity, size_t* n_bytes) {
  return Guard([&] {
    GiveArray(LiveBetweenSteps(cache)->cache->Serialize(), static_cast<std::byte*>(bytes), capacity, n_bytes);
  });
}

lesskv_status lesskv_cache_load(lesskv_cache* cache, const void* bytes, size_t n_bytes) {
  return Guard([&] {
    const auto live = LiveBetweenSteps(cache);
    lesskv_cache& c = *live;
    Require(c.cache->tokens_seen() == 0, "a state is loaded into a new cache");
    Require(bytes != nullptr && n_bytes > 0, "there are no bytes to read");
    auto restored = std::make_unique<SequenceCache>(
        CacheConfig::Create(c.cache->config().spec(), c.cache->config().shape()));  // a refusal leaves the old one
    restored->Restore(static_cast<const std::byte*>(bytes), n_bytes);
    c.cache = std::move(restored);
  });
}

}  // extern "C"
