// Models in several files: all parts are read as one, and every way in which they can fail to be one is a sentence.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <optional>

#include "format/gguf.h"
#include "format/gguf_writer.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;

// What a test can change before the parts are written.
struct Part {
  uint16_t no, count = 3;
  int32_t n_tensors = 4;
  std::map<std::string, std::string> texts = {};
  std::map<std::string, std::vector<float>> tensors = {};
};

class GgufSplit : public ::testing::Test {
 protected:
  GgufSplit() : folder_(fs::temp_directory_path() / fmt::format("lesskv_split_{}", ::getpid())) {
    fs::create_directories(folder_);
    parts_ = {{.no = 0, .texts = {{"general.architecture", "llama"}}, .tensors = {{"a", {1, 2}}, {"b", {3}}}},
              {.no = 1, .tensors = {{"c", {4, 5, 6}}}},
              {.no = 2, .tensors = {{"d", {7}}}}};
  }
  ~GgufSplit() override { fs::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }
  std::string PartPath(size_t i) const { return Path(fmt::format("model-{:05}-of-00003.gguf", i + 1)); }

  void Write() const {
    for (size_t i = 0; i < parts_.size(); ++i) {
      GgufWriter writer;
      for (const auto& [key, value] : parts_[i].texts) writer.Add(key, value);
      writer.Add("split.no", parts_[i].no);
      writer.Add("split.count", parts_[i].count);
      writer.Add("split.tensors.count", parts_[i].n_tensors);
      for (const auto& [name, values] : parts_[i].tensors) writer.AddTensor(name, {values.size()}, values);
      writer.Write(PartPath(i));
    }
  }

  // The sentence with which the model is refused; empty when it is not.
  std::string Refusal(const std::string& path, ErrorCode expected = ErrorCode::kBadFile) const {
    try {
      GgufFile::Open(path);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), expected) << error.what();
      return error.what();
    }
    return "";
  }

  fs::path folder_;
  std::vector<Part> parts_;
};

TEST_F(GgufSplit, AllPartsAreOneFile) {
  Write();
  for (const bool map : {true, false}) {
    const GgufFile file = GgufFile::Open(PartPath(0), map);
    EXPECT_EQ(file.n_parts(), 3u);
    EXPECT_EQ(file.name(), PartPath(0));
    EXPECT_EQ(file.Get<std::string>("general.architecture"), "llama");
    ASSERT_EQ(file.tensors().size(), 4u);
    EXPECT_EQ(file.file_bytes(), fs::file_size(PartPath(0)) + fs::file_size(PartPath(1)) + fs::file_size(PartPath(2)));
    for (size_t i = 0; i < parts_.size(); ++i) {
      for (const auto& [name, values] : parts_[i].tensors) {
        const GgufTensor* tensor = file.FindTensor(name);
        ASSERT_NE(tensor, nullptr) << name;
        EXPECT_EQ(tensor->part, i);
        ASSERT_EQ(tensor->data.size(), values.size() * sizeof(float));
        EXPECT_EQ(std::memcmp(tensor->data.data(), values.data(), tensor->data.size()), 0) << name;
      }
    }
  }
}

TEST_F(GgufSplit, CopiesKeepAllPartsAlive) {
  Write();
  std::optional<GgufFile> file = GgufFile::Open(PartPath(0));
  const GgufFile copy = *file;
  file.reset();
  EXPECT_EQ(static_cast<int>(copy.FindTensor("d")->data[3]), 0x40);  // 7.0f
}

TEST_F(GgufSplit, TheFirstPartMayHoldMetadataOnly) {
  parts_[1].tensors.merge(parts_[0].tensors);
  Write();
  EXPECT_EQ(GgufFile::Open(PartPath(0)).tensors().size(), 4u);
}

TEST_F(GgufSplit, FingerprintSeesEveryPart) {
  std::vector<uint64_t> fingerprints;
  const auto add = [&] {
    Write();
    fingerprints.push_back(GgufFile::Open(PartPath(0)).Fingerprint());
  };
  add();
  parts_[1].tensors["c"][0] = 9;
  add();
  parts_[2].texts["note"] = "other";
  add();
  parts_[0].texts["note"] = "other";
  add();
  for (size_t i = 0; i < fingerprints.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(fingerprints[i], fingerprints[j]) << i << ' ' << j;
  }
  EXPECT_EQ(GgufFile::Open(PartPath(0), false).Fingerprint(), fingerprints.back());
}

