#include "tokenizer/utf8.h"

#include <algorithm>
#include <cstdint>

#include "base/check.h"

namespace lesskv {
namespace {

// Length that a lead byte announces and the range its second byte must lie in; length 0: not a lead byte.
struct LeadByte {
  size_t length;
  uint8_t second_low;
  uint8_t second_high;
};

LeadByte ClassifyLead(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};  // continuation bytes and overlong C0, C1
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};  // below A0: overlong
  if (byte == 0xED) return {3, 0x80, 0x9F};  // above 9F: surrogates
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};  // below 90: overlong
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};  // above 8F: beyond U+10FFFF
  return {0, 0, 0};
}

// How many of the bytes from text[pos] on fit the character that text[pos] begins; at most lead.length.
size_t MatchingBytes(std::string_view text, size_t pos, LeadByte lead) {
  size_t n = 1;
  for (; n < lead.length && pos + n < text.size(); ++n) {
    const auto byte = static_cast<uint8_t>(text[pos + n]);
    const uint8_t low = n == 1 ? lead.second_low : 0x80;
    const uint8_t high = n == 1 ? lead.second_high : 0xBF;
    if (byte < low || byte > high) break;
  }
  return n;
}

}  // namespace

size_t Utf8CharBytes(std::string_view text, size_t pos) {
  DCHECK(pos < text.size());
  const LeadByte lead = ClassifyLead(static_cast<uint8_t>(text[pos]));
  if (lead.length == 0) return 0;
  return MatchingBytes(text, pos, lead) == lead.length ? lead.length : 0;
}

std::string ReplaceInvalidUtf8(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const size_t n = Utf8CharBytes(text, pos);
    result += n > 0 ? text.substr(pos, n) : kReplacementCharacter;
    pos += std::max<size_t>(n, 1);
  }
  return result;
}

size_t IncompleteUtf8Tail(std::string_view text) {
  for (size_t n = 1; n <= std::min<size_t>(3, text.size()); ++n) {
    const size_t pos = text.size() - n;
    const LeadByte lead = ClassifyLead(static_cast<uint8_t>(text[pos]));
    if (lead.length == 0) continue;  // a continuation byte: its lead byte may come before
    return n < lead.length && MatchingBytes(text, pos, lead) == n ? n : 0;
  }
  return 0;
}

void AppendUtf8(char32_t c, std::string& out) {
  CHECK(c <= 0x10FFFF && (c < 0xD800 || c > 0xDFFF), "not a Unicode scalar value: {:#x}", static_cast<uint32_t>(c));
  const auto continuation = [&](int shift) { out += static_cast<char>(0x80 | ((c >> shift) & 0x3F)); };
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | (c >> 6));
    continuation(0);
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | (c >> 12));
    continuation(6);
    continuation(0);
  } else {
    out += static_cast<char>(0xF0 | (c >> 18));
    continuation(12);
    continuation(6);
    continuation(0);
  }
}

}  // namespace lesskv
