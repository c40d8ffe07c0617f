#!/usr/bin/env python3
"""Times lesskv beside llama.cpp on the same files, in turns, and prints Markdown tables of medians and ratios.

    compare.py --lesskv build/release/apps/lesskv/lesskv --llama-bench .../llama-bench --llama-depth .../decode_at_depth
               --model q4_0=FILE [--model bf16=FILE ...] [--mha FILE] [--rounds 3] [--prompt 512,4096] [--depth 16384,32768]
               [--prompt-depth 8192,32768]

README.md beside this file says how to build the llama.cpp programs and make the files. Every number is the median over
the rounds; a round runs llama.cpp, then lesskv, for one test after the other.
"""
import argparse
import json
import statistics
import subprocess

DEPTH_MODEL = "q4_0"  # the file whose decoding at depth is compared
LLAMA_CACHES = [("f16", "f16", 0), ("f16", "f16", 1), ("q8_0", "q8_0", 1), ("q4_0", "q4_0", 1)]
PIECE, PROMPT_CACHES, PROMPT_SPECS = 512, LLAMA_CACHES[:2], ["full", "full+q8"]  # llama.cpp takes minutes with others
SPECS = ["full", "full+q8", "full+q4", "h2o(5%)", "h2o(5%)+less"]


def output(command):
    return subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True).stdout


def median(samples):
    return statistics.median(samples)


class Comparison:
    def __init__(self, args):
        self.args = args

    def llama_bench(self, model, prompt, generate):
        rows = json.loads(output([self.args.llama_bench, "-m", model, "-p", prompt, "-n", generate, "-t", self.args.threads,
                                  "-r", 1, "-o", "json"]))
        return rows[0]["avg_ts"]

    def llama_depth(self, model, depth, cache, n, together=1):
        lines = output([self.args.llama_depth, model, self.args.threads, depth, n, 1, *cache, together])
        return float(lines.split()[-1])

    def lesskv(self, model, *options):
        rows = json.loads(output([self.args.lesskv, "bench", "-m", model, "-t", self.args.threads, "-r", 1,
                                  "--random-sidecar", "-o", "json", *options]))
        return {(row["kv_spec"], row["test"]): row for row in rows}

    def empty(self, name, model):
        """Prefill and decoding at an empty cache."""
        prompts = self.args.prompt
        theirs, ours = {}, {}
        for _ in range(self.args.rounds):
            for n in prompts:
                theirs.setdefault(f"pp{n}", []).append(self.llama_bench(model, n, 0))
            theirs.setdefault("tg", []).append(self.llama_bench(model, 0, 32))
            rows = self.lesskv(model, "-p", ",".join(map(str, prompts)), "-n", 32)
            for n in prompts:
                ours.setdefault(f"pp{n}", []).append(rows["full", f"pp{n}"]["tokens_per_second"])
            ours.setdefault("tg", []).append(rows["full", "tg32"]["tokens_per_second"])
        for test in ours:
            a, b = median(theirs[test]), median(ours[test])
            print(f"| {name} | {test} | {a:.1f} | {b:.1f} | {b / a:.2f} |", flush=True)

    def at_depth(self, name, model, depth, caches, specs):
        theirs, ours, shares = {}, {}, {}
        for _ in range(self.args.rounds):
            for cache in caches:
                theirs.setdefault(cache, []).append(self.llama_depth(model, depth, cache, self.args.generate))
            options = [x for spec in specs for x in ("--kv", spec)]
            rows = self.lesskv(model, "-p", 0, "-n", self.args.generate, "-d", depth, *options)
            for spec, row in zip(specs, rows.values()):
                ours.setdefault(spec, []).append(row["tokens_per_second"])
                shares.setdefault(spec, []).append(row["share_of_plain_read"])
        base = median(theirs[caches[0]])
        for k, v, flash in caches:
            speed = median(theirs[k, v, flash])
            flash_text = "flash attention" if flash else "no flash attention"
            print(f"| {name} | {depth} | llama.cpp, {k}/{v}, {flash_text} | {speed:.2f} | {speed / base:.2f} | |", flush=True)
        for spec in specs:
            speed, share = median(ours[spec]), 100 * median(shares[spec])
            print(f"| {name} | {depth} | lesskv, `{spec}` | {speed:.2f} | {speed / base:.2f} | {share:.0f} % |", flush=True)

    def prompt_at_depth(self, name, model, depth):
        """A prompt's next PIECE tokens behind `depth` of them."""
        theirs, ours = {}, {}
        for _ in range(self.args.rounds):
            for cache in PROMPT_CACHES:
                theirs.setdefault(cache, []).append(self.llama_depth(model, depth, cache, 1, PIECE))
            options = [x for spec in PROMPT_SPECS for x in ("--kv", spec)]
            rows = self.lesskv(model, "-p", PIECE, "-n", 0, "-d", depth, *options)
            for spec, row in zip(PROMPT_SPECS, rows.values()):
                ours.setdefault(spec, []).append(row["tokens_per_second"])
        speeds = [median(samples) for samples in [*theirs.values(), *ours.values()]]
        best = max(speeds[:len(PROMPT_CACHES)])
        print(f"| {name} | {depth} | " + " | ".join(f"{s:.1f}" for s in speeds) + f" | {speeds[len(PROMPT_CACHES)] / best:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesskv", required=True)
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--llama-depth", required=True)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--mha", help="a file whose every query head has its own KV head, compared at the largest depth")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generate", type=int, default=8, help="tokens decoded at depth")
    parser.add_argument("--prompt", type=lambda s: [int(x) for x in s.split(",") if x], default=[512, 4096])
    parser.add_argument("--depth", type=lambda s: [int(x) for x in s.split(",") if x], default=[16384, 32768])
    parser.add_argument("--prompt-depth", type=lambda s: [int(x) for x in s.split(",") if x], default=[],
                        help="behind so many tokens 512 more of a prompt are timed")
    args = parser.parse_args()
    comparison = Comparison(args)
    models = dict(m.split("=", 1) for m in args.model)
    if args.prompt and models:
        print("| weights | test | llama.cpp tokens/s | lesskv tokens/s | ratio |\n|---|---|---:|---:|---:|")
        for name, model in models.items():
            comparison.empty(name, model)
        print()
    if args.prompt_depth:
        print("| model | tokens before | llama.cpp | flash attention | lesskv, `full` | `full+q8` | `full` to the best |\n"
              "|---|---:|---:|---:|---:|---:|---:|")
        for name, model in models.items():
            for depth in args.prompt_depth:
                comparison.prompt_at_depth(name, model, depth)
        print()
    if not args.depth:
        return
    print("| weights | tokens in cache | cache | tokens/s | ratio to llama.cpp f16 | of a plain read |\n|---|---:|---|---:|---:|---:|")
    if DEPTH_MODEL in models:
        for depth in args.depth:
            comparison.at_depth(DEPTH_MODEL, models[DEPTH_MODEL], depth, LLAMA_CACHES, SPECS)
    if args.mha:
        comparison.at_depth("MHA shape", args.mha, args.depth[-1], LLAMA_CACHES[:1], SPECS[:1])


if __name__ == "__main__":
    main()
