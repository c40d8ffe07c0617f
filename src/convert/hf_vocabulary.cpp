#include "convert/hf_vocabulary.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <unordered_map>

#include "base/error.h"
#include "convert/hf_pre_tokenizer.h"
#include "format/gguf.h"  // Quoted
#include "tokenizer/vocabulary.h"

namespace lesskv {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581

std::string WithPlainSpaces(std::string text) {
  for (size_t pos = 0; (pos = text.find(kSpaceMark, pos)) != std::string::npos; ++pos)
    text.replace(pos, kSpaceMark.size(), " ");
  return text;
}

// Texts that stand for marks of templates though no file calls them special: in plain text they stay text.
bool LooksSpecial(std::string_view text) {
  return (text.starts_with("<|") && text.ends_with("|>")) || (text.starts_with("<\uFF5C") && text.ends_with("\uFF5C>"));
}

std::string ReadWhole(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (!in) Fail(ErrorCode::kIo, "cannot read {}", path);
  return text;
}

class Reader {
 public:
  Reader(const HfDirectory& directory, size_t n_rows) : directory_(directory), n_rows_(n_rows) {
    if (!directory.HasFile("tokenizer.json"))
      Fail(ErrorCode::kNotFound, "{} has no tokenizer.json; tokenizer.model and vocab.json files are not read",
           directory.path());
    tokenizer_json_ = LoadJsonObject(directory.File("tokenizer.json"));
    tokenizer_config_json_ = directory.OptionalJson("tokenizer_config.json");
    generation_config_json_ = directory.OptionalJson("generation_config.json");
  }

  HfVocabulary Read() {
    const JsonReader model = tokenizer_.Object("model");
    if (model.Text("type") != "BPE") model.Refuse("type", "\"BPE\"");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (!model.TextOr(key, "").empty()) model.Refuse(key, "none");
    ReadTokens(model);
    ReadAddedTokens();
    if (IsByteLevel(tokenizer_)) {
      ReadByteLevel(model);
    } else if (model.TruthOr("byte_fallback", false)) {
      ReadSentencePiece(model);
    } else {
      model.Refuse("byte_fallback", "true, as the pre_tokenizer is not ByteLevel", "false");
    }
    FitRows();
    ReadSpecialIds();
    ReadPostProcessor();
    ReadChatTemplate();
    return std::move(v_);
  }

 private:
  bool sentence_piece() const { return v_.model == "llama"; }

