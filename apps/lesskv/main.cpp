// The lesskv program: parse, call, print. Exit status: 0 done, 1 failed while running, 2 bad usage or bad input.
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
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

// The first words name a command and, where it has them, one of its own; the word that names none, or null.
const char* UnknownCommand(const CLI::App* app, int argc, char** argv) {
  for (int i = 1; i < argc && argv[i][0] != '-' && !app->get_subcommands({}).empty(); ++i) {
    const auto named = [&](const CLI::App* command) { return command->get_name() == argv[i]; };
    const auto found = app->get_subcommands(named);
    if (found.empty()) return argv[i];
    app = found.front();
  }
  return nullptr;
}

// Parsing runs the chosen command's callback.
int Run(int argc, char** argv) {
  CLI::App app("Runs large language models with a key-value cache that stays small.", "lesskv");
  app.set_version_flag("--version", "lesskv " + Version());
  app.require_subcommand(1);
  AddCommands(app);
  app.parse_complete_callback([] { ActiveIsa(); });  // refuses a bad LESSKV_ISA, before any command begins
  if (const char* unknown = UnknownCommand(&app, argc, argv))
    return Complain(kBadUsage, fmt::format("there is no command \"{}\" (lesskv --help lists what there is)", unknown));
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {  // --help and --version
    app.exit(help);
    FlushResults();
    return 0;
  } catch (const CLI::ParseError& error) {
    return Complain(kBadUsage, fmt::format("{} (lesskv --help lists what there is)", error.what()));
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
