// lesskv tokenize: text in, tokens out. Reads the vocabulary of a model file only, also of models that cannot be run.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>

#include "base/error.h"
#include "commands.h"
#include "common.h"
#include "engine/run_info.h"
#include "format/gguf.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

namespace lesskv {
namespace {

struct TokenizeOptions {
  std::string model, prompt, file;
  bool has_prompt = false, has_file = false;
  bool ids = false, pieces = false, count = false;  // none: all of them
  std::string output = "text";
  bool special = false;
  bool no_bos = false;
};

constexpr const char* kHelp = R"(A line for each token: its id and its piece; or what --ids, --pieces or --count ask for.
A piece is the text of a token in quotes, with \n, \t, \r and \xNN for what cannot be printed.
With -o json: an object with count, ids and pieces, or the one asked for, on one line; a piece that is not
whole UTF-8 is an array of its bytes.
With --special the ids are those that lesskv run reads for the same prompt.)";

// A character, or one byte of damaged UTF-8, as it may be printed: nothing in it can steer a terminal.
std::string Escaped(std::string_view character) {
  if (character == "\n") return "\\n";
  if (character == "\t") return "\\t";
  if (character == "\r") return "\\r";
  if (character == "\"" || character == "\\") return "\\" + std::string(character);
  const auto first = static_cast<uint8_t>(character[0]), last = static_cast<uint8_t>(character.back());
  const bool control = first < 0x20 || first == 0x7F || (first == 0xC2 && last < 0xA0);
  const bool damaged = first >= 0x80 && character.size() == 1;
  if (!control && !damaged) return std::string(character);
  std::string text;
  for (const char byte : character) text += fmt::format("\\x{:02X}", static_cast<uint8_t>(byte));
  return text;
}

std::string InQuotes(std::string_view bytes) {
  std::string text = "\"";
  for (size_t pos = 0; pos < bytes.size();) {
    const size_t n = std::max<size_t>(Utf8CharBytes(bytes, pos), 1);
    text += Escaped(bytes.substr(pos, n));
    pos += n;
  }
  return text + "\"";
}

Json PieceJson(std::string_view bytes) {
  if (ReplaceInvalidUtf8(bytes) == bytes) return std::string(bytes);
  Json array = Json::array();
  for (const char byte : bytes) array.push_back(static_cast<uint8_t>(byte));
  return array;
}

std::string JsonText(const TokenizeOptions& o, const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  const bool all = !o.ids && !o.pieces && !o.count;
  Json json;
  if (all || o.count) json["count"] = ids.size();
  if (all || o.ids) json["ids"] = ids;
  if (all || o.pieces) {
    json["pieces"] = Json::array();
    for (const int32_t id : ids) json["pieces"].push_back(PieceJson(tokenizer.TokenBytes(id)));
  }
  return Dump(json, -1) + "\n";
}

std::string PlainText(const TokenizeOptions& o, const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  if (o.count) return fmt::format("{}\n", ids.size());
  if (o.ids) return fmt::format("{}\n", fmt::join(ids, " "));
  std::string text;
  for (const int32_t id : ids) {
    if (!o.pieces) text += fmt::format("{:>7}  ", id);
    text += InQuotes(tokenizer.TokenBytes(id)) + "\n";
  }
  return text;
}

void RunTokenize(const TokenizeOptions& o) {
  if (o.output != "text" && o.output != "json")
    Fail(ErrorCode::kInvalidArgument, "-o: expected text or json, found \"{}\"", o.output);
  const std::string text = PromptText(o.has_prompt ? &o.prompt : nullptr, o.has_file ? &o.file : nullptr);
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(GgufFile::Open(o.model)));
  const std::vector<int32_t> ids = tokenizer->Encode(text, !o.no_bos, o.special);
  WriteResult(o.output == "json" ? JsonText(o, *tokenizer, ids) : PlainText(o, *tokenizer, ids));
  FlushResults();
}

}  // namespace

void AddTokenizeCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("tokenize", "Show the tokens that a text becomes");
  command->footer(kHelp);
  auto options = std::make_shared<TokenizeOptions>();
  TokenizeOptions& o = *options;
  command->add_option("-m,--model", o.model, "Model file (GGUF); its vocabulary is enough")->required()
      ->option_text("MODEL");
  command->add_option("-p,--prompt", o.prompt, "Text")->option_text("TEXT");
  command->add_option("-f,--file", o.file, "File with the text, - for standard input; a last newline is left out")
      ->option_text("FILE");
  CLI::Option* ids = command->add_flag("--ids", o.ids, "Only the ids, on one line");
  CLI::Option* pieces = command->add_flag("--pieces", o.pieces, "Only the pieces");
  CLI::Option* count = command->add_flag("--count", o.count, "Only the number of tokens");
  ids->excludes(pieces)->excludes(count);
  pieces->excludes(count);
  command->add_option("-o,--output", o.output, "text or json")->capture_default_str()->option_text("FORMAT");
  command->add_flag("--special", o.special, "Texts of control tokens, such as <|im_end|>, become those tokens");
  command->add_flag("--no-bos", o.no_bos, "Leave out the BOS and EOS tokens that the model wants around a text");
  command->callback([command, options] {
    options->has_prompt = command->count("--prompt") > 0;
    options->has_file = command->count("--file") > 0;
    RunTokenize(*options);
  });
}

}  // namespace lesskv
