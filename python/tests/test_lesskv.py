"""The package on the bundled model."""
import ctypes as c
import gc
import inspect
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import lesskv
from lesskv import _c

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL, TEXT = ROOT / "models/lesskv-small.gguf", ROOT / "docs/sample.txt"


@pytest.fixture(scope="module")
def model():
    return lesskv.Model(MODEL, threads=2)


def attention(q, k, v):
    """Causal attention by the book, [n, heads, dim] in float64."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.empty(q.shape)
    for h in range(heads):
        scores = q[:, h].astype(float) @ k[:, h // group].astype(float).T / np.sqrt(dim)
        scores[np.triu_indices(n, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, h // group]
    return out


def test_text_and_back(model):
    ids = model.tokenize("The sea was calm.")
    assert ids[0] == model.bos and model.detokenize(ids) == "The sea was calm."
    assert not model.ends_generation(ids[-1]) and model.ends_generation(model.eos)
    with pytest.raises(lesskv.Error, match="-1"):
        model.detokenize([-1])


def test_generation_is_the_program_s(model):
    sequence = model.sequence(kv="h2o(5%)", ctx=512)
    pieces = list(sequence.generate(TEXT.read_text()[:1200], max_tokens=12, temperature=0))
    program = os.environ.get("LESSKV_PROGRAM")
    if program:
        said = subprocess.run([program, "run", "-m", MODEL, "-f", "-", "-c", "512", "-n", "12", "--temp", "0", "--kv", "h2o(5%)",
                               "-t", "2", "--json"], input=TEXT.read_text()[:1200], capture_output=True, text=True, check=True)
        assert json.loads(said.stdout)["text"] == "".join(pieces)
    assert sequence.result.finish == "length" and sequence.result.generated_tokens == 12
    assert sequence.result.text == "".join(pieces) and len(pieces) > 3
    stats = sequence.stats
    assert stats.tokens_resident < 0.2 * stats.tokens_seen and stats.kv_bytes < stats.kv_bytes_full


def test_penalties_are_the_program_s(model):
    plain, weakened = ("".join(model.sequence(ctx=512).generate("The sea was", max_tokens=40, temperature=0, **penalties))
                       for penalties in ({}, {"frequency_penalty": 0.5, "presence_penalty": 1}))
    assert plain != weakened
    program = os.environ.get("LESSKV_PROGRAM")
    if program:
        said = subprocess.run([program, "run", "-m", MODEL, "-p", "The sea was", "-c", "512", "-n", "40", "--temp", "0", "-t", "2",
                               "--frequency-penalty", "0.5", "--presence-penalty", "1", "--json"],
                              capture_output=True, text=True, check=True)
        assert json.loads(said.stdout)["text"] == weakened


def test_biases_forbid_and_force(model):
    token = model.tokenize(" sea", add_special=False)[-1]
    forced = model.sequence()
    list(forced.generate("The", max_tokens=3, temperature=0, logit_bias={token: 100}))
    assert forced.tokens[-2:] == [token, token]
    plain = model.sequence()
    list(plain.generate("The sea was", max_tokens=8, temperature=0))
    first = plain.tokens[len(model.tokenize("The sea was"))]
    other = model.sequence()
    list(other.generate("The sea was", max_tokens=8, temperature=0, logit_bias={first: float("-inf")}, ignore_eos=True))
    assert first not in other.tokens[len(model.tokenize("The sea was")):]
    with pytest.raises(lesskv.Error, match="--logit-bias"):
        list(model.sequence().generate("x", logit_bias={10**6: 1}))
    with pytest.raises(lesskv.Error, match="logit_bias"):
        list(model.sequence().generate("x", logit_bias={2**40: 1}))


def test_turns_go_on_where_the_last_ended():
    model = lesskv.Model(MODEL, threads=2, compute="f32")  # one token and many are rounded alike
    whole = model.sequence()
    a = "".join(whole.generate("The sea was", max_tokens=8, temperature=0))
    b = "".join(whole.generate(" and then", max_tokens=8, temperature=0))
    other = model.sequence()
    prompt = model.tokenize("The sea was") + [t for t in whole.tokens[len(model.tokenize("The sea was")):]]
    logits = other.prefill(prompt)
    again = model.sequence()
    again.prefill(prompt[:-1])
    assert np.allclose(again.decode(prompt[-1]), logits, atol=1e-3) and a and b
    assert whole.tokens[: len(model.tokenize("The sea was"))] == model.tokenize("The sea was")


def test_an_iterator_that_is_closed_ends_the_generation(model):
    sequence = model.sequence(kv="window(64)", ctx=10**6)  # room for more than is generated until the iterator is closed
    stream = sequence.generate("The sea was", temperature=0, ignore_eos=True)
    next(stream)
    stream.close()
    assert sequence.result.finish == "interrupted"


def test_stop_texts_and_refusals(model):
    text = "".join(model.sequence().generate("The sea was", max_tokens=16, temperature=0))
    sequence = model.sequence()
    shown = "".join(sequence.generate("The sea was", max_tokens=16, temperature=0, stop=[text[8:12]]))
    assert sequence.result.finish == "stop" and text.startswith(shown) and len(shown) <= 8
    with pytest.raises(lesskv.Error, match="no_such"):
        model.sequence(kv="no_such(3)")
    with pytest.raises(lesskv.Error, match="--temp"):
        list(model.sequence().generate("x", temperature=-1))
    with pytest.raises(lesskv.Error, match="--frequency-penalty"):
        list(model.sequence().generate("x", frequency_penalty=2.5))
    with pytest.raises(lesskv.Error) as failure:
        lesskv.Model("/no/such/model.gguf")
    assert failure.value.status == "not found"


def test_defaults_are_the_library_s():
    """Also that the structures have the library's fields where it has them: a shifted one would be another number."""
    def expect(name, function, other={}):
        given = {k: v.default for k, v in inspect.signature(function).parameters.items() if v.default is not inspect.Parameter.empty}
        for field, value in {**given, **other}.items():
            if hasattr(library := _c.defaults(name), field):
                found = getattr(library, field)
                same = not found if value is None else found == (pytest.approx(value) if isinstance(value, float) else value)
                assert same, f"{name}.{field}: {found} in the library, {value} here"

    expect("generate_params", lesskv.Sequence.generate, {"max_tokens": 2**64 - 1, "n_stops": 0})
    expect("cache_shape", lesskv.Cache.__init__, {"head_dim": 64, "rope_dims": 64, "ctx": 2048, "rope_halves": False,
                                                  "rope_factors": None, "windows": None, "n_layers": 1})
    expect("eval_params", lesskv.Model.evaluate_rows, {"max_windows": 0})
    expect("selector", lesskv.register_selector, {"last_queries": 2**64 - 1, "summary": None})
    assert all(_c.defaults(name).size == c.sizeof(kind) for name, kind in _c.OPTIONS.items())


