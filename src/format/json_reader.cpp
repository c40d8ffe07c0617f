#include "format/json_reader.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "base/mmap.h"
#include "format/gguf.h"  // Quoted

namespace lesskv {

using Json = nlohmann::json;

JsonExtent MeasureJson(std::string_view json) {
  JsonExtent extent;
  size_t level = 0;
  bool in_text = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (c == '"') in_text = !in_text;
    if (in_text && c == '\\') ++i;
    if (in_text) continue;
    if (c == '[' || c == '{') {
      ++extent.parts;
      extent.levels = std::max(extent.levels, ++level);
    }
    if ((c == ']' || c == '}') && level > 0) --level;
  }
  return extent;
}

Json LoadJsonObject(const std::string& path) {
  const MappedFile file = MappedFile::Open(path);
  const std::span<const std::byte> bytes = file.bytes();
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  Json value;
  try {
    value = ParseJson({text, bytes.size()});
  } catch (const Json::exception& error) {
    Fail(ErrorCode::kBadFile, "{} is not valid JSON ({})", path, error.what());
  }
  if (!value.is_object()) Fail(ErrorCode::kBadFile, "{} is not a JSON object", path);
  return value;
}

const Json* JsonReader::Find(std::string_view key) const {
  const auto it = object_->find(std::string(key));
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

std::string_view JsonReader::AnyOf(std::initializer_list<std::string_view> keys) const {
  for (const std::string_view key : keys)
    if (Has(key)) return key;
  return *keys.begin();
}

void JsonReader::Refuse(std::string_view key, std::string_view expected, std::string_view found) const {
  throw FieldError(ErrorCode::kBadFile, Field(key),
                   fmt::format("{}: {}: expected {}, found {}", where_, key, expected, found));
}

std::string JsonReader::Field(std::string_view key) const {
  constexpr std::string_view kBetween = ": ";
  std::string field;
  for (size_t at = where_.find(kBetween), end; at != std::string::npos; at = end) {
    at += kBetween.size();
    end = where_.find(kBetween, at);
    field += where_.substr(at, end - at) + ".";
  }
  return field + std::string(key);
}

void JsonReader::Refuse(std::string_view key, std::string_view expected) const {
  const Json* const value = Find(key);
  Refuse(key, expected, value == nullptr ? "none" : Quoted(value->dump(-1, ' ', true, Json::error_handler_t::replace)));
}

const Json& JsonReader::Require(std::string_view key, std::string_view expected) const {
  const Json* const value = Find(key);
  if (value == nullptr) Refuse(key, expected);
  return *value;
}

uint32_t JsonReader::Count(std::string_view key) const {
  constexpr std::string_view kExpected = "a count";
  const Json& value = Require(key, kExpected);
  if (!value.is_number_unsigned() || value.get<uint64_t>() > std::numeric_limits<uint32_t>::max())
    Refuse(key, kExpected);
  return value.get<uint32_t>();
}

double JsonReader::Real(std::string_view key) const {
  constexpr std::string_view kExpected = "a number";
  const Json& value = Require(key, kExpected);
  if (!value.is_number() || !std::isfinite(value.get<double>())) Refuse(key, kExpected);
  return value.get<double>();
}

bool JsonReader::Truth(std::string_view key) const {
  constexpr std::string_view kExpected = "true or false";
  const Json& value = Require(key, kExpected);
  if (!value.is_boolean()) Refuse(key, kExpected);
  return value.get<bool>();
}

std::string JsonReader::Text(std::string_view key) const {
  constexpr std::string_view kExpected = "a text";
  const Json& value = Require(key, kExpected);
  if (!value.is_string()) Refuse(key, kExpected);
  return value.get<std::string>();
}

std::vector<double> JsonReader::Reals(std::string_view key) const {
  std::vector<double> result;
  for (const Json& value : Array(key)) {
    if (!value.is_number() || !std::isfinite(value.get<double>())) Refuse(key, "an array of numbers");
    result.push_back(value.get<double>());
  }
  return result;
}

const Json& JsonReader::Array(std::string_view key) const {
  const Json& value = Require(key, "an array");
  if (!value.is_array()) Refuse(key, "an array");
  return value;
}

JsonReader JsonReader::Object(std::string_view key) const {
  const Json& value = Require(key, "an object");
  if (!value.is_object()) Refuse(key, "an object");
  return {value, fmt::format("{}: {}", where_, key)};
}

}  // namespace lesskv
