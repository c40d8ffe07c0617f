// lesskv quantize: a model file with its matrices stored in another type.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "commands.h"
#include "common.h"
#include "base/memory.h"
#include "convert/row_encoder.h"
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

// Converts tensors, rows in parallel, and shows how far it is.
class Converter {
 public:
  explicit Converter(const GgufFile& file)
      : encoder_(file.name()), stop_(StopOnInterrupt()), bar_("quantize") {
    for (const GgufTensor& tensor : file.tensors()) total_ += tensor.data.size();
  }

  void Convert(const GgufTensor& tensor, DType target, ByteSink& sink) {
    if (tensor.type == target) {
      sink.Write(tensor.data);
      return Advance(tensor.data.size());
    }
    const size_t n = tensor.RowLength(), row_bytes = RowBytes(tensor.type, n);
    const auto read = [&](size_t row, float* values) {
      DequantizeRow(tensor.type, tensor.data.data() + row * row_bytes, n, values);
    };
    encoder_.Encode(tensor.name, tensor.Rows(), n, target, read, sink,
                    [&](size_t n_rows) { Advance(n_rows * row_bytes); });
  }

  void Finish() { bar_.Clear(); }
  const EncodingLosses& losses() const { return encoder_.losses(); }

 private:
  void Advance(size_t bytes) {
    if (stop_) Fail(ErrorCode::kRuntime, "interrupted; nothing was written");
    done_ += bytes;
    bar_.Show(static_cast<double>(done_) / static_cast<double>(total_));
  }

  RowEncoder encoder_;
  const std::atomic<bool>& stop_;
  ProgressBar bar_;
  size_t total_ = 0, done_ = 0;
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
  CheckOutputPath("OUT", options.out);
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
  converter.Finish();
  Say(std::string_view(converter.losses().Warning(target)));
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
