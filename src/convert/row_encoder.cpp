#include "convert/row_encoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/threads.h"
#include "format/gguf.h"  // Quoted
#include "kernels/quants/quants.h"

namespace lesskv {
namespace {

constexpr size_t kSlabElements = size_t{4} << 20;

// NaN and infinity make the result infinite.
float LargestMagnitude(const float* x, size_t n) {
  float largest = 0, zero = 0;
  for (size_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    zero += x[i] * 0.0f;
  }
  return zero == 0.0f ? largest : std::numeric_limits<float>::infinity();
}

// Root mean square of what the stored row is off by, as a share of the row's own.
float Lost(const float* row, size_t n, DType type, const std::byte* encoded) {
  std::vector<float> stored(n);
  DequantizeRow(type, encoded, n, stored.data());
  double error = 0, all = 0;
  for (size_t i = 0; i < n; ++i) {
    error += (double{stored[i]} - row[i]) * (double{stored[i]} - row[i]);
    all += double{row[i]} * row[i];
  }
  return all == 0 ? 0 : static_cast<float>(std::sqrt(error / all));
}

}  // namespace

float EncodingLosses::Much(DType type) {
  switch (type) {
    case DType::kQ5_0:
    case DType::kQ5_1:
    case DType::kQ5_K:
      return 0.12f;
    case DType::kQ6_K:
      return 0.06f;
    default:
      return 0.25f;
  }
}

void EncodingLosses::Add(const std::string& tensor, size_t row, DType type, float loss) {
  if (loss <= Much(type)) return;
  ++rows;
  if (loss <= most) return;
  most = loss;
  where = fmt::format("row {} of tensor {}", row, Quoted(tensor));
}

std::string EncodingLosses::Warning(DType type) const {
  if (rows == 0) return "";
  return fmt::format(
      "warning: {} cannot hold {} row{}: the error is more than {:.0f} % of the values, most in {} ({:.0f} %)\n",
      Traits(type).name, rows, rows == 1 ? "" : "s", 100 * Much(type), where, 100 * most);
}

void RowEncoder::Encode(const std::string& tensor, size_t n_rows, size_t n, DType target, const ReadRow& read,
                        ByteSink& sink, const Progress& progress) {
  const size_t slab_rows = std::clamp<size_t>(kSlabElements / n, 1, n_rows);
  for (size_t row = 0; row < n_rows; row += slab_rows) {
    const size_t n_now = std::min(slab_rows, n_rows - row);
    EncodeSlab(tensor, row, n_now, n, target, read, sink);
    progress(n_now);
  }
}

void RowEncoder::EncodeSlab(const std::string& tensor, size_t first_row, size_t n_rows, size_t n, DType target,
                            const ReadRow& read, ByteSink& sink) {
  const size_t out_bytes = RowBytes(target, n);
  values_.resize(n_rows * n);
  encoded_.resize(n_rows * out_bytes);
  largest_.assign(n_rows, 0.0f);
  lost_.assign(n_rows, 0.0f);
  ParallelFor(n_rows, [&](size_t r) {
    float* row = values_.data() + r * n;
    read(first_row + r, row);
    largest_[r] = LargestMagnitude(row, n);
    // Not finite rows are left out here and refused below, the first one whatever the threads do.
    if (!std::isfinite(largest_[r])) return;
    std::byte* encoded = encoded_.data() + r * out_bytes;
    QuantizeRow(target, row, n, encoded);
    lost_[r] = Lost(row, n, target, encoded);
  });
  for (size_t r = 0; r < n_rows; ++r) {
    CheckRange(tensor, first_row + r, largest_[r], target);
    losses_.Add(tensor, first_row + r, target, lost_[r]);
  }
  sink.Write(encoded_);
}

void RowEncoder::CheckRange(const std::string& tensor, size_t row, float largest, DType target) const {
  if (!std::isfinite(largest)) {
    Fail(ErrorCode::kBadFile, "{}: row {} of tensor {} holds a value that is not finite", file_, row, Quoted(tensor));
  }
  constexpr float kHalfOverflow = 65520.0f;
  if (target == DType::kF16 && largest >= kHalfOverflow) {
    Fail(ErrorCode::kBadFile, "{}: row {} of tensor {} holds {}, more than F16 can; BF16 can", file_, row,
         Quoted(tensor), largest);
  }
}

}  // namespace lesskv
