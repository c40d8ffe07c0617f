// lesskv convert: a Hugging Face model directory to one model file.
#include "convert/convert.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <filesystem>
#include <memory>
#include <string>

#include "base/memory.h"
#include "base/threads.h"
#include "commands.h"
#include "common.h"

namespace lesskv {
namespace {

struct Options {
  std::string in, out, type;
  int threads = 0;
};

std::optional<DType> ParseType(std::string name) {
  if (name.empty()) return std::nullopt;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
  for (const DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kQ4_0})
    if (Traits(type).name == name) return type;
  Fail(ErrorCode::kInvalidArgument, "--type: unknown type {}, expected F32, F16, BF16, Q8_0 or Q4_0", Quoted(name));
}

void Run(const Options& options) {
  const ThreadPool pool(options.threads);
  const ThreadScope scope(pool);
  CheckOutputPath("OUT", options.out);
  const std::atomic<bool>& stop = StopOnInterrupt();
  ProgressBar bar("convert");
  const auto progress = [&](double done) {
    if (stop) Fail(ErrorCode::kRuntime, "interrupted; nothing was written");
    bar.Show(done);
  };
  const ConvertReport report =
      Convert({.in = options.in, .out = options.out, .type = ParseType(options.type), .progress = progress});
  bar.Clear();
  for (const std::string& note : report.notes) Say("{}{}\n", note.starts_with("warning: ") ? "" : "note: ", note);
  Say("{}: {}, {}; the weights were {}\n", options.out, Traits(report.type).name,
      HumanBytes(std::filesystem::file_size(options.out)), HumanBytes(report.bytes_read));
}

}  // namespace

void AddConvertCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("convert", "Make a model file from a Hugging Face directory");
  auto options = std::make_shared<Options>();
  command->add_option("in", options->in, "Directory with config.json, safetensors files and tokenizer.json")
      ->required()
      ->option_text("DIR");
  command->add_option("out", options->out, "File to write (GGUF)")->required()->option_text("OUT");
  command
      ->add_option("--type", options->type,
                   "Type of matrices: F32, F16, BF16, Q8_0 or Q4_0 (default: as the embedding is stored)")
      ->option_text("TYPE");
  command->add_option("-t,--threads", options->threads, "Threads (default: all CPUs)")->option_text("N");
  command->callback([options] { Run(*options); });
}

}  // namespace lesskv
