#!/usr/bin/env python3
"""Writes tiny Hugging Face model directories of every architecture, and what the reference implementations make of them.

Each directory is as the models' authors publish theirs: config.json (some as transformers 4 wrote it, some as 5 does),
safetensors, tokenizer.json, tokenizer_config.json, generation_config.json. `expected.safetensors` beside them holds
`tokens` [n] and `logits` [n, n_vocab] of the package transformers in float64 (of LongRoPE also `short_logits`, of a context
that takes the short factors), `expected.json` texts and their ids by the package tokenizers, special tokens included.

    pip install numpy torch==2.11 transformers==5.24 tokenizers==0.23.3 safetensors
    python3 tools/golden/make_huggingface_models.py tests/data/huggingface

The output is the same on every run.
"""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

from make_tokenizer_vectors import GPT2, LLAMA3, QWEN2

TRAINING = """the river ran past the mill and under the old bridge, and the miller's daughter counted the barrels
there were 23 of them, she said; in 1867 there ought to have been 1250. def count(x): return x + 1
Der Fluss floss an der Mühle vorbei. Река текла мимо мельницы.
""" * 4
TEXTS = ["", "the river", " the  river\n\nran 12345 past", "I'LL count the miller's 1867 barrels!", "Mühle Река 水 🙂",
         "\t\n  x\r\n", "a<|end|>b <|end|> c", "<s>the</s> <s> x", "<|start|>user\nhi<|end|>\n<|start|>the\n", "<tool>x</tool>the",
         "<unk> <0x41> Ġthe", "don't!!! ... `x` [1000000]"]
N_TOKENS = 12
CHAT = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>"]


def byte_level(pre_tokenizer, ignore_merges=False, bos=False, normalizer=None):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trained.train_from_iterator([TRAINING], trainers.BpeTrainer(
        vocab_size=288, special_tokens=SPECIAL, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    trained.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    model = json.loads(trained.to_str())
    model["model"]["ignore_merges"] = ignore_merges
    result = Tokenizer.from_str(json.dumps(model))
    result.pre_tokenizer = pre_tokenizer
    if normalizer:
        result.normalizer = normalizer
    if bos:
        result.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|start|> $A", pair="<|start|> $A <|start|>:1 $B:1",
                                          special_tokens=[("<|start|>", 1)])])
    return result


