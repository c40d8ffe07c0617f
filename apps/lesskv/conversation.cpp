#include "conversation.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "engine/session.h"
#include "prompt_bar.h"

namespace lesskv {

namespace {

void RequireRoom(const Sequence& sequence, size_t n_tokens) {
  const size_t ctx = sequence.config().shape().ctx;
  const size_t left = ctx - std::min(ctx, sequence.tokens().size());
  if (n_tokens >= left)
    Fail(ErrorCode::kInvalidArgument,
         "the question takes {} tokens, and of the context of {} only {} are left for it "
         "and its answer: /clear begins anew, --ctx N gives more room",
         n_tokens, ctx, left);
}

}  // namespace

Conversation::Conversation(const OpenedModel& opened, ConversationOptions options)
    : opened_(opened),
      options_(std::move(options)),
      template_(ChooseChatTemplate(opened, options_.chat)),
      spec_(CacheSpec::Parse(options_.kv)) {
  MakeConfig(spec_, {});  // what cannot work is refused now, not at the first question
  if (!template_.stop().empty()) options_.generation.stops.emplace_back(template_.stop());
  Validate(options_.generation, opened.tokenizer->size());
}

std::shared_ptr<const CacheConfig> Conversation::MakeConfig(const CacheSpec& spec,
                                                            std::vector<ProtectedSpan> fixed) const {
  return opened_.engine->MakeCacheConfig(spec, opened_.ctx, std::move(fixed));
}

Sequence Conversation::Reread(std::shared_ptr<const CacheConfig> config, const std::vector<int32_t>& tokens) const {
  Sequence sequence(std::move(config));
  if (!tokens.empty()) opened_.engine->Prefill({{&sequence, tokens, LogitsRows::kNone}});
  return sequence;
}

// The tokens to feed; the first question also makes the sequence.
std::vector<int32_t> Conversation::BeginTurn(const std::string& question) {
  const Tokenizer& tokenizer = *opened_.tokenizer;
  if (sequence_) return NextTurn(tokenizer, template_, options_.chat, *sequence_, pending_, question);
  ChatTurn turn = FirstTurn(tokenizer, template_, options_.chat, question);
  if (options_.keep) {
    turn.fixed.clear();
    const size_t keep = std::min(*options_.keep, turn.tokens.size());
    if (keep > 0) turn.fixed.push_back({0, static_cast<int32_t>(keep)});
  }
  sequence_.emplace(MakeConfig(spec_, std::move(turn.fixed)));
  return turn.tokens;
}

GenerateResult Conversation::Ask(const std::string& question, const GenerateOptions& hooks,
                                 const std::function<void(size_t n_tokens, double seconds)>& on_question) {
  const std::vector<int32_t> before = sequence_ ? sequence_->tokens() : std::vector<int32_t>();
  GenerateOptions options = hooks;
  static_cast<GenerationOptions&>(options) = options_.generation;
  options.sampler.seed += answers_;
  options.sequence_goes_on = true;
  GenerateResult result;
  try {
    const std::vector<int32_t> tokens = BeginTurn(question);
    RequireRoom(*sequence_, tokens.size());
    if (on_question)
      on_question(tokens.size(), EstimatePrompt(*opened_.engine, MakeConfig(spec_, {}), sequence_->tokens().size(),
                                                tokens.size(), hooks.stop));
    result = Generate(*opened_.engine, *opened_.tokenizer, *sequence_, tokens, options);
  } catch (...) {
    Undo(before);
    throw;
  }
  if (result.generated_tokens == 0) {
    Undo(before);
    return result;
  }
  pending_ = result.pending_token;
  ++answers_;
  return result;
}

// Back to the conversation before a question that was not read to its end. A cache cannot forget a part, so it is made
// anew from the text; usually nothing was read.
void Conversation::Undo(const std::vector<int32_t>& tokens) {
  if (!sequence_ || (!sequence_->interrupted() && sequence_->tokens() == tokens && !tokens.empty())) return;
  if (tokens.empty()) return Clear();
  sequence_ = Reread(MakeConfig(spec_, sequence_->config().protect().spans()), tokens);
}

void Conversation::Clear() {
  sequence_.reset();
  pending_.reset();
}

void Conversation::Save(const std::string& path) const {
  if (!sequence_) Fail(ErrorCode::kInvalidArgument, "there is no conversation to save yet");
  SaveSession(path, *opened_.engine, *sequence_, pending_);
}

void Conversation::Load(const std::string& path) {
  Session session = LoadSession(path, *opened_.engine, spec_, opened_.ctx);
  sequence_ = std::move(session.sequence);
  pending_ = session.pending_token;
}

void Conversation::ChangeCache(const std::string& text) {
  const CacheSpec spec = CacheSpec::Parse(text);
  if (sequence_) {
    sequence_ = Reread(MakeConfig(spec, sequence_->config().protect().spans()), sequence_->tokens());
  } else {
    MakeConfig(spec, {});
  }
  spec_ = spec;
}

}  // namespace lesskv
