#include "kernels/rows/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/checked.h"
#include "kernels/quants/half.h"
#include "kernels/rows/rows_layout.h"

namespace lesskv {
namespace {

// Finite values beyond the largest half become the largest half: a huge key then still gives finite scores.
uint16_t ToHalf(float x) {
  const uint16_t half = FloatToHalf(x);
  return (half & 0x7fff) == 0x7c00 && std::isfinite(x) ? half - 1 : half;
}

struct F32Element {
  using Stored = float;
  static float Encode(float x) { return x; }
  static float Decode(float x) { return x; }
};
struct F16Element {
  using Stored = uint16_t;
  static uint16_t Encode(float x) { return ToHalf(x); }
  static float Decode(uint16_t x) { return HalfToFloat(x); }
};
struct Bf16Element {
  using Stored = uint16_t;
  static uint16_t Encode(float x) { return FloatToBf16(x); }
  static float Decode(uint16_t x) { return Bf16ToFloat(x); }
};

// Calls f with the element type of a format that is not quantised.
template <typename F>
void WithElement(RowType type, F&& f) {
  if (type == RowType::kF32) return f(F32Element{});
  if (type == RowType::kF16) return f(F16Element{});
  return f(Bf16Element{});
}

// First element of a slot and the distance between its channels, in elements.
struct Place {
  size_t first, stride;
};
Place ElementPlace(const RowFormat& format, size_t slot) {
  if (format.side == RowSide::kValues) return {slot * format.head_dim, 1};
  return {slot / kTileRows * kTileRows * format.head_dim + slot % kTileRows, kTileRows};
}

struct QuantTile {
  std::byte* scales;  // [head_dim / 32][16] f16
  uint8_t* codes;
  size_t lane;
};
QuantTile FindQuantTile(const RowFormat& format, const std::byte* region, size_t slot) {
  std::byte* tile = const_cast<std::byte*>(region) + slot / kTileRows * TileBytes(format.type, format.head_dim);
  return {tile, reinterpret_cast<uint8_t*>(tile + TileScaleBytes(format.head_dim)), slot % kTileRows};
}

void StoreScale(const QuantTile& tile, size_t block, float scale) {
  const uint16_t half = ToHalf(scale);
  std::memcpy(tile.scales + (block * kTileRows + tile.lane) * 2, &half, 2);
}
float LoadScale(const QuantTile& tile, size_t block) {
  uint16_t half;
  std::memcpy(&half, tile.scales + (block * kTileRows + tile.lane) * 2, 2);
  return HalfToFloat(half);
}

// The byte of a q8 code, and of the q4 code of a channel with channel % 32 < 16 (its high half is channel + 16).
size_t Q8Place(RowSide side, size_t channel, size_t lane) {
  return side == RowSide::kKeys ? Q8KeyCode(channel, lane) : Q8ValueCode(channel, lane);
}
size_t Q4Place(RowSide side, size_t channel, size_t lane) {
  return side == RowSide::kKeys ? Q4KeyByte(channel, lane) : Q4ValueByte(channel, lane);
}

// Also takes NaN into the range, so that the conversion to an integer is defined.
float Clamp(float x, float low, float high) { return std::max(low, std::min(high, x)); }

void EncodeQ8(const RowFormat& format, const QuantTile& tile, const float* x) {
  for (size_t block = 0; block < format.head_dim / kQuantBlock; ++block) {
    const float* values = x + block * kQuantBlock;
    float largest = 0;
    for (size_t i = 0; i < kQuantBlock; ++i) largest = std::max(largest, std::fabs(values[i]));
    const float scale = largest / 127;
    const float inverse = scale != 0 ? 1 / scale : 0;
    StoreScale(tile, block, scale);
    for (size_t i = 0; i < kQuantBlock; ++i) {
      const int code = static_cast<int>(std::round(Clamp(values[i] * inverse, -127.0f, 127.0f)));
      tile.codes[Q8Place(format.side, block * kQuantBlock + i, tile.lane)] =
          static_cast<uint8_t>(code + 128);
    }
  }
}

// Codes 0 .. 15 stand for -8 .. 7 times the scale; the value of largest magnitude is -8 exactly, whatever its sign.
void EncodeQ4(const RowFormat& format, const QuantTile& tile, const float* x) {
  for (size_t block = 0; block < format.head_dim / kQuantBlock; ++block) {
    const float* values = x + block * kQuantBlock;
    float extreme = 0;
    for (size_t i = 0; i < kQuantBlock; ++i) {
      if (std::fabs(values[i]) > std::fabs(extreme)) extreme = values[i];
    }
    const float scale = extreme / -8;
    const float inverse = scale != 0 ? 1 / scale : 0;
    StoreScale(tile, block, scale);
    auto code = [&](size_t i) { return static_cast<int>(Clamp(values[i] * inverse + 8.5f, 0.0f, 15.0f)); };
    for (size_t i = 0; i < kQuantBlock / 2; ++i) {
      tile.codes[Q4Place(format.side, block * kQuantBlock + i, tile.lane)] =
          static_cast<uint8_t>(code(i) | code(i + 16) << 4);
    }
  }
}

void DecodeQ8(const RowFormat& format, const QuantTile& tile, float* out) {
  for (size_t c = 0; c < format.head_dim; ++c) {
    const int code = tile.codes[Q8Place(format.side, c, tile.lane)] - 128;
    out[c] = LoadScale(tile, c / kQuantBlock) * static_cast<float>(code);
  }
}

void DecodeQ4(const RowFormat& format, const QuantTile& tile, float* out) {
  for (size_t c = 0; c < format.head_dim; ++c) {
    const size_t low = c / kQuantBlock * kQuantBlock + c % 16;
    const uint8_t byte = tile.codes[Q4Place(format.side, low, tile.lane)];
    const int code = (c % kQuantBlock < 16 ? byte & 15 : byte >> 4) - 8;
    out[c] = LoadScale(tile, c / kQuantBlock) * static_cast<float>(code);
  }
}

}  // namespace

std::string_view Name(RowType type) {
  switch (type) {
    case RowType::kF32:
      return "f32";
    case RowType::kF16:
      return "f16";
    case RowType::kBF16:
      return "bf16";
    case RowType::kQ8:
      return "q8";
    case RowType::kQ4:
      return "q4";
  }
  CHECK(false, "row type {}", static_cast<int>(type));
}

bool Supports(RowType type, size_t head_dim) {
  return head_dim >= 1 && (!IsQuantised(type) || head_dim % kQuantBlock == 0);
}

size_t RegionBytes(const RowFormat& format, size_t capacity) {
  CHECK(capacity % kTileRows == 0, "capacity {}", capacity);
  CHECK(Supports(format.type, format.head_dim), "{} rows of {} channels", Name(format.type), format.head_dim);
  size_t bytes = capacity / kTileRows * TileBytes(format.type, format.head_dim);
  const bool partial_vector = !IsQuantised(format.type) && format.head_dim % 16 != 0;
  if (format.side == RowSide::kValues && partial_vector && capacity > 0) bytes += 64;
  return RoundUp(bytes, kRegionAlign);
}

size_t TileBytes(const RowFormat& format) { return TileBytes(format.type, format.head_dim); }

void WriteRows(const RowFormat& format, std::byte* region, size_t first_slot, size_t n, const float* x,
               size_t x_stride) {
  if (IsQuantised(format.type)) {
    for (size_t i = 0; i < n; ++i) {
      const QuantTile tile = FindQuantTile(format, region, first_slot + i);
      if (format.type == RowType::kQ8)
        EncodeQ8(format, tile, x + i * x_stride);
      else
        EncodeQ4(format, tile, x + i * x_stride);
    }
    return;
  }
  WithElement(format.type, [&](auto element) {
    using Element = decltype(element);
    auto* elements = reinterpret_cast<typename Element::Stored*>(region);
    for (size_t i = 0; i < n; ++i) {
      const Place place = ElementPlace(format, first_slot + i);
      for (size_t c = 0; c < format.head_dim; ++c) {
        elements[place.first + c * place.stride] = Element::Encode(x[i * x_stride + c]);
      }
    }
  });
}

void ReadRows(const RowFormat& format, const std::byte* region, size_t first_slot, size_t n, float* out,
              size_t out_stride) {
  if (IsQuantised(format.type)) {
    for (size_t i = 0; i < n; ++i) {
      const QuantTile tile = FindQuantTile(format, region, first_slot + i);
      if (format.type == RowType::kQ8)
        DecodeQ8(format, tile, out + i * out_stride);
      else
        DecodeQ4(format, tile, out + i * out_stride);
    }
    return;
  }
  WithElement(format.type, [&](auto element) {
    using Element = decltype(element);
    const auto* elements = reinterpret_cast<const typename Element::Stored*>(region);
    for (size_t i = 0; i < n; ++i) {
      const Place place = ElementPlace(format, first_slot + i);
      for (size_t c = 0; c < format.head_dim; ++c) {
        out[i * out_stride + c] = Element::Decode(elements[place.first + c * place.stride]);
      }
    }
  });
}

void CopyRow(const RowFormat& format, const std::byte* from, size_t from_slot, std::byte* to, size_t to_slot) {
  const size_t dim = format.head_dim;
  if (!IsQuantised(format.type)) {
    const size_t bytes = ElementBytes(format.type);
    const Place source = ElementPlace(format, from_slot), target = ElementPlace(format, to_slot);
    if (format.side == RowSide::kValues) {
      std::memmove(to + target.first * bytes, from + source.first * bytes, dim * bytes);
      return;
    }
    for (size_t c = 0; c < dim; ++c) {
      std::memcpy(to + (target.first + c * kTileRows) * bytes, from + (source.first + c * kTileRows) * bytes, bytes);
    }
    return;
  }
  const QuantTile source = FindQuantTile(format, from, from_slot), target = FindQuantTile(format, to, to_slot);
  for (size_t block = 0; block < dim / kQuantBlock; ++block) {
    std::memcpy(target.scales + (block * kTileRows + target.lane) * 2,
                source.scales + (block * kTileRows + source.lane) * 2, 2);
  }
  if (format.type == RowType::kQ8) {
    for (size_t c = 0; c < dim; ++c) {
      target.codes[Q8Place(format.side, c, target.lane)] = source.codes[Q8Place(format.side, c, source.lane)];
    }
    return;
  }
  for (size_t c = 0; c < dim; c = c % 16 == 15 ? c + 17 : c + 1) {
    target.codes[Q4Place(format.side, c, target.lane)] = source.codes[Q4Place(format.side, c, source.lane)];
  }
}

void CopyChannels(const RowFormat& format, const std::byte* from, size_t from_slot, const uint16_t* channels,
                  const RowFormat& to_format, std::byte* to, size_t to_slot) {
  const size_t n = to_format.head_dim;
  CHECK(format.side == RowSide::kKeys && to_format.side == RowSide::kKeys && format.type == to_format.type);
  if (!IsQuantised(format.type)) {
    const size_t bytes = ElementBytes(format.type);
    const Place source = ElementPlace(format, from_slot), target = ElementPlace(to_format, to_slot);
    for (size_t c = 0; c < n; ++c)
      std::memcpy(to + (target.first + c * kTileRows) * bytes, from + (source.first + channels[c] * kTileRows) * bytes,
                  bytes);
    return;
  }
  std::vector<float> row(format.head_dim), some(n);
  ReadRows(format, from, from_slot, 1, row.data(), row.size());
  for (size_t c = 0; c < n; ++c) some[c] = row[channels[c]];
  WriteRows(to_format, to, to_slot, 1, some.data(), n);
}

}  // namespace lesskv
