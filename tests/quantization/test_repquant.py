"""RepQuant's exact properties, site by site, against NumPy in float64 and brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import activations, quantile_ranges
from qlab.quantization import repquant as rq
from qlab.quantization.activations import Affine, Log, PerToken, minmax
from qlab.quantization.norm_links import LinkInput, smooth
from qlab.quantization.quantile_ranges import FARTHEST, calib_affine_quantile, calib_log
from qlab.quantization.repquant import START, ClipRange, dual_clip_fit, reparam, repquant, site_acts

# A primitive at a time would compile ten times as many programs; widths are data, so one serves all.
encode, fake = jax.jit(activations.encode), jax.jit(activations.fake)
affine, range_grid = jax.jit(activations.affine), jax.jit(quantile_ranges.range_grid)
tail_quantiles = jax.jit(quantile_ranges.tail_quantiles, static_argnums=1)
calib = jax.jit(calib_affine_quantile, static_argnames=("axis", "ps"))
calib_channels = partial(calib, axis=-1)
reparam_factors = jax.jit(rq.reparam_factors, static_argnames="round_zero")
reparam_ln = jax.jit(rq.reparam_ln, static_argnames="round_zero")
log_sqrt2_encode = jax.jit(rq.log_sqrt2_encode, static_argnums=3)
log_sqrt2_decode = jax.jit(rq.log_sqrt2_decode, static_argnums=3)
log_sqrt2_shift, clip_range = jax.jit(rq.log_sqrt2_shift), jax.jit(rq.clip_range)


def wild(seed, num=400, width=12):
    """Outputs of a LayerNorm with channels of very different range and place."""
    rng = np.random.default_rng(seed)
    gamma = 2.0 ** rng.uniform(-2.5, 2.5, width)
    beta = rng.standard_normal(width) * gamma * 2.0
    x = rng.standard_normal((num, width)) * gamma + beta
    return tuple(np.float32(a) for a in (x, gamma, beta))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- (1)-(3): the reparameterisation of a norm


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("round_zero", [True, False])
def test_the_rewritten_norm_and_product_are_the_same_function(bits, round_zero):
    x, gamma, beta = wild(bits)
    w, b = normal(1, 5, 12), normal(2, 5)
    s, z = map(np.asarray, calib_channels(x, float(bits)))
    gamma2, beta2, w2, b2, s_all, z_all = map(
        np.asarray, reparam_ln(gamma, beta, w, b, s, z, round_zero=round_zero)
    )
    normed = (x - beta) / gamma
    y = x @ w.T + b
    np.testing.assert_allclose(
        (normed * gamma2 + beta2) @ w2.T + b2, y, atol=1e-5 * np.abs(y).max()
    )
    np.testing.assert_allclose(s_all, s.mean(), rtol=1e-6)
    assert float(z_all) == round(float(z_all)) or not round_zero


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_codes_are_those_of_the_grids_per_channel(bits):
    """In float64, ties upwards: half-even would break a tie otherwise after an odd shift."""
    x, _, _ = wild(10 + bits)
    s, z = (np.asarray(a, np.float64) for a in calib_channels(x, float(bits)))
    x = np.asarray(x, np.float64)
    s_all, z_all = s.mean(), np.round(z.mean())
    r, c = s / s_all, s_all * (z_all - z)
    got = [np.asarray(a) for a in reparam_factors(np.float32(s), np.float32(z))]
    for a, b in zip(got, (r, c, s_all, z_all), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    top = 2**bits - 1
    half_up = lambda u: np.floor(u + 0.5)  # noqa: E731
    per_channel = np.clip(half_up(x / s) + z, 0, top)
    one_grid = np.clip(half_up((x / r - c) / s_all) + z_all, 0, top)
    off = np.abs(x / s - np.floor(x / s) - 0.5) < 1e-9  # a tie can fall either way in any precision
    np.testing.assert_array_equal(per_channel[~off], one_grid[~off])
    # the code path in float32, away from ties
    grid = Affine(got[2], got[3], jnp.float32(0), jnp.float32(top))
    codes = np.asarray(encode(grid, np.float32(x) / got[0] - got[1]))
    far = np.abs(x / s - np.floor(x / s) - 0.5) > 1e-3
    np.testing.assert_array_equal(codes[far], per_channel[far])


def test_an_unrounded_mean_zero_point_is_off_by_up_to_a_level():
    x, _, _ = wild(3)
    s, z = map(np.asarray, calib_channels(x, 4.0))
    codes = np.round(x / s) + z
    r, c, s_all, z_all = map(np.asarray, reparam_factors(s, z, round_zero=False))
    off = np.abs(np.round((x / r - c) / s_all) + z_all - codes)
    assert 0 < off.max() <= 1.0


def test_equal_grids_need_no_rewrite():
    s, z = jnp.full(5, 0.25), jnp.full(5, 3.0)
    r, c, s_all, z_all = reparam_factors(s, z)
    assert r.tolist() == [1.0] * 5
    assert c.tolist() == [0.0] * 5
    assert (float(s_all), float(z_all)) == (0.25, 3.0)


@pytest.mark.parametrize("clip", ["none", "quantile", "single", "dual"])
def test_dead_and_constant_channels_stay_finite(clip):
    x, _, _ = wild(5)
    x[:, :3] = 0.0, 3.0, -1e-3
    fit = jax.jit(reparam(clip, steps=5))
    made = fit(LinkInput(x, normal(1, 6, 12), jnp.float32(4), jax.random.key(0)))
    rewrite = jax.tree.map(np.asarray, made)
    grid, new = rewrite.record, x / rewrite.r - rewrite.c
    assert np.isfinite(new).all()
    assert np.all(rewrite.r > 0)
    back = (fake(grid, new) + rewrite.c) * rewrite.r
    np.testing.assert_allclose(back[:, :3], x[:, :3], atol=3.0 / FARTHEST * 1.01)
    assert abs(float(grid.zero)) <= FARTHEST


# -- ranges


@pytest.mark.parametrize("shape", [(7,), (501,), (40, 3), (1, 2)])
@pytest.mark.parametrize("ps", [(0.999, 0.9999), (0.5, 1.0), (0.0, 0.93)])
def test_tail_quantiles_are_numpys(shape, ps):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got = tail_quantiles(x, ps)
    np.testing.assert_allclose(got, np.quantile(x, ps, axis=0), rtol=1e-4, atol=1e-5)


def test_quantile_search_is_the_brute_force_one():
    rng = np.random.default_rng(1)
    x = rng.standard_t(2, (600, 4)).astype(np.float32) + np.array([0, 90, -90, 0.1], np.float32)
    ps, top = (0.9, 0.99, 1.0), 15.0
    s, z = calib_channels(x, 4.0, ps=ps)
    for d in range(4):
        found = []
        for p in ps:
            lo, hi = np.quantile(x[:, d].astype(np.float64), [1 - p, p])
            step = (hi - lo) / top
            zero = np.round(-lo / step)
            x_hat = step * (np.clip(np.round(x[:, d] / step) + zero, 0, top) - zero)
            found.append((((x_hat - x[:, d]) ** 2).mean(), step, zero))
        _, step, zero = min(found)
        np.testing.assert_allclose(s[d], step, rtol=1e-5)
        assert float(z[d]) == zero
    assert float(z[1]) < 0 < top < float(z[2])  # ranges without 0: not widened, zero not clipped
    one = calib_channels(x.T, 4.0, axis=0, ps=ps)
    np.testing.assert_allclose(one[0], s, rtol=1e-6)
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        calib_channels(x, 4.0, ps=(99.9,))


# -- (4), (5): half-octave codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_code", ["repo", "reserve"])
def test_log_sqrt2_codes(bits, zero_code):
    d = 0.83
    q = np.arange(256, dtype=np.float32)  # of one length for all widths, and so of one program
    none = 2**bits - (zero_code == "reserve")
    used = q < none
    a = np.asarray(log_sqrt2_decode(q, bits, d, zero_code))
    want = np.where(used, d * 2.0 ** (-np.arange(256) / 2), 0.0)
    np.testing.assert_allclose(a, want, rtol=1e-6, atol=1e-37)
    codes = np.asarray(log_sqrt2_encode(a, bits, d, zero_code))
    fit = q < 250  # the last codes of 8 bits stand for less than the least normal float32
    np.testing.assert_array_equal(codes[fit], np.where(used, q, none)[fit])
    some = np.float32([0.0, -1.0, 1e-38, 2.0] * 64)
    codes = log_sqrt2_encode(some, bits, d, zero_code)
    assert codes[:4].tolist() == [none] * 3 + [0]  # a > d clips
    assert log_sqrt2_decode(codes, bits, d, zero_code)[:3].tolist() == [0.0] * 3
    shift, scale = map(np.asarray, log_sqrt2_shift(q, d))
    np.testing.assert_allclose((scale * 2.0**-shift)[used], a[used], rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(shift, np.round(shift))
    np.testing.assert_allclose(scale, d * np.where(q % 2, 2**0.5, 1.0), rtol=1e-6)


def test_log_scale_is_the_best_quantile():
    a = np.exp(3 * normal(0, 20, 16))
    a /= a.sum(-1, keepdims=True)
    ps = (0.9, 0.97, 1.0)
    errors = [
        ((np.asarray(fake(Log(q, jnp.float32(8.0)), a)) - a) ** 2).mean()
        for q in np.float32(np.quantile(a, ps))
    ]
    got = jax.jit(partial(calib_log, zero="repo", ps=ps))(a, 3).scale
    np.testing.assert_allclose(got, np.quantile(a, ps[int(np.argmin(errors))]), rtol=1e-5)


# -- (6): clipping


def test_open_clips_are_min_and_max_and_shrink_as_said():
    lo, hi = np.float32([-2, 1, -5, 0]), np.float32([3, 4, -1, 2])
    wide = np.full(4, np.inf, np.float32)
    for v in (ClipRange(wide, wide), ClipRange(wide, None)):
        np.testing.assert_array_equal(clip_range(v, lo, hi), (lo, hi))
    zeros = np.zeros(4, np.float32)
    low, high = clip_range(ClipRange(zeros, zeros + np.float32(START)), lo, hi)
    top = 1 / (1 + np.exp(-START))
    np.testing.assert_allclose(high, [1.5, 3.25, -2.0, 1.0], rtol=1e-6)
    mid = np.array([0.0, 2.5, -3.0, 0.0])
    np.testing.assert_allclose(low, mid + top * (lo - mid), atol=1e-6)
    assert np.all(low >= lo)
    assert np.all(high <= hi)


@pytest.mark.parametrize("single", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_learned_ends_lower_the_error_of_the_product(single):
    rng = np.random.default_rng(4)
    x = np.float32(rng.standard_t(3, (256, 6)) * 2.0 ** np.arange(6) + 1.0)
    x[:, 5] += 400.0  # a channel far from 0
    w, key = normal(4, 9, 6), jax.random.key(4)
    fit = jax.jit(partial(dual_clip_fit, learning_rate=3e-2, single=single), static_argnums=4)
    lo, hi = map(np.asarray, fit(x, w, 3, key, 200))

    def error(lo, hi):
        return (((np.asarray(fake(range_grid(lo, hi, 3), x)) - x) @ w.T) ** 2).mean()

    assert np.all(lo >= x.min(0) - 1e-3)
    assert np.all(hi <= x.max(0) + 1e-3)
    assert error(lo, hi) < 0.8 * error(x.min(0), x.max(0))
    # no steps: what START gives, or min and max where those are better
    lo0, hi0 = fit(x, w, 3, key, 0)
    assert error(lo0, hi0) <= error(x.min(0), x.max(0)) * (1 + 1e-5)


def test_one_step_moves_the_ends_against_the_true_gradient():
    """Straight through the rounding, the gradient of an end is that of what is clipped to it."""
    x = np.float32([[-9], [9], [7]])  # all beyond the ends
    grad = jax.jit(jax.grad(lambda e: rq._learnable(x, e[:1], e[1:], 8).sum()))
    np.testing.assert_allclose(grad(np.float32([-1, 2])), [1.0, 2.0], atol=2e-2)


def test_reparameterised_error_is_five_times_smaller_on_outliers():
    """The site alone, float weights, A4 (the card's numbers: layer-wise 30, per token 13, SmoothQuant 1.7)."""
    x, _, _ = wild(11, 512, 64)
    w = normal(1, 64, 64) / x.std(0)

    def error(x_hat):
        return ((np.asarray(x_hat - x) @ w.T) ** 2).mean()

    i = LinkInput(x, w, jnp.float32(4), jax.random.key(0))
    rep = jax.tree.map(np.asarray, jax.jit(reparam("quantile"))(i))
    r = np.asarray(jax.jit(smooth())(i).r)
    errors = {
        "rep": error((np.asarray(fake(rep.record, x / rep.r - rep.c)) + rep.c) * rep.r),
        "layer": error(fake(range_grid(*minmax(x), 4), x)),
        "token": error(fake(PerToken(jnp.float32(4)), x)),
        "smooth": error(np.asarray(fake(affine(*minmax(x / r), 4), x / r)) * r),
    }
    assert errors["layer"] > 5 * errors["rep"]
    assert errors["token"] > 5 * errors["rep"]
    assert errors["smooth"] > errors["rep"]


@pytest.mark.parametrize(
    ("call", "say"),
    [
        (lambda: reparam("tripple"), "clip='tripple'"),
        (lambda: reparam("dual", symmetric=True), "symmetric"),
        (lambda: site_acts("softmax"), "softmax='softmax'"),
        (lambda: repquant(None, site_acts(), reconstruction="obq"), "reconstruction='obq'"),
    ],
)
def test_unknown_names_are_one_line_errors(call, say):
    with pytest.raises(ValueError, match=say):
        call()
