/* Every function of the C API from C: what it gives, and that each kind of mistake is a status with a sentence. */
#include <lesskv/lesskv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODEL LESSKV_SOURCE_DIR "/models/lesskv-small.gguf"
#define TEXT LESSKV_SOURCE_DIR "/docs/sample.txt"

static int failures = 0;

static void check(bool holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "use_all.c:%d: %s (last error: %s)\n", line, what, lesskv_last_error());
}
#define CHECK(condition) check((condition), #condition, __LINE__)
#define OK(call) check((call) == LESSKV_OK, #call, __LINE__)
#define REFUSES(call, word) check((call) == LESSKV_INVALID_ARGUMENT && strstr(lesskv_last_error(), word) != NULL, #call, __LINE__)

static int logged = 0;
static void log_failure(lesskv_status status, const char* sentence, void* user_data) {
  (void)status;
  (void)sentence;
  *(int*)user_data += 1;
}

/* Fails itself, and takes itself off. */
static void log_and_fail(lesskv_status status, const char* sentence, void* user_data) {
  CHECK(status == LESSKV_INVALID_ARGUMENT && strstr(sentence, "no live model") != NULL);
  CHECK(lesskv_prefill(NULL, NULL, 0, NULL) == LESSKV_INVALID_ARGUMENT);
  CHECK(strstr(sentence, "no live model") != NULL);
  *(int*)user_data += 1;
  lesskv_log_set(NULL, NULL);
}

static void logs(void) {
  int calls = 0;
  lesskv_model_info info;
  info.size = sizeof info;
  lesskv_log_set(log_and_fail, &calls);
  REFUSES(lesskv_model_get_info(NULL, &info), "no live model");
  REFUSES(lesskv_model_get_info(NULL, &info), "no live model");
  CHECK(calls == 1);
  lesskv_log_set(log_failure, &logged);
}

static lesskv_model* load(void) {
  lesskv_model* model = NULL;
  lesskv_model_params params = lesskv_model_default_params();
  params.n_threads = 2;
  OK(lesskv_model_load(MODEL, &params, &model));
  return model;
}

static void models(lesskv_model* model) {
  lesskv_model* none = NULL;
  lesskv_model_info info;
  info.size = sizeof info;
  OK(lesskv_model_get_info(model, &info));
  CHECK(info.n_layers > 0 && info.n_vocab > 1000 && info.identity != 0 && info.bos >= 0);
  CHECK(lesskv_model_load("/no/such/file.gguf", NULL, &none) == LESSKV_NOT_FOUND);
  CHECK(lesskv_model_load(TEXT, NULL, &none) == LESSKV_BAD_FILE);
  CHECK(none == NULL && strlen(lesskv_last_error()) > 10 && logged == 2);
  REFUSES(lesskv_model_load(NULL, NULL, &none), "path");
  lesskv_model_params params = lesskv_model_default_params();
  params.n_threads = -3;
  REFUSES(lesskv_model_load(MODEL, &params, &none), "n_threads");
  params = lesskv_model_default_params();
  params.size = 0;
  REFUSES(lesskv_model_load(MODEL, &params, &none), "size");
  REFUSES(lesskv_model_get_info((const lesskv_model*)&info, &info), "no live model");
  CHECK(strcmp(lesskv_status_name(LESSKV_BAD_FILE), "bad file") == 0);
  CHECK(strlen(lesskv_version()) >= 5);
  /* A caller of an older version, whose structure ends earlier. */
  memset(&info, 7, sizeof info);
  info.size = 2 * sizeof(size_t);
  OK(lesskv_model_get_info(model, &info));
  CHECK(info.n_layers < 100 && info.n_heads == (size_t)0x0707070707070707u);
}

static size_t prompt_of(lesskv_model* model, int32_t* tokens, size_t capacity) {
  const char* text = "The sea was calm, and the boats lay still in the harbour.";
  size_t n = 0, again = 0, n_bytes = 0;
  char back[200];
  bool ends = true;
  OK(lesskv_tokenize(model, text, strlen(text), true, false, NULL, 0, &n));
  OK(lesskv_tokenize(model, text, strlen(text), true, false, tokens, capacity, &again));
  CHECK(n == again && n > 5 && n < capacity);
  OK(lesskv_detokenize(model, tokens, n, true, back, sizeof back, &n_bytes));
  CHECK(n_bytes == strlen(text) && memcmp(back, text, n_bytes) == 0);
  OK(lesskv_token_ends_generation(model, tokens[n - 1], &ends));
  CHECK(!ends);
  int32_t bad = -1;
  REFUSES(lesskv_detokenize(model, &bad, 1, true, back, sizeof back, &n_bytes), "-1");
  REFUSES(lesskv_tokenize(model, NULL, 4, true, false, tokens, capacity, &n), "text");
  return n;
}

