#include "engine/generate.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <map>

#include "base/error.h"
#include "base/memory.h"
#include "format/gguf_writer.h"
#include "tokenizer/tokenizer.h"

namespace lesskv {
namespace {

TEST(StopFilter, CutsAtTheFirstStopStringHoweverTheTextIsCut) {
  const std::string text = "one, two, three. END of it";
  for (size_t piece = 1; piece <= text.size(); ++piece) {
    StopFilter filter({"THE END", "END", "never"});
    std::string out;
    for (size_t i = 0; i < text.size(); i += piece) out += filter.Push(text.substr(i, piece));
    out += filter.Flush();
    EXPECT_EQ(out, "one, two, three. ") << "pieces of " << piece;
    EXPECT_TRUE(filter.stopped());
  }
}

TEST(StopFilter, OfSeveralTheFirstInTheTextCuts) {
  for (const std::vector<std::string>& stops : {std::vector<std::string>{"b", "c"}, {"c", "b"}}) {
    StopFilter filter(stops);
    EXPECT_EQ(filter.Push("abcb"), "a");
  }
}

TEST(StopFilter, HoldsBackOnlyWhatMayStillBecomeAStopString) {
  StopFilter filter({"abc"});
  EXPECT_EQ(filter.Push("xab"), "x");
  EXPECT_EQ(filter.Push("ab"), "ab");  // the held "ab" was text; the new one may begin a stop
  EXPECT_EQ(filter.Push("d"), "abd");
  EXPECT_EQ(filter.Push("a"), "");
  EXPECT_EQ(filter.Flush(), "a");
  EXPECT_FALSE(filter.stopped());
}

// A model that always says the token `says`: its layer adds nothing to the embeddings, which are all the same, and in
// the output matrix of `n_rows` rows that token's row alone is not zero.
std::shared_ptr<const Model> ModelThatSays(size_t says, size_t n_rows, const std::vector<std::string>& tokens) {
  constexpr size_t kWidth = 8;
  std::map<std::string, std::vector<float>> tensors;
  GgufWriter writer;
  const auto add = [&](const std::string& name, std::initializer_list<size_t> ne, float value) -> std::vector<float>& {
    size_t n = 1;
    for (const size_t extent : ne) n *= extent;
    auto& values = tensors.emplace(name, std::vector<float>(n, value)).first->second;
    writer.AddTensor(name, ne, values);
    return values;
  };
  writer.Add("general.architecture", "llama");
  for (const auto& [key, value] : std::map<std::string, uint32_t>{{"block_count", 1},
                                                                  {"context_length", 64},
                                                                  {"embedding_length", kWidth},
                                                                  {"feed_forward_length", kWidth},
                                                                  {"attention.head_count", 2}})
    writer.Add("llama." + key, value);
  writer.Add("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  writer.Add("tokenizer.ggml.model", "gpt2");
  writer.Add("tokenizer.ggml.pre", "gpt-2");
  writer.AddArray("tokenizer.ggml.tokens", tokens);
  std::vector<int32_t> types;
  for (const std::string& token : tokens)
    types.push_back(static_cast<int32_t>(token.size() > 1 ? TokenType::kControl : TokenType::kNormal));
  writer.AddArray("tokenizer.ggml.token_type", types);
  writer.AddArray("tokenizer.ggml.merges", std::vector<std::string>());
  add("token_embd.weight", {kWidth, n_rows}, 1);
  for (const char* name : {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"})
    add(std::string(name) + ".weight", {kWidth}, 1);
  for (const char* name : {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"})
    add("blk.0." + std::string(name) + ".weight", {kWidth, kWidth}, 0);
  auto& output = add("output.weight", {kWidth, n_rows}, 0);
  std::fill_n(output.begin() + static_cast<std::ptrdiff_t>(says * kWidth), kWidth, 1.0f);

  const std::string path = testing::TempDir() + fmt::format("lesskv_generate_test_{}.gguf", ::getpid());
  writer.Write(path);
  auto model = Model::Load(path, ModelLoading::kRead);
  std::filesystem::remove(path);
  return model;
}

GenerateOptions Five(std::vector<std::string> stops) {
  GenerateOptions options;
  options.sampler.temperature = 0;
  options.max_tokens = 5;
  options.stops = std::move(stops);
  return options;
}

GenerateResult Say(const std::shared_ptr<const Model>& model, const GenerateOptions& options) {
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  Engine engine(model, {.threads = 1, .compute = ComputeChoice::kF32});
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full")));
  return Generate(engine, *tokenizer, sequence, std::vector<int32_t>{0, 1}, options);
}

TEST(Generate, StopsAtAControlTokenThatIsNamed) {
  const auto model = ModelThatSays(2, 4, {"a", "b", "<|sep|>", "<|other|>"});
  const auto stopped = Say(model, Five({"<|other|>", "<|sep|>"}));
  EXPECT_EQ(FinishName(stopped.reason), "stop");
  EXPECT_EQ(stopped.generated_tokens, 1u);
  EXPECT_EQ(stopped.text, "");
  const auto unstopped = Say(model, Five({"<|other|>", "<|se"}));
  EXPECT_EQ(FinishName(unstopped.reason), "length") << "the text of a control token is not shown";
  EXPECT_EQ(unstopped.generated_tokens, 5u);
}

// One token a letter, and the two bytes of "é" apart; the last id ends a text.
constexpr std::string_view kPieces[] = {"<unk>", "<s>", "a", "b", "c", "ab", "bc", "<0xC3>", "<0xA9>", "</s>"};
constexpr int32_t kUnk = 0, kBos = 1, kA = 2, kB = 3, kC = 4, kAb = 5, kBc = 6, kLead = 7, kTrail = 8, kEos = 9;
constexpr size_t kVocab = std::size(kPieces);

std::unique_ptr<const Tokenizer> Letters() {
  Vocabulary v;
  v.name = "letters";
  v.model = "llama";
  v.add_space_prefix = false;
  v.eos = kEos;
  for (size_t i = 0; i < kVocab; ++i) {
    v.tokens.emplace_back(kPieces[i]);
    v.scores.push_back(-static_cast<float>(i));
    const bool control = i == kBos || i == kEos, byte = i == kLead || i == kTrail;
    v.types.push_back(static_cast<int32_t>(control     ? TokenType::kControl
                                           : byte      ? TokenType::kByte
                                           : i == kUnk ? TokenType::kUnknown
                                                       : TokenType::kNormal));
  }
  return Tokenizer::Create(std::move(v));
}

// Logits that choose `token` and, after it, the next lower id.
std::vector<float> Choosing(int32_t token, size_t n_vocab = kVocab) {
  std::vector<float> logits(n_vocab, -10);
  logits[static_cast<size_t>(token)] = 10;
  if (token > 0) logits[static_cast<size_t>(token) - 1] = 9;
  return logits;
}

// Feeds choices until the text ends.
struct Told {
  std::vector<std::string> pieces;
  std::optional<FinishReason> finish;
};
Told Tell(Generation& generation, const std::vector<int32_t>& tokens) {
  Told told;
  for (const int32_t token : tokens) {
    EXPECT_FALSE(told.finish.has_value());
    const Generation::Output out = generation.Push(Choosing(token));
    EXPECT_EQ(out.token, token);
    told.pieces.push_back(out.text);
    told.finish = out.finish;
  }
  return told;
}

GenerationOptions Greedy(std::vector<std::string> stops = {}) {
  GenerationOptions options;
  options.sampler.temperature = 0;
  options.stops = std::move(stops);
  return options;
}

using Pieces = std::vector<std::string>;
using Ids = std::vector<int32_t>;
const Ids kSeen = {kBos, kA, kB};

TEST(Generation, EndsAtTheTextsEndWithoutItsToken) {
  const auto tokenizer = Letters();
  Generation generation(*tokenizer, Greedy(), kSeen, 100);
  const Told told = Tell(generation, {kA, kLead, kTrail, kEos});
  EXPECT_EQ(told.pieces, (Pieces{"a", "", "\u00E9", ""}));
  EXPECT_EQ(told.finish, FinishReason::kEndOfText);
  EXPECT_EQ(generation.text(), "a\u00E9");
  EXPECT_EQ(generation.tokens().size(), 4u);
}

TEST(Generation, EndsAtItsLengthWithAllThatWasHeldBack) {
  const auto tokenizer = Letters();
  GenerationOptions options = Greedy({"abc"});
  options.max_tokens = 3;
  Generation generation(*tokenizer, options, kSeen, 100);
  const Told told = Tell(generation, {kC, kAb, kLead});
  EXPECT_EQ(told.pieces, (Pieces{"c", "", "ab\uFFFD"}));
  EXPECT_EQ(told.finish, FinishReason::kLength);
}

// A stop string that ends with the last token is what ended the text.
TEST(Generation, AStopStringAtItsLengthIsTheReason) {
  const auto tokenizer = Letters();
  GenerationOptions options = Greedy({"ab"});
  options.max_tokens = 2;
  Generation generation(*tokenizer, options, kSeen, 100);
  EXPECT_EQ(Tell(generation, {kA, kB}).finish, FinishReason::kStopString);
  EXPECT_EQ(generation.text(), "");
}

// Of a context of 5 the text before has 3: two tokens can be fed, a third one is sampled.
TEST(Generation, EndsWhereTheContextIsFull) {
  const auto tokenizer = Letters();
  Generation generation(*tokenizer, Greedy(), kSeen, 5);
  EXPECT_EQ(Tell(generation, {kA, kA, kA}).finish, FinishReason::kContext);
}

TEST(Generation, CanBeEndedFromOutside) {
  const auto tokenizer = Letters();
  Generation generation(*tokenizer, Greedy({"abc"}), kSeen, 100);
  EXPECT_EQ(Tell(generation, {kC, kA}).pieces, (Pieces{"c", ""}));
  EXPECT_EQ(generation.Cancel(), "a");
  EXPECT_EQ(generation.text(), "ca");
}

TEST(Generation, MayBeMovedBetweenTokens) {
  const auto tokenizer = Letters();
  std::vector<Generation> running;
  for (int i = 0; i < 3; ++i) running.emplace_back(*tokenizer, Greedy({"abc"}), kSeen, 100);
  for (Generation& generation : running) Tell(generation, {kC, kLead});
  running.erase(running.begin());
  for (Generation& generation : running) EXPECT_EQ(Tell(generation, {kTrail}).pieces, (Pieces{"\u00E9"}));
}

TEST(Generation, ThePenaltySeesTheTextBeforeAndTheTextItself) {
  const auto tokenizer = Letters();
  GenerationOptions options = Greedy();
  options.sampler.repeat_penalty = 2;
  options.sampler.repeat_last_n = 2;
  Generation generation(*tokenizer, options, kSeen, 100);
  const auto between = [](int32_t first, int32_t second) {
    std::vector<float> logits(kVocab, -10);
    logits[static_cast<size_t>(first)] = 10;
    logits[static_cast<size_t>(second)] = 7;
    return logits;
  };
  EXPECT_EQ(generation.Push(between(kB, kC)).token, kC) << "b was seen";
  EXPECT_EQ(generation.Push(between(kC, kA)).token, kA) << "c was sampled; a is too long ago";
  EXPECT_EQ(generation.Push(between(kB, kA)).token, kB) << "b is too long ago";
}

TEST(Generation, IdsBeyondTheTokenizerAreNeverChosen) {
  const auto tokenizer = Letters();
  Generation generation(*tokenizer, Greedy(), kSeen, 100);
  EXPECT_EQ(generation.Push(Choosing(kVocab + 3, kVocab + 4)).token, 0);
}

struct Hidden {
  const char* name;
  Ids tokens;  // the last one completes the stop string
  std::string stop, text;
  size_t certain;  // tokens shown whole
  Ids shown;       // what reads as the text
};

TEST(Generation, KnowsWhichTokensReadAsWhatIsShown) {
  const auto tokenizer = Letters();
  const Hidden cases[] = {
      {"between tokens", {kC, kA, kB, kC}, "bc", "ca", 2, {kC, kA}},
      {"all of it", {kA, kB}, "ab", "", 0, {}},
      {"inside a token", {kC, kAb, kC}, "bc", "ca", 1, {kC, kA}},
      {"inside the first token", {kAb}, "b", "a", 0, {kA}},
      {"the end of one token and the start of the next", {kC, kAb, kBc}, "bb", "ca", 1, {kC, kA}},
      {"a character of two tokens", {kC, kLead, kTrail}, "\u00E9", "c", 1, {kC}},
      {"behind a character of two tokens", {kLead, kTrail, kC}, "c", "\u00E9", 2, {kLead, kTrail}},
  };
  for (const Hidden& c : cases) {
    Generation generation(*tokenizer, Greedy({c.stop}), kSeen, 100);
    EXPECT_EQ(Tell(generation, c.tokens).finish, FinishReason::kStopString) << c.name;
    EXPECT_EQ(generation.text(), c.text) << c.name;
    EXPECT_EQ(generation.certain_tokens(), c.certain) << c.name;
    EXPECT_EQ(generation.ShownTokens(0), c.shown) << c.name;
  }
}

TEST(Generation, IsUncertainOnlyOfTokensThatMayBeHidden) {
  const auto tokenizer = Letters();
  Generation generation(*tokenizer, Greedy({"abc"}), kSeen, 100);
  const Ids tokens = {kC, kA, kB, kB, kAb, kLead, kTrail};
  const size_t certain[] = {1, 1, 1, 4, 4, 4, 7};
  for (size_t i = 0; i < tokens.size(); ++i) {
    Tell(generation, {tokens[i]});
    EXPECT_EQ(generation.certain_tokens(), certain[i]) << i;
  }
}

// Token, text, offset of each token that was told, by the piece it came with.
using Listed = std::vector<std::vector<std::tuple<int32_t, std::string, size_t>>>;
Listed List(Generation& generation, const Ids& tokens) {
  Listed listed;
  for (const int32_t token : tokens) {
    auto& piece = listed.emplace_back();
    for (const GeneratedToken& told : generation.Push(Choosing(token)).tokens)
      piece.emplace_back(told.token, told.text, told.offset);
  }
  return listed;
}

GenerationOptions WithLogprobs(std::vector<std::string> stops = {}, size_t n = 0) {
  GenerationOptions options = Greedy(std::move(stops));
  options.logprobs = n;
  return options;
}

TEST(Generation, TokensAreToldWithTheTextThatTheyAdd) {
  const auto tokenizer = Letters();
  Generation generation(*tokenizer, WithLogprobs(), kSeen, 100);
  EXPECT_EQ(List(generation, {kA, kLead, kTrail, kBc, kBos, kEos}), (Listed{{{kA, "a", 0}},
                                                                            {},
                                                                            {{kLead, "\xC3", 1}, {kTrail, "\xA9", 1}},
                                                                            {{kBc, "bc", 2}},
                                                                            {{kBos, "<s>", 4}},
                                                                            {}}));
  Generation silent(*tokenizer, Greedy(), kSeen, 100);
  EXPECT_EQ(List(silent, {kA, kEos}), (Listed{{}, {}}));
}

TEST(Generation, TokensThatAStopStringHidesAreNotTold) {
  const auto tokenizer = Letters();
  const struct {
    const char* name;
    Ids tokens;
    std::string stop;
    Listed told;
  } cases[] = {
      {"between tokens", {kC, kA, kB, kC}, "bc", {{{kC, "c", 0}}, {{kA, "a", 1}}, {}, {}}},
      {"all of it", {kA, kB}, "ab", {{}, {}}},
      {"what was held back", {kA, kA, kB}, "aab", {{}, {}, {}}},
      {"inside a token", {kC, kAb, kC}, "bc", {{{kC, "c", 0}}, {}, {{kAb, "ab", 1}}}},
      {"a character of two tokens", {kC, kLead, kTrail}, "\u00E9", {{{kC, "c", 0}}, {}, {}}},
      {"a token that ends the text", {kC, kBos}, "<s>", {{{kC, "c", 0}}, {}}},
  };
  for (const auto& c : cases) {
    Generation generation(*tokenizer, WithLogprobs({c.stop}), kSeen, 100);
    EXPECT_EQ(List(generation, c.tokens), c.told) << c.name;
  }
  GenerationOptions options = WithLogprobs({"abc"});
  options.max_tokens = 3;
  Generation whole(*tokenizer, options, kSeen, 100);
  EXPECT_EQ(List(whole, {kC, kAb, kLead}), (Listed{{{kC, "c", 0}}, {}, {{kAb, "ab", 1}, {kLead, "\xC3", 3}}}));
}

// Probabilities 1/2, 1/4 and 1/8 of three letters and the rest spread: whatever the sampler does to the logits.
TEST(Generation, LogProbabilitiesAreTheModelsOwn) {
  const auto tokenizer = Letters();
  std::vector<float> logits(kVocab + 5, std::log(1.0f / 64));  // the last 5 have no token
  std::fill(logits.begin() + kVocab, logits.end(), 50.0f);
  logits[kA] = std::log(1.0f / 4) + 3;
  logits[kB] = std::log(1.0f / 2) + 3;
  logits[kC] = std::log(1.0f / 8) + 3;
  for (const int32_t id : {kUnk, kBos, kAb, kBc, kLead, kTrail, kEos}) logits[id] = std::log(1.0f / 56) + 3;
  GenerationOptions options = WithLogprobs({}, 2);
  options.sampler = {.temperature = 0.1f, .top_k = 1, .presence_penalty = 2, .logit_bias = {{kC, 50}}};
  Generation generation(*tokenizer, options, kSeen, 100);
  const GeneratedToken told = generation.Push(logits).tokens.at(0);
  EXPECT_EQ(told.token, kC);
  EXPECT_NEAR(told.logprob, std::log(1.0 / 8), 1e-6);
  ASSERT_EQ(told.likeliest.size(), 2u);
  EXPECT_EQ(told.likeliest[0].text, "b");
  EXPECT_NEAR(told.likeliest[0].logprob, std::log(1.0 / 2), 1e-6);
  EXPECT_EQ(told.likeliest[1].text, "a");
  EXPECT_NEAR(told.likeliest[1].logprob, std::log(1.0 / 4), 1e-6);
  // Equals: the lower id first. A token that is never shown has its name.
  options.logprobs = 20;
  Generation all(*tokenizer, options, kSeen, 100);
  const auto likeliest = all.Push(logits).tokens.at(0).likeliest;
  ASSERT_EQ(likeliest.size(), kVocab);
  EXPECT_EQ(likeliest[3].token, kUnk);
  EXPECT_EQ(likeliest[4].token, kBos);
  EXPECT_TRUE(likeliest[4].special && likeliest[4].text == "<s>");
  EXPECT_FALSE(likeliest[5].special);
  EXPECT_NEAR(likeliest[9].logprob, std::log(1.0 / 56), 1e-6);
}

TEST(Generation, AnIgnoredEndIsNeverChosen) {
  const auto tokenizer = Letters();
  for (const float temperature : {0.0f, 100.0f}) {
    GenerationOptions options;
    options.sampler = {.temperature = temperature, .top_k = 0, .top_p = 1, .min_p = 0, .logit_bias = {{kEos, 100}}};
    options.ignore_end = true;
    Generation generation(*tokenizer, options, kSeen, 100);
    for (int i = 0; i < 50; ++i) {
      const Generation::Output out = generation.Push(Choosing(kEos));
      EXPECT_NE(out.token, kEos);
      EXPECT_FALSE(out.finish.has_value());
    }
  }
}

TEST(Generation, BadOptionsAreRefused) {
  const auto tokenizer = Letters();
  EXPECT_THROW(Generation(*tokenizer, Greedy({"a", ""}), kSeen, 100), Error);
  GenerationOptions options;
  options.sampler.temperature = -1;
  EXPECT_THROW(Generation(*tokenizer, options, kSeen, 100), Error);
  for (const int32_t unknown : {-1, static_cast<int32_t>(kVocab)}) {
    options.sampler = {.logit_bias = {{unknown, 1}}};
    EXPECT_THROW(Generation(*tokenizer, options, kSeen, 100), Error);
  }
}

// The context of 64 tokens holds 64 of a prompt, behind which nothing is generated.
TEST(Generate, APromptThatIsOnlyReadMayFillTheContext) {
  const auto model = ModelThatSays(0, 3, {"a", "b", "c"});
  const auto tokenizer = Tokenizer::Create(LoadVocabulary(model->file()));
  Engine engine(model, {.threads = 1, .compute = ComputeChoice::kF32});
  const auto read = [&](size_t n_prompt, size_t max_tokens) {
    Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full")));
    GenerateOptions options;
    options.max_tokens = max_tokens;
    Generate(engine, *tokenizer, sequence, std::vector<int32_t>(n_prompt, 0), options);
    return sequence.tokens().size();
  };
  EXPECT_EQ(read(64, 0), 64u);
  EXPECT_THROW(read(65, 0), Error);
  EXPECT_EQ(read(63, 1), 63u);
  EXPECT_THROW(read(64, 1), Error);
}

// The likeliest row is padding: it has no token, so it gets no logit and is never said.
TEST(Generate, RowsWithoutATokenAreNeverSaid) {
  const auto model = ModelThatSays(5, 6, {"a", "b", "c"});
  for (const float temperature : {0.0f, 5.0f}) {
    GenerateOptions options;
    options.sampler = {.temperature = temperature, .top_k = 0, .top_p = 1, .min_p = 0};
    options.max_tokens = 30;
    const GenerateResult result = Say(model, options);
    EXPECT_EQ(result.generated_tokens, 30u);
    EXPECT_EQ(result.text.size(), 30u) << result.text;
  }
  Engine engine(model, {.threads = 1, .compute = ComputeChoice::kF32});
  Sequence sequence(engine.MakeCacheConfig(CacheSpec::Parse("full")));
  const std::vector<int32_t> known = {0, 2}, padding = {3};
  engine.Prefill({{&sequence, known, LogitsRows::kAll}}, [](std::span<const LogitsRow> rows) {
    for (const LogitsRow& row : rows) EXPECT_EQ(row.logits.size(), 3u);
  });
  EXPECT_THROW(engine.Decode({{&sequence, padding, LogitsRows::kLast}}), Error);
}

TEST(Memory, TooMuchIsRefusedWithBothNumbers) {
  ASSERT_TRUE(AvailableMemory().has_value());
  EXPECT_GT(*AvailableMemory(), size_t{1} << 20);
  RequireMemory(1, "nothing");
  try {
    RequireMemory(size_t{1} << 60, "a dream");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
    EXPECT_NE(std::string(error.what()).find("a dream needs 1.00 EiB"), std::string::npos) << error.what();
  }
}

TEST(Memory, BytesForPeople) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(1536), "1.50 KiB");
  EXPECT_EQ(HumanBytes(size_t{25} << 20), "25.0 MiB");
}

}  // namespace
}  // namespace lesskv
