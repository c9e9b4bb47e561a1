"""Observers: the same answer however the samples are cut and merged, and NumPy's answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import observers as obs


def _fold(o, x, cuts, size):
    """finalize after the parts of x, each filled up to `size` rows that do not count: one program for all."""
    update = jax.jit(o.update)
    state = o.init(x.shape[-1])
    for part in np.split(np.asarray(x), cuts):
        filled = np.full((size, x.shape[-1]), 1e3, np.float32)
        filled[: len(part)] = part
        state = update(state, filled, np.arange(size) < len(part))
    return jax.jit(o.finalize)(state)


@pytest.mark.parametrize(
    "o",
    [
        obs.minmax(),
        obs.minmax("channel"),
        obs.percentile(0.99),
        obs.least_error(3),
        obs.least_divergence(4),
        obs.histogram(),
    ],
)
def test_observers_do_not_depend_on_the_batches(o):
    x = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32) * (0.01, 1.0, 30.0)
    for a, b in zip(
        jax.tree.leaves(_fold(o, x, [], 400)),
        jax.tree.leaves(_fold(o, x[::-1], [1, 7, 200], 400)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("o", [obs.moments(), obs.second_moment()])
def test_moments_agree_with_numpy_however_cut_and_merged(o):
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32) + 3.0
    update = jax.jit(o.update)
    a, b, c = (update(o.init(4), p) for p in np.split(x, 3))
    merge = jax.jit(o.merge)
    merged = o.finalize(merge(a, merge(b, c)))
    whole = _fold(o, x, [17, 40], 260)
    for p, q in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-4)
    if isinstance(whole, obs.Moments):
        np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(whole.covariance, np.cov(x.T, bias=True), rtol=2e-3, atol=2e-4)
    else:
        np.testing.assert_allclose(whole, x.T @ x / 300, rtol=1e-4)


@pytest.mark.parametrize(
    "o", [obs.minmax(), obs.percentile(0.95), obs.moments(), obs.second_moment(), obs.ema()]
)
def test_masked_rows_do_not_count(o):
    x = np.random.default_rng(0).standard_normal((500, 2)).astype(np.float32)
    mask = np.arange(500) < 300
    update = jax.jit(o.update)
    finalize = jax.jit(o.finalize)
    a = finalize(update(o.init(2), np.where(mask[:, None], x, np.float32(1e3)), mask))
    b = finalize(update(o.init(2), x[:300]))
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5)


def test_percentiles_are_numpys_to_a_bin():
    x = np.random.default_rng(0).standard_normal((5000, 2)).astype(np.float32)
    lo, hi = _fold(obs.percentile(0.95), x, [], 5000)
    np.testing.assert_allclose([lo, hi], np.quantile(x, [0.05, 0.95]), atol=0.01)


def test_ema_is_corrected_for_its_start():
    o = obs.ema(0.9)
    x = jnp.array([[1.0], [5.0]])
    state = o.init(1)
    for _ in range(3):
        state = o.update(state, x)
    np.testing.assert_allclose(o.finalize(state), [1.0, 5.0], rtol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        o.merge(state, state)


def _kl_by_hand(counts, centres, width, lo, hi, bits, steps):
    """TensorRT's search written out in float64: (share, divergence of every share)."""
    found = []
    for share in np.arange(1, steps + 1) / steps:
        a, b = min(lo * share, 0.0), max(hi * share, 0.0)
        inside = np.flatnonzero((centres >= a - width / 2) & (centres <= b + width / 2))
        if len(inside) < 2**bits:
            found.append(np.inf)
            continue
        p = counts[inside].astype(float)
        own = p.copy()
        p[0] += counts[: inside[0]].sum()
        p[-1] += counts[inside[-1] + 1 :].sum()
        scale = (b - a) / (2**bits - 1)
        code = np.clip(np.round(centres[inside] / scale) + np.round(-a / scale), 0, 2**bits - 1)
        q = np.zeros_like(p)
        for c in np.unique(code):
            here = code == c
            q[here & (p > 0)] = own[here].sum() / max((here & (p > 0)).sum(), 1)
        p, q = p / p.sum(), q / q.sum()
        full = p > 0
        found.append((p[full] * np.log(p[full] / np.maximum(q[full], 1e-12))).sum())
    return (1 + np.argmin(found)) / steps, np.array(found)


@pytest.mark.parametrize("bits", [4, 8])
def test_least_divergence_is_the_search_written_out(bits):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(4000), [9.0, -7.0]]).astype(np.float32)[:, None]
    lo, hi = _fold(obs.least_divergence(bits, steps=20), x, [], len(x))
    h = _fold(obs.histogram(), x, [], len(x))
    width = 2.0 ** float(h.exponent)
    counts, centres = np.asarray(h.counts), np.asarray(obs.centres(h), np.float64)
    share, found = _kl_by_hand(counts, centres, width, -7.0, 9.0, bits, 20)
    # the search may be flat at its least: the divergences, not the places, have to agree
    got = round(float(hi) / 9.0 * 20) - 1
    assert found[got] <= found.min() + 1e-4
    assert share < 1.0 or bits == 8  # at 4 bits two outliers do not decide the range
    np.testing.assert_allclose(float(lo) / -7.0, float(hi) / 9.0, rtol=1e-6)


def test_least_divergence_of_few_values_keeps_the_range():
    """Fewer bins than codes would keep any histogram, so they are no candidates; nothing seen stays nothing."""
    x = np.array([[0.0], [3.0]], np.float32)
    lo, hi = _fold(obs.least_divergence(2), x, [], 2)
    assert float(lo) == 0.0
    assert 0.0 < float(hi) <= 3.0
