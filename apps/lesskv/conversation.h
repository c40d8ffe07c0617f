// A conversation over one sequence: each question is read behind the last answer, nothing is read twice.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "chat_turns.h"
#include "engine/generate.h"

namespace lesskv {

struct ConversationOptions {
  ChatOptions chat;
  std::string kv = "full";
  // Protects the first `keep` tokens of the first turn instead of the template's marks and the system prompt.
  std::optional<size_t> keep;
  GenerationOptions generation;  // of every answer; the seed is that of the first and grows by one an answer
};

class Conversation {
 public:
  // `opened` must outlive it. Throws Error for a spec, chat template or sampler option that cannot be used.
  Conversation(const OpenedModel& opened, ConversationOptions options);

  // Reads the question and answers. `hooks`: callbacks and the flag that stops; the rest of it is ignored. Throws
  // Error, with the conversation as it was, for a question that does not fit the context or memory. A question that was
  // stopped while it was read (no token generated) leaves the conversation as it was, too. `on_question`: called before
  // it is read, with its tokens and about how many seconds that will take (EstimatePrompt).
  GenerateResult Ask(const std::string& question, const GenerateOptions& hooks,
                     const std::function<void(size_t n_tokens, double seconds)>& on_question = {});

  void Clear();
  // The cache as a session file, and back; see SaveSession and LoadSession. Load throws with the conversation as it
  // was.
  void Save(const std::string& path) const;
  void Load(const std::string& path);
  // Goes on with another cache: reads the conversation so far into it. Throws with the conversation as it was.
  void ChangeCache(const std::string& spec);

  bool empty() const { return !sequence_; }
  const Sequence& sequence() const { return *sequence_; }  // not when empty()
  const CacheSpec& spec() const { return spec_; }

 private:
  std::shared_ptr<const CacheConfig> MakeConfig(const CacheSpec& spec, std::vector<ProtectedSpan> fixed) const;
  Sequence Reread(std::shared_ptr<const CacheConfig> config, const std::vector<int32_t>& tokens) const;
  std::vector<int32_t> BeginTurn(const std::string& question);
  void Undo(const std::vector<int32_t>& tokens);

  const OpenedModel& opened_;
  ConversationOptions options_;
  ChatTemplate template_;
  CacheSpec spec_;
  std::optional<Sequence> sequence_;  // nothing before the first question
  std::optional<int32_t> pending_;    // the last answer's last token, not fed yet
  uint64_t answers_ = 0;
};

}  // namespace lesskv
