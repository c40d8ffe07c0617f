// Models and tokens.
#include <algorithm>

#include "capi/handles.h"
#include "engine/run_info.h"

using namespace lesskv;        // NOLINT
using namespace lesskv::capi;  // NOLINT

namespace {

constexpr lesskv_model_params kDefaults{sizeof kDefaults, 0, LESSKV_COMPUTE_AUTO, LESSKV_LOADING_AUTO};

ComputeChoice Choice(lesskv_compute compute) {
  switch (compute) {
    case LESSKV_COMPUTE_AUTO: return ComputeChoice::kAuto;
    case LESSKV_COMPUTE_F32: return ComputeChoice::kF32;
    case LESSKV_COMPUTE_BF16: return ComputeChoice::kBF16;
    case LESSKV_COMPUTE_INT8: return ComputeChoice::kInt8;
  }
  Fail(ErrorCode::kInvalidArgument, "compute: expected auto (0), f32 (1), bf16 (2) or int8 (3), found {}", static_cast<int>(compute));
}

ModelLoading Loading(lesskv_loading loading) {
  switch (loading) {
    case LESSKV_LOADING_AUTO: return ModelLoading::kAuto;
    case LESSKV_LOADING_MAP: return ModelLoading::kMap;
    case LESSKV_LOADING_READ: return ModelLoading::kRead;
  }
  Fail(ErrorCode::kInvalidArgument, "loading: expected auto (0), map (1) or read (2), found {}", static_cast<int>(loading));
}

void RequireTokens(const Tokenizer& tokenizer, const int32_t* tokens, size_t n) {
  Require(tokens != nullptr || n == 0, "there are no tokens to read");
  for (size_t i = 0; i < n; ++i)
    if (tokens[i] < 0 || static_cast<size_t>(tokens[i]) >= tokenizer.size())
      Fail(ErrorCode::kInvalidArgument, "token {} is {}, the vocabulary has {}", i, tokens[i], tokenizer.size());
}

}  // namespace

extern "C" {

const char* lesskv_version(void) {
  static const std::string version = Version();
  return version.c_str();
}

lesskv_status lesskv_model_params_init(lesskv_model_params* params, size_t size) { return Init(params, size, kDefaults); }

lesskv_status lesskv_model_load(const char* path, const lesskv_model_params* params, lesskv_model** model) {
  return Guard([&] {
    Require(path != nullptr && model != nullptr, "a path and a place for the model are needed");
    const lesskv_model_params o = Options(params, kDefaults);
    if (o.n_threads < 0 || o.n_threads > 1024)
      Fail(ErrorCode::kInvalidArgument, "n_threads: expected 0 (all CPUs) to 1024, found {}", o.n_threads);
    auto loaded = std::make_shared<LoadedModel>();
    loaded->model = Model::Load(path, Loading(o.loading));
    loaded->tokenizer = Tokenizer::Create(LoadVocabulary(loaded->model->file()));
    if (loaded->tokenizer->size() > loaded->model->config().n_vocab)
      Fail(ErrorCode::kBadFile, "{}: the tokenizer has {} tokens, the model only {}", path, loaded->tokenizer->size(),
           loaded->model->config().n_vocab);
    loaded->engine = std::make_unique<Engine>(loaded->model, EngineOptions{o.n_threads, Choice(o.compute)});
    Hand(std::make_shared<lesskv_model>(lesskv_model{std::move(loaded)}), Kind::kModel, model);
  });
}

void lesskv_model_free(lesskv_model* model) { Release(model, Kind::kModel); }

lesskv_status lesskv_model_get_info(const lesskv_model* model, lesskv_model_info* info) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    const ModelConfig& c = loaded->model->config();
    Give(info, {0, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.n_vocab, c.train_ctx, loaded->model->parameter_count(),
                loaded->model->weight_bytes(), loaded->tokenizer->bos(), loaded->tokenizer->eos(), loaded->model->fingerprint(),
                loaded->model->identity()});
  });
}

lesskv_status lesskv_tokenize(const lesskv_model* model, const char* text, size_t n_bytes, bool add_special,
                              bool parse_special, int32_t* tokens, size_t capacity, size_t* n_tokens) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    Require(text != nullptr || n_bytes == 0, "there is no text to read");
    const std::string_view all = n_bytes == 0 ? std::string_view() : std::string_view(text, n_bytes);
    GiveArray(loaded->tokenizer->Encode(all, add_special, parse_special), tokens, capacity, n_tokens);
  });
}

lesskv_status lesskv_detokenize(const lesskv_model* model, const int32_t* tokens, size_t n_tokens, bool skip_special,
                                char* text, size_t capacity, size_t* n_bytes) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    RequireTokens(*loaded->tokenizer, tokens, n_tokens);
    GiveArray(loaded->tokenizer->Decode({tokens, n_tokens}, skip_special), text, capacity, n_bytes);
  });
}

lesskv_status lesskv_token_ends_generation(const lesskv_model* model, int32_t token, bool* ends) {
  return Guard([&] {
    const auto loaded = Loaded(model);
    RequireTokens(*loaded->tokenizer, &token, 1);
    Require(ends != nullptr, "there is nowhere to write the answer");
    *ends = loaded->tokenizer->IsEndOfGeneration(token);
  });
}

}  // extern "C"
