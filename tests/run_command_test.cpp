// lesskv as a user calls it: results on standard output, one sentence on standard error for what cannot be done, the
// right exit status, on a tiny model with random weights.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "command_harness.h"
#include "engine/run_info.h"
#include "kvcache/residual/sidecar.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT
using RunCommand = CommandTest;

// Told before anything is computed, not when the text is there and the cache is lost.
TEST_F(RunCommand, SessionThatCannotBeSavedIsRefusedFirst) {
  const Result result = Shell("$L run -m $M -p 'the sea' -n 5 --session nowhere/s.bin");
  EXPECT_EQ(result.status, 2);
  EXPECT_EQ(result.out, "");
  EXPECT_NE(result.err.find("nowhere"), std::string::npos) << result.err;
}

// What --kv-stats tells of each head adds up to what the cache as a whole says of itself.
TEST_F(RunCommand, KvStatsTellsEveryHeadsRows) {
  const std::string run = "$L run -m $M -p 'the sea and the land and the sky over them' -n 30 --temp 0 --kv 'window(12)' --kv-stats";
  const auto json = nlohmann::json::parse(Shell(run + " --json").out);
  ASSERT_EQ(json["kv_rows"].size(), 2u);  // layers of the tiny model, 2 KV heads each
  double sum = 0;
  for (size_t layer = 0; layer < 2; ++layer) {
    ASSERT_EQ(json["kv_rows"][layer].size(), 2u);
    for (size_t head = 0; head < 2; ++head) {
      sum += json["kv_rows"][layer][head].get<double>();
      const int seen = json["tokens_seen"];
      EXPECT_EQ(json["kv_runs"][layer][head], (std::vector<int>{0, 4, seen - 8, seen}));  // sinks, recent ones
    }
  }
  EXPECT_EQ(sum / 4, json["tokens_resident"].get<double>());
  EXPECT_FALSE(nlohmann::json::parse(Shell("$L run -m $M -p 'the sea' -n 3 --json").out).contains("kv_rows"));
  const Result text = Shell(run);
  EXPECT_NE(text.err.find("\n1           12 (8)  12 (8)\n"), std::string::npos) << text.err;
}

// A sidecar belongs to a model, not to a file: it is found beside a copy in another quantisation, by the model's identity.
TEST_F(RunCommand, ASidecarServesEveryQuantisationOfItsModel) {
  const auto info = [&](const std::string& file) {
    const Result result = Shell(fmt::format("$L info {} --json", file));
    return nlohmann::json::parse(result.out);
  };
  ASSERT_EQ(Shell("$L quantize $M small.gguf F16").status, 0);
  const std::string identity = info("small.gguf")["identity"];
  EXPECT_EQ(info("$M")["identity"], identity);
  EXPECT_NE(info("$M")["fingerprint"], info("small.gguf")["fingerprint"]);
  Sidecar sidecar = InitialSidecar({.n_layers = 2, .n_heads = 4, .n_kv_heads = 2, .head_dim = 8, .rank = 4, .hidden = 8}, 1);
  const auto write = [&](uint64_t own) {
    sidecar.model_fingerprint = 1;
    sidecar.model_identity = own;
    WriteSidecar(Path("other.less.gguf"), sidecar);
  };
  const std::string command = "$L run -m small.gguf -p 'the sea and the land' -n 9 --temp 0 --json --kv 'h2o(4)+less'";
  write(std::stoull(identity, nullptr, 16));
  const Result found = Shell(command);
  ASSERT_EQ(found.status, 0) << found.err;
  EXPECT_GT(nlohmann::json::parse(found.out)["sidecar_bytes"], 0);
  write(5);
  EXPECT_EQ(Shell(command).status, 2);
  const Result foreign = Shell("$L run -m small.gguf -p x -n 1 --kv 'h2o(4)+less(file=\"other.less.gguf\")'");
  EXPECT_EQ(foreign.status, 2);
  EXPECT_NE(foreign.err.find("belongs to the model"), std::string::npos) << foreign.err;
}

