#include "server/api.h"

namespace lesskv {
namespace {

template <typename Value>
std::string MetricText(const char* name, const char* type, const char* help, Value value) {
  return fmt::format("# HELP lesskv_{0} {1}\n# TYPE lesskv_{0} {2}\nlesskv_{0} {3}\n", name, help, type, value);
}

// As a label's value: any text, in which three characters have a meaning of their own.
std::string Escaped(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '\\' || c == '"') escaped += '\\';
    escaped += c == '\n' ? std::string("\\n") : std::string(1, c);
  }
  return escaped;
}

// A line a spec, and before them one of their sum, which is what the metric was before it had labels.
template <typename Value>
std::string MetricTexts(const char* name, const char* type, const char* help, const SchedulerMetrics& m,
                        Value SpecMetrics::*value) {
  Value sum{};
  std::string lines;
  for (const auto& [spec, of_spec] : m.specs) {
    sum += of_spec.*value;
    lines += fmt::format("lesskv_spec_{}{{spec=\"{}\"}} {}\n", name, Escaped(spec), of_spec.*value);
  }
  return MetricText(name, type, help, sum) +
         fmt::format("# HELP lesskv_spec_{0} Of each cache spec: {1}\n# TYPE lesskv_spec_{0} {2}\n{3}", name, help,
                     type, lines);
}

}  // namespace

std::string MetricsText(const StoreMetrics& m) {
  std::string text =
      MetricText("store_saved_total", "counter", "Conversations written to the store.", m.saved) +
      MetricText("store_restored_total", "counter", "Conversations brought back from it.", m.restored) +
      MetricText("store_damaged_total", "counter", "Stored conversations that could not be read.", m.damaged) +
      MetricText("store_skipped_total", "counter", "Conversations that were not written.", m.skipped) +
      MetricText("store_unreachable_total", "counter", "Look-ups and writes that found it gone.", m.unreachable);
  if (!m.usage) return text;
  return text + MetricText("store_removed_total", "counter", "Files that made room for others.", m.usage->removed) +
         MetricText("store_files", "gauge", "Files of the store.", m.usage->files) +
         MetricText("store_bytes", "gauge", "Their bytes.", m.usage->bytes);
}

std::string MetricsText(const SchedulerMetrics& m) {
  std::string text;
  const auto add = [&](auto... all) { text += MetricText(all...); };
  const auto add_of = [&](const char* name, const char* type, const char* help, auto value) {
    text += MetricTexts(name, type, help, m, value);
  };
  add("requests_finished_total", "counter", "Texts that ended by themselves.", m.jobs_finished);
  add("requests_failed_total", "counter", "Texts that ended with an error.", m.jobs_failed);
  add("requests_cancelled_total", "counter", "Texts whose client went, or that the end of the server cut.",
      m.jobs_cancelled);
  add("requests_rejected_total", "counter", "Requests that found the queue full.", m.jobs_rejected);
  add("prompt_tokens_total", "counter", "Prompt tokens read, of ended texts.", m.prompt_tokens);
  add("generated_tokens_total", "counter", "Tokens generated, of ended texts.", m.generated_tokens);
  add("steps_total", "counter", "Steps of the engine.", m.steps);
  add_of("tokens_evicted_total", "counter", "Tokens that left the caches of ended texts; means over KV heads.",
         &SpecMetrics::tokens_evicted);
  add_of("tokens_absorbed_total", "counter", "Of these, folded into a residual state.", &SpecMetrics::tokens_absorbed);
  add_of("tokens_merged_total", "counter", "Of these, merged into tokens that stay.", &SpecMetrics::tokens_merged);
  add_of("tokens_recalled_total", "counter",
         "Offloaded tokens that were read again, each time; of ended texts, means over KV heads.",
         &SpecMetrics::tokens_recalled);
  add_of("prefix_hits_total", "counter", "Texts that went on with a cache of an earlier one.",
         &SpecMetrics::prefix_hits);
  add("prefix_tokens_total", "counter", "Prompt tokens that these did not read.", m.prefix_tokens);
  add("idle_dropped_total", "counter", "Idle caches that made room for others.", m.idle_dropped);
  add_of("idle", "gauge", "Caches of ended texts that are kept.", &SpecMetrics::idle);
  add_of("idle_bytes", "gauge", "Their bytes.", &SpecMetrics::idle_bytes);
  add_of("requests_running", "gauge", "Texts that take part in steps.", &SpecMetrics::running);
  add("requests_loading", "gauge", "Texts that have their place and wait for the store.", m.loading);
  add("requests_queued", "gauge", "Texts that wait.", m.queued);
  add_of("kv_bytes", "gauge", "Bytes of the running texts' caches.", &SpecMetrics::kv_bytes);
  add_of("kv_logical_bytes", "gauge", "Bytes that f16 full caches of the running texts would have.",
         &SpecMetrics::kv_bytes_logical);
  add("kv_bytes_reserved", "gauge", "Bytes these caches may reach.", m.kv_bytes_reserved);
  add_of("tokens_resident", "gauge", "Tokens in the running texts' caches; means over KV heads.",
         &SpecMetrics::tokens_resident);
  return text;
}

}  // namespace lesskv
