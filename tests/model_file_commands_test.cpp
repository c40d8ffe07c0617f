// lesskv info and lesskv quantize as a user calls them, on files made here.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/rng.h"
#include "format/gguf_writer.h"
#include "kernels/quants/quants.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;

struct Result {
  int status;
  std::string out, err;
};

class ModelFileCommands : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("lesskv_model_files_{}", ::getpid());
    fs::create_directories(folder_);
    WriteModel("in.gguf");
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Path(std::string_view name) const { return (folder_ / name).string(); }

  static std::string Read(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  Result Run(const std::string& arguments) const {
    const std::string command =
        fmt::format(">'{}' 2>'{}' '{}' {}", Path("out"), Path("err"), LESSKV_PROGRAM, arguments);
    const int status = std::system(command.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, Read(Path("out")), Read(Path("err"))};
  }

  Result Quantize(std::string_view in, std::string_view out, std::string_view type) const {
    return Run(fmt::format("quantize '{}' '{}' {}", Path(in), Path(out), type));
  }

  // A matrix that fits every block, one that fits only small blocks, one that fits none, a vector, integers.
  void WriteModel(std::string_view name, float odd_value = 1.0f) {
    Rng rng(17);
    std::vector<float> values(512 * 3);
    for (float& value : values) value = rng.Normal();
    values[700] = odd_value;
    const std::vector<int32_t> ids = {5, 6, 7, 8};
    const auto matrix = std::span<const float>(values);
    GgufWriter writer;
    writer.Add("general.architecture", "llama");
    writer.Add("general.name", "evil \x1b[2J name");
    writer.Add("general.file_type", 0u);
    writer.AddArray("tokenizer.ggml.tokens", std::vector<std::string>{"a", "b"});
    writer.Add("tokenizer.ggml.model", "gpt2");
    writer.AddTensor("fits", {512, 3}, matrix);
    writer.AddTensor("small", {32, 2}, matrix.first(64));
    writer.AddTensor("odd", {7, 3}, matrix.first(21));
    writer.AddTensor("vector", {256}, matrix.first(256));
    writer.AddTensor("ids", DType::kI32, {4}, std::as_bytes(std::span(ids)));
    writer.Write(Path(name));
  }

  static std::vector<float> Values(const GgufTensor& tensor) {
    std::vector<float> values(tensor.Elements());
    const size_t row_bytes = RowBytes(tensor.type, tensor.RowLength());
    for (size_t r = 0; r < tensor.Rows(); ++r) {
      DequantizeRow(tensor.type, tensor.data.data() + r * row_bytes, tensor.RowLength(),
                    values.data() + r * tensor.RowLength());
    }
    return values;
  }

  fs::path folder_;
};

void ExpectContains(const std::string& text, const std::string& fragment) {
  EXPECT_NE(text.find(fragment), std::string::npos) << text;
}

TEST_F(ModelFileCommands, QuantizeGivesTheRowsOfTheReference) {
  const GgufFile in = GgufFile::Open(Path("in.gguf"));
  const std::vector<float> original = Values(*in.FindTensor("fits"));
  for (const char* type : {"F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "iq4_nl", "q4_k", "Q5_K", "Q6_K"}) {
    const Result result = Quantize("in.gguf", "out.gguf", type);
    ASSERT_EQ(result.status, 0) << type << ": " << result.err;
    EXPECT_EQ(result.out, "");
    const GgufFile out = GgufFile::Open(Path("out.gguf"));
    const GgufTensor& fits = *out.FindTensor("fits");
    EXPECT_NE(fits.type, DType::kF32) << type;
    std::vector<std::byte> expected(fits.data.size());
    QuantizeRow(fits.type, original.data(), original.size(), expected.data());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), fits.data.begin())) << type;
    EXPECT_EQ(out.FindTensor("vector")->type, DType::kF32);
    EXPECT_EQ(Values(*out.FindTensor("vector")), Values(*in.FindTensor("vector")));
    EXPECT_EQ(out.FindTensor("ids")->type, DType::kI32);
    ExpectContains(result.err, "kept as F32: 1 one-dimensional tensors");
    if (Traits(fits.type).block_elements == 32) ExpectContains(result.err, "kept as F32: 1 matrices");
    if (Traits(fits.type).block_elements == 256) ExpectContains(result.err, "small (32), odd (7)");
  }
}

