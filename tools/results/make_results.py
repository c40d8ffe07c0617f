#!/usr/bin/env python3
"""Measures the tables of docs/results-bundled.md with `lesskv eval` and writes the page.

  make_results.py --data DIR [--lesskv build/release/apps/lesskv/lesskv] [--jobs 2] [--only base|less|variants|codec|codec_less]
  make_results.py --render

DIR holds text/books-test.tar.xz (held-out books), text/wikitext-2/wiki.test.raw and, for the group `variants`, which trains small sidecars of its own
into a folder of the system's, text/books-train-core.tar.xz. Every finished run is one line of results.jsonl beside
this script, under its command line and the model's bytes; running again does what is missing, so that it can be stopped at any time.
--render only writes the page from what is there.
"""
import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORE = Path(__file__).resolve().parent / "results.jsonl"
PAGE = ROOT / "docs" / "results-bundled.md"
MODEL = "models/lesskv-small.gguf"
SELECTORS = ["window", "h2o", "tova", "snapkv"]
BUDGETS = ["2%", "5%", "10%", "20%"]
LESS_SELECTORS = ["h2o", "window", "tova"]
LESS_BUDGETS = ["2%", "5%", "10%"]
PAIR_DISTANCE = "128"
CODECS = [("q8", "q8(rotate=true)"), ("q4", "q4(rotate=true)"), ("mix(k=q8, v=q4)", "mix(k=q8, v=q4, rotate=true)")]
# What `lesskv train less` is given for a sidecar of the group `variants`. All are trained alike and briefly: they compare with each other, not with
# the bundled sidecar.
VARIANT_TRAINING = ["--sequences", "80", "--views", "2", "--epochs", "4", "--batch", "2", "--lr", "5e-3", "--step", "8"]
VARIANT_BOOKS = 60
VARIANT_BUDGETS = ["1%", "2%", "5%", "10%", "20%"]
VARIANTS = {
  "mix": [], "h2o(2%)": ["--kv", "h2o(2%)"], "h2o(5%)": ["--kv", "h2o(5%)"], "h2o(10%)": ["--kv", "h2o(10%)"], "window(5%)": ["--kv", "window(5%)"],
  "rank 4": ["--rank", "4"], "rank 16": ["--rank", "16"], "rank 32": ["--rank", "32"], "hidden 64": ["--hidden", "64"], "hidden 512": ["--hidden", "512"],
}


def base_specs():
  return ["full"] + [f"{s}({b})" for b in BUDGETS for s in SELECTORS]


def less_specs():
  return [f"{s}({b})+less" for s in LESS_SELECTORS for b in LESS_BUDGETS]


def codec_specs(selectors):
  """Each selector in f16, then in every low-bit codec, plain and rotated."""
  return [f"{s}+{c}" if c else s for s in selectors for c in ("", *[c for pair in CODECS for c in pair])]


GROUPS = (  # name, specs, more arguments, windows
  ("base", base_specs(), [], "24"),
  ("less", less_specs(), ["--match-bytes"], "12"),
  ("codec", codec_specs(["full", "h2o(5%)"]), [], "12"),
  ("codec_less", codec_specs(["h2o(5%)+less"]), [], "12"),
)