static bool collect(const char* text, size_t n_bytes, void* user_data) {
  strncat((char*)user_data, text, n_bytes);
  return true;
}
static bool stop_at_once(const char* text, size_t n_bytes, void* user_data) {
  (void)text;
  (void)n_bytes;
  (void)user_data;
  return false;
}

static void sequences(lesskv_model* model) {
  int32_t tokens[100], seen[100];
  const size_t n = prompt_of(model, tokens, 100);
  lesskv_model_info info;
  info.size = sizeof info;
  OK(lesskv_model_get_info(model, &info));
  float* logits = malloc(2 * info.n_vocab * sizeof(float));
  float* again = malloc(info.n_vocab * sizeof(float));
  lesskv_sequence_params params = lesskv_sequence_default_params();
  lesskv_sequence *sequence = NULL, *clone = NULL, *loaded = NULL, *bad = NULL;
  params.ctx = 256;
  params.kv_spec = "h2o(12)";
  OK(lesskv_sequence_new(model, &params, &sequence));
  OK(lesskv_prefill(sequence, tokens, n, logits));
  lesskv_stats stats;
  stats.size = sizeof stats;
  OK(lesskv_sequence_get_stats(sequence, &stats));
  CHECK(stats.tokens_seen == n && stats.tokens_resident <= 12 && stats.kv_bytes > 0);
  OK(lesskv_sequence_clone(sequence, &clone));

  /* Two sequences in one step are what each is alone. */
  lesskv_sequence* both[2] = {sequence, clone};
  const int32_t next[2] = {tokens[3], tokens[3]};
  OK(lesskv_decode(both, next, 2, logits));
  CHECK(memcmp(logits, logits + info.n_vocab, info.n_vocab * sizeof(float)) == 0);

  const char* path = "capi_session.bin";
  OK(lesskv_sequence_save(sequence, path));
  OK(lesskv_sequence_load(model, &params, path, &loaded));
  size_t n_seen = 0;
  OK(lesskv_sequence_get_tokens(loaded, seen, 100, &n_seen));
  CHECK(n_seen == n + 1 && memcmp(seen, tokens, n * sizeof(int32_t)) == 0 && seen[n] == tokens[3]);
  OK(lesskv_decode(&sequence, next, 1, logits));
  OK(lesskv_decode(&loaded, next, 1, again));
  CHECK(memcmp(logits, again, info.n_vocab * sizeof(float)) == 0);
  lesskv_sequence_params other = params;
  other.kv_spec = "window(12)";
  CHECK(lesskv_sequence_load(model, &other, path, &bad) == LESSKV_MISMATCH);
  remove(path);

  lesskv_plan plan;
  plan.size = sizeof plan;
  OK(lesskv_plan_bytes(model, &params, n, 2, &plan));
  OK(lesskv_sequence_get_stats(sequence, &stats));
  CHECK(plan.bytes_end == stats.kv_bytes && plan.bytes_full == stats.kv_bytes_full);
  REFUSES(lesskv_plan_bytes(model, &params, 200, 57, &plan), "256");

  other.kv_spec = "no_such_method(3)";
  REFUSES(lesskv_sequence_new(model, &other, &bad), "no_such_method");
  REFUSES(lesskv_prefill(sequence, NULL, 3, NULL), "token");
  int32_t outside = (int32_t)info.n_vocab;
  REFUSES(lesskv_prefill(sequence, &outside, 1, NULL), "token");
  CHECK(bad == NULL);
  lesskv_span span = {0, (int32_t)n};
  params.protected_spans = &span;
  params.n_protected_spans = 1;
  REFUSES(lesskv_sequence_new(model, &params, &bad), "protected");
  lesskv_sequence_free(clone);
  REFUSES(lesskv_prefill(clone, tokens, n, NULL), "no live sequence");
  lesskv_sequence_free(clone);
  lesskv_sequence_free(sequence);
  lesskv_sequence_free(loaded);
  free(logits);
  free(again);
}

