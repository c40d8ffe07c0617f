#!/usr/bin/env python3
"""How fast products with weight matrices are by the tokens that are multiplied at once: a table of GFLOP/s and a picture of both logarithms.

  product_speed.py --case avx512bf16/int8/Q4_0 --case avx2/int8/Q4_0 [--tokens 1,2,4,8] [--rounds 3] [--picture OUT.svg]

A case is an instruction set (LESSKV_ISA), an arithmetic (--compute) and a type of weights. bench_linear runs one thread and takes processor time for
the clock; the best of the rounds counts, which go through the cases in turns.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from log_picture import log_picture  # noqa: E402


def speeds(bench, case, tokens):
  """{tokens: GFLOP/s}"""
  isa, compute, weights = case.split("/")
  command = [bench, "--types", weights, "--tokens", tokens, "--compute", compute, "--threads", "1", "--cpu-time", "--layers", "1", "--repeat", "5"]
  text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"LESSKV_ISA": isa}).stdout
  rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith(f"| {weights} ")]
  return {int(row[2]): float(row[-2]) for row in rows}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--bench", type=Path, default=ROOT / "build/release/bench/bench_linear")
  parser.add_argument("--case", action="append", required=True, help="ISA/COMPUTE/TYPE")
  parser.add_argument("--tokens", default="1,2,3,4,5,6,8,12,16,24,32,48,64,128,256,512")
  parser.add_argument("--rounds", type=int, default=1)
  parser.add_argument("--picture", type=Path)
  args = parser.parse_args()
  best = {case: {} for case in args.case}
  for _ in range(args.rounds):
    for case, of in best.items():
      for n, speed in speeds(args.bench, case, args.tokens).items():
        of[n] = max(of.get(n, 0), speed)
  tokens = [int(n) for n in args.tokens.split(",")]
  print("| GFLOP/s | " + " | ".join(map(str, tokens)) + " |\n|---|" + "---:|" * len(tokens))
  for case, of in best.items():
    print(f"| {case.replace('/', ', ')} | " + " | ".join(f"{of[n]:.0f}" for n in tokens) + " |")
  if args.picture:
    args.picture.write_text(log_picture("GFLOP/s of one thread by the tokens multiplied at once", {c.replace("/", ", "): sorted(of.items()) for c, of in best.items()}))


if __name__ == "__main__":
  main()
