#include "format/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "base/atomic_file.h"
#include "base/checked.h"
#include "format/gguf.h"  // Quoted
#include "format/json_reader.h"

namespace lesskv {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLongestHeader = 100'000'000;  // the reference implementation's limit

constexpr struct {
  SafetensorType type;
  std::string_view name;
  size_t bytes;
} kTypes[] = {{SafetensorType::kF32, "F32", 4},  {SafetensorType::kF16, "F16", 2}, {SafetensorType::kBF16, "BF16", 2},
              {SafetensorType::kI64, "I64", 8},  {SafetensorType::kI32, "I32", 4}, {SafetensorType::kU8, "U8", 1},
              {SafetensorType::kBool, "BOOL", 1}};

// The header, parsed; JSON that names a key twice in one object is refused, where the library would keep the last.
class HeaderReader {
 public:
  explicit HeaderReader(const std::string& file_name) : file_name_(file_name) {}

  Json Read(std::string_view text) {
    const auto callback = [this](int depth, Json::parse_event_t event, Json& parsed) {
      const size_t level = static_cast<size_t>(depth);
      if (keys_.size() <= level) keys_.resize(level + 1);
      if (event == Json::parse_event_t::object_start) keys_[level].clear();
      if (event == Json::parse_event_t::key) NoteKey(level - 1, parsed.get_ref<const std::string&>());
      return true;
    };
    if (NestsTooDeep(text))
      Fail(ErrorCode::kBadFile, "{}: the header is not valid JSON (nested deeper than {} levels)", file_name_, kMostJsonLevels);
    try {
      return Json::parse(text.begin(), text.end(), callback);
    } catch (const Json::exception& error) {
      Fail(ErrorCode::kBadFile, "{}: the header is not valid JSON ({})", file_name_, error.what());
    }
  }

 private:
  void NoteKey(size_t level, const std::string& key) {
    if (keys_[level].insert(key).second) return;
    Fail(ErrorCode::kBadFile, "{}: the header names {} twice", file_name_, Quoted(key));
  }

  const std::string& file_name_;
  std::vector<std::set<std::string>> keys_;  // of the object being read at each depth
};

// Reads the entry of one tensor.
class EntryReader {
 public:
  EntryReader(const std::string& file_name, const std::string& tensor_name, const Json& entry)
      : file_name_(file_name), tensor_name_(tensor_name), entry_(entry) {}

  Safetensor Read(std::span<const std::byte> all_data) const {
    Safetensor tensor;
    tensor.name = tensor_name_;
    if (!entry_.is_object()) Bad("its entry is not an object");
    tensor.type = Type();
    for (const uint64_t n : Numbers("shape")) tensor.shape.push_back(n);
    const std::vector<uint64_t> offsets = Numbers("data_offsets");
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > all_data.size()) {
      Bad(fmt::format("data_offsets [{}] are not a range in {} bytes of data", fmt::join(offsets, ", "),
                      all_data.size()));
    }
    tensor.data = all_data.subspan(offsets[0], offsets[1] - offsets[0]);
    const uint64_t expected = Bytes(tensor);
    if (expected != tensor.data.size()) {
      Bad(fmt::format("{} {} takes {} bytes, data_offsets give {}", SafetensorTypeName(tensor.type),
                      tensor.ShapeString(), expected, tensor.data.size()));
    }
    return tensor;
  }

 private:
  [[noreturn]] void Bad(const std::string& what) const {
    Fail(ErrorCode::kBadFile, "{}: tensor {}: {}", file_name_, Quoted(tensor_name_), what);
  }

  SafetensorType Type() const {
    const auto it = entry_.find("dtype");
    if (it == entry_.end() || !it->is_string()) Bad("no dtype");
    const auto& name = it->get_ref<const std::string&>();
    for (const auto& row : kTypes)
      if (row.name == name) return row.type;
    Bad(fmt::format("dtype {} is not supported", Quoted(name)));
  }

