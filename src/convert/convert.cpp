#include "convert/convert.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <memory>

#include "base/error.h"
#include "convert/hf_config.h"
#include "convert/hf_directory.h"
#include "convert/hf_tensors.h"
#include "convert/hf_vocabulary.h"
#include "convert/row_encoder.h"
#include "format/gguf_writer.h"
#include "kernels/quants/quants.h"
#include "model/config.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

DType StoredType(SafetensorType type) {
  if (type == SafetensorType::kF16) return DType::kF16;
  return type == SafetensorType::kBF16 ? DType::kBF16 : DType::kF32;
}

// The number that general.file_type gives a file whose matrices have that type.
uint32_t FileType(DType type) {
  constexpr std::pair<DType, uint32_t> kNumbers[] = {
      {DType::kF32, 0}, {DType::kF16, 1}, {DType::kBF16, 32}, {DType::kQ8_0, 7}, {DType::kQ4_0, 2}};
  for (const auto& [known, number] : kNumbers)
    if (known == type) return number;
  Fail(ErrorCode::kInvalidArgument, "{} is not a type that models are converted to", Traits(type).name);
}

class Conversion {
 public:
  explicit Conversion(const ConvertOptions& options)
      : options_(options), directory_(HfDirectory::Open(options.in)), encoder_(options.in) {}

  ConvertReport Run() {
    RefuseInputAsOutput();
    hf_ = TranslateConfig(directory_.config(), writer_);
    const Safetensor& embedding = *RequireEmbedding(directory_, hf_).tensor;
    report_.type = options_.type.value_or(StoredType(embedding.type));
    const size_t n_rows = embedding.shape[0];
    AddTokenizer(n_rows);
    AddGeneral();
    const ModelConfig model = ReadModelConfig(Probe(n_rows));
    AddTensors(model);
    writer_.Write(options_.out);
    return Finish();
  }

 private:
  void RefuseInputAsOutput() const {
    for (const std::string& in : directory_.weight_files()) {
      std::error_code no_such_file;
      if (std::filesystem::equivalent(in, options_.out, no_such_file))
        Fail(ErrorCode::kInvalidArgument, "{} and {} are the same file; the output needs a name of its own", in,
             options_.out);
    }
  }

  // What is written so far with an embedding of as many rows, as the loader sees it.
  GgufFile Probe(size_t n_rows) const {
    GgufWriter probe = writer_;
    const std::vector<float> zeros(n_rows);
    probe.AddTensor("token_embd.weight", {1, n_rows}, zeros);
    return GgufFile::Parse(probe.Serialize(), options_.in);
  }

  void AddTokenizer(size_t n_rows) {
    const HfVocabulary vocabulary = ReadHfVocabulary(directory_, n_rows);
    strips_behind_special_ = vocabulary.strips_behind_special;
    AddVocabulary(vocabulary, writer_);
    Note(vocabulary.notes);
    AddEnds(vocabulary, *Tokenizer::Create(LoadVocabulary(Probe(n_rows))));
  }

