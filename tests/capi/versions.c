/* Programs that were built with another version of the header: the library touches the bytes that their structures have and
 * not one more, and does not overlook what it cannot know. */
#include <lesskv/lesskv.h>
#include <stdio.h>
#include <string.h>

#define MODEL LESSKV_SOURCE_DIR "/models/lesskv-small.gguf"

static int failures = 0;

static void check(bool holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "versions.c:%d: %s (last error: %s)\n", line, what, lesskv_last_error());
}
#define CHECK(condition) check((condition), #condition, __LINE__)
#define OK(call) check((call) == LESSKV_OK, #call, __LINE__)
#define REFUSES(call, word) check((call) == LESSKV_INVALID_ARGUMENT && strstr(lesskv_last_error(), word) != NULL, #call, __LINE__)

static bool all_are(const void* bytes, size_t n, unsigned char value) {
  for (size_t i = 0; i < n; ++i)
    if (((const unsigned char*)bytes)[i] != value) return false;
  return true;
}

/* An older header: its structures end before the last field of today's. */
typedef struct older_generate_params {
  size_t size;
  float temperature;
  int32_t top_k;
  float top_p, min_p, repeat_penalty;
  int32_t repeat_last_n;
  uint64_t seed;
  size_t max_tokens;
  const char* const* stops;
  size_t n_stops;
  bool (*on_text)(const char* text, size_t n_bytes, void* user_data);
  void* user_data;
} older_generate_params;

typedef struct older_sequence_params {
  size_t size;
  const char* kv_spec;
  size_t ctx;
  const lesskv_span* protected_spans;
} older_sequence_params;

typedef struct older_cache_shape {
  size_t size;
  size_t n_layers, n_heads, n_kv_heads, head_dim, ctx;
  size_t rope_dims;
  bool rope_halves;
  double rope_theta, rope_linear;
  float scale;
  const float* rope_factors;
  double rope_magnitude;
  const size_t* windows;
} older_cache_shape;

typedef struct older_stats {
  size_t size;
  size_t tokens_seen;
  double tokens_resident;
} older_stats;

#define GUARDED(type)         \
  struct {                    \
    type known;               \
    unsigned char behind[64]; \
  }

static void older_programs(lesskv_model* model) {
  GUARDED(older_generate_params) how;
  memset(&how, 7, sizeof how);
  OK(lesskv_generate_params_init((lesskv_generate_params*)&how, sizeof how.known));
  CHECK(how.known.size == sizeof how.known && how.known.top_k == 40 && how.known.max_tokens == SIZE_MAX);
  CHECK(how.known.user_data == NULL && all_are(how.behind, sizeof how.behind, 7));

  GUARDED(older_sequence_params) params;
  memset(&params, 7, sizeof params);
  OK(lesskv_sequence_params_init((lesskv_sequence_params*)&params, sizeof params.known));
  CHECK(params.known.kv_spec == NULL && params.known.ctx == 0 && all_are(params.behind, sizeof params.behind, 7));

  /* What they lack is at its default, not what lies behind: 0x0707... protected spans, penalties of 3e38. */
  lesskv_sequence* sequence = NULL;
  const int32_t token = 5;
  params.known.ctx = 64;
  how.known.max_tokens = 3;
  OK(lesskv_sequence_new(model, (const lesskv_sequence_params*)&params, &sequence));
  memset(how.behind, 0x7f, sizeof how.behind); /* 3e38, out of range */
  OK(lesskv_generate(sequence, &token, 1, (const lesskv_generate_params*)&how, NULL));
  GUARDED(older_stats) stats;
  memset(&stats, 7, sizeof stats);
  stats.known.size = sizeof stats.known;
  OK(lesskv_sequence_get_stats(sequence, (lesskv_stats*)&stats));
  CHECK(stats.known.size == sizeof stats.known && stats.known.tokens_seen > 0 && stats.known.tokens_resident > 0);
  CHECK(all_are(stats.behind, sizeof stats.behind, 7));
  lesskv_sequence_free(sequence);

  GUARDED(older_cache_shape) shape;
  memset(&shape, 7, sizeof shape);
  OK(lesskv_cache_shape_init((lesskv_cache_shape*)&shape, sizeof shape.known));
  CHECK(shape.known.head_dim == 64 && shape.known.rope_magnitude == 1 && all_are(shape.behind, sizeof shape.behind, 7));
  const size_t window = 8;
  lesskv_cache* cache = NULL;
  shape.known.windows = &window;
  memset(shape.behind, 0, sizeof shape.behind); /* a base of 0 would be refused */
  OK(lesskv_cache_new((const lesskv_cache_shape*)&shape, NULL, 1, &cache));
  lesskv_cache_free(cache);
}

/* A later header: its structures go on behind the last field of today's. */
#define LATER(type)       \
  struct {                \
    type known;           \
    uint64_t later;       \
    unsigned char behind; \
  }

