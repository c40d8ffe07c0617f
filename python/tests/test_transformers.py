"""Hugging Face models through lesskv's cache give what the engine gives for the same weights and spec."""
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

import lesskv

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")
program = os.environ.get("LESSKV_PROGRAM") or pytest.skip("LESSKV_PROGRAM names no lesskv to convert with", allow_module_level=True)

from lesskv.transformers import Cache, attach, detach  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/data/huggingface"
ERROR = 2e-5  # of the largest logit: float32 sums in another order, and rotations of float32 angles against exact ones
CTX, PROMPT, STEPS = 256, 150, 24


def made(kind, folder):
    """A random model of 3 layers, in the directory format of Hugging Face, with a fixture's tokenizer."""
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=16, vocab_size=290, max_position_embeddings=CTX, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    if kind == "qwen2":
        shape.pop("head_dim")
        shape.update(hidden_size=64, vocab_size=304)
    torch.manual_seed(5)
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](**shape, initializer_range=0.25)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / {"llama": "llama3", "qwen2": "qwen2"}[kind] / file, folder)
    return folder


def both(folder, tmp_path):
    """The model in transformers and in the engine, float32."""
    out = tmp_path / f"{pathlib.Path(folder).name}.gguf"
    subprocess.run([program, "convert", folder, out, "--type", "F32"], check=True, capture_output=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval(), lesskv.Model(out, threads=2, compute="f32")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp(request.param)
    return both(made(request.param, tmp_path / request.param), tmp_path)


def ids_of(model, n, seed=1):
    return np.random.default_rng(seed).integers(5, model.config.vocab_size - 20, n)


def engine_greedy(engine, ids, spec, ctx, steps):
    sequence = engine.sequence(kv=spec, ctx=ctx)
    logits = [sequence.prefill(ids)]
    for _ in range(steps - 1):
        logits.append(sequence.decode(int(logits[-1].argmax())))
    return np.array(logits), sequence


def generate(model, ids, cache, steps, **options):
    return model.generate(torch.tensor(np.atleast_2d(ids)), cache=cache, max_new_tokens=steps, do_sample=False,
                          return_dict_in_generate=True, output_logits=True, **options)


def close(logits, expected):
    return np.abs(logits - expected).max() < ERROR * np.abs(expected).max()


@pytest.mark.parametrize("spec", ["full+f32", "h2o(20)+f32", "snapkv(24)+ada+f32", "window(16, positions=cache)+f32"])
def test_the_engine_s_tokens_and_logits(pair, spec):
    model, engine = pair
    ids = ids_of(model, PROMPT)
    expected, sequence = engine_greedy(engine, ids, spec, CTX, STEPS)
    cache = Cache(model, kv=spec, ctx=CTX, threads=2)
    made = generate(model, ids, cache, STEPS)
    assert close(torch.cat(made.logits).numpy(), expected)
    assert made.sequences[0, PROMPT:].tolist() == expected.argmax(-1).tolist()
    ours, theirs = cache.stats[0], sequence.stats
    assert (ours.kv_bytes, ours.tokens_resident) == (theirs.kv_bytes, theirs.tokens_resident)


@pytest.mark.parametrize("name", ["llama3", "smollm", "mistral", "qwen2", "qwen3", "gemma3"])
def test_rotations_windows_and_scales(name, tmp_path):
    """Rope of llama 3, YaRN, stretched linearly, of local layers; biases; norms of queries and keys; a scale of its own."""
    model, engine = both(FIXTURES / name, tmp_path)
    ids = ids_of(model, 40)
    for spec in ("full+f32", "h2o(12)+f32"):
        expected, _ = engine_greedy(engine, ids, spec, 64, 20)
        cache = Cache(model, kv=spec, threads=1)
        assert close(torch.cat(generate(model, ids, cache, 20).logits).numpy(), expected), spec


def test_memory_is_freed_and_nothing_else_holds_rows(pair):
    model, _ = pair
    full, small = (Cache(model, kv=kv, ctx=CTX, threads=1) for kv in ("full", "h2o(20)"))
    for cache in (full, small):
        generate(model, ids_of(model, 200), cache, 20)
        assert all(layer.keys is None and layer.values is None for layer in cache.layers)
    assert small.stats[0].tokens_resident == 20 and small.stats[0].kv_bytes < 0.3 * full.stats[0].kv_bytes


def test_texts_of_a_padded_batch_are_what_each_is_alone(pair):
    model, _ = pair
    texts = [ids_of(model, n, seed=n) for n in (60, 35, 1)]
    batch, mask = np.full((3, 60), 7), np.zeros((3, 60), int)
    for row, text in enumerate(texts):
        batch[row, 60 - len(text):], mask[row, 60 - len(text):] = text, 1
    cache = Cache(model, kv="h2o(20)+f32", ctx=CTX, threads=1)
    made = generate(model, batch, cache, 8, attention_mask=torch.tensor(mask))
    for row, text in enumerate(texts):
        alone = Cache(model, kv="h2o(20)+f32", ctx=CTX, threads=1)
        expected = generate(model, text, alone, 8)
        assert close(np.stack([x[row].numpy() for x in made.logits]), torch.cat(expected.logits).numpy())
        assert cache.stats[row] == alone.stats[0]


def test_parts_that_stream_in_are_the_engine_s_chunks(pair):
    model, engine = pair
    spec, ids = "h2o(20)+f32+prefill(chunk=32)", ids_of(model, PROMPT)
    expected, _ = engine_greedy(engine, ids, spec, CTX, 8)
    cache = Cache(model, kv=spec, ctx=CTX, threads=1, stream=True)
    made = generate(model, ids, cache, 8, prefill_chunk_size=32)
    assert close(torch.cat(made.logits).numpy(), expected)
    with pytest.raises(lesskv.Error, match="stream steps of at most 32 tokens, found a prompt step of 150"):
        generate(model, ids, Cache(model, kv=spec, ctx=CTX, threads=1), 8)


def test_turns_and_beams(pair):
    model, engine = pair
    ids, more = ids_of(model, 60), ids_of(model, 20, seed=2)
    sequence = engine.sequence(kv="h2o(20)+f32", ctx=CTX)
    sequence.prefill(ids)
    expected = sequence.prefill(more)
    cache = Cache(model, kv="h2o(20)+f32", ctx=CTX, threads=1)
    with torch.no_grad():
        model(torch.tensor(ids[None]), cache=cache)
        again = model(torch.tensor(more[None]), cache=cache).logits[0, -1].numpy()
    assert close(again, expected)
    beams = generate(model, ids, Cache(model, kv="full+f32", ctx=CTX, threads=1), 8, num_beams=3).sequences
    detach(model)
    own = model.generate(torch.tensor(ids[None]), max_new_tokens=8, do_sample=False, num_beams=3)
    assert beams.tolist() == own.tolist()


def test_refusals_are_sentences(pair):
    model, _ = pair
    cache = Cache(model, kv="h2o(20)", ctx=64, threads=1)
    ids = torch.tensor(ids_of(model, 60)[None])
    with pytest.raises(lesskv.Error, match="attends through lesskv"):
        model(ids)
    model.generate(ids, cache=cache, max_new_tokens=4)
    with pytest.raises(lesskv.Error, match="of 64 tokens are seen"):
        model(ids[:, :10], cache=cache)
    with pytest.raises(lesskv.Error, match="1 texts, the step has 2"):
        model(ids[:, :1].repeat(2, 1), cache=cache)
    with pytest.raises(lesskv.Error, match="positions"):
        model(ids[:, :1], cache=cache, position_ids=torch.tensor([[3]]))
    with pytest.raises(lesskv.Error, match="assisted"):
        cache.crop(-1)
    with pytest.raises(lesskv.Error, match="no_such"):
        Cache(model, kv="no_such(3)")
    detach(model)
    assert torch.isfinite(model(ids).logits).all()
    gpt2 = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=300, bos_token_id=0, eos_token_id=1))
    with pytest.raises(lesskv.Error, match="found gpt2"):
        Cache(gpt2)


