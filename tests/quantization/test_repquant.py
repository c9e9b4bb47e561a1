"""RepQuant's exact properties, site by site, against NumPy in float64 and brute force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization.activations import Affine, Log, PerToken, affine, encode, fake, minmax
from qlab.quantization.norm_links import LinkInput, smooth
from qlab.quantization.quantile_ranges import (
    FARTHEST,
    calib_affine_quantile,
    calib_log,
    range_grid,
    tail_quantiles,
)
from qlab.quantization.repquant import (
    START,
    ClipRange,
    _learnable,
    clip_range,
    dual_clip_fit,
    log_sqrt2_decode,
    log_sqrt2_encode,
    log_sqrt2_shift,
    reparam,
    reparam_factors,
    reparam_ln,
    repquant,
    site_acts,
)


def wild(seed, num=400, width=12):
    """Outputs of a LayerNorm with channels of very different range and place."""
    rng = np.random.default_rng(seed)
    gamma = 2.0 ** rng.uniform(-2.5, 2.5, width)
    beta = rng.standard_normal(width) * gamma * 2.0
    x = rng.standard_normal((num, width)) * gamma + beta
    return tuple(jnp.asarray(a, jnp.float32) for a in (x, gamma, beta))


# bits are data: compiled once
calib_channels = jax.jit(calib_affine_quantile, static_argnames=("axis", "ps"))
calib_channels = partial(calib_channels, axis=-1)


# -- (1)-(3): the reparameterisation of a norm


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("round_zero", [True, False])
def test_the_rewritten_norm_and_product_are_the_same_function(bits, round_zero):
    x, gamma, beta = wild(bits)
    w = jax.random.normal(jax.random.key(1), (5, 12))
    b = jax.random.normal(jax.random.key(2), (5,))
    s, z = calib_channels(x, float(bits))
    gamma2, beta2, w2, b2, s_all, z_all = reparam_ln(gamma, beta, w, b, s, z, round_zero)
    normed = (x - beta) / gamma
    y = x @ w.T + b
    np.testing.assert_allclose(
        (normed * gamma2 + beta2) @ w2.T + b2, y, atol=1e-5 * float(jnp.abs(y).max())
    )
    np.testing.assert_allclose(s_all, s.mean(), rtol=1e-6)
    assert float(z_all) == round(float(z_all)) or not round_zero


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_codes_are_those_of_the_grids_per_channel(bits):
    """In float64, ties upwards: half-even would break a tie otherwise after an odd shift."""
    x, _, _ = wild(10 + bits)
    s, z = (np.asarray(a, np.float64) for a in calib_channels(x, float(bits)))
    x = np.asarray(x, np.float64)
    r, c, s_all, z_all = s / s.mean(), s.mean() * (np.round(z.mean()) - z), s.mean(), None
    z_all = np.round(z.mean())
    got = reparam_factors(*(jnp.asarray(a, jnp.float32) for a in (s, z)))
    for a, b in zip(got, (r, c, s_all, z_all), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    top = 2**bits - 1
    half_up = lambda u: np.floor(u + 0.5)  # noqa: E731
    per_channel = np.clip(half_up(x / s) + z, 0, top)
    one_grid = np.clip(half_up((x / r - c) / s_all) + z_all, 0, top)
    off = np.abs(x / s - np.floor(x / s) - 0.5) < 1e-9  # a tie can fall either way in any precision
    np.testing.assert_array_equal(per_channel[~off], one_grid[~off])
    # the code path in float32, away from ties
    x32 = jnp.asarray(x, jnp.float32)
    grid = Affine(got[2], got[3], jnp.float32(0), jnp.float32(top))
    codes = np.asarray(encode(grid, x32 / got[0] - got[1]))
    far = np.abs(x / s - np.floor(x / s) - 0.5) > 1e-3
    np.testing.assert_array_equal(codes[far], per_channel[far])


def test_an_unrounded_mean_zero_point_is_off_by_up_to_a_level():
    x, _, _ = wild(3)
    s, z = calib_channels(x, 4.0)
    codes = jnp.round(x / s) + z
    r, c, s_all, z_all = reparam_factors(s, z, round_zero=False)
    off = np.abs(jnp.round((x / r - c) / s_all) + z_all - codes)
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
    x = x.at[:, 0].set(0.0).at[:, 1].set(3.0).at[:, 2].set(-1e-3)
    w = jax.random.normal(jax.random.key(1), (6, 12))
    fit = jax.jit(reparam(clip, steps=5))
    rewrite = fit(LinkInput(x, w, jnp.float32(4), jax.random.key(0)))
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
    got = jax.jit(tail_quantiles, static_argnums=1)(x, ps)
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
        calib_affine_quantile(jnp.asarray(x), 4, -1, (99.9,))


# -- (4), (5): half-octave codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_code", ["repo", "reserve"])
def test_log_sqrt2_codes(bits, zero_code):
    d = 0.83
    q = jnp.arange(256.0)  # of one length for all widths, and so of one program
    none = 2**bits - (zero_code == "reserve")
    used = np.asarray(q) < none
    a = log_sqrt2_decode(q, bits, d, zero_code)
    want = np.where(used, d * 2.0 ** (-np.arange(256) / 2), 0.0)
    np.testing.assert_allclose(a, want, rtol=1e-6, atol=1e-37)
    codes = np.asarray(log_sqrt2_encode(a, bits, d, zero_code))
    normal = (
        np.asarray(q) < 250
    )  # the last codes of 8 bits stand for less than the least normal float32
    np.testing.assert_array_equal(codes[normal], np.where(used, q, none)[normal])
    zeros = log_sqrt2_encode(jnp.array([0.0, -1.0, 1e-38]), bits, d, zero_code)
    assert zeros.tolist() == [none] * 3
    assert float(log_sqrt2_decode(zeros, bits, d, zero_code).max()) == 0.0
    assert float(log_sqrt2_encode(jnp.array(2.0), bits, d, zero_code)) == 0.0  # a > d clips
    shift, scale = log_sqrt2_shift(q, d)
    np.testing.assert_allclose((scale * 2.0**-shift)[used], a[used], rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(shift, np.round(shift))
    np.testing.assert_allclose(scale, d * np.where(q % 2, 2**0.5, 1.0), rtol=1e-6)


def test_log_scale_is_the_best_quantile():
    a = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (20, 16)))
    ps = (0.9, 0.97, 1.0)
    errors = [
        float(((fake(Log(q, jnp.float32(8.0)), a) - a) ** 2).mean())
        for q in jnp.quantile(a, jnp.array(ps))
    ]
    got = calib_log(a, 3, zero="repo", ps=ps).scale
    np.testing.assert_allclose(got, jnp.quantile(a, ps[int(np.argmin(errors))]), rtol=1e-5)


# -- (6): clipping


def test_open_clips_are_min_and_max_and_shrink_as_said():
    lo, hi = jnp.array([-2.0, 1.0, -5.0, 0.0]), jnp.array([3.0, 4.0, -1.0, 2.0])
    wide = jnp.full(4, jnp.inf)
    for v in (ClipRange(wide, wide), ClipRange(wide, None)):
        np.testing.assert_array_equal(jnp.stack(clip_range(v, lo, hi)), jnp.stack([lo, hi]))
    low, high = clip_range(ClipRange(jnp.zeros(4), jnp.full(4, START)), lo, hi)
    top = float(jax.nn.sigmoid(START))
    np.testing.assert_allclose(high, [1.5, 3.25, -2.0, 1.0], rtol=1e-6)
    mid = np.array([0.0, 2.5, -3.0, 0.0])
    np.testing.assert_allclose(low, mid + top * (np.asarray(lo) - mid), atol=1e-6)
    assert np.all(low >= lo)
    assert np.all(high <= hi)


@pytest.mark.parametrize("single", [False, True])
def test_learned_ends_lower_the_error_of_the_product(single):
    key = jax.random.key(4)
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_t(3, (256, 6)) * 2.0 ** np.arange(6) + 1.0, jnp.float32)
    x = x.at[:, 5].add(400.0)  # a channel far from 0
    w = jax.random.normal(key, (9, 6))
    fit = jax.jit(partial(dual_clip_fit, steps=200, learning_rate=3e-2, single=single))
    lo, hi = fit(x, w, 3, key)

    def error(lo, hi):
        return float((((fake(range_grid(lo, hi, 3), x) - x) @ w.T) ** 2).mean())

    assert np.all(lo >= x.min(0) - 1e-3)
    assert np.all(hi <= x.max(0) + 1e-3)
    assert error(lo, hi) < (0.8 if single else 0.7) * error(x.min(0), x.max(0))
    # no steps: what START gives, or min and max where those are better
    lo0, hi0 = jax.jit(partial(dual_clip_fit, steps=0, single=single))(x, w, 3, key)
    assert error(lo0, hi0) <= error(x.min(0), x.max(0)) * (1 + 1e-5)


def test_one_step_moves_the_ends_against_the_true_gradient():
    """Straight through the rounding, the gradient of an end is that of what is clipped to it."""
    x = jnp.array([[-9.0], [9.0], [7.0]])  # all beyond the ends
    grad = jax.grad(lambda e: _learnable(x, e[0], e[1], 8).sum(), argnums=0)(
        (jnp.array([-1.0]), jnp.array([2.0]))
    )
    np.testing.assert_allclose([grad[0][0], grad[1][0]], [1.0, 2.0], atol=2e-2)


def test_reparameterised_error_is_five_times_smaller_on_outliers():
    """The site alone, float weights, A4 (the card's numbers: layer-wise 30, per token 13, SmoothQuant 1.7)."""
    x, _, _ = wild(11, 512, 64)
    w = jax.random.normal(jax.random.key(1), (64, 64)) / jnp.std(x, 0)

    def error(x_hat):
        return float((((x_hat - x) @ w.T) ** 2).mean())

    i = LinkInput(x, w, jnp.float32(4), jax.random.key(0))
    rep, smoothed = reparam("quantile")(i), smooth()(i)
    errors = {
        "rep": error((fake(rep.record, x / rep.r - rep.c) + rep.c) * rep.r),
        "layer": error(fake(range_grid(*minmax(x), 4), x)),
        "token": error(fake(PerToken(jnp.float32(4)), x)),
        "smooth": error(fake(affine(*minmax(x / smoothed.r), 4), x / smoothed.r) * smoothed.r),
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
