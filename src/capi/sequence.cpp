// Sequences: their life, steps, session files, plans.
#include "capi/sequence.h"

#include <algorithm>

#include "engine/session.h"

using namespace lesskv;        // NOLINT
using namespace lesskv::capi;  // NOLINT

namespace {

constexpr lesskv_sequence_params kDefaults{sizeof kDefaults, nullptr, 0, nullptr, 0};

CacheSpec SpecOf(const lesskv_sequence_params& o) { return CacheSpec::Parse(o.kv_spec == nullptr ? "full" : o.kv_spec); }

std::shared_ptr<const CacheConfig> ConfigOf(const LoadedModel& loaded, const lesskv_sequence_params& o) {
  Require(o.protected_spans != nullptr || o.n_protected_spans == 0, "there are no protected spans to read");
  constexpr size_t kMaxContext = size_t{1} << 30;  // positions are 32-bit
  if (o.ctx > kMaxContext) Fail(ErrorCode::kInvalidArgument, "ctx: expected at most {}, found {}", kMaxContext, o.ctx);
  std::vector<ProtectedSpan> spans;
  for (size_t i = 0; i < o.n_protected_spans; ++i) spans.push_back({o.protected_spans[i].begin, o.protected_spans[i].end});
  return loaded.engine->MakeCacheConfig(SpecOf(o), o.ctx, std::move(spans));
}

void Hand(std::shared_ptr<LoadedModel> loaded, Sequence sequence, lesskv_sequence** to) {
  const std::shared_ptr<lesskv_sequence> made(new lesskv_sequence{std::move(loaded), std::move(sequence)});
  lesskv::capi::Hand(made, Kind::kSequence, to);
}

// The token that the program had generated and its text had not yet seen. A full context has no room for it, nor for any more.
void ReadPending(LoadedModel& loaded, Session& session) {
  if (!session.pending_token || session.sequence.tokens().size() >= session.sequence.config().shape().ctx) return;
  const std::lock_guard lock(loaded.in_use);
  loaded.engine->Decode({{&session.sequence, {&*session.pending_token, 1}}});
}

LogitsSink CopyTo(float* logits) {
  if (logits == nullptr) return {};
  return [logits](std::span<const LogitsRow> rows) {
    for (const LogitsRow& row : rows) std::copy(row.logits.begin(), row.logits.end(), logits + row.tag * row.logits.size());
  };
}

}  // namespace

namespace lesskv::capi {

std::shared_ptr<lesskv_sequence> Live(const lesskv_sequence* sequence) {
  return std::static_pointer_cast<lesskv_sequence>(FindLive(sequence, Kind::kSequence, "sequence"));
}

lesskv_stats StatsOf(const CacheStats& s) {
  return {0,
          s.tokens_seen,
          s.tokens_resident,
          s.tokens_dropped,
          s.tokens_absorbed,
          s.tokens_merged,
          s.tokens_offloaded,
          s.kv_bytes,
          s.kv_bytes_peak,
          s.kv_bytes_full};
}

}  // namespace lesskv::capi

extern "C" {

lesskv_status lesskv_sequence_params_init(lesskv_sequence_params* params, size_t size) {
  return Init(params, size, kDefaults);
}

lesskv_status lesskv_sequence_new(lesskv_model* model, const lesskv_sequence_params* params, lesskv_sequence** sequence) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    Require(sequence != nullptr, "there is nowhere to write the sequence");
    Hand(loaded, Sequence(ConfigOf(*loaded, Options(params, kDefaults))), sequence);
  });
}

lesskv_status lesskv_sequence_clone(const lesskv_sequence* sequence, lesskv_sequence** clone) {
  return Guard([&] {
    const auto from = Live(sequence);
    Require(clone != nullptr, "there is nowhere to write the sequence");
    Require(!from->sequence.interrupted(), "a sequence whose step failed can only be freed");
    Hand(from->loaded, from->sequence.Clone(), clone);
  });
}

