// lesskv info: what is in a model file. Reads any sound GGUF file, also of architectures that cannot be run.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>

#include "commands.h"
#include "common.h"
#include "base/memory.h"
#include "engine/run_info.h"
#include "format/gguf.h"
#include "kvcache/cache_shape.h"
#include "model/config.h"

namespace lesskv {
namespace {

struct InfoOptions {
  std::string file;
  bool tensors = false;
  bool json = false;
};

struct TypeTotal {
  size_t tensors = 0, parameters = 0, bytes = 0;
};
using TypeTotals = std::map<std::string_view, TypeTotal>;

TypeTotals CountTypes(const GgufFile& file) {
  TypeTotals totals;
  for (const GgufTensor& tensor : file.tensors()) {
    TypeTotal& total = totals[Traits(tensor.type).name];
    ++total.tensors;
    total.parameters += tensor.Elements();
    total.bytes += tensor.data.size();
  }
  return totals;
}

TypeTotal Sum(const TypeTotals& totals) {
  TypeTotal sum;
  for (const auto& [name, total] : totals) {
    sum.tensors += total.tensors;
    sum.parameters += total.parameters;
    sum.bytes += total.bytes;
  }
  return sum;
}

// A string value, or nothing when the key is absent or of another type: info shows odd files, it does not judge them.
std::string StringOr(const GgufFile& file, std::string_view key, std::string fallback = "") {
  const GgufValue* value = file.Find(key);
  if (value == nullptr || value->is_array()) return fallback;
  return value->Element<std::string>(0).value_or(fallback);
}

std::string_view TokenizerKind(std::string_view model) {
  if (model == "llama") return "SentencePiece";
  if (model == "gpt2") return "byte-level BPE";
  return "not supported";
}

// Of a model that can be run; other files have none.
LocalLayers CountLocal(const GgufFile& file) {
  try {
    const ModelConfig config = ReadModelConfig(file);
    return {static_cast<size_t>(std::count(config.local.begin(), config.local.end(), true)), config.window};
  } catch (const Error&) {
    return {};
  }
}

// ---- JSON

Json ScalarJson(const GgufValue& value, size_t i) {
  if (const auto text = value.Element<std::string>(i)) return *text;
  if (const auto truth = value.Element<bool>(i)) return *truth;
  if (const auto number = value.Element<uint64_t>(i)) return *number;
  if (const auto number = value.Element<int64_t>(i)) return *number;
  return *value.Element<double>(i);
}

// Long arrays (vocabularies) are only described.
Json ValueJson(const GgufValue& value) {
  constexpr size_t kShown = 64;
  if (!value.is_array()) return ScalarJson(value, 0);
  if (value.size() > kShown) return {{"type", value.TypeName()}, {"count", value.size()}};
  Json array = Json::array();
  for (size_t i = 0; i < value.size(); ++i) array.push_back(ScalarJson(value, i));
  return array;
}

Json TokenizerJson(const GgufFile& file) {
  const GgufValue* tokens = file.Find("tokenizer.ggml.tokens");
  if (tokens == nullptr) return nullptr;
  const std::string model = StringOr(file, "tokenizer.ggml.model");
  return {{"model", model},
          {"kind", TokenizerKind(model)},
          {"pre", StringOr(file, "tokenizer.ggml.pre")},
          {"tokens", tokens->size()}};
}

Json TensorsJson(const GgufFile& file) {
  Json tensors = Json::array();
  for (const GgufTensor& tensor : file.tensors()) {
    tensors.push_back({{"name", tensor.name},
                       {"part", tensor.part + 1},
                       {"type", Traits(tensor.type).name},
                       {"shape", std::vector<size_t>(tensor.ne.begin(), tensor.ne.begin() + tensor.n_dims)},
                       {"offset", tensor.file_offset},
                       {"bytes", tensor.data.size()}});
  }
  return tensors;
}

Json InfoJson(const GgufFile& file, bool with_tensors) {
  const TypeTotals totals = CountTypes(file);
  Json json;
  json["file"] = file.name();
  json["file_bytes"] = file.file_bytes();
  json["parts"] = file.n_parts();
  json["gguf_version"] = file.version();
  json["alignment"] = file.alignment();
  json["fingerprint"] = FingerprintString(file.Fingerprint());
  json["identity"] = FingerprintString(file.Identity());
  json["name"] = StringOr(file, "general.name");
  json["architecture"] = StringOr(file, "general.architecture");
  json["parameters"] = Sum(totals).parameters;
  json["types"] = Json::object();
  for (const auto& [name, total] : totals) {
    json["types"][std::string(name)] = {
        {"tensors", total.tensors}, {"parameters", total.parameters}, {"bytes", total.bytes}};
  }
  if (const LocalLayers local = CountLocal(file); local.n_layers > 0) {
    json["n_local_layers"] = local.n_layers;
    json["local_window"] = local.window;
  }
  json["tokenizer"] = TokenizerJson(file);
  json["metadata"] = Json::object();
  for (const auto& [key, value] : file.metadata()) json["metadata"][std::string(key)] = ValueJson(value);
  if (with_tensors) json["tensors"] = TensorsJson(file);
  return json;
}

// ---- text; strings come from the file, so whatever could steer a terminal is escaped

std::string ScalarText(const GgufValue& value, size_t i) {
  if (const auto text = value.Element<std::string_view>(i)) return Quoted(*text);
  if (const auto truth = value.Element<bool>(i)) return *truth ? "true" : "false";
  if (const auto number = value.Element<uint64_t>(i)) return fmt::format("{}", *number);
  if (const auto number = value.Element<int64_t>(i)) return fmt::format("{}", *number);
  // As many digits as the stored type has: 1e-05, not 9.999999747378752e-06.
  if (value.element_type() == GgufType::kFloat32) return fmt::format("{}", *value.Element<float>(i));
  return fmt::format("{}", *value.Element<double>(i));
}

std::string ValueText(const GgufValue& value) {
  constexpr size_t kShown = 8;
  if (!value.is_array()) return ScalarText(value, 0);
  if (value.size() > kShown) return fmt::format("array of {} {}", value.size(), GgufTypeName(value.element_type()));
  std::string text = "[";
  for (size_t i = 0; i < value.size(); ++i) text += (i == 0 ? "" : ", ") + ScalarText(value, i);
  return text + "]";
}

std::string Unquoted(std::string_view text) {
  const std::string quoted = Quoted(text);
  return quoted.substr(1, quoted.size() - 2);
}

// 1234567 as "1,234,567".
std::string Grouped(size_t number) {
  std::string digits = fmt::format("{}", number);
  for (size_t i = digits.size(); i > 3; i -= 3) digits.insert(i - 3, ",");
  return digits;
}

void PrintLine(std::string_view label, const std::string& text) { WriteResult(fmt::format("{:<14}{}\n", label, text)); }

void PrintSummary(const GgufFile& file) {
  const TypeTotals totals = CountTypes(file);
  const TypeTotal sum = Sum(totals);
  const std::string parts = file.n_parts() > 1 ? fmt::format(" in {} parts", file.n_parts()) : "";
  PrintLine("file", fmt::format("{}, {}{}, GGUF version {}, alignment {}", file.name(), HumanBytes(file.file_bytes()),
                                parts, file.version(), file.alignment()));
  PrintLine("fingerprint", FingerprintString(file.Fingerprint()));
  PrintLine("identity", FingerprintString(file.Identity()));
  PrintLine("name", Unquoted(StringOr(file, "general.name", "none given")));
  PrintLine("architecture", Unquoted(StringOr(file, "general.architecture", "none given")));
  PrintLine("parameters",
            fmt::format("{} in {} tensors, {}", Grouped(sum.parameters), sum.tensors, HumanBytes(sum.bytes)));
  for (const auto& [name, total] : totals) {
    PrintLine("", fmt::format("{:<6} {:>14} in {} tensors, {}", name, Grouped(total.parameters), total.tensors,
                              HumanBytes(total.bytes)));
  }
  if (const LocalLayers local = CountLocal(file); local.n_layers > 0)
    PrintLine("local layers", fmt::format("{}, which keep a window of {} tokens; a cache spec is about the other layers",
                                          local.n_layers, local.window));
  const GgufValue* tokens = file.Find("tokenizer.ggml.tokens");
  if (tokens == nullptr) return PrintLine("tokenizer", "none");
  const std::string model = StringOr(file, "tokenizer.ggml.model"), pre = StringOr(file, "tokenizer.ggml.pre");
  PrintLine("tokenizer", fmt::format("{} ({}{}{}), {} tokens", Unquoted(model), TokenizerKind(model),
                                     pre.empty() ? "" : ", pre-tokenizer ", Unquoted(pre), Grouped(tokens->size())));
}

void PrintMetadata(const GgufFile& file) {
  size_t width = 0;
  for (const auto& [key, value] : file.metadata()) width = std::max(width, std::min<size_t>(key.size(), 48));
  WriteResult("\nmetadata\n");
  for (const auto& [key, value] : file.metadata()) {
    WriteResult(fmt::format("  {:<{}}  {}\n", Unquoted(key), width, ValueText(value)));
  }
}

void PrintTensors(const GgufFile& file) {
  size_t width = 0;
  for (const GgufTensor& tensor : file.tensors()) width = std::max(width, tensor.name.size());
  WriteResult("\ntensors (row length first)\n");
  for (const GgufTensor& tensor : file.tensors()) {
    WriteResult(fmt::format("  {:<{}}  {:<6} {:>12}  {}\n", Unquoted(tensor.name), width, Traits(tensor.type).name,
                            HumanBytes(tensor.data.size()), tensor.ShapeString()));
  }
}

void RunInfo(const InfoOptions& options) {
  const GgufFile file = GgufFile::Open(options.file);
  if (options.json) return WriteResult(Dump(InfoJson(file, options.tensors)) + "\n");
  PrintSummary(file);
  PrintMetadata(file);
  if (options.tensors) PrintTensors(file);
}

}  // namespace

void AddInfoCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("info", "Show what is in a model file");
  auto options = std::make_shared<InfoOptions>();
  command->add_option("file", options->file, "Model file (GGUF)")->required()->option_text("FILE.gguf");
  command->add_flag("-v,--tensors", options->tensors, "List the tensors too");
  command->add_flag("--json", options->json, "Print one JSON object");
  command->callback([options] { RunInfo(*options); });
}

}  // namespace lesskv
