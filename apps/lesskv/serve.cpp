// lesskv serve: an OpenAI-compatible server over one model.
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <thread>

#include "base/memory.h"
#include "chat_turns.h"
#include "commands.h"
#include "common.h"
#include "server/directory_backend.h"
#include "server/http_server.h"
#include "server/redis_backend.h"

namespace lesskv {
namespace {

struct ServeOptions {
  ModelOptions model;
  ChatOptions chat;
  std::string kv = "full";
  std::vector<std::string> allow_kv;
  std::string kv_memory, alias, api_key_file, store, store_size;
  size_t store_days = 0;  // 0: not said
  HttpOptions http;
  SchedulerOptions scheduler;
  size_t max_prompt = 0, max_output = 1024, max_protected = 1024, max_seconds = 600, max_body_kib = 4096,
         read_seconds = 30;
};

// LESSKV_API_KEY, or the lines of a file, without the blanks around them. One that was set and has no key in it must not
// open the server to everybody.
std::vector<std::string> ApiKeys(const ServeOptions& options) {
  constexpr const char* kBlank = " \t\v\f";
  const char* const variable = std::getenv("LESSKV_API_KEY");
  const bool file = !options.api_key_file.empty();
  const std::string text = file ? ReadText(options.api_key_file) : variable == nullptr ? "" : variable;
  std::vector<std::string> keys;
  for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
    end = std::min(text.find_first_of("\r\n", begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    const size_t first = line.find_first_not_of(kBlank);
    if (first != std::string::npos) keys.push_back(line.substr(first, line.find_last_not_of(kBlank) + 1 - first));
  }
  if (keys.empty() && (file || !text.empty()))
    Fail(ErrorCode::kInvalidArgument, "{}{}: there is no key in it", file ? "--api-key-file " : "LESSKV_API_KEY",
         options.api_key_file);
  return keys;
}

// The model's template, if it has one that is known; one that was named must be.
std::optional<ChatTemplate> FindChatTemplate(const OpenedModel& opened, const ChatOptions& options) {
  try {
    return ChooseChatTemplate(opened, options);
  } catch (const Error& error) {
    if (!options.format.empty()) throw;
    Say("note: no /v1/chat/completions: {}\n", error.what());
    return std::nullopt;
  }
}

ApiLimits MakeLimits(const ServeOptions& options, const OpenedModel& opened) {
  ApiLimits limits;
  limits.ctx = opened.ctx;
  if (limits.ctx < 2) Fail(ErrorCode::kInvalidArgument, "--ctx: a server needs room for two tokens at least");
  limits.max_prompt = options.max_prompt == 0 ? limits.ctx - 1 : options.max_prompt;
  limits.max_output = options.max_output;
  limits.max_protected = options.max_protected;
  const size_t per_key = options.http.max_per_key;
  limits.max_choices =
      per_key == 0 ? options.scheduler.max_running : std::min(options.scheduler.max_running, per_key);
  limits.max_time = std::chrono::seconds(options.max_seconds);
  std::vector<std::string> specs = options.allow_kv;
  specs.insert(specs.begin(), options.kv);
  for (const std::string& spec : specs)
    limits.configs.push_back(opened.engine->MakeCacheConfig(CacheSpec::Parse(spec), opened.ctx));
  return limits;
}

// A server that could take no text at all is not begun.
void RequireMemoryForOne(const ApiLimits& limits, size_t kv_memory) {
  for (const auto& config : limits.configs)
    if (const size_t bytes = config->Plan(1, 1).bytes_peak; kv_memory != 0 && bytes > kv_memory)
      Fail(ErrorCode::kInvalidArgument, "--kv-memory: the shortest text under {} takes {} of {}", config->spec_text(),
           HumanBytes(bytes), HumanBytes(kv_memory));
}

void SayLine(const std::string& line) { Say("{}\n", line); }

// Each kind of store has its own limit; the other's is refused.
std::unique_ptr<StoreBackend> OpenBackend(const ServeOptions& options) {
  if (!IsAddress(options.store)) {
    if (options.store_days != 0)
      Fail(ErrorCode::kInvalidArgument, "--store-days: a directory is limited by --store-size, only Redis by time");
    ::umask(077);  // what was said is its owner's business alone
    const std::string size = options.store_size.empty() ? "4G" : options.store_size;
    return std::make_unique<DirectoryBackend>(options.store, ParseBytes(size, "--store-size"));
  }
  if (!options.store_size.empty())
    Fail(ErrorCode::kInvalidArgument, "--store-size: Redis is limited by its own maxmemory and by --store-days");
  const char* const password = std::getenv("LESSKV_REDIS_PASSWORD");
  RedisOptions redis{.address = ParseRedisAddress(options.store), .log = SayLine};
  if (password != nullptr) redis.password = password;
  if (options.store_days != 0) redis.unused = std::chrono::days(options.store_days);
  return std::make_unique<RedisBackend>(std::move(redis));
}

std::unique_ptr<SessionStore> OpenStore(const ServeOptions& options, const Engine& engine) {
  if (options.store.empty()) {
    if (!options.store_size.empty() || options.store_days != 0)
      Fail(ErrorCode::kInvalidArgument, "--store-size and --store-days are limits of a --store, which is not given");
    return nullptr;
  }
  return std::make_unique<SessionStore>(engine, OpenBackend(options), SayLine);
}

void Serve(ServeOptions options) {
  options.http.api_keys = ApiKeys(options);
  options.http.max_body = options.max_body_kib << 10;
  options.http.max_read = std::chrono::seconds(options.read_seconds);
  const OpenedModel opened = OpenModel(options.model);
  const std::optional<ChatTemplate> chat = FindChatTemplate(opened, options.chat);
  const std::string name =
      options.alias.empty() ? std::filesystem::path(options.model.model).stem().string() : options.alias;
  const ApiContext context{*opened.engine, *opened.tokenizer, chat ? &*chat : nullptr, name,
                           MakeLimits(options, opened)};
  options.scheduler.kv_memory =
      options.kv_memory.empty() ? AvailableMemory().value_or(0) / 2 : ParseBytes(options.kv_memory, "--kv-memory");
  RequireMemoryForOne(context.limits, options.scheduler.kv_memory);
  const std::unique_ptr<SessionStore> store = OpenStore(options, *opened.engine);
  Scheduler scheduler(*opened.engine, *opened.tokenizer, options.scheduler, store.get());
  HttpServer server(context, scheduler, options.http, store.get());
  const int port = server.Bind();
  Say("{} at http://{}:{}, cache {}, {} for caches\n", name, options.http.host, port,
      context.limits.Specs()[0], HumanBytes(options.scheduler.kv_memory));
  const std::atomic<bool>& stop = StopOnInterrupt();
  std::atomic<bool> ended = false;
  std::thread watch([&] {
    while (!stop && !ended) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    scheduler.Stop();  // answers in work end with an error
    while (!ended) {   // again, should it not have begun to listen
      server.Stop();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  });
  const bool stopped = server.Listen();
  ended = true;
  watch.join();
  if (!stopped) Fail(ErrorCode::kIo, "the system gives no more connections at port {}", port);
  Say("stopped\n");
}

void AddLimits(CLI::App& command, ServeOptions& o) {
  const auto add_count = [&](const char* name, auto& value, const char* help, int least, int most) {
    command.add_option(name, value, help)->option_text("N")->check(CLI::Range(least, most));
  };
  add_count("--parallel", o.scheduler.max_running, "Texts that share steps (default: 4)", 1, 1024);
  add_count("--queue", o.scheduler.max_queued,
            "Texts that may wait for a place; others get status 429; 0: nobody waits (default: 16)", 0, 4096);
  add_count("--step-tokens", o.scheduler.step_tokens, "Prompt tokens a step, beside generated ones (default: 256)", 1,
            65536);
  command
      .add_option("--kv-memory", o.kv_memory,
                  "Bytes for all caches, such as 4G (default: half of the available memory)")
      ->option_text("BYTES");
  add_count("--idle", o.scheduler.max_idle,
            "Caches of ended texts that are kept for their next turn, within --kv-memory (default: 64)", 0, 65536);
  command
      .add_option("--store", o.store,
                  "Where conversations outlive the server: a directory, or redis://HOST[:PORT][/DB], which replicas "
                  "share (default: nowhere)")
      ->option_text("DIR|URL");
  command.add_option("--store-size", o.store_size, "Bytes of a directory's files at most (default: 4G)")
      ->option_text("BYTES");
  add_count("--store-days", o.store_days, "Days that Redis keeps what is not used (default: 7)", 1, 3650);
  add_count("--max-prompt", o.max_prompt, "Tokens of a prompt at most (default: the context)", 1, 1 << 28);
  add_count("--max-output", o.max_output, "Tokens generated for a request at most (default: 1024)", 1, 1 << 28);
  add_count("--max-protected", o.max_protected, "Tokens that a request may protect (default: 1024)", 0, 1 << 28);
  add_count("--max-seconds", o.max_seconds, "Time for a request, waiting included (default: 600)", 1, 86400);
  add_count("--read-seconds", o.read_seconds, "Time for all of a request to come (default: 30)", 1, 3600);
  add_count("--per-key", o.http.max_per_key, "Texts of one API key at once (default: 0, any number)", 0, 4096);
  add_count("--connections", o.http.max_connections,
            "Connections that are served at once, a thread each (default: --parallel, --queue and 16)", 2, 4096);
  add_count("--max-body", o.max_body_kib, "KiB of a request's body at most (default: 4096)", 1, 1 << 20);
}

}  // namespace

void AddServeCommand(CLI::App& app) {
  CLI::App* command = app.add_subcommand("serve", "Serve a model over HTTP, as OpenAI's API");
  auto options = std::make_shared<ServeOptions>();
  AddModelOptions(*command, options->model);
  AddModelLoading(*command, options->model.loading);
  AddCacheOption(*command, options->kv);
  command->add_option("--allow-kv", options->allow_kv, "Another cache spec that requests may ask for; may be repeated")
      ->option_text("SPEC")
      ->allow_extra_args(false);
  command->add_option("--host", options->http.host, "Address to listen at (default: 127.0.0.1; others need a key)")
      ->option_text("ADDRESS");
  command->add_option("--port", options->http.port, "Port, 0: any that is free (default: 8080)")
      ->option_text("N")
      ->check(CLI::Range(0, 65535));
  command->add_option("--api-key-file", options->api_key_file, "File with an API key a line (default: LESSKV_API_KEY)")
      ->option_text("FILE");
  command->add_option("--alias", options->alias, "Name of the model (default: its file's)")->option_text("NAME");
  command
      ->add_option("--chat-template", options->chat.format,
                   "Chat format (default: recognised in the model's file): " + ChatFormatNames())
      ->option_text("NAME");
  AddLimits(*command, *options);
  command->callback([options] { Serve(*options); });
}

}  // namespace lesskv
