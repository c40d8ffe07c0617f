#include "format/gguf_parser.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "base/checked.h"

namespace lesskv {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place, as little-endian");

constexpr uint64_t kDefaultAlignment = 32;
// The format asks for a multiple of 8; more than a mebibyte has no use and only serves to waste address space.
constexpr uint64_t kSmallestAlignment = 8, kLargestAlignment = uint64_t{1} << 20;
// The format's own limits on names.
constexpr size_t kLongestKey = 65535, kLongestTensorName = 64;
constexpr size_t kMaxDims = 4;
// No element takes more than 8 bytes, so that sizes in bytes cannot overflow.
constexpr uint64_t kMostElements = uint64_t{1} << 60;
// The smallest records there can be: key length, one byte of key, type, value of one byte;
// name length, one byte of name, dimension count, one dimension, type, offset.
constexpr uint64_t kSmallestPair = 8 + 1 + 4 + 1, kSmallestTensor = 8 + 1 + 4 + 8 + 4 + 8;

// 0 for strings and arrays.
size_t ScalarBytes(GgufType type) {
  static constexpr uint8_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kBytes[static_cast<size_t>(type)];
}

// Types that other programs write and we do not read, so that the message can say more than a number.
std::string ForeignTypeName(uint32_t type) {
  static constexpr struct {
    uint32_t type;
    const char* name;
  } kTable[] = {{4, "Q4_2"},    {5, "Q4_3"},     {9, "Q8_1"},        {15, "Q8_K"},       {16, "IQ2_XXS"},
                {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"},      {21, "IQ3_S"},      {22, "IQ2_S"},
                {28, "F64"},    {29, "IQ1_M"},   {31, "Q4_0_4_4"},   {32, "Q4_0_4_8"},   {33, "Q4_0_8_8"},
                {34, "TQ1_0"},  {35, "TQ2_0"},   {36, "IQ4_NL_4_4"}, {37, "IQ4_NL_4_8"}, {38, "IQ4_NL_8_8"},
                {40, "NVFP4"},  {41, "Q1_0"},    {42, "Q2_0"}};
  for (const auto& row : kTable)
    if (row.type == type) return fmt::format("{} ({})", row.name, type);
  return fmt::format("{}, which is not a known type", type);
}

}  // namespace

GgufParser::GgufParser(std::span<const std::byte> bytes, std::string name, std::shared_ptr<const void> owner)
    : bytes_(bytes) {
  file_.name_ = std::move(name);
  file_.owner_ = std::move(owner);
  file_.file_bytes_ = bytes.size();
}

GgufFile GgufParser::Run() {
  ReadMagicAndVersion();
  // Both counts come first; they are bounded by what is left so that nothing large is reserved for a lie.
  const uint64_t n_tensors = Count(kSmallestTensor, "tensor count");
  const uint64_t n_pairs = Count(kSmallestPair, "metadata count");
  for (uint64_t i = 0; i < n_pairs; ++i) ReadPair(i);
  ReadAlignment();
  ReadSplit();
  for (uint64_t i = 0; i < n_tensors; ++i) ReadTensor(i);
  FindDataOffset();
  PlaceTensors();
  RefuseOverlap();
  return std::move(file_);
}

std::span<const std::byte> GgufParser::Take(uint64_t n, const char* what) {
  if (n > Remaining()) {
    Bad("the file ends inside {}: {} bytes expected at offset {}, {} left", what, n, position_, Remaining());
  }
  const auto result = bytes_.subspan(position_, n);
  position_ += n;
  return result;
}

template <typename T>
T GgufParser::Number(const char* what) {
  T value;
  std::memcpy(&value, Take(sizeof value, what).data(), sizeof value);
  return value;
}

std::string_view GgufParser::String(const char* what) {
  const uint64_t length = Number<uint64_t>(what);
  const auto bytes = Take(length, what);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

uint64_t GgufParser::Count(uint64_t smallest, const char* what) {
  const uint64_t count = Number<uint64_t>(what);
  if (count > Remaining() / smallest)
    Bad("{} {} is more than the remaining {} bytes can hold", what, count, Remaining());
  return count;
}

void GgufParser::ReadMagicAndVersion() {
  const size_t shown = std::min<size_t>(4, bytes_.size());
  const std::string_view start(reinterpret_cast<const char*>(bytes_.data()), shown);
  if (start != "GGUF") Bad("not a GGUF file: it starts with {}, expected 'GGUF'", Quoted(start));
  position_ = 4;
  file_.version_ = Number<uint32_t>("the version");
  // A swapped small number has its low half empty.
  if (file_.version_ != 0 && (file_.version_ & 0xffff) == 0) Bad("big-endian GGUF files are not supported");
  if (file_.version_ != 2 && file_.version_ != 3)
    Bad("GGUF version {} is not supported, expected 2 or 3", file_.version_);
}

void GgufParser::ReadPair(uint64_t index) {
  const std::string_view key = String("a metadata key");
  if (key.empty() || key.size() > kLongestKey) {
    Bad("metadata key {} has {} bytes, expected 1 to {}", index, key.size(), kLongestKey);
  }
  if (!file_.key_index_.emplace(key, file_.metadata_.size()).second) Bad("metadata key {} occurs twice", Quoted(key));
  file_.metadata_.emplace_back(key, ReadValue(key));
}

GgufType GgufParser::ReadType(std::string_view key) {
  const uint32_t type = Number<uint32_t>("a metadata type");
  if (type > static_cast<uint32_t>(GgufType::kFloat64)) Bad("metadata {} has unknown type {}", Quoted(key), type);
  return static_cast<GgufType>(type);
}

GgufValue GgufParser::ReadValue(std::string_view key) {
  GgufValue value;
  value.element_type_ = ReadType(key);
  const uint64_t begin = position_;
  if (value.element_type_ == GgufType::kArray) {
    value.is_array_ = true;
    value.element_type_ = ReadType(key);
    if (value.element_type_ == GgufType::kArray)
      Bad("metadata {} is an array of arrays, which is not supported", Quoted(key));
    const uint64_t count = Number<uint64_t>("an array length");
    // A string takes at least its length field.
    const uint64_t smallest = value.element_type_ == GgufType::kString ? 8 : ScalarBytes(value.element_type_);
    if (count > Remaining() / smallest) {
      Bad("metadata {} claims {} elements, more than the remaining {} bytes can hold", Quoted(key), count, Remaining());
    }
    value.size_ = count;
  }
  ReadElements(key, value);
  value.encoded_ = bytes_.subspan(begin, position_ - begin);
  return value;
}

void GgufParser::ReadElements(std::string_view key, GgufValue& value) {
  if (value.element_type_ == GgufType::kString) {
    value.strings_.reserve(value.size_);
    for (size_t i = 0; i < value.size_; ++i) value.strings_.push_back(String("a metadata string"));
    return;
  }
  const auto elements = Take(value.size_ * ScalarBytes(value.element_type_), "a metadata value");
  value.elements_ = elements.data();
  if (value.element_type_ != GgufType::kBool) return;
  for (const std::byte element : elements) {
    if (element > std::byte{1}) {
      Bad("metadata {} holds the bool {}, expected 0 or 1", Quoted(key), static_cast<int>(element));
    }
  }
}

void GgufParser::ReadAlignment() {
  const uint64_t alignment = file_.GetOr<uint64_t>("general.alignment", kDefaultAlignment);
  if (!std::has_single_bit(alignment) || alignment < kSmallestAlignment || alignment > kLargestAlignment) {
    Bad("general.alignment is {}, expected a power of two from {} to {}", alignment, kSmallestAlignment,
        kLargestAlignment);
  }
  file_.alignment_ = alignment;
}

// 0 is what joining the parts leaves.
void GgufParser::ReadSplit() {
  file_.split_count_ = std::max<size_t>(1, file_.GetOr<size_t>("split.count", 1));
  file_.split_part_ = file_.GetOr<size_t>("split.no", 0);
  if (file_.split_part_ >= file_.split_count_) {
    Bad("split.no is {}, expected less than {}, the split.count", file_.split_part_, file_.split_count_);
  }
}

void GgufParser::ReadTensor(uint64_t index) {
  GgufTensor tensor;
  const std::string_view name = String("a tensor name");
  if (name.empty() || name.size() > kLongestTensorName) {
    Bad("the name of tensor {} has {} bytes, expected 1 to {}", index, name.size(), kLongestTensorName);
  }
  if (!file_.tensor_index_.emplace(name, file_.tensors_.size()).second) Bad("tensor {} occurs twice", Quoted(name));
  tensor.name = name;
  ReadShape(tensor);
  ReadTensorType(tensor);
  relative_offsets_.push_back(Number<uint64_t>("a tensor offset"));
  file_.tensors_.push_back(std::move(tensor));
}

void GgufParser::ReadShape(GgufTensor& tensor) {
  const uint32_t n_dims = Number<uint32_t>("a tensor's dimension count");
  if (n_dims < 1 || n_dims > kMaxDims) {
    Bad("tensor {} has {} dimensions, expected 1 to {}", Quoted(tensor.name), n_dims, kMaxDims);
  }
  tensor.n_dims = n_dims;
  tensor.ne.fill(1);
  uint64_t elements = 1;
  for (size_t i = 0; i < n_dims; ++i) {
    const uint64_t n = Number<uint64_t>("a tensor's dimensions");
    if (n == 0) Bad("dimension {} of tensor {} is 0", i, Quoted(tensor.name));
    if (__builtin_mul_overflow(elements, n, &elements) || elements > kMostElements) {
      Bad("the dimensions of tensor {} multiply to more than 2^60 elements", Quoted(tensor.name));
    }
    tensor.ne[i] = n;
  }
}

void GgufParser::ReadTensorType(GgufTensor& tensor) {
  const uint32_t type = Number<uint32_t>("a tensor type");
  const DTypeTraits* traits = FindDType(type);
  if (traits == nullptr) Bad("tensor {} has type {}; it cannot be read", Quoted(tensor.name), ForeignTypeName(type));
  tensor.type = static_cast<DType>(type);
  if (tensor.RowLength() % traits->block_elements != 0) {
    Bad("the row length {} of tensor {} is not a multiple of {}, the block of {}", tensor.RowLength(),
        Quoted(tensor.name), traits->block_elements, traits->name);
  }
}

void GgufParser::FindDataOffset() {
  file_.headers_ = {bytes_.first(position_)};
  // The position is inside the file and the alignment small, so that this cannot overflow.
  file_.data_offset_ = RoundUp(position_, file_.alignment_);
  const bool needs_data = !file_.tensors_.empty();
  if (needs_data && file_.data_offset_ > bytes_.size()) {
    Bad("the file ends before the tensor data: {} bytes, data expected at {}", bytes_.size(), file_.data_offset_);
  }
}

void GgufParser::PlaceTensors() {
  for (size_t i = 0; i < file_.tensors_.size(); ++i) {
    GgufTensor& tensor = file_.tensors_[i];
    const uint64_t offset = relative_offsets_[i], available = bytes_.size() - file_.data_offset_;
    if (offset % file_.alignment_ != 0) {
      Bad("tensor {} lies at offset {}, which is not a multiple of the alignment {}", Quoted(tensor.name), offset,
          file_.alignment_);
    }
    const DTypeTraits& traits = Traits(tensor.type);
    const uint64_t size = tensor.Elements() / traits.block_elements * traits.block_bytes;
    if (offset > available || size > available - offset) {
      Bad("tensor {} ({} {}, {} bytes at data offset {}) lies beyond the file's end: {} data bytes",
          Quoted(tensor.name), traits.name, tensor.ShapeString(), size, offset, available);
    }
    tensor.file_offset = file_.data_offset_ + offset;
    tensor.data = bytes_.subspan(tensor.file_offset, size);
  }
}

void GgufParser::RefuseOverlap() const {
  std::vector<const GgufTensor*> order;
  for (const GgufTensor& tensor : file_.tensors_) order.push_back(&tensor);
  std::sort(order.begin(), order.end(),
            [](const GgufTensor* a, const GgufTensor* b) { return a->file_offset < b->file_offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i - 1]->file_offset + order[i - 1]->data.size() > order[i]->file_offset) {
      Bad("tensors {} and {} overlap", Quoted(order[i - 1]->name), Quoted(order[i]->name));
    }
  }
}

}  // namespace lesskv