TEST_F(ModelFileCommands, QuantizeKeepsMetadataAndSetsTheFileType) {
  ASSERT_EQ(Quantize("in.gguf", "q.gguf", "Q4_K").status, 0);
  const GgufFile out = GgufFile::Open(Path("q.gguf"));
  EXPECT_EQ(out.Get<std::string>("general.architecture"), "llama");
  EXPECT_EQ(out.Strings("tokenizer.ggml.tokens").size(), 2u);
  EXPECT_EQ(out.Get<uint32_t>("general.file_type"), 14u);
  EXPECT_EQ(out.Get<uint32_t>("general.quantization_version"), 2u);
  ASSERT_EQ(Quantize("q.gguf", "back.gguf", "F32").status, 0);
  const GgufFile back = GgufFile::Open(Path("back.gguf"));
  EXPECT_EQ(back.Get<uint32_t>("general.file_type"), 0u);
  EXPECT_EQ(back.Find("general.quantization_version"), nullptr);
  EXPECT_EQ(Values(*back.FindTensor("fits")), Values(*out.FindTensor("fits")));
}

TEST_F(ModelFileCommands, QuantizeWarnsOfAddedErrors) {
  ASSERT_EQ(Quantize("in.gguf", "q4.gguf", "Q4_0").status, 0);
  const Result result = Quantize("q4.gguf", "q8.gguf", "Q8_0");
  EXPECT_EQ(result.status, 0);
  ExpectContains(result.err, "2 tensors were quantised before");
}

TEST_F(ModelFileCommands, QuantizeSaysWhatATypeCannotHold) {
  EXPECT_EQ(Quantize("in.gguf", "out.gguf", "Q5_1").err.find("cannot hold"), std::string::npos);
  EXPECT_EQ(Quantize("in.gguf", "out.gguf", "Q4_0").err.find("cannot hold"), std::string::npos);
  WriteModel("low.gguf", -1e5f);  // a minimum that half precision does not reach
  const Result result = Quantize("low.gguf", "out.gguf", "Q5_1");
  EXPECT_EQ(result.status, 0);
  ExpectContains(result.err, "Q5_1 cannot hold 1 row");
  ExpectContains(result.err, "row 1 of tensor 'fits' (34 %)");
  EXPECT_EQ(Quantize("low.gguf", "out.gguf", "BF16").err.find("cannot hold"), std::string::npos);
}

