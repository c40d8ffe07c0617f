#include <gtest/gtest.h>

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "base/atomic_file.h"
#include "base/error.h"
#include "base/mmap.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;

class Files : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("lesskv_files_test_{}", ::getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Path(const char* name) const { return (folder_ / name).string(); }
  static void Write(const std::string& path, std::string_view text) { std::ofstream(path) << text; }
  static std::string Read(const std::string& path) {
    std::ifstream in(path);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  size_t CountFiles() const { return static_cast<size_t>(std::distance(fs::directory_iterator(folder_), {})); }

  fs::path folder_;
};

std::span<const std::byte> Bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

void ExpectError(ErrorCode code, const std::string& fragment, const std::function<void()>& action) {
  try {
    action();
    ADD_FAILURE() << "no error, expected one with: " << fragment;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    EXPECT_NE(std::string(error.what()).find(fragment), std::string::npos) << error.what();
  }
}

TEST_F(Files, MappedBytesAreTheFileAndSurviveAMove) {
  Write(Path("a"), "hello");
  MappedFile first = MappedFile::Open(Path("a"));
  const std::byte* address = first.bytes().data();
  MappedFile second = std::move(first);
  EXPECT_TRUE(first.bytes().empty());
  EXPECT_EQ(second.bytes().data(), address);
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(address), second.bytes().size()), "hello");
}

TEST_F(Files, WhatCannotBeMappedIsNamed) {
  ExpectError(ErrorCode::kNotFound, "No such file", [&] { MappedFile::Open(Path("missing")); });
  ExpectError(ErrorCode::kBadFile, "is a directory", [&] { MappedFile::Open(folder_.string()); });
  ExpectError(ErrorCode::kBadFile, "not a regular file", [&] { MappedFile::Open("/dev/null"); });
  ASSERT_EQ(::mkfifo(Path("pipe").c_str(), 0600), 0);
  ExpectError(ErrorCode::kBadFile, "not a regular file", [&] { MappedFile::Open(Path("pipe")); });
  Write(Path("empty"), "");
  ExpectError(ErrorCode::kBadFile, "is empty", [&] { MappedFile::Open(Path("empty")); });
}

TEST_F(Files, NothingIsVisibleBeforeCommit) {
  Write(Path("out"), "old");
  {
    AtomicFile abandoned(Path("out"));
    abandoned.Write(Bytes("half"));
  }
  EXPECT_EQ(Read(Path("out")), "old");
  EXPECT_EQ(CountFiles(), 1u);
  AtomicFile file(Path("out"));
  file.Write(Bytes("new "));
  file.Write(Bytes("text"));
  EXPECT_EQ(Read(Path("out")), "old");
  file.Commit();
  EXPECT_EQ(Read(Path("out")), "new text");
  EXPECT_EQ(CountFiles(), 1u);
}

TEST_F(Files, AReplacedFileKeepsItsPermissions) {
  const auto mode_of = [&](const char* name) {
    struct stat info {};
    ::stat(Path(name).c_str(), &info);
    return info.st_mode & 0777;
  };
  for (const mode_t mode : {0600, 0640, 0666}) {
    Write(Path("out"), "old");
    ASSERT_EQ(::chmod(Path("out").c_str(), mode), 0);
    AtomicFile file(Path("out"));
    file.Write(Bytes("new"));
    for (const auto& entry : fs::directory_iterator(folder_))  // nobody reads it while it is being written either
      EXPECT_EQ(static_cast<mode_t>(entry.status().permissions()) & ~mode, 0u) << entry.path();
    file.Commit();
    EXPECT_EQ(mode_of("out"), mode);
    EXPECT_EQ(Read(Path("out")), "new");
  }
}

TEST_F(Files, AReadOnlyFileIsNotReplaced) {
  Write(Path("out"), "old");
  ASSERT_EQ(::chmod(Path("out").c_str(), 0444), 0);
  ExpectError(ErrorCode::kIo, "read-only", [&] { AtomicFile file(Path("out")); });
  EXPECT_EQ(Read(Path("out")), "old");
  EXPECT_EQ(CountFiles(), 1u);
}

TEST_F(Files, ALinkThatLeadsToItselfIsNotReplaced) {
  fs::create_symlink("loop", folder_ / "loop");
  ExpectError(ErrorCode::kIo, "loop", [&] { AtomicFile file(Path("loop")); });
  EXPECT_TRUE(fs::is_symlink(folder_ / "loop"));
}

TEST_F(Files, NamesMayBeAsLongAsTheSystemAllows) {
  const std::string name(255, 'n');
  AtomicFile file(Path(name.c_str()));
  file.Commit();
  EXPECT_TRUE(fs::exists(folder_ / name));
  ExpectError(ErrorCode::kIo, "too long", [&] { AtomicFile longer(Path((name + "n").c_str())); });
}

TEST_F(Files, ALinkIsFollowed) {
  Write(Path("target"), "old");
  fs::create_symlink(Path("target"), Path("link"));
  AtomicFile file(Path("link"));
  file.Write(Bytes("new"));
  file.Commit();
  EXPECT_TRUE(fs::is_symlink(Path("link")));
  EXPECT_EQ(Read(Path("target")), "new");
}

TEST_F(Files, UnwritableOutputIsAnError) {
  ExpectError(ErrorCode::kIo, "No such file", [&] { AtomicFile(Path("missing_folder/out")); });
  ExpectError(ErrorCode::kIo, "not a regular file", [&] { AtomicFile("/dev/full"); });
  ExpectError(ErrorCode::kIo, "not a regular file", [&] { AtomicFile(folder_.string()); });
}

TEST(MappedFile, ReadGivesTheBytesOfOpen) {
  const std::string path = LESSKV_SOURCE_DIR "/models/lesskv-small.gguf";
  const MappedFile mapped = MappedFile::Open(path);
  MappedFile read = MappedFile::Read(path);
  const std::byte* before = read.bytes().data();
  const MappedFile moved = std::move(read);
  EXPECT_EQ(moved.bytes().data(), before);
  EXPECT_TRUE(std::ranges::equal(mapped.bytes(), moved.bytes()));
  EXPECT_THROW(MappedFile::Read("/nowhere/at/all"), Error);
  EXPECT_THROW(MappedFile::Read("/dev/null"), Error);
}

}  // namespace
}  // namespace lesskv