def test_sequences_clone_save_and_load(model, tmp_path):
    sequence = model.sequence(kv="window(16)", ctx=128)
    sequence.prefill(model.tokenize("The sea was calm, and the boats lay still."))
    clone = sequence.clone()
    sequence.save(tmp_path / "s.bin")
    loaded = model.load(tmp_path / "s.bin", kv="window(16)", ctx=128)
    assert loaded.tokens == sequence.tokens
    a, b = lesskv.model.decode([clone, loaded], [7, 7])
    assert np.array_equal(a, b) and np.array_equal(a, sequence.decode(7))
    with pytest.raises(lesskv.Error, match="spec"):
        model.load(tmp_path / "s.bin", kv="full", ctx=128)


def test_a_plan_is_what_a_sequence_takes(model):
    plan = model.plan("h2o(32)+q8", prompt=100, decode=5, ctx=256)
    sequence = model.sequence(kv="h2o(32)+q8", ctx=256)
    sequence.prefill(np.full(100, 5))
    for _ in range(5):
        sequence.decode(5)
    assert plan.bytes_end == sequence.stats.kv_bytes and plan.bytes_full == sequence.stats.kv_bytes_full


def test_evaluation(model):
    rows = model.evaluate_rows([TEXT], kv=["full", "window(16)"], ctx=128, windows=2, divergence=True)
    assert rows[0]["kl_mean"] == 0 < rows[1]["kl_mean"] and rows[1]["kv_bytes"] < rows[0]["kv_bytes"]
    pandas = pytest.importorskip("pandas")
    frame = model.evaluate([TEXT], kv=["full"], ctx=128, windows=1)
    assert isinstance(frame, pandas.DataFrame) and frame.perplexity[0] > 1


