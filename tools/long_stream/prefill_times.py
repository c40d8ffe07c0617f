#!/usr/bin/env python3
"""Times prompts of growing length through caches: a table of microseconds a token and a picture of both logarithms.

  prefill_times.py --model FILE.gguf --kv "full+prefill(chunk=512)" --kv "cascade(1024)" [--length 1024 ...] [--rounds 2] [--most SECONDS]
                   [--picture OUT.svg]

Each time is a run of `lesskv bench` of its own, the rounds in turns; the table has medians. Lengths that would take a cache longer than --most
(estimated from the one before, as if its time grew with the square) are left out.
"""
import argparse
import json
import math
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd"]


def seconds(args, spec, length):
  command = [args.lesskv, "bench", "-m", args.model, "--kv", spec, "-p", str(length), "-n", "0", "-r", "1", "-t", str(args.threads), "-o", "json"]
  return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[0]["samples_seconds"][0]


def measure(args):
  """{spec: {length: seconds of each round}}"""
  times = {spec: {} for spec in args.kv}
  for _ in range(args.rounds):
    for spec in args.kv:
      before = 0.0
      for length in args.length:
        if 4 * before > args.most:
          break
        before = seconds(args, spec, length)
        times[spec].setdefault(length, []).append(before)
  return times


def picture(times) -> str:
  width, height, left, top = 560, 360, 70, 34
  points = {spec: [(n, statistics.median(t)) for n, t in of.items()] for spec, of in times.items()}
  every = [p for of in points.values() for p in of]
  x0, x1 = (f(math.log2(n) for n, _ in every) for f in (min, max))
  y0, y1 = (rounding(f(math.log10(t) for _, t in every)) for f, rounding in ((min, math.floor), (max, math.ceil)))
  x_of = lambda n: left + (math.log2(n) - x0) / (x1 - x0) * (width - left - 20)
  y_of = lambda t: top + (y1 - math.log10(t)) / (y1 - y0) * (height - top - 44)
  parts = [f'<text x="{left}" y="20" font-weight="bold">Seconds of a prompt by its tokens</text>']
  for n in sorted({n for n, _ in every}):
    parts.append(f'<line x1="{x_of(n):.1f}" y1="{top}" x2="{x_of(n):.1f}" y2="{height - 44}" stroke="#ddd"/><text x="{x_of(n):.1f}" y="{height - 28}" '
                 f'text-anchor="middle">{n}</text>')
  for d in range(y0, y1 + 1):
    y = y_of(10 ** d)
    parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** d:g}</text>')
  for i, (spec, of) in enumerate(points.items()):
    line = " ".join(f"{x_of(n):.1f},{y_of(t):.1f}" for n, t in of)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2"/>'
                 f'<text x="{left + 10}" y="{top + 16 + 15 * i}" fill="{COLOURS[i % len(COLOURS)]}">{spec}</text>')
  return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
          f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--lesskv", type=Path, default=ROOT / "build/release/apps/lesskv/lesskv")
  parser.add_argument("--model", required=True)
  parser.add_argument("--kv", action="append", required=True)
  parser.add_argument("--length", type=int, nargs="+", default=[2 ** i for i in range(10, 17)])
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--most", type=float, default=100, help="seconds that one prompt may take")
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument("--picture", type=Path)
  args = parser.parse_args()
  times = measure(args)
  print("| tokens | " + " | ".join(f"`{spec}`, µs a token" for spec in times) + " |\n|---:|" + "---:|" * len(times))
  for n in args.length:
    cells = [f"{1e6 * statistics.median(of[n]) / n:.0f}" if n in of else "" for of in times.values()]
    print(f"| {n} | " + " | ".join(cells) + " |")
  if args.picture:
    args.picture.write_text(picture(times))


if __name__ == "__main__":
  main()