def plan():
  """(name, group, arguments) of every run; BOOKS, BOOK and WIKI stand for files."""
  runs = []
  for group, specs, extra, windows in GROUPS:
    kv = [a for s in specs for a in ("--kv", s)]
    for text in ("BOOKS", "WIKI"):
      common = ["--text", text, "--max-windows", windows, *kv, *extra]
      runs.append((f"{group} stream {text}", group, ["divergence", "--mode", "stream", "--step", "8", *common]))
      if group == "base":
        runs.append((f"{group} continue {text}", group, ["divergence", "--mode", "continue", "--prompt", "1024", *common]))
    if group.startswith("codec"):
      continue
    tasks, lengths = ("kv,kv_words,needle", "512,1024") if group == "base" else ("kv,needle", "512")
    recall = ["recall", "--task", tasks, "--length", lengths, "--depths", "0.1,0.3,0.5,0.7,0.9",
              "--samples", "8" if group == "base" else "6", "--text", "BOOK", "--ask", "after", *kv, *extra]
    runs.append((f"{group} recall", group, recall))
  edges = [a for b in ("1%", "20%") for s in LESS_SELECTORS for a in ("--kv", f"{s}({b})+less")]
  short_text = ["--text", "BOOKS", "--max-windows", "12"]
  runs.append(("less continue BOOKS", "less", ["divergence", "--mode", "continue", "--prompt", "1024", *short_text,
                                               *[a for s in less_specs() for a in ("--kv", s)], "--match-bytes"]))
  runs.append(("less stream BOOKS, 1 % and 20 %", "less", ["divergence", "--mode", "stream", "--step", "8", *short_text, *edges, "--match-bytes"]))
  pair_specs = [a for b in LESS_BUDGETS for s in (f"h2o({b})", f"h2o({b})+less") for a in ("--kv", s)]
  for text in ("BOOKS", "WIKI"):
    runs.append((f"less pairs {text}", "less", ["perplexity", "--mode", "stream", "--step", "8", "--text", text, "--max-windows", "12",
                                                "--by-pair", PAIR_DISTANCE, "--kv", "full", *pair_specs]))
  for name, training in VARIANTS.items():
    specs = [f'h2o({b})+less(file="{variant_file(training)}")' for b in VARIANT_BUDGETS] + [f'window(5%)+less(file="{variant_file(training)}")']
    specs += ["full", *[f"h2o({b})" for b in VARIANT_BUDGETS], "window(5%)"] if name == "mix" else []
    runs.append((f"variants {name}", "variants", ["perplexity", "--mode", "stream", "--step", "8", *short_text, *[a for s in specs for a in ("--kv", s)]]))
  return runs


def variant_file(training) -> str:
  """A name in the folder of variants, the same for the same training."""
  return hashlib.sha256(shlex.join(VARIANT_TRAINING + training).encode()).hexdigest()[:12] + ".less.gguf"


# -- running


def unpack_books(data: Path, archive_name: str) -> list:
  """The books of an archive, unpacked once, into a folder of the system's own."""
  books = Path(tempfile.gettempdir()) / f"lesskv-{archive_name}"
  if not books.exists():
    scratch = Path(tempfile.mkdtemp(prefix="lesskv-books-"))
    with tarfile.open(data / f"text/{archive_name}.tar.xz") as archive:
      for member in archive.getmembers():
        if member.isfile() and member.name.endswith(".txt"):
          (scratch / Path(member.name).name).write_bytes(archive.extractfile(member).read())
    scratch.rename(books)
  return sorted(str(p) for p in books.glob("*.txt"))