def test_a_model_that_attends_by_itself_is_no_model_for_the_cache(pair):
    """Its layers would hand keys over that nobody keeps, and answers would be wrong without a word."""
    model, _ = pair
    cache, ids = Cache(model, kv="full", ctx=64, threads=1), torch.tensor(ids_of(model, 20)[None])
    with torch.no_grad():
        model(ids, cache=cache)
        detach(model)
        with pytest.raises(lesskv.Error, match="attends by itself"):
            model(ids[:, :1], cache=cache)
        attach(model)
        model(ids[:, :1], cache=cache)
    assert cache.stats[0].tokens_seen == 21


def test_masks_training_and_attention_to_later_tokens_are_refused(pair):
    model, _ = pair
    ids = torch.tensor(ids_of(model, 20)[None])
    with torch.no_grad(), pytest.raises(lesskv.Error, match=r"attention_mask: expected .* found shape \(1, 1, 20, 20\)"):
        model(ids, cache=Cache(model, ctx=64, threads=1), attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool).tril())
    model.train()
    with pytest.raises(lesskv.Error, match="gradients"):
        model(ids, cache=Cache(model, ctx=64, threads=1))
    model.eval()
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=1, num_key_value_heads=1,
                 head_dim=16, vocab_size=300, sliding_window=8)
    for more, sentence in (({"use_bidirectional_attention": True}, "bidirectional"), ({"num_hidden_layers": 3}, "global layers")):
        gemma = transformers.AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**{**shape, **more}))
        with pytest.raises(lesskv.Error, match=sentence):
            Cache(gemma, ctx=64)
