#!/usr/bin/env python3
"""Measures the tables and the picture of docs/results.md on pretrained models with `lesskv eval`.

  real_models.py --text wiki.test.raw --model smollm2=FILE.gguf --model qwen=FILE.gguf [--books FILE ...] [--tech FILE ...] [--lesskv PROGRAM] [--jobs 2]
                 [--csr smollm2=FILE] [--only WORD ...]
  real_models.py --render

Every finished run is a line of real_models.jsonl beside this script, under its command line and the model's identity; running again does what is
missing, so that it can be stopped at any time. --only takes the runs whose name holds one of the words. --render writes the page from what is there.
"""
import argparse
import concurrent.futures
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from make_results import PAIR_DISTANCE, ROOT, machine, pairs_table, table, with_error

HERE = Path(__file__).resolve().parent
STORE = HERE / "real_models.jsonl"
PAGE = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "results.svg"
MODELS = {"smollm2": "SmolLM2-135M-Instruct, Q8_0", "qwen": "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M"}
SCORED = 192  # tokens scored one by one behind a prompt
RULER_TASKS = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]
RULER_ALL = [*RULER_TASKS, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"]  # without the two that need --qa
KEPT = ["model_fingerprint", "kv_spec", "mode", "step", "prompt", "ctx", "isa", "compute", "version", "windows", "tokens_scored", "tokens_seen",
        "tokens_resident", "kv_bytes", "kv_bytes_peak", "kv_bytes_full", "sidecar_bytes", "perplexity", "perplexity_se", "perplexity_ratio",
        "perplexity_ratio_se", "kl_mean", "kl_mean_se", "kl_p95", "kl_p99", "same_top1", "tokens_per_second", "prefill_tokens_per_second",
        "length", "samples", "ask", *[f"score_{t}{e}" for t in RULER_ALL for e in ("", "_se")],
        *[f"{measure}_pair_{which}" for measure in ("share", "perplexity") for which in ("new", "near", "far")]]

ROWS_OF_FEW_BITS = ["full+q8", "full+q4", "full+q4(rotate=true)", "full+mix(k=q8, v=q4)", "full+kivi(4)", "full+kivi(4, group=64)",
                    "full+kivi(k=4, v=2)", "full+kivi(2)", "full+think(0.4)", "full+think(0.6)", "full+think(0.5)+q8"]
THREE_BITS = ["full+q4+recent", "full+q4(rotate=true)+recent", "full+mix(k=q8, v=q4, rotate=true)+recent", "full+kivi(3)", "full+kivi(3, group=64)",
              "full+kivi(k=4, v=3, group=64)", "full+kivi(k=3, v=2)", "full+kivi(k=3, v=2, group=128)"]
STREAMED = ["full", "full+q4", "full+q4(rotate=true)+recent", "full+kivi(4, group=64)", "full+kivi(k=4, v=3, group=64)", "full+kivi(3, group=64)",
            "full+kivi(k=3, v=2, group=128)"]
FITTED = ["full+kivi(k=4, v=3, group=64, window=64, rotate=true)", "full+kivi(k=3, v=2, group=64, window=64, rotate=true)"]
BALANCED = ["full+balanced(2)", "full+balanced(k=3, v=2)", "full+balanced(3)", "full+balanced(4)"]
# The codec's own dictionaries stand in a file of their own (`lesskv train csr`), not in the sidecar that comes with the project.
CSR = [f'full+csr({n}, file="DICTIONARIES")' for n in (4, 8, 16)]
SELECTORS = [f"{s}({b})" for b in ("5%", "10%", "20%") for s in ("window", "h2o", "tova", "snapkv")]
BUDGETS = [f"snapkv(10%)+{t}" for t in ("pyramid", "zigzag", "ada", "pooled", "split")] + ["h2o(10%)+split"]
TRAINED_SCORES = ["kvzap(10%, scope=head)", "kvzap(10%)+pooled", "kvzap(10%)+split"]
RECALL = ["full+cluster(5%)", "full+cluster(10%)", "full+cluster(10%, share=group)"]
MERGING = ["elastic(0.9)", "elastic(0.9, merge=off)", "h2o(10%)+merge", "cascade(10%, block=0)", "window(10%, positions=cache)"]
HALF = ["elastic(0.5)", "elastic(0.5, merge=off)", "h2o(50%)", "snapkv(40%)"]  # beside each other at about half of the bytes
MATCHING = [f"{s}({b}){t}" for b in ("2%", "5%", "10%") for s in ("h2o", "snapkv") for t in ("", "+match")]
STATES = [f"h2o({b})+less" for b in ("2%", "5%", "10%")]
# Rows instead: those that lie in the same tiles of 16 as a budget's own (what `match` adds is a fraction of a row), and a tile more (about a state).
EXTRA_ROWS = ["h2o(20%)+less", "h2o(20%)+match", *[f"h2o({n})" for n in (48, 64, 112, 128, 208, 224, 416, 432)]]
TOGETHER = ["h2o(20%)+q4(rotate=true)+recent", "h2o(40%)+q4(rotate=true)+recent", "h2o(20%)+kivi(4)", "snapkv(20%)+split+q8", "snapkv(20%)+think(0.5)+q8",
            "h2o(10%)+less+q8"]
COMBINED = ["h2o(10%)+less+q4(rotate=true)+recent", "h2o(20%)+less+q4(rotate=true)+recent", "h2o(20%)+split+less+q4(rotate=true)+recent",
            "h2o(40%)+split+q4(rotate=true)+recent"]
DIVIDED = ["h2o(10%)+split+less+q4(rotate=true)+recent", "h2o(20%)+split+q4(rotate=true)+recent"]
SMALL_GROUPS = "group=32, window=32"  # where few rows stay: a head must keep three groups
BALANCED_TOGETHER = ["h2o(50%)+balanced(2)", f"h2o(50%)+split(96)+balanced(2, {SMALL_GROUPS})", f"h2o(40%)+split(96)+less+balanced(2, {SMALL_GROUPS})",
                     f"h2o(20%)+split(96)+less+balanced(3, {SMALL_GROUPS})", f"h2o(20%)+less+balanced(3, {SMALL_GROUPS})"]
QWEN_TOGETHER = ["full+mix(k=q8, v=q4)+recent", "h2o(40%)+split+mix(k=q8, v=q4)+recent", "h2o(20%)+split+mix(k=q8, v=q4)+recent"]

# The longer text, and the larger model, get a part of all that.
LONG = ["full+q4", "full+kivi(4, group=64)", "full+kivi(k=4, v=2)", "full+cluster(10%)", "window(10%)", "h2o(10%)", "snapkv(10%)", "snapkv(10%)+split"]
QWEN = ["full+q8", "full+q4(rotate=true)+recent", "full+kivi(4)", "full+kivi(k=4, v=3, group=64)", "full+kivi(k=3, v=2, group=128)", "full+cluster(10%)",
        "window(10%)", "h2o(10%)", "snapkv(10%)", "snapkv(10%)+split", "snapkv(10%)+match", "h2o(20%)+kivi(4)"]

# What the state wins back, on three kinds of text and for three selectors.
LESS = ["full", "h2o(2%)", "h2o(2%)+less", "h2o(5%)", "h2o(5%)+less", "window(5%)", "window(5%)+less", "tova(5%)", "tova(5%)+less"]

# Needles behind a compressed document: a quarter of the rows, an eighth and half.
NEEDLES = ["full", "full+cluster(25%)", *[f"{s}({b}){t}" for b in ("25%", "12%", "50%") for s, t in
           (("snapkv", ""), ("snapkv", "+split"), ("kvzap", "+pooled"), ("h2o", ""), ("window", ""))], "full+kivi(2)", "full+balanced(2)", "h2o(25%)+less"]
# At 4,096 tokens, all of a task in one run: a document is read once for all caches but those that stream.
LONG_NEEDLES = ["full", *[f"{s}({b}){t}" for s, t in (("kvzap", "+pooled"), ("snapkv", "")) for b in ("75%", "50%", "25%", "12.5%")], "snapkv(25%)+ada",
                "snapkv(25%)+split", "h2o(25%)", "window(25%)", "full+cluster(25%)"]
LONG_CACHES = {"smollm2": LONG_NEEDLES, "qwen": ["full", "kvzap(50%)+pooled", "kvzap(12.5%)+pooled", "snapkv(50%)", "snapkv(12.5%)"]}
# Those of RULER_ALL of which `full` solves half or about it ("all of 4096").
LONG_TASKS = {"smollm2": ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_single_3"],
              "qwen": [t for t in RULER_ALL if t not in ("niah_multivalue", "fwe")]}
LONG_SAMPLES = {"smollm2": 20, "qwen": 5}
# With a hundred documents a task: half of the rows, then other shares.
HUNDRED = [["full", "kvzap(50%)+pooled", "snapkv(50%)"],
           [*[f"{s}({b}){t}" for s, t in (("kvzap", "+pooled"), ("snapkv", "")) for b in ("75%", "25%", "12.5%")], "snapkv(25%)+split"]]


def runs():
  """(name, model, arguments) of every run; TEXT, BOOKS and TECH stand for files. The more telling ones come first."""
  out = []

  def divergence(title, model, ctx, windows, specs, per_run=6):
    for first in range(0, len(specs), per_run):
      some = specs[first:first + per_run]
      out.append((f"{title} {model} {ctx}", model,
                  ["divergence", "--mode", "continue", "--prompt", str(ctx - SCORED), "-c", str(ctx), "--max-windows", str(windows), "--batch", str(windows),
                   "--keep", "4", "--compute", "int8", "--text", "TEXT", *[a for s in some for a in ("--kv", s)]]))

  def bits(model, ctx, windows, specs):
    out.append((f"stream {model} {ctx}", model,
                ["perplexity", "--mode", "stream", "--step", "64", "-c", str(ctx), "--max-windows", str(windows), "--compute", "int8", "--text", "TEXT",
                 *[a for s in specs for a in ("--kv", s)]]))

  divergence("bits", "smollm2", 2048, 4, ROWS_OF_FEW_BITS)
  divergence("rows", "smollm2", 2048, 4, SELECTORS)
  divergence("states", "smollm2", 2048, 4, STATES + [m for m in MATCHING if m.endswith("match") or "2%" in m])
  for text in ("TEXT", "BOOKS", "TECH"):
    out.append((f"less smollm2 {text}", "smollm2", ["perplexity", "--mode", "stream", "--step", "8", "-c", "2048", "--max-windows", "2", "--compute", "int8",
                                                    "--by-pair", PAIR_DISTANCE, "--text", text, *[a for s in LESS for a in ("--kv", s)]]))
  divergence("three bits", "smollm2", 2048, 4, THREE_BITS)
  for specs in (STREAMED, ["full", *FITTED]):
    bits("smollm2", 4096, 3, specs)
    bits("qwen", 4096, 1, specs)
  divergence("three bits", "smollm2", 2048, 4, FITTED)
  divergence("together", "smollm2", 2048, 4, TOGETHER)
  divergence("together", "smollm2", 2048, 4, COMBINED)
  divergence("together", "smollm2", 2048, 4, DIVIDED)
  divergence("together", "qwen", 2048, 2, QWEN_TOGETHER)
  divergence("recall", "smollm2", 2048, 4, RECALL + MERGING + TRAINED_SCORES)
  divergence("budgets", "smollm2", 2048, 4, BUDGETS)
  divergence("states", "smollm2", 2048, 4, EXTRA_ROWS, 5)
  divergence("recall", "smollm2", 2048, 4, ["cascade(10%)"])
  divergence("recall", "smollm2", 2048, 4, HALF)
  divergence("recall", "qwen", 2048, 2, ["elastic(0.5)", "h2o(50%)"])
  divergence("states", "qwen", 2048, 2, ["h2o(10%)+match", "h2o(208)"])
  divergence("states", "qwen", 2048, 2, ["h2o(10%)+less", "h2o(224)"])
  divergence("budgets", "qwen", 2048, 2, ["snapkv(10%)+ada", "snapkv(10%)+zigzag"])
  divergence("bits", "qwen", 2048, 2, ["full+kivi(2)", "full+kivi(k=4, v=2)"])
  divergence("bits", "qwen", 2048, 2, QWEN)
  divergence("bits", "smollm2", 4096, 3, LONG)
  for model, windows in (("smollm2", 4), ("qwen", 2)):
    divergence("balanced", model, 2048, windows, BALANCED)
    divergence("balanced together", model, 2048, windows, BALANCED_TOGETHER)
  divergence("balanced", "smollm2", 4096, 3, [*BALANCED[:3], "full+kivi(2)", "full+kivi(k=3, v=2, group=64, window=64, rotate=true)"])
  divergence("balanced", "qwen", 4096, 1, ["full", *BALANCED[:3], "full+kivi(2)", "full+kivi(k=3, v=2, group=64, window=64, rotate=true)"])
  for ctx, windows in ((2048, 2), (4096, 1)):
    divergence("csr", "smollm2", ctx, windows, CSR)
  for model, windows in (("smollm2", 3), ("qwen", 1)):
    bits(model, 4096, windows, ["full", *BALANCED])
  for spec in NEEDLES:
    out.append(("ruler smollm2", "smollm2", ["ruler", "--task", ",".join(RULER_TASKS), "--length", "1400", "-c", "1536", "--samples", "10", "--ask", "after",
                                             "--keep", "4", "--compute", "int8", "--text", "TEXT", "--kv", spec]))
  for model, tasks in LONG_TASKS.items():
    def long(name, tasks, ask, samples, specs):
      out.append((name, model, ["ruler", "--task", ",".join(tasks), "--length", "3960", "-c", "4096", "--samples", str(samples), "--ask", ask, "--keep", "4",
                                "--compute", "int8", "--text", "TEXT", *[a for s in specs for a in ("--kv", s)]]))
    long(f"all of 4096 {model}", RULER_ALL, "after", 3, ["full"])
    for ask in ("after", "with"):
      for task in tasks:
        long(f"long {model} {ask} {task}", [task], ask, LONG_SAMPLES[model], LONG_CACHES[model])
    if model == "smollm2":
      for specs, task in itertools.product(HUNDRED, tasks):
        long(f"hundred {model} after {task}", [task], "after", 100, specs)
  return out


# -- running


def read_store() -> dict:
  lines = STORE.read_text().splitlines() if STORE.exists() else []
  return {r["key"]: r for r in map(json.loads, filter(str.strip, lines))}


def run_key(model, arguments) -> str:
  return f"{model} | {shlex.join(arguments)}"


def execute(args, lock, name, model, arguments) -> None:
  at = arguments.index("--text")
  files = args.texts[arguments[at + 1]]
  if not files:
    print(f"{name}: left out, no files for {arguments[at + 1]}", file=sys.stderr)
    return
  given = [*arguments[:at], *[a for f in files for a in ("--text", f)], *arguments[at + 2:]]
  begin = time.time()
  if any("DICTIONARIES" in a for a in given):
    if model not in args.csr:
      print(f"{name}: left out, no --csr {model}=FILE", file=sys.stderr)
      return
    given = [a.replace("DICTIONARIES", str(args.csr[model])) for a in given]
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


# -- the page

SECTIONS = (  # runs whose names begin so, title
  (("bits", "three bits", "balanced", "csr"), "Rows of few bits"),
  (("rows",), "Which rows stay"),
  (("budgets",), "Where the rows go"),
  (("states",), "What is left of the others"),
  (("recall",), "Recall, merging, trained scores"),
  (("together", "balanced together"), "Together"),
)
COLOURS = {"few bits": "#d95f02", "rows": "#1b9e77", "divided rows": "#7570b3", "state or fit": "#e7298a", "recall": "#666666", "together": "#1f78b4"}


def short(spec) -> str:
  """Without fingerprints of sidecars, which the page states once."""
  spec = re.sub(r'sidecar="[0-9a-f]+", |(, )?sidecar="[0-9a-f]+"', "", spec)
  return spec.replace("()", "")


def bits(row) -> float:
  """Bytes of the whole cache, shared out over the numbers that a full one holds: f16 has 16 bits."""
  return 16 * row["kv_bytes"] / row["kv_bytes_full"]


def family(spec) -> str:
  terms = spec.split("+")
  codec = any(t.startswith(("q8", "q4", "mix", "kivi", "balanced", "csr", "think")) for t in terms)
  if "cluster" in spec:
    return "recall"
  if codec:
    return "few bits" if terms[0] == "full" else "together"
  if any(t.startswith(("less", "match", "merge")) for t in terms) or terms[0].startswith("elastic"):
    return "state or fit"
  return "divided rows" if len(terms) > 1 else "rows"


def collect(store):
  """{(model, ctx): {section title: rows}}, of divergence runs, in the order of runs()."""
  tables = {}
  for name, model, arguments in runs():
    record = store.get(run_key(model, arguments))
    if record is None or arguments[0] != "divergence":
      continue
    ctx = int(arguments[arguments.index("-c") + 1])
    title = next(t for names, t in SECTIONS if name.startswith(tuple(f"{n} {model}" for n in names)))
    tables.setdefault((model, ctx), {}).setdefault(title, []).extend(record["rows"])
  return tables


def row_cells(row):
  mark = "" if row["isa"] == FIRST_ISA else " †"
  return [f"`{short(row['kv_spec'])}`{mark}", f"{bits(row):.2f}", f"{row['kv_bytes'] / 1024:.0f}", with_error(row, "kl_mean", 4), f"{row['kl_p95']:.3f}",
          f"{row['kl_p99']:.2f}", f"{100 * row['same_top1']:.1f}", with_error(row, "perplexity_ratio", 3), f"{row['tokens_resident']:.0f}"]


FIRST_ISA = "avx2"  # of the first runs; the page marks the rows of others
HEAD = ["cache", "bits", "KiB", "KL mean", "95 %", "99 %", "same top 1 %", "perplexity ratio", "rows"]


def front(rows):
  """Those that no other beats in both bytes and divergence, from large to small."""
  best, out = math.inf, []
  for row in sorted(rows, key=lambda r: (r["kv_bytes"], r["kl_mean"])):
    if row["kl_mean"] < best:
      best = row["kl_mean"]
      out.append(row)
  return out[::-1]


def picture(tables) -> str:
  """KL against bytes, a panel for each model and length, both axes logarithmic."""
  width, height, left, top = 560, 420, 56, 34
  parts = []
  panels = [k for k, sections in tables.items() if sum(map(len, sections.values())) >= 8]
  for i, key in enumerate(panels):
    rows = [r for rows in tables[key].values() for r in rows if r["kl_mean"] > 0]
    x_of = lambda b: left + (math.log2(b) - math.log2(0.25)) / 6 * (width - left - 20)
    low, high = -4, 0.5  # decades of KL
    y_of = lambda kl: top + (high - math.log10(min(max(kl, 10 ** low), 10 ** high))) / (high - low) * (height - top - 44)
    parts.append(f'<g transform="translate(0 {i * height})"><text x="{left}" y="20" font-weight="bold">KL from the full cache, nats a token: {MODELS[key[0]]}, {key[1]} tokens</text>')
    for b in (0.25, 0.5, 1, 2, 4, 8, 16):
      parts.append(f'<line x1="{x_of(b):.1f}" y1="{top}" x2="{x_of(b):.1f}" y2="{height - 44}" stroke="#ddd"/><text x="{x_of(b):.1f}" y="{height - 28}" '
                   f'text-anchor="middle">{b:g}</text>')
    for d in range(low, 1):
      y = y_of(10 ** d)
      parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">1e{d}</text>')
    best = front(rows)
    line = " ".join(f"{x_of(bits(r)):.1f},{y_of(r['kl_mean']):.1f}" for r in best)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#bbb" stroke-dasharray="4 3"/>')
    for r in rows:
      spec = short(r["kv_spec"])
      parts.append(f'<circle cx="{x_of(bits(r)):.1f}" cy="{y_of(r["kl_mean"]):.1f}" r="4" fill="{COLOURS[family(spec)]}" fill-opacity="0.8">'
                   f'<title>{spec}: {bits(r):.2f} bits, KL {r["kl_mean"]:.4f}</title></circle>')
    for n, r in enumerate(best, 1):  # numbers in the picture, names beside it
      parts.append(f'<text x="{x_of(bits(r)) - 6:.1f}" y="{y_of(r["kl_mean"]) + 11:.1f}" text-anchor="end" font-size="9">{n}</text>'
                   f'<text x="{width + 8}" y="{top + 120 + 15 * n}" font-size="10">{n}: {short(r["kv_spec"])}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 10}" text-anchor="middle">bits a number of the full cache, all bytes counted</text></g>')
  for n, (name, colour) in enumerate(COLOURS.items()):
    parts.append(f'<circle cx="{width + 12}" cy="{46 + 18 * n}" r="4" fill="{colour}"/><text x="{width + 22}" y="{50 + 18 * n}">{name}</text>')
  total = height * len(panels)
  return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 330}" height="{total}" viewBox="0 0 {width + 330} {total}" font-family="sans-serif" '
          f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n')


