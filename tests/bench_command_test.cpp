// lesskv bench as a user calls it, on the bundled model: the rows asked for, at the depth asked for, with the bytes that
// plan foretells, and one sentence for what cannot be measured.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.h"

namespace lesskv {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string Read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

struct Result {
  int status;
  std::string out, err;
};

class BenchCommand : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("lesskv_bench_{}", ::getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  // $L is the program, $M the bundled model, $R a tiny one without sidecar.
  Result Shell(const std::string& command) const {
    const std::string line = fmt::format(
        "cd '{}' && L='{}' M='{}/models/lesskv-small.gguf' R='{}/tests/data/models/llama-gqa-tied.gguf' && {{ {} ; }} "
        ">out 2>err",
        folder_.string(), LESSKV_PROGRAM, LESSKV_SOURCE_DIR, LESSKV_SOURCE_DIR, command);
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, Read(folder_ / "out"), Read(folder_ / "err")};
  }

  fs::path folder_;
};

TEST_F(BenchCommand, RowsHaveTheirDepthAndThePlansBytes) {
  const std::string specs = " --kv full --kv 'h2o(5%)+less' --kv 'window(64)+prefill(chunk=128)' --kv 'snapkv(128)' "
                            "--kv 'cascade(64)' ";
  const Result bench = Shell("$L bench -m $M -c 2048 -p 20 -n 4 -d 0,1000 -r 2 --batch 1,3 -o json" + specs);
  ASSERT_EQ(bench.status, 0) << bench.err;
  EXPECT_EQ(bench.err, "");
  const Result plan = Shell("$L plan -m $M -c 2048 -p 1000 -n 4 -o json" + specs);
  ASSERT_EQ(plan.status, 0) << plan.err;
  const Json rows = Json::parse(bench.out), plans = Json::parse(plan.out);
  ASSERT_EQ(rows.size(), 5u * 2 * 2 * 2);
  size_t compared = 0;
  for (const Json& row : rows) {
    const size_t tokens = row["n_prompt"].get<size_t>() + row["n_predict"].get<size_t>(), batch = row["batch"];
    EXPECT_EQ(row["tokens_seen"], row["depth"].get<size_t>() + tokens);
    EXPECT_GT(row["tokens_per_second"], 0);
    EXPECT_EQ(row["samples_tokens_per_second"].size(), 2u);
    EXPECT_GE(row["kv_bytes_peak"], row["kv_bytes"]);
    for (const char* key : {"model_fingerprint", "kv_spec", "seed", "threads", "isa", "compute", "version",
                            "tokens_resident", "kv_bytes_full", "sidecar_bytes", "difference_from_scalar"})
      EXPECT_TRUE(row.contains(key)) << key;
    if (row["test"] != "tg4 @ d1000") continue;
    for (const Json& planned : plans) {
      if (planned["kv_spec"] != row["kv_spec"]) continue;
      ++compared;
      EXPECT_EQ(row["kv_bytes"], planned["kv_bytes"].get<size_t>() * batch) << row["kv_spec"];
      EXPECT_EQ(row["kv_bytes_peak"], planned["kv_bytes_peak"].get<size_t>() * batch) << row["kv_spec"];
      EXPECT_EQ(row["tokens_resident"], planned["tokens_resident"]) << row["kv_spec"];
    }
  }
  EXPECT_EQ(compared, 10u);
}

// A prompt's work memory is that of its longest step.
TEST_F(BenchCommand, PlannedWorkIsThatOfABlock) {
  const auto work = [this](size_t prompt, const std::string& spec) {
    const Result plan = Shell(fmt::format("$L plan -m $M -c 2048 -p {} -n 4 -o json --kv '{}'", prompt, spec));
    return plan.status == 0 ? Json::parse(plan.out)[0]["work_bytes"].get<size_t>() : 0;
  };
  EXPECT_GT(work(100, "cascade(64)"), 0u);
  EXPECT_EQ(work(100, "cascade(64)"), work(100, "full"));
  EXPECT_EQ(work(1000, "cascade(64)"), work(512, "full"));
  EXPECT_EQ(work(2000, "cascade(64)"), work(512, "full"));
  EXPECT_EQ(work(2000, "cascade(64, block=0)"), work(2000, "full"));
}

TEST_F(BenchCommand, AsManySequencesAsFitTheMemory) {
  const Result result = Shell("$L bench -m $M -n 2 -d 1000 -r 1 --memory 16MiB --kv full --kv 'h2o(5%)' -o json");
  ASSERT_EQ(result.status, 0) << result.err;
  const Json rows = Json::parse(result.out);
  for (const Json& row : rows) {
    const size_t bytes = row["kv_bytes"], batch = row["batch"], limit = size_t{16} << 20;
    EXPECT_LE(bytes, limit);
    EXPECT_GT(bytes + bytes / batch, limit);
  }
  EXPECT_GT(rows[1]["batch"].get<size_t>(), 10 * rows[0]["batch"].get<size_t>());
}

TEST_F(BenchCommand, RandomMapsAreNamed) {
  const Result result = Shell("$L bench -m $R -p 8 -n 2 -r 1 --kv 'h2o(50%)+less' --random-sidecar --rank 4 -o json");
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(Json::parse(result.out)[0]["feature_maps"], "random, rank 4, hidden 512");
}

TEST_F(BenchCommand, WhatCannotBeMeasuredIsOneSentence) {
  const struct {
    const char *command, *said;
  } calls[] = {{"$L bench -m nowhere.gguf", "nowhere.gguf"},
               {"$L bench -m $M -p 0 -n 0", "nothing to measure"},
               {"$L bench -m $M -p x", "x"},
               {"$L bench -m $M -n -3", "-3"},
               {"$L bench -m $M -d 100 -n 8 -p 0 -c 64", "--ctx"},
               {"$L bench -m $M --kv nonsense", "nonsense"},
               {"$L bench -m $M --memory lots", "lots"},
               {"$L bench -m $M --memory 1MiB --batch 2", "--batch"},
               {"$L bench -m $M --memory 1MiB -p 5", "-p"},
               {"$L bench -m $M --rank 4", "--random-sidecar"},
               {"$L bench -m $M -r 0", "-r"},
               {"$L bench -m $R --kv 'h2o(50%)+less'", "less"},
               {"$L bench -m $M -o xml", "xml"}};
  for (const auto& call : calls) {
    const Result result = Shell(call.command);
    EXPECT_EQ(result.status, 2) << call.command << ": " << result.err;
    EXPECT_NE(result.err.find(call.said), std::string::npos) << call.command << ": " << result.err;
    EXPECT_EQ(result.err.find('\n'), result.err.size() - 1) << call.command << ": " << result.err;
    EXPECT_EQ(result.out, "") << call.command;
  }
}

}  // namespace
}  // namespace lesskv
