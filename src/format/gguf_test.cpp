#include "format/gguf.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>

#include "format/gguf_writer.h"

namespace lesskv {
namespace {

std::string Shared(const std::string& path) {
  const char* folder = std::getenv("LESSKV_SHARED_DIR");
  return (folder != nullptr ? std::string(folder) : LESSKV_SOURCE_DIR "/../shared") + "/" + path;
}

const std::vector<float> kMatrix = {1, 2, 3, 4, 5, 6};
const std::vector<float> kVector = {7, 8, 9, 10};

// One value of every type there is, and two tensors.
GgufWriter EverythingWriter() {
  GgufWriter writer;
  writer.Add("general.architecture", "llama");
  writer.Add("u8", uint8_t{255});
  writer.Add("i8", int8_t{-128});
  writer.Add("u16", uint16_t{65535});
  writer.Add("i16", int16_t{-32768});
  writer.Add("u32", uint32_t{4000000000});
  writer.Add("i32", int32_t{-2000000000});
  writer.Add("u64", ~uint64_t{0});
  writer.Add("i64", std::numeric_limits<int64_t>::min());
  writer.Add("f32", 1.5f);
  writer.Add("f64", 0.1);
  writer.Add("yes", true);
  writer.Add("no", false);
  writer.AddArray("ints", std::vector<int32_t>{1, -2, 3});
  writer.AddArray("floats", std::vector<float>{0.5f, -0.25f});
  writer.AddArray("tokens", std::vector<std::string>{"a", "", std::string("\0b\xff", 3)});
  writer.AddBools("bools", {true, false, true});
  writer.AddArray("empty", std::vector<uint64_t>{});
  writer.AddTensor("matrix", {3, 2}, kMatrix);
  writer.AddTensor("vector", {4}, kVector);
  return writer;
}

std::vector<std::byte> Everything() { return EverythingWriter().Serialize(); }

std::string MessageOf(const std::function<void()>& action, ErrorCode* code = nullptr) {
  try {
    action();
  } catch (const Error& error) {
    if (code != nullptr) *code = error.code();
    return error.what();
  }
  return "(no error)";
}

TEST(Gguf, EveryMetadataTypeReturns) {
  const GgufFile file = GgufFile::Parse(Everything(), "memory");
  EXPECT_EQ(file.version(), 3u);
  EXPECT_EQ(file.metadata().size(), 18u);
  EXPECT_EQ(file.metadata()[1].first, "u8");
  EXPECT_EQ(file.Get<std::string>("general.architecture"), "llama");
  EXPECT_EQ(file.Get<uint8_t>("u8"), 255);
  EXPECT_EQ(file.Get<int8_t>("i8"), -128);
  EXPECT_EQ(file.Get<uint16_t>("u16"), 65535);
  EXPECT_EQ(file.Get<int16_t>("i16"), -32768);
  EXPECT_EQ(file.Get<uint32_t>("u32"), 4000000000u);
  EXPECT_EQ(file.Get<int32_t>("i32"), -2000000000);
  EXPECT_EQ(file.Get<uint64_t>("u64"), ~uint64_t{0});
  EXPECT_EQ(file.Get<int64_t>("i64"), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(file.Get<float>("f32"), 1.5f);
  EXPECT_EQ(file.Get<double>("f64"), 0.1);
  EXPECT_TRUE(file.Get<bool>("yes"));
  EXPECT_FALSE(file.Get<bool>("no"));
  EXPECT_EQ(file.Get<std::vector<int64_t>>("ints"), (std::vector<int64_t>{1, -2, 3}));
  EXPECT_EQ(file.Get<std::vector<float>>("floats"), (std::vector<float>{0.5f, -0.25f}));
  EXPECT_EQ(file.Get<std::vector<bool>>("bools"), (std::vector<bool>{true, false, true}));
  EXPECT_TRUE(file.Get<std::vector<size_t>>("empty").empty());
  GgufWriter arrays;  // of several elements, whose places follow from their sizes
  arrays.AddArray("u8", std::vector<uint8_t>{1, 255});
  arrays.AddArray("i8", std::vector<int8_t>{1, -128});
  arrays.AddArray("u16", std::vector<uint16_t>{1, 65535});
  arrays.AddArray("i16", std::vector<int16_t>{1, -32768});
  arrays.AddArray("u32", std::vector<uint32_t>{1, 4000000000});
  arrays.AddArray("u64", std::vector<uint64_t>{1, 1u << 31});
  arrays.AddArray("i64", std::vector<int64_t>{1, -5000000000});
  arrays.AddArray("f64", std::vector<double>{1, 0.1});
  const GgufFile several = GgufFile::Parse(arrays.Serialize(), "memory");
  const auto second = [&](const char* key) { return several.Get<std::vector<double>>(key).at(1); };
  const std::pair<const char*, double> expected[] = {{"u8", 255}, {"i8", -128}, {"u16", 65535}, {"i16", -32768},
                                                     {"u32", 4e9}, {"u64", 1u << 31}, {"i64", -5e9}, {"f64", 0.1}};
  for (const auto& [key, value] : expected) EXPECT_EQ(second(key), value) << key;
  const auto tokens = file.Strings("tokens");
  ASSERT_EQ(tokens.size(), 3u);
  EXPECT_EQ(tokens[1], "");
  EXPECT_EQ(tokens[2], std::string_view("\0b\xff", 3));
  EXPECT_EQ(file.Get<std::vector<std::string>>("tokens")[0], "a");
}

TEST(Gguf, TensorsReturnWithShapeAndData) {
  const GgufFile file = GgufFile::Parse(Everything(), "memory");
  ASSERT_EQ(file.tensors().size(), 2u);
  const GgufTensor* matrix = file.FindTensor("matrix");
  ASSERT_NE(matrix, nullptr);
  EXPECT_EQ(matrix->type, DType::kF32);
  EXPECT_EQ(matrix->ShapeString(), "[3, 2]");
  EXPECT_EQ(matrix->RowLength(), 3u);
  EXPECT_EQ(matrix->Rows(), 2u);
  EXPECT_EQ(matrix->Elements(), 6u);
  ASSERT_EQ(matrix->data.size(), 24u);
  EXPECT_EQ(std::memcmp(matrix->data.data(), kMatrix.data(), 24), 0);
  const GgufTensor* vector = file.FindTensor("vector");
  ASSERT_NE(vector, nullptr);
  EXPECT_EQ(vector->file_offset, file.data_offset() + 32);
  EXPECT_EQ(std::memcmp(vector->data.data(), kVector.data(), 16), 0);
  EXPECT_EQ(file.FindTensor("other"), nullptr);
}

TEST(Gguf, IntegersWidenAndNarrowOnlyWhenTheValueFits) {
  const GgufFile file = GgufFile::Parse(Everything(), "memory");
  EXPECT_EQ(file.Get<int64_t>("u32"), 4000000000);
  EXPECT_EQ(file.Get<uint8_t>("u8"), 255);
  EXPECT_EQ(file.Get<int16_t>("i8"), -128);
  EXPECT_THROW(file.Get<int8_t>("u8"), Error);
  EXPECT_THROW(file.Get<int32_t>("u32"), Error);
  EXPECT_THROW(file.Get<uint64_t>("i32"), Error);
}

TEST(Gguf, WrongTypesAreNamed) {
  const GgufFile file = GgufFile::Parse(Everything(), "m.gguf");
  ErrorCode code{};
  EXPECT_EQ(MessageOf([&] { file.Get<int>("absent"); }, &code), "m.gguf has no metadata key 'absent'");
  EXPECT_EQ(code, ErrorCode::kNotFound);
  EXPECT_EQ(MessageOf([&] { file.Get<uint8_t>("i8"); }, &code),
            "m.gguf: metadata 'i8' is of type i8 -128, expected integer in [0, 255]");
  EXPECT_EQ(code, ErrorCode::kBadFile);
  EXPECT_NE(MessageOf([&] { file.Get<int64_t>("u64"); }).find("expected integer in"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<int>("f32"); }).find("type f32 1.5, expected integer"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<int>("yes"); }).find("type bool"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<bool>("u8"); }).find("expected bool"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<int>("ints"); }).find("array of i32, expected integer"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<std::vector<int>>("i32"); }).find("expected array of integer"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<std::vector<uint32_t>>("ints"); }).find("expected array of"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Get<std::string>("u8"); }).find("expected string"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.Strings("ints"); }).find("expected array of string"), std::string::npos);
  EXPECT_NE(MessageOf([&] { file.GetOr<int>("f32", 3); }).find("expected integer"), std::string::npos);
  EXPECT_EQ(file.GetOr<int>("absent", 3), 3);
  EXPECT_EQ(file.Get<float>("u8"), 255.0f);
}

