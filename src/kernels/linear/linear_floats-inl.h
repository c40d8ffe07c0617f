// Few tokens times rows of float types (F32, F16, BF16), in float32. Everything is in an anonymous namespace, so that
// each translation unit keeps its own copy, built with its own flags. Simd describes the vectors:
//   Vec, kLanes            float32 values, how many
//   Zero(), Load(p)        Vec of zeros, of the floats at p
//   LoadRow<type>(row, i)  kLanes elements of a row from element i, to float32
//   AddProduct(a, b, c)    a b + c
//   Sum(v)                 the lanes' sum
//   kMostTokens            multiplied in one pass over the rows
//   Rows(tokens)           multiplied with so many tokens at once: as many as registers hold sums of
#pragma once

#include "kernels/linear/linear_rows-inl.h"
#include "kernels/linear/unrolled-inl.h"

namespace lesskv::internal {
namespace {

template <DType kType>
constexpr size_t kFloatBytes = kType == DType::kF32 ? 4 : 2;

// `count` elements of a row from element i, at most kLanes of them, and zeros.
template <typename Simd, DType kType>
inline typename Simd::Vec LoadSome(const uint8_t* row, size_t i, size_t count) {
  uint8_t bytes[Simd::kLanes * kFloatBytes<kType>] = {};
  __builtin_memcpy(bytes, row + i * kFloatBytes<kType>,
                   (count < Simd::kLanes ? count : Simd::kLanes) * kFloatBytes<kType>);
  return Simd::template LoadRow<kType>(bytes, 0);
}

// Fetches what follows 8 KB further to the second cache: while several tokens keep the processor busy with a line of
// weights, memory brings the next ones. (With one token four rows come as fast as memory gives them; asking for more
// slows them down.)
inline void FetchFar(const uint8_t* p) { __builtin_prefetch(p + 8192, 0, 2); }

// kRows rows, `apart` rows from each other (memory serves several streams faster than one), times kTokens tokens. A sum
// takes a vector of elements after the other, so that a token has the same whatever is multiplied beside it.
template <typename Simd, DType kType, size_t kTokens, size_t kRows>
inline void DotFloats(const uint8_t* first, size_t row_bytes, size_t apart, size_t n, const float* x, size_t x_stride,
                      float* y, size_t y_stride) {
  constexpr size_t kStep = 32;
  typename Simd::Vec sum[kRows][kTokens], w[kRows];
  const uint8_t* row[kRows];
  Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    row[r] = first + r * apart * row_bytes;
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) { sum[r][t] = Simd::Zero(); });
  });
  const auto add = [&](auto t, typename Simd::Vec token) __attribute__((always_inline)) {
    Unrolled<kRows>([&](auto r)
                        __attribute__((always_inline)) { sum[r][t] = Simd::AddProduct(w[r], token, sum[r][t]); });
  };
  size_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if constexpr (kTokens > 1) {
      Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
        for (size_t b = 0; b < kStep * kFloatBytes<kType>; b += 64) FetchFar(row[r] + i * kFloatBytes<kType> + b);
      });
    }
    Unrolled<kStep / Simd::kLanes>([&](auto v) __attribute__((always_inline)) {
      const size_t j = i + v * Simd::kLanes;
      Unrolled<kRows>([&](auto r) __attribute__((always_inline)) { w[r] = Simd::template LoadRow<kType>(row[r], j); });
      Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) { add(t, Simd::Load(x + t * x_stride + j)); });
    });
  }
  for (; i < n; i += Simd::kLanes) {
    Unrolled<kRows>([&](auto r) __attribute__((always_inline)) { w[r] = LoadSome<Simd, kType>(row[r], i, n - i); });
    Unrolled<kTokens>([&](auto t) __attribute__((always_inline)) {
      add(t, LoadSome<Simd, DType::kF32>(reinterpret_cast<const uint8_t*>(x + t * x_stride), i, n - i));
    });
  }
  Unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    Unrolled<kTokens>([&](auto t)
                          __attribute__((always_inline)) { y[t * y_stride + r * apart] = Simd::Sum(sum[r][t]); });
  });
}

template <typename Simd, DType kType, size_t kTokens>
void DotFloatRows(const RowBlock& block, const float* x, size_t x_stride, float* y, size_t y_stride) {
  size_t r = 0;
  const auto by = [&]<size_t kRows>() {
    const size_t apart = (block.n_rows - r) / kRows;
    for (size_t i = 0; i < apart; ++i) {
      DotFloats<Simd, kType, kTokens, kRows>(block.rows + (r + i) * block.row_bytes, block.row_bytes, apart, block.n, x,
                                             x_stride, y + r + i, y_stride);
    }
    r += kRows * apart;
  };
  by.template operator()<Simd::Rows(kTokens)>();
  if constexpr (Simd::Rows(kTokens) > 2) by.template operator()<2>();
  by.template operator()<1>();
}

// Any number of tokens. More than kMostTokens in shares of about equal size, two rows at a time, so that the next pass
// finds them in the cache.
template <typename Simd, DType kType>
void DotFloatTokens(const RowBlock& block, const float* x, size_t x_stride, size_t n_tokens, float* y,
                    size_t y_stride) {
  if (n_tokens <= Simd::kMostTokens) {
    return Unrolled<Simd::kMostTokens>([&](auto t) {
      if (n_tokens == t + 1) DotFloatRows<Simd, kType, t + 1>(block, x, x_stride, y, y_stride);
    });
  }
  const size_t passes = (n_tokens + Simd::kMostTokens - 1) / Simd::kMostTokens,
               share = (n_tokens + passes - 1) / passes;
  RowBlock pair = block;
  for (size_t r = 0; r < block.n_rows; r += 2, pair.rows += 2 * pair.row_bytes) {
    pair.n_rows = block.n_rows - r < 2 ? 1 : 2;
    for (size_t t = 0; t < n_tokens; t += share) {
      const size_t count = n_tokens - t < share ? n_tokens - t : share;
      DotFloatTokens<Simd, kType>(pair, x + t * x_stride, x_stride, count, y + t * y_stride + r, y_stride);
    }
  }
}

}  // namespace
}  // namespace lesskv::internal
