#include "random_spec.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/error.h"

namespace lesskv::testing_support {
namespace {

char g_subject[4096];

void PrintSubject(int signal) {
  const ssize_t written = write(STDERR_FILENO, g_subject, std::strlen(g_subject));
  (void)written;
  std::signal(signal, SIG_DFL);  // by which the program ends
}

size_t RandomCount(const Parameter& parameter, size_t ctx, Rng& rng) {
  // What stops below a thousand million may be memory.
  const auto min = static_cast<size_t>(parameter.min);
  const auto max = static_cast<size_t>(parameter.max < 1e9 ? std::min(parameter.max, 8192.0) : 1e9);
  const double p = rng.Uniform();
  const size_t n = p < 0.15   ? min
                   : p < 0.55 ? min + rng.Below(20)
                   : p < 0.80 ? min + rng.Below(ctx)
                   : p < 0.93 ? 16 * (1 + rng.Below(8))
                   : p < 0.99 ? 3 * ctx
                              : max;
  return std::clamp(n, min, max);
}

std::string RandomRows(const Parameter& parameter, size_t ctx, Rng& rng) {
  const double p = rng.Uniform();
  if (p < 0.3) return fmt::format("{:.1f}%", 0.1 + 99.9 * std::pow(rng.Uniform(), 2));
  const size_t n = p < 0.6 ? rng.Below(40) : p < 0.92 ? rng.Below(ctx) : p < 0.98 ? ctx + rng.Below(ctx) : 1000000000;
  return std::to_string(std::max(n, static_cast<size_t>(parameter.min)));
}

std::string RandomReal(const Parameter& parameter, Rng& rng) {
  const double p = rng.Uniform();
  if (p < 0.1) return fmt::format("{:f}", parameter.min);
  if (p < 0.2) return fmt::format("{:f}", parameter.max);
  const double wide = p < 0.7 ? 1 : 20,
               value = parameter.min < 0 ? wide * rng.Normal() : parameter.min + wide * rng.Uniform();
  return fmt::format("{:.{}f}", std::clamp(value, parameter.min, parameter.max), 1 + rng.Below(6));
}

std::string RandomWord(std::string_view choices, Rng& rng) {
  std::vector<std::string> words = {""};
  for (const char c : choices) {
    if (c == '|')
      words.emplace_back();
    else
      words.back() += c;
  }
  return words[rng.Below(words.size())];
}

std::string RandomValue(const Parameter& parameter, size_t ctx, Rng& rng) {
  switch (parameter.kind) {
    case Parameter::Kind::kRows:
      return RandomRows(parameter, ctx, rng);
    case Parameter::Kind::kCount:
      return std::to_string(RandomCount(parameter, ctx, rng));
    case Parameter::Kind::kReal:
      return RandomReal(parameter, rng);
    case Parameter::Kind::kWord:
      return RandomWord(parameter.choices, rng);
    case Parameter::Kind::kText:
      return "\"/tmp\"";  // a folder
  }
  return "";
}

bool Parses(const std::string& spec) {
  try {
    CacheSpec::Parse(spec);
    return true;
  } catch (const Error&) {
    return false;
  }
}

}  // namespace

std::string RandomTerm(const Method& method, size_t ctx, Rng& rng) {
  std::string term(method.name);
  const char* before = "(";
  for (const Parameter& parameter : method.parameters) {
    if (parameter.name == "file" || parameter.name == "sidecar") continue;
    const bool asked = parameter.positional || parameter.default_value.empty();
    if (!Chance(asked ? 0.6 : 0.3, rng)) continue;
    const bool named = !parameter.positional || Chance(0.2, rng);
    term += before + (named ? std::string(parameter.name) + "=" : "") + RandomValue(parameter, ctx, rng);
    before = ", ";
  }
  return *before == '(' ? term : term + ")";
}

CacheSpec RandomSpec(size_t ctx, Rng& rng) {
  constexpr size_t kTries = 8;
  std::string spec;
  std::vector<Stage> stages(std::begin(kStages) + 1, std::end(kStages));
  rng.Shuffle(stages);
  stages.insert(stages.begin(), Stage::kSelect);  // most others need tokens to leave
  for (const Stage stage : stages) {
    if (!Chance(stage == Stage::kSelect ? 0.95 : stage == Stage::kPrefill ? 0.25 : 0.5, rng)) continue;
    std::vector<const Method*> methods;
    for (const Method* method : Methods())
      if (method->stage == stage) methods.push_back(method);
    for (size_t i = 0; i < kTries; ++i) {
      const std::string term = RandomTerm(*methods[rng.Below(methods.size())], ctx, rng);
      const std::string more = spec.empty() ? term : Chance(0.5, rng) ? spec + "+" + term : term + " + " + spec;
      if (!Parses(more)) continue;
      spec = more;
      break;
    }
  }
  return spec.empty() ? CacheSpec() : CacheSpec::Parse(spec);
}

std::string Garbled(std::string spec, Rng& rng) {
  constexpr std::string_view kCharacters = "+(),=%\" .-0123456789abcdefghijklmnopqrstuvwxyz\n\t\xff";
  for (size_t n = 1 + rng.Below(3); n > 0; --n) {
    const size_t at = rng.Below(spec.size() + 1);
    switch (rng.Below(4)) {
      case 0:
        spec.insert(at, 1, kCharacters[rng.Below(kCharacters.size())]);
        break;
      case 1:
        spec.erase(at, 1 + rng.Below(4));
        break;
      case 2:
        spec.insert(at, spec.substr(rng.Below(spec.size() + 1), rng.Below(12)));
        break;
      default:
        spec.insert(at, std::string(RandomTerm(*Methods()[rng.Below(Methods().size())], 100, rng)));
    }
  }
  return spec;
}

void AddPrompt(RandomLife& life, size_t n, const CacheConfig& config) {
  const size_t chunk = config.prefill_chunk();
  if (chunk == 0) return life.push_back({n, StepKind::kPrompt, true});
  for (; n > 0; n -= life.back().n) life.push_back({std::min(n, chunk), StepKind::kStream});
  life.back().ends = true;
}

RandomLife MakeLife(const CacheConfig& config, size_t n_tokens, Rng& rng) {
  RandomLife life;
  size_t left = n_tokens;
  const auto take = [&](size_t n) { return n = std::min(n, left), left -= n, n; };
  const size_t chunk = config.prefill_chunk(), most = chunk == 0 ? n_tokens : 60 * chunk;
  const auto prompt = [&](size_t n) { AddPrompt(life, take(std::min(n, most)), config); };
  if (Chance(0.85, rng)) {
    constexpr size_t kUsual[] = {1, 1, 2, 3, 15, 16, 17, 45, 128, 129};
    prompt(Chance(0.5, rng) ? kUsual[rng.Below(std::size(kUsual))] : 1 + rng.Below(left));
  }
  while (left > 0 && life.size() < 120) {
    switch (rng.Below(5)) {
      case 0:
        for (size_t n = 1 + rng.Below(40); n > 0 && left > 0; --n) life.push_back({take(1), StepKind::kDecode});
        break;
      case 1:  // short turns
        for (size_t n = 1 + rng.Below(5); n > 0 && left > 0; --n) {
          prompt(1 + rng.Below(3));
          for (size_t answer = rng.Below(4); answer > 0 && left > 0; --answer)
            life.push_back({take(1), StepKind::kDecode});
        }
        break;
      case 2:
        life.push_back({take(1 + rng.Below(20)), StepKind::kStream});
        break;
      case 3:
        life.push_back({take(2 + rng.Below(6)), StepKind::kDecode});
        break;
      default:
        prompt(1 + rng.Below(60));
    }
  }
  return life;
}

bool Chance(double p, Rng& rng) { return rng.Uniform() < p; }

Seeds::Seeds(uint64_t n) : end(n) {
  for (const int signal : {SIGABRT, SIGFPE}) std::signal(signal, PrintSubject);
  const char* const wanted = std::getenv("LESSKV_RANDOM_SPECS");
  if (wanted != nullptr && std::sscanf(wanted, "%lu:%lu", &first, &end) != 2)
    ADD_FAILURE() << "LESSKV_RANDOM_SPECS=FIRST:END, found " << wanted;
}

void NameSubject(const std::string& name) { std::snprintf(g_subject, sizeof g_subject, "%s\n", name.c_str()); }

}  // namespace lesskv::testing_support