  // Most tokens that end a generation are known by their text; GGUF has two keys for others.
  void AddEnds(const HfVocabulary& vocabulary, const Tokenizer& tokenizer) {
    constexpr std::string_view kKeys[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
    size_t n_added = 0;
    for (const uint32_t id : vocabulary.ends) {
      if (tokenizer.IsEndOfGeneration(static_cast<int32_t>(id))) continue;
      if (n_added < std::size(kKeys)) {
        writer_.Add(kKeys[n_added++], id);
      } else {
        report_.notes.push_back(fmt::format("token {} ends no generation: GGUF has no key for so many", id));
      }
    }
  }

  void AddGeneral() {
    writer_.Add("general.type", "model");
    writer_.Add("general.name", ModelName());
    writer_.Add("general.file_type", FileType(report_.type));
    constexpr uint32_t kBlockFormatVersion = 2;  // of the formats in kernels/quants.h
    if (Traits(report_.type).block_elements > 1) writer_.Add("general.quantization_version", kBlockFormatVersion);
  }

  // GGUF has no key that says that special tokens take the white space behind them: models named Phi-3 do.
  std::string ModelName() const {
    const std::string name = directory_.Name();
    std::string lower = name;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    const bool named = lower.find("phi-3") != std::string::npos || lower.find("phi3") != std::string::npos;
    return strips_behind_special_ && !named ? "Phi-3 " + name : name;
  }

  void AddTensors(const ModelConfig& model) {
    recipes_ = PlanTensors(directory_, hf_, model, hf_.notes);
    Note(hf_.notes);
    for (const auto& [name, factors] : hf_.rope_factors) writer_.AddTensor(name, {factors.size()}, factors);
    std::vector<std::string> misfits;
    for (const TensorRecipe& recipe : recipes_) {
      total_ += recipe.source.tensor->data.size();
      const DType type = Type(recipe, misfits);
      const std::vector<size_t> ne(recipe.shape.rbegin(), recipe.shape.rend());
      writer_.AddTensor(recipe.name, type, ne, [&recipe, this, type](ByteSink& sink) { Encode(recipe, type, sink); });
    }
    if (misfits.empty()) return;
    report_.notes.push_back(
        fmt::format("kept as F32: {} matrices whose row length is not a multiple of {}, the block of {}, such as {}",
                    misfits.size(), Traits(report_.type).block_elements, Traits(report_.type).name, misfits[0]));
  }

  DType Type(const TensorRecipe& recipe, std::vector<std::string>& misfits) const {
    if (recipe.shape.size() == 1) return DType::kF32;
    if (recipe.RowLength() % Traits(report_.type).block_elements == 0) return report_.type;
    misfits.push_back(recipe.name);
    return DType::kF32;
  }

  void Encode(const TensorRecipe& recipe, DType type, ByteSink& sink) {
    const HfTensor& source = recipe.source;
    const size_t row_bytes = source.tensor->data.size() / recipe.Rows();
    const auto read = [&](size_t row, float* values) { ReadRow(recipe, row, values); };
    encoder_.Encode(source.tensor->name, recipe.Rows(), recipe.RowLength(), type, read, sink, [&](size_t n_rows) {
      source.shard->Release(*source.tensor);
      done_ += n_rows * row_bytes;
      if (options_.progress) options_.progress(static_cast<double>(done_) / static_cast<double>(total_));
    });
  }

  // A vector is one row, whose elements move as a matrix's rows do.
  static void ReadRow(const TensorRecipe& recipe, size_t row, float* values) {
    const size_t n = recipe.RowLength();
    const bool is_vector = recipe.shape.size() == 1;
    Decode(recipe, is_vector || !recipe.source_row ? row : recipe.source_row(row), values);
    if (is_vector && recipe.source_row) {
      const std::vector<float> before(values, values + n);
      for (size_t i = 0; i < n; ++i) values[i] = before[recipe.source_row(i)];
    }
    if (recipe.shift == 0) return;
    for (size_t i = 0; i < n; ++i) values[i] += recipe.shift;
  }

  static void Decode(const TensorRecipe& recipe, size_t row, float* values) {
    const Safetensor& tensor = *recipe.source.tensor;
    const size_t n = recipe.RowLength(), bytes = n * SafetensorElementBytes(tensor.type);
    std::vector<float> aligned(n);  // safetensors promise no alignment
    std::memcpy(aligned.data(), tensor.data.data() + row * bytes, bytes);
    DequantizeRow(StoredType(tensor.type), reinterpret_cast<const std::byte*>(aligned.data()), n, values);
  }

  void Note(const std::vector<std::string>& notes) {
    report_.notes.insert(report_.notes.end(), notes.begin(), notes.end());
  }

  ConvertReport Finish() {
    std::string warning = encoder_.losses().Warning(report_.type);
    if (!warning.empty()) warning.pop_back();
    if (!warning.empty()) report_.notes.push_back(std::move(warning));
    report_.bytes_read = total_;
    return std::move(report_);
  }

  const ConvertOptions& options_;
  const HfDirectory directory_;
  GgufWriter writer_;
  HfConfig hf_;
  bool strips_behind_special_ = false;
  std::vector<TensorRecipe> recipes_;
  RowEncoder encoder_;
  uint64_t total_ = 0, done_ = 0;
  ConvertReport report_{};
};

}  // namespace

ConvertReport Convert(const ConvertOptions& options) { return Conversion(options).Run(); }

}  // namespace lesskv
