// Recall accuracy as one picture: a panel for each cache and task, prompt length to the right, depth downwards.
#pragma once

#include <string>

#include "eval/report.h"

namespace lesskv {

// A self-contained SVG of the rows of EvaluateRecall: every cell shows its percentage and is coloured by it.
std::string HeatMapSvg(const Report& report);

// Throws Error for a name that ends neither in ".svg" nor in ".html".
void CheckHeatMapPath(const std::string& path);

// Writes it to a file, as SVG, or inside an HTML page when the name ends in ".html". Throws Error for another ending or
// when it cannot be written.
void WriteHeatMap(const std::string& path, const Report& report);

}  // namespace lesskv