  std::vector<uint64_t> Numbers(const char* key) const {
    const auto it = entry_.find(key);
    if (it == entry_.end() || !it->is_array()) Bad(fmt::format("no array {}", key));
    std::vector<uint64_t> numbers;
    for (const Json& value : *it) {
      if (!value.is_number_unsigned()) Bad(fmt::format("{} holds {}, expected a count", key, Quoted(value.dump())));
      numbers.push_back(value.get<uint64_t>());
    }
    return numbers;
  }

  uint64_t Bytes(const Safetensor& tensor) const {
    uint64_t bytes = SafetensorElementBytes(tensor.type);
    for (const uint64_t n : tensor.shape)
      if (__builtin_mul_overflow(bytes, n, &bytes)) Bad(fmt::format("shape {} overflows", tensor.ShapeString()));
    return bytes;
  }

  const std::string& file_name_;
  const std::string& tensor_name_;
  const Json& entry_;
};

std::map<std::string, std::string> ReadMetadata(const std::string& file_name, const Json& entry) {
  std::map<std::string, std::string> result;
  if (!entry.is_object()) Fail(ErrorCode::kBadFile, "{}: __metadata__ is not an object", file_name);
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) Fail(ErrorCode::kBadFile, "{}: __metadata__ {} is not a string", file_name, Quoted(key));
    result[key] = value.get<std::string>();
  }
  return result;
}

// Tensors in the order of their data must follow each other without gap or overlap, from the first byte to the last.
void CheckCoverage(const std::string& file_name, const std::vector<Safetensor>& tensors,
                   std::span<const std::byte> data) {
  const std::byte* next = data.data();
  for (const Safetensor& tensor : tensors) {
    if (tensor.data.data() != next) {
      Fail(ErrorCode::kBadFile, "{}: tensor {} begins at data offset {}, expected {}", file_name, Quoted(tensor.name),
           tensor.data.data() - data.data(), next - data.data());
    }
    next += tensor.data.size();
  }
  if (next != data.data() + data.size()) {
    Fail(ErrorCode::kBadFile, "{}: {} bytes of data belong to no tensor", file_name, data.data() + data.size() - next);
  }
}

}  // namespace

std::string_view SafetensorTypeName(SafetensorType type) { return kTypes[static_cast<size_t>(type)].name; }
size_t SafetensorElementBytes(SafetensorType type) { return kTypes[static_cast<size_t>(type)].bytes; }

size_t Safetensor::Elements() const { return data.size() / SafetensorElementBytes(type); }
std::string Safetensor::ShapeString() const { return fmt::format("[{}]", fmt::join(shape, ", ")); }

SafetensorsFile SafetensorsFile::Open(const std::string& path) {
  auto mapping = std::make_shared<const MappedFile>(MappedFile::Open(path));
  const std::span<const std::byte> bytes = mapping->bytes();
  SafetensorsFile file = Load(bytes, path, mapping);
  file.mapping_ = std::move(mapping);
  return file;
}

SafetensorsFile SafetensorsFile::Parse(std::vector<std::byte> bytes, std::string name) {
  auto owner = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  const std::span<const std::byte> view = *owner;
  return Load(view, std::move(name), std::move(owner));
}

SafetensorsFile SafetensorsFile::Load(std::span<const std::byte> bytes, std::string name,
                                      std::shared_ptr<const void> owner) {
  uint64_t header_bytes = 0;
  if (bytes.size() < 8) Fail(ErrorCode::kBadFile, "{}: {} bytes are too few for safetensors", name, bytes.size());
  std::memcpy(&header_bytes, bytes.data(), 8);
  if (header_bytes > std::min<uint64_t>(kLongestHeader, bytes.size() - 8)) {
    Fail(ErrorCode::kBadFile, "{}: not a safetensors file: a header of {} bytes in {}", name, header_bytes,
         bytes.size());
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
  const Json header = HeaderReader(name).Read(text);
  if (!header.is_object()) Fail(ErrorCode::kBadFile, "{}: the header is not a JSON object", name);

  SafetensorsFile file;
  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") {
      file.metadata_ = ReadMetadata(name, entry);
    } else {
      file.tensors_.push_back(EntryReader(name, key, entry).Read(data));
    }
  }
  std::sort(file.tensors_.begin(), file.tensors_.end(), [](const Safetensor& a, const Safetensor& b) {
    // An empty tensor comes before the one whose place it shares.
    return a.data.data() != b.data.data() ? a.data.data() < b.data.data() : a.data.size() < b.data.size();
  });
  CheckCoverage(name, file.tensors_, data);
  for (size_t i = 0; i < file.tensors_.size(); ++i) file.index_[file.tensors_[i].name] = i;
  file.name_ = std::move(name);
  file.owner_ = std::move(owner);
  return file;
}

