#!/usr/bin/env python3
"""Do lesskv and llama.cpp write the same? Greedy texts of both behind ten prompts of different kinds, on the same GGUF files.

    PYTHONPATH=python LESSKV_LIBRARY=build/release/src/capi/liblesskv.so
    greedy.py --lesskv build/release/apps/lesskv/lesskv --llama BUILD/bin --model smollm2-f16.gguf --model gemma3-f16.gguf

BUILD/bin holds llama-completion (README.md beside this file). `lesskv run` and llama-completion continue each prompt with
the likeliest token, without a chat template. Prints a Markdown table of how many texts are equal. Where two part, it says after
how many tokens and by how much the engine's two likeliest logits differ there: a gap of a few thousandths is a tie that
rounding breaks, a large one a fault. Files in F16 or F32 say most; with quantised ones llama.cpp rounds activations to 8 bits.
"""
import argparse
import json
import pathlib
import subprocess

import numpy as np

import lesskv

SPARE = 24  # tokens
PROMPTS = (
    "The lighthouse keeper opened the letter and read it twice before he",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number.\"\"\"\n",
    "Q: What is the capital of Portugal?\nA: Lisbon.\nQ: What is the capital of Norway?\nA:",
    "Ingredients: 200 g flour, 2 eggs, 300 ml milk, a pinch of salt.\nMethod:\n1.",
    "Die Katze saß am Fenster und",
    "Dear Ms. Alvarez,\n\nThank you for your application. We are pleased to",
    "3, 6, 9, 12, 15,",
    "<html>\n<head>\n<title>My first page</title>\n</head>\n<body>\n",
    "The French Revolution began in 1789. Its causes were",
)


def llama_text(args, model, prompt):
    """What llama-completion writes. It may end without having printed its last tokens, so it is asked for more of them."""
    text = subprocess.run([args.llama / "llama-completion", "-m", model, "-p", prompt, "--no-escape", "-n", str(args.tokens + SPARE),
                           "--temp", "0", "-no-cnv", "--no-display-prompt", "-c", "1024", "-t", str(args.threads)],
                          check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode(errors="ignore")
    return text.split(" [end of text]")[0]


def lesskv_text(args, model, prompt):
    """What `lesskv run` writes, and whether it ended the text."""
    done = json.loads(subprocess.run([args.lesskv, "run", "-m", model, "-p", prompt, "-n", str(args.tokens), "--temp", "0", "-c", "1024",
                                      "--json", "--compute", args.compute, "-t", str(args.threads)],
                                     check=True, capture_output=True, text=True).stdout)
    return done["text"].rstrip("\ufffd"), done["finish"] == "end"


def alike(ours, ended, theirs):
    return bool(theirs) and ours.startswith(theirs.rstrip()) if ended else theirs.startswith(ours)


def parting(args, model, prompt, theirs):
    """Where the engine's choices leave a text: tokens before it, and what it finds likeliest there."""
    engine = lesskv.Model(model, threads=args.threads, compute=args.compute)
    sequence, written = engine.sequence(kv="full", ctx=1024), []
    logits = sequence.prefill(engine.tokenize(prompt))
    while len(written) < args.tokens and theirs.startswith(engine.detokenize(written + [int(logits.argmax())])):
        written.append(int(logits.argmax()))
        logits = sequence.decode(written[-1])
    best = np.argsort(-logits)[:3]
    choices = ", ".join(f"{engine.detokenize([int(i)])!r} {logits[i]:.4f}" for i in best)
    return f"after {len(written)} tokens, gap {logits[best[0]] - logits[best[1]]:.4f} ({choices})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesskv", type=pathlib.Path, required=True)
    parser.add_argument("--llama", type=pathlib.Path, required=True)
    parser.add_argument("--model", type=pathlib.Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--compute", default="f32", help="arithmetic of ours")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"| file | same text of {args.tokens} tokens |\n|---|---:|")
    for model in args.model:
        partings = []
        for prompt in PROMPTS:
            (ours, ended), theirs = lesskv_text(args, model, prompt), llama_text(args, model, prompt)
            if not alike(ours, ended, theirs):
                partings.append(f"<!-- {prompt!r}: {parting(args, model, prompt, theirs)}\n  llama.cpp: {theirs!r}\n  lesskv:    {ours!r} -->")
        print("\n".join([f"| {model.stem} | {len(PROMPTS) - len(partings)} of {len(PROMPTS)} |", *partings]), flush=True)


if __name__ == "__main__":
    main()