// One fit a KV head at the prompt's end, more where what is generated is fitted too.
TEST_F(RunCommand, FitsOfKeptRowsAreCounted) {
  std::filesystem::copy_file(std::string(LESSKV_SOURCE_DIR) + "/models/lesskv-small.gguf", Path("m.gguf"));
  const auto fits = [&](const std::string& spec) -> double {
    const auto run = nlohmann::json::parse(
        Shell(fmt::format("$L run -m m.gguf -f $T -n 40 --temp 0 --json --kv-stats --kv '{}'", spec)).out);
    size_t heads = 0;
    for (const auto& layer : run["kv_rows"]) heads += layer.size();
    if (!run.contains("fits")) return -1;
    return (run["fits"].get<double>() + run["fits_refused"].get<double>()) / static_cast<double>(heads);
  };
  EXPECT_EQ(fits("h2o(30)"), -1);
  EXPECT_EQ(fits("h2o(30)+match"), 1);
  EXPECT_GE(fits("h2o(30)+match(every=16)"), 3);
}

// Maps that are merged into a sidecar replace its maps and nothing else.
TEST_F(RunCommand, AMergeKeepsWhatASidecarHoldsBesideMaps) {
  const Sidecar bundled = ReadSidecar(std::string(LESSKV_SOURCE_DIR) + "/models/lesskv-small.less.gguf");
  ASSERT_FALSE(bundled.balance.empty());
  Sidecar maps = bundled, others = bundled;
  maps.budgets = {}, maps.scores = {}, maps.dictionaries = {}, maps.balance = {};
  ShiftLogMass(others, 1);
  WriteSidecar(Path("maps.less.gguf"), maps);
  WriteSidecar(Path("out.less.gguf"), others);
  const Result merged = Shell("$L train less --merge maps.less.gguf -o out.less.gguf");
  ASSERT_EQ(merged.status, 0) << merged.err;
  const Sidecar out = ReadSidecar(Path("out.less.gguf"));
  EXPECT_EQ(out.balance, bundled.balance);
  EXPECT_EQ(out.budgets, bundled.budgets);
  EXPECT_EQ(out.layers[0].psi.b2, bundled.layers[0].psi.b2);
  others.model_fingerprint = others.model_identity = 5;
  WriteSidecar(Path("out.less.gguf"), others);
  EXPECT_EQ(Shell("$L train less --merge maps.less.gguf -o out.less.gguf").status, 2);
}

// What the training commands measure goes into one sidecar, found beside the model, and serves in one spec.
TEST_F(RunCommand, BudgetsAndScoresShareASidecar) {
  std::filesystem::copy_file(std::string(LESSKV_SOURCE_DIR) + "/models/lesskv-small.gguf", Path("m.gguf"));
  ASSERT_EQ(Shell("$L train budgets -m m.gguf --text $T --sequences 2 --tokens 64 -o m.less.gguf").status, 0) << Read("err");
  const Result missing = Shell("$L run -m m.gguf -p x -n 1 --kv 'kvzap(30)'");
  EXPECT_NE(missing.err.find("holds no scores"), std::string::npos) << missing.err;
  const Result trained = Shell("$L train kvzap -m m.gguf --text $T --sequences 4 --tokens 128 -o m.less.gguf --json");
  ASSERT_EQ(trained.status, 0) << trained.err;
  const auto report = nlohmann::json::parse(trained.out);
  EXPECT_GT(report["mean_r2"], 0.1);
  EXPECT_EQ(report["layers"].size(), 4u);
  // As many rows as a threshold's share reach it: fewer reach a higher one.
  ASSERT_EQ(report["thresholds"].size(), 6u);
  EXPECT_GT(report["thresholds"][0]["threshold"], report["thresholds"][5]["threshold"]);
  for (const std::string spec : {"kvzap(30)", "kvzap(30, scope=layer)", "kvzap(30)+prefill(chunk=16)", "kvzap(30)+split(4)", "kvzap(30)+pooled", "kvzap(30)+split(4)+prefill(chunk=16)"}) {
    const Result result = Shell(fmt::format("$L run -m m.gguf -f $T -n 5 --temp 0 --json --kv '{}'", spec));
    ASSERT_EQ(result.status, 0) << spec << "\n" << result.err;
    EXPECT_NEAR(nlohmann::json::parse(result.out)["tokens_resident"].get<double>(), 30, 1e-9) << spec;
  }
  // By a threshold each head has rows of its own number, within what the plan says of the same tokens.
  const Result result = Shell("$L run -m m.gguf -f $T -n 5 --temp 0 --json --kv-stats --kv 'kvzap(threshold=-4, window=16)'");
  ASSERT_EQ(result.status, 0) << result.err;
  const auto run = nlohmann::json::parse(result.out);
  std::set<size_t> sizes;
  for (const auto& layer : run["kv_rows"])
    for (const size_t rows : layer) sizes.insert(rows);
  EXPECT_GT(sizes.size(), 1u) << run["kv_rows"];
  const Result planned = Shell(fmt::format("$L plan -m m.gguf -p {} -n 4 -o json --kv 'kvzap(threshold=-4, window=16)'",
                                           run["prompt_tokens"].get<size_t>()));
  ASSERT_EQ(planned.status, 0) << planned.err;
  const auto plan = nlohmann::json::parse(planned.out)[0];
  EXPECT_EQ(plan["tokens_resident_least"], 20);
  EXPECT_EQ(plan["tokens_resident"], run["tokens_seen"]);
  EXPECT_GE(run["kv_bytes"], plan["kv_bytes_least"]);
  EXPECT_LE(run["kv_bytes"], plan["kv_bytes"]);
  EXPECT_LE(run["kv_bytes_peak"], plan["kv_bytes_peak"]);
  EXPECT_LT(run["kv_bytes"], run["kv_bytes_full"]);
  EXPECT_EQ(Shell("$L train kvzap -m m.gguf --text $T --sequences 1 --tokens 64 -o m.less.gguf").status, 2);
}

