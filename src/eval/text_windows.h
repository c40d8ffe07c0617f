// Text for perplexity and divergence: tokens that know how many bytes and words of the raw text they are, cut into
// windows of one context.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace lesskv {

// A whole file; throws Error when it cannot be read.
std::string ReadTextFile(const std::string& path);

// All vectors have one entry a token. A word, a run of bytes that are not ASCII white space, belongs to the token that
// holds its first byte, so that the sums over all tokens are the text's own bytes and words, which perplexities divide
// by (damaged UTF-8 excepted: a tokenizer may replace it).
struct TokenizedText {
  std::vector<int32_t> ids;
  std::vector<uint32_t> bytes;
  std::vector<uint32_t> words;
};

// Without special tokens: "<|endoftext|>" in a text is plain text.
TokenizedText TokenizeText(const Tokenizer& tokenizer, std::string_view text);

// One stretch of text that is processed from an empty cache. The first token is given and never scored: the BOS token
// (0 bytes, 0 words) where the vocabulary wants one, else the text's own.
struct TextWindow {
  std::vector<int32_t> ids;
  std::vector<uint32_t> bytes;
  std::vector<uint32_t> words;
};

// Disjoint windows of `length` tokens (first token included); the last one of a text may be shorter, and is left out
// when it has fewer than `min_length`. Windows never cross from one text to another.
std::vector<TextWindow> CutWindows(const Tokenizer& tokenizer, const TokenizedText& text, size_t length,
                                   size_t min_length);

// llama-perplexity's: see Protocol::llama_windows.
std::vector<TextWindow> CutLlamaWindows(const Tokenizer& tokenizer, const TokenizedText& text, size_t length);

// The windows of several files, by CutLlamaWindows if `llama`; with max_windows > 0 at most that many, evenly spaced over all of them. Throws Error
// when there is none.
std::vector<TextWindow> ReadWindows(const Tokenizer& tokenizer, std::span<const std::string> paths, size_t length,
                                    size_t min_length, size_t max_windows, bool llama = false);

// `count` of `total` indices, evenly spaced, the first one included: i * total / count.
std::vector<size_t> EvenlySpaced(size_t total, size_t count);

}  // namespace lesskv
