// A tiny model for fuzzers.
#pragma once

#include <memory>

#include "chat/chat_template.h"
#include "engine/engine.h"
#include "tokenizer/vocabulary.h"

namespace lesskv {

inline Engine& FuzzEngine() {
  static Engine engine(Model::Load(LESSKV_SOURCE_DIR "/tests/data/models/llama-gqa-tied.gguf"),
                       {.threads = 1, .compute = ComputeChoice::kF32});
  return engine;
}

inline const Tokenizer& FuzzTokenizer() {
  static const std::unique_ptr<const Tokenizer> tokenizer =
      Tokenizer::Create(LoadVocabulary(FuzzEngine().model().file()));
  return *tokenizer;
}

}  // namespace lesskv
