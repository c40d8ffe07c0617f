#include "engine/step_run.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/check.h"

namespace lesskv {
namespace {

// Whatever went wrong as the one kind of error that callers know.
Error AsError(const std::exception_ptr& why) {
  try {
    std::rethrow_exception(why);
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kOutOfMemory, "memory that a step needs cannot be had");
  } catch (const std::exception& error) {
    return Error(ErrorCode::kRuntime, fmt::format("a step failed: {}", error.what()));
  }
}

// Room for more tokens, so that taking them over cannot fail; doubled, or every token would copy all before it.
void MakeRoom(std::vector<int32_t>& tokens, size_t more) {
  if (tokens.capacity() - tokens.size() >= more) return;
  tokens.reserve(std::max(tokens.size() + more, 2 * tokens.size()));
}

}  // namespace

bool Engine::StepRun::Run(double done, double share) {
  Check();
  const bool none = std::none_of(entries_.begin(), entries_.end(), [](const Entry& e) { return e.state == State::kWaiting; });
  if (none) return true;
  if (control_.stop != nullptr && *control_.stop) return false;
  engine_.Reserve(CountRows());
  BeginAll();
  if (!Forward(done, share)) return false;
  EndAll();
  if (sink_) EmitLogits();
  if (first_failure_) throw AsError(first_failure_);
  return true;
}

size_t Engine::StepRun::CountRows() const {
  size_t n_rows = 0;
  for (const Entry& entry : entries_)
    if (entry.state != State::kFailed && entry.leader == nullptr) n_rows += entry.item.tokens.size();
  return n_rows;
}

// Reports a failure, or keeps the first one. Before anything has changed nobody to tell means that the step ends here.
void Engine::StepRun::Fail(Entry& entry, std::exception_ptr why) {
  const bool begun = entry.state == State::kBegun;
  entry.state = State::kFailed;
  if (begun) entry.item.sequence->interrupted_ = true;
  if (control_.on_failure) return control_.on_failure(entry.item.tag, AsError(why));
  if (!begun) throw AsError(why);
  if (!first_failure_) first_failure_ = std::move(why);
}

void Engine::StepRun::CheckItem(const Entry& entry) const {
  const StepItem& item = entry.item;
  const auto refuse = [](const std::string& why) { throw Error(ErrorCode::kInvalidArgument, why); };
  if (item.sequence == nullptr) refuse("a step needs a sequence, found none");
  for (const Entry& other : entries_)
    if (&other < &entry && other.item.sequence == item.sequence) refuse("a sequence can be in a step only once");
  if (item.sequence->interrupted()) refuse("a sequence whose step ended halfway cannot go on");
  if (item.tokens.empty()) refuse("a step needs at least one token a sequence, found none");
  const size_t n_vocab = engine_.model_->config().n_vocab;
  for (const int32_t token : entry.checked)
    if (token < 0 || static_cast<size_t>(token) >= n_vocab)
      refuse(fmt::format("token {} is not in the vocabulary of {} tokens", token, n_vocab));
  const size_t seen = item.sequence->tokens().size(), ctx = item.sequence->config().shape().ctx;
  if (entry.checked.size() > ctx - std::min(ctx, seen))
    refuse(fmt::format("{} tokens do not fit the context of {} tokens, of which {} are used", entry.checked.size(), ctx, seen));
}

// The entry whose rows another reads; null where it has its own.
const Engine::StepRun::Entry* Engine::StepRun::FindLeader(const Entry& entry) const {
  if (entry.item.reads_with == nullptr) return nullptr;
  const auto refuse = [](const char* why) { throw Error(ErrorCode::kInvalidArgument, fmt::format("a sequence can read a prompt with another {}", why)); };
  const Sequence& own = *entry.item.sequence;
  for (const Entry& other : entries_) {
    if (&other >= &entry || other.item.sequence != entry.item.reads_with || other.item.reads_with != nullptr) continue;
    if (other.state == State::kFailed) refuse("that has not failed");
    if (entry.item.kind != StepKind::kPrompt || !own.tokens().empty() || !other.item.sequence->tokens().empty())
      refuse("where it is the first of both, read in one step");
    if (!std::ranges::equal(entry.item.tokens, other.item.tokens)) refuse("of the same tokens");
    if (!own.config().ReadsPromptsAs(other.item.sequence->config())) refuse("whose cache reads it in the same way");
    return &other;
  }
  refuse("that comes before it in the same step and has its own rows");
  return nullptr;
}

void Engine::StepRun::Check() {
  for (Entry& entry : entries_) {
    try {
      CheckItem(entry);
      entry.leader = FindLeader(entry);
    } catch (const Error&) {
      Fail(entry, std::current_exception());
    }
  }
}

// Begins the step in every cache; where failures are not reported one by one, in all or in none.
void Engine::StepRun::BeginAll() {
  for (Entry& entry : entries_) {
    if (entry.state != State::kWaiting) continue;
    try {
      if (entry.leader != nullptr && entry.leader->state != State::kBegun)
        throw Error(ErrorCode::kRuntime, "the sequence that this one reads a prompt with could not begin");
      MakeRoom(entry.item.sequence->tokens_, entry.item.tokens.size());
      entry.item.sequence->cache().BeginStep(entry.item.tokens.size(), entry.item.kind);
      entry.state = State::kBegun;
    } catch (...) {
      if (!control_.on_failure)
        for (Entry& begun : entries_)
          if (begun.state == State::kBegun) begun.item.sequence->cache().CancelStep();
      Fail(entry, std::current_exception());
    }
  }
}

