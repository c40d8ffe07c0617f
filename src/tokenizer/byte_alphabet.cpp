#include "tokenizer/byte_alphabet.h"

#include <array>
#include <string>
#include <unordered_map>

#include "tokenizer/utf8.h"

namespace lesskv {
namespace {

struct Alphabet {
  Alphabet() {
    char32_t next_substitute = 0x100;
    for (size_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      AppendUtf8(printable ? static_cast<char32_t>(byte) : next_substitute++, characters[byte]);
    }
    for (size_t byte = 0; byte < 256; ++byte) bytes.emplace(characters[byte], static_cast<char>(byte));
  }

  std::array<std::string, 256> characters;
  std::unordered_map<std::string_view, char> bytes;  // keys are views of `characters`
};

const Alphabet& TheAlphabet() {
  static const Alphabet alphabet;
  return alphabet;
}

}  // namespace

std::string_view ByteToAlphabet(uint8_t byte) { return TheAlphabet().characters[byte]; }

std::optional<std::string> AlphabetToBytes(std::string_view text) {
  const Alphabet& alphabet = TheAlphabet();
  std::string result;
  for (size_t pos = 0; pos < text.size();) {
    const size_t n = Utf8CharBytes(text, pos);
    if (n == 0) return std::nullopt;
    const auto found = alphabet.bytes.find(text.substr(pos, n));
    if (found == alphabet.bytes.end()) return std::nullopt;
    result += found->second;
    pos += n;
  }
  return result;
}

}  // namespace lesskv