def make_cache(kv, **more):
    return lesskv.Cache(layers=2, heads=4, kv_heads=2, head_dim=32, ctx=256, kv=kv, rope_dims=0, threads=2, **more)


def test_the_cache_alone_attends_by_the_book():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((50, heads, 32), dtype=np.float32) for heads in (4, 2, 2))
    cache = make_cache("full")
    with cache.step(50, "prompt"):
        for layer in range(2):
            assert np.allclose(cache(layer, q, k, v), attention(q, k, v), atol=2e-3)  # rows are f16
    cache.end_prompt()
    small = make_cache("window(8)")
    for i in range(50):
        with small.step(1):
            outs = [small(layer, q[i:i + 1], k[i:i + 1], v[i:i + 1]) for layer in range(2)]
    assert list(small.positions(0, 1)) == [0, 1, 2, 3, 46, 47, 48, 49]
    kept = list(small.positions(1, 0))
    assert outs[1].shape == (1, 4, 32) and small.stats.tokens_resident == 8 and len(kept) == 8
    other = make_cache("window(8)")
    other.load(small.save())
    for c in (small, small.clone(), other):
        with c.step(1):
            for layer in range(2):
                c(layer, q[:1], k[:1], v[:1])
        assert c.stats.tokens_seen == 51


def test_wrong_shapes_and_orders_are_sentences():
    cache = make_cache("full")
    x = np.zeros((2, 2, 32), np.float32)
    with pytest.raises(lesskv.Error, match="no step"):
        cache._n = 2
        cache(0, np.zeros((2, 4, 32)), x, x)
    cache.step(2)
    with pytest.raises(lesskv.Error, match=r"keys: expected shape \(2, 2, 32\)"):
        cache(0, np.zeros((2, 4, 32)), x[:1], x)
    with pytest.raises(lesskv.Error, match="kind"):
        cache.step(1, "sideways")


def test_torch_tensors_are_taken_without_a_copy():
    torch = pytest.importorskip("torch")
    from lesskv.cache import rows

    tensor = torch.zeros(3, 2, 32)
    assert rows("keys", tensor, (3, 2, 32)).ctypes.data == tensor.data_ptr()


def test_calls_release_the_gil(model):
    """Another thread goes on while a prompt is read: on a busy machine, during one of several that are."""
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    during = []
    while len(during) < 100 and max(during, default=0) < 5:
        sequence = model.sequence(ctx=2048)
        before = counted[0]
        sequence.prefill(np.full(1500, 5))
        during.append(counted[0] - before)
    done.set()
    thread.join()
    assert max(during) >= 5


def test_handles_go_with_their_objects():
    for _ in range(3):
        model = lesskv.Model(MODEL, threads=1)
        sequence = model.sequence()
        del model
        gc.collect()
        sequence.prefill([1, 2, 3])


def test_numbers_and_texts_that_c_would_cut_are_refused(model):
    """ctypes takes 2**32 + 5 for 5, -1 for the largest number, and a text up to its first zero byte."""
    sequence = model.sequence(ctx=64)
    sequence.prefill([1, 2])
    mistakes = {
        "token: expected": lambda: sequence.decode(2**32 + 5),
        "tokens: expected": lambda: sequence.prefill(np.array([2**32 + 5])),
        "found float64": lambda: sequence.prefill([1.7, 2.2]),
        r"of shape \(2, 2\)": lambda: sequence.prefill([[1, 2], [3, 4]]),
        "n_threads: expected": lambda: lesskv.Model(MODEL, threads=2**32),
        "max_tokens: expected": lambda: sequence.generate("x", max_tokens=-1),
        "max_windows: expected 0 to": lambda: model.evaluate_rows([TEXT], windows=-1),
        "protect: expected": lambda: model.sequence(protect=[(0, 2**32 + 4)]),
        "windows: expected": lambda: make_cache("full", windows=[0, -1]),
        "epochs: expected": lambda: model.train_less("s.gguf", [TEXT], epochs=-1),
        "zero byte": lambda: model.sequence(kv="window(16)\0 and more"),
        "texts: expected a list": lambda: model.evaluate_rows(str(TEXT)),
        "kv: expected a list": lambda: lesskv.sweep_rows([MODEL], [TEXT], "full"),
    }
    for sentence, mistake in mistakes.items():
        with pytest.raises(lesskv.Error, match=sentence) as failure:
            mistake()
        assert failure.value.status == "invalid argument"
    assert sequence.tokens == [1, 2]
    sequence.decode(np.int64(3))
    with pytest.raises(lesskv.Error, match="no step is in progress"):
        make_cache("full")(0, np.zeros((0, 4, 32)), np.zeros((0, 2, 32)), np.zeros((0, 2, 32)))