def stream_section(store) -> str:
  """Perplexity of rows of few bits while a text streams in."""
  by_model = {}
  for name, model, arguments in runs():
    record = store.get(run_key(model, arguments))
    if record is not None and name.startswith("stream"):
      by_model.setdefault(model, []).append((arguments, record["rows"]))
  out = []
  for model, parts in by_model.items():
    full = parts[0][1][0]
    rows = [full, *[r for _, part in parts for r in part if r["kv_spec"] != "full"]]
    cells = [[f"`{short(r['kv_spec'])}`", f"{bits(r):.2f}", f"{r['perplexity']:.3f}", f"{100 * (r['perplexity'] / full['perplexity'] - 1):+.2f} %"]
             for r in rows]
    out.append(f"{MODELS[model]}, {full['windows']} window{'s' if full['windows'] > 1 else ''} of {full['ctx']} tokens, 64 tokens a step:\n\n" +
               table(["cache", "bits", "perplexity", "to full"], cells) + "\n" + "".join(command_of(model, arguments) for arguments, _ in parts))
  return "### While a text streams in\n\n" + "\n".join(out) if out else ""


TEXTS = {"TEXT": "WikiText-2 test", "BOOKS": "held-out books", "TECH": "technical prose that no map was trained on"}


def less_section(store) -> str:
  """What LESS wins back while a text streams in, by text, selector and kind of token."""
  out = []
  for name, model, arguments in runs():
    record = store.get(run_key(model, arguments))
    if record is None or not name.startswith("less"):
      continue
    rows = record["rows"]
    full = rows[0]["perplexity"]
    won = [[f"`{short(bare['kv_spec'])}`", f"{bare['perplexity']:.2f}", f"{less['perplexity']:.2f}",
            f"{100 * (bare['perplexity'] - less['perplexity']) / (bare['perplexity'] - full):.0f} %", f"{bare['kv_bytes'] / 1024:.0f}",
            f"{less['kv_bytes'] / 1024:.0f}"] for bare, less in zip(rows[1::2], rows[2::2])]
    out.append(f"{MODELS[model]}, {TEXTS[name.split()[-1]]}, {rows[0]['windows']} windows of {rows[0]['ctx']} tokens; `full`: {full:.2f}.\n\n" +
               table(["cache", "perplexity", "`+less`", "won back", "KiB", "`+less` KiB"], won) + "\n" + pairs_table(rows) + "\n" + command_of(model, arguments))
  return "### LESS while a text streams in\n\n" + note("less") + "\n".join(out) if out else ""


