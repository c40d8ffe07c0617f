#include "train/train_budgets.h"

#include <gtest/gtest.h>

#include <cmath>

#include "train/crop_source.h"
#include "train/row_scores.h"

namespace lesskv::train {
namespace {

// The first four rows do not count. Of the 8 others in two heads the best two, then the best four.
TEST(TrainBudgets, SharesByHand) {
  const std::vector<std::vector<float>> scores = {{9, 9, 9, 9, -1, -7, -2, -8}, {9, 9, 9, 9, -3, -4, -5, -6}};
  EXPECT_EQ(SharesOf(scores, {0.25f, 0.5f, 1.0f}), (std::vector<float>{0.5f, 0, 0.5f, 0.5f, 1, 1}));
  EXPECT_EQ(SharesOf({std::vector<float>(14, 1.0f)}, {1.0f}), std::vector<float>{1}) << "though ten tenths are more";
  // Equal scores: the lower head first.
  EXPECT_EQ(SharesOf({std::vector<float>(6, 1.0f), std::vector<float>(6, 1.0f)}, {0.5f}), (std::vector<float>{1, 0}));
}

// The bundled model on its sample text: the mean over the texts, of which the third is the second half.
TEST(TrainBudgets, SharesAreMeansOverTheTexts) {
  const auto model = Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  const Engine engine(model, {.compute = ComputeChoice::kF32});
  const TrainBudgetsOptions options{
      .texts = {LESSKV_SOURCE_DIR "/docs/sample.txt"}, .sequences = 3, .tokens = 64, .ratios = {0.1f, 0.5f}, .seed = 5};
  const TrainBudgetsReport report = TrainBudgets(engine, *tokenizer, options, [](double) {});
  const CropSource crops(*tokenizer, options.texts);
  std::vector<std::vector<float>> shares;
  for (size_t text = 0; text < 3; ++text)
    shares.push_back(SharesOf(MeasureRows(engine, crops.Crop(MixSeed(options.seed, text), options.tokens, false),
                                          MakeRepeatFrame(*model, *tokenizer)).scores, options.ratios));
  const size_t n_heads = report.budgets.n_heads();
  ASSERT_EQ(report.budgets.shares.size(), 2 * n_heads);
  for (size_t i = 0; i < 2 * n_heads; ++i)
    EXPECT_NEAR(report.budgets.shares[i], (shares[0][i] + shares[1][i] + shares[2][i]) / 3, 1e-6) << i;
  for (size_t r = 0; r < 2; ++r) {
    double sa = 0, sb = 0, saa = 0, sbb = 0, sab = 0;
    const auto n = static_cast<double>(n_heads);
    for (size_t i = r * n_heads; i < (r + 1) * n_heads; ++i) {
      const double a = double(shares[0][i]) + shares[1][i], b = shares[2][i];
      sa += a, sb += b, saa += a * a, sbb += b * b, sab += a * b;
    }
    EXPECT_NEAR(report.correlation[r], (n * sab - sa * sb) / std::sqrt((n * saa - sa * sa) * (n * sbb - sb * sb)), 1e-5);
  }
}

}  // namespace
}  // namespace lesskv::train