def train_variant(args, training) -> Path:
  path = Path(tempfile.gettempdir()) / "lesskv-variants" / variant_file(training)
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    books = unpack_books(args.data, "books-train-core")[:VARIANT_BOOKS]
    shutil.rmtree(f"{path}.work", ignore_errors=True)  # of a run that was stopped
    subprocess.run([str(args.lesskv), "train", "less", "-m", MODEL, "-t", "1", *VARIANT_TRAINING, *training, "-o", str(path), "--text", *books],
                   cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
  return path


def prepare_texts(data: Path) -> dict:
  """Argument lists for the names of plan()."""
  files = unpack_books(data, "books-test")
  return {"BOOKS": files, "BOOK": files[:1], "WIKI": [str(data / "text/wikitext-2/wiki.test.raw")]}


def substitute(arguments, texts):
  out = []
  for name, value in zip(arguments, arguments[1:] + [""]):
    if name == "--text":
      out += [a for f in texts[value] for a in ("--text", f)]
    elif name not in texts:
      out.append(name)
  return out


def file_hash(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else "none"


def read_store() -> dict:
  if not STORE.exists():
    return {}
  records = [json.loads(line) for line in STORE.read_text().splitlines() if line.strip()]
  return {record["key"]: record for record in records}


def run_key(group: str, arguments) -> str:
  """What makes a run the same: its arguments, the model, and the sidecar where one is read."""
  model = ROOT / MODEL
  parts = [shlex.join(arguments), file_hash(model)]
  if group in ("less", "codec_less"):
    parts.append(file_hash(model.with_suffix(".less.gguf")))
  return " | ".join(parts)


def earlier_rivals(group, arguments) -> list:
  """Rows beside LESS (`full`, bare selectors, more rows) that the same run gave with another sidecar: they do not depend on it."""
  if group != "less":
    return []
  same = " | ".join([shlex.join(arguments), file_hash(ROOT / MODEL)]) + " | "
  return next((r["rows"] for k, r in read_store().items() if k.startswith(same) and k != run_key(group, arguments)), [])


def splice(old, new):
  """`old` with its LESS rows replaced; the rivals at equal bytes stand only while the state's bytes are the same."""
  place = lambda r: (short(r["kv_spec"]), r.get("task"), r.get("length"), r.get("depth"))
  fresh = {place(r): r for r in new}
  for r in old:
    if place(r) in fresh and r["kv_bytes"] != fresh[place(r)]["kv_bytes"]:
      sys.exit(f"{r['kv_spec']}: the state has another size now; remove the old records of this run")
  return [fresh.get(place(r), r) for r in old]


def execute(args, name, group, arguments, texts, lock) -> None:
  old = earlier_rivals(group, arguments)
  given = [a for a in arguments if not old or a != "--match-bytes"]
  if group == "variants":
    training = VARIANTS[name.removeprefix("variants ")]
    path = train_variant(args, training)
    given = [a.replace(path.name, str(path)) for a in arguments]
  command = [str(args.lesskv), "eval", given[0], "-m", MODEL, "-t", "1", "-o", "json", *substitute(given[1:], texts)]
  begin, key = time.time(), run_key(group, arguments)  # the key of what is read now
  # Threads that wait asleep: other work may share the machine.
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode != 0:
    print(f"{name}: {done.stderr.strip()}", file=sys.stderr)
    return
  rows = splice(old, json.loads(done.stdout)) if old else json.loads(done.stdout)
  for row in rows:
    if "texts" in row:
      row["texts"] = [Path(t).name for t in row["texts"]]
  record = {"key": key, "name": name, "arguments": arguments, "seconds": round(time.time() - begin, 1),
            "machine": machine(), "rows": rows}
  with lock, STORE.open("a") as store:
    store.write(json.dumps(record) + "\n")
  print(f"{name}: {record['seconds']} s", file=sys.stderr)


def machine() -> str:
  model = next((l.split(":", 1)[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), platform.machine())
  return f"{model}, {os.cpu_count()} CPUs"


def measure(args) -> None:
  texts = prepare_texts(args.data)
  store, lock = read_store(), threading.Lock()
  missing = [r for r in plan() if args.only in (None, r[1]) and run_key(r[1], r[2]) not in store]
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    for future in [pool.submit(execute, args, *run, texts, lock) for run in missing]:
      future.result()


# -- the page


def with_error(row, key, digits):
  error = row.get(key + "_se")
  return f"{row[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def kib(n) -> str:
  return f"{n / 1024:.0f}"


def short(spec) -> str:
  """Without the sidecar's fingerprint, which the page states once."""
  return re.sub(r'\(sidecar="[0-9a-f]+"\)', "", spec)


def label(row) -> str:
  spec = f"`{short(row['kv_spec'])}`"
  return f"{spec} ({row['match']})" if row.get("match") else spec


def table(head, rows) -> str:
  lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
  return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows]) + "\n"


def divergence_table(rows) -> str:
  head = ["cache", "perplexity", "ratio to full", "word perplexity", "bits/byte", "KL mean", "95 %", "99 %", "max", "same top-1 %",
          "rows", "KiB", "peak KiB", "tokens/s"]
  body = [[label(r), with_error(r, "perplexity", 2), with_error(r, "perplexity_ratio", 4), f"{r['word_perplexity']:.1f}",
           f"{r['bits_per_byte']:.4f}", with_error(r, "kl_mean", 4), f"{r['kl_p95']:.3f}", f"{r['kl_p99']:.3f}", f"{r['kl_max']:.2f}",
           f"{100 * r['same_top1']:.1f}", f"{r['tokens_resident']:.0f}", kib(r["kv_bytes"]), kib(r["kv_bytes_peak"]),
           f"{r['tokens_per_second']:.0f}"] for r in rows]
  return table(head, body)


def recall_table(rows) -> str:
  columns = sorted({(r["task"], r["length"]) for r in rows})
  by_spec = {}
  for r in rows:
    by_spec.setdefault(label(r), {})[r["task"], r["length"]] = r
  head = ["cache", *[f"{t}, {n}" for t, n in columns], "rows", "KiB"]
  body = []
  for spec, cells in by_spec.items():
    last = cells[columns[0][0], max(n for _, n in columns)]
    body.append([spec, *[f"{100 * cells[c]['accuracy']:.0f}" for c in columns], f"{last['tokens_resident']:.0f}", kib(last["kv_bytes"])])
  return table(head, body)


def recovered_table(rows) -> str:
  """How much of the perplexity that the bare selector loses each rival wins back."""
  by_match = {}
  for r in rows:
    owner = short(r["matched_to"] or r["kv_spec"])
    by_match.setdefault(owner, {})[r["match"] or "less"] = r
  body = []
  for owner, group in by_match.items():
    if "bare selector" not in group:
      continue
    bare = group["bare selector"]["perplexity_ratio"]
    won = lambda k: f"{100 * (bare - group[k]['perplexity_ratio']) / (bare - 1):.0f} %" if k in group else "-"
    kl = lambda k: f"{group[k]['kl_mean']:.4f}" if k in group else "-"
    names = ("rank/2 extra rows", "equal bytes", "less")
    body.append([f"`{owner}`", f"{group['bare selector']['perplexity_ratio']:.4f}", *map(won, names), kl("bare selector"), *map(kl, names)])
  head = ["cache", "bare selector's perplexity ratio", "won back: rank/2 extra rows", "won back: equal bytes in rows", "won back: LESS",
          "KL: bare", "KL: rank/2 extra rows", "KL: equal bytes", "KL: LESS"]
  return table(head, body)


TEXTS = {"BOOKS": "twelve held-out books (authors that occur nowhere in training)", "WIKI": "WikiText-2 test (raw), out of domain"}


def command_of(record) -> str:
  arguments = record["arguments"]
  return f"    lesskv eval {arguments[0]} -m {MODEL} -t 1 {shlex.join(arguments[1:])}\n"


def render() -> None:
  store = read_store()
  records = {name: store[run_key(group, a)] for name, group, a in plan() if run_key(group, a) in store}
  if not records:
    sys.exit("nothing has been measured for this model yet")
  text = (Path(__file__).resolve().parent / "results_head.md").read_text()
  first = next(iter(records.values()))["rows"][0]
  facts = f"Model {MODEL}, fingerprint {first['model_fingerprint']}, context {first['ctx']}; lesskv {first['version']}, " \
          f"{first['compute']} on {first['isa']}, one thread; machine: {next(iter(records.values()))['machine']}, shared with other work, " \
          "so speeds are a lower bound and only roughly comparable.\n"
  out = [text.replace("{{facts}}", facts)]
  for group, title in (("base", "Selectors"), ("less", "LESS"), ("codec", "Low-bit rows"), ("codec_less", "Low-bit rows with LESS")):
    chosen = {n: r for n, r in records.items() if n.split()[0] == group}
    if not chosen:
      continue
    out.append(f"## {title}\n")
    note = Path(__file__).resolve().parent / f"results_{group}.md"
    if note.exists():
      out.append(note.read_text())
    for name, record in chosen.items():
      out.append(section(group, name, record))
  variants = {n.removeprefix("variants "): r for n, r in records.items() if n.startswith("variants")}
  if "mix" in variants:
    out.append(variants_section(variants))
  PAGE.write_text("\n".join(out))
  print(f"{PAGE} written from {len(records)} runs", file=sys.stderr)


def variants_section(variants) -> str:
  """Share of the bare selector's lost perplexity that sidecars of different training win back."""
  bare = {r["kv_spec"]: r["perplexity"] for r in variants["mix"]["rows"] if "less" not in r["kv_spec"]}
  columns = [f"h2o({b})" for b in VARIANT_BUDGETS] + ["window(5%)"]
  full, lost = bare["full"], list(bare.values())[1:]
  body = []
  for name, record in variants.items():
    less = [r for r in record["rows"] if "less" in r["kv_spec"]]
    cells = [f"{r['perplexity']:.2f} ({100 * (b - r['perplexity']) / (b - full):.0f} %)" for r, b in zip(less, lost)]
    body.append([name, *cells, kib(less[1]["sidecar_bytes"]) if "sidecar_bytes" in less[1] else "-", kib(less[1]["kv_bytes"])])
  rows = [["no state", *[f"{b:.2f}" for b in lost], "-", "-"], *body]
  note = (Path(__file__).resolve().parent / "results_variants.md").read_text()
  first = variants["mix"]["rows"][0]
  return f"## LESS: training and shape\n\n{note}\nPerplexity (and share won back) on books, stream, {first['windows']} windows; `full`: {full:.2f}. " \
         "KiB: of the sidecar in memory, and of the cache at `h2o(2%)`.\n\n" + table(["trained for / with", *[f"`{c}`" for c in columns], "maps KiB", "cache KiB"], rows)


PAIR_CLASSES = (("pair_new", "new"), ("pair_near", f"repeated within {PAIR_DISTANCE} tokens"), ("pair_far", "repeated from farther back"))


def pairs_table(rows) -> str:
  """Where the loss lies: log-likelihood lost to the full cache by class of token, and what LESS wins back of it."""
  full, bare = rows[0], {r["kv_spec"]: r for r in rows if "less" not in r["kv_spec"]}
  nats = lambda r, c: math.log(r[f"perplexity_{c}"])
  body = [["share of tokens", *[f"{100 * full[f'share_{c}']:.1f} %" for c, _ in PAIR_CLASSES]], ["`full`, perplexity", *[f"{full[f'perplexity_{c}']:.2f}" for c, _ in PAIR_CLASSES]]]
  for r in rows[1:]:
    spec = short(r["kv_spec"])
    owner = bare[spec.removesuffix("+less")]
    lost = sum(full[f"share_{c}"] * (nats(owner, c) - nats(full, c)) for c, _ in PAIR_CLASSES)
    cells = []
    for c, _ in PAIR_CLASSES:
      loss = nats(owner, c) - nats(full, c)
      note = f"{100 * full[f'share_{c}'] * loss / lost:.0f} % of the loss" if owner is r else f"{100 * (nats(owner, c) - nats(r, c)) / loss:.0f} % won back"
      cells.append(f"{r[f'perplexity_{c}']:.2f} ({note})")
    body.append([f"`{spec}`", *cells])
  return table(["cache", *[f"pair is {title}" for _, title in PAIR_CLASSES]], body)


def section(group, name, record) -> str:
  rows = record["rows"]
  if name.startswith("less pairs"):
    text = name.split()[-1]
    body = "Tokens told apart by whether the token and the one before it occurred side by side earlier in the window, which a model can copy if it still has it. " \
           f"{TEXTS[text]}: {rows[0]['windows']} windows, 8 tokens a step.\n\n" + pairs_table(rows)
    return f"### where the loss lies, {'books' if text == 'BOOKS' else 'WikiText-2'}\n\n{body}\n{command_of(record)}"
  if name.endswith("recall"):
    body = "Share of questions answered right (every token), in %, by task and prompt length; " \
           f"{rows[0]['samples']} questions a cell, 5 depths.\n\n" + recall_table(rows)
    heading = "Recall, asked after the prompt was compressed"
  else:
    mode, text = name.split(",")[0].split()[1:]
    how = "8 tokens a step, evicting in between" if mode == "stream" else "1,024 tokens at once, then one token a step"
    heading = f"{mode}, {'books' if text == 'BOOKS' else 'WikiText-2'}" + ("" if "," not in name else "," + name.split(",", 1)[1])
    body = f"{TEXTS[text]}: {rows[0]['windows']} windows of {rows[0]['ctx']} tokens, {how}; {rows[0]['tokens_scored']} tokens scored.\n\n"
    body += (recovered_table(rows) + "\n" if group == "less" else "") + divergence_table(rows)
  return f"### {heading}\n\n{body}\n{command_of(record)}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", type=Path, help="folder with text/")
  parser.add_argument("--lesskv", type=Path, default=ROOT / "build/release/apps/lesskv/lesskv")
  parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
  parser.add_argument("--only", choices=[*(group[0] for group in GROUPS), "variants"])
  parser.add_argument("--render", action="store_true", help="only write the page")
  args = parser.parse_args()
  if not args.render:
    if args.data is None:
      parser.error("--data is needed to measure")
    args.lesskv = args.lesskv.resolve()
    measure(args)
  render()


if __name__ == "__main__":
  main()
