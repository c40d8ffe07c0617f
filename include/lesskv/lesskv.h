/* lesskv from C: models, tokens, generation, evaluation, and the key-value cache alone.
 *
 * Every function that can fail returns lesskv_status. Of a failure lesskv_last_error() tells more: one sentence, of the last
 * failed call of this thread, until the thread's next failed call. Nothing aborts and no exception leaves the library; a
 * handle that is NULL, was freed or is of another kind is LESSKV_INVALID_ARGUMENT (a freed one as long as its address was
 * not given to a new object). What a function writes through its pointers is left alone when it fails.
 *
 * Handles may be used from any thread, by one thread at a time. A model's calls that compute take turns: steps of several
 * threads on one model wait for one another, but a callback cannot wait for the call that it is in: from there, computing with
 * that model is LESSKV_INVALID_ARGUMENT. What a callback frees goes when the call ends. A model lives as long as a sequence
 * of it does.
 *
 * Structures begin with their `size`, the caller's sizeof, because later versions add fields at their ends; one without a
 * size (lesskv_span) never changes. Structures of options begin with what lesskv_*_default_params gives. One that is shorter
 * than the library's, of an older program, gets and gives the fields it has, and the others are at their defaults. Of a
 * longer one, what the library does not know must be 0, which asks for nothing, else the call is refused; it is 0 in what
 * the library writes. No version has a size that is no multiple of sizeof(size_t), and none has 65,536 bytes or more.
 */
#ifndef LESSKV_LESSKV_H
#define LESSKV_LESSKV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LESSKV_API __attribute__((visibility("default")))

typedef enum lesskv_status {
  LESSKV_OK = 0,
  LESSKV_INVALID_ARGUMENT = 1, /* an argument, spec or order of calls that makes no sense */
  LESSKV_BAD_FILE = 2,         /* damaged, truncated, foreign, or of an unsupported kind */
  LESSKV_NOT_FOUND = 3,        /* a file that is not there */
  LESSKV_MISMATCH = 4,         /* two things that do not belong together: sidecar and model, session and spec */
  LESSKV_IO = 5,               /* reading or writing failed */
  LESSKV_OUT_OF_MEMORY = 6,    /* memory that was asked for cannot be had */
  LESSKV_RUNTIME = 7           /* anything else that went wrong while running */
} lesskv_status;

LESSKV_API const char* lesskv_version(void);
LESSKV_API const char* lesskv_last_error(void);           /* "" when nothing has failed; of the calling thread */
LESSKV_API const char* lesskv_status_name(lesskv_status); /* "bad file"; "unknown status" for another number */

/* Called for each failure, from the thread that fails, with its sentence; NULL: none. For a host that keeps a log. What fails
 * inside the callback is not told. */
typedef void (*lesskv_log_callback)(lesskv_status status, const char* sentence, void* user_data);
LESSKV_API void lesskv_log_set(lesskv_log_callback callback, void* user_data);

/* ------------------------------------------------------------------------------------------------------------ models */

typedef struct lesskv_model lesskv_model; /* weights, tokenizer and threads */

typedef enum lesskv_compute {
  LESSKV_COMPUTE_AUTO = 0,
  LESSKV_COMPUTE_F32 = 1,
  LESSKV_COMPUTE_BF16 = 2,
  LESSKV_COMPUTE_INT8 = 3
} lesskv_compute;
typedef enum lesskv_loading { LESSKV_LOADING_AUTO = 0, LESSKV_LOADING_MAP = 1, LESSKV_LOADING_READ = 2 } lesskv_loading;

typedef struct lesskv_model_params {
  size_t size;
  int32_t n_threads; /* 0: all CPUs */
  lesskv_compute compute;
  lesskv_loading loading;
} lesskv_model_params;

typedef struct lesskv_model_info {
  size_t size; /* set by the caller: sizeof(lesskv_model_info) */
  size_t n_layers, n_heads, n_kv_heads, head_dim, n_vocab, n_ctx_train;
  size_t n_parameters, weight_bytes;
  int32_t bos, eos; /* -1: none */
  uint64_t fingerprint, identity; /* of the file; of the model, whatever its quantisation */
} lesskv_model_info;