def test_a_program_may_end_in_the_middle_of_a_generation():
    """The library calls back from a thread, which must not find the interpreter gone."""
    program = f"""if True:
        import lesskv
        stream = lesskv.Model({str(MODEL)!r}, threads=1).sequence(ctx=2048).generate("The sea was", temperature=0)
        next(stream)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_sequence_is_its_generation_s_until_that_has_ended(model):
    sequence = model.sequence(ctx=512)
    stream = sequence.generate("The sea was", max_tokens=200, temperature=0)
    shown = next(stream)
    for use in (lambda: sequence.stats, lambda: sequence.tokens, lambda: sequence.prefill([1]), lambda: sequence.decode(1),
                lambda: sequence.clone(), lambda: sequence.save("s.bin"), lambda: next(sequence.generate("and", max_tokens=1)),
                lambda: lesskv.model.decode([sequence], [1])):
        with pytest.raises(lesskv.Error, match="generation of this sequence is in progress"):
            use()
    stream.close()
    # What was generated before the iterator was closed is told, shown or not: the sequence has seen it.
    seen = sequence.tokens[len(model.tokenize("The sea was")):]
    assert sequence.result.text.startswith(shown) and sequence.result.generated_tokens == len(seen) + 1
    assert sequence.result.text.startswith(model.detokenize(seen).lstrip()) or model.detokenize(seen) in sequence.result.text


def test_the_last_token_generated_is_lost_nowhere(model, tmp_path):
    """It is not yet seen when a generation ends; whatever the sequence does next begins with it."""
    def fresh():
        sequence = model.sequence(ctx=256)
        list(sequence.generate("The sea was", max_tokens=6, temperature=0))
        return sequence, list(sequence._pending), sequence.tokens

    sequence, pending, seen = fresh()
    assert len(pending) == 1
    with pytest.raises(lesskv.Error):
        list(sequence.generate("x", temperature=-1))  # refused: nothing has changed
    sequence.prefill([7, 8])
    assert sequence.tokens == seen + pending + [7, 8]
    sequence, pending, seen = fresh()
    sequence.decode(7)
    assert sequence.tokens == seen + pending + [7]
    sequence, pending, seen = fresh()
    first, second = (sequence.generate(text, max_tokens=2, temperature=0) for text in (" and", " but"))
    list(first)
    between = sequence._pending
    list(second)
    assert sequence.tokens[: len(seen) + 1] == seen + pending and between[0] in sequence.tokens
    assert sequence.tokens.count(model.bos) == 1
    sequence, pending, seen = fresh()
    sequence.save(tmp_path / "s.bin")
    assert model.load(tmp_path / "s.bin", ctx=256).tokens == seen + pending


def test_sessions_of_the_program_are_continued_whole(model, tmp_path):
    program = os.environ.get("LESSKV_PROGRAM") or pytest.skip("LESSKV_PROGRAM names no lesskv")
    run = [program, "run", "-m", MODEL, "-c", "256", "--temp", "0", "-t", "2", "--session", tmp_path / "s.bin", "--json"]
    said = subprocess.run([*run, "-p", "The sea was", "-n", "6"], capture_output=True, text=True, check=True)
    loaded = model.load(tmp_path / "s.bin", ctx=256)
    assert model.detokenize(loaded.tokens) == "The sea was" + json.loads(said.stdout)["text"]