const Safetensor* SafetensorsFile::FindTensor(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

void SafetensorsFile::Release(const Safetensor& tensor) const {
  if (mapping_ != nullptr) mapping_->Release(tensor.data);
}

const std::string& SafetensorsFile::Metadata(const std::string& key) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) Fail(ErrorCode::kNotFound, "{} has no metadata {}", name_, Quoted(key));
  return it->second;
}

const Safetensor& SafetensorsFile::Require(const std::string& name,
                                           const std::optional<std::vector<size_t>>& shape) const {
  const Safetensor* tensor = FindTensor(name);
  if (tensor == nullptr) Fail(ErrorCode::kNotFound, "{} has no tensor {}", name_, Quoted(name));
  if (shape && *shape != tensor->shape) {
    Fail(ErrorCode::kMismatch, "{}: tensor {} has shape {}, expected [{}]", name_, Quoted(name), tensor->ShapeString(),
         fmt::join(*shape, ", "));
  }
  return *tensor;
}

void SafetensorsFile::FailType(const Safetensor& tensor) const {
  Fail(ErrorCode::kBadFile, "{}: tensor {} is stored as {}, expected another type", name_, Quoted(tensor.name),
       SafetensorTypeName(tensor.type));
}

void SafetensorsWriter::Add(const std::string& name, SafetensorType type, std::vector<size_t> shape,
                            std::span<const std::byte> data) {
  uint64_t bytes = SafetensorElementBytes(type);
  for (const size_t n : shape) bytes = CheckedMul<uint64_t>(bytes, n, "tensor size");
  if (bytes != data.size()) {
    Fail(ErrorCode::kInvalidArgument, "tensor {} takes {} bytes, {} were given", Quoted(name), bytes, data.size());
  }
  for (const Entry& entry : entries_) {
    if (entry.name == name) Fail(ErrorCode::kInvalidArgument, "tensor {} was added twice", Quoted(name));
  }
  entries_.push_back({name, type, std::move(shape), {data.begin(), data.end()}});
}

std::vector<std::byte> SafetensorsWriter::Serialize() const {
  Json header = Json::object();
  if (!metadata_.empty()) header["__metadata__"] = metadata_;
  uint64_t offset = 0;
  for (const Entry& entry : entries_) {
    header[entry.name] = {{"dtype", SafetensorTypeName(entry.type)},
                          {"shape", entry.shape},
                          {"data_offsets", {offset, offset + entry.data.size()}}};
    offset += entry.data.size();
  }
  std::string text = header.dump();
  text.resize(RoundUp(text.size(), 8), ' ');  // so that the data begins aligned
  const uint64_t length = text.size();
  std::vector<std::byte> bytes;
  const auto append = [&bytes](std::span<const std::byte> more) {
    bytes.insert(bytes.end(), more.begin(), more.end());
  };
  append(std::as_bytes(std::span(&length, 1)));
  append(std::as_bytes(std::span(text)));
  for (const Entry& entry : entries_) append(entry.data);
  return bytes;
}

void SafetensorsWriter::Write(const std::string& path) const {
  AtomicFile file(path);
  file.Write(Serialize());
  file.Commit();
}

}  // namespace lesskv