/* What init gives is accepted by `call`, which refuses it when the later field asks for something. */
#define LATER_OPTIONS(type, init, set, call, as_ever)                                             \
  do {                                                                                            \
    LATER(type) o;                                                                                \
    memset(&o, 7, sizeof o);                                                                      \
    OK(init(&o.known, offsetof(LATER(type), behind)));                                            \
    CHECK(o.known.size == offsetof(LATER(type), behind) && o.later == 0 && o.behind == 7);        \
    set;                                                                                          \
    check((call) == (as_ever), #call, __LINE__);                                                  \
    o.later = (uint64_t)1 << 63;                                                                  \
    REFUSES(call, "it needs a later lesskv");                                                     \
  } while (0)

static bool no_votes(const lesskv_selector_rows* rows, void* user_data) {
  (void)rows;
  (void)user_data;
  return true;
}

static void later_programs(lesskv_model* model) {
  lesskv_model* again = NULL;
  lesskv_sequence* s = NULL;
  lesskv_cache* cache = NULL;
  char* json = NULL;
  const int32_t token = 5;
  lesskv_plan plan;
  plan.size = sizeof plan;
  LATER_OPTIONS(lesskv_model_params, lesskv_model_params_init, (void)0, lesskv_model_load(MODEL, &o.known, &again), LESSKV_OK);
  lesskv_model_free(again);
  LATER_OPTIONS(lesskv_sequence_params, lesskv_sequence_params_init, o.known.ctx = 64, lesskv_sequence_new(model, &o.known, &s),
                LESSKV_OK);
  LATER_OPTIONS(lesskv_sequence_params, lesskv_sequence_params_init, (void)0,
                lesskv_sequence_load(model, &o.known, "/no/such/file", &s), LESSKV_NOT_FOUND);
  LATER_OPTIONS(lesskv_sequence_params, lesskv_sequence_params_init, (void)0, lesskv_plan_bytes(model, &o.known, 9, 1, &plan),
                LESSKV_OK);
  LATER_OPTIONS(lesskv_generate_params, lesskv_generate_params_init, o.known.max_tokens = 1,
                lesskv_generate(s, &token, 1, &o.known, NULL), LESSKV_OK);
  LATER_OPTIONS(lesskv_cache_shape, lesskv_cache_shape_init, (void)0, lesskv_cache_new(&o.known, NULL, 1, &cache), LESSKV_OK);
  LATER_OPTIONS(lesskv_selector, lesskv_selector_init, o.known.vote = no_votes, lesskv_selector_register("later", &o.known),
                LESSKV_OK);
  /* Without texts these are refused, too, but for another reason. */
  LATER_OPTIONS(lesskv_eval_params, lesskv_eval_params_init, REFUSES(lesskv_evaluate(model, &o.known, &json), "no text"),
                lesskv_evaluate(model, &o.known, &json), LESSKV_INVALID_ARGUMENT);
  LATER_OPTIONS(lesskv_train_less_params, lesskv_train_less_params_init, (void)0,
                lesskv_train_less(model, &o.known, "x", &json), LESSKV_INVALID_ARGUMENT);
  LATER_OPTIONS(lesskv_train_budgets_params, lesskv_train_budgets_params_init, (void)0,
                lesskv_train_budgets(model, &o.known, "x", &json), LESSKV_INVALID_ARGUMENT);

  LATER(lesskv_stats) stats;
  memset(&stats, 7, sizeof stats);
  stats.known.size = offsetof(LATER(lesskv_stats), behind);
  OK(lesskv_sequence_get_stats(s, &stats.known));
  CHECK(stats.known.size == offsetof(LATER(lesskv_stats), behind) && stats.known.kv_bytes > 0);
  CHECK(stats.later == 0 && stats.behind == 7);
  lesskv_cache_free(cache);
  lesskv_sequence_free(s);
}

static void impossible_sizes(void) {
  const size_t sizes[] = {0, 4, sizeof(lesskv_cache_shape) - 1, sizeof(lesskv_cache_shape) + 4, (size_t)1 << 16, SIZE_MAX};
  lesskv_cache *cache = NULL, *none = NULL;
  REFUSES(lesskv_cache_new(NULL, NULL, 1, &none), "shape"); /* which has no defaults */
  lesskv_cache_shape shape = lesskv_cache_default_shape();
  lesskv_stats stats;
  OK(lesskv_cache_new(&shape, NULL, 1, &cache));
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; ++i) {
    memset(&shape, 7, sizeof shape);
    REFUSES(lesskv_cache_shape_init(&shape, sizes[i]), "size");
    CHECK(all_are(&shape, sizeof shape, 7));
    shape = lesskv_cache_default_shape();
    shape.size = sizes[i];
    REFUSES(lesskv_cache_new(&shape, NULL, 1, &none), "size");
    stats.size = sizes[i];
    REFUSES(lesskv_cache_get_stats(cache, &stats), "size");
  }
  REFUSES(lesskv_cache_shape_init(NULL, sizeof shape), "structure");
  lesskv_cache_free(cache);
}

int main(void) {
  lesskv_model* model = NULL;
  OK(lesskv_model_load(MODEL, NULL, &model));
  older_programs(model);
  later_programs(model);
  impossible_sizes();
  lesskv_model_free(model);
  if (failures > 0) fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
}
