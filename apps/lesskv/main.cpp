// The lesskv program: parse, call, print. Exit status: 0 done, 1 failed while running, 2 bad usage or bad input.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <new>
#include <string>
#include <system_error>

#include "base/interrupt.h"
#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "engine/run_info.h"
#include "kernels/basic/cpu.h"

namespace lesskv {
namespace {

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

int Complain(int status, std::string message) {
  for (char& c : message)
    if (c == '\n') c = ' ';
  Say("lesskv: {}\n", message);
  return status;
}

// What an option takes and its default: CLI11 leaves the default out behind a word of ours for the value, and tells
// the checks of a value as a part of its type.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_items_expected_max() == 0) return CLI::Formatter::make_option_opts(option);  // a flag
    const std::string type = option->get_type_name(), word = option->get_option_text(), standard = option->get_default_str();
    return " " + (word.empty() ? type.substr(0, type.find(':')) : word) + (standard.empty() ? "" : "=" + standard);
  }
};

void AddCommands(CLI::App& app) {
  AddRunCommand(app);
  AddChatCommand(app);
  AddServeCommand(app);
  AddInfoCommand(app);
  AddQuantizeCommand(app);
  AddConvertCommand(app);
  AddEvalCommand(app);
  AddBenchCommand(app);
  AddMethodsCommand(app);
  AddPlanCommand(app);
  AddTrainCommand(app);
  AddTokenizeCommand(app);
  RequirePlainValues(app);
}

// The first words name a command and, where it has them, one of its own: "lesskv eval recall".
struct NamedCommand {
  std::string words;
  const char* unknown = nullptr;  // the word behind them that names none
};

NamedCommand ReadCommand(const CLI::App* app, int argc, char** argv) {
  NamedCommand command{app->get_name()};
  for (int i = 1; i < argc && argv[i][0] != '-' && !app->get_subcommands({}).empty(); ++i) {
    const auto found = app->get_subcommands([&](const CLI::App* known) { return known->get_name() == argv[i]; });
    if (found.empty()) {
      command.unknown = argv[i];
      return command;
    }
    app = found.front();
    command.words += " " + app->get_name();
  }
  return command;
}

// What was wrong with the words, in ours where CLI11's say little. Numbers are numbers when it converts them.
std::string Sentence(const CLI::ParseError& error) {
  const std::string text = error.what();
  if (const size_t end = text.find(": At Most 1 required but received"); end != std::string::npos)
    return text.substr(0, end) + " is given more than once";
  constexpr std::string_view kConvert = "Could not convert: ";
  const size_t equals = text.find(" = ");
  if (text.starts_with(kConvert) && equals != std::string::npos)
    return fmt::format("{}: {} is out of range", text.substr(kConvert.size(), equals - kConvert.size()),
                       text.substr(equals + 3));
  return text;
}

// The first of the words that nothing takes; options say more than what stands behind them.
std::string NotTaken(const std::vector<std::string>& words) {
  const auto option = std::ranges::find_if(words, [](const std::string& word) { return word.starts_with('-'); });
  return option == words.end() ? fmt::format("nothing takes \"{}\"", words.front()) : "there is no option " + *option;
}

// Parsing runs the chosen command's callback.
int Run(int argc, char** argv) {
  CLI::App app("Runs large language models with a key-value cache that stays small.", "lesskv");
  app.set_version_flag("--version", "lesskv " + Version());
  app.require_subcommand(1);
  app.formatter(std::make_shared<HelpFormatter>());  // of the commands, too
  AddCommands(app);
  app.parse_complete_callback([] { ActiveIsa(); });  // refuses a bad LESSKV_ISA, before any command begins
  const NamedCommand command = ReadCommand(&app, argc, argv);
  const std::string hint = fmt::format("({} --help lists what there is)", command.words);
  if (command.unknown != nullptr)
    return Complain(kBadUsage, fmt::format("there is no command \"{}\" {}", command.unknown, hint));
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {  // --help and --version
    app.exit(help);
    FlushResults();
    return 0;
  } catch (const CLI::ExtrasError&) {
    return Complain(kBadUsage, fmt::format("{} {}", NotTaken(app.remaining(true)), hint));
  } catch (const CLI::ParseError& error) {
    return Complain(kBadUsage, fmt::format("{} {}", Sentence(error), hint));
  }
  FlushResults();
  return 0;
}

// The number of a closed standard stream would be the next opened file's, and words for people would go into that file.
// What takes its place here refuses to be used, as the closed stream would.
void OccupyClosedStreams() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(fd, F_GETFD) == -1) static_cast<void>(::open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY));
}

// A page of a mapped file that is no longer there (SIGBUS): nothing can go on, but it can be told why. Threads that read
// side by side meet it at once: the first one tells it and ends the program, the others wait for that.
void EndOnLostPage(int) {
  static std::atomic_flag told;
  while (told.test_and_set()) ::pause();
  constexpr char kWhy[] = "lesskv: a mapped file was cut short, or could not be read, while it was in use\n";
  static_cast<void>(!::write(STDERR_FILENO, kWhy, sizeof kWhy - 1));
  ::_exit(kFailed);
}

int Answer(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const Error& error) {
    return Complain(error.ExitStatus(), error.what());
  } catch (const std::bad_alloc&) {
    return Complain(kFailed, "memory ran out");
  } catch (const std::filesystem::filesystem_error& error) {
    return Complain(kBadUsage, fmt::format("{} cannot be used: {}", error.path1().string(), error.code().message()));
  } catch (const std::system_error& error) {
    return Complain(kFailed, fmt::format("the system refused: {}", error.what()));
  } catch (const std::exception& error) {
    return Complain(kFailed, fmt::format("unexpected failure: {}", error.what()));
  }
}

int Main(int argc, char** argv) {
  OccupyClosedStreams();
  TakeInterrupts();
  // A reader that went away, a file as large as files may be: errors of writing, told in a sentence.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGBUS, EndOnLostPage);
  const int status = Answer(argc, argv);
  return WordsWereLost() && status == 0 ? kFailed : status;
}

}  // namespace
}  // namespace lesskv

int main(int argc, char** argv) { return lesskv::Main(argc, argv); }
