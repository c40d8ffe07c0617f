#!/usr/bin/env python3
"""Writes tests/data/quants: block-quantised rows as an independent implementation reads and writes them.

For each type TYPE.blocks holds the encoded row and TYPE.values (float32) what it decodes to. Where the package can
also encode, TYPE.blocks is its encoding of the float32 row in `input`; the K and IQ4 types, which it only decodes, get
random codes and scales instead. TYPE.extreme.* are blocks at the ends of what a format can hold: zeros, the largest and
the smallest scales of both signs, all codes lowest, all highest.

    pip install gguf==0.19.0 && python3 tools/golden/make_quant_vectors.py
"""
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf import quants

OUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "quants"
N = 512


def make_input(rng):
    """Blocks of very different size, a block of zeros, a constant one, one outlier, one all positive."""
    x = rng.standard_normal(N) * np.repeat(10.0 ** rng.uniform(-4, 2, N // 32), 32)
    x[32:64] = 0
    x[64:96] = -1.25
    x[100] = 300
    x[128:160] = np.abs(x[128:160])
    return x.astype(np.float32)


# Where a block has its halves; MXFP4 has none.
HALVES = {
    T.Q8_0: [0], T.Q4_0: [0], T.Q5_0: [0], T.IQ4_NL: [0], T.IQ4_XS: [0], T.Q3_K: [108], T.Q6_K: [208],
    T.Q4_1: [0, 2], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q2_K: [80, 82], T.MXFP4: [],
}


def random_blocks(rng, kind):
    """Random blocks with modest halves where the scales are stored; every code and packed scale occurs."""
    elements, size = GGML_QUANT_SIZES[kind]
    n = N // elements
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    halves = (rng.uniform(0.001, 0.1, (n, 2)) * [1, -1]).astype(np.float16).view(np.uint8).reshape(n, 4)
    places = HALVES[kind]
    for i, at in enumerate(places):
        first = 2 if len(places) == 1 else 2 * i
        blocks[:, at : at + 2] = halves[:, first : first + 2]
    return blocks.reshape(-1)


def extreme_blocks(rng, kind):
    size = GGML_QUANT_SIZES[kind][1]
    # (scales, every other byte or None for random): 65504, -65504, the smallest subnormal, its negative, one, zero.
    recipes = [(0x0000, 0x00), (0x7BFF, 0xFF), (0xFBFF, 0x00), (0x0001, 0xFF), (0x8001, None), (0x7BFF, None),
               (0x3C00, 0x00), (0x0000, None)]
    exponents = [0, 255, 254, 1, 2, 0, 128, 127]
    blocks = np.empty((len(recipes), size), dtype=np.uint8)
    for block, (half, fill), exponent in zip(blocks, recipes, exponents):
        block[:] = rng.integers(0, 256, size, dtype=np.uint8) if fill is None else fill
        for at in HALVES[kind]:
            block[at : at + 2] = np.array([half], dtype=np.uint16).view(np.uint8)
        if kind == T.MXFP4:
            block[0] = exponent
    return blocks.reshape(-1)


def write(name, kind, blocks):
    blocks.tofile(OUT / f"{name}.blocks")
    with np.errstate(over="ignore"):  # the largest scales of MXFP4 reach infinity
        quants.dequantize(blocks, kind).astype(np.float32).tofile(OUT / f"{name}.values")


def main():
    rng = np.random.default_rng(5)
    OUT.mkdir(parents=True, exist_ok=True)
    x = make_input(rng)
    x.tofile(OUT / "input")
    for kind in (T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.MXFP4):
        write(kind.name, kind, quants.quantize(x, kind))
    for kind in (T.Q4_K, T.Q5_K, T.Q6_K, T.Q2_K, T.Q3_K, T.IQ4_NL, T.IQ4_XS):
        write(kind.name, kind, random_blocks(rng, kind))
    for kind in HALVES:
        write(f"{kind.name}.extreme", kind, extreme_blocks(rng, kind))


if __name__ == "__main__":
    main()
