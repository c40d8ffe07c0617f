"""Lines over two logarithmic axes as an SVG picture, for the tools that measure how a time grows."""
import math

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b"]


def log_picture(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
  """`lines`: points by name, all numbers positive. The x axis is labelled at every x that occurs, the y axis at powers of ten."""
  width, height, left, top = 560, 360, 70, 34
  every = [p for points in lines.values() for p in points]
  x0, x1 = (f(math.log2(x) for x, _ in every) for f in (min, max))
  y0, y1 = (rounding(f(math.log10(y) for _, y in every)) for f, rounding in ((min, math.floor), (max, math.ceil)))
  x_of = lambda x: left + (math.log2(x) - x0) / (x1 - x0) * (width - left - 20)
  y_of = lambda y: top + (y1 - math.log10(y)) / (y1 - y0) * (height - top - 44)
  parts = [f'<text x="{left}" y="20" font-weight="bold">{title}</text>']
  for x in sorted({x for x, _ in every}):
    parts.append(f'<line x1="{x_of(x):.1f}" y1="{top}" x2="{x_of(x):.1f}" y2="{height - 44}" stroke="#ddd"/>'
                 f'<text x="{x_of(x):.1f}" y="{height - 28}" text-anchor="middle">{x}</text>')
  for d in range(y0, y1 + 1):
    y = y_of(10 ** d)
    parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#ddd"/>'
                 f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** d:g}</text>')
  for i, (name, points) in enumerate(lines.items()):
    colour = COLOURS[i % len(COLOURS)]
    line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                 f'<text x="{left + 10}" y="{top + 16 + 15 * i}" fill="{colour}">{name}</text>')
  return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" '
          f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')