TEST_F(GgufSplit, APartThatIsMissing) {
  Write();
  fs::remove(PartPath(1));
  const std::string message = Refusal(PartPath(0), ErrorCode::kNotFound);
  EXPECT_EQ(message, PartPath(0) + ": part 2 of 3 is missing: there is no " + PartPath(1));
}

TEST_F(GgufSplit, AnotherPartThanTheFirstIsNamed) {
  Write();
  EXPECT_EQ(Refusal(PartPath(1)),
            PartPath(1) + ": this is part 2 of 3 of a split model; name its first part, " + PartPath(0));
  fs::rename(PartPath(2), Path("tail.gguf"));
  EXPECT_EQ(Refusal(Path("tail.gguf")),
            Path("tail.gguf") + ": this is part 3 of 3 of a split model; name its first part");
}

TEST_F(GgufSplit, ANameThatDoesNotFitTheParts) {
  Write();
  for (const char* name : {"first.gguf", "model-00001-of-00004.gguf", "model-00002-of-00003.gguf"}) {
    fs::rename(PartPath(0), Path(name));
    const std::string message = Refusal(Path(name));
    EXPECT_EQ(message.rfind(Path(name) + ": the first of 3 parts of a split model, expected a name that ends in "
                                         "-00001-of-00003.gguf",
                            0),
              0u)
        << message;
    fs::rename(Path(name), PartPath(0));
  }
}

TEST_F(GgufSplit, PartsOfAnotherModel) {
  const struct {
    const char* fragment;
    size_t said_of;  // the part that the sentence names
    std::function<void(std::vector<Part>&)> change;
  } kCases[] = {
      {"expected part 2 of 3 of a split model, found part 2 of 4", 1, [](auto& p) { p[1].count = 4; }},
      {"expected part 3 of 3 of a split model, found part 2 of 3", 2, [](auto& p) { p[2].no = 1; }},
      {"metadata 'split.tensors.count' differs", 1, [](auto& p) { p[1].n_tensors = 5; }},
      {"metadata 'general.architecture' differs from that of", 2,
       [](auto& p) { p[2].texts["general.architecture"] = "qwen2"; }},
      {"tensor 'a' is in an earlier part too", 2, [](auto& p) { p[2].tensors["a"] = {1}; }},
      {"its 3 parts hold 3 tensors, split.tensors.count says 4", 0, [](auto& p) { p[0].tensors.erase("a"); }},
      {"split.no is 3, expected less than 3", 2, [](auto& p) { p[2].no = 3; }},
  };
  const std::vector<Part> sound = parts_;
  for (const auto& test : kCases) {
    parts_ = sound;
    test.change(parts_);
    Write();
    const std::string message = Refusal(PartPath(0));
    EXPECT_EQ(message.rfind(PartPath(test.said_of) + ": ", 0), 0u) << message;
    EXPECT_NE(message.find(test.fragment), std::string::npos) << message;
  }
}

TEST_F(GgufSplit, AWholeModelOrADamagedFileInsteadOfAPart) {
  Write();
  const std::vector<float> values = {7};  // the writer reads them when it writes
  GgufWriter writer;
  writer.AddTensor("d", {1}, values);
  writer.Write(PartPath(2));
  EXPECT_EQ(Refusal(PartPath(0)), PartPath(2) + ": expected part 3 of 3 of a split model, found part 1 of 1");
  fs::resize_file(PartPath(2), fs::file_size(PartPath(2)) - 40);
  const std::string message = Refusal(PartPath(0));
  EXPECT_EQ(message.rfind(PartPath(2) + ": the file ends", 0), 0u) << message;
}

TEST(SplitName, IsReadFromPaths) {
  const auto name = ParseSplitName("folder/m-00002-of-00010.gguf");
  ASSERT_TRUE(name.has_value());
  EXPECT_EQ(name->prefix, "folder/m");
  EXPECT_EQ(name->part, 1u);
  EXPECT_EQ(name->count, 10u);
  EXPECT_EQ(name->Part(9), "folder/m-00010-of-00010.gguf");
  for (const char* other :
       {"m.gguf", "m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-0001-of-0003.gguf", "m-00001-of-00003.bin",
        "m-0000a-of-00003.gguf", "m_00001-of-00003.gguf", "-00001-of-00003.gguf", ""}) {
    EXPECT_FALSE(ParseSplitName(other).has_value()) << other;
  }
  EXPECT_EQ(ModelFiles("m-00001-of-00002.gguf"),
            (std::vector<std::string>{"m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}));
  EXPECT_EQ(ModelFiles("m-00002-of-00002.gguf"), std::vector<std::string>{"m-00002-of-00002.gguf"});
}

}  // namespace
}  // namespace lesskv
