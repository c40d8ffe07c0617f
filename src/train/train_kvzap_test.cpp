#include "train/train_kvzap.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "train/crop_source.h"
#include "train/ridge.h"
#include "train/row_scores.h"

namespace lesskv::train {
namespace {

// The bundled model on its sample text. A head's weights are the fit of all texts but for the first four rows of each, with
// the strength that does best on texts left out; its quantiles are those of what they give these rows.
TEST(TrainKvzap, WeightsAndQuantilesAreThoseOfTheScores) {
  const auto model = Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  const Engine engine(model, {.compute = ComputeChoice::kF32});
  const TrainKvzapOptions options{.texts = {LESSKV_SOURCE_DIR "/docs/sample.txt"}, .sequences = 2, .tokens = 80, .seed = 5};
  const TrainKvzapReport report = TrainKvzap(engine, *tokenizer, options, [](double) {});
  const SidecarScores& s = report.scores;
  ASSERT_EQ(s.quantiles.size(), s.bias.size() * SidecarScores::kQuantiles);

  const CropSource crops(*tokenizer, options.texts);
  std::vector<std::vector<float>> scores(s.bias.size());
  std::vector<std::vector<RidgeSums>> sums(s.n_kv_heads.size());  // [layers, texts]
  for (size_t text = 0; text < options.sequences; ++text) {
    const RowScores rows = MeasureRows(engine, crops.Crop(MixSeed(options.seed, text), options.tokens, false),
                                       MakeRepeatFrame(*model, *tokenizer), true);
    for (size_t l = 0, head = 0; l < s.n_kv_heads.size(); ++l) {
      std::vector<const float*> targets;
      for (size_t h = 0; h < s.n_kv_heads[l]; ++h) targets.push_back(&rows.scores[head + h][4]);
      sums[l].emplace_back(s.width, s.n_kv_heads[l]).Add(&rows.inputs[l][4 * s.width], targets, options.tokens - 4);
      for (size_t h = 0; h < s.n_kv_heads[l]; ++h, ++head)
        for (size_t t = 4; t < options.tokens; ++t) {
          double score = double(s.bias[head]);
          for (size_t c = 0; c < s.width; ++c)
            score += double(s.weight[head * s.width + c]) * double(rows.inputs[l][t * s.width + c]);
          scores[head].push_back(static_cast<float>(score));
        }
    }
  }
  for (size_t l = 0, head = 0; l < sums.size(); head += s.n_kv_heads[l++]) {
    RidgeSums whole = sums[l][0];
    whole.Add(sums[l][1]);
    const RidgeFit fit = FitRidge(whole, report.lambda[l]);
    for (size_t i = 0; i < fit.weight.size(); ++i) EXPECT_NEAR(s.weight[head * s.width + i], fit.weight[i], 1e-4) << l;
    double least = 1e300, chosen = 0;
    for (const double lambda : {1e-5, 1e-4, 1e-3, 1e-2, 1e-1}) {
      double error = 0;
      std::vector<double> r2(s.n_kv_heads[l]);
      for (const size_t text : {0, 1}) {
        const RidgeFit other = FitRidge(sums[l][1 - text], lambda);
        for (const double e : MeanSquaredError(other, sums[l][text])) error += e;
        for (size_t h = 0; h < r2.size(); ++h) r2[h] += SquaredCorrelation(other, sums[l][text])[h] / 2;
      }
      least = std::min(least, error);
      if (lambda != report.lambda[l]) continue;
      chosen = error;
      for (size_t h = 0; h < r2.size(); ++h) EXPECT_NEAR(s.r2[head + h], r2[h], 1e-5) << l;
    }
    EXPECT_EQ(chosen, least) << l;
  }
  for (size_t head = 0; head < scores.size(); ++head) {
    std::sort(scores[head].begin(), scores[head].end());
    const size_t n = scores[head].size();
    ASSERT_EQ(n, 2u * 76);
    for (size_t q = 1; q <= 99; ++q) EXPECT_NEAR(s.quantiles[head * 99 + q - 1], scores[head][n * q / 100], 1e-3) << head << " " << q;
  }
}

}  // namespace
}  // namespace lesskv::train
