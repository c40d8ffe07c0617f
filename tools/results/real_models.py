#!/usr/bin/env python3
"""Measures the tables and the picture of docs/results.md on pretrained models with `lesskv eval`.

  real_models.py --text wiki.test.raw --model smollm2=FILE.gguf --model qwen=FILE.gguf [--lesskv PROGRAM] [--jobs 2] [--only WORD ...]
  real_models.py --render

Every finished run is a line of real_models.jsonl beside this script, under its command line and the model's identity; running again does what is
missing, so that it can be stopped at any time. --only takes the runs whose name holds one of the words. --render writes the page from what is there.
"""
import argparse
import concurrent.futures
import json
import math
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from make_results import ROOT, machine, table, with_error

HERE = Path(__file__).resolve().parent
STORE = HERE / "real_models.jsonl"
PAGE = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "results.svg"
MODELS = {"smollm2": "SmolLM2-135M-Instruct, Q8_0", "qwen": "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M"}
SCORED = 192  # tokens scored one by one behind a prompt
KEPT = ["model_fingerprint", "kv_spec", "mode", "step", "prompt", "ctx", "isa", "compute", "version", "windows", "tokens_scored", "tokens_seen",
        "tokens_resident", "kv_bytes", "kv_bytes_peak", "kv_bytes_full", "sidecar_bytes", "perplexity", "perplexity_se", "perplexity_ratio",
        "perplexity_ratio_se", "kl_mean", "kl_mean_se", "kl_p95", "kl_p99", "same_top1", "tokens_per_second", "prefill_tokens_per_second",
        "task", "length", "depth", "accuracy", "accuracy_se", "samples"]

ROWS_OF_FEW_BITS = ["full+q8", "full+q4", "full+q4(rotate=true)", "full+mix(k=q8, v=q4)", "full+kivi(4)", "full+kivi(4, group=64)",
                    "full+kivi(k=4, v=2)", "full+kivi(2)", "full+think(0.4)", "full+think(0.6)", "full+think(0.5)+q8"]
THREE_BITS = ["full+kivi(3)", "full+kivi(3, group=64)", "full+kivi(k=4, v=3)", "full+kivi(k=3, v=2)", "full+kivi(k=3, v=2, group=64)"]
SELECTORS = [f"{s}({b})" for b in ("5%", "10%", "20%") for s in ("window", "h2o", "tova", "snapkv")]
BUDGETS = [f"snapkv({b})+{t}" for b in ("5%", "10%", "20%") for t in ("pyramid", "zigzag", "ada", "pooled", "split")] + \
          ["h2o(10%)+zigzag", "h2o(10%)+ada", "h2o(10%)+split", "window(10%)+split"]
TRAINED_SCORES = ["kvzap(10%)", "kvzap(10%)+pooled", "kvzap(10%)+split", "kvzap(20%)+pooled"]
RECALL = ["full+cluster(5%)", "full+cluster(10%)", "full+cluster(20%)", "full+cluster(10%, share=group)"]
MERGING = ["elastic(0.9)", "elastic(0.8)", "elastic(0.9, merge=off)", "h2o(10%)+merge", "cascade(10%)", "window(10%, positions=cache)"]
MATCHING = [f"{s}({b}){t}" for b in ("2%", "5%", "10%", "20%") for s in ("h2o", "snapkv") for t in ("+match",)] + ["h2o(2%)", "snapkv(2%)"]
STATES = [f"h2o({b})+less" for b in ("2%", "5%", "10%", "20%")]
TOGETHER = ["h2o(10%)+q8", "h2o(20%)+q4(rotate=true)", "h2o(20%)+kivi(4)", "snapkv(20%)+q8", "snapkv(20%)+think(0.5)+q8", "snapkv(20%)+split+q8"]
WITH_SIDECAR = ["h2o(10%)+less+q8", "h2o(10%)+less+q4(rotate=true)"]

# The longer text, and the larger model, get a part of all that.
LONG = ["full+q4", "full+kivi(4)", "full+kivi(4, group=64)", "full+kivi(k=4, v=2)", "full+think(0.4)", "full+cluster(10%)",
        "window(10%)", "h2o(10%)", "h2o(10%)+less", "snapkv(10%)", "snapkv(10%)+split", "snapkv(10%)+match"]
