#!/usr/bin/env python3
"""measure.py MODEL.gguf: what Python adds to the time of decoding, and of attending through the cache alone.

Decoding: the same tokens (greedy) by Sequence.generate, by one call of the C function under it, and by the program `lesskv`, in
turns, each through a sequence of its own. Attending: decode steps through lesskv.Cache over NumPy arrays and by a loop in C over a
clone of the same cache, in turns, a step being one token through all layers. Printed are medians of milliseconds and of the ratios inside turns; cpu
is the ratio of processor time in this process, which other work on the machine disturbs less. The package under test is the one on PYTHONPATH.
"""
import argparse
import ctypes as c
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import lesskv
from lesskv import _c
from lesskv.model import address, int32, pointer

HERE = pathlib.Path(__file__).resolve().parent


class Timer:
    """Seconds of the wall and of this process's processors."""

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def by_iterator(model, ids, n, ctx):
    sequence = model.sequence(ctx=ctx)
    with Timer() as timer:
        text = "".join(sequence.generate(ids, max_tokens=n, temperature=0))
    return timer, text, sequence.result.generated_tokens


def by_one_call(model, ids, n, ctx):
    sequence, result = model.sequence(ctx=ctx), _c.GenerateResult()
    params = _c.defaults("generate_params")
    params.temperature, params.max_tokens = 0, n
    ids = int32(ids)
    with Timer() as timer:
        _c.call("generate", sequence._pointer, pointer(ids, c.c_int32), ids.size, c.byref(params), c.byref(result))
    return timer, result.generated_tokens


def by_program(program, path, prompt, n, ctx, threads):
    said = subprocess.run([program, "run", "-m", path, "-p", prompt, "-n", str(n), "-c", str(ctx), "-t", str(threads), "--temp", "0",
                           "--json"], capture_output=True, text=True, check=True)
    row = json.loads(said.stdout)
    return row["prefill_seconds"] + row["decode_seconds"], row["text"], row["generated_tokens"]


def ratio(ours, others):
    ratios = [a / b for a, b in zip(ours, others)]
    quartiles = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.4f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"


def decoding(args):
    model = lesskv.Model(args.model, threads=args.threads)
    prompt, ctx = "The", 64 + args.tokens
    ids = model.tokenize(prompt)
    by_iterator(model, ids, 4, ctx)
    iterator, call, program = [], [], []
    for turn in range(args.turns):
        pair = [by_iterator, by_one_call] if turn % 2 == 0 else [by_one_call, by_iterator]
        done = {which: which(model, ids, args.tokens, ctx) for which in pair}
        (ours, text, n), (bare, n_bare) = done[by_iterator], done[by_one_call]
        assert n == n_bare, "the same tokens"
        iterator.append(ours)
        call.append(bare)
        if args.lesskv and turn < args.program_turns:
            seconds, said, n_said = by_program(args.lesskv, args.model, prompt, args.tokens, ctx, args.threads)
            assert said == text and n_said == n, "the same text"
            program.append((ours.wall, seconds))
    wall = lambda timers: [t.wall for t in timers]  # noqa: E731
    cpu = lambda timers: [t.cpu for t in timers]  # noqa: E731
    print(f"decoding, {args.turns} turns of {n} tokens, ms a token: iterator {statistics.median(wall(iterator)) / n * 1e3:.3f}, "
          f"one call {statistics.median(wall(call)) / n * 1e3:.3f}")
    print(f"  iterator / one call: {ratio(wall(iterator), wall(call))}; cpu {ratio(cpu(iterator), cpu(call))}")
    if len(program) > 1:
        print(f"  iterator / program, {len(program)} turns: {ratio(*zip(*program))}")


def loop_in_c():
    """cache_loop.c over the library that is loaded."""
    folder = tempfile.mkdtemp()
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-I", HERE.parents[1] / "include", HERE / "cache_loop.c", "-o", f"{folder}/loop.so"],
                   check=True)
    c.CDLL(_c._find(), mode=c.RTLD_GLOBAL)
    return c.CDLL(f"{folder}/loop.so").decode_steps


def attending(args):
    layers, heads, kv_heads, dim, n = 16, 32, 8, 64, args.steps
    full = lesskv.Cache(layers, heads, kv_heads, dim, ctx=args.rows + n + 1, kv=args.kv, threads=args.threads)
    rng = np.random.default_rng(1)
    numbers = lambda rows, h: rng.standard_normal((rows, h, dim)).astype(np.float32)  # noqa: E731
    for at in range(0, args.rows, 256):
        rows = min(256, args.rows - at)
        q, k, v = numbers(rows, heads), numbers(rows, kv_heads), numbers(rows, kv_heads)
        with full.step(rows, "stream"):
            for layer in range(layers):
                full(layer, q, k, v)
    q, k, v = numbers(1, heads), numbers(1, kv_heads), numbers(1, kv_heads)
    out, steps_in_c = np.empty_like(q), loop_in_c()

    def in_python(cache):
        for _ in range(n):
            with cache.step(1):
                for layer in range(layers):
                    cache(layer, q, k, v)

    def in_c(cache):
        arrays = (c.c_void_p(address(a)) for a in (k, v, q, out))
        assert steps_in_c(cache._pointer, c.c_size_t(layers), c.c_size_t(n), *arrays) == 0

    python, bare = [], []
    for turn in range(args.turns):
        for which, to in ((in_python, python), (in_c, bare)) if turn % 2 == 0 else ((in_c, bare), (in_python, python)):
            cache = full.clone()
            with Timer() as timer:
                which(cache)
            to.append(timer)
    for name, values in (("wall", lambda t: t.wall), ("cpu", lambda t: t.cpu)):
        ours, theirs = [values(t) for t in python], [values(t) for t in bare]
        print(f"attending, `{args.kv}` at {args.rows} rows, {args.turns} turns of {n} tokens, {layers} layers, {name}: NumPy {statistics.median(ours) / n * 1e3:.3f} "
              f"ms a token, C {statistics.median(theirs) / n * 1e3:.3f}; speed of C {ratio(theirs, ours)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="left out: the cache alone")
    parser.add_argument("--lesskv", help="the program; left out: without it")
    parser.add_argument("--kv", default="full", help="of the cache alone")
    for name, default in (("--threads", 2), ("--turns", 15), ("--tokens", 32), ("--program-turns", 5), ("--rows", 4096), ("--steps", 16)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    if args.model:
        decoding(args)
    else:
        attending(args)


if __name__ == "__main__":
    main()