// The weight of the states is the best of those tried, and the same when asked again; everything else in the file stays.
TEST_F(RunCommand, TheMassOfStatesIsChosenOnText) {
  const std::string models = std::string(LESSKV_SOURCE_DIR) + "/models/lesskv-small";
  std::filesystem::copy_file(models + ".gguf", Path("m.gguf"));
  Sidecar heavy = ReadSidecar(models + ".less.gguf");
  heavy.budgets = {{2, 2, 2, 2}, {0.5f}, std::vector<float>(8, 0.5f), 1};
  ShiftLogMass(heavy, 3);
  WriteSidecar(Path("m.less.gguf"), heavy);
  const std::string command = "$L train mass -m m.gguf -o m.less.gguf -c 256 --text $T --max-windows 1 --kv 'h2o(16)' --grid 1 --json";
  const Result result = Shell(command);
  ASSERT_EQ(result.status, 0) << result.err;
  const auto report = nlohmann::json::parse(result.out);
  std::map<double, double> tried;
  for (const auto& row : report["tried"]) tried[row["shift"]] = row["perplexity"][0];
  const double taken = report["shift"];
  EXPECT_LT(taken, 0);
  for (const auto& [shift, perplexity] : tried) EXPECT_GE(perplexity, tried[taken]) << shift;
  const Sidecar lighter = ReadSidecar(Path("m.less.gguf"));
  EXPECT_NEAR(lighter.layers[1].psi.b2[0], heavy.layers[1].psi.b2[0] + taken, 1e-5);
  EXPECT_EQ(lighter.budgets, heavy.budgets);
  std::vector<std::string> history = heavy.training.history;
  EXPECT_FALSE(history.empty());  // of its refinement
  history.push_back(fmt::format("train mass: {:+g} nats, chosen for h2o(16)", taken));
  EXPECT_EQ(lighter.training.history, history);
  const auto measured = nlohmann::json::parse(Shell("$L eval perplexity -m m.gguf -c 256 --text $T --max-windows 1 --kv 'h2o(16)+less' -o json").out);
  EXPECT_NEAR(measured[0]["perplexity"], tried[taken], 1e-6 * tried[taken]);
  EXPECT_EQ(nlohmann::json::parse(Shell(command).out)["shift"], 0);
  EXPECT_FALSE(Exists("m.less.gguf.part.less.gguf"));
  ExpectOneSentence(Shell("$L train mass -m m.gguf -o none.less.gguf --text $T"), 2, "none.less.gguf");
  Sidecar bare;
  bare.model_fingerprint = heavy.model_fingerprint;
  bare.budgets = heavy.budgets;
  WriteSidecar(Path("bare.less.gguf"), bare);
  ExpectOneSentence(Shell("$L train mass -m m.gguf -o bare.less.gguf --text $T"), 2, "holds no feature maps");
}

