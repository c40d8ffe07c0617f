#!/usr/bin/env python3
"""Is it the same model in both? Perplexity and greedy text of lesskv beside llama.cpp, on the same GGUF files.

    perplexity.py --lesskv build/release/apps/lesskv/lesskv --llama BUILD/bin --text wiki.test.raw --bytes 100000
                  --model smollm2-f16.gguf --model qwen-q4_k_m.gguf [--ctx 512,2048,4096] [--greedy 10]

BUILD/bin holds llama-perplexity and, for --greedy, llama-completion (README.md beside this file). The first --bytes bytes
of the text, cut at a whole character, go through both with the full cache: windows, scored halves and BOS as in
llama-perplexity. --greedy N writes 48 tokens behind each of N prompts, paragraphs of the text, and counts how often both
write the same. Prints Markdown tables.
"""
import argparse
import json
import pathlib
import re
import subprocess
import tempfile


def output(command):
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def first_bytes(path, count):
    # llama.cpp drops a newline at the end of a file.
    return path.read_bytes()[:count].decode("utf-8", "ignore").rstrip("\n")


def llama_perplexity(args, model, ctx, text):
    said = output([args.llama / "llama-perplexity", "-m", model, "-f", text, "-c", ctx, "-b", ctx, "-t", args.threads])
    return float(re.search(r"PPL = ([0-9.]+)", said).group(1))


def lesskv_perplexity(args, model, ctx, text):
    rows = subprocess.run([args.lesskv, "eval", "perplexity", "-m", model, "--text", text, "-c", str(ctx), "--protocol",
                           "llama", "--mode", "stream", "--step", str(args.step), "--compute", args.compute, "--batch", "1",
                           "-t", str(args.threads), "-o", "json"], check=True, capture_output=True, text=True).stdout
    return json.loads(rows)[0]


def perplexities(args, text):
    print("| file | context | tokens scored | llama.cpp | lesskv | differs by |\n|---|---:|---:|---:|---:|---:|")
    for model in args.model:
        for ctx in args.ctx:
            row = lesskv_perplexity(args, model, ctx, text)
            ours, theirs = row["perplexity"], llama_perplexity(args, model, ctx, text)
            print(f"| {model.stem} | {ctx} | {row['tokens_scored']} | {theirs:.4f} | {ours:.4f} | {100 * (ours / theirs - 1):+.3f} % |",
                  flush=True)


def prompts(text, count):
    paragraphs = [p.strip() for p in text.split("\n") if len(p.strip()) > 200]
    return [p[:180].rsplit(" ", 1)[0] for p in paragraphs[:: max(1, len(paragraphs) // count)][:count]]


def llama_text(args, model, prompt):
    return subprocess.run([args.llama / "llama-completion", "-m", model, "-p", prompt, "-n", "48", "--temp", "0", "-no-cnv",
                           "--no-display-prompt", "-c", "1024", "-t", str(args.threads)],
                          check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def lesskv_text(args, model, prompt):
    return json.loads(subprocess.run([args.lesskv, "run", "-m", model, "-p", prompt, "-n", "48", "--temp", "0", "-c", "1024", "--json",
                                      "--compute", args.compute, "-t", str(args.threads)],
                                     check=True, capture_output=True, text=True).stdout)["text"]


def greedy(args, text):
    print("| file | same greedy text of 48 tokens |\n|---|---:|")
    for model in args.model:
        same = 0
        for prompt in prompts(text, args.greedy):
            ours, theirs = lesskv_text(args, model, prompt), llama_text(args, model, prompt)
            equal = ours.strip() == theirs.replace("[end of text]", "").strip()
            same += equal
            if not equal:
                print(f"<!-- {prompt!r}\n  llama.cpp: {theirs!r}\n  lesskv:    {ours!r} -->")
        print(f"| {model.stem} | {same} of {args.greedy} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesskv", type=pathlib.Path, required=True)
    parser.add_argument("--llama", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--bytes", type=int, default=100000)
    parser.add_argument("--ctx", type=lambda s: [int(n) for n in s.split(",")], default=[512, 2048, 4096])
    parser.add_argument("--step", type=int, default=512, help="tokens a step of ours")
    parser.add_argument("--compute", default="f32", help="arithmetic of ours")
    parser.add_argument("--greedy", type=int, default=0, help="prompts to compare greedy text on; 0: perplexity only")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    text = first_bytes(args.text, args.bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "text.txt"
        path.write_text(text)
        perplexities(args, path)
    if args.greedy:
        greedy(args, text)


if __name__ == "__main__":
    main()
