// The bundled model with its tokenizer, opened once for all evaluation tests, and where optional data lies.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "eval/setup.h"
#include "eval/text_windows.h"
#include "tokenizer/tokenizer.h"

namespace lesskv::testing_support {

struct OpenedModel {
  explicit OpenedModel(const std::string& path, ComputeChoice compute = ComputeChoice::kF32)
      : model(Model::Load(path)),
        tokenizer(Tokenizer::Create(LoadVocabulary(model->file()))),
        engine(model, {.threads = 1, .compute = compute}) {}

  EvalSetup Setup(const std::vector<std::string>& specs, size_t ctx, size_t batch = 16) {
    EvalSetup setup{.engine = &engine, .tokenizer = tokenizer.get(), .ctx = ctx, .batch = batch};
    for (const std::string& spec : specs) {
      setup.subjects.push_back({engine.MakeCacheConfig(CacheSpec::Parse(spec), ctx)});
    }
    return setup;
  }

  std::shared_ptr<const Model> model;
  std::unique_ptr<const Tokenizer> tokenizer;
  Engine engine;
};

inline OpenedModel& Bundled() {
  static OpenedModel opened(LESSKV_SOURCE_DIR "/models/lesskv-small.gguf");
  return opened;
}

inline const std::string kSampleText = LESSKV_SOURCE_DIR "/docs/sample.txt";

// LESSKV_SHARED_DIR, or the folder "shared" beside the checkout; where it is absent, tests skip.
inline std::filesystem::path SharedFile(const std::string& relative) {
  const char* const shared = std::getenv("LESSKV_SHARED_DIR");
  const auto root = shared != nullptr ? std::filesystem::path(shared)
                                      : std::filesystem::path(LESSKV_SOURCE_DIR).parent_path() / "shared";
  return root / relative;
}

}  // namespace lesskv::testing_support
