"""The float step against least squares in float64, the search of the range against all its shares."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import fit_affine, shrink_search
from qlab.quantization.affine_fit import nearest, rails, row_error

SHAPE = (7, 12)  # one for all fits: a compiled one takes a second


def problem(shape=SHAPE, seed=0, samples=64):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    x = rng.standard_normal((samples, 1)) + 0.4 * rng.standard_normal((samples, shape[1])) + 0.3
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / samples, jnp.float32)


compiled = jax.jit(fit_affine, static_argnames=("group", "symmetric"))


def fit(q, w, h, group=0, symmetric=False, scale=0.0):
    groups = -(-w.shape[1] // (group or w.shape[1]))
    scale = jnp.full((len(w), groups), scale)
    return compiled(jnp.asarray(q), w, h, group=group, symmetric=symmetric, scale=scale)


def loss(w_hat, w, h):
    e = np.float64(w_hat) - np.float64(w)
    return np.einsum("oi,ij,oj->o", e, np.float64(h), e)


def design(q, group, symmetric):
    """[in, unknowns] of one row: codes, and ones, of each group."""
    of = np.arange(len(q)) // group
    masks = [of == j for j in range(of.max() + 1)]
    return np.stack([q * m for m in masks] + [1.0 * m for m in masks if not symmetric], 1)


def least(q, w, h, group, symmetric):
    """(loss, w_hat) of the best floats for the codes of one row, float64."""
    a, root = design(np.float64(q), group, symmetric), np.linalg.cholesky(np.float64(h)).T
    w_hat = a @ np.linalg.lstsq(root @ a, root @ np.float64(w), rcond=None)[0]
    return float(np.sum((root @ (w_hat - w)) ** 2)), w_hat


def test_with_the_identity_the_fit_is_linear_regression():
    q = np.random.default_rng(1).integers(-2, 2, SHAPE)
    w = np.random.default_rng(2).standard_normal(SHAPE)
    got = fit(q, jnp.asarray(w, jnp.float32), jnp.eye(12))
    for r in range(7):
        slope, intercept = np.polyfit(q[r], w[r], 1)
        np.testing.assert_allclose(got.scale[r, 0], slope, atol=1e-5)
        np.testing.assert_allclose(got.offset[r, 0], intercept, atol=1e-5)


@pytest.mark.parametrize(
    ("group", "symmetric"),
    [
        (0, False),
        (4, False),
        (5, True),  # the last group is short
        pytest.param(5, False, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_the_fit_is_the_weighted_least_squares_solution(group, symmetric):
    w, h = problem(seed=3)
    q = np.random.default_rng(3).integers(-2, 2, SHAPE)
    q[0] = 1  # nothing decides a scale
    q[1, :4] = -1  # nor in this group
    q[2] = 0
    got = fit(q, w, h, group, symmetric)
    width = group or 12
    w_hat = q * np.repeat(got.scale, width, 1)[:, :12] + np.repeat(got.offset, width, 1)[:, :12]
    for r in range(7):
        best, expected = least(q[r], np.asarray(w[r]), h, width, symmetric)
        np.testing.assert_allclose(w_hat[r], expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(got.err[r], best, rtol=1e-4, atol=1e-5)
    if symmetric:
        assert not np.asarray(got.offset).any()


def test_a_row_of_one_code_keeps_its_scale_and_takes_the_best_constant():
    w, h = problem()
    q = jnp.full(SHAPE, -2)
    kept = fit(q, w, h, scale=0.7)
    np.testing.assert_allclose(kept.scale, 0.7)
    constant = (np.float64(w) @ np.float64(h)).sum(1) / np.float64(h).sum()
    np.testing.assert_allclose(-2 * 0.7 + kept.offset[:, 0], constant, rtol=1e-4, atol=1e-5)
    assert np.isfinite(fit(q, w, h).scale).all()


def test_the_fit_survives_a_mean_that_hides_the_codes():
    """All inputs share one large cause: 1 and q point almost the same way in the norm of H."""
    rng = np.random.default_rng(4)
    x = 100.0 + rng.standard_normal((200, 12))
    h = x.T @ x / 200
    w, q = rng.standard_normal(SHAPE), rng.integers(-2, 2, SHAPE)
    got = fit(q, jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32))
    for r in range(7):
        best, _ = least(q[r], w[r], h, 12, False)
        w_hat = q[r] * np.float64(got.scale[r, 0]) + np.float64(got.offset[r, 0])
        assert loss(w_hat[None], w[r][None], h)[0] < 1.002 * best


def test_mirrored_codes_give_a_negative_scale_and_the_same_weights():
    w, h = problem()
    q = np.random.default_rng(5).integers(-2, 2, SHAPE)
    one, other = fit(q, w, h), fit(-1 - q, w, h)
    np.testing.assert_allclose(other.scale, -one.scale, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(other.err, one.err, rtol=1e-4)


@pytest.mark.slow
def test_rows_in_pieces_give_the_same_fit(monkeypatch):
    w, h = problem(seed=6)
    q = np.random.default_rng(6).integers(-2, 2, SHAPE)
    whole = fit(q, w, h, 4)
    monkeypatch.setattr("qlab.quantization.affine_fit.CHUNK", 2 * 12 * 3 * 3)
    for a, b in zip(whole, jax.jit(partial(fit_affine, group=4))(q, w, h), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"do not fit; \(out, in\) twice"):
        fit_affine(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.eye(4))


# The search of the range


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_finds_the_best_of_all_shares(symmetric):
    w, h = problem((6, 8), 7)
    s, z = jax.jit(partial(shrink_search, bits=2, group=4, symmetric=symmetric))(w, h)
    w64 = np.float64(w).reshape(6, 2, 4)
    best = np.full(6, np.inf)
    for i in range(160):
        lo, hi = np.minimum(w64.min(2), 0), np.maximum(w64.max(2), 0)
        if symmetric:
            hi = np.maximum(-lo, hi)
            lo = -hi
        step = (hi - lo) * (1 - i / 200) / 3
        shift = 0.0 if symmetric else lo * (1 - i / 200) + 2 * step
        step, shift = (np.repeat(np.broadcast_to(a, (6, 2)), 4, 1) for a in (step, shift))
        q = np.clip(np.floor((np.float64(w) - shift) / step + 0.5), -2, 1)
        best = np.minimum(best, loss(q * step + shift, w, h))
    q = nearest(w, s, z, -2, 1)
    got = loss(q * np.repeat(s, 4, 1) + np.repeat(z, 4, 1), w, h)
    np.testing.assert_allclose(got, best, rtol=1e-3)


def test_rails_and_errors():
    assert [rails(b) for b in (1, 2, 8)] == [(-1, 0), (-2, 1), (-128, 127)]
    w, h = problem()
    np.testing.assert_allclose(
        row_error(jnp.zeros(SHAPE), w, h), loss(np.zeros(SHAPE), w, h), rtol=1e-4
    )