/* Writes the defaults to the `size` bytes of a structure, and `size` to its first field; so do the other lesskv_*_init.
 * What follows it is the same for a program that is built with this header. */
LESSKV_API lesskv_status lesskv_model_params_init(lesskv_model_params* params, size_t size);
static inline lesskv_model_params lesskv_model_default_params(void) {
  lesskv_model_params params;
  lesskv_model_params_init(&params, sizeof params);
  return params;
}

/* params NULL: the defaults. */
LESSKV_API lesskv_status lesskv_model_load(const char* path, const lesskv_model_params* params, lesskv_model** model);
LESSKV_API void lesskv_model_free(lesskv_model* model); /* NULL and freed handles are ignored */
LESSKV_API lesskv_status lesskv_model_get_info(const lesskv_model* model, lesskv_model_info* info);

/* ------------------------------------------------------------------------------------------------------------ tokens */

/* Writes at most `capacity` ids and to *n_tokens how many there are: call again with that much room if it was too little.
 * add_special: BOS and EOS where the vocabulary wants them; parse_special: "<|im_end|>" in the text is that token. */
LESSKV_API lesskv_status lesskv_tokenize(const lesskv_model* model, const char* text, size_t n_bytes, bool add_special,
                                         bool parse_special, int32_t* tokens, size_t capacity, size_t* n_tokens);
/* The text of tokens, likewise in bytes, without a terminating zero; control tokens are left out if skip_special. The bytes
 * may be no whole UTF-8: tokens may be single bytes. */
LESSKV_API lesskv_status lesskv_detokenize(const lesskv_model* model, const int32_t* tokens, size_t n_tokens,
                                           bool skip_special, char* text, size_t capacity, size_t* n_bytes);
LESSKV_API lesskv_status lesskv_token_ends_generation(const lesskv_model* model, int32_t token, bool* ends);

/* --------------------------------------------------------------------------------------------------------- sequences */

typedef struct lesskv_sequence lesskv_sequence; /* one text in progress: its cache and the tokens it has seen */

typedef struct lesskv_span {
  int32_t begin, end; /* positions [begin, end) that no method lets go */
} lesskv_span;

typedef struct lesskv_sequence_params {
  size_t size;
  const char* kv_spec; /* "full", "h2o(5%)+less", ...; NULL: full (docs/methods.md) */
  size_t ctx;          /* tokens the text may have; 0: what the model was trained for */
  const lesskv_span* protected_spans;
  size_t n_protected_spans;
} lesskv_sequence_params;

typedef struct lesskv_stats {
  size_t size; /* set by the caller: sizeof(lesskv_stats) */
  size_t tokens_seen;
  double tokens_resident; /* mean rows a (global layer, KV head); likewise the next four, which left */
  double tokens_dropped, tokens_absorbed, tokens_merged, tokens_offloaded;
  size_t kv_bytes, kv_bytes_peak; /* allocated now; the most so far */
  size_t kv_bytes_full;           /* what a full f16 cache of the same tokens takes */
} lesskv_stats;

LESSKV_API lesskv_status lesskv_sequence_params_init(lesskv_sequence_params* params, size_t size);
static inline lesskv_sequence_params lesskv_sequence_default_params(void) {
  lesskv_sequence_params params;
  lesskv_sequence_params_init(&params, sizeof params);
  return params;
}

LESSKV_API lesskv_status lesskv_sequence_new(lesskv_model* model, const lesskv_sequence_params* params,
                                             lesskv_sequence** sequence);
