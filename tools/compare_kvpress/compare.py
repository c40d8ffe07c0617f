#!/usr/bin/env python3
"""Do lesskv and NVIDIA's kvpress keep the same rows? Both read the same prompts with the same weights and budgets.

    PYTHONPATH=python LESSKV_LIBRARY=build/release/src/capi/liblesskv.so
    compare.py --lesskv build/release/apps/lesskv/lesskv --checkpoint DIR --model FILE.gguf TEXT...

DIR is a Hugging Face directory of a model that kvpress supports; FILE.gguf is `lesskv convert DIR FILE.gguf --type F32`
(done here where it does not exist). README.md beside this file says what to install. All is float32. A prompt is the next
--chars characters of a text.

Prints a Markdown table, a line a method and share of rows: how many of the kept rows are the same (mean and least over
prompts, layers and KV heads), rows a head, the cache's bytes, seconds of the prompt (medians), and how far apart the next
token is after the compressed prompt. `(as named)` passes kvpress's numbers on where a parameter of the same name means
something else.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, field

import press as peer
import rows

import lesskv

METHODS = ("full", "window", "snapkv", "ada", "pyramid", "think", "think-window")
ALL_ROWS = ("full", "think", "think-window")  # keep every row, so that one share says all


@dataclass
class Line:
    """Of one method and share, over all prompts."""
    name: str
    spec: str = ""
    same: list = field(default_factory=list)  # of every prompt, layer and head
    rows: list = field(default_factory=list)  # pairs: ours, theirs; likewise the next two
    bytes: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    kl: list = field(default_factory=list)
    logits: list = field(default_factory=list)  # largest difference

    def print(self):
        def pair(values, form, fold):
            return " | ".join(form.format(fold(side)) for side in zip(*values))
        same = f"{100 * statistics.mean(self.same):.3f} % | {100 * min(self.same):.2f} %" if self.same else "all | all"
        print(f"| {self.name} | {same} | {pair(self.rows, '{:.1f}', statistics.mean)} | "
              f"{pair(self.bytes, '{:.2f}', lambda x: statistics.mean(x) / 2**20)} | "
              f"{pair(self.seconds, '{:.2f}', statistics.median)} | "
              f"{max(self.kl):.1e} | {max(self.logits):.1e} | `{self.spec}` |", flush=True)


class Engine:
    def __init__(self, args, folder):
        self.args, self.model = args, lesskv.Model(args.model, threads=args.threads, compute="f32")
        self.prompt, self.session = pathlib.Path(folder) / "prompt.txt", pathlib.Path(folder) / "session"

    def read(self, text, spec):
        """`lesskv run` on a prompt: what it says, and the sequence it leaves."""
        self.prompt.write_text(text)
        self.session.unlink(missing_ok=True)
        done = json.loads(subprocess.run(
            [self.args.lesskv, "run", "-m", self.args.model, "-f", self.prompt, "--kv", spec, "-n", "0", "--json",
             "--kv-stats", "--compute", "f32", "-t", str(self.args.threads), "--session", self.session],
            check=True, stdout=subprocess.PIPE, text=True).stdout)
        return done, self.model.load(self.session, kv=spec)


def pieces(texts, chars):
    """The next `chars` characters of the texts, one behind the other; a prompt lies in one text."""
    left = [pathlib.Path(text).read_text() for text in texts]
    for i, n in enumerate(chars):
        text = left[i % len(left)]
        if len(text) < n:
            raise SystemExit(f"{texts[i % len(left)]} has no {n} characters left for a prompt")
        left[i % len(left)] = text[n:]
        yield text[:n].strip()


def compare(line, engine, text, spec, theirs, next_token):
    """One prompt of one spec beside what kvpress made of it."""
    kept, their_bytes, their_seconds, their_logits, n = theirs
    done, sequence = engine.read(text, spec)
    if done["prompt_tokens"] != n:
        raise SystemExit(f"lesskv read {done['prompt_tokens']} tokens of a prompt of {n}")
    ours = rows.kept_of_runs(done["kv_runs"])
    if kept:
        line.same += rows.agreement(ours, kept)
    line.spec = spec
    line.rows.append((rows.rows_kept(ours), rows.rows_kept(kept) if kept else n))
    line.bytes.append((done["kv_bytes"], their_bytes))
    line.seconds.append((done["prefill_seconds"], their_seconds))
    logits = sequence.decode(next_token).tolist()
    line.kl.append(rows.divergence(their_logits, logits))
    line.logits.append(max(abs(a - b) for a, b in zip(logits, their_logits)))


def lines_of(method, share, prompts, model, engine, options):
    """A method's line, and a second one where parameters are named alike but mean something else."""
    name = f"`{method}`" + ("" if method in ALL_ROWS else f", {100 * share:.0f} %")
    line, named = Line(name), Line(name + " (as named)")
    for text, ids, next_token in prompts:
        n = len(ids)
        budget = max(1, round(share * n))
        press = peer.make_press(method, rows.ratio_for(budget, n), options)
        watch = peer.Watch(press) if press else None
        cache, _, seconds = model.read(ids, press)
        size = peer.bytes_of(cache)
        theirs = (watch.layers() if watch else None, size, seconds, model.step(cache, next_token, n), n)
        compare(line, engine, text, rows.spec(method, budget, n, options), theirs, next_token)
        spec = rows.spec_as_named(method, budget, n, options)
        if spec:
            compare(named, engine, text, spec, theirs, next_token)
    return [x for x in (line, named) if x.rows]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--lesskv", required=True, help="the program")
    parser.add_argument("--checkpoint", required=True, help="a Hugging Face directory")
    parser.add_argument("--model", required=True, help="the same as a GGUF of type F32; made where it does not exist")
    parser.add_argument("--methods", type=lambda s: s.split(","), help=f"default: {','.join(METHODS)}, and kvzap with --sidecar")
    parser.add_argument("--shares", type=lambda s: [float(x) for x in s.split(",")], default=[0.1, 0.25, 0.5],
                        help="of a prompt's rows")
    parser.add_argument("--chars", type=lambda s: [int(x) for x in s.split(",")], default=[3500, 4500, 6000, 8000],
                        help="of each prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sidecar", default="", help="a .less.gguf with trained scores: kvzap is compared too")
    defaults = rows.Options()
    for option in ("window", "kernel", "sinks", "alpha", "pyramid_window", "beta", "channels"):
        value = getattr(defaults, option)
        parser.add_argument("--" + option.replace("_", "-"), type=type(value), default=value,
                            help=f"of kvpress (default: {value})")
    args = parser.parse_args()
    args.methods = args.methods or [*METHODS, *["kvzap"] * bool(args.sidecar)]
    unknown = set(args.methods) - {*METHODS, "kvzap"}
    if unknown or ("kvzap" in args.methods and not args.sidecar):
        parser.error(f"no method '{unknown.pop()}'" if unknown else "kvzap needs --sidecar")
    return args


def main():
    args = parsed()
    if not pathlib.Path(args.model).exists():
        subprocess.run([args.lesskv, "convert", args.checkpoint, args.model, "--type", "F32"], check=True)
    options = rows.Options(**{name: getattr(args, name) for name in rows.Options.__dataclass_fields__})
    with tempfile.TemporaryDirectory() as folder:
        engine, model = Engine(args, folder), peer.Model(args.checkpoint, args.threads)
        prompts = []
        for text in pieces(args.texts, args.chars):
            ids = engine.model.tokenize(text)
            logits = model.read(ids, None)[1]
            prompts.append((text, ids, logits.index(max(logits))))  # the likeliest token is what both read next
        print(f"prompts of {', '.join(str(len(ids)) for _, ids, _ in prompts)} tokens; MiB and seconds: lesskv | kvpress\n")
        print("| | same rows, mean | least | rows a head | kvpress | MiB | kvpress | seconds | kvpress | KL, largest "
              "| logits differ by | last spec |\n|---|" + "---:|" * 10 + "---|")
        for method in args.methods:
            for share in args.shares[:1] if method in ALL_ROWS else args.shares:
                for line in lines_of(method, share, prompts, model, engine, options):
                    line.print()


if __name__ == "__main__":
    main()
