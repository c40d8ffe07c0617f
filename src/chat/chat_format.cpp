#include "chat/chat_format.h"

#include <algorithm>
#include <cctype>

#include "chat/written_texts.h"

namespace lesskv {
namespace {

// ChatML, with what models that are trained on a system prompt say when the user gives none.
constexpr ChatFormat ChatMl(std::string_view name, std::string_view default_system) {
  return {.name = name,
          .system = {"<|im_start|>system\n", "<|im_end|>\n"},
          .question = {"<|im_start|>user\n", "<|im_end|>\n"},
          .answer = {"<|im_start|>assistant\n", "<|im_end|>\n"},
          .answer_prompt = "<|im_start|>assistant\n",
          .default_system = default_system};
}

constexpr ChatFormat Llama3(std::string_view name, std::string_view system_head) {
  return {.name = name,
          .prologue = "{bos}",
          .system = {"<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"},
          .question = {"<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"},
          .answer = {"<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"},
          .answer_prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n",
          .trim = ChatTrim::kMessages,
          .default_system_head = system_head};
}

constexpr ChatFormat kFormats[] = {
    ChatMl("chatml", ""),
    ChatMl("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ChatMl("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    {.name = "llama2",
     .system_is_message = false,
     .system = {"<<SYS>>\n", "\n<</SYS>>\n\n"},
     .question = {"{bos}[INST] ", " [/INST]"},
     .answer = {" ", " {eos}"},
     .trim = ChatTrim::kQuestions},
    Llama3("llama3", ""),
    // The date is the template's own when nobody gives it another one.
    Llama3("llama3.1", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    // Mistral's templates from v3 on put the system prompt into the last question instead of the first. A cache that
    // has read it cannot move it; it stays where it was said.
    {.name = "mistral-v0",
     .prologue = "{bos}",
     .system_is_message = false,
     .system = {"", "\n\n"},
     .question = {"[INST] ", " [/INST]"},
     .answer = {"", "{eos}"}},
    {.name = "mistral-v1",
     .prologue = "{bos}",
     .system_is_message = false,
     .system = {"", "\n\n"},
     .question = {" [INST] ", " [/INST]"},
     .answer = {" ", "{eos}"}},
    {.name = "mistral-v3",
     .prologue = "{bos}",
     .system_is_message = false,
     .system = {"", "\n\n"},
     .question = {"[INST] ", "[/INST]"},
     .answer = {" ", "{eos}"},
     .trim = ChatTrim::kAnswers},
    {.name = "mistral-v3-tekken",
     .prologue = "{bos}",
     .system_is_message = false,
     .system = {"", "\n\n"},
     .question = {"[INST]", "[/INST]"},
     .answer = {"", "{eos}"}},
    {.name = "mistral-v7",
     .prologue = "{bos}",
     .system = {"[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"},
     .question = {"[INST] ", "[/INST]"},
     .answer = {" ", "{eos}"}},
    {.name = "mistral-v7-tekken",
     .prologue = "{bos}",
     .system = {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"},
     .question = {"[INST]", "[/INST]"},
     .answer = {"", "{eos}"}},
    {.name = "gemma",
     .prologue = "{bos}",
     .system_is_message = false,
     .system = {"", "\n\n"},
     .question = {"<start_of_turn>user\n", "<end_of_turn>\n"},
     .answer = {"<start_of_turn>model\n", "<end_of_turn>\n"},
     .answer_prompt = "<start_of_turn>model\n",
     .trim = ChatTrim::kMessages},
    {.name = "phi3",
     .system = {"<|system|>\n", "<|end|>\n"},
     .question = {"<|user|>\n", "<|end|>\n"},
     .answer = {"<|assistant|>\n", "<|end|>\n"},
     .answer_prompt = "<|assistant|>\n"},
    {.name = "phi4",
     .system = {"<|im_start|>system<|im_sep|>", "<|im_end|>"},
     .question = {"<|im_start|>user<|im_sep|>", "<|im_end|>"},
     .answer = {"<|im_start|>assistant<|im_sep|>", "<|im_end|>"},
     .answer_prompt = "<|im_start|>assistant<|im_sep|>"},
    {.name = "phi4-mini",
     .system = {"<|system|>", "<|end|>"},
     .question = {"<|user|>", "<|end|>"},
     .answer = {"<|assistant|>", "<|end|>"},
     .answer_prompt = "<|assistant|>"},
    {.name = "falcon",
     .system = {"System: ", "", "\n"},
     .question = {"User: ", "", "\n"},
     .answer = {"Falcon: ", "", "\n"},
     .answer_prompt = "Falcon:",
     .stop = "\nUser:"},
    {.name = "falcon3",
     .system = {"<|system|>\n", "\n"},
     .question = {"<|user|>\n", "\n"},
     .answer = {"<|assistant|>\n", "{eos}", "\n"},
     .answer_prompt = "<|assistant|>\n"},
    {.name = "zephyr",
     .system = {"<|system|>\n", "{eos}\n"},
     .question = {"<|user|>\n", "{eos}\n"},
     .answer = {"<|assistant|>\n", "{eos}\n"},
     .answer_prompt = "<|assistant|>\n"},
    // Ours, for models that know no conversations: every message is a paragraph, and an answer is one too.
    {.name = "plain",
     .prologue = "{bos}",
     .system = {"", "\n\n"},
     .question = {"", "\n\n"},
     .answer = {"", "\n\n"},
     .stop = "\n\n"},
};

const ChatFormat* Named(std::string_view name) {
  const auto* const found = std::find_if(std::begin(kFormats), std::end(kFormats),
                                         [&](const ChatFormat& format) { return format.name == name; });
  return found == std::end(kFormats) ? nullptr : found;
}

// The text of a Jinja string that has no quotes and only line breaks as escapes; nothing for any other.
std::optional<std::string> Unescaped(std::string_view text) {
  if (text.find_first_of("'\"{}") != std::string_view::npos) return std::nullopt;
  std::string result;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\') {
      result += text[i];
    } else if (text.substr(i, 2) == "\\n") {
      result += '\n';
      ++i;
    } else {
      return std::nullopt;
    }
  }
  return result;
}

// What follows the line break behind the first `mark` in `jinja`, which moves there; nothing when there is none. A line
// break is written as one or as \n.
std::optional<std::string_view> LineBehind(std::string_view mark, std::string_view& jinja) {
  for (size_t at = jinja.find(mark); at != std::string_view::npos; at = jinja.find(mark)) {
    jinja.remove_prefix(at + mark.size());
    for (const std::string_view line_break : {"\n", "\\n"})
      if (jinja.starts_with(line_break)) return jinja.substr(line_break.size());
  }
  return std::nullopt;
}

// The system prompt that a ChatML template writes by itself, between the marks inside one of its strings; empty when
// all marks enclose expressions. Nothing when there is one that cannot be read without Jinja.
std::optional<std::string> WrittenSystemPrompt(std::string_view jinja) {
  while (const auto line = LineBehind("<|im_start|>system", jinja)) {
    const bool is_expression = line->starts_with('\'') || line->starts_with('"') || line->starts_with("{{");
    if (!is_expression) return Unescaped(line->substr(0, line->find("<|im_end|>")));
  }
  return "";
}

// Whether a line break follows some `mark`, in its string or right behind it. Which white space a template writes is
// else not compared; but a ChatML whose turns stand on one line is another format.
bool EndsLine(std::string_view jinja, std::string_view mark) {
  for (size_t at = jinja.find(mark); at != std::string_view::npos; at = jinja.find(mark, at)) {
    at += mark.size();
    const size_t next = jinja.find_first_not_of(" '\"+~-{}", at);
    if (next == std::string_view::npos) return false;
    if (jinja[next] == '\n' || jinja.substr(next).starts_with("\\n")) return true;
  }
  return false;
}

const ChatFormat* RecogniseMistralOrLlama2(std::string_view jinja) {
  const auto has = [&](std::string_view text) { return jinja.find(text) != std::string_view::npos; };
  if (has("[SYSTEM_PROMPT]")) return Named(has("[SYSTEM_PROMPT] ") ? "mistral-v7" : "mistral-v7-tekken");
  if (has("<<SYS>>")) return Named("llama2");
  if (has(" [INST] ")) return Named("mistral-v1");
  if (has("[AVAILABLE_TOOLS]")) return Named(has("[INST] ") ? "mistral-v3" : "mistral-v3-tekken");
  return has("[INST] ") && has(" [/INST]") ? Named("mistral-v0") : nullptr;
}

const ChatFormat* RecogniseByMarks(std::string_view jinja) {
  const auto has = [&](std::string_view text) { return jinja.find(text) != std::string_view::npos; };
  if (has("<|im_start|>")) {
    if (has("<end_of_utterance>")) return nullptr;  // SmolVLM: the mark is its BOS
    if (has("<|im_sep|>")) return Named("phi4");
    return has("<|im_end|>") && !EndsLine(jinja, "<|im_end|>") ? nullptr : Named("chatml");
  }
  if (has("[INST]")) return RecogniseMistralOrLlama2(jinja);
  if (has("<|start_header_id|>")) {
    if (has("Cutting Knowledge Date") != has("Today Date")) return nullptr;
    return Named(has("Today Date") ? "llama3.1" : "llama3");
  }
  if (has("<start_of_turn>")) return Named("gemma");
  if (has("<|assistant|>") && has("<|end|>")) return Named(has("<|tool|>") ? "phi4-mini" : "phi3");
  if (has("<|assistant|>") && has("<|user|>") && !has("[gMASK]")) {
    if (has("eos_token + '\\n'") || has("eos_token + '\n'")) return Named("falcon3");
    if (has("['content'] + eos_token") || has("<|endoftext|>")) return Named("zephyr");
  }
  if (has("'Falcon: '") && has("'User: '")) return Named("falcon");
  return nullptr;
}

std::string WithoutSpace(std::string_view text) {
  std::string result(text);
  std::erase_if(result, [](unsigned char c) { return std::isspace(c) != 0; });
  return result;
}

void Remove(std::string& text, std::string_view part) {
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at)) text.erase(at, part.size());
}

// A conversation of empty messages as the format writes it.
std::string AllMarks(const ChatFormat& format, std::string_view default_system) {
  std::string turn, system;
  for (const std::string_view text : {format.system.before, format.default_system_head, default_system, format.system.after,
                                      format.system.gap})
    system += text;
  const std::string question_head = std::string(format.question.before) + (format.system_is_message ? "" : system);
  for (const std::string_view text :
       {std::string_view(question_head), format.question.after, format.question.gap, format.answer.before,
        format.answer.after, format.answer.gap, format.question.before, format.question.after, format.question.gap,
        format.answer_prompt})
    turn += text;
  std::string marks = WithoutSpace((format.system_is_message ? system : "") + turn);
  Remove(marks, "{bos}");
  Remove(marks, "{eos}");
  return marks;
}

// Whether the format writes all that the template writes in the plain case, white space aside. A template with a part
// that it does not write is another one, however alike: with another default system prompt, with a line about the date,
// with a thought that the model begins with.
bool WritesAllOf(const ChatFormat& format, std::string_view default_system, const WrittenTexts& written) {
  const std::string marks = AllMarks(format, default_system);
  const bool with_bos = !format.prologue.empty() || format.question.before.starts_with("{bos}");
  const auto writes = [&](const std::string& given) {
    std::string text = WithoutSpace(given);
    for (const std::string_view end : {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"}) Remove(text, end);
    for (const std::string_view begin : {"<s>", "<|begin_of_text|>", "<bos>"})
      if (with_bos) Remove(text, begin);
    return marks.find(text) != std::string::npos;
  };
  if (written.bos == WrittenTexts::Bos::kInMessages && !with_bos) return false;
  if (written.bos == WrittenTexts::Bos::kFirst && format.question.before.starts_with("{bos}")) return false;
  const auto writes_all = [&](const std::vector<std::string>& texts) { return std::all_of(texts.begin(), texts.end(), writes); };
  // Mistral's default system prompts that name a day are left out.
  return writes_all(written.texts) && writes_all(written.assigned) &&
         (format.name.starts_with("mistral-v7") || writes_all(written.dated));
}

}  // namespace

std::span<const ChatFormat> ChatFormats() { return kFormats; }

std::string ChatFormatNames() {
  std::string names;
  for (const ChatFormat& format : kFormats) {
    if (!names.empty()) names += ", ";
    names += format.name;
  }
  return names;
}

std::optional<RecognisedFormat> RecogniseChatFormat(std::string_view jinja) {
  // Ten times the longest of real models. Blocks in blocks, and brackets behind white space, take quadratic time.
  constexpr size_t kLongestTemplate = size_t{256} << 10;
  if (jinja.size() > kLongestTemplate) return std::nullopt;
  const ChatFormat* format = RecogniseByMarks(jinja);
  if (format == nullptr) return std::nullopt;
  RecognisedFormat found{format, std::string(format->default_system)};
  if (format->name == "chatml") {
    std::optional<std::string> written = WrittenSystemPrompt(jinja);
    if (!written) return std::nullopt;
    for (const ChatFormat& known : kFormats)
      if (!written->empty() && known.default_system == *written) found.format = &known;
    found.default_system = std::move(*written);
  }
  const WrittenTexts written = ReadWrittenTexts(jinja);
  if (!WritesAllOf(*found.format, found.default_system, written)) return std::nullopt;
  found.begins_with_bos = written.bos == WrittenTexts::Bos::kFirst;
  return found;
}

}  // namespace lesskv
