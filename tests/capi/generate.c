/* generate MODEL PROMPT: writes what follows, through a cache of five per cent. */
#include <lesskv/lesskv.h>
#include <stdio.h>
#include <string.h>

static bool show(const char* text, size_t n_bytes, void* user_data) {
  (void)user_data;
  return fwrite(text, 1, n_bytes, stdout) == n_bytes;
}

static int failed(void) {
  fprintf(stderr, "generate: %s\n", lesskv_last_error());
  return 1;
}

int main(int argc, char** argv) {
  lesskv_model* model = NULL;
  lesskv_sequence* sequence = NULL;
  int32_t prompt[1000];
  size_t n_prompt = 0;
  if (argc != 3) return 2;
  if (lesskv_model_load(argv[1], NULL, &model) != LESSKV_OK) return failed();

  lesskv_sequence_params params = lesskv_sequence_default_params();
  params.kv_spec = "h2o(5%)";
  if (lesskv_sequence_new(model, &params, &sequence) != LESSKV_OK) return failed();
  if (lesskv_tokenize(model, argv[2], strlen(argv[2]), true, false, prompt, 1000, &n_prompt) != LESSKV_OK) return failed();
  if (n_prompt > 1000) n_prompt = 1000;

  lesskv_generate_params how = lesskv_generate_default_params();
  how.temperature = 0;
  how.max_tokens = 20;
  how.on_text = show;
  if (lesskv_generate(sequence, prompt, n_prompt, &how, NULL) != LESSKV_OK) return failed();
  printf("\n");
  lesskv_sequence_free(sequence);
  lesskv_model_free(model);
  return 0;
}
