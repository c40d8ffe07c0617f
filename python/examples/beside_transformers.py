"""beside_transformers.py MODEL.gguf TEXT SPEC... --folder DIR: the same weights in transformers and in the engine.

    python beside_transformers.py SmolLM2-135M-Instruct.gguf docs/sample.txt full "h2o(10%)" "full+kivi(4)" --folder /tmp/smollm2

transformers reads the GGUF and saves a Hugging Face directory in float32; `lesskv convert` makes a file of it. Compared are the
logits of that file and of transformers' own attention, and for each spec greedy text behind parts of TEXT: what transformers
writes through lesskv's cache, and the engine. Needs accelerate and gguf; --sidecar is for specs with less, kvzap or split.
"""
import argparse
import ctypes
import pathlib
import resource
import subprocess

import numpy as np
import torch
import transformers

import lesskv
from lesskv.transformers import Cache, detach

TRAINED = ("less", "kvzap", "split")  # terms that read a sidecar; a cache alone has no model beside which to find one


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def allocated():
    """Bytes in use, but for a constant: what is mapped (large buffers of a cache come past malloc), less what malloc has free."""
    mallinfo = ctypes.CDLL(None).mallinfo2  # glibc
    mallinfo.restype = Mallinfo
    mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return mapped - mallinfo().fordblks


def both(gguf, folder, program, threads):
    """A file's weights in transformers and in the engine, float32. What lies in the folder is used again."""
    gguf, saved, file = pathlib.Path(gguf).resolve(), pathlib.Path(folder) / "checkpoint", pathlib.Path(folder) / "converted.gguf"
    if not file.exists():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        loaded.hf_quantizer.remove_quantization_config(loaded)  # its weights are plain floats: without this it refuses to save
        loaded.save_pretrained(saved)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(saved)
        subprocess.run([program, "convert", saved, file, "--type", "F32"], check=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()  # no token ends a text
    torch.set_num_threads(threads)
    return model, lesskv.Model(file, threads=threads, compute="f32")


def logits_of_both(model, engine, ids):
    """At every position: transformers' own attention, and the engine token by token."""
    sequence = engine.sequence(kv="full+f32", ctx=len(ids))
    ours = [sequence.prefill(ids[:1])] + [sequence.decode(token) for token in ids[1:]]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy(), np.array(ours)


def engine_writes(engine, ids, spec, n):
    sequence = engine.sequence(kv=spec, ctx=len(ids) + n)
    logits = [sequence.prefill(ids)]
    while len(logits) < n:
        logits.append(sequence.decode(int(logits[-1].argmax())))
    return np.array(logits), sequence.stats


def transformers_writes(model, ids, spec, n, threads):
    """Logits, what the cache says of itself, and the bytes that are free again without it."""
    cache, prompt = Cache(model, kv=spec, ctx=len(ids) + n, threads=threads), torch.tensor([ids])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), cache=cache, max_new_tokens=n, do_sample=False,
                          return_dict_in_generate=True, output_logits=True)
    logits, stats, before = torch.cat(made.logits).numpy(), cache.stats[0], allocated()
    cache.reset()
    return logits, stats, before - allocated()


def compare(ours, expected):
    """Tokens that are equal from the start, and the largest difference of logits up to where texts part, of the largest."""
    differ = np.flatnonzero(ours.argmax(-1) != expected.argmax(-1))
    same = int(differ[0]) if differ.size else len(expected)
    return same, float(np.abs(ours - expected)[:same + 1].max() / np.abs(expected).max())


def row_of(model, engine, prompts, spec, n, threads, sidecar=None):
    """Of one spec over all prompts; bytes are those of the last."""
    named = "+".join(f'{t}(file="{sidecar}")' if sidecar and t in TRAINED else t for t in spec.split("+"))
    same, error = 0, 0.0
    for ids in prompts:
        expected, engine_stats = engine_writes(engine, ids, named, n)
        ours, stats, freed = transformers_writes(model, ids, named, n, threads)
        equal, difference = compare(ours, expected)
        same, error = same + equal, max(error, difference)
    plan = engine.plan(kv=named, prompt=len(ids), decode=n - 1, ctx=len(ids) + n)
    return dict(spec=spec, same=same, of=n * len(prompts), error=error, rows=stats.tokens_resident, kv_bytes=stats.kv_bytes,
                freed=freed, engine_rows=engine_stats.tokens_resident, engine_bytes=engine_stats.kv_bytes, plan_bytes=plan.bytes_end)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--folder", required=True, help="for the checkpoint and the converted file")
    parser.add_argument("--lesskv", default="lesskv", help="the program, to convert with")
    parser.add_argument("--sidecar")
    for name, default in (("--tokens", 64), ("--prompts", 5), ("--prompt-tokens", 200), ("--threads", 2)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    model, engine = both(args.model, args.folder, args.lesskv, args.threads)
    ids = engine.tokenize(pathlib.Path(args.text).read_text())
    own, ours = logits_of_both(model, engine, ids[:512])
    print(f"{len(own)} tokens, transformers' own attention: same first choice at {(own.argmax(-1) == ours.argmax(-1)).sum()}, "
          f"logits differ by at most {np.abs(own - ours).max():.1e}, {np.abs(own - ours).max() / np.abs(own).max():.1e} of the largest")
    print("| cache | same tokens | logits differ by | rows | MiB | freed with it | of plan | of engine |\n|---|" + "---:|" * 7)
    size = args.prompt_tokens
    prompts = [ids[i * size:(i + 1) * size] for i in range(args.prompts)]
    for spec in args.specs:
        r = row_of(model, engine, prompts, spec, args.tokens, args.threads, args.sidecar)
        print(f"| `{spec}` | {r['same']} of {r['of']} | {r['error']:.1e} | {r['rows']:.0f} | {r['kv_bytes'] / 2**20:.2f} | {r['freed'] / 2**20:.2f} "
              f"| {r['kv_bytes'] / r['plan_bytes']:.3f} | {r['kv_bytes'] / r['engine_bytes']:.3f} |", flush=True)
    detach(model)


if __name__ == "__main__":
    main()
