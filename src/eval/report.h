// Results as rows of named values, and the four ways to print them. Rows always carry everything (report keys of
// engine/run_info.h and more); a table shows the columns that matter and says once, above, what is the same in every
// row.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine/run_info.h"

namespace lesskv {

enum class OutputFormat { kTable, kMarkdown, kCsv, kJson };
OutputFormat ParseOutputFormat(const std::string& text);  // "table", "md", "csv", "json"; Error otherwise

struct Column {
  enum class Style { kText, kCount, kFixed, kPercent, kBytes };
  std::string key;
  std::string title;
  Style style = Style::kText;
  int digits = 0;
  std::string error_key = {};  // a standard error, printed behind the value as "± 0.012"
};

struct Report {
  std::vector<Column> columns;  // of kTable and kMarkdown; a column whose key no row has is left out
  std::vector<Json> rows;
  std::vector<std::string> notes;  // printed under a table, one a line
};

// The report as text, ending in a line feed. JSON is an array of rows with all keys; CSV has the union of all keys, in
// order of first appearance, arrays joined by ';' (RFC 4180 quoting). A value that is missing or not a number is null
// in JSON, empty in CSV and "-" in tables.
std::string Format(const Report& report, OutputFormat format);

}  // namespace lesskv
