#include "server/http_request.h"

#include <gtest/gtest.h>

#include "base/rng.h"

namespace lesskv {
namespace {

constexpr size_t kMaxBody = 1000;

// A reader of a text that comes in pieces of that size.
HttpReader Reader(const std::string& text, size_t piece = 1 << 20) {
  return {kMaxBody, [text, piece, at = size_t{0}]() mutable {
            const std::string_view more = std::string_view(text).substr(std::min(at, text.size()), piece);
            at += more.size();
            return more;
          }};
}

int StatusOf(const std::string& text) {
  HttpReader reader = Reader(text);
  try {
    while (const auto head = reader.Head()) reader.Body(*head);
    return 200;
  } catch (const ApiError& error) {
    return error.status;
  }
}

TEST(HttpReader, ReadsOneRequestAfterTheOther) {
  const std::string text =
      "\r\nPOST /a?b HTTP/1.1\r\nhOsT:x:80 \r\nOrigin: http://y\r\nAuthorization:  Bearer z%20z\r\nExpect: 100-Continue\r\n"
      "Content-Length: 3\r\nX-Other: 1\r\nX-Other: 2\r\n\r\nabc\r\n"
      "PUT /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\nConnection: te, Close\r\n\r\n"
      "3;name=value\r\nab\r\r\n02\r\ncd\r\n0\r\nTrailer: x\r\n\r\n"
      "GET / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n";
  for (const size_t piece : {1, 2, 3, 7, 1000}) {
    HttpReader reader = Reader(text, piece);
    auto head = reader.Head();
    ASSERT_TRUE(head);
    EXPECT_EQ(head->method + head->target, "POST/a?b");
    EXPECT_EQ(head->path(), "/a");
    EXPECT_EQ(head->host, "x:80");
    EXPECT_EQ(head->origin, "http://y");
    EXPECT_EQ(head->authorization, "Bearer z%20z");
    EXPECT_TRUE(head->expects_continue && !head->close && !head->chunked);
    EXPECT_EQ(reader.Body(*head), "abc");
    head = reader.Head();
    ASSERT_TRUE(head);
    EXPECT_TRUE(head->chunked && head->close);
    EXPECT_EQ(reader.Body(*head), "ab\rcd");
    head = reader.Head();
    ASSERT_TRUE(head);
    EXPECT_TRUE(head->close && !head->expects_continue);  // knows no such word
    EXPECT_EQ(reader.Body(*head), "");
    EXPECT_FALSE(reader.Head());
  }
}

TEST(HttpReader, WhatIsNoRequestIsRefused) {
  const auto get = [](const std::string& headers) { return "GET / HTTP/1.1\r\nHost: x\r\n" + headers + "\r\n"; };
  const auto chunked = [](const std::string& body) {
    return "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body;
  };
  const std::pair<std::string, int> cases[] = {
      {get(""), 200},
      {"GET / HTTP/1.1\r\n\r\n", 400},  // no Host
      {"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n", 400},
      {"GET / HTTP/1.1\r\nHost: x", 400},
      {"GET /\r\n\r\n", 400},
      {"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400},
      {"GET /\x80 HTTP/1.1\r\nHost: x\r\n\r\n", 400},
      {"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505},
      {"GRAB / HTTP/1.1\r\nHost: x\r\n\r\n", 200},
      {"G@B / HTTP/1.1\r\nHost: x\r\n\r\n", 400},
      {get("X\r\n"), 400},
      {get("X : y\r\n"), 400},
      {get(" X: y\r\n"), 400},
      {get("X: y\r\n z\r\n"), 400},  // a folded line
      {get("X: a\rb\r\n"), 400},
      {get(std::string("X: a\0b\r\n", 8)), 400},
      {get("Host: y\r\n"), 400},
      {get("Content-Length: 1\r\nContent-Length: 1\r\n") + "a", 400},
      {get("Content-Length: -1\r\n"), 400},
      {get("Content-Length: +1\r\n") + "a", 400},
      {get("Content-Length: 1x\r\n") + "a", 400},
      {get("Content-Length: 99999999999999999999\r\n"), 400},
      {get("Content-Length: 2\r\n") + "a", 400},
      {get("Content-Length: 1001\r\n"), 413},
      {get("Content-Length: 1000\r\n") + std::string(1000, 'a'), 200},
      {get("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"), 400},
      {get("Transfer-Encoding: gzip, chunked\r\n"), 501},
      {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
      {get("Content-Encoding: gzip\r\n"), 415},
      {get("Expect: more\r\n"), 417},
      {chunked("0\r\n\r\n"), 200},
      {chunked("-2\r\nab\r\n0\r\n\r\n"), 400},
      {chunked("0x2\r\nab\r\n0\r\n\r\n"), 400},
      {chunked("2\r\nabc\r\n0\r\n\r\n"), 400},
      {chunked("\r\n"), 400},
      {chunked("fffffffffffffffff\r\n"), 400},
      {chunked("ffffffffffffffff\r\n"), 413},
      {chunked("3e8\r\n" + std::string(1000, 'a') + "\r\n1\r\na\r\n0\r\n\r\n"), 413},
      {chunked("0;" + std::string(300, 'x') + "\r\n\r\n"), 400},
      {chunked("0\r\n" + [] {
         std::string trailers;
         for (int i = 0; i < 1000; ++i) trailers += "Trailer: x\r\n";
         return trailers;
       }() + "\r\n"), 431},
      {"GET /" + std::string(kMaxRequestLine, 'x'), 414},
      {get("X: " + std::string(kMaxHead, 'x')), 431},
  };
  for (const auto& [text, status] : cases) EXPECT_EQ(StatusOf(text), status) << text.substr(0, 200);
}

// However a text comes in pieces, and whatever it is, it is read the same.
TEST(HttpReader, PiecesDoNotMatter) {
  const std::string good =
      "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
      "POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nConnection: close\r\n\r\nabcd";
  Rng rng(1);
  size_t refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string text = good;
    for (size_t n = rng.Below(4); n > 0; --n) {
      const size_t at = rng.Below(text.size());
      constexpr std::string_view kBytes = "\r\n :;0a\0";
      rng.Below(2) == 0 ? void(text[at] = kBytes[rng.Below(kBytes.size())]) : void(text.erase(at, rng.Below(9)));
    }
    std::string seen[2];
    for (int run = 0; run < 2; ++run) {
      HttpReader reader = Reader(text, run == 0 ? 1 : 1 + rng.Below(50));
      try {
        while (const auto head = reader.Head()) seen[run] += head->target + " " + reader.Body(*head) + "\n";
      } catch (const ApiError& error) {
        seen[run] += error.message;
        refused += static_cast<size_t>(run);
      }
    }
    EXPECT_EQ(seen[0], seen[1]) << text;
  }
  EXPECT_GT(refused, 500u);
}

}  // namespace
}  // namespace lesskv