// All sequences that are in the middle of the step are lost.
void Engine::StepRun::Interrupt() {
  for (Entry& entry : entries_) {
    if (entry.state != State::kBegun) continue;
    entry.item.sequence->interrupted_ = true;
    entry.state = State::kFailed;
  }
}

bool Engine::StepRun::AfterLayer(size_t layers_done, double done, double share) {
  const size_t n_layers = engine_.model_->config().n_layers;
  if (control_.progress)
    control_.progress(done + share * static_cast<double>(layers_done) / static_cast<double>(n_layers));
  bool any = false;
  for (const Entry& entry : entries_) {
    if (entry.state != State::kBegun) continue;
    if (entry.item.cancel != nullptr && *entry.item.cancel && layers_done < n_layers)
      engine_.work_.batch->Drop(entry.in_batch, std::make_exception_ptr(Error(ErrorCode::kRuntime, "cancelled")));
    any = any || !engine_.work_.batch->failure(entry.in_batch);
  }
  if (!any) return false;
  return layers_done == n_layers || CountRows() <= kStoppableRows || control_.stop == nullptr || !*control_.stop;
}

// Steps in the middle of this one have work memory of their own; what this one works in stays where it is.
void Engine::StepRun::Pause() {
  if (!engine_.in_pause_) engine_.in_pause_ = Work{};
  Work own = std::exchange(engine_.work_, *std::exchange(engine_.in_pause_, std::nullopt));
  control_.pause();
  engine_.in_pause_ = std::exchange(engine_.work_, std::move(own));
}

bool Engine::StepRun::Forward(double done, double share) {
  bool finished = false;
  try {
    std::vector<int32_t> tokens;
    std::vector<SequenceCache*> caches;
    std::vector<size_t> lengths, leaders;
    for (Entry& entry : entries_) {
      if (entry.state != State::kBegun) continue;
      entry.took_part = true;
      entry.in_batch = caches.size();
      caches.push_back(&entry.item.sequence->cache());
      leaders.push_back(entry.leader != nullptr ? entry.leader->in_batch : entry.in_batch);
      entry.row = entry.leader != nullptr ? entry.leader->row : tokens.size();
      if (entry.leader != nullptr) continue;
      if (engine_.batch_invariant_) lengths.push_back(entry.item.tokens.size());
      tokens.insert(tokens.end(), entry.item.tokens.begin(), entry.item.tokens.end());
    }
    const TileHook pause = control_.pause ? [this] { Pause(); } : TileHook();
    engine_.work_.batch->Start(caches, leaders, pause);
    finished = lesskv::Forward(
        *engine_.model_, tokens, *engine_.work_.batch, engine_.compute_, engine_.work_.workspace, lengths,
        [&](size_t layers_done) { return AfterLayer(layers_done, done, share); }, pause);
  } catch (...) {
    Interrupt();
    throw AsError(std::current_exception());
  }
  bool any = false;
  for (Entry& entry : entries_) {
    if (entry.state != State::kBegun) continue;
    if (const std::exception_ptr& why = engine_.work_.batch->failure(entry.in_batch)) Fail(entry, why);
    else any = true;
  }
  if (!finished && any) Interrupt();
  return finished || !any;
}

void Engine::StepRun::EndAll() {
  for (Entry& entry : entries_) {
    if (entry.state != State::kBegun) continue;
    try {
      entry.item.sequence->cache().EndStep();
      std::vector<int32_t>& tokens = entry.item.sequence->tokens_;
      tokens.insert(tokens.end(), entry.item.tokens.begin(), entry.item.tokens.end());
      entry.state = State::kFinished;
    } catch (...) {
      Fail(entry, std::current_exception());
    }
  }
}

// Tiles go across items: the output matrix is read once for the tokens of many sequences.
void Engine::StepRun::EmitLogits() {
  const size_t n_vocab = engine_.model_->config().n_vocab;
  const WeightView& output = engine_.model_->output();
  const size_t few = FewTokens(output.type, output.n_in, engine_.compute_);
  std::vector<LogitsRow> tile;
  std::vector<size_t> rows;
  const auto emit = [&] {
    if (tile.empty()) return;
    const float* logits = ComputeLogits(*engine_.model_, engine_.work_.workspace, rows, engine_.compute_);
    for (size_t i = 0; i < tile.size(); ++i) tile[i].logits = {logits + i * n_vocab, n_vocab};
    sink_(tile);
    tile.clear();
    rows.clear();
  };
  for (const Entry& entry : entries_) {
    if (!entry.took_part) continue;
    const size_t n = entry.item.tokens.size();
    const LogitsRows wanted = entry.state == State::kFinished ? entry.item.logits : LogitsRows::kNone;
    const size_t begin = wanted == LogitsRows::kAll ? 0 : wanted == LogitsRows::kLast ? n - 1 : n;
    if (engine_.batch_invariant_ && (n - begin > 1 || tile.size() >= few)) emit();  // as it would be alone
    for (size_t row = begin; row < n; ++row) {
      tile.push_back({entry.item.tag, entry.first_row + row, {}});
      rows.push_back(entry.row + row);
      if (tile.size() == kLogitsTile) emit();
    }
    if (engine_.batch_invariant_ && n - begin > 1) emit();
  }
  emit();
}

}  // namespace lesskv
