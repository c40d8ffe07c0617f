#include "format/gguf_writer.h"

#include "base/check.h"
#include "base/checked.h"

namespace lesskv {
namespace {

constexpr size_t kAlignment = 32;
constexpr uint32_t kVersion = 3;
constexpr size_t kLongestKey = 65535, kLongestTensorName = 64;

void Append(std::vector<std::byte>& out, std::span<const std::byte> bytes) {
  out.insert(out.end(), bytes.begin(), bytes.end());
}

template <typename T>
void AppendNumber(std::vector<std::byte>& out, T value) {
  Append(out, std::as_bytes(std::span(&value, 1)));
}

void AppendString(std::vector<std::byte>& out, std::string_view text) {
  AppendNumber<uint64_t>(out, text.size());
  Append(out, std::as_bytes(std::span(text)));
}

class MemorySink final : public ByteSink {
 public:
  void Write(std::span<const std::byte> bytes) override { Append(bytes_, bytes); }
  std::vector<std::byte> Take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

// Counts what a tensor's source writes, so that a wrong amount is found at its tensor and not by the file's reader.
class CountingSink final : public ByteSink {
 public:
  explicit CountingSink(ByteSink& target) : target_(target) {}
  void Write(std::span<const std::byte> bytes) override {
    target_.Write(bytes);
    written_ += bytes.size();
  }
  uint64_t written() const { return written_; }

 private:
  ByteSink& target_;
  uint64_t written_ = 0;
};

void WritePadding(ByteSink& sink, uint64_t written) {
  static constexpr std::byte kZeros[kAlignment] = {};
  sink.Write(std::span(kZeros).first(RoundUp(written, kAlignment) - written));
}

void CheckName(std::string_view what, std::string_view name, size_t longest, std::unordered_set<std::string>& seen) {
  if (name.empty() || name.size() > longest) {
    Fail(ErrorCode::kInvalidArgument, "{} {} has {} bytes, expected 1 to {}", what, Quoted(name), name.size(), longest);
  }
  if (!seen.emplace(name).second) Fail(ErrorCode::kInvalidArgument, "{} {} was added twice", what, Quoted(name));
}

uint64_t TensorBytes(std::string_view name, DType type, std::span<const size_t> ne) {
  if (ne.empty() || ne.size() > 4) {
    Fail(ErrorCode::kInvalidArgument, "tensor {} has {} dimensions, expected 1 to 4", Quoted(name), ne.size());
  }
  const DTypeTraits& traits = Traits(type);
  if (ne[0] % traits.block_elements != 0) {
    Fail(ErrorCode::kInvalidArgument, "the row length {} of tensor {} is not a multiple of {}, the block of {}", ne[0],
         Quoted(name), traits.block_elements, traits.name);
  }
  uint64_t bytes = CheckedMul<uint64_t>(ne[0] / traits.block_elements, traits.block_bytes, "tensor size");
  for (const size_t n : ne.subspan(1)) bytes = CheckedMul<uint64_t>(bytes, n, "tensor size");
  if (bytes == 0) Fail(ErrorCode::kInvalidArgument, "a dimension of tensor {} is 0", Quoted(name));
  return bytes;
}

}  // namespace

void GgufWriter::AddEncoded(std::string_view key, GgufType type, std::span<const std::byte> value) {
  if (key == "general.alignment") Fail(ErrorCode::kInvalidArgument, "general.alignment is fixed at {}", kAlignment);
  CheckName("metadata key", key, kLongestKey, keys_);
  AppendString(pairs_, key);
  AppendNumber(pairs_, type);
  Append(pairs_, value);
  ++n_pairs_;
}

void GgufWriter::AddEncodedArray(std::string_view key, GgufType type, uint64_t count,
                                 std::span<const std::byte> elements) {
  std::vector<std::byte> value;
  AppendNumber(value, type);
  AppendNumber(value, count);
  Append(value, elements);
  AddEncoded(key, GgufType::kArray, value);
}

void GgufWriter::Add(std::string_view key, std::string_view value) {
  std::vector<std::byte> encoded;
  AppendString(encoded, value);
  AddEncoded(key, GgufType::kString, encoded);
}

void GgufWriter::AddArray(std::string_view key, std::span<const std::string> values) {
  std::vector<std::byte> elements;
  for (const std::string& value : values) AppendString(elements, value);
  AddEncodedArray(key, GgufType::kString, values.size(), elements);
}

void GgufWriter::AddBools(std::string_view key, const std::vector<bool>& values) {
  std::vector<std::byte> elements;
  for (const bool value : values) elements.push_back(std::byte{value});
  AddEncodedArray(key, GgufType::kBool, values.size(), elements);
}

void GgufWriter::Add(std::string_view key, const GgufValue& value) {
  AddEncoded(key, value.is_array() ? GgufType::kArray : value.element_type(), value.encoded());
}

void GgufWriter::AddTensor(std::string_view name, DType type, std::span<const size_t> ne, TensorSource source) {
  const uint64_t bytes = TensorBytes(name, type, ne);
  CheckName("tensor", name, kLongestTensorName, tensor_names_);
  tensors_.push_back({std::string(name), type, {ne.begin(), ne.end()}, bytes, std::move(source)});
}

void GgufWriter::AddTensor(std::string_view name, DType type, std::span<const size_t> ne,
                           std::span<const std::byte> data) {
  const uint64_t bytes = TensorBytes(name, type, ne);
  if (bytes != data.size()) {
    Fail(ErrorCode::kInvalidArgument, "tensor {} takes {} bytes, {} were given", Quoted(name), bytes, data.size());
  }
  AddTensor(name, type, ne, [data](ByteSink& sink) { sink.Write(data); });
}

std::vector<std::byte> GgufWriter::Header() const {
  std::vector<std::byte> header;
  Append(header, std::as_bytes(std::span(std::string_view("GGUF"))));
  AppendNumber(header, kVersion);
  AppendNumber<uint64_t>(header, tensors_.size());
  AppendNumber(header, n_pairs_);
  Append(header, pairs_);
  uint64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    AppendString(header, tensor.name);
    AppendNumber(header, CheckedCast<uint32_t>(tensor.ne.size(), "dimension count"));
    for (const uint64_t n : tensor.ne) AppendNumber(header, n);
    AppendNumber(header, tensor.type);
    AppendNumber(header, offset);
    offset += RoundUp(tensor.bytes, kAlignment);
  }
  return header;
}

void GgufWriter::WriteTo(ByteSink& sink) const {
  const std::vector<std::byte> header = Header();
  sink.Write(header);
  WritePadding(sink, header.size());
  for (const Tensor& tensor : tensors_) {
    CountingSink counting(sink);
    tensor.source(counting);
    CHECK(counting.written() == tensor.bytes, "tensor {}: {} bytes expected, {} written", tensor.name, tensor.bytes,
          counting.written());
    WritePadding(sink, tensor.bytes);
  }
}

void GgufWriter::Write(const std::string& path) const {
  AtomicFile file(path);
  WriteTo(file);
  file.Commit();
}

std::vector<std::byte> GgufWriter::Serialize() const {
  MemorySink sink;
  WriteTo(sink);
  return sink.Take();
}

}  // namespace lesskv
