// The pipelines of tokenizer.json recognised: which of the pre-tokenizers that GGUF knows by name cuts text as these
// do.
#pragma once

#include <string>

#include "format/json_reader.h"

namespace lesskv {

// tokenizer.ggml.pre for the byte-level pipeline of a whole tokenizer.json. Throws Error naming the step, or the
// patterns, that no known pre-tokenizer has.
std::string RecognisePreTokenizer(const JsonReader& tokenizer, bool ignore_merges);

// Whether a pre_tokenizer is byte-level, as far as its steps tell.
bool IsByteLevel(const JsonReader& tokenizer);

// Of a SentencePiece-like pipeline, which only writes spaces as U+2581.
struct SpaceRules {
  bool prefix = false;         // a space is put before a text
  bool only_at_start = false;  // but not behind special tokens
};
SpaceRules ReadSpaceRules(const JsonReader& tokenizer);

}  // namespace lesskv