LESSKV_API lesskv_status lesskv_sequence_clone(const lesskv_sequence* sequence, lesskv_sequence** clone);
LESSKV_API void lesskv_sequence_free(lesskv_sequence* sequence);
LESSKV_API lesskv_status lesskv_sequence_get_stats(const lesskv_sequence* sequence, lesskv_stats* stats);
/* The tokens seen, as lesskv_tokenize gives tokens. */
LESSKV_API lesskv_status lesskv_sequence_get_tokens(const lesskv_sequence* sequence, int32_t* tokens, size_t capacity,
                                                    size_t* n_tokens);

/* A whole prompt or turn: read, and the cache cut at its end as the spec says. logits: NULL, or [n_vocab] of what follows
 * the last token. A sequence whose call failed for memory halfway can only be freed. */
LESSKV_API lesskv_status lesskv_prefill(lesskv_sequence* sequence, const int32_t* tokens, size_t n_tokens, float* logits);
/* One token each for n sequences of one model, which share the products of weights. logits: NULL, or [n, n_vocab]. */
LESSKV_API lesskv_status lesskv_decode(lesskv_sequence* const* sequences, const int32_t* tokens, size_t n, float* logits);

/* Session files, which lesskv run and chat read, too. The params must name the spec and context that it was saved with. What
 * one of theirs ends with, a token that its text has not seen, is read when it is loaded. */
LESSKV_API lesskv_status lesskv_sequence_save(const lesskv_sequence* sequence, const char* path);
LESSKV_API lesskv_status lesskv_sequence_load(lesskv_model* model, const lesskv_sequence_params* params, const char* path,
                                              lesskv_sequence** sequence);

typedef struct lesskv_plan {
  size_t size; /* set by the caller: sizeof(lesskv_plan) */
  size_t bytes_peak, bytes_after_prompt, bytes_end, bytes_full; /* of one sequence; a full f16 cache at the end */
  double rows_end;
} lesskv_plan;

/* What a sequence will take for a prompt of n_prompt tokens and n_decode more, without running it; at most, where a spec
   lets the text say how many rows stay (kvzap with a threshold). */
LESSKV_API lesskv_status lesskv_plan_bytes(lesskv_model* model, const lesskv_sequence_params* params, size_t n_prompt,
                                           size_t n_decode, lesskv_plan* plan);

/* -------------------------------------------------------------------------------------------------------- generation */

typedef enum lesskv_finish {
  LESSKV_FINISH_LENGTH = 0,      /* max_tokens */
  LESSKV_FINISH_END = 1,         /* a token that ends a generation */
  LESSKV_FINISH_STOP = 2,        /* one of stops */
  LESSKV_FINISH_CONTEXT = 3,     /* the context is full */
  LESSKV_FINISH_INTERRUPTED = 4  /* on_text said so */
} lesskv_finish;

/* What is added to the logit of a token: in [-100, 100], or -INFINITY: it is never chosen. */
typedef struct lesskv_token_bias {
  int32_t token;
  float bias;
} lesskv_token_bias;

typedef struct lesskv_generate_params {
  size_t size;
  float temperature; /* 0: greedy */
  int32_t top_k;     /* 0: all */
  float top_p, min_p, repeat_penalty;
  int32_t repeat_last_n;
  uint64_t seed;
  size_t max_tokens; /* 0: only read; SIZE_MAX: until the text or the context ends */
  const char* const* stops;
  size_t n_stops;
  /* Text as it becomes certain, whole UTF-8 characters, not terminated; NULL: none. Returning false ends the generation. */
  bool (*on_text)(const char* text, size_t n_bytes, void* user_data);
  void* user_data;
  /* In [-2, 2], 0: off. Of a token that this call generated n > 0 times, n * frequency_penalty + presence_penalty is taken
   * from the logit. */
  float frequency_penalty, presence_penalty;
  const lesskv_token_bias* logit_bias;
  size_t n_logit_bias;
  bool ignore_eos; /* tokens that end a text are never chosen: only max_tokens, stops and the context end it */
} lesskv_generate_params;

