// lesskv quantize: a model file with its matrices stored in another type.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "commands.h"
#include "common.h"
#include "base/memory.h"
#include "format/gguf_writer.h"
#include "kernels/quants/quants.h"

namespace lesskv {
namespace {

struct QuantizeOptions {
  std::string in, out, type;
  int threads = 0;
};

// The types offered, with the number that general.file_type gives a file whose matrices have that type.
constexpr struct {
  DType type;
  uint32_t file_type;
} kTargets[] = {{DType::kF32, 0},     {DType::kF16, 1},   {DType::kBF16, 32}, {DType::kQ8_0, 7},
                {DType::kQ4_0, 2},    {DType::kQ4_1, 3},  {DType::kQ5_0, 8},  {DType::kQ5_1, 9},
                {DType::kIQ4_NL, 25}, {DType::kQ4_K, 14}, {DType::kQ5_K, 16}, {DType::kQ6_K, 18}};

DType ParseType(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
  std::string known;
  for (const auto& target : kTargets) {
    if (Traits(target.type).name == name) return target.type;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", Traits(target.type).name);
  }
  Fail(ErrorCode::kInvalidArgument, "unknown type {}, expected one of {}", Quoted(name), known);
}

uint32_t FileType(DType type) {
  for (const auto& target : kTargets)
    if (target.type == type) return target.file_type;
  Fail(ErrorCode::kInvalidArgument, "{} is not a type of matrices", Traits(type).name);
}

// What each tensor becomes; whatever does not become `target` is listed for the user.
class TypePlan {
 public:
  explicit TypePlan(DType target) : target_(target) {}

  DType Choose(const GgufTensor& tensor) {
    if (!IsWeightType(tensor.type)) return tensor.type;  // integers: not weights
    const bool quantised_before = Traits(tensor.type).block_elements > 1,
               quantises = Traits(target_).block_elements > 1;
    if (quantised_before && quantises && tensor.type != target_) ++n_requantised_;
    if (target_ == DType::kF32) return target_;
    if (tensor.n_dims == 1) {
      ++n_vectors_;
      return DType::kF32;
    }
    if (tensor.RowLength() % Traits(target_).block_elements == 0) {
      ++n_as_asked_;
      return target_;
    }
    misfits_.push_back(fmt::format("{} ({})", tensor.name, tensor.RowLength()));
    return DType::kF32;
  }

  // Says on stderr what is not as asked. Throws Error when nothing would be.
  void Report() const {
    const DTypeTraits& traits = Traits(target_);
    const std::string why =
        fmt::format("whose row length is not a multiple of {}, the block of {}", traits.block_elements, traits.name);
    if (n_as_asked_ == 0 && !misfits_.empty()) {
      Fail(ErrorCode::kInvalidArgument, "there are only matrices {}, such as {}", why, misfits_[0]);
    }
    if (n_vectors_ > 0) Say("kept as F32: {} one-dimensional tensors\n", n_vectors_);
    if (!misfits_.empty()) {
      constexpr size_t kShown = 4;
      const auto end = misfits_.begin() + static_cast<ptrdiff_t>(std::min(kShown, misfits_.size()));
      Say("kept as F32: {} matrices {}: {}{}\n", misfits_.size(), why, fmt::join(misfits_.begin(), end, ", "),
          end == misfits_.end() ? "" : ", ...");
    }
    if (n_requantised_ > 0) Say("warning: {} tensors were quantised before; the errors add up\n", n_requantised_);
  }

 private:
  DType target_;
  size_t n_as_asked_ = 0, n_vectors_ = 0, n_requantised_ = 0;
  std::vector<std::string> misfits_;
};

// What the conversion changed in the rows that it changed most: a value that a block's half-precision scale or minimum
// cannot reach is cut to what it can, without an error of its own.
struct Losses {
  static constexpr float kMuch = 0.25f;  // of a row's root mean square; 4-bit types lose a tenth of normal rows
  size_t rows = 0;
  float most = 0;
  std::string where = {};