def ruler_section(store) -> str:
  """What is found behind a compressed document, by task; tasks that `full` does not solve half of stand apart."""
  found = [(arguments, store[run_key(model, arguments)]["rows"][0]) for name, model, arguments in runs()
           if name.startswith("ruler") and run_key(model, arguments) in store]
  if not found or found[0][1]["kv_spec"] != "full":
    return ""
  arguments, full = found[0]
  head, cells = ruler_cells([row for _, row in found], RULER_TASKS)
  facts = f"{MODELS['smollm2']}, {full['samples']} documents of {full['length']} tokens a task, the question after the document was read and compressed, scores in %:\n\n"
  return "## Needles\n\n" + note("needles") + facts + table(head, cells) + "\n" + command_of("smollm2", arguments) + long_needles(store)


def ruler_cells(rows, tasks):
  """Head and cells of a table of rows, `full` first, that have scores of the tasks."""
  solved = [t for t in tasks if rows[0][f"score_{t}"] >= 0.5]
  cells = []
  for row in rows:
    scores = [row[f"score_{t}"] for t in solved]
    error = math.sqrt(sum(row[f"score_{t}_se"] ** 2 for t in solved)) / len(solved)
    cells.append([f"`{short(row['kv_spec'])}`", f"{bits(row):.2f}", f"**{100 * sum(scores) / len(solved):.0f}** ± {100 * error:.0f}",
                  *[f"{100 * row[f'score_{t}']:.0f}" for t in tasks]])
  return ["cache", "bits", f"average of {len(solved)}", *[t.removeprefix("niah_").replace("_", " ") for t in tasks]], cells


