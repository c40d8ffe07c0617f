#!/usr/bin/env python3
"""Shows that a change of the inside changes no result: what a program answers for every kind of cache, beside another's.

  digests.py PROGRAM -o DIGESTS.json            writes what one program answers
  digests.py --old PROGRAM --new PROGRAM        runs both and compares
  digests.py --old A.json --new PROGRAM         compares with what was written before (on the same machine: other
                                                instruction sets add in other orders)

Every cache spec of `specs` runs on the bundled model and on the tiny ones of the tests, in float32 and for some commands
in bfloat16: text and token counts of `lesskv run` (greedy, sampled, a session of two turns), `lesskv eval perplexity`
and `divergence` to the last digit, cache bytes, `lesskv plan`. What is refused is an answer too: its sentence. Times,
speeds and versions are left out. The comparison names each difference and fails if there is one, or if bytes grew; fewer
bytes, new fields and answers to what was refused are told and are no failures.
"""
import argparse
import concurrent.futures
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "docs" / "sample.txt"
BUNDLED = ROOT / "models" / "lesskv-small.gguf"
TINY = ["llama-gqa-tied", "llama-mha-untied", "llama-rope-scaled", "qwen2-bias"]
# Fields that say nothing about a result, and those that may fall but not rise.
IGNORED = ("seconds", "per_second", "version", "threads", "texts", "model")
BYTES = ("kv_bytes", "kv_bytes_peak", "kv_bytes_after_prompt", "work_bytes", "sidecar_bytes")
COMBINATIONS = [
  "h2o(5%)+less", "h2o(heavy=8, recent=4)+less", "window(5%, extra=3)+less+q8", "snapkv(10%)+pyramid+q8",
  "window(64, positions=cache)+q4(rotate=true)+prefill(chunk=128)", "window(16, positions=cache)+mix(k=q8, v=f32)",
  "tova(5%)+prefill(chunk=64)", "tova(20%)+pyramid(beta=4)+less+bf16", "h2o(5%)+less+mix(k=q8, v=q4, rotate=true)",
  "h2o(5%)+less(clamp=true)+f32+prefill(chunk=32)", "h2o(100%)+less", "full+q8(rotate=true)+prefill(chunk=96)",
  "snapkv(24, window=8, kernel=3, pool=avg)+q4+prefill(chunk=40)", "h2o(10%)+pyramid+mix(k=f32, v=q4)",
]


def answer(command):
  """The command's JSON, or the sentence and the status it was refused with."""
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  if done.returncode == 0:
    return json.loads(done.stdout)
  return {"refused": done.stderr.strip(), "status": done.returncode}


def digest(value):
  """An answer without the fields that may differ between two runs of one program."""
  if isinstance(value, list):
    return [digest(item) for item in value]
  if not isinstance(value, dict):
    return value
  return {key: digest(item) for key, item in value.items()
          if key not in IGNORED and not key.endswith(("_seconds", "_per_second"))}


def specs(program):
  """Every method alone, every choice of its parameters, pairs with selectors, and named combinations."""
  methods = json.loads(subprocess.check_output([program, "methods", "-o", "json"]))["methods"]
  selectors = [method["example"] for method in methods if method["stage"] == "select"]
  found = []
  for method in methods:
    name, example = method["name"], method["example"]
    found.append(example)
    inner = example[len(name) + 1:-1] + (", " if "(" in example else "")
    for parameter in method["parameters"]:
      found += [f"{name}({inner}{parameter['name']}={choice})" for choice in parameter.get("choices", "").split("|")
                if choice not in ("", parameter.get("default")) and parameter["name"] + "=" not in inner]
    if method["stage"] in ("budget", "residual") and not method["default"]:
      found += [f"{selector}+{example}" for selector in selectors]
    elif method["stage"] != "select" and not method["default"]:
      found.append(f"h2o(5%)+{example}")
  return list(dict.fromkeys(found + COMBINATIONS))


def gguf_string(text):
  return struct.pack("<Q", len(text.encode())) + text.encode()