void lesskv_sequence_free(lesskv_sequence* sequence) { Release(sequence, Kind::kSequence); }

lesskv_status lesskv_sequence_get_stats(const lesskv_sequence* sequence, lesskv_stats* stats) {
  return Guard([&] { Give(stats, StatsOf(Live(sequence)->sequence.Stats())); });
}

lesskv_status lesskv_sequence_get_tokens(const lesskv_sequence* sequence, int32_t* tokens, size_t capacity, size_t* n_tokens) {
  return Guard([&] {
    const auto live = Live(sequence);
    GiveArray(live->sequence.tokens(), tokens, capacity, n_tokens);
  });
}

lesskv_status lesskv_prefill(lesskv_sequence* sequence, const int32_t* tokens, size_t n_tokens, float* logits) {
  return Guard([&] {
    const auto live = Live(sequence);
    Require(tokens != nullptr && n_tokens > 0, "a prompt of one token at least is needed");
    const std::lock_guard lock(live->loaded->in_use);
    const LogitsRows rows = logits == nullptr ? LogitsRows::kNone : LogitsRows::kLast;
    live->loaded->engine->Prefill({{&live->sequence, {tokens, n_tokens}, rows}}, CopyTo(logits));
  });
}

lesskv_status lesskv_decode(lesskv_sequence* const* sequences, const int32_t* tokens, size_t n, float* logits) {
  return Guard([&] {
    Require(sequences != nullptr && tokens != nullptr && n > 0, "sequences and a token for each are needed");
    std::vector<std::shared_ptr<lesskv_sequence>> live;
    std::vector<StepItem> items;
    for (size_t i = 0; i < n; ++i) {
      live.push_back(Live(sequences[i]));
      Require(live[i]->loaded == live[0]->loaded, "sequences of one step belong to one model");
      items.push_back({&live[i]->sequence, {tokens + i, 1}, logits == nullptr ? LogitsRows::kNone : LogitsRows::kLast, i});
    }
    const std::lock_guard lock(live[0]->loaded->in_use);
    live[0]->loaded->engine->Decode(items, CopyTo(logits));
  });
}

lesskv_status lesskv_sequence_save(const lesskv_sequence* sequence, const char* path) {
  return Guard([&] {
    const auto live = Live(sequence);
    Require(path != nullptr, "a path is needed");
    Require(!live->sequence.interrupted(), "a sequence whose step failed can only be freed");
    SaveSession(path, *live->loaded->engine, live->sequence, std::nullopt);
  });
}

lesskv_status lesskv_sequence_load(lesskv_model* model, const lesskv_sequence_params* params, const char* path,
                                   lesskv_sequence** sequence) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    Require(path != nullptr && sequence != nullptr, "a path and a place for the sequence are needed");
    const lesskv_sequence_params o = Options(params, kDefaults);
    Require(o.n_protected_spans == 0, "protected spans are the session's own");
    Session session = LoadSession(path, *loaded->engine, SpecOf(o), o.ctx);
    ReadPending(*loaded, session);
    Hand(loaded, std::move(session.sequence), sequence);
  });
}

lesskv_status lesskv_plan_bytes(lesskv_model* model, const lesskv_sequence_params* params, size_t n_prompt, size_t n_decode,
                                lesskv_plan* plan) {
  return Guard([&] {
    const auto config = ConfigOf(*Loaded(model), Options(params, kDefaults));
    const size_t ctx = config->shape().ctx;
    if (n_prompt == 0 || n_prompt > ctx || n_decode > ctx - n_prompt)
      Fail(ErrorCode::kInvalidArgument, "a prompt of {} tokens and {} more do not fit the context of {}", n_prompt, n_decode, ctx);
    const CachePlan p = config->Plan(n_prompt, n_decode);
    Give(plan, {0, p.bytes_peak, p.bytes_after_prompt, p.bytes_end, config->FullBytes(n_prompt + n_decode), p.rows_end});
  });
}

}  // extern "C"
