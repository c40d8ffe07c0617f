// A JSON file's values with checks: every refusal names the file, the key, what was expected and what was found.
#pragma once

#include <fmt/core.h>

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"

namespace lesskv {

// How many arrays and objects may lie in each other. The library copies, prints and compares a value by recursion, so
// that a text of some 10,000 brackets would end the program.
constexpr size_t kMostJsonLevels = 64;

// Of a text of JSON: how many arrays and objects it has, and how many of them lie in each other at most. Exact up to
// the first mistake in it, where the parser stops.
struct JsonExtent {
  size_t parts = 0, levels = 0;
};
JsonExtent MeasureJson(std::string_view json);
inline bool NestsTooDeep(std::string_view json) { return MeasureJson(json).levels > kMostJsonLevels; }

// What all JSON that others wrote is read by. Throws Json::exception, also for a text that nests too deep.
template <typename Json = nlohmann::json>
Json ParseJson(std::string_view text) {
  if (NestsTooDeep(text))
    throw Json::parse_error::create(101, size_t{0}, fmt::format("nested deeper than {} levels", kMostJsonLevels), nullptr);
  return Json::parse(text.begin(), text.end());
}

// The object in a file. Throws Error: see MappedFile::Open; kBadFile when it is not JSON or not an object.
nlohmann::json LoadJsonObject(const std::string& path);

// What a JsonReader refuses.
class FieldError : public Error {
 public:
  FieldError(ErrorCode code, std::string field, const std::string& message)
      : Error(code, message), field_(std::move(field)) {}
  const std::string& field() const { return field_; }  // the keys that lead to it: "messages.0.role"

 private:
  std::string field_;
};

// A view of one object, which must outlive it. A key that is null counts as absent.
class JsonReader {
 public:
  // `where` names the object in messages: the file's path, and the keys that lead to it.
  JsonReader(const nlohmann::json& object, std::string where) : object_(&object), where_(std::move(where)) {}

  const std::string& where() const { return where_; }
  const nlohmann::json& value() const { return *object_; }
  const nlohmann::json* Find(std::string_view key) const;  // null when absent
  bool Has(std::string_view key) const { return Find(key) != nullptr; }
  // The first of `keys` that is there; the first of all when none is.
  std::string_view AnyOf(std::initializer_list<std::string_view> keys) const;

  // Without a fallback the key must be there.
  uint32_t Count(std::string_view key) const;  // in [0, 2^32)
  uint32_t CountOr(std::string_view key, uint32_t fallback) const { return Has(key) ? Count(key) : fallback; }
  double Real(std::string_view key) const;  // finite
  double RealOr(std::string_view key, double fallback) const { return Has(key) ? Real(key) : fallback; }
  bool Truth(std::string_view key) const;
  bool TruthOr(std::string_view key, bool fallback) const { return Has(key) ? Truth(key) : fallback; }
  std::string Text(std::string_view key) const;
  std::string TextOr(std::string_view key, std::string_view fallback) const {
    return Has(key) ? Text(key) : std::string(fallback);
  }
  std::vector<double> Reals(std::string_view key) const;
  // The array under `key`.
  const nlohmann::json& Array(std::string_view key) const;
  JsonReader Object(std::string_view key) const;

  std::string Field(std::string_view key) const;  // as FieldError's
  [[noreturn]] void Refuse(std::string_view key, std::string_view expected, std::string_view found) const;
  [[noreturn]] void Refuse(std::string_view key, std::string_view expected) const;  // what is there was found

 private:
  const nlohmann::json& Require(std::string_view key, std::string_view expected) const;

  const nlohmann::json* object_;
  std::string where_;
};

}  // namespace lesskv