// Minima between half precision's least and a little below: a sixth of the values is lost where a thirtieth is usual.
TEST_F(ModelFileCommands, QuantizeSaysWhatIsMuchForTheType) {
  const auto write = [&](float largest) {
    Rng rng(5);
    std::vector<float> values(512 * 2);
    for (float& value : values) value = largest * static_cast<float>(2 * rng.Uniform() - 1);
    GgufWriter writer;
    writer.Add("general.architecture", "llama");
    writer.AddTensor("wide", {512, 2}, std::span<const float>(values));
    writer.Write(Path("wide.gguf"));
  };
  write(1e5f);
  ExpectContains(Quantize("wide.gguf", "out.gguf", "Q5_1").err, "Q5_1 cannot hold 2 rows: the error is more than 12 %");
  write(6e4f);
  for (const char* type : {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0"})
    EXPECT_EQ(Quantize("wide.gguf", "out.gguf", type).err.find("cannot hold"), std::string::npos) << type;
}

TEST_F(ModelFileCommands, QuantizeRefusals) {
  const struct {
    std::string in, out, type, fragment;
    int status;
  } kCases[] = {
      {"absent.gguf", "o.gguf", "Q8_0", "No such file", 2},
      {"in.gguf", "in.gguf", "Q8_0", "are the same file", 2},
      {"in.gguf", "./in.gguf", "Q8_0", "are the same file", 2},
      {"in.gguf", "o.gguf", "Q9", "unknown type 'Q9', expected one of F32, F16", 2},
      {"in.gguf", "absent_folder/o.gguf", "Q8_0", "there is no folder", 2},
      {"infinite.gguf", "o.gguf", "Q8_0", "row 1 of tensor 'fits' holds a value that is not finite", 2},
      {"nan.gguf", "o.gguf", "BF16", "row 1 of tensor 'fits' holds a value that is not finite", 2},
      {"large.gguf", "o.gguf", "F16", "holds 70000, more than F16 can", 2},
      {"misfit.gguf", "o.gguf", "Q6_K", "only matrices whose row length is not a multiple of 256", 2},
  };
  WriteModel("infinite.gguf", -std::numeric_limits<float>::infinity());
  WriteModel("nan.gguf", std::numeric_limits<float>::quiet_NaN());
  WriteModel("large.gguf", 70000);
  GgufWriter misfit;
  const std::vector<float> values(64, 1.0f);
  misfit.AddTensor("matrix", {32, 2}, values);
  misfit.Write(Path("misfit.gguf"));
  const std::string before = Read(Path("in.gguf"));
  for (const auto& test : kCases) {
    const Result result = Quantize(test.in, test.out, test.type);
    EXPECT_EQ(result.status, test.status) << result.err;
    ExpectContains(result.err, test.fragment);
    EXPECT_FALSE(fs::exists(Path("o.gguf"))) << test.fragment;
  }
  EXPECT_EQ(Read(Path("in.gguf")), before);
  EXPECT_EQ(Quantize("large.gguf", "o.gguf", "BF16").status, 0);
}

TEST_F(ModelFileCommands, QuantizeJoinsASplitModel) {
  const std::vector<float> values(256, 0.5f);
  for (uint16_t part = 0; part < 2; ++part) {
    GgufWriter writer;
    if (part == 0) writer.Add("general.architecture", "llama");
    writer.Add("split.no", part);
    writer.Add("split.count", uint16_t{2});
    writer.Add("split.tensors.count", int32_t{2});
    writer.AddTensor(part == 0 ? "first" : "second", {128, 2}, values);
    writer.Write(Path(fmt::format("m-{:05}-of-00002.gguf", part + 1)));
  }
  const Result result = Quantize("m-00001-of-00002.gguf", "joined.gguf", "Q8_0");
  ASSERT_EQ(result.status, 0) << result.err;
  const GgufFile joined = GgufFile::Open(Path("joined.gguf"));
  EXPECT_EQ(joined.n_parts(), 1u);
  EXPECT_EQ(joined.Find("split.count"), nullptr);
  ASSERT_NE(joined.FindTensor("second"), nullptr);
  EXPECT_NEAR(Values(*joined.FindTensor("second"))[255], 0.5f, 1e-3f);
  const Result same = Quantize("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "Q8_0");
  EXPECT_EQ(same.status, 2);
  ExpectContains(same.err, "are the same file");
  ExpectContains(Run(fmt::format("info '{}'", Path("m-00001-of-00002.gguf"))).out, " in 2 parts, GGUF version 3");
}

TEST_F(ModelFileCommands, InfoDescribesTheFile) {
  const Result text = Run(fmt::format("info -v '{}'", Path("in.gguf")));
  EXPECT_EQ(text.status, 0) << text.err;
  ExpectContains(text.out, "architecture  llama\n");
  ExpectContains(text.out, "1,881 in 5 tensors");
  ExpectContains(text.out, "gpt2 (byte-level BPE), 2 tokens");
  ExpectContains(text.out, "evil \\x1b[2J name");
  ExpectContains(text.out, "[512, 3]");
  EXPECT_EQ(text.out.find('\x1b'), std::string::npos);
}

TEST_F(ModelFileCommands, InfoNamesEveryType) {
  GgufWriter writer;
  const std::vector<std::byte> zeros(8 * 256);
  std::vector<std::string> names;
  for (uint32_t number = 0; number < 64; ++number) {
    const DTypeTraits* traits = FindDType(number);
    if (traits == nullptr) continue;
    const DType type = static_cast<DType>(number);
    names.emplace_back(traits->name);
    writer.AddTensor(names.back(), type, {256}, std::span(zeros).first(RowBytes(type, 256)));
  }
  writer.Write(Path("types.gguf"));
  ASSERT_EQ(names.size(), 20u);
  const Result text = Run(fmt::format("info '{}'", Path("types.gguf")));
  EXPECT_EQ(text.status, 0) << text.err;
  for (const std::string& name : names) ExpectContains(text.out, fmt::format(" {:<6} {:>14} in 1 tensors", name, 256));
}

TEST_F(ModelFileCommands, InfoAsJson) {
  const Result result = Run(fmt::format("info --json --tensors '{}'", Path("in.gguf")));
  ASSERT_EQ(result.status, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["architecture"], "llama");
  EXPECT_EQ(json["parameters"], 1881);
  EXPECT_EQ(json["types"]["I32"]["bytes"], 16);
  EXPECT_EQ(json["metadata"]["general.file_type"], 0);
  EXPECT_EQ(json["metadata"]["tokenizer.ggml.tokens"], (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(json["tensors"][0]["shape"], (std::vector<int>{512, 3}));
  EXPECT_EQ(json["fingerprint"], FingerprintString(GgufFile::Open(Path("in.gguf")).Fingerprint()));
}

TEST_F(ModelFileCommands, InfoRefusesWhatIsNoModel) {
  std::ofstream(Path("text.gguf")) << "Once upon a time";
  const Result text = Run(fmt::format("info '{}'", Path("text.gguf")));
  EXPECT_EQ(text.status, 2);
  EXPECT_EQ(text.out, "");
  ExpectContains(text.err, "not a GGUF file: it starts with 'Once'");
  EXPECT_EQ(Run(fmt::format("info '{}'", Path("absent.gguf"))).status, 2);
  EXPECT_EQ(Run("info").status, 2);
  const Result full = Run(fmt::format("info '{}' >/dev/full", Path("in.gguf")));
  EXPECT_EQ(full.status, 1);
}

}  // namespace
}  // namespace lesskv
