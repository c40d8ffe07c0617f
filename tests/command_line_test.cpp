// What can go wrong around the program: streams that cannot be written or read, numbers that are none, files that must
// not be touched, terminals of all kinds.
#include <gtest/gtest.h>
#include <pty.h>
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <regex>
#include <string>

#include "command_harness.h"

namespace lesskv {
namespace {

using namespace testing_support;  // NOLINT
namespace fs = std::filesystem;

class CommandLine : public CommandTest {
 protected:
  mode_t Mode(const std::string& name) const {
    struct stat info {};
    ::stat(Path(name).c_str(), &info);
    return info.st_mode & 0777;
  }
};

// ---- streams

TEST_F(CommandLine, AResultIsWrittenAlsoWhereWordsCannotBe) {
  const std::string run = "$L run -m $M -p 'the sea' -n 5 --temp 0";
  const std::string text = Shell(run).out;
  ASSERT_FALSE(text.empty());
  for (const char* stream : {" 2>/dev/full", " 2>&-"}) {
    const Result plain = Shell(run + stream), json = Shell(run + " --json" + stream);
    EXPECT_EQ(plain.out, text) << stream;
    EXPECT_EQ(plain.status, 1) << stream;  // the report is lost
    EXPECT_EQ(nlohmann::json::parse(json.out)["text"].get<std::string>() + "\n", text) << stream;
    EXPECT_EQ(json.status, 0) << stream;  // there was nothing to say
    const Result warned = Shell(run + " --json -c 500" + stream);
    EXPECT_EQ(nlohmann::json::parse(warned.out)["text"].get<std::string>() + "\n", text) << stream;
    EXPECT_EQ(warned.status, 1) << stream;
    EXPECT_EQ(Shell(std::string("$L run -m nowhere.gguf -p x") + stream).status, 2) << stream;
    EXPECT_EQ(Shell(std::string("$L run --nonsense") + stream).status, 2) << stream;
  }
}

TEST_F(CommandLine, WordsNeverLandInAFile) {
  ASSERT_EQ(Shell("$L quantize $M right.gguf F16").status, 0);
  for (const char* stream : {" 2>&-", " 2>/dev/full", " >&- 2>&-", " <&- >&- 2>&-"}) {
    EXPECT_EQ(Shell(std::string("$L quantize $M out.gguf F16") + stream).status, 1) << stream;
    EXPECT_TRUE(Read("out.gguf") == Read("right.gguf")) << stream;
    fs::remove(Path("out.gguf"));
  }
}

TEST_F(CommandLine, WhatCannotBeWrittenIsNotLostInSilence) {
  int pipe[2];
  ASSERT_EQ(::pipe(pipe), 0);
  ASSERT_EQ(::dup2(pipe[1], 9), 9);  // the shell knows numbers of one digit only
  for (const int end : pipe) ::close(end);  // nobody reads it
  for (const char* command : {"$L --help", "$L --version", "$L run --help", "$L methods", "$L methods -o json",
                              "$L info $M", "$L info --json $M", "$L plan -m $M", "$L run -m $M -p x -n 3",
                              "$L run -m $M -p x -n 3 --json", "$L eval perplexity -m $M --text $T --max-windows 1"}) {
    SCOPED_TRACE(command);
    ExpectOneSentence(Shell(std::string(command) + " >/dev/full"), 1, "standard output cannot be written");
    ExpectOneSentence(Shell(std::string(command) + " >&-"), 1, "standard output cannot be written");
    ExpectOneSentence(Shell(std::string(command) + " >&9"), 1, "Broken pipe");
  }
  ::close(9);
}

TEST_F(CommandLine, APromptThatCannotBeReadIsNoEmptyPrompt) {
  ExpectOneSentence(Shell("$L run -m $M -f - -n 3 < ."), 1, "standard input cannot be read");
  ExpectOneSentence(Shell("$L run -m $M -f - -n 3 <&-"), 1, "standard input cannot be read");
  for (const char* command : {"$L run -m $M -n 3", "$L tokenize -m $M", "$L chat -m $M --chat-template plain"})
    ExpectOneSentence(Shell(std::string(command) + " < ."), 1, "standard input cannot be read: Is a directory");
  ExpectOneSentence(Shell("$L chat -m $M --chat-template plain <&-"), 1, "standard input cannot be read: Bad file");
}

// ---- numbers

struct BadValue {
  const char* command;
  const char* said;
};

const BadValue kBadValues[] = {
    {"$L run -m $M -p x -n ''", "--predict: expected a whole number, found \"\""},
    {"$L run -m $M -p x -n 0x10", "--predict"},
    {"$L run -m $M -p x -n 3.5", "--predict"},
    {"$L run -m $M -p x -n 99999999999999999999", "99999999999999999999 is out of range"},
    {"$L run -m $M -p x -n -99999999999999999999", "is out of range"},
    {"$L run -m $M -p x --keep 99999999999999999999", "is out of range"},
    {"$L run -m $M -p x --top-k 99999999999", "--top-k: 99999999999 is out of range"},
    {"$L run -m $M -p x -n 1 -n 2", "--predict is given more than once (lesskv run --help lists what there is)"},
    {"$L eval foo", "there is no command \"foo\" (lesskv eval --help lists what there is)"},
    {"$L run -m $M -p x -c 99999999999999999999", "is out of range"},
    {"$L run -m $M -p x -c -5", "--ctx: expected a whole number from 0, found \"-5\""},
    {"$L run -m $M -p x -c ''", "--ctx"},
    {"$L run -m $M -p x -t 1025", "--threads"},
    {"$L run -m $M -p x -t ''", "--threads"},
    {"$L run -m $M -p x --temp ''", "--temp"},
    {"$L run -m $M -p x --temp 1e999", "--temp"},
    {"$L run -m $M -p x --seed ''", "--seed"},
    {"$L run -m $M -p x --seed -2", "-2"},
    {"$L run -m $M -p x --seed 99999999999999999999", "is out of range"},
    {"$L run -m $M -p x --session ''", "--session: expected a value"},
    {"$L run -m '' -p x", "--model: expected a value"},
    {"$L run -m $M -p x --kv ''", "--kv"},
    {"$L run -m $M -p x --kv 'h2o(0%)'", "above 0%"},
    {"$L bench -m $M --seed x", "--seed"},
    {"$L bench -m $M -p 8,,16", "--prompt: expected a whole number from 0, found \"\""},
    {"$L bench -m $M -p 8,", "--prompt: expected a whole number from 0, found \"\""},
    {"$L bench -m $M -n ''", "--predict: expected a value, found an empty one"},
    {"$L bench -m $M --batch 4,0", "--batch: Value 0 not in range"},
    {"$L eval recall -m $M --length 64,,128", "--length: expected a whole number from 0, found \"\""},
    {"$L eval recall -m $M --length 64,0", "--length: Value 0 not in range"},
    {"$L eval recall -m $M --depths 0,,1", "--depths: expected a number, found \"\""},
    {"$L eval recall -m $M --task kv,,needle", "--task: expected a value, found an empty one"},
    {"$L eval ruler -m $M --task ,vt", "--task: expected a value, found an empty one"},
    {"$L plan -m $M --parallel ''", "--parallel"},
    {"$L plan -m $M --kv 'elastic(γ)'", "at character 9, found 'γ'"},
    {"$L eval perplexity -m $M --text $T --step ''", "--step"},
    {"$L eval perplexity -m $M --text nowhere.txt", "nowhere.txt cannot be read: No such file"},
    {"$L info ''", "file"},
    {"$L train less -m $M --text $T -o x.gguf --layers -1", "--layers: expected a layer from 0"},
    {"$L train less -m $M --text $T -o x.gguf --layers 99999999999999999999", "--layers: expected a layer from 0"},
    {"$L train less -m $M --text $T -o x.gguf --layers 1-", "--layers: expected a layer from 0"},
    {"$L train less -m $M --text $T -o x.gguf --kv full", "'full' lets no token leave"},
    {"$L train less -m $S --text $T -o x.gguf -c 256 --kv 'h2o(100%)'", "'h2o(100%)' loses no token of a text of 256"},
    {"$L train less -m $S --text $T -o x.gguf -c 256 --kv 'h2o(5%)' 'window(5000000)'", "loses no token of a text of 256"},
    {"cp ${S%.gguf}.less.gguf m.gguf; $L train mass -m $S --text $T -o m.gguf -c 256 --kv 'h2o(100%)'; s=$?; rm m.gguf; exit $s",
     "train mass: 'h2o(100%)' loses no token of a text of 256"},
    {"cp ${S%.gguf}.less.gguf m.gguf; $L train mass -m $S --text $T -o m.gguf -c 256 --kv full; s=$?; rm m.gguf; exit $s",
     "'full' lets no token leave"},
    {"$L train less -m $M --text $T -o .", "-o .: expected a file, found a folder"},
    {"$L train less -m $M --text $T -o nowhere/x.gguf", "-o nowhere/x.gguf: there is no folder"},
    {"$L train less -m $S -o x.gguf", "no text to train on"},
    {"$L train less -m $S --text $T -o x.gguf -c 60000", "the texts hold no stretch of 60000 tokens"},
    {"$L quantize $S nowhere/x.gguf Q8_0", "OUT nowhere/x.gguf: there is no folder"},
    {"$L quantize $S /dev/full Q8_0", "OUT /dev/full: it exists and is not a regular file"},
    {"$L eval recall -m $M --heatmap nowhere/x.svg", "--heatmap nowhere/x.svg: there is no folder"},
    {"$L eval choices -m $M --file $T --batch 4", "there is no option --batch (lesskv eval choices --help"},
    {"$L eval recall -m $M --step 4", "--step is for --mode stream"},
    {"$L eval perplexity -m $M --text $T --prompt 16", "--prompt is for --mode continue"},
    {"$L eval divergence -m $M --text $T --mode continue --prompt 16 --step 4", "--step is for --mode stream"},
    {"$L run -m $M -p x these words", "nothing takes \"these\" (lesskv run --help"},
    {"$L run -m $M -p x --logit-bias 3", "--logit-bias: expected a token and a number such as 42+1.5 or 42-inf, found \"3\""},
    {"$L run -m $M -p x --logit-bias 3+", "--logit-bias: expected a token and a number"},
    {"$L run -m $M -p x --logit-bias -3+1", "--logit-bias: expected a token and a number"},
    {"$L run -m $M -p x --logit-bias 3+1+1", "--logit-bias: expected a token and a number"},
    {"$L run -m $M -p x --logit-bias 99999999999+1", "--logit-bias: expected a token and a number"},
    {"$L run -m $M -p x --logit-bias 3+101", "--logit-bias: expected a number in [-100, 100] or -inf, found 101"},
    {"$L run -m $M -p x --logit-bias 3+nan", "--logit-bias: expected a number in [-100, 100] or -inf, found nan"},
    {"$L run -m $M -p x --logit-bias 272+1", "--logit-bias: expected a token below 272, found 272"},
    {"$L chat -m $M --chat-template plain --logit-bias 272+1 < $T", "--logit-bias: expected a token below 272, found 272"},
    {"$L bench -m $M --memory 0x10M", "--memory: expected a number of bytes"},
    {"$L bench -m $M --memory 1MB", "--memory: expected a number of bytes"},
};

TEST_F(CommandLine, ValuesThatAreNoneAreRefused) {
  for (const BadValue& bad : kBadValues) {
    SCOPED_TRACE(bad.command);
    ExpectOneSentence(Shell(bad.command), 2, bad.said);
  }
  for (const auto& entry : fs::directory_iterator(folder_))  // refused before any work
    EXPECT_TRUE(entry.path().filename() == "out" || entry.path().filename() == "err") << entry.path();
}

TEST_F(CommandLine, HelpTellsDefaults) {
  const std::pair<const char*, const char*> kHelp[] = {
      {"run", "--kv SPEC=full "},
      {"run", "--temp FLOAT=0.8 "},
      {"run", "--mmap Excludes: --no-mmap "},
      {"bench", "--prompt N,...=512 "},
      {"bench", "--output FORMAT=md "},
      {"eval recall", "--depths X,...=0,0.25,0.5,0.75,1"},
      {"eval perplexity", "--step N=8 "},
      {"eval perplexity", "--prompt N "},
      {"train less", "--step UINT=[8] "},
      {"train csr", "--atoms UINT=1024 "},
  };
  for (const auto& [command, told] : kHelp) {
    const Result help = Shell(fmt::format("$L {} --help", command));
    EXPECT_EQ(help.status, 0);
    EXPECT_NE(help.out.find(told), std::string::npos) << told << " in\n" << help.out;
  }
}

TEST_F(CommandLine, ThePageOfMethodsIsWhatTheProgramSays) {
  const Result page = Shell("$L methods -o md");
  EXPECT_EQ(page.out, ReadFile(LESSKV_SOURCE_DIR "/docs/methods.md"));
  EXPECT_NE(page.out.find("| `pyramid(beta=20)` |"), std::string::npos);
  EXPECT_NE(page.out.find("| `window(rows, sinks=4,"), std::string::npos);
}

TEST_F(CommandLine, ZerosInFrontOfANumberSayNothing) {
  const Result result = Shell("$L run -m $M -p 'the sea' -n 010 --temp 0 --json -c 00100 --seed 007");
  ASSERT_EQ(result.status, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["generated_tokens"], 10);
  EXPECT_EQ(json["ctx"], 100);
  EXPECT_EQ(json["seed"], 7);
}

TEST_F(CommandLine, ASeedThatChanceChoseIsToldAndRepeatsTheText) {
  const std::string run = "$L run -m $M -p 'the sea' -n 20 --temp 1 --json --seed ";
  const Result first = Shell(run + "-1"), second = Shell(run + "-1");
  ASSERT_EQ(first.status, 0) << first.err;
  const auto json = nlohmann::json::parse(first.out);
  EXPECT_NE(json["seed"], nlohmann::json::parse(second.out)["seed"]);
  const std::string seed = json["seed"].dump();
  EXPECT_EQ(first.err, "seed        " + seed + "\n");
  EXPECT_EQ(nlohmann::json::parse(Shell(run + seed).out)["text"], json["text"]);
}

TEST_F(CommandLine, NoTokensAreNoneAndMinusOneIsAllThereIsRoomFor) {
  const Result none = Shell("$L run -m $M -p 'the sea' -n 0 --json --session s.bin");
  ASSERT_EQ(none.status, 0) << none.err;
  const auto json = nlohmann::json::parse(none.out);
  EXPECT_EQ(json["text"], "");
  EXPECT_EQ(json["generated_tokens"], 0);
  EXPECT_EQ(json["tokens_seen"], json["prompt_tokens"]);
  const std::string rest = " -n 6 --temp 0";
  EXPECT_EQ(Shell("$L run -m $M --session s.bin -p ' is wide'" + rest).out, Shell("$L run -m $M -p 'the sea is wide'" + rest).out);
  const auto all = nlohmann::json::parse(Shell("$L run -m $M -p 'the sea' -n -1 --temp 0 --json -c 40").out);
  EXPECT_EQ(all["finish"], "context");
  EXPECT_EQ(all["tokens_seen"], 40);
}

TEST_F(CommandLine, BiasesForbidAndForceTokens) {
  const std::string run = "$L run -m $M -p 'the sea' -n 6 --temp 0 --repeat-penalty 1 --json ";
  const auto said = [&](const std::string& options) {
    const Result result = Shell("q=$($L tokenize -m $M -p q --ids); q=${q##* }; " + run + options);
    EXPECT_EQ(result.status, 0) << result.err;
    return nlohmann::json::parse(result.out);
  };
  EXPECT_EQ(said("--logit-bias $q+100")["text"], "qqqqqq");
  EXPECT_EQ(said("--logit-bias $q+100 --logit-bias $q-inf")["text"], said("")["text"]);
  const auto ends = [&](const std::string& options) { return said("--logit-bias 2+100 " + options)["finish"]; };
  EXPECT_EQ(ends(""), "end");
  EXPECT_EQ(ends("--ignore-eos"), "length");
}

// ---- files

TEST_F(CommandLine, ASessionKeepsItsPermissions) {
  const std::string run = "$L run -m $M -n 3 --session s.bin -p ";
  ASSERT_EQ(Shell(run + "'the sea'").status, 0);
  ASSERT_EQ(::chmod(Path("s.bin").c_str(), 0600), 0);
  ASSERT_EQ(Shell(run + "' again'").status, 0);
  EXPECT_EQ(Mode("s.bin"), 0600u);
  ASSERT_EQ(::chmod(Path("s.bin").c_str(), 0400), 0);
  const std::string before = Read("s.bin");
  ExpectOneSentence(Shell(run + "' more'"), 2, "read-only");
  EXPECT_TRUE(Read("s.bin") == before);
}

TEST_F(CommandLine, TheTextComesOutWhereTheSessionFindsNoRoom) {
  const std::string run = "$L run -m $M -p 'the sea' -n 5 --temp 0 --json";
  const std::string text = nlohmann::json::parse(Shell(run).out)["text"];
  // No file may grow: what is printed goes through a pipe.
  Shell("{ ( ulimit -f 0; exec 2>&1; exec " + run + " --session s.bin ) ; echo $? >status; } | cat");
  const std::string out = Read("out");
  EXPECT_EQ(Read("status"), "1\n");
  EXPECT_EQ(nlohmann::json::parse(out.substr(0, out.rfind('}') + 1))["text"], text);
  EXPECT_NE(out.find("lesskv: cannot write"), std::string::npos) << out;
  EXPECT_FALSE(Exists("s.bin"));
}

// The model is mapped, and its weights are read whenever tokens come: also those that come after it was cut, which here
// is when the first ones have been answered.
TEST_F(CommandLine, AMappedModelThatIsCutShortIsASentence) {
  Shell("cp \"$S\" m.gguf");
  const Result result = Shell(
      "{ echo The sea; for i in $(seq 3000); do [ -s said ] && break; sleep 0.1; done; truncate -s 1000000 m.gguf; "
      "echo The sea; } | $L chat -m m.gguf --mmap -n 3 --temp 0 --ignore-eos --chat-template plain >said");
  ExpectOneSentence(result, 1, "a mapped file was cut short");
}

TEST_F(CommandLine, NamesThatTheSystemRefusesAreASentence) {
  fs::create_symlink("loop", folder_ / "loop");
  const std::string name(300, 'n');
  for (const std::string& bad : {std::string("loop"), name}) {
    const char* said = bad == "loop" ? "symbolic links" : "name too long";
    for (const char* command : {"$L run -m $M -p x --session {}", "$L run -m {} -p x", "$L run -m $M -f {}",
                                "$L info {}", "$L eval perplexity -m $M --text {}", "$L eval choices -m $M --file {}",
                                "$L train less -m $M --text $T -o {}", "$L train less -m $M --text {} -o x.gguf --kv 'h2o(8)'",
                                "$L train less -m $M --text $T -o x.gguf --sequences 2 -c 16 --kv 'h2o(4)' --work {}",
                                "$L run -m $M -p x --kv 'h2o(5%)+less(file=\"{}\")'"}) {
      const Result result = Shell(fmt::format(fmt::runtime(command), bad));
      SCOPED_TRACE(command);
      EXPECT_EQ(result.out, "");
      EXPECT_TRUE(result.status == 1 || result.status == 2);
      EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
      EXPECT_EQ(result.err.find("unexpected"), std::string::npos) << result.err;
      std::string lower = result.err;
      std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
      EXPECT_NE(lower.find(said), std::string::npos) << result.err;
    }
    const Result result = Shell("$L quantize $M " + bad + " F16");
    EXPECT_EQ(result.status, 2) << result.err;
    EXPECT_TRUE(fs::is_symlink(folder_ / "loop"));
  }
}

TEST_F(CommandLine, WhatEditorsAddToAPromptIsLeftOut) {
  const std::string rest = " -m $M -n 9 --temp 0 --json";
  const auto text = [&](const std::string& command) { return nlohmann::json::parse(Shell(command + rest).out)["text"]; };
  const auto plain = text("$L run -p 'the sea'");
  Write("crlf", "the sea\r\n");
  Write("mark", "\xef\xbb\xbfthe sea");
  EXPECT_EQ(text("$L run -f crlf"), plain);
  EXPECT_EQ(text("$L run -f mark"), plain);
  EXPECT_EQ(text("cat crlf | $L run"), plain);
  Write("two", "the sea\n\n");  // only the last one
  EXPECT_EQ(text("$L run -f two"), text("$L run -p 'the sea\n'"));
}

TEST_F(CommandLine, LocalLayersAreToldBesideTheCache) {
  const std::string gemma = Path("gemma3.gguf");
  ASSERT_EQ(Shell("$L convert " LESSKV_SOURCE_DIR "/tests/data/huggingface/gemma3 " + gemma + " --type f16").status, 0);
  const auto local = nlohmann::json::parse(Shell("$L info --json " + gemma).out);
  const auto n = local["n_local_layers"].get<size_t>(), window = local["local_window"].get<size_t>();
  ASSERT_GT(n, 0u);
  const std::string run = Shell("$L run -p 'the sea' -n 3 -m " + gemma).err;
  EXPECT_NE(run.find(fmt::format("local       {} layers keep a window of {} tokens", n, window)), std::string::npos) << run;
  EXPECT_EQ(Shell("$L run -p 'the sea' -n 3 -m $M").err.find("local  "), std::string::npos);
  const std::string table = Shell("$L eval perplexity --text $T --max-windows 1 -c 64 -m " + gemma).out;
  EXPECT_NE(table.find(fmt::format("n_local_layers {}, local_window {}", n, window)), std::string::npos) << table;
}

// ---- terminals

// What the command writes to a terminal of that many columns.
std::string OnTerminal(const std::string& command, unsigned short columns) {
  int terminal = -1;
  winsize size{.ws_row = 24, .ws_col = columns, .ws_xpixel = 0, .ws_ypixel = 0};
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  if (child == 0) {
    ::execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    ::_exit(127);
  }
  std::string seen;
  char piece[4096];
  for (ssize_t n; (n = ::read(terminal, piece, sizeof piece)) > 0;) seen.append(piece, static_cast<size_t>(n));
  ::close(terminal);
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << seen;
  return std::regex_replace(seen, std::regex("\r\n"), "\n");
}

size_t LongestLine(const std::string& seen) {
  size_t longest = 0, line = 0;
  for (const char c : seen) {
    line = c == '\r' || c == '\n' ? 0 : c == '\b' ? line - 1 : line + 1;
    longest = std::max(longest, line);
  }
  return longest;
}

TEST_F(CommandLine, ProgressFitsTheTerminal) {
  const std::string command =
      Variables() + "$L eval perplexity -m $M --text $T --max-windows 4 --step 16 --batch 1 >/dev/null";
  const std::string wide = OnTerminal("export TERM=xterm; " + command, 100);
  EXPECT_NE(wide.find("\rperplexity [##"), std::string::npos) << wide;
  EXPECT_EQ(wide.find('\x1b'), std::string::npos) << wide;
  for (const unsigned short columns : {30, 16, 5}) {
    const std::string narrow = OnTerminal("export TERM=xterm; " + command, columns);
    EXPECT_NE(narrow.find("\rper"), std::string::npos) << narrow;
    EXPECT_LT(LongestLine(narrow), columns) << narrow;
  }
  for (const char* terminal : {"export TERM=dumb; ", "unset TERM; "})
    EXPECT_EQ(OnTerminal(terminal + command, 100), "") << terminal;
}

TEST_F(CommandLine, WhatQuantizeSaysStandsOnALineOfItsOwn) {
  const std::string seen = OnTerminal(Variables() + "export TERM=xterm; $L quantize $M " + Path("q.gguf") + " F16", 100);
  EXPECT_NE(seen.find("100%"), std::string::npos) << seen;
  EXPECT_NE(seen.find("\r" + Path("q.gguf") + ": "), std::string::npos) << seen;
}

}  // namespace
}  // namespace lesskv