static void generation(lesskv_model* model) {
  int32_t tokens[100];
  const size_t n = prompt_of(model, tokens, 100);
  char text[2000] = "", part[2000] = "";
  lesskv_sequence* sequence = NULL;
  lesskv_generate_result result;
  result.size = sizeof result;
  lesskv_generate_params how = lesskv_generate_default_params();
  how.temperature = 0;
  how.max_tokens = 12;
  how.on_text = collect;
  how.user_data = text;
  OK(lesskv_sequence_new(model, NULL, &sequence));
  OK(lesskv_generate(sequence, tokens, n, &how, &result));
  CHECK(result.generated_tokens == 12 && result.finish == LESSKV_FINISH_LENGTH && strlen(text) > 5);
  lesskv_sequence_free(sequence);

  /* Tokens that were generated come again and again; a caller of an older version, whose structure ends earlier, asks for
   * nothing of the kind. */
  how.user_data = part;
  how.frequency_penalty = how.presence_penalty = -2;
  how.size = offsetof(lesskv_generate_params, frequency_penalty);
  OK(lesskv_sequence_new(model, NULL, &sequence));
  OK(lesskv_generate(sequence, tokens, n, &how, &result));
  CHECK(strcmp(part, text) == 0);
  lesskv_sequence_free(sequence);
  part[0] = 0;
  how.size = sizeof how;
  OK(lesskv_sequence_new(model, NULL, &sequence));
  OK(lesskv_generate(sequence, tokens, n, &how, &result));
  CHECK(strcmp(part, text) != 0);
  how.presence_penalty = 3;
  REFUSES(lesskv_generate(sequence, tokens, n, &how, &result), "--presence-penalty");
  how.frequency_penalty = how.presence_penalty = 0;
  lesskv_sequence_free(sequence);

  /* Only one token may be chosen; then none of those that end a text. */
  const lesskv_token_bias only = {tokens[n - 1], 100};
  how.logit_bias = &only;
  how.n_logit_bias = 1;
  part[0] = 0;
  OK(lesskv_sequence_new(model, NULL, &sequence));
  OK(lesskv_generate(sequence, tokens, n, &how, &result));
  CHECK(result.pending_token == tokens[n - 1] && strcmp(part, text) != 0);
  lesskv_model_info info;
  info.size = sizeof info;
  OK(lesskv_model_get_info(model, &info));
  const lesskv_token_bias end = {info.eos, 100};
  how.logit_bias = &end;
  OK(lesskv_generate(sequence, tokens, 1, &how, &result));
  CHECK(result.finish == LESSKV_FINISH_END);
  how.ignore_eos = true;
  OK(lesskv_generate(sequence, tokens, 1, &how, &result));
  CHECK(result.finish == LESSKV_FINISH_LENGTH && result.generated_tokens == 12);
  const lesskv_token_bias unknown = {-1, 1};
  how.logit_bias = &unknown;
  REFUSES(lesskv_generate(sequence, tokens, 1, &how, &result), "--logit-bias");
  how.logit_bias = NULL;
  REFUSES(lesskv_generate(sequence, tokens, 1, &how, &result), "no biases");
  how.n_logit_bias = 0;
  how.ignore_eos = false;
  part[0] = 0;
  lesskv_sequence_free(sequence);

  /* The second half of the same text is a stop text. */
  const char* stops[1] = {text + strlen(text) / 2};
  how.stops = stops;
  how.n_stops = 1;
  how.user_data = part;
  OK(lesskv_sequence_new(model, NULL, &sequence));
  OK(lesskv_generate(sequence, tokens, n, &how, &result));
  CHECK(result.finish == LESSKV_FINISH_STOP && strncmp(part, text, strlen(part)) == 0 && strlen(part) <= strlen(text) / 2);
  how = lesskv_generate_default_params();
  how.on_text = stop_at_once;
  OK(lesskv_generate(sequence, tokens, 1, &how, &result));
  CHECK(result.finish == LESSKV_FINISH_INTERRUPTED || result.finish == LESSKV_FINISH_END);
  how.temperature = NAN;
  REFUSES(lesskv_generate(sequence, tokens, 1, &how, &result), "--temp");
  lesskv_sequence_free(sequence);
}