typedef struct lesskv_generate_result {
  size_t size; /* set by the caller: sizeof(lesskv_generate_result) */
  size_t prompt_tokens, generated_tokens;
  double prefill_seconds, decode_seconds;
  lesskv_finish finish;
  int32_t pending_token; /* generated but not yet seen by the sequence: the next prompt begins with it; -1: none */
} lesskv_generate_result;

LESSKV_API lesskv_status lesskv_generate_params_init(lesskv_generate_params* params, size_t size);
static inline lesskv_generate_params lesskv_generate_default_params(void) {
  lesskv_generate_params params;
  lesskv_generate_params_init(&params, sizeof params);
  return params;
}

/* Reads the prompt (one token at least) and writes. params and result may be NULL. */
LESSKV_API lesskv_status lesskv_generate(lesskv_sequence* sequence, const int32_t* prompt, size_t n_prompt,
                                         const lesskv_generate_params* params, lesskv_generate_result* result);

/* -------------------------------------------------------------------------------------------------------- evaluation */

typedef struct lesskv_eval_params {
  size_t size;
  const char* const* kv_specs; /* caches under test; none: full */
  size_t n_kv_specs;
  const char* const* texts; /* files */
  size_t n_texts;
  size_t ctx;         /* tokens a window; 0: what the model was trained for */
  size_t max_windows; /* 0: all */
  size_t step;        /* > 0: text streams in, so many tokens a step (docs/evaluation.md) */
  size_t prompt;      /* with step 0: so many tokens at once, then one a step */
  bool divergence;    /* from the full cache's predictions, too */
} lesskv_eval_params;

LESSKV_API lesskv_status lesskv_eval_params_init(lesskv_eval_params* params, size_t size);
static inline lesskv_eval_params lesskv_eval_default_params(void) {
  lesskv_eval_params params;
  lesskv_eval_params_init(&params, sizeof params);
  return params;
}

/* The rows of lesskv eval perplexity or divergence -o json, to be freed by lesskv_string_free. */
LESSKV_API lesskv_status lesskv_evaluate(lesskv_model* model, const lesskv_eval_params* params, char** json);
LESSKV_API void lesskv_string_free(char* string);

/* --------------------------------------------------------------------------------------------------- the cache alone */

/* For another engine: its layers append unrotated keys and values and attend with unrotated queries; rotation, storage,
 * eviction and recurrence are the cache's business. Arrays are float32, row-major. A step is
 *
 *   lesskv_cache_begin_step(cache, n, kind)
 *   for each layer, in order: lesskv_cache_append(cache, layer, keys, values); lesskv_cache_attend(cache, layer, queries, out)
 *   lesskv_cache_end_step(cache)
 *
 * with lesskv_cache_end_prompt behind a prompt's last step. Calls in another order are LESSKV_INVALID_ARGUMENT and change
 * nothing. After LESSKV_OUT_OF_MEMORY inside a step the cache can only be freed. */
typedef struct lesskv_cache lesskv_cache;

typedef struct lesskv_cache_shape {
  size_t size;
  size_t n_layers, n_heads, n_kv_heads, head_dim, ctx;
  size_t rope_dims;   /* rotated coordinates of a head, even; 0: none */
  bool rope_halves;   /* pairs (i, i + rope_dims / 2); else (2 i, 2 i + 1) */
  double rope_theta;  /* base of the frequencies */
  double rope_linear; /* angles are divided by it */
  float scale;        /* scores are scale * q . k; 0: 1 / sqrt(head_dim) */
  const float* rope_factors; /* [rope_dims / 2] divisors of the frequencies; NULL: none */
  double rope_magnitude;     /* rotated coordinates are multiplied by it (the attention factor of YaRN) */
  /* [n_layers]; NULL: all 0, global layers, which the spec is about. Else a local layer, which sees and holds so many
   * last tokens whatever the spec says, and whose frequencies have a base of their own and are not stretched. */
  const size_t* windows;
  double local_rope_theta;
} lesskv_cache_shape;

