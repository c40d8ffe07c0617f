#!/usr/bin/env python3
"""Times prompts of growing length through caches: a table of microseconds a token and a picture of both logarithms.

  prefill_times.py --model FILE.gguf --kv "full+prefill(chunk=512)" --kv "cascade(1024)" [--length 1024 ...] [--rounds 2] [--most SECONDS]
                   [--picture OUT.svg]

Each time is a run of `lesskv bench` of its own, the rounds in turns; the table has medians. Lengths that would take a cache longer than --most
(estimated from the one before, as if its time grew with the square) are left out.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from log_picture import log_picture  # noqa: E402


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
    medians = {spec: [(n, statistics.median(t)) for n, t in of.items()] for spec, of in times.items()}
    args.picture.write_text(log_picture("Seconds of a prompt by its tokens", medians))


if __name__ == "__main__":
  main()
