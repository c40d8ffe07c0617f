#include "train/capture_record.h"

#include <cmath>
#include <cstring>
#include <deque>

#include "base/error.h"
#include "format/gguf.h"
#include "format/gguf_writer.h"
#include "kernels/basic/basic.h"

namespace lesskv::train {
namespace {

constexpr float kLargestHalf = 65504.0f;

// Collects half-precision tensors; their bytes live here until the file is written.
class HalfWriter {
 public:
  explicit HalfWriter(const std::string& path) : path_(path) {}

  void Add(const std::string& name, size_t rows, const std::vector<float>& values) {
    for (float v : values)
      if (!(std::fabs(v) <= kLargestHalf))
        Fail(ErrorCode::kRuntime, "{}: {} has a value of {}, beyond half precision", path_, name, v);
    std::vector<uint16_t>& halves = halves_.emplace_back(values.size());
    F32ToF16(values.data(), values.size(), halves.data());
    const size_t ne[] = {values.size() / rows, rows};
    writer_.AddTensor(name, DType::kF16, std::span<const size_t>(ne), std::as_bytes(std::span(halves)));
  }

  template <typename T>
  void AddRaw(const std::string& name, DType type, size_t rows, const std::vector<T>& values) {
    const size_t ne[] = {values.size() / rows, rows};
    writer_.AddTensor(name, type, std::span<const size_t>(ne), std::as_bytes(std::span(values)));
  }

  GgufWriter& writer() { return writer_; }

 private:
  std::string path_;
  GgufWriter writer_;
  std::deque<std::vector<uint16_t>> halves_;
};

const GgufTensor& Tensor(const GgufFile& file, const std::string& name, DType type, size_t rows, size_t row_length) {
  const GgufTensor* tensor = file.FindTensor(name);
  if (tensor == nullptr) Fail(ErrorCode::kBadFile, "{}: tensor {} is missing", file.name(), name);
  if (tensor->type != type || tensor->ne[0] != row_length || tensor->Rows() != rows)
    Fail(ErrorCode::kBadFile, "{}: tensor {} must be {} of {} x {}, found {} of {}", file.name(), name,
         Traits(type).name, rows, row_length, Traits(tensor->type).name, tensor->ShapeString());
  return *tensor;
}

std::vector<float> Halves(const GgufFile& file, const std::string& name, size_t rows, size_t row_length) {
  const GgufTensor& tensor = Tensor(file, name, DType::kF16, rows, row_length);
  std::vector<float> values(rows * row_length);
  // Tensor data is aligned to 8 bytes at least.
  F16ToF32(reinterpret_cast<const uint16_t*>(tensor.data.data()), values.size(), values.data());
  return values;
}

std::string ViewName(size_t view, const char* part) { return fmt::format("view.{}.{}", view, part); }

}  // namespace

std::string RecordPath(const std::string& folder, size_t sequence, size_t layer) {
  return fmt::format("{}/text-{:05}-layer-{:03}.gguf", folder, sequence, layer);
}

uint64_t RecordBytes(size_t n_tokens, size_t n_heads, size_t n_kv_heads, size_t head_dim, size_t views, bool plus) {
  constexpr size_t kHalf = 2, kSingle = 4;
  const size_t query = n_heads * head_dim * kHalf, row = n_kv_heads * head_dim * kHalf;
  const size_t view = (plus ? 2 : 1) * query + n_heads * kSingle + n_kv_heads * kSingle;  // out, plus; lse; leave
  return uint64_t{n_tokens} * (2 * query + 2 * row + views * view);                        // q, target; k, v
}

void WriteRecord(const std::string& path, const CaptureRecord& record, size_t n_heads, size_t n_kv_heads) {
  HalfWriter out(path);
  GgufWriter& writer = out.writer();
  writer.Add("general.architecture", "lesskv-capture");
  writer.Add("capture.n_tokens", static_cast<uint64_t>(record.n_tokens));
  writer.Add("capture.n_heads", static_cast<uint64_t>(n_heads));
  writer.Add("capture.n_kv_heads", static_cast<uint64_t>(n_kv_heads));
  writer.Add("capture.head_dim", static_cast<uint64_t>(record.q.size() / record.n_tokens / n_heads));
  std::vector<uint64_t> first_scored;
  for (const CaptureView& view : record.views) first_scored.push_back(view.first_scored);
  writer.AddArray("capture.first_scored", first_scored);
  out.Add("q", record.n_tokens, record.q);
  out.Add("k", record.n_tokens, record.k);
  out.Add("v", record.n_tokens, record.v);
  out.Add("target", record.n_tokens, record.target);
  for (size_t i = 0; i < record.views.size(); ++i) {
    const CaptureView& view = record.views[i];
    out.Add(ViewName(i, "out"), record.n_tokens, view.exact_out);
    out.AddRaw(ViewName(i, "lse"), DType::kF32, record.n_tokens, view.exact_lse);
    out.AddRaw(ViewName(i, "leave"), DType::kI32, n_kv_heads, view.leave);
    if (!view.plus_out.empty()) out.Add(ViewName(i, "plus"), record.n_tokens, view.plus_out);
  }
  writer.Write(path);
}

LessExample ReadExample(const std::string& path, size_t view, size_t n_heads, size_t n_kv_heads,
                        std::vector<float>* plus_out) {
  const GgufFile file = GgufFile::Open(path);
  if (file.GetOr<std::string>("general.architecture", "") != "lesskv-capture")
    Fail(ErrorCode::kBadFile, "{}: not a capture of lesskv train", path);
  LessExample e;
  e.n_tokens = file.Get<size_t>("capture.n_tokens");
  const size_t dim = file.Get<size_t>("capture.head_dim"), q_dim = n_heads * dim, kv_dim = n_kv_heads * dim;
  const auto first_scored = file.Get<std::vector<size_t>>("capture.first_scored");
  if (view >= first_scored.size() || first_scored[view] > e.n_tokens)
    Fail(ErrorCode::kBadFile, "{}: {} views, wanted view {}", path, first_scored.size(), view);
  e.first_scored = first_scored[view];
  e.q = Halves(file, "q", e.n_tokens, q_dim);
  e.k = Halves(file, "k", e.n_tokens, kv_dim);
  e.v = Halves(file, "v", e.n_tokens, kv_dim);
  e.target = Halves(file, "target", e.n_tokens, q_dim);
  e.exact_out = Halves(file, ViewName(view, "out"), e.n_tokens, q_dim);
  e.exact_lse.resize(e.n_tokens * n_heads);
  const GgufTensor& lse = Tensor(file, ViewName(view, "lse"), DType::kF32, e.n_tokens, n_heads);
  std::memcpy(e.exact_lse.data(), lse.data.data(), lse.data.size());
  e.leave.resize(n_kv_heads * e.n_tokens);
  const GgufTensor& leave = Tensor(file, ViewName(view, "leave"), DType::kI32, n_kv_heads, e.n_tokens);
  std::memcpy(e.leave.data(), leave.data.data(), leave.data.size());
  if (plus_out != nullptr) *plus_out = Halves(file, ViewName(view, "plus"), e.n_tokens, q_dim);
  return e;
}

}  // namespace lesskv::train
