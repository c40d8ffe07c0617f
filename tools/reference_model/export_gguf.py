#!/usr/bin/env python3
"""Writes a checkpoint as GGUF, the way llama.cpp writes the `llama` architecture: norms in f32, matrices in f32 or Q8_0.

  export_gguf.py --checkpoint RUN/final.pt --tokenizer DATA/tokenizer.json --type q8_0 --name lesskv-small --out MODEL.gguf

The output matrix is tied, so there is no output.weight.  read_gguf() is the way back, for evaluation of the very file.
"""
import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch

from model import Config, Model, load_model

TYPES = {"f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
         "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}


def write_tokenizer(writer: gguf.GGUFWriter, path: Path, vocab: int) -> None:
  spec = json.loads(path.read_text())
  tokens = [None] * vocab
  for token, i in spec["model"]["vocab"].items():
    tokens[i] = token
  assert None not in tokens, f"{path}: expected ids 0..{vocab - 1}, found holes"
  special = {t["id"] for t in spec["added_tokens"]}
  merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(tokens)
  writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(vocab)])
  writer.add_token_merges(merges)
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(0)
  writer.add_add_bos_token(True)
  writer.add_add_eos_token(False)


def write_gguf(model: Model, tokenizer: Path, out: Path, type_name: str, name: str) -> None:
  cfg = model.cfg
  quant, file_type = TYPES[type_name]
  writer = gguf.GGUFWriter(str(out), "llama")
  writer.add_type(gguf.GGUFType.MODEL)
  writer.add_name(name)
  writer.add_license("mit")
  writer.add_file_type(file_type)
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  writer.add_context_length(cfg.context)
  writer.add_embedding_length(cfg.dim)
  writer.add_block_count(cfg.n_layers)
  writer.add_feed_forward_length(cfg.ffn)
  writer.add_head_count(cfg.n_heads)
  writer.add_head_count_kv(cfg.n_kv_heads)
  writer.add_layer_norm_rms_eps(cfg.norm_eps)
  writer.add_rope_dimension_count(cfg.head_dim)
  writer.add_rope_freq_base(cfg.rope_theta)
  writer.add_vocab_size(cfg.vocab)
  write_tokenizer(writer, tokenizer, cfg.vocab)
  for key, value in model.state_dict().items():
    data = value.detach().float().cpu().numpy()
    if data.ndim == 2 and quant != gguf.GGMLQuantizationType.F32:
      writer.add_tensor(key, gguf.quants.quantize(data, quant), raw_dtype=quant)
    else:
      writer.add_tensor(key, data)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def read_gguf(path) -> Model:
  """The model of a GGUF file written above, its weights dequantised to f32."""
  reader = gguf.GGUFReader(str(path))
  get = lambda key: reader.fields[key].contents()
  dim, heads = get("llama.embedding_length"), get("llama.attention.head_count")
  model = Model(Config(vocab=get("llama.vocab_size"), dim=dim, n_layers=get("llama.block_count"), n_heads=heads,
                       n_kv_heads=get("llama.attention.head_count_kv"), head_dim=get("llama.rope.dimension_count"),
                       ffn=get("llama.feed_forward_length"), context=get("llama.context_length"),
                       rope_theta=get("llama.rope.freq_base"), norm_eps=get("llama.attention.layer_norm_rms_epsilon")))
  state = {t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
           for t in reader.tensors}
  model.load_state_dict(state)
  return model


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--checkpoint", type=Path, required=True)
  p.add_argument("--tokenizer", type=Path, required=True)
  p.add_argument("--type", choices=TYPES, default="q8_0")
  p.add_argument("--name", default="lesskv-small")
  p.add_argument("--out", type=Path, required=True)
  args = p.parse_args()
  write_gguf(load_model(args.checkpoint), args.tokenizer, args.out, args.type, args.name)
  print(args.out, args.out.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
