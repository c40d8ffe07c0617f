#include "eval/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.h"
#include "base/memory.h"

namespace lesskv {
namespace {

// Keys that usually have one value in a whole report; a table states them once.
constexpr std::string_view kCaptionKeys[] = {
    "model", "model_fingerprint", "mode", "step",    "prompt", "ask",     "ctx",
    "texts", "windows",           "seed", "threads", "isa",    "compute", "version", "n_local_layers",
    "local_window"};

// Bytes in a string that a terminal shows as one column each: code points, good enough for our tables.
size_t Width(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

bool IsNothing(const Json& value) {
  return value.is_null() || (value.is_number_float() && !std::isfinite(value.get<double>()));
}

bool Missing(const Json& row, const std::string& key) { return !row.contains(key) || IsNothing(row[key]); }

std::string Number(const Json& value, const Column& column) {
  if (value.is_array() && column.style != Column::Style::kText) {
    std::string joined;
    for (const Json& element : value) joined += (joined.empty() ? "" : " ") + Number(element, column);
    return joined;
  }
  switch (column.style) {
    case Column::Style::kCount:
      return fmt::format("{:.{}f}", value.get<double>(), column.digits);
    case Column::Style::kFixed:
      return fmt::format("{:.{}f}", value.get<double>(), column.digits);
    case Column::Style::kPercent:
      return fmt::format("{:.{}f}", 100 * value.get<double>(), column.digits);
    case Column::Style::kBytes:
      return HumanBytes(value.get<size_t>());
    case Column::Style::kText:
      break;
  }
  return value.is_string() ? value.get<std::string>() : value.dump();
}

std::string Cell(const Json& row, const Column& column) {
  if (Missing(row, column.key)) return "-";
  std::string text = Number(row[column.key], column);
  if (!column.error_key.empty() && !Missing(row, column.error_key)) {
    text += " ± " + Number(row[column.error_key], column);
  }
  return text;
}

struct Table {
  std::vector<std::vector<std::string>> cells;  // [row][column], titles first
  std::vector<bool> left;                       // columns of text
  std::vector<size_t> widths;
};

// In Markdown a bar ends a cell and a line feed a row.
std::string Escaped(std::string_view text) {
  std::string out;
  for (const char c : text) out += c == '|' ? "\\|" : c == '\n' || c == '\r' ? " " : std::string(1, c);
  return out;
}

Table MakeTable(const Report& report, bool markdown) {
  Table table;
  table.cells.resize(report.rows.size() + 1);
  for (const Column& column : report.columns) {
    const auto has = [&](const Json& row) { return row.contains(column.key); };
    if (std::none_of(report.rows.begin(), report.rows.end(), has)) continue;
    table.cells[0].push_back(column.title);
    table.left.push_back(column.style == Column::Style::kText);
    table.widths.push_back(Width(column.title));
    for (size_t i = 0; i < report.rows.size(); ++i) {
      const std::string cell = Cell(report.rows[i], column);
      table.cells[i + 1].push_back(markdown ? Escaped(cell) : cell);
      table.widths.back() = std::max(table.widths.back(), Width(table.cells[i + 1].back()));
    }
  }
  return table;
}

std::string Padded(const std::string& text, size_t width, bool left) {
  const std::string space(width - Width(text), ' ');
  return left ? text + space : space + text;
}

std::string Line(const Table& table, size_t row, std::string_view begin, std::string_view between,
                 std::string_view end) {
  std::string line(begin);
  for (size_t c = 0; c < table.widths.size(); ++c) {
    if (c > 0) line += between;
    line += Padded(table.cells[row][c], table.widths[c], table.left[c]);
  }
  line += end;
  while (line.ends_with(' ')) line.pop_back();
  return line + "\n";
}

// "model x.gguf, mode stream, ...": what all rows share.
std::string Caption(const Report& report) {
  std::string caption;
  for (const std::string_view view : kCaptionKeys) {
    const std::string key(view);
    if (report.rows.empty() || Missing(report.rows[0], key)) continue;
    const Json& value = report.rows[0][key];
    const auto same = [&](const Json& row) { return row.contains(key) && row[key] == value; };
    if (!std::all_of(report.rows.begin(), report.rows.end(), same)) continue;
    std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    if (value.is_array()) text = value.size() == 1 ? value[0].get<std::string>() : std::to_string(value.size());
    caption += fmt::format("{}{} {}", caption.empty() ? "" : ", ", key, text);
  }
  return caption;
}

std::string FormatTable(const Report& report) {
  const Table table = MakeTable(report, false);
  std::string text = Caption(report) + "\n\n" + Line(table, 0, "", "  ", "");
  for (size_t r = 1; r < table.cells.size(); ++r) text += Line(table, r, "", "  ", "");
  for (const std::string& note : report.notes) text += "\n" + note;
  return report.notes.empty() ? text : text + "\n";
}

std::string FormatMarkdown(const Report& report) {
  const Table table = MakeTable(report, true);
  std::string text = Caption(report) + "\n\n" + Line(table, 0, "| ", " | ", " |") + "|";
  for (size_t c = 0; c < table.widths.size(); ++c) {
    text += table.left[c] ? std::string(table.widths[c] + 2, '-') : std::string(table.widths[c] + 1, '-') + ":";
    text += "|";
  }
  text += "\n";
  for (size_t r = 1; r < table.cells.size(); ++r) text += Line(table, r, "| ", " | ", " |");
  for (const std::string& note : report.notes) text += "\n" + note + "\n";
  return text;
}

std::string CsvValue(const Json& value) {
  if (IsNothing(value)) return "";
  if (value.is_array()) {
    std::string joined;
    for (const Json& element : value) joined += (joined.empty() ? "" : ";") + CsvValue(element);
    return joined;
  }
  return value.is_string() ? value.get<std::string>() : value.dump();
}

std::string CsvQuoted(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

std::string FormatCsv(const Report& report) {
  std::vector<std::string> keys;
  std::set<std::string> known;
  for (const Json& row : report.rows) {
    for (const auto& [key, value] : row.items()) {
      if (known.insert(key).second) keys.push_back(key);
    }
  }
  std::string text;
  for (size_t c = 0; c < keys.size(); ++c) text += (c > 0 ? "," : "") + CsvQuoted(keys[c]);
  for (const Json& row : report.rows) {
    text += "\n";
    for (size_t c = 0; c < keys.size(); ++c) {
      text += (c > 0 ? "," : "") + CsvQuoted(row.contains(keys[c]) ? CsvValue(row[keys[c]]) : "");
    }
  }
  return text + "\n";
}

}  // namespace

OutputFormat ParseOutputFormat(const std::string& text) {
  if (text == "table") return OutputFormat::kTable;
  if (text == "md") return OutputFormat::kMarkdown;
  if (text == "csv") return OutputFormat::kCsv;
  if (text == "json") return OutputFormat::kJson;
  Fail(ErrorCode::kInvalidArgument, "output format '{}': expected table, md, csv or json", text);
}

std::string Format(const Report& report, OutputFormat format) {
  switch (format) {
    case OutputFormat::kTable:
      return FormatTable(report);
    case OutputFormat::kMarkdown:
      return FormatMarkdown(report);
    case OutputFormat::kCsv:
      return FormatCsv(report);
    case OutputFormat::kJson:
      break;
  }
  return Dump(Json(report.rows)) + "\n";
}

}  // namespace lesskv