  void Add(const GgufTensor& tensor, size_t row, float loss) {
    if (loss <= kMuch) return;
    ++rows;
    if (loss <= most) return;
    most = loss;
    where = fmt::format("row {} of tensor {}", row, Quoted(tensor.name));
  }
  void Report(DType type) const {
    if (rows == 0) return;
    Say("warning: {} cannot hold {} row{}: the error is more than a quarter of the values, most in {} ({:.0f} %)\n",
        Traits(type).name, rows, rows == 1 ? "" : "s", where, 100 * most);
  }
};

// Converts tensors slab by slab, rows in parallel, so that memory stays bounded whatever the tensor's size.
class Converter {
 public:
  explicit Converter(const GgufFile& file) : file_(file), stop_(StopOnInterrupt()), bar_("quantize") {
    for (const GgufTensor& tensor : file.tensors()) total_ += tensor.data.size();
  }

  void Convert(const GgufTensor& tensor, DType target, ByteSink& sink) {
    if (tensor.type == target) {
      sink.Write(tensor.data);
      return Advance(tensor.data.size());
    }
    const size_t n = tensor.RowLength(), row_bytes = RowBytes(tensor.type, n);
    const size_t slab_rows = std::clamp<size_t>(kSlabElements / n, 1, tensor.Rows());
    for (size_t row = 0; row < tensor.Rows(); row += slab_rows) {
      const size_t n_rows = std::min(slab_rows, tensor.Rows() - row);
      ConvertSlab(tensor, row, n_rows, target, sink);
      Advance(n_rows * row_bytes);
    }
  }

  const Losses& losses() const { return losses_; }

 private:
  static constexpr size_t kSlabElements = size_t{4} << 20;

  void ConvertSlab(const GgufTensor& tensor, size_t first_row, size_t n_rows, DType target, ByteSink& sink) {
    const size_t n = tensor.RowLength(), in_bytes = RowBytes(tensor.type, n), out_bytes = RowBytes(target, n);
    values_.resize(n_rows * n);
    encoded_.resize(n_rows * out_bytes);
    largest_.assign(n_rows, 0.0f);
    lost_.assign(n_rows, 0.0f);
    ParallelFor(n_rows, [&](size_t r) {
      float* row = values_.data() + r * n;
      DequantizeRow(tensor.type, tensor.data.data() + (first_row + r) * in_bytes, n, row);
      largest_[r] = LargestMagnitude(row, n);
      // Not finite rows are left out here and refused below, the first one whatever the threads do.
      if (!std::isfinite(largest_[r])) return;
      std::byte* encoded = encoded_.data() + r * out_bytes;
      QuantizeRow(target, row, n, encoded);
      lost_[r] = Lost(row, n, target, encoded);
    });
    for (size_t r = 0; r < n_rows; ++r) {
      CheckRange(tensor, first_row + r, largest_[r], target);
      losses_.Add(tensor, first_row + r, lost_[r]);
    }
    sink.Write(encoded_);
  }

  // NaN and infinity make the result infinite.
  static float LargestMagnitude(const float* x, size_t n) {
    float largest = 0, zero = 0;
    for (size_t i = 0; i < n; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      zero += x[i] * 0.0f;
    }
    return zero == 0.0f ? largest : std::numeric_limits<float>::infinity();
  }

  // Root mean square of what the stored row is off by, as a share of the row's own.
  static float Lost(const float* row, size_t n, DType type, const std::byte* encoded) {
    std::vector<float> stored(n);
    DequantizeRow(type, encoded, n, stored.data());
    double error = 0, all = 0;
    for (size_t i = 0; i < n; ++i) {
      error += (double{stored[i]} - row[i]) * (double{stored[i]} - row[i]);
      all += double{row[i]} * row[i];
    }
    return all == 0 ? 0 : static_cast<float>(std::sqrt(error / all));
  }

