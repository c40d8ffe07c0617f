// The alphabet in which byte-level BPE vocabularies write bytes: each of the 256 bytes is one printable character.
// Printable Latin-1 bytes (21-7E, A1-AC, AE-FF) stand for themselves; the other 68, in increasing order, are written
// as U+0100, U+0101, ... A space is therefore U+0120 (Radford et al. 2019, GPT-2).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace lesskv {

// The character that stands for `byte`, as UTF-8.
std::string_view ByteToAlphabet(uint8_t byte);

// The bytes that `text` spells; nothing when a character is not of the alphabet or `text` is not well-formed.
std::optional<std::string> AlphabetToBytes(std::string_view text);

}  // namespace lesskv
