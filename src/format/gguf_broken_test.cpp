// Damaged and hostile GGUF files: each is refused with a sentence that names the trouble, and none crashes the reader.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <optional>

#include "base/rng.h"
#include "format/gguf.h"

namespace lesskv {
namespace {

class Bytes {
 public:
  template <typename T>
  Bytes& Number(T value) {
    const auto* begin = reinterpret_cast<const std::byte*>(&value);
    data.insert(data.end(), begin, begin + sizeof value);
    return *this;
  }
  Bytes& U32(uint32_t value) { return Number(value); }
  Bytes& U64(uint64_t value) { return Number(value); }
  Bytes& Text(std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text));
    data.insert(data.end(), bytes.begin(), bytes.end());
    return *this;
  }
  Bytes& String(std::string_view text) { return U64(text.size()).Text(text); }
  Bytes& Append(const Bytes& other) {
    data.insert(data.end(), other.data.begin(), other.data.end());
    return *this;
  }

  std::vector<std::byte> data;
};

Bytes Pair(std::string_view key, uint32_t type, const Bytes& value) {
  return Bytes().String(key).U32(type).Append(value);
}

struct TensorRecord {
  std::string name = "tensor";
  uint32_t n_dims = 2;
  std::vector<uint64_t> ne = {32, 2};
  uint32_t type = 0;
  uint64_t offset = 0;

  Bytes Encode() const {
    Bytes bytes;
    bytes.String(name).U32(n_dims);
    for (const uint64_t n : ne) bytes.U64(n);
    return bytes.U32(type).U64(offset);
  }
};

// A small sound file, taken apart so that a case can damage one piece.
struct Recipe {
  std::string magic = "GGUF";
  uint32_t version = 3;
  std::optional<uint64_t> n_tensors, n_pairs;  // instead of the true counts
  std::vector<Bytes> pairs = {
      Pair("general.architecture", 8, Bytes().String("llama")),
      Pair("tokens", 9, Bytes().U32(8).U64(2).String("a").String("bc")),
      Pair("flags", 9, Bytes().U32(7).U64(2).Number<uint8_t>(0).Number<uint8_t>(1)),
      Pair("count", 4, Bytes().U32(7)),
  };
  std::vector<TensorRecord> tensors = {{}, {.name = "second", .n_dims = 1, .ne = {64}, .type = 8, .offset = 256}};
  size_t alignment = 32;
  size_t data_bytes = 256 + 68;

  std::vector<std::byte> Build() const {
    Bytes bytes;
    bytes.Text(magic).U32(version).U64(n_tensors.value_or(tensors.size())).U64(n_pairs.value_or(pairs.size()));
    for (const Bytes& pair : pairs) bytes.Append(pair);
    for (const TensorRecord& tensor : tensors) bytes.Append(tensor.Encode());
    bytes.data.resize((bytes.data.size() + alignment - 1) / alignment * alignment + data_bytes);
    return bytes.data;
  }
};

struct BrokenFile {
  const char* name;
  const char* fragment;  // of the expected message
  std::function<void(Recipe&)> damage;
};

constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();