  void CheckRange(const GgufTensor& tensor, size_t row, float largest, DType target) const {
    if (!std::isfinite(largest)) {
      Fail(ErrorCode::kBadFile, "{}: row {} of tensor {} holds a value that is not finite", file_.name(), row,
           Quoted(tensor.name));
    }
    constexpr float kHalfOverflow = 65520.0f;
    if (target == DType::kF16 && largest >= kHalfOverflow) {
      Fail(ErrorCode::kBadFile, "{}: row {} of tensor {} holds {}, more than F16 can; BF16 can", file_.name(), row,
           Quoted(tensor.name), largest);
    }
  }

  void Advance(size_t bytes) {
    if (stop_) Fail(ErrorCode::kRuntime, "interrupted; nothing was written");
    done_ += bytes;
    bar_.Show(static_cast<double>(done_) / static_cast<double>(total_));
  }

  const GgufFile& file_;
  const std::atomic<bool>& stop_;
  ProgressBar bar_;
  size_t total_ = 0, done_ = 0;
  std::vector<float> values_, largest_, lost_;
  std::vector<std::byte> encoded_;
  Losses losses_;
};

void CopyMetadata(const GgufFile& file, DType target, GgufWriter& writer) {
  for (const auto& [key, value] : file.metadata()) {
    const bool rewritten =
        key == "general.file_type" || key == "general.quantization_version" || key == "general.alignment" ||
        key == "split.no" || key == "split.count" || key == "split.tensors.count";  // parts are joined
    if (!rewritten) writer.Add(key, value);
  }
  writer.Add("general.file_type", FileType(target));
  constexpr uint32_t kBlockFormatVersion = 2;  // of the formats in kernels/quants.h
  if (Traits(target).block_elements > 1) writer.Add("general.quantization_version", kBlockFormatVersion);
}

void RefuseSameFile(const QuantizeOptions& options) {
  for (const std::string& in : ModelFiles(options.in)) {
    std::error_code no_such_file;
    if (std::filesystem::equivalent(in, options.out, no_such_file)) {
      Fail(ErrorCode::kInvalidArgument, "{} and {} are the same file; the output needs a name of its own", in,
           options.out);
    }
  }
}

void Quantize(const QuantizeOptions& options) {
  const ThreadPool pool(options.threads);
  const ThreadScope scope(pool);
  const DType target = ParseType(options.type);
  const GgufFile file = GgufFile::Open(options.in);
  RefuseSameFile(options);
  GgufWriter writer;
  CopyMetadata(file, target, writer);
  TypePlan plan(target);
  Converter converter(file);
  for (const GgufTensor& tensor : file.tensors()) {
    const DType type = plan.Choose(tensor);
    writer.AddTensor(tensor.name, type, std::span(tensor.ne).first(tensor.n_dims),
                     [&tensor, &converter, type](ByteSink& sink) { converter.Convert(tensor, type, sink); });
  }
  plan.Report();
  writer.Write(options.out);
  converter.losses().Report(target);
  Say("{}: {}, was {}\n", options.out, HumanBytes(std::filesystem::file_size(options.out)),
      HumanBytes(file.file_bytes()));
}

}  // namespace

void AddQuantizeCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("quantize", "Store a model's matrices in another type");
  auto options = std::make_shared<QuantizeOptions>();
  command->add_option("in", options->in, "Model file (GGUF)")->required()->option_text("IN");
  command->add_option("out", options->out, "File to write")->required()->option_text("OUT");
  command->add_option("type", options->type, "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q4_K, Q5_K or Q6_K")
      ->required()
      ->option_text("TYPE");
  command->add_option("-t,--threads", options->threads, "Threads (default: all CPUs)")->option_text("N");
  command->callback([options] { Quantize(*options); });
}

}  // namespace lesskv