TEST(Gguf, CopyingMetadataAndTensorsGivesTheSameBytes) {
  const std::vector<std::byte> bytes = Everything();
  const GgufFile file = GgufFile::Parse(bytes, "memory");
  GgufWriter writer;
  for (const auto& [key, value] : file.metadata()) writer.Add(key, value);
  for (const GgufTensor& tensor : file.tensors()) {
    writer.AddTensor(tensor.name, tensor.type, std::span(tensor.ne).first(tensor.n_dims), tensor.data);
  }
  EXPECT_EQ(writer.Serialize(), bytes);
}

TEST(Gguf, OpenedFileEqualsParsedBytes) {
  const auto path = std::filesystem::temp_directory_path() / fmt::format("lesskv_gguf_test_{}.gguf", ::getpid());
  EverythingWriter().Write(path.string());
  const GgufFile opened = GgufFile::Open(path.string());
  const GgufFile parsed = GgufFile::Parse(Everything(), "memory");
  std::filesystem::remove(path);  // the mapping keeps the bytes
  EXPECT_EQ(opened.file_bytes(), Everything().size());
  EXPECT_EQ(opened.Fingerprint(), parsed.Fingerprint());
  EXPECT_EQ(opened.Get<std::string>("general.architecture"), "llama");
  const GgufFile copy = opened;
  EXPECT_EQ(copy.FindTensor("vector")->data.data(), opened.FindTensor("vector")->data.data());
}

