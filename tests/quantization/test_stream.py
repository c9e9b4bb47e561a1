"""Calibration in batches: the whole walk's numbers, whatever the batches and wherever the activations are kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.nn.vit import ViTSize, vit
from qlab.quantization import observers, stream
from qlab.quantization.activations import affine, minmax
from qlab.quantization.blocks import (
    float_act,
    gptq_weight,
    nearest_weight,
    run_blocks,
    site_by_site,
)
from qlab.quantization.quantize_net import quantize_net
from qlab.quantization.stream import Cache, gptq_fold, nearest_fold, quantize_stream

NET = vit(ViTSize(patch=4, dim=16, hidden=32, heads=2, depth=2))
WIDTHS = {"w_bits": 3, "a_bits": 6}
MINMAX, NEAREST, GPTQ = observers.minmax(), nearest_fold(), gptq_fold()


def by_range(i):
    return affine(*minmax(i.x), i.bits)


@pytest.fixture(scope="module")
def params():
    return NET.init(jax.random.key(0))


@pytest.fixture(scope="module")
def x():
    return np.asarray(jax.random.uniform(jax.random.key(1), (96, 8, 8, 1)))


def cut(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


def codes(done):
    return [np.asarray(qt.codes) for q in done.blocks for qt in q.weights.values()]


@pytest.mark.parametrize(
    ("act", "observer", "whole", "fold"),
    [
        (by_range, MINMAX, nearest_weight(), NEAREST),
        (float_act, None, gptq_weight(), GPTQ),
        pytest.param(
            float_act,
            None,
            gptq_weight(target="same"),
            gptq_fold(target="same"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["nearest", "gptq", "gptq-same"],
)
def test_batches_give_what_all_samples_at_once_give(params, x, act, observer, whole, fold):
    """Ranges with nearest codes, codes of GPTQ on float activations: together they would magnify the last bits of sums,
    by which an activation near the middle between two codes takes the one or the other."""
    method = site_by_site(act=act, weight=whole)
    want = quantize_net(NET, params, jnp.asarray(x), method, **WIDTHS)
    got = quantize_stream(NET, params, cut(x, 48), observer, fold, **WIDTHS)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), want.blocks, got.blocks)
    for a, b in zip(codes(want), codes(got), strict=True):  # sums in another order
        assert (a != b).mean() < (0.02 if observer is None else 1e-9)
        assert np.abs(a.astype(int) - b).max() <= 1
    for a, b in zip(want.blocks, got.blocks, strict=True):
        assert set(a.acts) == set(b.acts)
        for site in a.acts:
            np.testing.assert_allclose(a.acts[site].scale, b.acts[site].scale, rtol=2e-2)
    y, z = (run_blocks(NET, d.blocks, jnp.asarray(x)) for d in (want, got))
    assert np.abs(y - z).mean() < 0.1 * np.abs(y - NET.apply(params, x)).mean()


def test_activations_may_stay_float_and_any_observer_serves(params, x):
    done = quantize_stream(NET, params, cut(x, 48), None, NEAREST, w_bits=8, a_bits=8)
    assert not any(q.acts for q in done.blocks)
    y = NET.apply(params, x)
    assert np.abs(run_blocks(NET, done.blocks, x) - y).max() < 0.02 * np.abs(y).max()
    narrow = quantize_stream(NET, params, cut(x, 48), observers.percentile(0.99), NEAREST, **WIDTHS)
    wide = quantize_stream(NET, params, cut(x, 48), MINMAX, NEAREST, **WIDTHS)
    pairs = [
        (a.acts[site].scale, b.acts[site].scale)
        for a, b in zip(narrow.blocks, wide.blocks, strict=True)
        for site in a.acts
    ]
    assert all((a <= 1.05 * b).all() for a, b in pairs)
    assert np.mean([(a < 0.9 * b).mean() for a, b in pairs]) > 0.5


def test_a_cap_on_memory_moves_activations_to_files_and_changes_nothing(params, x, monkeypatch):
    held, put = [], Cache.put

    def noted(self, i, tree):
        put(self, i, tree)
        held.append((self.nbytes, sum(isinstance(a, np.memmap) for a in self)))

    monkeypatch.setattr(Cache, "put", noted)
    run = partial(quantize_stream, NET, params, cut(x, 48), MINMAX, GPTQ, **WIDTHS)
    free = run()
    assert not any(filed for _, filed in held)
    largest = max(size for size, _ in held)
    held.clear()
    capped = run(cache_bytes=largest)  # half of what it takes
    assert max(size for size, _ in held) <= largest // 2
    assert 0 < max(filed for _, filed in held) < 2
    jax.tree.map(np.testing.assert_array_equal, free, capped)


def test_equal_blocks_and_more_batches_compile_nothing_new(params, x):
    act, weight = MINMAX, GPTQ
    programs = (stream._fold_act, stream._fold_weight, stream._made, stream._outputs)
    for p in programs:
        p.clear_cache()
    run = partial(quantize_stream, act=act, weight=weight, **WIDTHS)
    one = vit(ViTSize(patch=4, dim=16, hidden=32, heads=2, depth=1))
    run(one, one.init(jax.random.key(2)), cut(x[:32], 32))
    count = [p._cache_size() for p in programs]
    three = vit(ViTSize(patch=4, dim=16, hidden=32, heads=2, depth=3))
    run(three, three.init(jax.random.key(3)), cut(x, 32))
    assert [p._cache_size() for p in programs] == count


def test_a_cache_keeps_trees_in_order_and_entries_can_be_replaced(tmp_path):
    cache = Cache(100, tmp_path)
    trees = [{"a": np.arange(10.0) + i, "b": np.arange(2)} for i in range(3)]
    for i, tree in enumerate(trees):
        cache.put(i, tree)
    assert cache.nbytes == 96  # the second would have made it 192
    cache.put(0, trees[2])
    for got, want in zip(cache, (trees[2], *trees[1:]), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not list(tmp_path.iterdir())  # files without names


def test_mistakes_are_named(params, x):
    run = partial(quantize_stream, NET, params)
    with pytest.raises(UserError, match="no batch"):
        run([], MINMAX, NEAREST, **WIDTHS)
    bad = x.copy()
    bad[50, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="batch 1 is empty or not finite"):
        run(cut(bad, 40), MINMAX, NEAREST, **WIDTHS)
    with pytest.raises(UserError, match="w_bits=9"):
        run(cut(x, 40), MINMAX, NEAREST, w_bits=9, a_bits=8)
    with pytest.raises(
        UserError, match=r"does not take calibration inputs of shape \(40, 4, 8, 1\)"
    ):
        run([x[:40], x[40:80, :4]], MINMAX, NEAREST, **WIDTHS)