// The first tokens stay in every cache of an evaluation: a window without sinks that must keep six is one with six.
TEST_F(RunCommand, EvaluationsProtectTheSameTokensForAll) {
  const auto rows = [&](const std::string& keep, const std::string& spec) {
    const Result result = Shell(fmt::format("$L eval perplexity -m $M --text $T -c 64 --max-windows 1 --step 1 {} --kv '{}' -o json", keep, spec));
    EXPECT_EQ(result.status, 0) << result.err;
    return nlohmann::json::parse(result.out)[0];
  };
  const auto kept = rows("--keep 6", "window(8, sinks=0)"), sinks = rows("", "window(8, sinks=6)"), none = rows("", "window(8, sinks=0)");
  EXPECT_EQ(kept["keep"], 6);
  EXPECT_FALSE(none.contains("keep"));
  EXPECT_EQ(kept["perplexity"], sinks["perplexity"]);
  EXPECT_NE(kept["perplexity"], none["perplexity"]);
  ExpectOneSentence(Shell("$L eval perplexity -m $M --text $T -c 64 --keep 9 --kv 'h2o(8)'"), 2, "9 protected tokens do not fit");
  ExpectOneSentence(Shell("$L eval perplexity -m $M --text $T -c 64 --keep -1 --kv 'h2o(8)'"), 2, "--keep");
}

TEST_F(RunCommand, UnknownSubcommandIsNamed) {
  for (const char* command : {"$L foo", "$L eval foo", "$L train foo"}) {
    const Result result = Shell(command);
    EXPECT_EQ(result.status, 2);
    EXPECT_NE(result.err.find("\"foo\""), std::string::npos) << result.err;
  }
}

TEST_F(RunCommand, TextGoesToOutputAndTheReportToErr) {
  const Result result = Shell("$L run -m $M -p 'the sea' -n 5 --temp 0");
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_NE(result.err.find("tokens/s"), std::string::npos);
  EXPECT_EQ(result.out.find("tokens/s"), std::string::npos);
  EXPECT_TRUE(result.out.ends_with('\n'));
}

TEST_F(RunCommand, JsonHasTheStableKeys) {
  const Result result =
      Shell("$L run -m $M -p 'the sea' -n 5 --temp 0 --json --kv 'h2o(50%)' --seed 7 -t 1 --compute f32");
  ASSERT_EQ(result.status, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  for (const char* key : {"text",
                          "prompt_tokens",
                          "generated_tokens",
                          "prefill_seconds",
                          "decode_seconds",
                          "prefill_tokens_per_second",
                          "decode_tokens_per_second",
                          "kv_spec",
                          "tokens_seen",
                          "tokens_resident",
                          "kv_bytes",
                          "kv_bytes_peak",
                          "kv_bytes_full",
                          "sidecar_bytes",
                          "model",
                          "model_fingerprint",
                          "seed",
                          "threads",
                          "isa",
                          "compute",
                          "version"})
    EXPECT_TRUE(json.contains(key)) << key;
  EXPECT_EQ(json["generated_tokens"], 5);
  EXPECT_EQ(json["tokens_seen"], json["prompt_tokens"].get<size_t>() + 4);
  EXPECT_EQ(json["seed"], 7);
  EXPECT_EQ(json["threads"], 1);
  EXPECT_EQ(json["compute"], "f32");
  EXPECT_EQ(json["version"], Version());
  // Two layers, two KV heads of 8, keys and values, two bytes each.
  EXPECT_EQ(json["kv_bytes_full"], json["tokens_seen"].get<size_t>() * 2 * 2 * 8 * 2 * 2);
}

TEST_F(RunCommand, APromptFromAFileOrAPipeIsThePrompt) {
  Write("prompt.txt", "the sea\n");  // the last newline is not part of it
  const std::string rest = " -m $M -n 9 --temp 0";
  const Result direct = Shell("$L run -p 'the sea'" + rest);
  EXPECT_EQ(direct.status, 0) << direct.err;
  EXPECT_EQ(Shell("$L run -f prompt.txt" + rest).out, direct.out);
  EXPECT_EQ(Shell("cat prompt.txt | $L run" + rest).out, direct.out);
  EXPECT_EQ(Shell("cat prompt.txt | $L run -f -" + rest).out, direct.out);
  EXPECT_NE(Shell("$L run -p 'a different one'" + rest).out, direct.out);
}

TEST_F(RunCommand, AnEmptyPromptBeginsAText) {
  const Result result = Shell("$L run -m $M -p '' -n 3 --json");
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out)["prompt_tokens"], 1);
}

TEST_F(RunCommand, SamplingFollowsTheSeed) {
  const std::string rest = " -m " LESSKV_SOURCE_DIR "/models/lesskv-small.gguf -p 'The sea' -n 20 --temp 1";
  EXPECT_EQ(Shell("$L run --seed 1" + rest).out, Shell("$L run --seed 1" + rest).out);
  EXPECT_NE(Shell("$L run --seed 1" + rest).out, Shell("$L run --seed 2" + rest).out);
}

