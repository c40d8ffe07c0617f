// Decoding speed of llama.cpp with many tokens in its cache, without computing their prompt, or that of a prompt's next
// tokens there. Built against a llama.cpp that lies beside lesskv (see README.md here); not part of lesskv's own build.
//
//   decode_at_depth MODEL THREADS DEPTH N REPEAT [CACHE_TYPE_K CACHE_TYPE_V FLASH_ATTENTION [TOGETHER]]
//
// N steps of TOGETHER tokens (1: decoding).
// 1,024 tokens are computed once; their saved state is loaded into as many further sequences as the depth takes, and all
// are then made part of sequence 0. Their positions repeat, which changes what is generated but not what it costs.
// Prints tokens per second of each repetition, one a line.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "decode_at_depth: %s\n", what);
  std::exit(1);
}

ggml_type TypeNamed(const std::string& name) {
  if (name == "f16") return GGML_TYPE_F16;
  if (name == "q8_0") return GGML_TYPE_Q8_0;
  if (name == "q4_0") return GGML_TYPE_Q4_0;
  Fail("a cache type is f16, q8_0 or q4_0");
}

constexpr int kPiece = 1024;  // llama.cpp has 256 sequences at most

void Step(llama_context* context, llama_token first_token, int n, llama_pos position) {
  llama_batch batch = llama_batch_init(n, 0, 1);
  batch.n_tokens = n;
  for (int i = 0; i < n; ++i) {
    batch.token[i] = first_token + i;
    batch.pos[i] = position + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = i + 1 == n;
  }
  if (llama_decode(context, batch) != 0) Fail("decoding failed");
  llama_get_logits(context);
  llama_batch_free(batch);
}

void Fill(llama_context* context, int depth) {
  std::vector<llama_token> tokens(kPiece, 17);
  for (int i = 0; i < kPiece; ++i) tokens[static_cast<size_t>(i)] = 10 + i * 7 % 20000;
  if (llama_decode(context, llama_batch_get_one(tokens.data(), kPiece)) != 0) Fail("the prompt failed");
  std::vector<uint8_t> state(llama_state_seq_get_size(context, 0));
  const size_t size = llama_state_seq_get_data(context, state.data(), state.size(), 0);
  for (int i = 1; i < depth / kPiece; ++i) {
    if (llama_state_seq_set_data(context, state.data(), size, i) == 0) Fail("a state could not be loaded");
    llama_memory_seq_cp(llama_get_memory(context), i, 0, -1, -1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) Fail("MODEL THREADS DEPTH N REPEAT [TYPE_K TYPE_V FLASH [TOGETHER]]");
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  const int threads = std::atoi(argv[2]), depth = std::atoi(argv[3]), n = std::atoi(argv[4]), repeat = std::atoi(argv[5]);
  const int together = argc > 9 ? std::atoi(argv[9]) : 1;
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) Fail("the model could not be loaded");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(depth + n * together * (repeat + 1) + kPiece);
  params.n_seq_max = static_cast<uint32_t>(depth / kPiece + 1);
  params.kv_unified = true;
  params.n_threads = params.n_threads_batch = threads;
  if (argc > 8) {
    params.type_k = TypeNamed(argv[6]);
    params.type_v = TypeNamed(argv[7]);
    params.flash_attn_type =
        std::atoi(argv[8]) != 0 ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  }
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) Fail("no context");
  if (depth >= kPiece) Fill(context, depth);
  llama_pos position = kPiece;
  for (int r = together > 1 && depth >= kPiece ? 0 : -1; r < repeat; ++r) {  // a round warms up, or what filled the cache
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < n; ++i, position += together) Step(context, 11 + i, together, position);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (r >= 0) std::printf("%.3f\n", n * together / seconds);
    std::fflush(stdout);
  }
  llama_free(context);
  llama_model_free(model);
  return 0;
}
