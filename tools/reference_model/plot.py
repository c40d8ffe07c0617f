#!/usr/bin/env python3
"""Draws training (loss, validation loss, recall accuracy against tokens) and the context curve into one small PNG.

  plot.py --log RUN/log.jsonl --eval MODEL.eval.json --out FILE.png
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--log", type=Path, required=True)
  p.add_argument("--eval", type=Path)
  p.add_argument("--out", type=Path, required=True)
  args = p.parse_args()
  records = [json.loads(line) for line in args.log.read_text().splitlines()]
  steps = [r for r in records if "loss" in r]
  evals = [r for r in records if r.get("eval")]
  fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
  left.plot([r["tokens"] / 1e6 for r in steps], [r["loss"] for r in steps], lw=0.6, label="training (weighted mix)")
  left.plot([r["tokens"] / 1e6 for r in evals], [r["valid_loss"] for r in evals], "o-", ms=3, label="books-valid")
  left.set(xlabel="million tokens", ylabel="nats per token", title="loss")
  left.set_ylim(top=6.5)
  left.legend()
  for kind in ("kv", "kv_words", "needle", "variable"):
    middle.plot([r["tokens"] / 1e6 for r in evals], [r[f"{kind}@{r['window']}"] for r in evals], "o-", ms=3, label=kind)
  for a, b in zip(evals, evals[1:]):
    if a["window"] != b["window"]:
      middle.axvline((a["tokens"] + b["tokens"]) / 2e6, color="grey", lw=0.6)
  middle.set(xlabel="million tokens (lines: the window doubles)", ylim=(-0.02, 1.02), title="recall accuracy over the training window")
  middle.legend()
  if args.eval and args.eval.exists():
    curve = json.loads(args.eval.read_text()).get("curve", [])
    right.errorbar([c["context"] for c in curve], [c["perplexity"] for c in curve], fmt="o-", ms=4)
  right.set(xlabel="tokens of context", ylabel="perplexity", title="same targets (books-test), more context")
  right.set_xscale("log", base=2)
  fig.savefig(args.out, dpi=80)
  print(args.out, args.out.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