def with_tokenizer(model, n_tokens, out):
  """Puts a vocabulary of single characters at the front of the file's metadata."""
  letters = "\u2581etaoinshrdlucmfwypvbgkjxqz,.'\"TASHIWBMCPNDLFGERYOJUVKQXZ-;?!:"
  tokens = (["<unk>", "<s>", "</s>"] + list(letters))[:n_tokens]
  kinds = [2, 3, 3] + [1] * (len(tokens) - 3)
  added = gguf_string("tokenizer.ggml.model") + struct.pack("<I", 8) + gguf_string("llama")
  for key, kind, values in (("tokens", 8, [gguf_string(token) for token in tokens]),
                            ("scores", 6, [struct.pack("<f", -i) for i in range(len(tokens))]),
                            ("token_type", 5, [struct.pack("<i", kind) for kind in kinds])):
    added += gguf_string("tokenizer.ggml." + key) + struct.pack("<IIQ", 9, kind, len(values)) + b"".join(values)
  added += gguf_string("general.description") + struct.pack("<I", 8)
  added += gguf_string(" " * (-(len(added) + 8) % 32))  # what follows keeps its alignment
  data = model.read_bytes()
  n_pairs = struct.unpack_from("<Q", data, 16)[0] + 5
  out.write_bytes(data[:16] + struct.pack("<Q", n_pairs) + added + data[24:])


def prepare_models(program, folder):
  """(name, file, context, prompt, its first sentences, text to score) of each model."""
  def cut(n):
    (folder / f"{n}.txt").write_text(SAMPLE.read_text()[:n])
    return folder / f"{n}.txt"
  models = [("lesskv-small", BUNDLED, 256, cut(2700), cut(1000), cut(1500))]
  for name in TINY:
    file = ROOT / "tests" / "data" / "models" / f"{name}.gguf"
    info = json.loads(subprocess.check_output([program, "info", "-v", "--json", str(file)]))
    if not info["tokenizer"]:
      n_tokens = next(t["shape"][1] for t in info["tensors"] if t["name"] == "token_embd.weight")
      with_tokenizer(file, n_tokens, folder / f"{name}.gguf")
      file = folder / f"{name}.gguf"
    models.append((name, file, 128, cut(100), cut(60), cut(300)))
  return models