const std::vector<BrokenFile>& BrokenFiles() {
  static const std::vector<BrokenFile> files = {
      {"text_file", "not a GGUF file: it starts with 'Once'", [](Recipe& r) { r.magic = "Once upon a time"; }},
      {"other_magic", "expected 'GGUF'", [](Recipe& r) { r.magic = "ggjt"; }},
      {"unprintable_magic", "starts with '\\x00\\x01\\xff\\x7f'",
       [](Recipe& r) { r.magic = std::string("\0\1\xff\x7f", 4); }},
      {"version_0", "version 0 is not supported", [](Recipe& r) { r.version = 0; }},
      {"version_1", "version 1 is not supported", [](Recipe& r) { r.version = 1; }},
      {"version_4", "version 4 is not supported", [](Recipe& r) { r.version = 4; }},
      {"big_endian", "big-endian", [](Recipe& r) { r.version = 3u << 24; }},
      {"tensor_count_huge", "tensor count 18446744073709551615 is more", [](Recipe& r) { r.n_tensors = kHuge; }},
      {"tensor_count_large", "tensor count 1000 is more", [](Recipe& r) { r.n_tensors = 1000; }},
      {"metadata_count_huge", "metadata count 18446744073709551615 is more", [](Recipe& r) { r.n_pairs = kHuge; }},
      {"metadata_count_plus_one", "ends inside a tensor name", [](Recipe& r) { r.n_pairs = 5; }},
      {"tensor_count_plus_one", "has 0 bytes", [](Recipe& r) { r.n_tensors = 3; }},
      {"metadata_count_minus_one", "the name of tensor 0",
       [](Recipe& r) {
         r.pairs.push_back(Pair("", 0, Bytes()));
         r.n_pairs = 4;
       }},
      {"key_length_huge", "ends inside a metadata key", [](Recipe& r) { r.pairs[3] = Bytes().U64(kHuge).Text("abc"); }},
      {"key_empty", "metadata key 3 has 0 bytes", [](Recipe& r) { r.pairs[3] = Pair("", 4, Bytes().U32(7)); }},
      {"key_too_long", "metadata key 3 has 65536 bytes",
       [](Recipe& r) { r.pairs[3] = Pair(std::string(65536, 'k'), 4, Bytes().U32(7)); }},
      {"key_twice", "metadata key 'count' occurs twice", [](Recipe& r) { r.pairs.push_back(r.pairs[3]); }},
      {"value_type_unknown", "metadata 'x' has unknown type 13",
       [](Recipe& r) { r.pairs[3] = Pair("x", 13, Bytes().U32(7)); }},
      {"value_type_huge", "has unknown type 4294967295",
       [](Recipe& r) { r.pairs[3] = Pair("x", 0xffffffff, Bytes().U32(7)); }},
      {"string_length_huge", "ends inside a metadata string",
       [](Recipe& r) { r.pairs[3] = Pair("x", 8, Bytes().U64(kHuge)); }},
      {"string_length_beyond_the_end", "ends inside a metadata string: 100000 bytes expected",
       [](Recipe& r) { r.pairs[3] = Pair("x", 8, Bytes().U64(100000)); }},
      {"bool_of_two", "holds the bool 2", [](Recipe& r) { r.pairs[3] = Pair("x", 7, Bytes().Number<uint8_t>(2)); }},
      {"bool_array_of_two", "metadata 'x' holds the bool 255",
       [](Recipe& r) { r.pairs[3] = Pair("x", 9, Bytes().U32(7).U64(1).Number<uint8_t>(255)); }},
      {"array_of_arrays", "metadata 'x' is an array of arrays",
       [](Recipe& r) { r.pairs[3] = Pair("x", 9, Bytes().U32(9).U64(1).U32(4).U64(1).U32(7)); }},
      {"array_of_unknown", "metadata 'x' has unknown type 99",
       [](Recipe& r) { r.pairs[3] = Pair("x", 9, Bytes().U32(99).U64(1).U32(7)); }},
      {"array_length_huge", "'x' claims 18446744073709551615 elements",
       [](Recipe& r) { r.pairs[3] = Pair("x", 9, Bytes().U32(4).U64(kHuge)); }},
      {"array_bytes_wrap_to_zero", "'x' claims 2305843009213693952 elements",
       [](Recipe& r) { r.pairs[3] = Pair("x", 9, Bytes().U32(10).U64(uint64_t{1} << 61)); }},
      {"string_array_length_huge", "'x' claims 4611686018427387904 elements",
       [](Recipe& r) { r.pairs[3] = Pair("x", 9, Bytes().U32(8).U64(uint64_t{1} << 62)); }},
      {"string_array_inner_length_huge", "ends inside a metadata string",
       [](Recipe& r) { r.pairs[1] = Pair("tokens", 9, Bytes().U32(8).U64(2).U64(kHuge).String("bc")); }},
      {"alignment_0", "general.alignment is 0",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 4, Bytes().U32(0)); }},
      {"alignment_48", "general.alignment is 48, expected a power of two",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 4, Bytes().U32(48)); }},
      {"alignment_4", "general.alignment is 4",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 4, Bytes().U32(4)); }},
      {"alignment_huge", "general.alignment is 2147483648",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 4, Bytes().U32(1u << 31)); }},
      {"alignment_of_wrong_type", "'general.alignment' is of type string",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 8, Bytes().String("32")); }},
      {"alignment_negative", "'general.alignment' is of type i32 -32",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 5, Bytes().Number<int32_t>(-32)); }},
      {"alignment_pushes_data_out", "ends before the tensor data",
       [](Recipe& r) { r.pairs[3] = Pair("general.alignment", 4, Bytes().U32(1 << 20)); }},
      {"split_model", "one of 3 files of a split model",
       [](Recipe& r) { r.pairs[3] = Pair("split.count", 2, Bytes().Number<uint16_t>(3)); }},
      {"split_count_negative", "'split.count' is of type i16",
       [](Recipe& r) { r.pairs[3] = Pair("split.count", 3, Bytes().Number<int16_t>(-1)); }},
      {"tensor_name_empty", "the name of tensor 1 has 0 bytes", [](Recipe& r) { r.tensors[1].name = ""; }},
      {"tensor_name_too_long", "the name of tensor 1 has 65 bytes",
       [](Recipe& r) { r.tensors[1].name = std::string(65, 'n'); }},
      {"tensor_name_twice", "tensor 'tensor' occurs twice", [](Recipe& r) { r.tensors[1].name = "tensor"; }},
      {"no_dimensions", "'tensor' has 0 dimensions",
       [](Recipe& r) {
         r.tensors[0].n_dims = 0;
         r.tensors[0].ne.clear();
       }},
      {"five_dimensions", "'tensor' has 5 dimensions",
       [](Recipe& r) {
         r.tensors[0].n_dims = 5;
         r.tensors[0].ne = {32, 1, 1, 1, 1};
       }},
      {"dimension_count_huge", "'tensor' has 4294967295 dimensions",
       [](Recipe& r) { r.tensors[0].n_dims = 0xffffffff; }},
      {"dimension_0", "dimension 1 of tensor 'tensor' is 0", [](Recipe& r) { r.tensors[0].ne[1] = 0; }},
      {"dimensions_overflow", "'tensor' multiply to more than 2^60",
       [](Recipe& r) {
         r.tensors[0].ne = {uint64_t{1} << 32, uint64_t{1} << 32};
       }},
      {"dimension_huge", "'tensor' multiply to more than 2^60",
       [](Recipe& r) {
         r.tensors[0].ne = {kHuge, 1};
       }},
      {"size_overflows", "'tensor' multiply to more than 2^60",
       [](Recipe& r) {
         r.tensors[0].ne = {uint64_t{1} << 62, 1};
       }},
      {"row_is_not_whole_blocks", "row length 48 of tensor 'second' is not a multiple of 32, the block of Q8_0",
       [](Recipe& r) { r.tensors[1].ne = {48}; }},
      {"type_removed", "'second' has type Q4_2 (4); it cannot be read", [](Recipe& r) { r.tensors[1].type = 4; }},
      {"type_foreign", "'second' has type IQ2_XXS (16); it", [](Recipe& r) { r.tensors[1].type = 16; }},
      {"type_ternary", "'second' has type TQ1_0 (34); it", [](Recipe& r) { r.tensors[1].type = 34; }},
      {"type_nvfp4", "'second' has type NVFP4 (40); it", [](Recipe& r) { r.tensors[1].type = 40; }},
      {"type_next", "'second' has type 43, which is not a known type", [](Recipe& r) { r.tensors[1].type = 43; }},
      {"type_huge", "'second' has type 4294967295", [](Recipe& r) { r.tensors[1].type = 0xffffffff; }},
      {"offset_unaligned", "'second' lies at offset 264, which is not a multiple of the alignment 32",
       [](Recipe& r) { r.tensors[1].offset = 264; }},
      {"offset_beyond_the_end", "'second' (Q8_0 [64], 68 bytes at data offset 32000) lies beyond the file's end",
       [](Recipe& r) { r.tensors[1].offset = 32000; }},
      {"offset_wraps", "lies beyond the file's end", [](Recipe& r) { r.tensors[1].offset = kHuge - 31; }},
      {"tensor_one_byte_too_long", "'second' (Q8_0 [64], 68 bytes at data offset 256) lies beyond the file's end: 323",
       [](Recipe& r) { r.data_bytes -= 1; }},
      {"tensors_overlap", "tensors 'tensor' and 'second' overlap", [](Recipe& r) { r.tensors[1].offset = 224; }},
      {"tensors_in_one_place", "overlap", [](Recipe& r) { r.tensors[1].offset = 0; }},
  };
  return files;
}