def long_needles(store) -> str:
  """Tables by model and by when the question comes, those of many documents behind the others; a task is a run."""
  out, begun = [], False
  asks = (("after", "the question after the document was read and compressed"), ("with", "the question at the prompt's end, before anything leaves"))
  for title, model, (ask, when) in itertools.product(("long", "hundred"), LONG_TASKS, asks):
    found = [(arguments, store[run_key(m, arguments)]["rows"]) for name, m, arguments in runs()
             if name.startswith(f"{title} {model} {ask} ") and run_key(m, arguments) in store]
    if not found:
      continue
    tasks, caches = [], {}  # those that some task lacks are left out
    for arguments, rows in found:
      task = arguments[arguments.index("--task") + 1]
      tasks += [task] if task not in tasks else []
      for row in rows:
        caches.setdefault(row["kv_spec"], dict(row)).update({k: v for k, v in row.items() if k.startswith("score_")})
    rows = sorted((row for row in caches.values() if all(f"score_{task}" in row for task in tasks)),
                  key=lambda row: LONG_NEEDLES.index(short(row["kv_spec"])))
    head, cells = ruler_cells(rows, tasks)
    if not begun:
      out.append("### At 4,096 tokens\n\n" + note("long needles"))
      begun = True
    first = [arguments for arguments, _ in found if tasks[0] in arguments]
    out.append(f"{MODELS[model]}, {rows[0]['samples']} documents of {rows[0]['length']} tokens a task, {when}, scores in %:\n\n" + table(head, cells) + "\n" +
               "".join(command_of(model, arguments) for arguments in first))
  return "\n" + "\n".join(out) if out else ""


