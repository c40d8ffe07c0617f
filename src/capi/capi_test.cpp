// Calls in any order, with handles that live, were freed, never were or are of another kind: each is done or refused, and
// nothing crashes (also under sanitizers).
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "base/rng.h"
#include "lesskv/lesskv.h"

namespace lesskv {
namespace {

class CApiFuzz : public testing::Test {
 protected:
  size_t Below(size_t n) { return rng_.Below(n); }

  lesskv_cache* Any() {
    if (handles_.empty() || Below(20) == 0) return Below(2) == 0 ? nullptr : reinterpret_cast<lesskv_cache*>(&rng_);
    return handles_[Below(handles_.size())];  // may have been freed
  }

  void New() {
    static const char* const kSpecs[] = {"full", "h2o(8)", "window(8)+q8", "tova(6)", "snapkv(50%)", "h2o(", "window(1)", nullptr};
    lesskv_cache_shape shape = lesskv_cache_default_shape();
    shape.n_layers = 1 + Below(2);
    shape.n_heads = 4;
    shape.n_kv_heads = Below(8) == 0 ? 3 : 2;
    shape.head_dim = shape.rope_dims = 32;
    shape.ctx = 40;
    if (Below(10) == 0) shape.size = Below(2) == 0 ? Below(sizeof shape) : 8 * Below(sizeof shape / 8);
    lesskv_cache* cache = nullptr;
    if (lesskv_cache_new(&shape, kSpecs[Below(8)], static_cast<int32_t>(Below(3)) - (Below(20) == 0), &cache) == LESSKV_OK)
      handles_.push_back(cache);
  }

  void Call() {
    // Room for the largest step of any shape: one whose structure was cut short has the default head size of 64.
    static float in[60 * 4 * 64], out[60 * 4 * 64];
    for (float& x : in) x = static_cast<float>(Below(2001)) * 1e-3f - 1;
    // Room for the structure of a later version, too: the library believes the size that it is told.
    alignas(lesskv_stats) static unsigned char room[200];
    auto& stats = *new (room) lesskv_stats;
    stats.size = Below(8) == 0 ? Below(sizeof room + 1) : sizeof stats;
    size_t n = 0;
    std::vector<char> bytes(Below(3) == 0 ? 0 : 100000);
    lesskv_cache* clone = nullptr;
    const size_t layer = Below(20) == 0 ? Below(5) : Below(2);
    switch (Below(20)) {
      case 0: New(); break;
      case 1: if (Below(4) == 0) lesskv_cache_free(Any()); break;
      case 2: if (handles_.size() < 12 && lesskv_cache_clone(Any(), &clone) == LESSKV_OK) handles_.push_back(clone); break;
      case 3: lesskv_cache_get_stats(Any(), &stats); break;
      case 4: lesskv_cache_end_prompt(Any()); break;
      case 5: {
        int32_t positions[4];
        lesskv_cache_get_positions(Any(), layer, Below(3), positions, 4, &n);
        break;
      }
      case 6:
        if (lesskv_cache_save(Any(), bytes.data(), bytes.size(), &n) == LESSKV_OK && n <= bytes.size() && n > 0) {
          if (Below(2) == 0) bytes[Below(n)] ^= 4;
          lesskv_cache_load(Any(), bytes.data(), n - Below(2));
        }
        break;
      case 7: lesskv_cache_begin_step(Any(), Below(60), static_cast<lesskv_step_kind>(Below(4))); break;
      case 8: case 9: case 10: lesskv_cache_append(Any(), layer, in, Below(30) == 0 ? nullptr : in); break;
      case 11: case 12: case 13: lesskv_cache_attend(Any(), layer, in, out); break;
      case 14: lesskv_cache_end_step(Any()); break;
      default: Step(Any(), in, out); break;
    }
  }

