#include "train/train_budgets.h"

#include <gtest/gtest.h>

namespace lesskv::train {
namespace {

// The first four rows do not count. Of the 8 others in two heads the best two, then the best four.
TEST(TrainBudgets, SharesByHand) {
  const std::vector<std::vector<float>> scores = {{9, 9, 9, 9, -1, -7, -2, -8}, {9, 9, 9, 9, -3, -4, -5, -6}};
  EXPECT_EQ(SharesOf(scores, {0.25f, 0.5f, 1.0f}), (std::vector<float>{0.5f, 0, 0.5f, 0.5f, 1, 1}));
  // Equal scores: the lower head first.
  EXPECT_EQ(SharesOf({std::vector<float>(6, 1.0f), std::vector<float>(6, 1.0f)}, {0.5f}), (std::vector<float>{1, 0}));
}

}  // namespace
}  // namespace lesskv::train
