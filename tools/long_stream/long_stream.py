#!/usr/bin/env python3
"""Streams a long text through small caches and shows that nothing grows: perplexity and time by blocks of the text, memory of the process.

  long_stream.py --model FILE.gguf --text BOOK.txt [--text ...] --tokens 200000 --kv "cascade(1024)" --kv "window(1024, positions=cache)" [--step 64] [--block 10000]

The texts are joined and cut to as many tokens. Each cache is a run of `lesskv eval perplexity` of its own, whose resident memory is read twice a second.
What `lesskv plan` promises for the cache stands beside it.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def resident_bytes(pid: int) -> int:
  try:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
      if line.startswith("VmRSS:"):
        return int(line.split()[1]) * 1024
  except FileNotFoundError:
    pass
  return 0


def run(command):
  """The rows that the command prints, and the process's resident memory by time."""
  with tempfile.TemporaryFile("w+") as out:
    process = subprocess.Popen(command, stdout=out)
    memory = []
    while process.poll() is None:
      memory.append(resident_bytes(process.pid))
      time.sleep(0.5)
    if process.returncode != 0:
      sys.exit(f"{command[0]} ended with status {process.returncode}")
    out.seek(0)
    return json.load(out), [m for m in memory if m > 2**20]


def mib(n) -> str:
  return f"{n / 2**20:.1f} MiB"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--lesskv", type=Path, default=ROOT / "build/release/apps/lesskv/lesskv")
  parser.add_argument("--model", required=True)
  parser.add_argument("--text", action="append", required=True, type=Path)
  parser.add_argument("--tokens", type=int, default=200000)
  parser.add_argument("--kv", action="append", required=True)
  parser.add_argument("--step", type=int, default=64)
  parser.add_argument("--block", type=int, default=10000)
  parser.add_argument("--threads", type=int, default=2)
  args = parser.parse_args()

  with tempfile.NamedTemporaryFile(suffix=".txt") as joined:
    for text in args.text:
      joined.write(text.read_bytes() + b"\n")
    joined.flush()
    for spec in args.kv:
      ctx = str(args.tokens)
      plan = json.loads(subprocess.run([args.lesskv, "plan", "-m", args.model, "--ctx", ctx, "-p", str(args.step), "-n", str(args.tokens - args.step),
                                        "--kv", spec, "-o", "json"], check=True, capture_output=True, text=True).stdout)
      rows, memory = run([args.lesskv, "eval", "perplexity", "-m", args.model, "-t", str(args.threads), "-c", ctx, "--max-windows", "1", "--mode", "stream",
                          "--step", str(args.step), "--by-block", str(args.block), "--text", joined.name, "--kv", spec, "-o", "json"])
      row = rows[0]
      if row["tokens_scored"] < args.tokens - 2:
        print(f"note: the texts have {row['tokens_scored']} tokens only", file=sys.stderr)
      settled = memory[len(memory) // 10:]  # behind loading
      promised = plan[0]["weight_bytes"] + plan[0]["work_bytes"] + plan[0]["kv_bytes_peak"]  # without the program itself and its text
      print(f"`{row['kv_spec']}`: perplexity {row['perplexity']:.3f} over {row['tokens_scored']} tokens, {row['isa']}, {row['compute']}; cache "
            f"{mib(row['kv_bytes'])} (plan: {mib(plan[0]['kv_bytes'])}; a full f16 cache: {mib(row['kv_bytes_full'])}); resident memory of the process "
            f"{mib(min(settled))} to {mib(max(settled))} behind the first tenth of the time, of which the plan names {mib(promised)} (weights, work, "
            "cache); the rest is the program and the text\n")
      print("| tokens from | perplexity | µs a token |\n|---:|---:|---:|")
      for i, (perplexity, micros) in enumerate(zip(row["perplexity_by_block"], row["microseconds_by_block"])):
        print(f"| {i * args.block} | {perplexity:.2f} | {micros:.0f} |")
      print(flush=True)


if __name__ == "__main__":
  main()
