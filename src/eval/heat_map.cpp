#include "eval/heat_map.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "base/atomic_file.h"
#include "base/error.h"

namespace lesskv {
namespace {

constexpr int kCellWidth = 64, kCellHeight = 28, kLeft = 60, kTop = 44, kGap = 28, kPanelsARow = 3;

struct Panel {
  std::string title, subtitle;
  std::vector<double> depths;
  std::map<size_t, std::vector<double>> by_length;  // accuracies by depth

  int Width() const { return kLeft + kCellWidth * static_cast<int>(std::max<size_t>(by_length.size(), 3)); }
  int Height() const { return kTop + kCellHeight * static_cast<int>(depths.size()) + 24; }
};

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// White to dark blue through a light one: also readable in grey.
std::string Colour(double share) {
  const auto mix = [&](int from, int to) { return static_cast<int>(std::lround(from + (to - from) * share)); };
  return fmt::format("rgb({},{},{})", mix(247, 8), mix(251, 69), mix(255, 148));
}

std::string Cell(int x, int y, double share) {
  return fmt::format(
      "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\" stroke=\"#fff\"/>"
      "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"{}\">{:.0f}</text>\n",
      x, y, kCellWidth, kCellHeight, Colour(share), x + kCellWidth / 2, y + kCellHeight / 2 + 4,
      share > 0.55 ? "#fff" : "#222", 100 * share);
}

std::string Draw(const Panel& panel, int x, int y) {
  std::string svg =
      fmt::format("<text x=\"{}\" y=\"{}\" font-weight=\"bold\">{}</text>\n", x, y + 14, Escaped(panel.title));
  svg += fmt::format("<text x=\"{}\" y=\"{}\" fill=\"#555\">{}</text>\n", x, y + 32, Escaped(panel.subtitle));
  int column = x + kLeft;
  const int bottom = y + kTop + kCellHeight * static_cast<int>(panel.depths.size());
  for (const auto& [length, accuracies] : panel.by_length) {
    for (size_t d = 0; d < accuracies.size(); ++d) {
      svg += Cell(column, y + kTop + kCellHeight * static_cast<int>(d), accuracies[d]);
    }
    svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n", column + kCellWidth / 2,
                       bottom + 16, length);
    column += kCellWidth;
  }
  for (size_t d = 0; d < panel.depths.size(); ++d) {
    svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{:.0f} %</text>\n", x + kLeft - 6,
                       y + kTop + kCellHeight * static_cast<int>(d) + kCellHeight / 2 + 4, 100 * panel.depths[d]);
  }
  return svg;
}

std::vector<Panel> CollectPanels(const Report& report) {
  std::vector<Panel> panels;
  for (const Json& row : report.rows) {
    const std::string title = row["kv_spec"], task = row["task"];
    const auto same = [&](const Panel& panel) {
      return panel.title == title && panel.subtitle.starts_with(task + ",");
    };
    auto found = std::find_if(panels.begin(), panels.end(), same);
    if (found == panels.end()) {
      panels.push_back({title, "", row["depths"].get<std::vector<double>>(), {}});
      found = panels.end() - 1;
    }
    found->by_length[row["length"].get<size_t>()] = row["accuracy_by_depth"].get<std::vector<double>>();
    found->subtitle = fmt::format("{}, {:.0f} KiB", task, row["kv_bytes"].get<double>() / 1024);
  }
  return panels;
}

}  // namespace

std::string HeatMapSvg(const Report& report) {
  const std::vector<Panel> panels = CollectPanels(report);
  std::string body;
  int width = 0, y = kGap;
  for (size_t i = 0; i < panels.size(); i += kPanelsARow) {
    int x = kGap, height = 0;
    for (size_t k = i; k < std::min(i + kPanelsARow, panels.size()); ++k) {
      body += Draw(panels[k], x, y);
      x += panels[k].Width() + kGap;
      height = std::max(height, panels[k].Height());
    }
    width = std::max(width, x);
    y += height + kGap;
  }
  std::string footer = "accuracy in %, by prompt length (tokens, right) and depth of the answer (down)";
  if (!report.rows.empty()) {
    footer += fmt::format("; model {}, {}, seed {}", report.rows[0]["model_fingerprint"].get<std::string>(),
                          report.rows[0]["mode"].get<std::string>(), report.rows[0]["seed"].get<uint64_t>());
  }
  width = std::max(width, 720);
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" "
      "font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"{0}\" height=\"{1}\" fill=\"#fff\"/>\n{2}"
      "<text x=\"{3}\" y=\"{4}\" fill=\"#555\">{5}</text>\n</svg>\n",
      width, y + kGap, body, kGap, y + 4, Escaped(footer));
}

void CheckHeatMapPath(const std::string& path) {
  if (path.ends_with(".svg") || path.ends_with(".html")) return;
  Fail(ErrorCode::kInvalidArgument, "--heatmap: expected a file name ending in .svg or .html, found {}", path);
}

void WriteHeatMap(const std::string& path, const Report& report) {
  CheckHeatMapPath(path);
  const std::string svg = HeatMapSvg(report);
  std::string text = svg;
  if (path.ends_with(".html")) {
    text = "<!DOCTYPE html>\n<html><head><meta charset=\"utf-8\"><title>lesskv recall</title></head><body>\n" + svg +
           "</body></html>\n";
  }
  AtomicFile file(path);
  file.Write(std::as_bytes(std::span(text)));
  file.Commit();
}

}  // namespace lesskv
