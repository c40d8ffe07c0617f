// UTF-8 as the tokenizers need it: what is one character, what is damaged, what may still become a character.
// Well-formed means table 3-7 of the Unicode standard: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace lesskv {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

// Bytes (1 to 4) of the well-formed character that begins at text[pos], or 0 when none does. Requires pos < size.
size_t Utf8CharBytes(std::string_view text, size_t pos);

// `text` with every byte that belongs to no well-formed character replaced by U+FFFD: one for each such byte, as
// llama.cpp does. Well-formed text comes back unchanged.
std::string ReplaceInvalidUtf8(std::string_view text);

// How many bytes at the end of `text` (0 to 3) begin a character that further bytes could complete.
size_t IncompleteUtf8Tail(std::string_view text);

// Appends the character with this code point; CHECKs that it is one (not a surrogate, at most U+10FFFF).
void AppendUtf8(char32_t code_point, std::string& out);

}  // namespace lesskv