  void SetToken(const std::string& text, const Json& id, const JsonReader& where, TokenType type) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= kMaxTokens)
      where.Refuse(Quoted(text), fmt::format("an id below {}", kMaxTokens), Quoted(id.dump()));
    const size_t index = id.get<size_t>();
    if (index >= v_.tokens.size()) {
      v_.tokens.resize(index + 1);
      v_.types.resize(index + 1, static_cast<int32_t>(TokenType::kUnused));
    }
    if (!v_.tokens[index].empty() && v_.tokens[index] != text)
      where.Refuse(Quoted(text), fmt::format("an id of its own, but {} has the same", Quoted(v_.tokens[index])),
                   fmt::format("{}", index));
    v_.tokens[index] = text;
    v_.types[index] = static_cast<int32_t>(type);
    ids_[text] = static_cast<uint32_t>(index);
  }

  void ReadTokens(const JsonReader& model) {
    const JsonReader vocab = model.Object("vocab");
    for (const auto& [text, id] : model.Find("vocab")->items()) SetToken(text, id, vocab, TokenType::kNormal);
    if (v_.tokens.empty()) model.Refuse("vocab", "tokens", "none");
    n_base_ = v_.tokens.size();
  }

  void ReadAddedTokens() {
    if (!tokenizer_.Has("added_tokens")) return;
    const Json& added = tokenizer_.Array("added_tokens");
    for (size_t i = 0; i < added.size(); ++i) {
      if (!added[i].is_object()) tokenizer_.Refuse("added_tokens", "an array of objects");
      const JsonReader token(added[i], fmt::format("{}: added_tokens: {}", tokenizer_.where(), i));
      const std::string text = token.Text("content");
      if (text.empty()) token.Refuse("content", "a text that is not empty");
      const bool special = token.TruthOr("special", false) || LooksSpecial(text);
      if (token.Find("id") == nullptr) token.Refuse("id", "a number");
      SetToken(text, *token.Find("id"), token, special ? TokenType::kControl : TokenType::kUserDefined);
      v_.strips_behind_special |= special && token.TruthOr("rstrip", false);
      if (token.TruthOr("lstrip", false) || token.TruthOr("single_word", false))
        v_.notes.push_back(
            fmt::format("token {} is found in other surroundings than tokenizer.json says", Quoted(text)));
    }
  }

  std::vector<std::pair<std::string, std::string>> Merges(const JsonReader& model) const {
    std::vector<std::pair<std::string, std::string>> merges;
    for (const Json& merge : model.Array("merges")) {
      if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
        continue;
      }
      const std::string text = merge.is_string() ? merge.get<std::string>() : "";
      const size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
        model.Refuse("merges", "pairs of texts", Quoted(merge.dump(-1, ' ', true, Json::error_handler_t::replace)));
      merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    }
    return merges;
  }

  void ReadByteLevel(const JsonReader& model) {
    v_.model = "gpt2";
    v_.pre = RecognisePreTokenizer(tokenizer_, model.TruthOr("ignore_merges", false));
    for (const auto& [left, right] : Merges(model)) v_.merges.push_back(left + " " + right);
    if (tokenizer_.Has("normalizer"))
      v_.notes.emplace_back("text is not composed (NFC) before it is tokenized, as tokenizer.json would have it");
  }

  // Scores from the order of merges: the pair whose piece comes first is merged first, as SentencePiece does by scores.
  void ReadSentencePiece(const JsonReader& model) {
    v_.model = "llama";
    const SpaceRules spaces = ReadSpaceRules(tokenizer_);
    v_.add_space_prefix = spaces.prefix;
    if (spaces.only_at_start)
      v_.notes.emplace_back(
          "a space is put behind special tokens, too, where tokenizer.json has one at the start only");
    if (model.TruthOr("ignore_merges", false)) model.Refuse("ignore_merges", "false");
    v_.scores.assign(v_.tokens.size(), 0);
    const std::vector<std::pair<std::string, std::string>> merges = Merges(model);
    for (size_t rank = merges.size(); rank-- > 0;) {
      const auto piece = ids_.find(merges[rank].first + merges[rank].second);
      if (piece != ids_.end()) v_.scores[piece->second] = -static_cast<float>(rank + 1);
    }
    for (size_t id = 0; id < v_.tokens.size(); ++id) {
      if (HasType(id, TokenType::kUserDefined)) v_.tokens[id] = WithPlainSpaces(v_.tokens[id]);
      if (HasType(id, TokenType::kNormal) && ParseByteToken(v_.tokens[id])) SetType(id, TokenType::kByte);
    }
    v_.unk = Lookup(model, "unk_token", model.TextOr("unk_token", ""));
    if (v_.unk) SetType(*v_.unk, TokenType::kUnknown);
  }

  // A token a row of the embedding: llama.cpp takes no other file.
  void FitRows() {
    if (n_base_ > n_rows_)
      tokenizer_.Refuse("model", fmt::format("at most {} tokens, the rows of the embedding", n_rows_),
                        fmt::format("{}", n_base_));
    if (v_.tokens.size() > n_rows_)
      v_.notes.push_back(
          fmt::format("{} added tokens without a row in the embedding are left out", v_.tokens.size() - n_rows_));
    for (size_t id = n_rows_; id < v_.tokens.size(); ++id) ids_.erase(v_.tokens[id]);
    v_.tokens.resize(n_rows_);
    v_.types.resize(n_rows_, static_cast<int32_t>(TokenType::kUnused));
    if (sentence_piece()) v_.scores.resize(n_rows_, 0);
    for (size_t id = 0; id < n_rows_; ++id)
      if (v_.tokens[id].empty()) v_.tokens[id] = fmt::format("[PAD{}]", id);
  }

  bool HasType(size_t id, TokenType type) const { return v_.types[id] == static_cast<int32_t>(type); }
  void SetType(size_t id, TokenType type) { v_.types[id] = static_cast<int32_t>(type); }

  // The id of the token that `text` names; nothing for no text.
  std::optional<uint32_t> Lookup(const JsonReader& where, std::string_view key, const std::string& text) const {
    if (text.empty()) return std::nullopt;
    const auto found = ids_.find(text);
    if (found == ids_.end()) where.Refuse(key, "a token of the vocabulary", Quoted(text));
    return found->second;
  }

  // The text of a token, given as such or as an object with its content; empty where there is none.
  std::string TokenText(const std::string& key) const {
    const Json* const value = tokenizer_config_.Find(key);
    if (value == nullptr) return "";
    return value->is_object() ? tokenizer_config_.Object(key).Text("content") : tokenizer_config_.Text(key);
  }

  std::optional<uint32_t> NamedToken(const std::string& key) const {
    return Lookup(tokenizer_config_, key, TokenText(key));
  }

  // Fine-tuning often adds a padding token and no row for it; nothing is padded here.
  std::optional<uint32_t> PadToken() const {
    const auto found = ids_.find(TokenText("pad_token"));
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }

  // One id, or several.
  std::vector<uint32_t> Ids(const JsonReader& config, const char* key) const {
    if (!config.Has(key)) return {};
    const Json* const value = config.Find(key);
    std::vector<uint32_t> ids;
    for (const Json& id : value->is_array() ? *value : Json::array({*value})) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= n_rows_)
        config.Refuse(key, fmt::format("token ids below {}", n_rows_));
      ids.push_back(id.get<uint32_t>());
    }
    return ids;
  }

  // tokenizer_config.json decides; where it leaves a key out, the other files do.
  std::optional<uint32_t> SpecialId(const std::string& token_key, const char* id_key) const {
    if (tokenizer_config_json_.contains(token_key)) return NamedToken(token_key);
    for (const JsonReader& config : {generation_config_, directory_.config()}) {
      const std::vector<uint32_t> ids = Ids(config, id_key);
      if (!ids.empty()) return ids[0];
    }
    return std::nullopt;
  }

  void ReadSpecialIds() {
    v_.bos = SpecialId("bos_token", "bos_token_id");
    v_.eos = SpecialId("eos_token", "eos_token_id");
    v_.pad = PadToken();
    v_.ends = Ids(generation_config_, "eos_token_id");
    if (v_.ends.empty()) v_.ends = Ids(directory_.config(), "eos_token_id");
    v_.add_bos = tokenizer_config_.TruthOr("add_bos_token", false) && v_.bos;
    v_.add_eos = tokenizer_config_.TruthOr("add_eos_token", false) && v_.eos;
  }

  // What is put around a single text; a template decides over add_bos_token, as the library does.
  void ReadPostProcessor() {
    if (!tokenizer_.Has("post_processor")) return;
    const JsonReader processor = tokenizer_.Object("post_processor");
    if (processor.Text("type") != "Sequence") return ReadProcessor(processor);
    const Json& all = processor.Array("processors");
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i].is_object()) processor.Refuse("processors", "an array of objects");
      ReadProcessor({all[i], fmt::format("{}: {}", processor.where(), i)});
    }
  }

  void ReadProcessor(const JsonReader& processor) {
    const std::string type = processor.Text("type");
    if (type == "ByteLevel") return;
    if (type != "TemplateProcessing") processor.Refuse("type", R"("TemplateProcessing" or "ByteLevel")", Quoted(type));
    v_.add_bos = v_.add_eos = false;
    bool text_seen = false;
    for (const Json& item : processor.Array("single")) {
      if (!item.is_object()) processor.Refuse("single", "an array of objects");
      const JsonReader part(item, processor.where() + ": single");
      if (!part.Has("SpecialToken")) {
        text_seen = true;
        continue;
      }
      const auto id = Lookup(part, "SpecialToken", part.Object("SpecialToken").Text("id"));
      const bool known = text_seen ? id == v_.eos && !v_.add_eos : id == v_.bos && !v_.add_bos;
      const std::string text = part.Object("SpecialToken").Text("id");
      // Without these names it is a token like others, which GGUF cannot put around every text.
      if (id && !(text_seen ? v_.eos : v_.bos))
        Fail(ErrorCode::kBadFile,
             "{}: {} is put {} every text, but nothing says that it is the {} token: {} is missing in "
             "tokenizer_config.json, and {} in config.json",
             part.where(), Quoted(text), text_seen ? "behind" : "before", text_seen ? "end" : "beginning",
             text_seen ? "eos_token" : "bos_token", text_seen ? "eos_token_id" : "bos_token_id");
      if (!known)
        part.Refuse("SpecialToken", text_seen ? "the end token behind the text" : "the beginning token before the text",
                    Quoted(text));
      (text_seen ? v_.add_eos : v_.add_bos) = true;
    }
  }

  void ReadChatTemplate() {
    if (directory_.HasFile("chat_template.jinja")) {
      v_.chat_template = ReadWhole(directory_.File("chat_template.jinja"));
      return;
    }
    const Json* const value = tokenizer_config_.Find("chat_template");
    if (value == nullptr) return;
    if (!value->is_array()) {
      v_.chat_template = tokenizer_config_.Text("chat_template");
      return;
    }
    for (const Json& item : *value) {
      if (!item.is_object()) tokenizer_config_.Refuse("chat_template", "a text, or an array of named ones");
      const JsonReader one(item, tokenizer_config_.where() + ": chat_template");
      if (one.Text("name") == "default") {
        v_.chat_template = one.Text("template");
      } else {
        v_.notes.push_back(fmt::format("chat template {} is left out", Quoted(one.Text("name"))));
      }
    }
  }

  const HfDirectory& directory_;
  const size_t n_rows_;
  Json tokenizer_json_, tokenizer_config_json_, generation_config_json_;
  const JsonReader tokenizer_{tokenizer_json_, directory_.File("tokenizer.json")};
  const JsonReader tokenizer_config_{tokenizer_config_json_, directory_.File("tokenizer_config.json")};
  const JsonReader generation_config_{generation_config_json_, directory_.File("generation_config.json")};
  HfVocabulary v_;
  std::unordered_map<std::string, uint32_t> ids_;
  size_t n_base_ = 0;
};

}  // namespace

