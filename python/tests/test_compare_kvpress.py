"""tools/compare_kvpress: kvpress's parameters as cache specs, and the arithmetic of kept sets. Without torch or kvpress."""
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/compare_kvpress"))
import rows  # noqa: E402

O = rows.Options(window=32, kernel=5, sinks=4, alpha=0.2, pyramid_window=8, beta=5, channels=0.5)


def test_the_ratio_keeps_exactly_so_many_rows():
    for tokens in (7, 801, 924, 1999):
        for kept in range(1, tokens):
            ratio = rows.ratio_for(kept, tokens)
            assert int(tokens * (1 - ratio)) == kept and tokens * (1 - ratio) == pytest.approx(kept, abs=1e-5)
    with pytest.raises(ValueError, match="keeps 8 of 7"):
        rows.ratio_for(8, 7)


def test_a_head_is_sure_of_as_many_rows():
    for kept in range(33, 1200):  # kvpress: the larger of window and int(0.2 rows); `ada`: window and floor(floor rows)
        assert 32 + math.floor(rows.ada_floor(kept, O) * kept + 1e-9) == max(32, int(kept * 0.2))
    assert rows.ada_floor(400, rows.Options(alpha=0)) == 0


def top_and_bottom(kept, tokens, window, beta):
    """`pyramid`'s own rows of the two outer layers (docs/methods.md, kvcache/budget/pyramid.h)."""
    least, most = (kept - window) / beta, 2 * (kept - window) - (kept - window) / beta
    if most > tokens - window:
        most, least = tokens - window, 2 * (kept - window) - (tokens - window)
    return window + least, window + most


def test_the_pyramid_is_kvpress_s():
    assert top_and_bottom(100, 1000, 8, rows.pyramid_beta(100, 1000, O)) == pytest.approx((20, 180))  # 20: rows / beta
    flat = rows.Options(pyramid_window=200, beta=2)  # its bottom layer may hold all but the window
    assert top_and_bottom(700, 1000, 200, rows.pyramid_beta(700, 1000, flat)) == pytest.approx((600, 800))
    assert rows.pyramid_beta(30, 1000, O) is None  # the top layer would have less than the window: kvpress goes uniform


def test_specs():
    assert rows.spec("window", 90, 900, O) == "window(90,sinks=4)+f32"
    assert rows.spec("snapkv", 90, 900, O) == "snapkv(90,window=32,kernel=5,pool=avg)+f32"
    assert rows.spec("ada", 90, 900, O) == "snapkv(90,window=32,kernel=5,pool=avg)+ada(0.000000000)+f32"
    assert rows.spec_as_named("ada", 90, 900, O) == "snapkv(90,window=32,kernel=5,pool=avg)+ada(0.2)+f32"
    assert rows.spec("pyramid", 30, 900, O) == "snapkv(30,window=8,kernel=5,pool=avg)+f32"
    assert rows.spec_as_named("pyramid", 90, 900, O) == "snapkv(90,window=8,kernel=5,pool=avg)+pyramid(5)+f32"
    assert rows.spec("kvzap", 90, 900, rows.Options(sidecar="x.gguf")) == 'kvzap(90,scope=head,window=0,sinks=0,file="x.gguf")+f32'
    assert rows.spec_as_named("snapkv", 90, 900, O) is None
    with pytest.raises(ValueError, match="no method 'snap'"):
        rows.spec("snap", 90, 900, O)


def test_kept_sets_and_their_agreement():
    ours = rows.kept_of_runs([[[0, 3, 5, 6], []], [[2, 4], [0, 1]]])
    assert ours == [[{0, 1, 2, 5}, set()], [{2, 3}, {0}]]
    theirs = [[{0, 1, 2, 6}, set()], [{2, 3, 4, 5}, {1}]]
    assert rows.agreement(ours, ours) == [1, 1, 1, 1]
    assert rows.agreement(ours, theirs) == [0.75, 1, 0.5, 0]
    assert rows.agreement(theirs, ours) == rows.agreement(ours, theirs)
    assert rows.rows_kept(ours) == 7 / 4
    with pytest.raises(ValueError, match="pairs of begin and end"):
        rows.kept_of_runs([[[0, 3, 5]]])
    with pytest.raises(ValueError, match="different layers"):
        rows.agreement(ours, theirs[:1])


def test_divergence():
    assert rows.divergence([1, 2, 3], [101, 102, 103]) == pytest.approx(0, abs=1e-12)
    assert rows.divergence([0, 0], [0, math.log(3)]) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert rows.divergence([1e4, 0], [1e4, 0]) == 0  # no overflow


def test_the_program_s_rows():
    program = os.environ.get("LESSKV_PROGRAM") or pytest.skip("LESSKV_PROGRAM names no lesskv")
    out = subprocess.run([program, "run", "-m", ROOT / "models/lesskv-small.gguf", "-f", ROOT / "docs/question.txt",
                          "-n", "0", "--json", "--kv-stats", "--kv", rows.spec("window", 10, 0, O)],
                         check=True, capture_output=True, text=True).stdout
    done = json.loads(out)
    n = done["prompt_tokens"]
    assert n > 10 and rows.kept_of_runs(done["kv_runs"]) == [[{*range(4), *range(n - 6, n)}] * 2] * 4
