#include "kvcache/budget/pyramid.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

namespace lesskv {
namespace {

// m = 100: the top layer gets 5, the bottom one 195, w = 8 beside.
TEST(Pyramid, ByHand) {
  EXPECT_EQ(PyramidRows(3, 108, 8, 20, 100000), (std::vector<size_t>{203, 108, 13}));
  // n - w = 150 < 195: max = 150, min = 50.
  EXPECT_EQ(PyramidRows(3, 108, 8, 20, 158), (std::vector<size_t>{158, 108, 58}));
  EXPECT_EQ(PyramidRows(1, 108, 8, 20, 100000), (std::vector<size_t>{108}));
  // A prompt shorter than the budget: max < min, uniform.
  EXPECT_EQ(PyramidRows(3, 108, 8, 20, 90), (std::vector<size_t>{108, 108, 108}));
  EXPECT_EQ(PyramidRows(2, 10, 0, 1, 1000), (std::vector<size_t>{10, 10}));
  // 4 layers of 10: 19.5, 13.17, 6.83, 0.5; the three rows left go to the largest remainders, the lower layer first.
  EXPECT_EQ(PyramidRows(4, 10, 0, 20, 1000), (std::vector<size_t>{20, 13, 7, 0}));
}

TEST(Pyramid, SumIsExactAndSharesFall) {
  for (size_t n_layers : {2, 5, 31})
    for (size_t rows : {3, 50, 777})
      for (size_t window : {0, 2})
        for (double beta : {1.0, 3.3, 100.0})
          for (size_t n : {4, 60, 900, 100000}) {
            const auto layers = PyramidRows(n_layers, rows, window, beta, n);
            EXPECT_EQ(std::accumulate(layers.begin(), layers.end(), size_t{0}), n_layers * rows);
            EXPECT_TRUE(std::is_sorted(layers.rbegin(), layers.rend()));
            EXPECT_GE(layers.back(), window);
          }
}

}  // namespace
}  // namespace lesskv