typedef enum lesskv_step_kind {
  LESSKV_STEP_PROMPT = 0, /* a whole prompt: attended in full, cut at its end */
  LESSKV_STEP_STREAM = 1, /* a part of a text that streams in: attended against what is left, then cut */
  LESSKV_STEP_DECODE = 2  /* generated tokens */
} lesskv_step_kind;

LESSKV_API lesskv_status lesskv_cache_shape_init(lesskv_cache_shape* shape, size_t size);
static inline lesskv_cache_shape lesskv_cache_default_shape(void) {
  lesskv_cache_shape shape;
  lesskv_cache_shape_init(&shape, sizeof shape);
  return shape;
}

/* spec NULL: full. Methods with a sidecar need it by name: less(file="NAME.less.gguf"). With prefill(chunk=N) in the
 * spec text comes in stream steps of at most N tokens, and prompt steps are refused; cascade's block is the caller's to
 * heed. n_threads 0: all CPUs. */
LESSKV_API lesskv_status lesskv_cache_new(const lesskv_cache_shape* shape, const char* spec, int32_t n_threads,
                                          lesskv_cache** cache);
LESSKV_API lesskv_status lesskv_cache_clone(const lesskv_cache* cache, lesskv_cache** clone); /* between steps */
LESSKV_API void lesskv_cache_free(lesskv_cache* cache);
LESSKV_API lesskv_status lesskv_cache_begin_step(lesskv_cache* cache, size_t n_tokens, lesskv_step_kind kind);
/* keys, values [n_tokens, n_kv_heads, head_dim], copied before it returns. */
LESSKV_API lesskv_status lesskv_cache_append(lesskv_cache* cache, size_t layer, const float* keys, const float* values);
/* queries, out [n_tokens, n_heads, head_dim]; query head h reads KV head h / (n_heads / n_kv_heads). */
LESSKV_API lesskv_status lesskv_cache_attend(lesskv_cache* cache, size_t layer, const float* queries, float* out);
LESSKV_API lesskv_status lesskv_cache_end_step(lesskv_cache* cache);
LESSKV_API lesskv_status lesskv_cache_end_prompt(lesskv_cache* cache);
LESSKV_API lesskv_status lesskv_cache_get_stats(const lesskv_cache* cache, lesskv_stats* stats);
/* Positions that one head holds, ascending, as lesskv_tokenize gives tokens. */
LESSKV_API lesskv_status lesskv_cache_get_positions(const lesskv_cache* cache, size_t layer, size_t kv_head,
                                                    int32_t* positions, size_t capacity, size_t* n_positions);
/* The state as bytes, between steps; likewise with room for `capacity`. Loading needs a new cache of the same shape and spec. */
LESSKV_API lesskv_status lesskv_cache_save(const lesskv_cache* cache, void* bytes, size_t capacity, size_t* n_bytes);
LESSKV_API lesskv_status lesskv_cache_load(lesskv_cache* cache, const void* bytes, size_t n_bytes);

/* ---------------------------------------------------------------------------------------- selectors of the caller's own */

/* One KV head of a layer after a step's attention and before rows leave. Pointers are valid during the call only. */
typedef struct lesskv_selector_rows {
  size_t size; /* the library's: later versions tell more behind these */
  size_t layer, kv_head; /* the layer among the global ones */
  lesskv_step_kind kind;
  size_t tokens_seen, n_step; /* this step included; of this step, which are the last rows */
  size_t budget;              /* rows that may stay (before a budget method that measures has divided them) */
  size_t n_rows;
  const int32_t* positions; /* [n_rows], all below tokens_seen, not in order after the first eviction */
  const float* attention;   /* [n_rows] probabilities, summed over the observed queries and the group's heads; NULL: none */
  float* votes;             /* [n_rows], to be written: the rows with the most stay; of equals the earlier in the text */
  char* sentence;           /* room for why the call fails, terminated, and how much */
  size_t sentence_capacity;
} lesskv_selector_rows;

