#include "eval/text_windows.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "base/check.h"
#include "base/error.h"

namespace lesskv {
namespace {

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

TextWindow MakeWindow(const TokenizedText& text, size_t begin, size_t end, int32_t bos) {
  TextWindow window;
  if (bos >= 0) {
    window.ids.push_back(bos);
    window.bytes.push_back(0);
    window.words.push_back(0);
  }
  const auto append = [&](auto& to, const auto& from) {
    to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(begin),
              from.begin() + static_cast<std::ptrdiff_t>(end));
  };
  append(window.ids, text.ids);
  append(window.bytes, text.bytes);
  append(window.words, text.words);
  return window;
}

}  // namespace

std::string ReadTextFile(const std::string& path) {
  if (std::filesystem::is_directory(path)) {
    Fail(ErrorCode::kInvalidArgument, "{}: expected a text file, found a directory", path);
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail(ErrorCode::kNotFound, "{} cannot be read: {}", path, std::strerror(errno));
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (file.bad()) Fail(ErrorCode::kIo, "{}: cannot be read", path);
  return text;
}

TokenizedText TokenizeText(const Tokenizer& tokenizer, std::string_view text) {
  TokenizedText result;
  result.ids = tokenizer.Encode(text, /*add_special=*/false, /*parse_special=*/false);
  bool inside = false;
  for (const int32_t id : result.ids) {
    std::string_view bytes = tokenizer.TokenBytes(id);
    // SentencePiece puts a space before a text that is not part of it.
    if (result.bytes.empty() && bytes.starts_with(' ') && !text.starts_with(' ')) bytes.remove_prefix(1);
    uint32_t words = 0;
    for (const char c : bytes) {
      words += !inside && !IsSpace(c);
      inside = !IsSpace(c);
    }
    result.bytes.push_back(static_cast<uint32_t>(bytes.size()));
    result.words.push_back(words);
  }
  return result;
}

std::vector<TextWindow> CutWindows(const Tokenizer& tokenizer, const TokenizedText& text, size_t length,
                                   size_t min_length) {
  const int32_t bos = tokenizer.add_bos() ? tokenizer.bos() : -1;
  const size_t prefix = bos >= 0 ? 1 : 0;
  CHECK(length > prefix && min_length >= 2, "windows of {} to {} tokens", min_length, length);
  const size_t stride = length - prefix;
  std::vector<TextWindow> windows;
  for (size_t begin = 0; begin < text.ids.size(); begin += stride) {
    const size_t end = std::min(begin + stride, text.ids.size());
    if (end - begin + prefix >= min_length) windows.push_back(MakeWindow(text, begin, end, bos));
  }
  return windows;
}

std::vector<TextWindow> CutLlamaWindows(const Tokenizer& tokenizer, const TokenizedText& text, size_t length) {
  const int32_t bos = tokenizer.add_bos() ? tokenizer.bos() : -1;
  const TextWindow whole = MakeWindow(text, 0, text.ids.size(), bos);
  std::vector<TextWindow> windows;
  for (size_t begin = 0; begin + length <= whole.ids.size(); begin += length) {
    TextWindow& window = windows.emplace_back(MakeWindow({whole.ids, whole.bytes, whole.words}, begin, begin + length, -1));
    if (bos >= 0) window.ids[0] = bos;
    window.bytes[0] = window.words[0] = 0;
  }
  return windows;
}

std::vector<size_t> EvenlySpaced(size_t total, size_t count) {
  count = std::min(count, total);
  std::vector<size_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = i * total / count;
  return indices;
}

std::vector<TextWindow> ReadWindows(const Tokenizer& tokenizer, std::span<const std::string> paths, size_t length,
                                    size_t min_length, size_t max_windows, bool llama) {
  if (length < min_length) {
    Fail(ErrorCode::kInvalidArgument, "windows of {} tokens are too short: at least {} are needed", length, min_length);
  }
  std::vector<TextWindow> all;
  for (const std::string& path : paths) {
    const TokenizedText text = TokenizeText(tokenizer, ReadTextFile(path));
    std::vector<TextWindow> windows =
        llama ? CutLlamaWindows(tokenizer, text, length) : CutWindows(tokenizer, text, length, min_length);
    std::move(windows.begin(), windows.end(), std::back_inserter(all));
  }
  if (all.empty()) {
    Fail(ErrorCode::kInvalidArgument, "no text of at least {} tokens in {} file(s), beginning with {}",
         llama ? length : min_length,
         paths.size(), paths.empty() ? "none" : paths.front());
  }
  if (max_windows == 0) return all;
  std::vector<TextWindow> chosen;
  for (const size_t i : EvenlySpaced(all.size(), max_windows)) chosen.push_back(std::move(all[i]));
  return chosen;
}

}  // namespace lesskv
