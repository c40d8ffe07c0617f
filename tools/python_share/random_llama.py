#!/usr/bin/env python3
"""random_llama.py VOCABULARY.gguf OUT.gguf: the shape of Llama 3.2 1B with random weights in Q4_0, for measuring speed.

2,048 wide, 16 layers, 32 query and 8 KV heads of 64, 8,192 inside, output tied to the embedding; the vocabulary is that of
another file, so that tokens have texts. Needs the package gguf.
"""
import sys

import gguf
import numpy as np

WIDTH, LAYERS, HEADS, KV_HEADS, INSIDE, CTX = 2048, 16, 32, 8, 8192, 8192
BLOCK = np.dtype([("scale", "<f2"), ("codes", "u1", 16)])  # 32 weights: scale * (code - 8)


def matrix(rng, rows, columns):
    """Weights of a standard deviation of 0.02 or so."""
    blocks = np.empty((rows, columns // 32), dtype=BLOCK)
    blocks["scale"] = 0.0043
    blocks["codes"] = rng.integers(0, 256, blocks["codes"].shape, dtype=np.uint8)
    return blocks.view(np.uint8).reshape(rows, -1)


def copy_vocabulary(reader, writer):
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    return len(reader.fields["tokenizer.ggml.tokens"].data)


def main(vocabulary, out):
    writer, rng = gguf.GGUFWriter(out, "llama"), np.random.default_rng(1)
    n_vocab = copy_vocabulary(gguf.GGUFReader(vocabulary), writer)
    writer.add_name("random, shape of Llama 3.2 1B")
    for key, value in {"context_length": CTX, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": INSIDE,
                       "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": n_vocab,
                       "rope.dimension_count": WIDTH // HEADS}.items():
        writer.add_uint32("llama." + key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500000.0)
    add = lambda name, rows, columns: writer.add_tensor(name + ".weight", matrix(rng, rows, columns),  # noqa: E731
                                                        raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    norm = lambda name: writer.add_tensor(name + ".weight", np.ones(WIDTH, dtype=np.float32))  # noqa: E731
    kv = WIDTH // HEADS * KV_HEADS
    add("token_embd", n_vocab, WIDTH)
    norm("output_norm")
    for block in (f"blk.{i}." for i in range(LAYERS)):
        norm(block + "attn_norm")
        norm(block + "ffn_norm")
        for name, rows, columns in (("attn_q", WIDTH, WIDTH), ("attn_k", kv, WIDTH), ("attn_v", kv, WIDTH),
                                    ("attn_output", WIDTH, WIDTH), ("ffn_gate", INSIDE, WIDTH), ("ffn_up", INSIDE, WIDTH),
                                    ("ffn_down", WIDTH, INSIDE)):
            add(block + name, rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
