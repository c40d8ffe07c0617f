/* The loop of measure.py's cache part, from C: decode steps of one token through a cache that Python made. */
#include <lesskv/lesskv.h>

int decode_steps(lesskv_cache* cache, size_t n_layers, size_t n_steps, const float* keys, const float* values,
                 const float* queries, float* out) {
  for (size_t i = 0; i < n_steps; ++i) {
    if (lesskv_cache_begin_step(cache, 1, LESSKV_STEP_DECODE) != LESSKV_OK) return 1;
    for (size_t layer = 0; layer < n_layers; ++layer) {
      if (lesskv_cache_append(cache, layer, keys, values) != LESSKV_OK) return 1;
      if (lesskv_cache_attend(cache, layer, queries, out) != LESSKV_OK) return 1;
    }
    if (lesskv_cache_end_step(cache) != LESSKV_OK) return 1;
  }
  return 0;
}