TEST_F(RunCommand, TheTextIsTheSameMappedOrRead) {
  const Result mapped = Shell("$L run -m $M -p 'the sea' -n 8 --temp 0 --mmap");
  EXPECT_EQ(mapped.status, 0) << mapped.err;
  EXPECT_EQ(Shell("$L run -m $M -p 'the sea' -n 8 --temp 0 --no-mmap").out, mapped.out);
}

TEST_F(RunCommand, KeepAndProtectHoldTokens) {
  const std::string rest = " -m $M -p 'the sea in a storm and the rain on the harbour' -n 3 --temp 0 --json --ctx 64";
  EXPECT_EQ(Shell("$L run --kv 'window(12, sinks=0)' --keep 4" + rest).status, 0);
  EXPECT_EQ(Shell("$L run --kv 'window(12, sinks=0)' --protect 2:6" + rest).status, 0);
  const Result much = Shell("$L run --kv 'window(12, sinks=0)' --keep -1" + rest);
  EXPECT_EQ(much.status, 2);
  EXPECT_NE(much.err.find("protect"), std::string::npos) << much.err;
}

// SentencePiece puts a space before a text, but not before what goes on: "r" is one token, " r" two.
TEST_F(RunCommand, ALaterTurnGoesOnWithoutASpace) {
  const std::string rest = " -m $M -n 1 --temp 0 --session s.bin --json";
  const Result first = Shell("$L run -p 'the sea'" + rest);
  ASSERT_EQ(first.status, 0) << first.err;
  ASSERT_EQ(nlohmann::json::parse(first.out)["finish"], "length");
  const Result second = Shell("$L run -p r" + rest);
  ASSERT_EQ(second.status, 0) << second.err;
  EXPECT_EQ(nlohmann::json::parse(second.out)["prompt_tokens"], 2) << "the token before, and r";
}

// Rows of other bits in the same bytes would be read as nonsense: the spec is part of the file.
TEST_F(RunCommand, ASessionOfAnotherCacheIsRefused) {
  const std::string rest = " -m " + std::string(LESSKV_SOURCE_DIR) + "/models/lesskv-small.gguf -n 40 --ctx 256 --session s.bin";
  ASSERT_EQ(Shell("$L run -p 'the sea' --kv 'full+kivi(k=3, v=2, group=16, window=16)'" + rest).status, 0) << Read("err");
  const Result other = Shell("$L run -p r --kv 'full+kivi(k=2, v=3, group=16, window=16)'" + rest);
  EXPECT_EQ(other.status, 2);
  EXPECT_NE(other.err.find("kivi(k=3, v=2"), std::string::npos) << other.err;
  EXPECT_NE(other.err.find("kivi(k=2, v=3"), std::string::npos) << other.err;
}

TEST_F(RunCommand, TokenizeShowsIdsPiecesAndCount) {
  const auto out = [&](const std::string& rest) {
    const Result result = Shell("$L tokenize -m $M " + rest);
    EXPECT_EQ(result.status, 0) << result.err;
    return result.out;
  };
  EXPECT_EQ(out("-p a"), "      1  \"<s>\"\n    269  \" a\"\n");
  EXPECT_EQ(out("-p a --ids"), "1 269\n");
  EXPECT_EQ(out("-p a --pieces"), "\"<s>\"\n\" a\"\n");
  EXPECT_EQ(out("-p a --count"), "2\n");
  EXPECT_EQ(out("-p a --no-bos --count"), "1\n");
  EXPECT_EQ(out("-p '</s>' --special --ids"), "1 2\n");
  EXPECT_NE(out("-p '</s>' --ids"), "1 2\n");
  EXPECT_EQ(out("-p '' --no-bos --ids"), "\n");
  EXPECT_EQ(out("-p a -o json"), "{\"count\":2,\"ids\":[1,269],\"pieces\":[\"<s>\",\" a\"]}\n");
  EXPECT_EQ(out("-p a -o json --ids"), "{\"ids\":[1,269]}\n");
  Write("a.txt", "a\n");  // the last newline is not part of it
  EXPECT_EQ(out("-f a.txt --ids"), "1 269\n");
  EXPECT_EQ(out("--ids < a.txt"), "1 269\n");
}

