#!/usr/bin/env python3
"""Writes tests/data/quants: block-quantised rows as an independent implementation reads and writes them.

For each type TYPE.blocks holds the encoded row and TYPE.values (float32) what it decodes to. Where the package can
also encode, TYPE.blocks is its encoding of the float32 row in `input`; the K types, which it only decodes, get random
codes and scales instead.

    pip install gguf==0.19.0 && python3 tools/golden/make_quant_vectors.py
"""
from pathlib import Path

import numpy as np
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


def random_blocks(rng, kind):
    """Two random blocks with modest halves where the scales are stored; every code and packed scale occurs."""
    size = {T.Q4_K: 144, T.Q5_K: 176, T.Q6_K: 210}[kind]
    blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
    halves = (rng.uniform(0.001, 0.1, (2, 2)) * [1, -1]).astype(np.float16).view(np.uint8).reshape(2, 4)
    if kind == T.Q6_K:
        blocks[:, 208:210] = halves[:, 2:4]
    else:
        blocks[:, 0:4] = halves
    return blocks.reshape(-1)


def main():
    rng = np.random.default_rng(5)
    OUT.mkdir(parents=True, exist_ok=True)
    x = make_input(rng)
    x.tofile(OUT / "input")
    for kind in (T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q5_0, T.Q5_1, T.Q4_K, T.Q5_K, T.Q6_K):
        with_encoder = kind not in (T.Q4_K, T.Q5_K, T.Q6_K)
        blocks = quants.quantize(x, kind) if with_encoder else random_blocks(rng, kind)
        values = quants.dequantize(blocks, kind).astype(np.float32)
        assert values.size == N
        blocks.tofile(OUT / f"{kind.name}.blocks")
        values.tofile(OUT / f"{kind.name}.values")


if __name__ == "__main__":
    main()
