#include "eval/report.h"

#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "eval/metrics.h"

namespace lesskv {
namespace {

Report Sample() {
  Report report;
  report.columns = {{"kv_spec", "cache"},
                    {"perplexity", "ppl", Column::Style::kFixed, 2, "perplexity_se"},
                    {"top1", "top-1 %", Column::Style::kPercent, 1},
                    {"kv_bytes", "bytes", Column::Style::kBytes},
                    {"never", "never", Column::Style::kFixed, 1}};
  report.rows = {Json{{"mode", "stream"},
                      {"kv_spec", "full"},
                      {"perplexity", 10.0},
                      {"perplexity_se", 0.25},
                      {"top1", 1.0},
                      {"kv_bytes", 2048}},
                 Json{{"mode", "stream"},
                      {"kv_spec", "mix(k=q8, v=q4)"},
                      {"perplexity", kNotANumber},
                      {"perplexity_se", kNotANumber},
                      {"top1", 0.5},
                      {"kv_bytes", 512},
                      {"depths", {0.0, 0.5}}}};
  return report;
}

TEST(ReportTest, TableShowsColumnsAndTheCaptionOnce) {
  EXPECT_EQ(Format(Sample(), OutputFormat::kTable),
            "mode stream\n\n"
            "cache                     ppl  top-1 %     bytes\n"
            "full             10.00 ± 0.25    100.0  2.00 KiB\n"
            "mix(k=q8, v=q4)             -     50.0     512 B\n");
}

TEST(ReportTest, Markdown) {
  EXPECT_EQ(Format(Sample(), OutputFormat::kMarkdown),
            "mode stream\n\n"
            "| cache           |          ppl | top-1 % |    bytes |\n"
            "|-----------------|-------------:|--------:|---------:|\n"
            "| full            | 10.00 ± 0.25 |   100.0 | 2.00 KiB |\n"
            "| mix(k=q8, v=q4) |            - |    50.0 |    512 B |\n");
}

// What a file's name may hold ends no cell and no row, and a number without end is none.
TEST(ReportTest, BarsLineFeedsAndInfinities) {
  Report report;
  report.columns = {{"kv_spec", "cache"}, {"perplexity", "ppl", Column::Style::kFixed, 2}};
  report.rows = {{{"kv_spec", "less(file=\"a|b\nc\")"}, {"perplexity", std::numeric_limits<double>::infinity()}}};
  EXPECT_EQ(Format(report, OutputFormat::kMarkdown),
            "\n\n"
            "| cache               | ppl |\n"
            "|---------------------|----:|\n"
            "| less(file=\"a\\|b c\") |   - |\n");
  EXPECT_EQ(Format(report, OutputFormat::kCsv), "kv_spec,perplexity\n\"less(file=\"\"a|b\nc\"\")\",\n");
}

TEST(ReportTest, CsvHasAllKeysAndQuotes) {
  EXPECT_EQ(Format(Sample(), OutputFormat::kCsv),
            "mode,kv_spec,perplexity,perplexity_se,top1,kv_bytes,depths\n"
            "stream,full,10.0,0.25,1.0,2048,\n"
            "stream,\"mix(k=q8, v=q4)\",,,0.5,512,0.0;0.5\n");
}

TEST(ReportTest, JsonIsAnArrayThatParsesAndHasNullForNoNumber) {
  const Json parsed = Json::parse(Format(Sample(), OutputFormat::kJson));
  ASSERT_EQ(parsed.size(), 2u);
  EXPECT_EQ(parsed[0]["perplexity"], 10.0);
  EXPECT_TRUE(parsed[1]["perplexity"].is_null());
  EXPECT_EQ(parsed[1]["depths"], (Json{0.0, 0.5}));
}

TEST(ReportTest, UnknownFormatIsRefused) {
  EXPECT_EQ(ParseOutputFormat("md"), OutputFormat::kMarkdown);
  EXPECT_THROW(ParseOutputFormat("xml"), Error);
}

}  // namespace
}  // namespace lesskv
