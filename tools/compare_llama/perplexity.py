#!/usr/bin/env python3
"""Is it the same model in both? Perplexity of lesskv beside llama.cpp, on the same GGUF files (greedy.py compares texts).

    perplexity.py --lesskv build/release/apps/lesskv/lesskv --llama BUILD/bin --text wiki.test.raw --bytes 100000
                  --model smollm2-f16.gguf --model qwen-q4_k_m.gguf [--ctx 512,2048,4096]

BUILD/bin holds llama-perplexity (README.md beside this file). The first --bytes bytes of the text, cut at a whole character,
go through both with the full cache: windows, scored halves and BOS as in llama-perplexity. Prints a Markdown table.
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
    found = re.search(r"PPL = ([0-9.]+)", said)
    if found is None:
        raise SystemExit(f"llama-perplexity says nothing of {model.name} at a context of {ctx}: it wants a text of two contexts (--bytes)")
    return float(found.group(1))


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
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    text = first_bytes(args.text, args.bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "text.txt"
        path.write_text(text)
        perplexities(args, path)


if __name__ == "__main__":
    main()