std::string Refusal(std::vector<std::byte> bytes) {
  try {
    GgufFile::Parse(std::move(bytes), "broken.gguf");
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadFile);
    return error.what();
  }
  return "(accepted)";
}

// Reads everything a file offers, so that a sanitizer sees any view that leaves the bytes.
uint64_t Touch(const GgufFile& file) {
  uint64_t sum = file.Fingerprint();
  for (const auto& [key, value] : file.metadata()) {
    sum += key.size() + value.encoded().size();
    for (const std::string_view text : value.strings()) sum += std::hash<std::string_view>()(text);
    for (size_t i = 0; i < value.size(); ++i) sum += value.Element<bool>(i).value_or(value.Element<double>(i) > 0.0);
  }
  for (const GgufTensor& tensor : file.tensors()) {
    for (const std::byte b : tensor.data) sum += static_cast<uint64_t>(b);
    EXPECT_EQ(file.FindTensor(tensor.name), &tensor);
  }
  return sum;
}

class BrokenGguf : public ::testing::TestWithParam<BrokenFile> {};

TEST_P(BrokenGguf, IsRefusedWithASentence) {
  Recipe recipe;
  GetParam().damage(recipe);
  const std::string message = Refusal(recipe.Build());
  EXPECT_NE(message.find(GetParam().fragment), std::string::npos) << message;
  EXPECT_EQ(message.rfind("broken.gguf: ", 0), 0u) << message;
}