def command_of(model, arguments) -> str:
  return f"    lesskv eval {arguments[0]} -m {model.upper()}.gguf {shlex.join(arguments[1:])}\n"


def note(title) -> str:
  path = HERE / "real_models_notes" / (re.sub(r"[^a-z]+", "_", title.lower()).strip("_") + ".md")
  return path.read_text() + "\n" if path.exists() else ""


def render() -> None:
  store = read_store()
  tables = collect(store)
  if not tables:
    sys.exit("nothing has been measured yet")
  PICTURE.write_text(picture(tables))
  measured = [r for sections in tables.values() for rows in sections.values() for r in rows]
  others = sorted({r["isa"] for r in measured} - {FIRST_ISA})
  facts = (f"lesskv {measured[0]['version']}, {measured[0]['compute']} products on {FIRST_ISA}; {next(iter(store.values()))['machine']}." +
           (f" Rows with † were measured later, on {' and '.join(others)}." if others else ""))
  out = [note("head").replace("{{facts}}", facts)]
  out.append("## The best at each size\n\n" + note("best"))
  for (model, ctx), sections in tables.items():
    rows = [r for rows in sections.values() for r in rows]
    if len(rows) >= 8:
      out.append(f"{MODELS[model]}, {ctx} tokens ({len(rows)} caches measured):\n\n" + table(HEAD, map(row_cells, front(rows))))
  for names, title in SECTIONS:
    out.append(f"## {title}\n\n" + note(title))
    for (model, ctx), sections in tables.items():
      if title in sections:
        out.append(f"{MODELS[model]}, {ctx} tokens, {sections[title][0]['windows']} texts:\n\n" + table(HEAD, map(row_cells, sections[title])))
    if names[0] == "bits":
      out.append(stream_section(store))
    if names[0] == "states":
      out.append(less_section(store))
  out.append(ruler_section(store))
  out.append(note("tail"))
  PAGE.write_text("\n".join(out))
  print(f"{PAGE} written from {len(store)} runs", file=sys.stderr)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--text", type=Path, help="wiki.test.raw of WikiText-2")
  parser.add_argument("--books", action="append", default=[], help="held-out books; may be repeated")
  parser.add_argument("--tech", action="append", default=[], help="technical prose that nothing was trained on; may be repeated")
  parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE", help=f"NAME one of {', '.join(MODELS)}")
  parser.add_argument("--csr", action="append", default=[], metavar="NAME=FILE", help="dictionaries of `lesskv train csr` for a model")
  parser.add_argument("--lesskv", type=Path, default=ROOT / "build/release/apps/lesskv/lesskv")
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
  parser.add_argument("--only", action="append")
  parser.add_argument("--render", action="store_true", help="only write the page")
  args = parser.parse_args()
  args.texts = {"TEXT": [str(args.text)] if args.text else [], "BOOKS": args.books, "TECH": args.tech}
  args.models, args.csr = (dict(m.split("=", 1) for m in given) for given in (args.model, args.csr))
  if unknown := set(args.models) - set(MODELS):
    parser.error(f"no model named {', '.join(sorted(unknown))}")
  measure(args)
  if args.render:
    render()


if __name__ == "__main__":
  main()
