#!/usr/bin/env python3
"""Compares the forward pass of make_logits_golden.py with the models' reference implementations.

Each tiny model becomes a model of the package transformers, in float64, with the same weights; the logits must agree to
1e-6 of their range. What GGUF stores in another way (rows of queries and keys of Llama, fused matrices, Gemma's norms
plus one) is turned back here.

    pip install numpy gguf torch transformers
    python3 tools/golden/check_logits_with_transformers.py
"""
import sys

import numpy as np
import torch
import transformers as hf

import make_logits_golden as golden

TOLERANCE = 1e-6  # of the range of logits: the references compute norms, angles and softmax in float32


def common(shape, **more):
    return dict(vocab_size=shape.vocab, hidden_size=shape.d_model, intermediate_size=shape.ffn,
                num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim, max_position_embeddings=shape.context, rms_norm_eps=shape.eps,
                rope_theta=shape.rope_base, tie_word_embeddings=shape.tied, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, attn_implementation="eager", **more)


def llama(shape):
    more = {}
    if shape.yarn_ctx:
        more["rope_scaling"] = {"rope_type": "yarn", "factor": shape.rope_factor, "rope_theta": shape.rope_base,
                                "original_max_position_embeddings": shape.yarn_ctx}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**common(shape, **more)))


def gemma3(shape):
    kinds = ["full_attention" if (i + 1) % shape.local_period == 0 else "sliding_attention" for i in range(shape.layers)]
    scaling = {"rope_type": "linear", "factor": shape.rope_factor}
    if int(hf.__version__.split(".")[0]) >= 5:
        more = {"rope_parameters": {"full_attention": {**scaling, "rope_theta": shape.rope_base},
                                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    else:
        more = {"rope_scaling": scaling, "rope_local_base_freq": 10000.0}
    arguments = common(shape, sliding_window=shape.window, layer_types=kinds, query_pre_attn_scalar=shape.head_dim,
                       hidden_activation="gelu_pytorch_tanh", **more)
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**arguments))


def phi3(shape):
    factors = {f"{x}_factor": shape.weights[f"rope_factors_{x}.weight"].astype(float).tolist() for x in ("short", "long")}
    share = shape.rotated / shape.head_dim
    scaling = {"type": "longrope", "rope_type": "longrope", "rope_theta": shape.rope_base,
               "partial_rotary_factor": share, "original_max_position_embeddings": shape.longrope_ctx, **factors}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**common(
        shape, rope_scaling=scaling, partial_rotary_factor=share, original_max_position_embeddings=shape.longrope_ctx)))


def falcon(shape):
    return hf.FalconForCausalLM(hf.FalconConfig(
        vocab_size=shape.vocab, hidden_size=shape.d_model, num_hidden_layers=shape.layers, ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads, num_kv_heads=shape.kv_heads, layer_norm_epsilon=shape.eps, alibi=False,
        rope_theta=shape.rope_base, new_decoder_architecture=shape.two_norms, multi_query=True, parallel_attn=True,
        bias=False, tie_word_embeddings=shape.tied, attn_implementation="eager"))


MODELS = {
    "llama-gqa-tied": llama, "llama-mha-untied": llama, "llama-yarn": llama,
    "qwen3-qk-norm": lambda shape: hf.Qwen3ForCausalLM(hf.Qwen3Config(**common(shape))),
    "gemma3-local": gemma3, "phi3-longrope": phi3, "falcon-mqa": falcon, "falcon-two-norms": falcon,
    "smollm3-nope": lambda shape: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**common(
        shape, no_rope_layer_interval=shape.nope_period,
        no_rope_layers=[int((i + 1) % shape.nope_period != 0) for i in range(shape.layers)]))),
}

NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = {**NAMES, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}
PHI3_NAMES = {**NAMES, "ffn_up": "mlp.gate_up_proj"}
FALCON_NAMES = {"attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value",
                "attn_output": "self_attention.dense", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
FALCON_TWO_NAMES = {**FALCON_NAMES, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}


def interleaved_to_halves(w, heads):
    """llama.cpp's converter moves the rows of queries and keys so that pairs lie side by side; back again."""
    rows, cols = w.shape
    return w.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def grouped(shape, w):
    """Falcon 40B's fused matrix: each KV head's query heads, its key and its value, one after the other."""
    q, k, v = np.split(w, [shape.heads * shape.head_dim, (shape.heads + shape.kv_heads) * shape.head_dim])
    by_group = [x.reshape(shape.kv_heads, -1, shape.head_dim, shape.d_model) for x in (q, k, v)]
    return np.concatenate(by_group, axis=1).reshape(w.shape)


def state(shape):
    names = {"gemma3": GEMMA_NAMES, "phi3": PHI3_NAMES,
             "falcon": FALCON_TWO_NAMES if shape.two_norms else FALCON_NAMES}.get(shape.arch, NAMES)
    body = "transformer" if shape.arch == "falcon" else "model"
    layers, final, embedding = (("h", "ln_f", "word_embeddings") if shape.arch == "falcon"
                                else ("layers", "norm", "embed_tokens"))
    result = {}
    for name, value in golden.stored(shape).items():
        kind = name.rsplit(".", 1)[1]
        if name.startswith("rope_"):
            continue
        if shape.arch == "gemma3" and "norm" in name:
            value = value.astype(np.float64) - 1
        if not shape.halves and name.endswith(("attn_q.weight", "attn_k.weight")):
            value = interleaved_to_halves(value, shape.heads if "attn_q" in name else shape.kv_heads)
        if shape.two_norms and "attn_qkv" in name:
            value = grouped(shape, value)
        if name.startswith("blk."):
            _, layer, part, _ = name.split(".")
            result[f"{body}.{layers}.{layer}.{names[part]}.{kind}"] = value
        else:
            head = {"token_embd": f"{body}.{embedding}", "output_norm": f"{body}.{final}", "output": "lm_head"}
            result[f"{head[name.rsplit('.', 1)[0]]}.{kind}"] = value
    if shape.tied:
        result["lm_head.weight"] = shape.weights["token_embd.weight"]
    return {name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64)) for name, value in result.items()}


def difference(model, shape, tokens, long):
    with torch.no_grad():
        want = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    got = golden.forward(shape, tokens, long)
    return np.abs(got - want).max() / (want.max() - want.min())


def main():
    torch.set_default_dtype(torch.float64)
    worst = 0.0
    for index, shape in enumerate(golden.SHAPES):
        if shape.name not in MODELS:
            continue
        shape, tokens = golden.make(index)
        model = MODELS[shape.name](shape).double().eval()
        model.load_state_dict(state(shape), strict=True)
        texts = [(tokens, True)]
        if shape.longrope_ctx:
            texts = [(tokens, True), (tokens[:shape.longrope_ctx], False)]
        for text, long in texts:
            relative = difference(model, shape, text, long)
            worst = max(worst, relative)
            print(f"{shape.name}, {len(text)} tokens: largest difference {relative:.1e} of the range")
    sys.exit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()