HfVocabulary ReadHfVocabulary(const HfDirectory& directory, size_t n_rows) { return Reader(directory, n_rows).Read(); }

void AddVocabulary(const HfVocabulary& v, GgufWriter& writer) {
  const auto add_id = [&](const char* key, std::optional<uint32_t> id) {
    if (id) writer.Add(fmt::format("tokenizer.ggml.{}_token_id", key), *id);
  };
  writer.Add("tokenizer.ggml.model", v.model);
  writer.Add("tokenizer.ggml.pre", v.model == "llama" ? "default" : v.pre);
  writer.AddArray("tokenizer.ggml.tokens", v.tokens);
  writer.AddArray("tokenizer.ggml.token_type", v.types);
  if (v.model == "llama") {
    writer.AddArray("tokenizer.ggml.scores", v.scores);
    writer.Add("tokenizer.ggml.add_space_prefix", v.add_space_prefix);
  } else {
    writer.AddArray("tokenizer.ggml.merges", v.merges);
  }
  add_id("bos", v.bos);
  add_id("eos", v.eos);
  add_id("unknown", v.unk);
  add_id("padding", v.pad);
  writer.Add("tokenizer.ggml.add_bos_token", v.add_bos);
  writer.Add("tokenizer.ggml.add_eos_token", v.add_eos);
  if (!v.chat_template.empty()) writer.Add("tokenizer.chat_template", v.chat_template);
}

}  // namespace lesskv