struct callers {
  lesskv_model* model;
  lesskv_sequence *sequence, *other;
  int calls;
};

/* What computes with the model would wait for its own end; what is freed goes when the call ends. */
static bool call_back(const char* text, size_t n_bytes, void* user_data) {
  struct callers* c = (struct callers*)user_data;
  const int32_t token = 5;
  int32_t tokens[100];
  size_t n = 0;
  if (c->calls++ > 0) return true;
  lesskv_train_budgets_params budgets = lesskv_train_budgets_default_params();
  const char* texts[1] = {TEXT};
  budgets.texts = texts;
  budgets.n_texts = 1;
  REFUSES(lesskv_prefill(c->other, &token, 1, NULL), "callback");
  REFUSES(lesskv_decode(&c->other, &token, 1, NULL), "callback");
  REFUSES(lesskv_train_budgets(c->model, &budgets, "never.less.gguf", NULL), "callback");
  OK(lesskv_tokenize(c->model, text, n_bytes, false, false, tokens, 100, &n));
  OK(lesskv_sequence_get_tokens(c->sequence, tokens, 100, &n));
  CHECK(n > 5);
  lesskv_sequence_free(c->sequence);
  lesskv_model_free(c->model);
  REFUSES(lesskv_sequence_get_tokens(c->sequence, tokens, 100, &n), "no live sequence");
  return true;
}

static void callbacks(void) {
  struct callers c = {load(), NULL, NULL, 0};
  int32_t tokens[100];
  const size_t n = prompt_of(c.model, tokens, 100);
  size_t n_seen = 1;
  OK(lesskv_sequence_new(c.model, NULL, &c.sequence));
  OK(lesskv_sequence_new(c.model, NULL, &c.other));
  lesskv_generate_params how = lesskv_generate_default_params();
  lesskv_generate_result result;
  result.size = 3;
  how.temperature = 0;
  how.max_tokens = 3;
  how.on_text = call_back;
  how.user_data = &c;
  REFUSES(lesskv_generate(c.sequence, tokens, n, &how, &result), "size"); /* before anything is done */
  OK(lesskv_sequence_get_tokens(c.sequence, NULL, 0, &n_seen));
  CHECK(n_seen == 0 && c.calls == 0);
  result.size = sizeof result;
  OK(lesskv_generate(c.sequence, tokens, n, &how, &result));
  CHECK(result.generated_tokens == 3 && c.calls > 1);
  OK(lesskv_prefill(c.other, tokens, n, NULL));
  lesskv_sequence_free(c.other);
}

static void evaluation(lesskv_model* model) {
  const char* specs[2] = {"full", "window(16)"};
  const char* texts[1] = {TEXT};
  char* json = NULL;
  lesskv_eval_params params = lesskv_eval_default_params();
  params.kv_specs = specs;
  params.n_kv_specs = 2;
  params.texts = texts;
  params.n_texts = 1;
  params.ctx = 128;
  params.max_windows = 2;
  params.divergence = true;
  OK(lesskv_evaluate(model, &params, &json));
  CHECK(json != NULL && strstr(json, "\"kl_mean\"") != NULL && strstr(json, "window(16") != NULL);
  lesskv_string_free(json);
  params.n_texts = 0;
  REFUSES(lesskv_evaluate(model, &params, &json), "text");
}

static void step(lesskv_cache* cache, const lesskv_cache_shape* shape, size_t n, float* out) {
  const size_t n_rows = n * shape->n_kv_heads * shape->head_dim, n_queries = n * shape->n_heads * shape->head_dim;
  float *k = malloc(n_rows * sizeof(float)), *v = malloc(n_rows * sizeof(float)), *q = malloc(n_queries * sizeof(float));
  OK(lesskv_cache_begin_step(cache, n, LESSKV_STEP_DECODE));
  for (size_t layer = 0; layer < shape->n_layers; ++layer) {
    for (size_t i = 0; i < n_rows; ++i) k[i] = (float)sin(0.7 * (double)(i + layer)), v[i] = (float)cos(0.3 * (double)i);
    for (size_t i = 0; i < n_queries; ++i) q[i] = (float)sin(0.2 * (double)(i + 3 * layer));
    OK(lesskv_cache_append(cache, layer, k, v));
    OK(lesskv_cache_attend(cache, layer, q, out));
  }
  OK(lesskv_cache_end_step(cache));
  free(k);
  free(v);
  free(q);
}

