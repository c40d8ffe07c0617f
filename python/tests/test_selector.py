"""Selectors in Python: what they are told, what they decide, and what becomes of their mistakes."""
import pathlib

import numpy as np
import pytest

import lesskv

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL, TEXT = ROOT / "models/lesskv-small.gguf", ROOT / "docs/sample.txt"


@pytest.fixture(scope="module")
def model():
    return lesskv.Model(MODEL, threads=2)


def make_cache(kv, threads=2):
    return lesskv.Cache(layers=2, heads=4, kv_heads=2, head_dim=32, ctx=128, kv=kv, rope_dims=0, threads=threads)


def feed(cache, n, kind="decode", seed=1):
    rng = np.random.default_rng(seed)
    for tokens in ([n] if kind == "prompt" else [1] * n):
        with cache.step(tokens, kind):
            for layer in range(2):
                cache(layer, *(rng.standard_normal((tokens, heads, 32), dtype=np.float32) for heads in (4, 2, 2)))


def test_the_same_votes_are_the_same_method(model):
    """h2o written in Python keeps what h2o keeps, here and under evaluation."""

    def h2o(rows):
        rows.votes += rows.attention

    lesskv.register_selector("python_h2o", h2o, keeps_votes=True)
    ours, theirs = make_cache("python_h2o(20, recent=10)"), make_cache("h2o(20)")
    for cache in (ours, theirs):
        feed(cache, 40, "prompt")
        feed(cache, 30)
    for layer in range(2):
        for head in range(2):
            assert list(ours.positions(layer, head)) == list(theirs.positions(layer, head))
    a, b = model.evaluate_rows([TEXT], kv=["python_h2o(16, recent=8)", "h2o(16)"], ctx=128, windows=1, divergence=True)
    assert a["kl_mean"] == b["kl_mean"] > 0 and a["kv_bytes"] == b["kv_bytes"]


def test_a_keep_set_of_positions_is_kept_and_the_newest(model):
    lesskv.register_selector("odd", lambda rows: rows.positions % 2, queries=0)
    cache = make_cache("odd(12, recent=3)")
    feed(cache, 60)
    kept = [int(p) for p in cache.positions(1, 1)]
    assert kept == [*range(1, 19, 2), 57, 58, 59]
    assert cache.stats.tokens_resident == 12
    sequence = model.sequence(kv="odd(10%)+q8", ctx=200)
    text = "".join(sequence.generate("The sea was calm, and the boats lay still.", max_tokens=40, temperature=0))
    assert text and sequence.stats.tokens_resident == 20


def test_what_a_vote_is_told():
    told = []

    @lesskv.register_selector("told", queries=2)
    def vote(rows):
        told.append((rows.layer, rows.kv_head, rows.kind, rows.tokens_seen, rows.n_step, rows.budget, rows.positions.copy(),
                     rows.attention.copy(), rows.votes.copy()))
        return rows.positions

    cache = make_cache("told(8)", threads=1)
    feed(cache, 10, "prompt")
    feed(cache, 1)
    assert [t[:6] for t in told] == [(layer, head, kind, seen, n, 8) for kind, seen, n in (("prompt", 10, 10), ("decode", 11, 1))
                                     for layer in range(2) for head in range(2)]
    assert list(told[0][6]) == list(range(10)) and sorted(told[4][6]) == list(range(2, 11))
    # Two queries of two heads a KV head; then one query.
    assert told[0][7].sum() == pytest.approx(4, abs=1e-4) and told[4][7].sum() == pytest.approx(2, abs=1e-4)
    assert not told[4][8].any()


def test_mistakes_are_sentences():
    @lesskv.register_selector("broken")
    def broken(rows):
        if rows.tokens_seen > 9:
            raise KeyError("no such row")

    lesskv.register_selector("short", lambda rows: [1.0])
    for name, sentence in (("broken", "'broken' failed: KeyError: 'no such row'"), ("short", "expected 2 votes, found shape")):
        cache = make_cache(f"{name}(8)")
        with pytest.raises(lesskv.Error, match=sentence):
            feed(cache, 10)
        with pytest.raises(lesskv.Error, match="can only be freed"):
            cache.stats
    with pytest.raises(lesskv.Error, match="broken needs its rows"):
        make_cache("broken")
    for name, sentence in (("h2o", "already a cache method"), ("Big", "small letters"), ("", "small letters")):
        with pytest.raises(lesskv.Error, match=sentence):
            lesskv.register_selector(name, broken)


def test_a_failing_selector_ends_a_generation_and_not_the_model(model):
    @lesskv.register_selector("fails_late")
    def vote(rows):
        if rows.tokens_seen > 30:
            raise RuntimeError("enough")
        return rows.positions

    sequence = model.sequence(kv="fails_late(10)", ctx=128)
    with pytest.raises(lesskv.Error, match="RuntimeError: enough"):
        list(sequence.generate("The sea was calm, and the boats lay still.", max_tokens=60, temperature=0))
    assert list(model.sequence().generate("The sea was", max_tokens=3, temperature=0))


def test_a_name_may_be_given_a_new_function():
    lesskv.register_selector("changing", lambda rows: rows.positions, queries=0)
    old = make_cache("changing(8, recent=0)")
    lesskv.register_selector("changing", lambda rows: -rows.positions, queries=0)
    new = make_cache("changing(8, recent=0)")
    feed(old, 20)
    feed(new, 20)
    assert list(old.positions(0, 0)) == list(range(12, 20)) and list(new.positions(0, 0)) == list(range(8))


def test_arrays_may_be_kept():
    """They outlive the call, whose memory the library then uses for something else."""
    kept = []

    @lesskv.register_selector("keeping", keeps_votes=True)
    def vote(rows):
        kept.append((rows, rows.positions.tolist(), rows.attention.tolist()))
        rows.votes += rows.attention

    cache = make_cache("keeping(8)", threads=1)
    feed(cache, 60)
    del cache
    for rows, positions, attention in kept:
        assert rows.positions.tolist() == positions and rows.attention.tolist() == attention
        rows.votes[:] = 7  # nobody's but its own
    assert all(rows.positions.flags.owndata for rows, _, _ in kept)


def test_an_interrupt_is_not_a_mistake():
    @lesskv.register_selector("interrupted")
    def vote(rows):
        raise KeyboardInterrupt

    cache = make_cache("interrupted(8)", threads=1)
    with pytest.raises(KeyboardInterrupt):
        feed(cache, 10)
    with pytest.raises(lesskv.Error, match="can only be freed"):
        cache.stats