TEST_F(RunCommand, TokenizeShowsBytesThatAreNoCharacter) {
  const std::string command = "$L tokenize -m $M -p '\u00E9\x1B' --no-bos --pieces";
  EXPECT_TRUE(Shell(command).out.ends_with("\"\\xC3\"\n\"\\xA9\"\n\"\\x1B\"\n")) << Shell(command).out;
  const auto pieces = nlohmann::json::parse(Shell(command + " -o json").out)["pieces"];
  EXPECT_EQ(pieces[pieces.size() - 2], nlohmann::json({169}));
  EXPECT_EQ(pieces.back(), "\x1B");
}

TEST_F(RunCommand, VersionAndHelp) {
  EXPECT_EQ(Shell("$L --version").out, "lesskv " + Version() + "\n");
  const Result help = Shell("$L run --help");
  EXPECT_EQ(help.status, 0);
  EXPECT_NE(help.out.find("--repeat-penalty"), std::string::npos);
}

struct BadCall {
  const char* name;
  const char* command;
  int status;
  const char* said;
};

const BadCall kBadCalls[] = {
    {"missing file", "$L run -m nowhere.gguf -p x", 2, "nowhere.gguf"},
    {"a folder", "$L run -m . -p x", 2, "."},
    {"truncated file", "head -c 30000 $M > short.gguf; $L run -m short.gguf -p x", 2, "short.gguf"},
    {"empty file", ": > empty.gguf; $L run -m empty.gguf -p x", 2, "empty.gguf"},
    {"text named .gguf", "echo this is no model at all > text.gguf; $L run -m text.gguf -p x", 2, "text.gguf"},
    {"no vocabulary", "$L run -m \"${M%/*}/qwen2-bias.gguf\" -p x", 2, "tokenizer.ggml"},
    {"no command", "$L", 2, "subcommand"},
    {"unknown command", "$L dance", 2, "dance"},
    {"unknown option", "$L run -m $M -p x --fast", 2, "--fast"},
    {"no model", "$L run -p x", 2, "--model"},
    {"number that is none", "$L run -m $M -p x -n many", 2, "many"},
    {"-n -2", "$L run -m $M -p x -n -2", 2, "-2"},
    {"NaN temperature", "$L run -m $M -p x --temp nan", 2, "--temp"},
    {"negative top-k", "$L run -m $M -p x --top-k -3", 2, "--top-k"},
    {"too many threads", "$L run -m $M -p x -t 100000", 2, "--threads"},
    {"unknown compute", "$L run -m $M -p x --compute f8", 2, "f8"},
    {"huge context", "$L run -m $M -p x --ctx 99999999999", 2, "--ctx"},
    {"prompt too long", "$L run -m $M -p 'a much longer prompt' --ctx 5", 2, "context of 5"},
    {"bad spec", "$L run -m $M -p x --kv 'h2o(5%'", 2, "h2o"},
    {"unknown term", "$L run -m $M -p x --kv nonsense", 2, "nonsense"},
    {"no sidecar", "$L run -m $M -p x --kv 'h2o(50%)+less'", 2, "less"},
    {"empty stop", "$L run -m $M -p x --stop ''", 2, "--stop"},
    {"reversed span", "$L run -m $M -p x --protect 3:1", 2, "--protect"},
    {"mapped and read", "$L run -m $M -p x --mmap --no-mmap", 2, "--no-mmap"},
    {"two prompts", "$L run -m $M -p x -f y", 2, "both"},
    {"missing prompt file", "$L run -m $M -f nowhere.txt", 2, "nowhere.txt"},
    {"no prompt", "$L run -m $M < /dev/null", 2, "prompt"},
    {"tokenize without text", "$L tokenize -m $M < /dev/null", 2, "prompt"},
    {"tokenize to an unknown format", "$L tokenize -m $M -p x -o xml", 2, "xml"},
    {"tokenize to two things", "$L tokenize -m $M -p x --ids --count", 2, "--count"},
    {"tokenize without a vocabulary", "$L tokenize -m \"${M%/*}/qwen2-bias.gguf\" -p x", 2, "tokenizer.ggml"},
    {"unwritable output", "$L run -m $M -p x -n 3 > /dev/full", 1, "standard output"},
    {"unwritable JSON", "$L run -m $M -p x -n 3 --json > /dev/full", 1, "standard output"},
};

TEST_F(RunCommand, WhatCannotBeDoneIsOneSentence) {
  for (const BadCall& call : kBadCalls) {
    SCOPED_TRACE(call.name);
    ExpectOneSentence(Shell(call.command), call.status, call.said);
  }
}

}  // namespace
}  // namespace lesskv