static void cache_alone(void) {
  lesskv_cache_shape shape = lesskv_cache_default_shape();
  shape.n_layers = 2;
  shape.n_heads = 4;
  shape.n_kv_heads = 2;
  shape.head_dim = 16;
  shape.rope_dims = 16;
  shape.ctx = 64;
  lesskv_cache *cache = NULL, *clone = NULL, *other = NULL;
  float out[3 * 4 * 16], again[3 * 4 * 16];
  OK(lesskv_cache_new(&shape, "h2o(8)", 1, &cache));
  /* One token attends to itself: the output is its value, head by head. */
  step(cache, &shape, 1, out);
  for (size_t i = 0; i < 4 * 16; ++i) CHECK(fabs(out[i] - cos(0.3 * (double)((i / 32) * 16 + i % 16))) < 1e-3);
  for (int i = 0; i < 6; ++i) step(cache, &shape, 3, out);
  lesskv_stats stats;
  stats.size = sizeof stats;
  OK(lesskv_cache_get_stats(cache, &stats));
  CHECK(stats.tokens_seen == 19 && stats.tokens_resident <= 8 && stats.tokens_dropped >= 11);
  int32_t positions[64];
  size_t n = 0, n_bytes = 0;
  OK(lesskv_cache_get_positions(cache, 1, 1, positions, 64, &n));
  CHECK(n <= 8 && positions[n - 1] == 18);

  OK(lesskv_cache_clone(cache, &clone));
  OK(lesskv_cache_save(cache, NULL, 0, &n_bytes));
  void* bytes = malloc(n_bytes);
  OK(lesskv_cache_save(cache, bytes, n_bytes, &n_bytes));
  OK(lesskv_cache_new(&shape, "h2o(8)", 1, &other));
  CHECK(lesskv_cache_load(other, bytes, n_bytes / 2) == LESSKV_BAD_FILE);
  OK(lesskv_cache_load(other, bytes, n_bytes));
  step(cache, &shape, 2, out);
  step(other, &shape, 2, again);
  CHECK(memcmp(out, again, 2 * 4 * 16 * sizeof(float)) == 0);
  step(clone, &shape, 2, again);
  CHECK(memcmp(out, again, 2 * 4 * 16 * sizeof(float)) == 0);
  free(bytes);

  /* The order of calls. */
  float x[4 * 16] = {0};
  REFUSES(lesskv_cache_append(cache, 0, x, x), "no step");
  REFUSES(lesskv_cache_end_step(cache), "no step");
  OK(lesskv_cache_begin_step(cache, 1, LESSKV_STEP_STREAM));
  REFUSES(lesskv_cache_begin_step(cache, 1, LESSKV_STEP_STREAM), "in progress");
  REFUSES(lesskv_cache_attend(cache, 0, x, x), "layer 0");
  REFUSES(lesskv_cache_append(cache, 1, x, x), "layer 1");
  OK(lesskv_cache_append(cache, 0, x, x));
  REFUSES(lesskv_cache_append(cache, 0, x, x), "layer 0");
  REFUSES(lesskv_cache_end_step(cache), "0 of 2");
  REFUSES(lesskv_cache_get_stats(cache, &stats), "in progress");
  OK(lesskv_cache_attend(cache, 0, x, x));
  OK(lesskv_cache_append(cache, 1, x, x));
  OK(lesskv_cache_attend(cache, 1, x, x));
  REFUSES(lesskv_cache_append(cache, 2, x, x), "layers");
  OK(lesskv_cache_end_step(cache));
  OK(lesskv_cache_end_prompt(cache));
  REFUSES(lesskv_cache_begin_step(cache, 60, LESSKV_STEP_DECODE), "64");
  lesskv_cache* none = NULL;
  shape.n_kv_heads = 3;
  REFUSES(lesskv_cache_new(&shape, NULL, 1, &none), "evenly");
  shape.n_kv_heads = 2;
  shape.rope_dims = 5;
  CHECK(lesskv_cache_new(&shape, NULL, 1, &none) != LESSKV_OK && none == NULL);
  lesskv_cache_free(cache);
  lesskv_cache_free(clone);
  lesskv_cache_free(other);
  lesskv_cache_free(NULL);
}

