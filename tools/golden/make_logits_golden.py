#!/usr/bin/env python3
"""Writes tiny random models and the logits that an independent forward pass computes for them.

The forward pass below is plain NumPy in float64, written from the papers and the GGUF conventions, and shares nothing
with the engine. Each model exercises something the others do not: grouped heads, as many KV heads as query heads, tied
and untied output, linear RoPE scaling, `rope_freqs.weight`, a head size that is not d_model / n_heads, optional biases,
and Qwen 2 (biases on queries, keys and values; RoPE over the halves of a head).

    pip install numpy gguf
    python3 tools/golden/make_logits_golden.py tests/data/models

writes NAME.gguf (f32 weights) and NAME.expected.gguf (tensors `tokens` [n] and `logits` [n, n_vocab]) for each model.
The output is the same on every run.
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

N_TOKENS = 32


@dataclass
class Shape:
    name: str
    arch: str = "llama"
    layers: int = 2
    d_model: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 40
    vocab: int = 61
    eps: float = 1e-5
    rope_base: float = 10000.0
    rope_factor: float = 1.0      # linear scaling: positions are divided by it
    rope_freqs: bool = False      # per-frequency divisors, as Llama 3.1 has
    tied: bool = True
    biases: tuple = ()            # among q k v output gate up down
    tokenizer: bool = False
    weights: dict = field(default_factory=dict)


SHAPES = [
    Shape("llama-gqa-tied", vocab=272, tokenizer=True),
    Shape("llama-mha-untied", d_model=24, heads=3, kv_heads=3, ffn=36, eps=1e-6, rope_base=500000.0, tied=False),
    Shape("llama-rope-scaled", d_model=20, heads=4, kv_heads=1, head_dim=6, ffn=28, vocab=47, rope_factor=4.0,
          rope_freqs=True, biases=("q", "k", "v", "output", "gate", "up", "down")),
    Shape("qwen2-bias", arch="qwen2", layers=3, d_model=24, heads=4, kv_heads=2, head_dim=6, ffn=33, vocab=53,
          rope_base=1000000.0, biases=("q", "k", "v")),
]


def make_weights(shape, rng):
    """Matrices [outputs, inputs] in float32, scaled so that attention is neither flat nor a single token."""
    w = {}

    def matrix(name, rows, cols, gain=1.0):
        w[name] = (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float32)

    def vector(name, n, mean, std):
        w[name] = (mean + std * rng.standard_normal(n)).astype(np.float32)

    q_dim, kv_dim = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    w["token_embd.weight"] = rng.standard_normal((shape.vocab, shape.d_model)).astype(np.float32)
    for layer in range(shape.layers):
        p = f"blk.{layer}."
        vector(p + "attn_norm.weight", shape.d_model, 1.0, 0.2)
        vector(p + "ffn_norm.weight", shape.d_model, 1.0, 0.2)
        matrix(p + "attn_q.weight", q_dim, shape.d_model, 1.5)
        matrix(p + "attn_k.weight", kv_dim, shape.d_model, 1.5)
        matrix(p + "attn_v.weight", kv_dim, shape.d_model)
        matrix(p + "attn_output.weight", shape.d_model, q_dim)
        matrix(p + "ffn_gate.weight", shape.ffn, shape.d_model)
        matrix(p + "ffn_up.weight", shape.ffn, shape.d_model)
        matrix(p + "ffn_down.weight", shape.d_model, shape.ffn)
        sizes = {"q": ("attn_q", q_dim), "k": ("attn_k", kv_dim), "v": ("attn_v", kv_dim),
                 "output": ("attn_output", shape.d_model), "gate": ("ffn_gate", shape.ffn), "up": ("ffn_up", shape.ffn),
                 "down": ("ffn_down", shape.d_model)}
        for bias in shape.biases:
            vector(p + sizes[bias][0] + ".bias", sizes[bias][1], 0.0, 0.5)
    vector("output_norm.weight", shape.d_model, 1.0, 0.2)
    if not shape.tied:
        matrix("output.weight", shape.vocab, shape.d_model, 2.0)
    if shape.rope_freqs:
        w["rope_freqs.weight"] = np.linspace(1.0, 8.0, shape.head_dim // 2).astype(np.float32)
    return w


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x, shape, divisors):
    """x [n, heads, head_dim] of positions 0 .. n-1."""
    n, _, d = x.shape
    frequency = shape.rope_base ** (-np.arange(0, d, 2, dtype=np.float64) / d) / divisors
    angle = np.arange(n)[:, None] / shape.rope_factor * frequency  # [n, d/2]
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    y = np.empty_like(x)
    if shape.arch == "qwen2":
        first, second = slice(0, d // 2), slice(d // 2, d)
    else:
        first, second = slice(0, d, 2), slice(1, d, 2)
    a, b = x[..., first], x[..., second]
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y


def attention(q, k, v):
    """q [n, heads, d], k and v [n, kv_heads, d]; causal; each KV head serves heads / kv_heads query heads."""
    n, heads, d = q.shape
    group = heads // k.shape[1]
    out = np.empty_like(q)
    mask = np.triu(np.full((n, n), -np.inf), 1)
    for h in range(heads):
        scores = q[:, h] @ k[:, h // group].T / np.sqrt(d) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h // group]
    return out


def forward(shape, tokens):
    w = {name: value.astype(np.float64) for name, value in shape.weights.items()}
    n = len(tokens)
    divisors = w.get("rope_freqs.weight", 1.0)

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    x = w["token_embd.weight"][tokens]
    for layer in range(shape.layers):
        p = f"blk.{layer}."
        h = rms_norm(x, w[p + "attn_norm.weight"], shape.eps)
        q = linear(p + "attn_q", h).reshape(n, shape.heads, shape.head_dim)
        k = linear(p + "attn_k", h).reshape(n, shape.kv_heads, shape.head_dim)
        v = linear(p + "attn_v", h).reshape(n, shape.kv_heads, shape.head_dim)
        a = attention(rope(q, shape, divisors), rope(k, shape, divisors), v)
        x = x + linear(p + "attn_output", a.reshape(n, -1))
        h = rms_norm(x, w[p + "ffn_norm.weight"], shape.eps)
        gate = linear(p + "ffn_gate", h)
        x = x + linear(p + "ffn_down", gate / (1 + np.exp(-gate)) * linear(p + "ffn_up", h))
    x = rms_norm(x, w["output_norm.weight"], shape.eps)
    return x @ w["token_embd.weight" if shape.tied else "output.weight"].T


def write_tokenizer(writer, vocab):
    """A SentencePiece vocabulary: three control tokens, all bytes, a few pieces, so that any text can be encoded."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
    words = ["\u2581", "e", "t", "a", "o", "\u2581t", "he", "\u2581the", "n", "in", "\u2581a", "s", "r"]
    pieces, kinds = pieces + words, kinds + [gguf.TokenType.NORMAL] * len(words)
    assert len(pieces) == vocab, len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece.encode() for piece in pieces])
    writer.add_token_scores([0.0] * 259 + [-float(i + 1) for i in range(len(words))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_model(shape, path):
    w = gguf.GGUFWriter(path, shape.arch)
    w.add_name(shape.name)
    w.add_block_count(shape.layers)
    w.add_context_length(128)
    w.add_embedding_length(shape.d_model)
    w.add_feed_forward_length(shape.ffn)
    w.add_head_count(shape.heads)
    w.add_head_count_kv(shape.kv_heads)
    w.add_layer_norm_rms_eps(shape.eps)
    w.add_rope_freq_base(shape.rope_base)
    w.add_rope_dimension_count(shape.head_dim)
    if shape.head_dim * shape.heads != shape.d_model:
        w.add_key_length(shape.head_dim)
        w.add_value_length(shape.head_dim)
    if shape.rope_factor != 1.0:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(shape.rope_factor)
    if shape.tokenizer:
        write_tokenizer(w, shape.vocab)
    for name, value in shape.weights.items():
        w.add_tensor(name, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_expected(path, tokens, logits):
    w = gguf.GGUFWriter(path, "golden")
    w.add_tensor("tokens", tokens.astype(np.int32))
    w.add_tensor("logits", logits.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for index, shape in enumerate(SHAPES):
        rng = np.random.default_rng(20240 + index)
        shape.weights = make_weights(shape, rng)
        tokens = rng.integers(0, shape.vocab, N_TOKENS)
        logits = forward(shape, tokens)
        write_model(shape, out / f"{shape.name}.gguf")
        write_expected(out / f"{shape.name}.expected.gguf", tokens, logits)
        margin = np.sort(logits, -1)
        print(f"{shape.name}: logits in [{logits.min():.2f}, {logits.max():.2f}], smallest margin of the first place "
              f"{(margin[:, -1] - margin[:, -2]).min():.4f}")


if __name__ == "__main__":
    main()