TEST(Gguf, FingerprintSeesMetadataAndSampledBytesOnly) {
  const std::vector<float> big(8192, 1.0f);  // 32 KiB: its middle is not sampled
  const auto make = [&](const std::vector<float>& values, int32_t number) {
    GgufWriter writer;
    writer.Add("number", number);
    writer.AddTensor("big", {values.size()}, values);
    return GgufFile::Parse(writer.Serialize(), "memory").Fingerprint();
  };
  std::vector<float> first = big, middle = big, last = big;
  first.front() = middle[4096] = last.back() = 2.0f;
  EXPECT_EQ(make(big, 1), make(big, 1));
  EXPECT_NE(make(big, 1), make(big, 2));
  EXPECT_NE(make(big, 1), make(first, 1));
  EXPECT_NE(make(big, 1), make(last, 1));
  EXPECT_EQ(make(big, 1), make(middle, 1));
  EXPECT_EQ(FingerprintString(0xab), "00000000000000ab");
}

// The same model in another type and order of tensors, and what makes it another one.
TEST(Gguf, IdentityIsOfTheModelAndNotOfItsQuantisation) {
  struct Form {
    std::string architecture = "llama", token = "b";
    DType type = DType::kF32;
    size_t n_rows = 2;
    float norm = 1, weight = 1;
    bool norm_first = false;
  };
  const auto identity = [](const Form& form) {
    GgufWriter writer;
    writer.Add("general.architecture", form.architecture);
    writer.AddArray("tokenizer.ggml.tokens", std::vector<std::string>{"a", form.token});
    const std::vector<float> norm(4, form.norm), weights(32 * 4, form.weight);
    if (form.norm_first) writer.AddTensor("output_norm.weight", {4}, norm);
    writer.AddTensor("w.weight", form.type, std::vector<size_t>{32, form.n_rows},
                     std::as_bytes(std::span(weights)).first(RowBytes(form.type, 32) * form.n_rows));
    if (!form.norm_first) writer.AddTensor("output_norm.weight", {4}, norm);
    return GgufFile::Parse(writer.Serialize(), "memory").Identity();
  };
  const uint64_t own = identity({});
  EXPECT_EQ(identity({.type = DType::kQ8_0}), own);
  EXPECT_EQ(identity({.weight = 2}), own);
  EXPECT_EQ(identity({.norm_first = true}), own);
  EXPECT_NE(identity({.architecture = "qwen2"}), own);
  EXPECT_NE(identity({.token = "c"}), own);
  EXPECT_NE(identity({.n_rows = 3}), own);
  EXPECT_NE(identity({.norm = 2}), own);
}

TEST(GgufWriter, RefusesWhatTheReaderWould) {
  GgufWriter writer;
  writer.Add("key", 1);
  EXPECT_NE(MessageOf([&] { writer.Add("key", 2); }).find("added twice"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.Add("", 2); }).find("0 bytes"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.Add("general.alignment", 64u); }).find("fixed at 32"), std::string::npos);
  const std::vector<float> values(4, 0.0f);
  writer.AddTensor("t", {4}, values);
  EXPECT_NE(MessageOf([&] { writer.AddTensor("t", {4}, values); }).find("added twice"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.AddTensor("u", {5}, values); }).find("takes 20 bytes, 16"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.AddTensor("u", {4, 0}, values); }).find("is 0"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.AddTensor("u", {4, 1, 1, 1, 1}, values); }).find("5 dimensions"), std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.AddTensor("u", DType::kQ8_0, {33}, std::span<const std::byte>()); }).find("block"),
            std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.AddTensor(std::string(65, 'n'), {4}, values); }).find("65 bytes"),
            std::string::npos);
  EXPECT_NE(MessageOf([&] { writer.Write("/nonexistent/folder/out.gguf"); }).find("cannot write"), std::string::npos);
}

TEST(Gguf, ReadsARealModel) {
  const std::string path = Shared("data/models/stories260Ktok512.gguf");
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is absent";
  const GgufFile file = GgufFile::Open(path);
  EXPECT_EQ(file.Get<std::string>("general.architecture"), "llama");
  EXPECT_EQ(file.Strings("tokenizer.ggml.tokens").size(), 512u);
  EXPECT_EQ(file.Get<uint32_t>("llama.embedding_length"), 64u);
  ASSERT_NE(file.FindTensor("token_embd.weight"), nullptr);
  EXPECT_EQ(file.FindTensor("token_embd.weight")->ShapeString(), "[64, 512]");
}

}  // namespace
}  // namespace lesskv
