#include "kvcache/codec/key_bases.h"

#include <Eigen/LU>
#include <algorithm>

#include "base/error.h"
#include "kernels/basic/basic.h"
#include "kernels/quants/half.h"
#include "kernels/rows/group_codes.h"
#include "kernels/rows/hadamard.h"

namespace lesskv {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using MatrixF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kMostError = 1e-3;  // of a matrix times its inverse

}  // namespace

std::shared_ptr<const KeyBases> KeyBases::Create(const SidecarBalance& from, const std::vector<size_t>& parts,
                                                 const std::string& name) {
  auto bases = std::make_shared<KeyBases>();
  const size_t d = from.head_dim, n_heads = from.keys.size() / d / d;
  const auto dim = static_cast<Eigen::Index>(d);
  bases->head_dim_ = d;
  size_t first = 0;
  for (const size_t heads : from.n_kv_heads) bases->first_head_.push_back(first), first += heads;
  bases->matrices_.resize(n_heads * 2 * d * d);
  for (size_t head = 0; head < n_heads; ++head) {
    float* to = &bases->matrices_[head * 2 * d * d];
    F16ToF32(&from.keys[head * d * d], d * d, to);
    for (size_t c = 0; c < d; ++c)
      for (size_t i = 0, part = 0; part < parts.size(); i += parts[part++])
        Hadamard(to + c * d + i, parts[part], HadamardBlock(parts[part]));
    const Matrix matrix = Eigen::Map<const MatrixF>(to, dim, dim).cast<double>();
    Eigen::Map<MatrixF> inverse(to + d * d, dim, dim);
    inverse = matrix.inverse().transpose().cast<float>();
    const double error = (matrix * inverse.cast<double>().transpose() - Matrix::Identity(dim, dim)).cwiseAbs().maxCoeff();
    if (!(error <= kMostError))
      Fail(ErrorCode::kBadFile, "{}: tensor balance.keys holds a matrix that cannot be inverted, that of head {}", name, head);
  }
  return bases;
}

void KeyBases::ToBasis(size_t layer, size_t kv_head, size_t n, const float* keys, float* z) const {
  SmallProduct(n, head_dim_, head_dim_, keys, head_dim_, 1, To(layer, kv_head), head_dim_, z, head_dim_);
}

void KeyBases::FromBasis(size_t layer, size_t kv_head, size_t n, const float* z, size_t z_stride, float* out,
                         size_t stride) const {
  SmallProduct(head_dim_, n, head_dim_, From(layer, kv_head), head_dim_, 1, z, z_stride, out, stride);
}

void KeyBases::Queries(size_t layer, size_t kv_head, size_t n, const float* q, size_t stacked, float* out) const {
  float rows[kMostAtOnce * kMostGroupedChannels];
  SmallProduct(n, head_dim_, head_dim_, q, 1, stacked, From(layer, kv_head), head_dim_, rows, head_dim_);
  for (size_t m = 0; m < n; ++m)
    for (size_t j = 0; j < head_dim_; ++j) out[j * n + m] = rows[m * head_dim_ + j];
}

}  // namespace lesskv
