#include "train/train_kvzap.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/rng.h"
#include "train/crop_source.h"
#include "train/row_scores.h"

namespace lesskv::train {
namespace {

// The bundled model on its sample text: a head's quantiles are those of what its weights give the inputs that trained them,
// but for the first four of each text.
TEST(TrainKvzap, QuantilesAreThoseOfTheScores) {
  const auto model = Model::Load(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  const Engine engine(model, {.compute = ComputeChoice::kF32});
  const TrainKvzapOptions options{.texts = {LESSKV_SOURCE_DIR "/docs/sample.txt"}, .sequences = 2, .tokens = 80, .seed = 5};
  const TrainKvzapReport report = TrainKvzap(engine, *tokenizer, options, [](double) {});
  const SidecarScores& s = report.scores;
  ASSERT_EQ(s.quantiles.size(), s.bias.size() * SidecarScores::kQuantiles);
  for (const double lambda : report.lambda) {
    EXPECT_GE(lambda, 1e-5);
    EXPECT_LE(lambda, 1e-1);
  }

  const CropSource crops(*tokenizer, options.texts);
  std::vector<std::vector<float>> scores(s.bias.size());
  for (size_t text = 0; text < options.sequences; ++text) {
    const RowScores rows = MeasureRows(engine, crops.Crop(MixSeed(options.seed, text), options.tokens, false),
                                       MakeRepeatFrame(*model, *tokenizer), true);
    for (size_t l = 0, head = 0; l < s.n_kv_heads.size(); ++l)
      for (size_t h = 0; h < s.n_kv_heads[l]; ++h, ++head)
        for (size_t t = 4; t < options.tokens; ++t) {
          double score = double(s.bias[head]);
          for (size_t c = 0; c < s.width; ++c)
            score += double(s.weight[head * s.width + c]) * double(rows.inputs[l][t * s.width + c]);
          scores[head].push_back(static_cast<float>(score));
        }
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