def split(pattern):
    return pre.Sequence([pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentence_piece(gemma=False, strips=False):
    """Merges as the converters of transformers write them: for each piece, best first, all pairs that make it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TRAINING.splitlines(), trainers.BpeTrainer(vocab_size=110, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    letters = [t for t in learned["vocab"] if len(t) == 1]
    pieces = [left + right for left, right in learned["merges"]]
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + list(dict.fromkeys(pieces)) + letters
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for piece in dict.fromkeys(pieces):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted((pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary),
                         key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    result = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Replace(" ", "\u2581")]
    result.normalizer = steps[0] if gemma else normalizers.Sequence([normalizers.Prepend("\u2581")] + steps)
    if gemma:
        result.pre_tokenizer = pre.Split(" ", "merged_with_previous")
        result.add_tokens([AddedToken("\u2581\u2581", normalized=True)])
    # Phi 3: all but three take the white space behind them.
    result.add_special_tokens([
        AddedToken(t, normalized=False, special=True, rstrip=strips and t not in ("<unk>", "<s>", "<|endoftext|>"))
        for t in special + SPECIAL])
    result.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                          special_tokens=[("<s>", 1)])
    return result


TINY = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            rms_norm_eps=1e-5, max_position_embeddings=64, hidden_act="silu", initializer_range=0.02, use_cache=True)
GPT2_LEVEL = pre.ByteLevel(add_prefix_space=False, use_regex=True)
FALCON_LEVEL = pre.Sequence([pre.Punctuation("contiguous"), GPT2_LEVEL, pre.Digits(individual_digits=False),
                             pre.Split(Regex("[0-9][0-9][0-9]"), "isolated")])


def config(architecture, model_type, dtype, **more):
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": dtype, **TINY, **more}


# name: (config.json, tokenizer, more of tokenizer_config.json, more of generation_config.json, shards)
MODELS = {
    "llama3": (
        config("LlamaForCausalLM", "llama", "bfloat16", num_attention_heads=4, num_key_value_heads=2, rope_theta=500000.0,
               attention_bias=False, mlp_bias=False, pretraining_tp=1, tie_word_embeddings=False,
               rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                             "original_max_position_embeddings": 32}, head_dim=4),
        byte_level(split(LLAMA3), ignore_merges=True, bos=True),
        {"bos_token": "<|start|>", "eos_token": "<|endoftext|>", "chat_template": CHAT},
        {"eos_token_id": [0, 2], "bos_token_id": 1}, 2),
    "mistral": (
        config("MistralForCausalLM", "mistral", "float16", head_dim=6, rope_theta=10000.0, sliding_window=None,
               tie_word_embeddings=False),
        sentence_piece(),
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}, "unk_token": "<unk>",
         "add_bos_token": True, "add_eos_token": False,
         "chat_template": [{"name": "default", "template": CHAT}, {"name": "tool_use", "template": "tools" + CHAT}]}, {}, 1),
    "smollm": (
        config("LlamaForCausalLM", "llama", "float32", tie_word_embeddings=True, attention_bias=True, rope_theta=10000,
               rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, head_dim=4),
        byte_level(pre.Sequence([pre.Digits(individual_digits=True), GPT2_LEVEL])),
        {"bos_token": "<|endoftext|>", "eos_token": "<|end|>", "chat_template": CHAT}, {}, 1),
    "qwen2": (
        config("Qwen2ForCausalLM", "qwen2", "bfloat16", num_attention_heads=4, num_key_value_heads=2, vocab_size=304,
               rope_theta=1000000.0, sliding_window=32, use_sliding_window=False, max_window_layers=2,
               tie_word_embeddings=True),
        byte_level(split(QWEN2), normalizer=normalizers.NFC()),
        {"bos_token": None, "add_bos_token": False, "eos_token": "<|end|>", "chat_template": CHAT},
        {"eos_token_id": [2, 0]}, 1),
    "qwen3": (
        config("Qwen3ForCausalLM", "qwen3", "bfloat16", head_dim=6, rope_scaling=None, rope_theta=1000000,
               attention_bias=False, tie_word_embeddings=True, sliding_window=None, use_sliding_window=False),
        byte_level(split(QWEN2), normalizer=normalizers.NFC()),
        {"bos_token": None, "add_bos_token": False, "eos_token": "<|end|>"}, {"eos_token_id": 2}, 1),
    "gemma3": (
        config("Gemma3ForCausalLM", "gemma3_text", "bfloat16", num_hidden_layers=7, head_dim=6, query_pre_attn_scalar=5,
               sliding_window=5, hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=None,
               final_logit_softcapping=None, rms_norm_eps=1e-6,
               layer_types=["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"],
               rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
        sentence_piece(gemma=True),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "chat_template": CHAT},
        {"eos_token_id": [2, 372]}, 1),
    "phi3": (
        config("Phi3ForCausalLM", "phi3", "bfloat16", partial_rotary_factor=0.75, original_max_position_embeddings=6,
               hidden_size=16, sliding_window=2047, rope_theta=10000.0, tie_word_embeddings=False, pad_token_id=0,
               rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.2, 3.0, 9.0]}),
        sentence_piece(strips=True),
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "chat_template": CHAT},
        {"eos_token_id": [369, 371]}, 1),
    "falcon-7b": (
        {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "torch_dtype": "bfloat16", "hidden_size": 8,
         "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": False, "bias": False, "multi_query": True,
         "parallel_attn": True, "new_decoder_architecture": False, "layer_norm_epsilon": 1e-5, "hidden_dropout": 0.0},
        byte_level(FALCON_LEVEL),
        {"eos_token": "<|endoftext|>"}, {"eos_token_id": 0, "bos_token_id": 0}, 1),
    "falcon-40b": (
        {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "torch_dtype": "bfloat16", "hidden_size": 16,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "alibi": False, "bias": False,
         "multi_query": True, "parallel_attn": True, "new_decoder_architecture": True, "layer_norm_epsilon": 1e-5,
         "ffn_hidden_size": 24, "tie_word_embeddings": False},
        byte_level(FALCON_LEVEL),
        {"eos_token": "<|endoftext|>"}, {}, 1),
    "smollm3": (
        config("SmolLM3ForCausalLM", "smollm3", "bfloat16", num_hidden_layers=5, num_attention_heads=2, rope_theta=5000000.0,
               no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0, 1], attention_bias=False, mlp_bias=False,
               tie_word_embeddings=True, use_sliding_window=False, pad_token_id=2),
        byte_level(split(LLAMA3), ignore_merges=True),
        {"bos_token": None, "eos_token": "<|end|>"}, {}, 1),
}
JINJA_FILES = {"qwen3", "smollm3"}  # their template is a file of its own


def random_weights(model, seed):
    """As the stored type holds them, and large enough that attention is neither flat nor a single token."""
    generator = np.random.default_rng(seed)
    stored = {}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = generator.standard_normal(tuple(parameter.shape))
            if "norm" in name or "ln_" in name:
                one = 0.0 if "Gemma" in type(model).__name__ else 1.0
                values = 0.2 * values + (one if name.endswith("weight") else 0.0)
            elif parameter.dim() == 2 and "embed" not in name:
                values *= 1.5 / math.sqrt(parameter.shape[1])
            else:
                values *= 0.5
            dtype = getattr(torch, model.stored_dtype)
            stored[name] = torch.from_numpy(values).to(dtype)
            parameter.copy_(stored[name].double())
    return stored


def write_weights(folder, stored, shards):
    names = sorted(stored)
    if shards == 1:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return
    half = len(names) // 2
    weight_map = {}
    for index, part in enumerate([names[:half], names[half:]]):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(stored[name].nbytes for name in names)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def make(folder, name, seed):
    hf_config, tokenizer, tokenizer_config, generation, shards = MODELS[name]
    folder.mkdir(parents=True)
    n_tokens = tokenizer.get_vocab_size()
    hf_config = {**hf_config, "vocab_size": hf_config.get("vocab_size", n_tokens)}
    hf_config.setdefault("eos_token_id", 0)
    write_json(folder / "config.json", hf_config)
    if name in JINJA_FILES:
        (folder / "chat_template.jinja").write_text(CHAT)
    write_json(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config})
    write_json(folder / "generation_config.json", {**generation, "transformers_version": "4.50.0"})
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), attn_implementation="eager").double().eval()
    model.stored_dtype = hf_config["torch_dtype"]
    write_weights(folder, random_weights(model, seed), shards)
    # What is on disk, not what is in memory, is what the expected logits are of.
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    model.eval()
    tokens = [int(x) for x in np.random.default_rng(seed + 100).integers(3, n_tokens, N_TOKENS)]
    expected = {"tokens": torch.tensor(tokens), "logits": logits(model, tokens).float()}
    if name == "phi3":
        expected["short_logits"] = logits(model, tokens[:6]).float()
    save_file(expected, folder / "expected.safetensors")
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=True)]
    write_json(folder / "expected.json", {"made_by": "tools/golden/make_huggingface_models.py", "texts": TEXTS, "ids": ids})
    print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir())} bytes, {n_tokens} tokens, "
          f"logits in [{expected['logits'].min():.2f}, {expected['logits'].max():.2f}]")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_default_dtype(torch.float64)
    out = Path(sys.argv[1])
    for seed, name in enumerate(MODELS):
        shutil.rmtree(out / name, ignore_errors=True)
        make(out / name, name, seed)


if __name__ == "__main__":
    main()
