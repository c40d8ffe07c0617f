// tokenizer.json and the files beside it to the metadata tokenizer.ggml.*.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "convert/hf_directory.h"
#include "format/gguf_writer.h"

namespace lesskv {

struct HfVocabulary {
  std::string model;                // "llama" or "gpt2"
  std::string pre;                  // of "gpt2"
  std::vector<std::string> tokens;  // one a row of the embedding
  std::vector<int32_t> types;       // TokenType
  std::vector<float> scores;        // of "llama"
  std::vector<std::string> merges;  // of "gpt2"
  std::optional<uint32_t> bos, eos, unk, pad;
  std::vector<uint32_t> ends;  // what else ends a generation, as generation_config.json and config.json say
  bool add_bos = false, add_eos = false;
  bool add_space_prefix = false;       // of "llama"
  bool strips_behind_special = false;  // white space behind special tokens belongs to them (Phi 3)
  std::string chat_template;           // empty: none
  std::vector<std::string> notes;      // what people should know
};

// `n_rows`: of the embedding; rows behind the last token become tokens [PAD...] that are never used. Throws Error
// naming the thing for a tokenizer of another kind or with a part that the engine does not have.
HfVocabulary ReadHfVocabulary(const HfDirectory& directory, size_t n_rows);

// All but what ends a generation beside `eos`.
void AddVocabulary(const HfVocabulary& vocabulary, GgufWriter& writer);

}  // namespace lesskv
