// The program's commands. Each adds its subcommand, whose callback does the work: it throws lesskv::Error for bad input
// and prints results to standard output. A new command is a file, a line here and a line in main.cpp.
#pragma once

#include <CLI/CLI.hpp>

namespace lesskv {

void AddRunCommand(CLI::App& app);
void AddChatCommand(CLI::App& app);
void AddServeCommand(CLI::App& app);
void AddInfoCommand(CLI::App& app);
void AddQuantizeCommand(CLI::App& app);
void AddConvertCommand(CLI::App& app);
void AddEvalCommand(CLI::App& app);
void AddBenchCommand(CLI::App& app);
void AddTrainCommand(CLI::App& app);
void AddTrainMass(CLI::App& train);
void AddMethodsCommand(CLI::App& app);
void AddPlanCommand(CLI::App& app);
void AddTokenizeCommand(CLI::App& app);

}  // namespace lesskv
