"""What every quantizer has to pass, and the grids against float64 brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization import (
    QUANTIZERS,
    identity,
    lsq_step,
    make_grid,
    search_affine,
    search_symmetric,
    uniform,
)
from qlab.quantization.grid import calibrate, nearest_codes

KINDS = [
    dict(bits=b, symmetric=s, granularity=g, calibration=c)
    for b in (2, 3, 8)
    for s in (False, True)
    for g, c in (("tensor", "minmax"), ("channel", "searched"), ("group:4", "minmax"))
    if not (b == 8 and c == "searched")
]
ids = lambda k: "-".join(str(v) for v in k.values())  # noqa: E731


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_fake_is_decode_of_encode_and_idempotent(kind):
    q, x = uniform(**kind), draw((6, 12))
    params = q.init(x)
    fake = q.fake(params, x)
    np.testing.assert_array_equal(fake, q.decode(params, q.encode(params, x)))
    np.testing.assert_array_equal(q.fake(params, fake), fake)
    np.testing.assert_array_equal(
        jax.jit(q.fake)(params, x), jax.jit(lambda p, a: q.decode(p, q.encode(p, a)))(params, x)
    )


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_error_is_half_a_step_inside_the_range_and_zero_stays_zero(kind):
    q, x = uniform(**kind), draw((6, 12), 1)
    params = q.init(x)
    scale = np.repeat(params.scale, 12 // params.scale.shape[1], 1).astype(np.float64)
    zero = 0.0 if params.zero is None else np.repeat(params.zero, 12 // params.scale.shape[1], 1)
    lo, hi = (scale * (float(end) - zero) for end in (params.q_min, params.q_max))
    inside = (np.asarray(x) >= lo) & (np.asarray(x) <= hi)
    error = np.abs(np.asarray(q.fake(params, x), np.float64) - np.asarray(x))
    assert inside.mean() > 0.5
    assert np.all(error[inside] <= (np.broadcast_to(scale, x.shape)[inside]) / 2 * (1 + 1e-5))
    np.testing.assert_array_equal(q.fake(params, jnp.zeros_like(x)), np.zeros_like(x))


@pytest.mark.parametrize("kind", KINDS[:6], ids=ids)
def test_gradient_is_one_where_the_rounded_code_is_in_range(kind):
    q, x = uniform(**kind), 3 * draw((6, 12), 2)
    params = q.init(x / 3)  # so that a part is clipped
    u = x / jnp.repeat(params.scale, 12 // params.scale.shape[1], 1)
    zero = 0.0 if params.zero is None else jnp.repeat(params.zero, 12 // params.scale.shape[1], 1)
    r = jnp.round(u) + zero
    inside = (r >= params.q_min) & (r <= params.q_max)
    assert bool(((r == params.q_max) | (r == params.q_min)).any())  # codes ON a rail take part
    assert not bool(inside.all())
    # x / s backwards is g / s, times s: an ulp
    np.testing.assert_allclose(jax.grad(lambda a: q.fake(params, a).sum())(x), inside, rtol=1e-6)


def test_identity_and_32_bits():
    x = draw((3, 4))
    for q in (identity(), uniform(32)):
        np.testing.assert_array_equal(q.fake(q.init(x), x), x)
        np.testing.assert_array_equal(q.decode((), q.encode((), x)), x)


def test_mse_falls_fourfold_a_bit_on_minmax_grids():
    x = jax.random.normal(jax.random.key(0), (100, 16, 64))

    def mse(bits):
        q = uniform(bits, granularity="tensor")
        return float(
            jax.jit(jax.vmap(lambda a: ((q.fake(q.init(a), a) - a) ** 2).mean()))(x).mean()
        )

    errors = [mse(b) for b in range(5, 9)]
    ratios = np.divide(errors[:-1], errors[1:])
    assert np.all((ratios > 3.5) & (ratios < 4.5)), ratios


@pytest.mark.parametrize("symmetric", [False, True])
def test_per_channel_search_is_no_worse_than_per_tensor(symmetric):
    x = draw((8, 32), 3) * jnp.logspace(-1, 1, 8)[:, None]

    def mse(granularity):
        q = uniform(3, symmetric=symmetric, granularity=granularity, calibration="searched")
        return float(jnp.abs(q.fake(q.init(x), x) - x).sum())

    assert mse("channel") < mse("tensor")


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_registered_quantizers_jit_vmap_and_differentiate(name):
    q, x = QUANTIZERS[name](), draw((3, 6, 8), 4)
    stacked = jax.vmap(q.init)(x)
    codes = jax.jit(jax.vmap(q.encode))(stacked, x)
    for i in range(3):
        np.testing.assert_array_equal(codes[i], q.encode(q.init(x[i]), x[i]))
    assert bool(jnp.isfinite(jax.grad(lambda a: q.fake(q.init(x[0]), a).sum())(x[0])).all())


def brute_affine(x, bits, p=2.4, n=100):
    """Least sum |x - x_hat|^p over every fraction and zero point, in float64."""
    lo, hi = min(x.min(), 0.0), max(x.max(), 0.0)
    top = 2**bits - 1
    zeros = [0] if lo >= 0 else [top] if hi <= 0 else range(top + 1)
    best = np.inf
    for i in range(1, n + 1):
        s = (hi - lo) * i / n / top
        for z in zeros:
            x_hat = s * (np.clip(np.round(x / s) + z, 0, top) - z)
            best = min(best, (np.abs(x - x_hat) ** p).sum())
    return best


@pytest.mark.parametrize("sign", ["mixed", "positive", "negative"])
@pytest.mark.parametrize("bits", [2, 3])
def test_search_affine_reaches_the_brute_force_optimum(bits, sign):
    x = np.asarray(draw((3, 20), 5), np.float64) + 0.3
    x = {"mixed": x, "positive": np.abs(x), "negative": -np.abs(x)}[sign]
    scale, zero = search_affine(x, bits, 0)
    assert scale.shape == zero.shape == (3, 1)
    s, z, top = np.float64(scale), np.float64(zero), 2**bits - 1
    loss = (np.abs(x - s * (np.clip(np.round(x / s) + z, 0, top) - z)) ** 2.4).sum(1)
    expected = [brute_affine(row, bits) for row in x]
    # the search runs in f32: a code at a tie may fall the other way, which costs next to nothing
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    if sign != "mixed":  # zero stands at the end of the range
        np.testing.assert_array_equal(zero, 0 if sign == "positive" else top)
    one_s, one_z = search_affine(x, bits, None)
    assert one_s.shape == (1, 1)
    s, z = float(one_s.item()), float(one_z.item())
    loss = (np.abs(x - s * (np.clip(np.round(x / s) + z, 0, top) - z)) ** 2.4).sum()
    np.testing.assert_allclose(loss, brute_affine(x.ravel(), bits), rtol=1e-3)


def test_search_takes_the_axis_it_is_given():
    x = draw((4, 3, 5), 6)
    scale, zero = search_affine(x, 2, 1)
    assert scale.shape == zero.shape == (1, 3, 1)
    row = search_affine(x[:, 1], 2, None)
    np.testing.assert_allclose(scale[0, 1, 0], row[0].item(), rtol=1e-6)


def test_search_symmetric_reaches_the_brute_force_optimum():
    x = np.asarray(draw((1, 30), 7), np.float64)
    s = float(search_symmetric(x, 3, None).item())
    most = max(-x.min() / 4, x.max() / 3)

    def loss(s):
        return (np.abs(x - s * np.clip(np.round(x / s), -4, 3)) ** 2.4).sum()

    np.testing.assert_allclose(loss(s), min(loss(most * i / 100) for i in range(1, 101)), rtol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("calibration", ["searched", "minmax"])
def test_bits_and_granularity_as_data_give_the_static_grids(symmetric, calibration):
    w = draw((5, 16), 8)
    cells = [(b, g) for b in (2, 3, 4) for g in ("tensor", "channel")]
    options = dict(symmetric=symmetric, calibration=calibration)
    run = jax.vmap(lambda b, one: calibrate(w, b, one, max_bits=4, **options))
    grids = run(jnp.array([b for b, _ in cells]), jnp.array([g == "tensor" for _, g in cells]))
    for i, (bits, granularity) in enumerate(cells):
        one = make_grid(w, bits, granularity, **options)
        mine = jax.tree.map(lambda a, i=i: a[i], grids)
        np.testing.assert_allclose(mine.scale, one.scale, rtol=1e-6)
        np.testing.assert_array_equal(nearest_codes(w, mine), nearest_codes(w, one))


def test_symmetric_minmax_scale_and_floor():
    grid = make_grid(
        jnp.array([[-2.0, 6.0], [0.0, 0.0]]), 3, "channel", symmetric=True, calibration="minmax"
    )
    np.testing.assert_allclose(grid.scale[:, 0], [2.0, 6e-8], rtol=1e-6)  # max|w| / 3; never 0


@pytest.mark.parametrize("bad", [0, 9, 2.5, True])
def test_widths_that_no_grid_has_are_named(bad):
    with pytest.raises(ValueError, match=f"bits={bad!r}"):
        make_grid(jnp.ones((2, 2)), bad)


def test_granularity_errors_name_the_remedy():
    with pytest.raises(ValueError, match="group:g"):
        make_grid(jnp.ones((2, 4)), 2, "row")
    with pytest.raises(ValueError, match="does not divide in=4"):
        make_grid(jnp.ones((2, 4)), 2, "group:3")


@pytest.mark.parametrize("clip", ["after", "before"])
def test_lsq_step_gradient_against_its_closed_form(clip):
    x = 4 * draw((200,), 9)
    s, lo, hi = 0.7, -4, 3
    u = np.asarray(x, np.float64) / np.float32(s)
    r = np.round(u)
    inside = (r >= lo) & (r <= hi) if clip == "after" else (u >= lo) & (u <= hi)
    expected = np.where(inside, r - u, np.clip(r, lo, hi))
    grads = jax.vmap(jax.grad(lambda s, x: lsq_step(x, s, None, lo, hi, clip=clip), 0), (None, 0))
    np.testing.assert_allclose(grads(jnp.float32(s), x), expected, rtol=1e-4, atol=1e-5)
    half = jax.grad(lambda s: lsq_step(x, s, None, lo, hi, clip=clip, grad_scale=0.5).sum())
    np.testing.assert_allclose(half(jnp.float32(s)), expected.sum() / 2, rtol=1e-4)