typedef struct lesskv_selector {
  size_t size;
  const char* summary;  /* one line; NULL: none */
  bool keeps_votes;     /* votes of rows that stay come back in the next step, 0 for new rows; else all begin at 0 */
  size_t last_queries;  /* queries of a step whose attention is wanted: 0 none, SIZE_MAX all */
  /* Votes on the rows of a head. Called once a step for each head, from several threads at a time, also when no row must
   * leave yet. false: it failed, and so does the call in progress, with its sentence; the cache or sequence can then only
   * be freed. */
  bool (*vote)(const lesskv_selector_rows* rows, void* user_data);
  void* user_data;
} lesskv_selector;

LESSKV_API lesskv_status lesskv_selector_init(lesskv_selector* selector, size_t size);
static inline lesskv_selector lesskv_selector_default(void) {
  lesskv_selector selector;
  lesskv_selector_init(&selector, sizeof selector);
  return selector;
}

/* From now on "NAME(rows)" and "NAME(rows, recent=N)" are terms of specs: `rows` rows a head stay (a number, or a
 * percentage of the context), the `recent` newest (4) among them whatever their votes. A name registered here before takes
 * the new selector for caches made later; those of the library's methods are refused. At most 64 names. Not while another
 * thread reads a spec; the function and its data must outlive every cache of that name. */
LESSKV_API lesskv_status lesskv_selector_register(const char* name, const lesskv_selector* selector);

/* ---------------------------------------------------------------------------------------------------------- training */

/* `done` in [0, 1] of a phase ("capture", "train", "budgets"). false: the training ends with LESSKV_RUNTIME. */
typedef bool (*lesskv_progress_callback)(const char* phase, double done, void* user_data);

typedef struct lesskv_train_less_params {
  size_t size;
  const char* const* texts; /* files */
  size_t n_texts;
  const char* const* kv_specs; /* selectors and budgets to train for, "h2o(5%)"; one at least */
  size_t n_kv_specs;
  size_t ctx;       /* tokens of a training text; 0: what the model was trained for */
  size_t sequences; /* training texts, validation included */
  size_t rank, hidden, epochs, batch;
  double learning_rate;
  uint64_t seed;
  const char* work_folder; /* captures and states; NULL: SIDECAR.work, removed at the end */
  bool resume;             /* go on with what lies in the work folder */
  lesskv_progress_callback on_progress; /* NULL: none */
  void* user_data;
} lesskv_train_less_params;

typedef struct lesskv_train_budgets_params {
  size_t size;
  const char* const* texts; /* files */
  size_t n_texts;
  size_t sequences, tokens; /* texts of so many tokens, which the model reads twice */
  uint64_t seed;
  lesskv_progress_callback on_progress; /* NULL: none */
  void* user_data;
} lesskv_train_budgets_params;

LESSKV_API lesskv_status lesskv_train_less_params_init(lesskv_train_less_params* params, size_t size);
static inline lesskv_train_less_params lesskv_train_less_default_params(void) {
  lesskv_train_less_params params;
  lesskv_train_less_params_init(&params, sizeof params);
  return params;
}

LESSKV_API lesskv_status lesskv_train_budgets_params_init(lesskv_train_budgets_params* params, size_t size);
static inline lesskv_train_budgets_params lesskv_train_budgets_default_params(void) {
  lesskv_train_budgets_params params;
  lesskv_train_budgets_params_init(&params, sizeof params);
  return params;
}

/* lesskv train less and lesskv train budgets (docs/less.md, docs/methods.md): measure a model on texts and write the
 * sidecar, or the part of it that is theirs. json: NULL, or a report to be freed by lesskv_string_free: rows of layers with the mean
 * squared errors of the selector alone and of LESS; rows of ratios with the share of each head's rows that is needed. */
LESSKV_API lesskv_status lesskv_train_less(lesskv_model* model, const lesskv_train_less_params* params,
                                           const char* sidecar, char** json);
LESSKV_API lesskv_status lesskv_train_budgets(lesskv_model* model, const lesskv_train_budgets_params* params,
                                              const char* sidecar, char** json);

#ifdef __cplusplus
}
#endif

#endif