/* A scale doubles the scores, a window hides what is behind it, factors divide frequencies. */
static void shapes_of_models(void) {
  lesskv_cache_shape shape = lesskv_cache_default_shape();
  shape.n_layers = 2;
  shape.n_heads = 4;
  shape.n_kv_heads = 2;
  shape.head_dim = shape.rope_dims = 16;
  shape.ctx = 64;
  float usual[4 * 16], scaled[4 * 16], stretched[4 * 16], factored[4 * 16];
  const size_t windows[2] = {0, 3};
  float factors[8];
  int32_t positions[64];
  size_t n = 0;
  for (size_t i = 0; i < 8; ++i) factors[i] = 4;
  lesskv_cache* cache = NULL;
#define RUN(out)                                                        \
  OK(lesskv_cache_new(&shape, "full+f32", 1, &cache));                  \
  for (int i = 0; i < 9; ++i) step(cache, &shape, 1, out);              \
  OK(lesskv_cache_get_positions(cache, 1, 0, positions, 64, &n));       \
  lesskv_cache_free(cache)
  RUN(usual);
  CHECK(n == 9);
  shape.scale = 0.25f; /* 1 / sqrt(16), as usual */
  RUN(scaled);
  CHECK(memcmp(usual, scaled, sizeof usual) == 0);
  shape.scale = 4;
  RUN(scaled);
  CHECK(memcmp(usual, scaled, sizeof usual) != 0);
  shape.scale = 0;
  shape.rope_linear = 4;
  RUN(stretched);
  shape.rope_linear = 1;
  shape.rope_factors = factors;
  RUN(factored);
  for (size_t i = 0; i < 4 * 16; ++i) CHECK(fabsf(stretched[i] - factored[i]) < 1e-5f);
  CHECK(memcmp(usual, factored, sizeof usual) != 0);
  shape.rope_factors = NULL;
  shape.windows = windows;
  RUN(scaled);
  CHECK(n <= 3 && positions[n - 1] == 8);
#undef RUN
  lesskv_cache* none = NULL;
  shape.scale = -1;
  REFUSES(lesskv_cache_new(&shape, NULL, 1, &none), "scale");
  shape.scale = 0;
  shape.local_rope_theta = 0;
  CHECK(lesskv_cache_new(&shape, NULL, 1, &none) == LESSKV_INVALID_ARGUMENT && none == NULL);
  shape.windows = NULL;
  OK(lesskv_cache_new(&shape, "h2o(8)+prefill(chunk=4)", 1, &cache));
  REFUSES(lesskv_cache_begin_step(cache, 4, LESSKV_STEP_PROMPT), "at most 4");
  REFUSES(lesskv_cache_begin_step(cache, 5, LESSKV_STEP_STREAM), "at most 4");
  OK(lesskv_cache_begin_step(cache, 4, LESSKV_STEP_STREAM));
  lesskv_cache_free(cache);
  OK(lesskv_cache_new(&shape, "cascade(8, levels=2, block=4)", 1, &cache)); /* whose blocks are the caller's steps */
  OK(lesskv_cache_begin_step(cache, 5, LESSKV_STEP_PROMPT));
  lesskv_cache_free(cache);
}

/* The latest tokens stay, as under window(rows, sinks=0); from the 12th token on it fails where user_data says so. */
static bool vote_for_latest(const lesskv_selector_rows* rows, void* user_data) {
  for (size_t i = 0; i < rows->n_rows; ++i) rows->votes[i] = (float)rows->positions[i];
  if (user_data == NULL || rows->tokens_seen < 12) return true;
  strncpy(rows->sentence, (const char*)user_data, rows->sentence_capacity - 1);
  return false;
}