class Collector:
  """Runs commands beside each other and keeps their answers by name."""

  def __init__(self, program, jobs):
    self.program, self.pool, self.answers = program, concurrent.futures.ThreadPoolExecutor(jobs), {}

  def rows(self, command, cache_specs):
    """Spec -> row of a command that takes many; what refuses them all together is asked in halves."""
    found = answer([self.program, *command, *(word for spec in cache_specs for word in ("--kv", spec))])
    if isinstance(found, list):
      return dict(zip(cache_specs, found))
    if len(cache_specs) == 1:
      return {cache_specs[0]: found}
    half = len(cache_specs) // 2
    return self.rows(command, cache_specs[:half]) | self.rows(command, cache_specs[half:])

  def ask_rows(self, name, command, cache_specs):
    for spec, row in self.rows(command, cache_specs).items():
      self.answers[f"{name}, {spec}"] = digest(row)

  def ask_run(self, name, commands):
    self.answers[name] = digest([answer([self.program, "run", *command, "--json"]) for command in commands])

  def ask_model(self, name, file, ctx, prompt, start, text, cache_specs, folder):
    base = ["-m", str(file), "-o", "json"]
    self.ask_rows(f"{name}, plan", ["plan", *base, "-p", "90", "-n", "20"], cache_specs)
    legal = [spec for spec in cache_specs if "refused" not in self.answers[f"{name}, plan, {spec}"]]
    score = [*base, "-c", str(ctx), "--text", str(text), "--max-windows", "3", "--mode"]
    stream, begun = [*score, "stream", "--step"], [*score, "continue", "--prompt", str(ctx * 3 // 4)]
    evaluations = [("perplexity", "step 8", [*stream, "8"]), ("perplexity", "continue", begun)]
    only_f32 = [("perplexity", "step 1", [*stream, "1"]), ("perplexity", "step 64", [*stream, "64"]),
                ("divergence", "step 8", [*stream, "8"])]
    for compute in ("f32", "bf16"):
      for kind, mode, command in evaluations + (only_f32 if compute == "f32" else []):
        yield self.pool.submit(self.ask_rows, f"{name}, {compute}, {kind} {mode}",
                               ["eval", kind, *command, "--compute", compute], legal)
      for i, spec in enumerate(legal):
        run = ["-m", str(file), "--kv", spec, "--compute", compute]
        session = ["--session", str(folder / f"{name}.{i}"), "--temp", "0"]
        runs = {"greedy": [[*run, "-f", str(prompt), "-n", "20", "--temp", "0"]]}
        if compute == "f32":
          runs |= {"sampled": [[*run, "-f", str(start), "-n", "20", "--temp", "1", "--top-k", "0", "--seed", "7"]],
                   "session": [[*run, "-f", str(start), "-n", "9", *session], [*run, "-p", " And", "-n", "9", *session]]}
        for what, commands in runs.items():
          yield self.pool.submit(self.ask_run, f"{name}, {compute}, run {what}, {spec}", commands)


def collect(program, jobs):
  with tempfile.TemporaryDirectory() as name:
    folder, collector = Path(name), Collector(program, jobs)
    cache_specs = specs(program)
    waiting = [future for model in prepare_models(program, folder)
               for future in collector.ask_model(*model, cache_specs, folder)]
    for future in waiting:
      future.result()
    # Names of folders differ from run to run and from checkout to checkout.
    return json.loads(json.dumps(collector.answers).replace(name, "FOLDER").replace(str(ROOT), "ROOT"))


def compare_values(name, old, new, differences, remarks):
  if isinstance(old, dict) and isinstance(new, dict):
    if "refused" in old and "refused" not in new:
      return remarks.append(f"{name}: answered, before {old['refused']!r}")
    for key in [*old, *(key for key in new if key not in old)]:
      where = f"{name}, {key}"
      if key not in new:
        differences.append(f"{where}: {old[key]!r}, now missing")
      elif key not in old:
        # A field more says more of the same; a refusal where there was none does not.
        (differences if key == "refused" else remarks).append(f"{where}: new, {new[key]!r}")
      elif key in BYTES and old[key] != new[key]:
        (differences if new[key] > old[key] else remarks).append(f"{where}: {old[key]}, now {new[key]}")
      else:
        compare_values(where, old[key], new[key], differences, remarks)
  elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    for i, (a, b) in enumerate(zip(old, new)):
      compare_values(name if len(old) == 1 else f"{name} [{i}]", a, b, differences, remarks)
  elif old != new:
    differences.append(f"{name}: {old!r}, now {new!r}")


def compare(old, new):
  """(differences, remarks) between two collections, one sentence each."""
  differences, remarks = [], []
  for name in [*old, *(name for name in new if name not in old)]:
    if name not in old:
      remarks.append(f"{name}: new")
    elif name not in new:
      differences.append(f"{name}: now missing")
    else:
      compare_values(name, old[name], new[name], differences, remarks)
  return differences, remarks


def load(source, jobs):
  if source.endswith(".json"):
    return json.loads(Path(source).read_text())
  return collect(str(Path(source).resolve()), jobs)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("program", nargs="?", help="write the answers of this program")
  parser.add_argument("--old", help="program, or .json file of its answers")
  parser.add_argument("--new", help="program, or .json file of its answers")
  parser.add_argument("-o", "--output", help="where to write the answers of PROGRAM or of --new")
  parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="commands at the same time")
  args = parser.parse_args()
  if bool(args.program) == bool(args.old or args.new) or bool(args.old) != bool(args.new):
    parser.error("give one program, or --old and --new")
  new = load(args.program or args.new, args.jobs)
  if args.output:
    Path(args.output).write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
  print(f"{len(new)} answers, of which {sum('refused' in json.dumps(value) for value in new.values())} are refusals")
  if args.program:
    return 0
  differences, remarks = compare(load(args.old, args.jobs), new)
  for title, lines in (("told", remarks), ("DIFFERS", differences)):
    for line in lines:
      print(f"{title}: {line}")
  print(f"{len(differences)} differences, {len(remarks)} remarks")
  return 1 if differences else 0


if __name__ == "__main__":
  sys.exit(main())