INSTANTIATE_TEST_SUITE_P(Table, BrokenGguf, ::testing::ValuesIn(BrokenFiles()),
                         [](const auto& test) { return test.param.name; });

TEST(GgufDamage, TheUndamagedRecipeIsSound) {
  const GgufFile file = GgufFile::Parse(Recipe().Build(), "sound.gguf");
  EXPECT_EQ(file.tensors().size(), 2u);
  EXPECT_EQ(file.Get<int>("count"), 7);
  Recipe version2;
  version2.version = 2;
  EXPECT_EQ(GgufFile::Parse(version2.Build(), "v2").version(), 2u);
  Recipe longest;  // names
  longest.pairs[3] = Pair(std::string(65535, 'k'), 4, Bytes().U32(7));
  longest.tensors[1].name = std::string(64, 'n');
  EXPECT_EQ(GgufFile::Parse(longest.Build(), "longest").tensors()[1].name.size(), 64u);
  Recipe joined;
  joined.pairs[3] = Pair("split.count", 2, Bytes().Number<uint16_t>(0));  // what joining the parts leaves
  EXPECT_EQ(GgufFile::Parse(joined.Build(), "joined").n_parts(), 1u);
  Recipe shortest;  // pairs and nothing else
  shortest.pairs = {Pair("k", 0, Bytes().Number<uint8_t>(7))};
  shortest.tensors.clear();
  shortest.alignment = 1;
  shortest.data_bytes = 0;
  EXPECT_EQ(GgufFile::Parse(shortest.Build(), "shortest").Get<int>("k"), 7);
  Recipe aligned;
  aligned.pairs[3] = Pair("general.alignment", 4, Bytes().U32(64));
  aligned.alignment = 64;
  EXPECT_EQ(GgufFile::Parse(aligned.Build(), "aligned").data_offset() % 64, 0u);
}

TEST(GgufDamage, AFileWithoutTensorsNeedsNoPadding) {
  Recipe vocabulary;
  vocabulary.tensors.clear();
  vocabulary.alignment = 1;
  vocabulary.data_bytes = 0;
  EXPECT_TRUE(GgufFile::Parse(vocabulary.Build(), "vocabulary").tensors().empty());
}

TEST(GgufDamage, TruncationAnywhereIsRefused) {
  const std::vector<std::byte> whole = Recipe().Build();
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string message = Refusal({whole.begin(), whole.begin() + static_cast<ptrdiff_t>(n)});
    EXPECT_NE(message, "(accepted)") << "at " << n << " of " << whole.size() << " bytes";
  }
}

TEST(GgufDamage, RandomDamageNeverCrashes) {
  const std::vector<std::byte> whole = Recipe().Build();
  Rng rng(20240601);
  int accepted = 0;
  for (int round = 0; round < 6000; ++round) {
    std::vector<std::byte> damaged = whole;
    for (uint64_t n = 1 + rng.Below(4); n > 0; --n) {
      // Half of the rounds replace a byte, half flip one bit: small lies pass more checks.
      std::byte& target = damaged[rng.Below(damaged.size() - 324)];
      target =
          round % 2 == 0 ? static_cast<std::byte>(rng.Below(256)) : target ^ static_cast<std::byte>(1u << rng.Below(8));
    }
    try {
      Touch(GgufFile::Parse(std::move(damaged), "damaged"));
      ++accepted;
    } catch (const Error&) {
    }
  }
  // Damage inside names and strings is legal; if nothing were accepted, the views above would never be read.
  EXPECT_GT(accepted, 100);
  EXPECT_LT(accepted, 5900);
}

}  // namespace
}  // namespace lesskv