static void selectors(lesskv_model* model) {
  lesskv_selector selector = lesskv_selector_default();
  REFUSES(lesskv_selector_register("latest", &selector), "vote");
  selector.vote = vote_for_latest;
  REFUSES(lesskv_selector_register("Latest", &selector), "small letters");
  REFUSES(lesskv_selector_register("h2o", &selector), "h2o");
  REFUSES(lesskv_selector_register(NULL, &selector), "name");
  OK(lesskv_selector_register("latest", &selector));
  lesskv_cache_shape shape = lesskv_cache_default_shape();
  shape.n_heads = 4;
  shape.n_kv_heads = 2;
  shape.head_dim = shape.rope_dims = 16;
  shape.ctx = 64;
  lesskv_cache* cache = NULL;
  float out[4 * 16];
  int32_t positions[64];
  size_t n = 0;
  REFUSES(lesskv_cache_new(&shape, "latest", 1, &cache), "latest(256)");
  OK(lesskv_cache_new(&shape, "latest(5, recent=1)", 2, &cache));
  for (int i = 0; i < 20; ++i) step(cache, &shape, 1, out);
  OK(lesskv_cache_get_positions(cache, 0, 1, positions, 64, &n));
  CHECK(n == 5 && positions[0] == 15 && positions[4] == 19);
  lesskv_cache_free(cache);

  selector.user_data = (void*)"enough of it";
  selector.last_queries = 0;
  OK(lesskv_selector_register("latest", &selector)); /* for caches made from now on */
  lesskv_sequence_params params = lesskv_sequence_default_params();
  params.kv_spec = "latest(5)";
  lesskv_sequence* sequence = NULL;
  OK(lesskv_sequence_new(model, &params, &sequence));
  const int32_t tokens[12] = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  OK(lesskv_prefill(sequence, tokens, 11, NULL));
  CHECK(lesskv_decode(&sequence, tokens, 1, NULL) == LESSKV_RUNTIME);
  CHECK(strcmp(lesskv_last_error(), "the selector 'latest' failed: enough of it") == 0);
  CHECK(lesskv_decode(&sequence, tokens, 1, NULL) == LESSKV_INVALID_ARGUMENT);
  lesskv_sequence_free(sequence);
}

static bool stop_training(const char* phase, double done, void* user_data) {
  *(int*)user_data += strcmp(phase, "budgets") == 0 && done > 0;
  return false;
}

static void training(lesskv_model* model) {
  const char* texts[1] = {TEXT};
  const char* path = "capi_budgets.less.gguf";
  char* json = NULL;
  int calls = 0;
  lesskv_train_budgets_params budgets = lesskv_train_budgets_default_params();
  remove(path);
  REFUSES(lesskv_train_budgets(model, &budgets, path, &json), "text");
  budgets.texts = texts;
  budgets.n_texts = 1;
  budgets.sequences = 2;
  budgets.tokens = 32;
  budgets.on_progress = stop_training;
  budgets.user_data = &calls;
  CHECK(lesskv_train_budgets(model, &budgets, path, &json) == LESSKV_RUNTIME && calls == 1 && json == NULL);
  budgets.sequences = 1; /* stopped when the last text is done, too */
  CHECK(lesskv_train_budgets(model, &budgets, path, &json) == LESSKV_RUNTIME && calls == 2 && json == NULL);
  CHECK(fopen(path, "rb") == NULL);
  budgets.sequences = 2;
  budgets.on_progress = NULL;
  OK(lesskv_train_budgets(model, &budgets, path, &json));
  CHECK(json != NULL && strstr(json, "\"shares\"") != NULL);
  lesskv_string_free(json);
  remove(path);
  lesskv_train_less_params less = lesskv_train_less_default_params();
  CHECK(less.sequences == 200 && less.rank == 8);
  less.texts = texts;
  less.n_texts = 1;
  REFUSES(lesskv_train_less(model, &less, path, NULL), "policy");
  REFUSES(lesskv_train_less(model, &less, NULL, NULL), "sidecar");
}

int main(void) {
  CHECK(strcmp(lesskv_last_error(), "") == 0);
  logs();
  lesskv_model* model = load();
  models(model);
  sequences(model);
  generation(model);
  callbacks();
  evaluation(model);
  cache_alone();
  shapes_of_models();
  selectors(model);
  training(model);
  lesskv_sequence* sequence = NULL;
  OK(lesskv_sequence_new(model, NULL, &sequence));
  lesskv_model_free(model);
  int32_t token = 5;
  OK(lesskv_prefill(sequence, &token, 1, NULL)); /* a sequence keeps its model alive */
  lesskv_sequence_free(sequence);
  lesskv_log_set(NULL, NULL);
  if (failures > 0) fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
}