  // A step in its order, so that random calls meet caches with a history, too.
  void Step(lesskv_cache* cache, const float* in, float* out) {
    if (lesskv_cache_begin_step(cache, 1 + Below(6), static_cast<lesskv_step_kind>(Below(3))) != LESSKV_OK) return;
    size_t layer = 0;
    while (lesskv_cache_append(cache, layer, in, in) == LESSKV_OK) {
      EXPECT_EQ(lesskv_cache_attend(cache, layer, in, out), LESSKV_OK) << lesskv_last_error();
      ++layer;
    }
    EXPECT_EQ(lesskv_cache_end_step(cache), LESSKV_OK) << lesskv_last_error();
    ++n_steps_;
  }

  Rng rng_{17};
  std::vector<lesskv_cache*> handles_;
  size_t n_steps_ = 0;
};

TEST_F(CApiFuzz, CallsInAnyOrder) {
  for (int round = 0; round < 60; ++round) {
    for (int call = 0; call < 300; ++call) Call();
    for (lesskv_cache* handle : handles_) lesskv_cache_free(handle);
    handles_.clear();
  }
  EXPECT_GT(n_steps_, 500u);
}

// Every size is either the caller's, of which exactly the bytes are written, or refused, and then none is.
template <typename Structure>
void InitsOfAnySize(lesskv_status (*init)(Structure*, size_t)) {
  constexpr size_t kBytes = (1 << 16) + 64;
  union Room {
    Structure known;
    unsigned char bytes[kBytes];
  };
  const auto room = std::make_unique<Room>();
  Rng rng(5);
  for (int i = 0; i < 300; ++i) {
    const size_t size = rng.Below(3) == 0 ? rng.Below(kBytes) : rng.Below(2 * sizeof(Structure));
    std::fill_n(room->bytes, kBytes, 0xA5);
    const bool done = init(&room->known, size) == LESSKV_OK;
    ASSERT_EQ(done, size > 0 && size % 8 == 0 && size < 1 << 16) << size;
    const auto are = [&](size_t from, size_t to, unsigned char value) {
      return std::all_of(room->bytes + from, room->bytes + to, [&](unsigned char byte) { return byte == value; });
    };
    ASSERT_TRUE(are(done ? size : 0, kBytes, 0xA5)) << size;
    if (!done) continue;
    ASSERT_EQ(room->known.size, size);
    ASSERT_TRUE(are(std::min(size, sizeof(Structure)), size, 0)) << size;
  }
  EXPECT_EQ(init(nullptr, sizeof(Structure)), LESSKV_INVALID_ARGUMENT);
}

TEST(CApi, StructuresOfAnySize) {
  InitsOfAnySize(lesskv_model_params_init);
  InitsOfAnySize(lesskv_sequence_params_init);
  InitsOfAnySize(lesskv_generate_params_init);
  InitsOfAnySize(lesskv_eval_params_init);
  InitsOfAnySize(lesskv_cache_shape_init);
  InitsOfAnySize(lesskv_selector_init);
  InitsOfAnySize(lesskv_train_less_params_init);
  InitsOfAnySize(lesskv_train_budgets_params_init);
}

TEST(CApi, OneKindOfHandleIsNotAnother) {
  lesskv_cache_shape shape = lesskv_cache_default_shape();
  lesskv_cache* cache = nullptr;
  ASSERT_EQ(lesskv_cache_new(&shape, nullptr, 1, &cache), LESSKV_OK) << lesskv_last_error();
  int32_t token = 1;
  EXPECT_EQ(lesskv_prefill(reinterpret_cast<lesskv_sequence*>(cache), &token, 1, nullptr), LESSKV_INVALID_ARGUMENT);
  lesskv_model_free(reinterpret_cast<lesskv_model*>(cache));
  lesskv_stats stats;
  stats.size = sizeof stats;
  EXPECT_EQ(lesskv_cache_get_stats(cache, &stats), LESSKV_OK) << "another kind's free does nothing";
  lesskv_cache_free(cache);
  EXPECT_EQ(lesskv_cache_get_stats(cache, &stats), LESSKV_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace lesskv
