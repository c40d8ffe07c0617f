// Rows of a matrix to the bytes of another type, slab by slab, so that memory stays bounded whatever the size of the
// matrix. Knows what the type cannot hold.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "base/atomic_file.h"
#include "base/dtype.h"

namespace lesskv {

// What encoding changed in the rows that it changed most: a value that a block's half-precision scale or minimum cannot
// reach is cut to what it can, without an error of its own.
struct EncodingLosses {
  // What is much for a type, of a row's root mean square: beyond what rounding takes from any row of it. Of normal rows
  // types of 4 bits lose a tenth, and each further bit halves that.
  static float Much(DType type);

  size_t rows = 0;
  float most = 0;
  std::string where = {};

  void Add(const std::string& tensor, size_t row, DType type, float loss);
  // A sentence for people that ends in a newline; empty where nothing was lost.
  std::string Warning(DType type) const;
};

class RowEncoder {
 public:
  // Writes row `row` of the matrix; called from many threads.
  using ReadRow = std::function<void(size_t row, float* values)>;
  // After each slab, with the number of its rows.
  using Progress = std::function<void(size_t n_rows)>;

  // `file`: for messages.
  explicit RowEncoder(std::string file) : file_(std::move(file)) {}

  // Writes n_rows rows of n values each as `target`, of whose blocks n is a multiple. Throws Error (kBadFile) naming
  // the first row with a value that is not finite or beyond F16.
  void Encode(const std::string& tensor, size_t n_rows, size_t n, DType target, const ReadRow& read, ByteSink& sink,
              const Progress& progress);

  const EncodingLosses& losses() const { return losses_; }

 private:
  void EncodeSlab(const std::string& tensor, size_t first_row, size_t n_rows, size_t n, DType target,
                  const ReadRow& read, ByteSink& sink);
  void CheckRange(const std::string& tensor, size_t row, float largest, DType target) const;

  const std::string file_;
  std::vector<float> values_, largest_, lost_;
  std::vector<std::byte> encoded_;
  EncodingLosses losses_;
};

}  // namespace lesskv