QWEN = ["full+q8", "full+q4", "full+q4(rotate=true)", "full+kivi(4)", "full+kivi(4, group=64)", "full+kivi(k=4, v=2)",
        "full+kivi(2)", "full+think(0.4)", "full+cluster(10%)", "window(10%)", "h2o(10%)", "tova(10%)",
        "snapkv(10%)", "snapkv(10%)+split", "snapkv(10%)+ada", "snapkv(10%)+zigzag", "snapkv(10%)+match", "elastic(0.9)",
        "cascade(10%)", "window(10%, positions=cache)", "h2o(10%)+match", "h2o(20%)+kivi(4)", "snapkv(20%)+q8", "snapkv(20%)+think(0.5)+q8"]


def runs():
  """(name, model, arguments) of every run; TEXT stands for the file. The more telling ones come first."""
  out = []

  def divergence(title, model, ctx, windows, specs, per_run=6):
    for first in range(0, len(specs), per_run):
      some = specs[first:first + per_run]
      out.append((f"{title} {model} {ctx}", model,
                  ["divergence", "--mode", "continue", "--prompt", str(ctx - SCORED), "-c", str(ctx), "--max-windows", str(windows), "--batch", str(windows),
                   "--keep", "4", "--compute", "int8", "--text", "TEXT", *[a for s in some for a in ("--kv", s)]]))

  def bits(model, ctx, windows):
    specs = ["full", *[s for s in ROWS_OF_FEW_BITS if "kivi" in s or s == "full+q4"], *THREE_BITS]
    out.append((f"stream {model} {ctx}", model,
                ["perplexity", "--mode", "stream", "--step", "64", "-c", str(ctx), "--max-windows", str(windows), "--compute", "int8", "--text", "TEXT",
                 *[a for s in specs for a in ("--kv", s)]]))

  divergence("bits", "smollm2", 2048, 4, ROWS_OF_FEW_BITS)
  divergence("rows", "smollm2", 2048, 4, SELECTORS)
  divergence("states", "smollm2", 2048, 4, STATES + MATCHING)
  divergence("bits", "smollm2", 4096, 3, LONG)
  divergence("budgets", "smollm2", 2048, 4, BUDGETS)
  divergence("recall", "smollm2", 2048, 4, RECALL)
  divergence("merging", "smollm2", 2048, 4, MERGING)
  divergence("scores", "smollm2", 2048, 4, TRAINED_SCORES)
  divergence("together", "smollm2", 2048, 4, TOGETHER + WITH_SIDECAR)
  divergence("bits", "qwen", 2048, 2, QWEN)
  for model, ctx, windows in (("smollm2", 2048, 4), ("qwen", 2048, 2), ("smollm2", 4096, 3)):
    divergence("three bits", model, ctx, windows, THREE_BITS)
  bits("smollm2", 4096, 3)
  bits("qwen", 4096, 1)
  return out


# -- running


def read_store() -> dict:
  lines = STORE.read_text().splitlines() if STORE.exists() else []
  return {r["key"]: r for r in map(json.loads, filter(str.strip, lines))}


def run_key(model, arguments) -> str:
  return f"{model} | {shlex.join(arguments)}"


def execute(args, lock, name, model, arguments) -> None:
  given = [str(args.text) if a == "TEXT" else a for a in arguments]
  begin = time.time()
  done = subprocess.run([str(args.lesskv), "eval", given[0], "-m", str(args.models[model]), "-t", "1", "-o", "json", *given[1:]],
                        capture_output=True, text=True)
  if done.returncode != 0:
    print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
    return
  rows = [{k: r[k] for k in KEPT if k in r} for r in json.loads(done.stdout)]
  record = {"key": run_key(model, arguments), "name": name, "model": model, "arguments": arguments, "seconds": round(time.time() - begin, 1),
            "machine": machine(), "rows": rows}
  with lock, STORE.open("a") as store:
    store.write(json.dumps(record) + "\n")
  print(f"{name}: {record['seconds']} s", file=sys.stderr)


def measure(args) -> None:
  store, lock = read_store(), threading.Lock()
  chosen = [r for r in runs() if r[1] in args.models and (not args.only or any(word in r[0] for word in args.only))]
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    for future in [pool.submit(execute, args, lock, *r) for r in chosen if run_key(r[1], r[2]) not in store]:
      future.result()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--text", type=Path, help="wiki.test.raw of WikiText-2")
  parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help=f"NAME one of {', '.join(MODELS)}")
  parser.add_argument("--lesskv", type=Path, default=ROOT / "build/release/apps/lesskv/lesskv")
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
  parser.add_argument("--only", action="append")
  parser.add_argument("--render", action="store_true", help="only write the page")
  args = parser.parse_args()
  args.models = dict(m.split("=", 1) for m in args.model)
  if unknown := set(args.models) - set(MODELS):
    parser.error(f"no model named {', '.join(sorted(unknown))}")
  measure(args)


if __name__ == "__main__":
  main()
