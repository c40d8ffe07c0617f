// Generation and evaluation.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "capi/sequence.h"
#include "engine/generate.h"
#include "eval/divergence.h"
#include "eval/perplexity.h"
#include "eval/window_batch.h"

using namespace lesskv;        // NOLINT
using namespace lesskv::capi;  // NOLINT

namespace {

lesskv_generate_params GenerateDefaults() {
  const SamplerOptions s;
  return {sizeof(lesskv_generate_params), s.temperature, s.top_k,   s.top_p, s.min_p, s.repeat_penalty, s.repeat_last_n, s.seed,
          SIZE_MAX,                       nullptr,       0,         nullptr, nullptr, s.frequency_penalty, s.presence_penalty,
          nullptr,                        0,             false};
}

constexpr lesskv_eval_params kEvalDefaults{sizeof kEvalDefaults, nullptr, 0, nullptr, 0, 0, 0, 8, 0, false};

lesskv_finish FinishOf(FinishReason reason) {
  switch (reason) {
    case FinishReason::kLength: return LESSKV_FINISH_LENGTH;
    case FinishReason::kEndOfText: return LESSKV_FINISH_END;
    case FinishReason::kStopString: return LESSKV_FINISH_STOP;
    case FinishReason::kContext: return LESSKV_FINISH_CONTEXT;
    case FinishReason::kInterrupted: break;
  }
  return LESSKV_FINISH_INTERRUPTED;
}

GenerateOptions OptionsOf(const lesskv_generate_params& o) {
  GenerateOptions options;
  options.sampler = {.temperature = o.temperature,
                     .top_k = o.top_k,
                     .top_p = o.top_p,
                     .min_p = o.min_p,
                     .repeat_penalty = o.repeat_penalty,
                     .repeat_last_n = o.repeat_last_n,
                     .frequency_penalty = o.frequency_penalty,
                     .presence_penalty = o.presence_penalty,
                     .seed = o.seed};
  Require(o.logit_bias != nullptr || o.n_logit_bias == 0, "there are no biases to read");
  for (size_t i = 0; i < o.n_logit_bias; ++i)
    options.sampler.logit_bias.push_back({o.logit_bias[i].token, o.logit_bias[i].bias});
  options.ignore_end = o.ignore_eos;
  options.max_tokens = o.max_tokens;
  options.stops = Strings(o.stops, o.n_stops, "stop texts");
  options.sequence_goes_on = true;
  return options;
}

}  // namespace

extern "C" {

lesskv_status lesskv_generate_params_init(lesskv_generate_params* params, size_t size) {
  return Init(params, size, GenerateDefaults());
}

lesskv_status lesskv_generate(lesskv_sequence* sequence, const int32_t* prompt, size_t n_prompt,
                              const lesskv_generate_params* params, lesskv_generate_result* result) {
  return Guard([&] {
    const auto live = Live(sequence);
    lesskv_sequence& s = *live;
    Require(prompt != nullptr && n_prompt > 0, "a prompt of one token at least is needed");
    const lesskv_generate_params o = Options(params, GenerateDefaults());
    GenerateOptions options = OptionsOf(o);
    RequireResult(result);
    std::atomic<bool> stop{false};
    options.stop = &stop;
    if (o.on_text != nullptr)
      options.on_text = [&](std::string_view text) { stop = stop || !o.on_text(text.data(), text.size(), o.user_data); };
    const std::lock_guard lock(s.loaded->in_use);
    const GenerateResult made = Generate(*s.loaded->engine, *s.loaded->tokenizer, s.sequence, {prompt, n_prompt}, options);
    if (result != nullptr)
      Give(result, {0, made.prompt_tokens, made.generated_tokens, made.prefill_seconds, made.decode_seconds,
                    FinishOf(made.reason), made.pending_token.value_or(-1)});
  });
}

lesskv_status lesskv_eval_params_init(lesskv_eval_params* params, size_t size) { return Init(params, size, kEvalDefaults); }

lesskv_status lesskv_evaluate(lesskv_model* model, const lesskv_eval_params* params, char** json) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    Require(json != nullptr, "there is nowhere to write the rows");
    const lesskv_eval_params o = Options(params, kEvalDefaults);
    std::vector<std::string> specs = Strings(o.kv_specs, o.n_kv_specs, "cache specs");
    if (specs.empty()) specs.emplace_back("full");
    const std::vector<std::string> texts = Strings(o.texts, o.n_texts, "texts");
    EvalSetup setup;
    setup.engine = loaded->engine.get();
    setup.tokenizer = loaded->tokenizer.get();
    Require(o.ctx <= size_t{1} << 30, "ctx: positions are 32-bit, so it is at most 2^30");
    setup.ctx = o.ctx == 0 ? loaded->model->config().train_ctx : o.ctx;
    for (const std::string& spec : specs)
      setup.subjects.push_back({loaded->engine->MakeCacheConfig(CacheSpec::Parse(spec), setup.ctx)});
    const Protocol protocol{o.step > 0 ? Protocol::Mode::kStream : Protocol::Mode::kContinue, o.step, o.prompt};
    CheckProtocol(protocol, setup.ctx);
    const std::lock_guard lock(loaded->in_use);
    const Report report = o.divergence ? EvaluateDivergence(setup, {texts, o.max_windows, protocol})
                                       : EvaluatePerplexity(setup, {texts, o.max_windows, protocol});
    GiveText(Format(report, OutputFormat::kJson), json);
  });
}

void lesskv_string_free(char* string) { std::free(string); }

}  // extern "C"
