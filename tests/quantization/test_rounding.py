"""The rounding rules against closed forms, float64 and brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlab.quantization import (
    ROUNDING_RULES,
    adaquant,
    adaround,
    dequantize,
    flexround,
    lrq,
    make_grid,
    rtn,
)
from qlab.quantization.adaround import rectified_sigmoid
from qlab.quantization.grid import calibrate

RULES = sorted(ROUNDING_RULES)
RELAXED = ("adaround", "softmax", "tanh")  # soft lies between two codes


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomised(v, seed=0, size=0.3):
    leaves, tree = jax.tree.flatten(v)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [a + size * rng.standard_normal(a.shape).astype(np.float32) for a in leaves]
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:4"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_starts_at_rounding_to_nearest(name, granularity, symmetric):
    w = draw((6, 12), 1)
    grid = make_grid(w, 3, granularity, symmetric=symmetric)
    rule = ROUNDING_RULES[name]()
    v = rule.init(w, grid)
    near = rtn().hard((), w, grid)
    got = rule.hard(v, w, grid)
    np.testing.assert_array_equal(got.codes, near.codes)  # exp(log s) may be an ulp off s
    np.testing.assert_allclose(dequantize(got), dequantize(near), atol=1e-6, rtol=1e-6)
    if name in RELAXED:  # soft is w itself inside the range, h(V) being the fraction
        inside = (near.codes > grid.q_min) & (near.codes < grid.q_max)
        np.testing.assert_allclose(rule.soft(v, w, grid)[inside], w[inside], atol=1e-4)
    else:
        np.testing.assert_allclose(rule.soft(v, w, grid), dequantize(near), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", [r for r in RULES if r not in RELAXED])
def test_soft_equals_hard_and_lies_on_the_grid(name, granularity):
    """w_hat / s1 is an integer: the divisors S2, s3 do not come back in the dequantisation."""
    w = draw((6, 12), 2)
    grid = make_grid(w, 3, granularity)
    rule = ROUNDING_RULES[name]()
    v = randomised(rule.init(w, grid))
    qt = rule.hard(v, w, grid)
    np.testing.assert_allclose(rule.soft(v, w, grid), dequantize(qt), rtol=1e-6, atol=1e-7)
    steps = np.asarray(rule.soft(v, w, grid), np.float64) / np.asarray(qt.scale, np.float64)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
    assert qt.codes.min() >= 0
    assert qt.codes.max() <= 7
    if granularity == "tensor":
        assert np.unique(qt.scale).size == 1
    if jax.tree.leaves(v):
        assert not np.array_equal(qt.codes, rtn().hard((), w, grid).codes)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_jits_vmaps_and_has_finite_gradients(name):
    rule = ROUNDING_RULES[name]()
    w = draw((2, 5, 8), 3)
    grids = jax.vmap(lambda a: calibrate(a, 3, False, max_bits=3))(w)
    vs = jax.vmap(lambda a, g: randomised(rule.init(a, g), 1, 0.1))(w, grids)
    codes = jax.jit(jax.vmap(rule.hard))(vs, w, grids).codes
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], (vs, w, grids))
        np.testing.assert_array_equal(codes[i], rule.hard(*one).codes)
        loss = lambda v, w, g: (rule.soft(v, w, g) ** 2).sum() + rule.reg(v, 0.5)  # noqa: E731
        for g in jax.tree.leaves(jax.grad(loss)(*one)):
            assert bool(jnp.isfinite(g).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_flexround_gradients_against_the_closed_form(symmetric):
    """Inside: d/dlogS2 = -w / (S2 s3), d/dlog s1 = s1 (round(u) - u); outside: 0 and s1 times the code."""
    w = 2 * draw((5, 40), 4)
    grid = make_grid(w / 2, 3, "channel", symmetric=symmetric)
    rule = flexround()
    v = randomised(rule.init(w, grid), 2, 0.2)
    s1, s2, s3 = (np.exp(np.asarray(v[k], np.float64)) for k in ("s1", "S2", "s3"))
    zero = 0.0 if symmetric else np.asarray(grid.zero, np.float64)
    u = np.asarray(w, np.float64) / (s1 * s2 * s3)
    r = np.round(u) + zero
    lo, hi = float(grid.q_min), float(grid.q_max)
    inside = (r >= lo) & (r <= hi)
    rails = (r == lo) | (r == hi)
    assert rails.any()
    assert (~inside).any()
    upstream = np.asarray(draw(w.shape, 5), np.float64)
    grads = jax.grad(lambda v: (rule.soft(v, w, grid) * upstream).sum())(v)
    d_s2 = np.where(inside, -np.asarray(w) / (s2 * s3), 0.0) * upstream
    d_s1 = np.where(inside, s1 * (np.round(u) - u), s1 * (np.clip(r, lo, hi) - zero)) * upstream
    np.testing.assert_allclose(grads["S2"], d_s2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["s3"], d_s2.sum(1, keepdims=True), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads["s1"], d_s1.sum(1, keepdims=True), rtol=1e-4, atol=1e-4)


def test_flexround_keeps_the_sign_on_a_symmetric_grid_and_never_moves_zero():
    w = draw((6, 30), 6).at[:, 0].set(0.0)
    grid = make_grid(w, 3, "channel", symmetric=True)
    rule = flexround()
    v = randomised(rule.init(w, grid), 3, 1.0)
    w_hat = dequantize(rule.hard(v, w, grid))
    assert bool(((jnp.sign(w_hat) == jnp.sign(w)) | (w_hat == 0)).all())
    grads = jax.grad(lambda v: (rule.soft(v, w, grid) ** 2).sum())(v)
    np.testing.assert_array_equal(grads["S2"][:, 0], np.zeros(6))
    assert float(jnp.abs(grads["S2"]).max()) > 0


def test_flexround_scale_can_be_absorbed_by_the_divisors():
    """s1 -> c s1 with S2 -> S2 / c leaves the integers and scales w_hat by c."""
    w = draw((6, 30), 7)
    grid = make_grid(w, 3, "channel")
    rule = flexround()
    v = randomised(rule.init(w, grid), 4)
    c = 2.0  # a power of two: the divisor keeps its bits up to the rounding of the logs
    other = v | {"s1": v["s1"] + np.log(c), "S2": v["S2"] - np.log(c)}
    a, b = rule.hard(v, w, grid), rule.hard(other, w, grid)
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_allclose(dequantize(b), c * dequantize(a), rtol=1e-6)


def test_flexround_shared_scale_trains_as_one_scalar():
    """Bits and sharing are data: a row-wise parameter with shared=True equals a scalar one."""
    w, x = draw((4, 8), 8), draw((32, 8), 9)
    grid = make_grid(w, 3, "tensor")
    rule = flexround(use_s3=False)
    target = x @ w.T

    def scalar_soft(v, w):
        divisor = jnp.exp(v["s1"] + v["S2"])
        u = w / divisor
        r = u + jax.lax.stop_gradient(jnp.round(u) - u) + grid.zero
        r = jnp.where((r >= 0) & (r <= 7), r, jax.lax.stop_gradient(jnp.clip(r, 0, 7)))
        return jnp.exp(v["s1"]) * (r - grid.zero)

    def train(v, soft):
        opt = optax.adam(1e-2)

        def body(carry, _):
            v, s = carry
            g = jax.grad(lambda v: ((x @ soft(v).T - target) ** 2).mean())(v)
            updates, s = opt.update(g, s)
            return (optax.apply_updates(v, updates), s), None

        return jax.lax.scan(body, (v, opt.init(v)), None, 30)[0][0]

    mine = train(rule.init(w, grid), lambda v: rule.soft(v, w, grid))
    scalar = train(
        {"s1": jnp.log(grid.scale[0, 0]), "S2": jnp.zeros_like(w)}, lambda v: scalar_soft(v, w)
    )
    assert abs(float(scalar["s1"]) - float(jnp.log(grid.scale[0, 0]))) > 1e-2  # it did move
    np.testing.assert_allclose(mine["s1"][0, 0], scalar["s1"], rtol=1e-4)
    np.testing.assert_allclose(mine["S2"], scalar["S2"], atol=1e-4)


def test_flexround_convolution_divisor_is_per_input_channel():
    w = draw((4, 9 * 2), 10)  # (out, kh * kw * C), C = 2 fastest
    grid = make_grid(w, 4, "channel")
    rule = flexround(in_channels=2)
    v = rule.init(w, grid)
    assert v["s4"].shape == (1, 2)
    v["s4"] = jnp.log(jnp.array([[1.0, 0.5]]))
    expected = rule.hard(
        v | {"s4": jnp.zeros((1, 2))}, w * jnp.tile(jnp.array([1.0, 2.0]), 9), grid
    )
    np.testing.assert_array_equal(rule.hard(v, w, grid).codes, expected.codes)
    with pytest.raises(ValueError, match="in_channels=5"):
        flexround(in_channels=5).init(w, grid)


def test_flexround_switches():
    w = draw((4, 8), 11)
    grid = make_grid(w, 3, "channel")
    fixed = flexround(learn_s1=False, use_s3=False)
    v = fixed.init(w, grid)
    assert set(v) == {"S2"}
    np.testing.assert_allclose(fixed.hard(v, w, grid).scale, grid.scale, rtol=1e-6)
    clamp = flexround(parametrisation="clamp")
    v = clamp.init(w, grid)
    np.testing.assert_allclose(v["S2"], 1.0)
    np.testing.assert_array_equal(clamp.hard(v, w, grid).codes, rtn().hard((), w, grid).codes)
    halved = clamp.hard(v | {"S2": jnp.full_like(w, 0.5)}, w, grid)
    np.testing.assert_array_equal(halved.codes, rtn().hard((), 2 * w, grid).codes)
    wild = clamp.soft(v | {"S2": jnp.full_like(w, -3.0)}, w, grid)  # the clamp keeps it positive
    assert bool(jnp.isfinite(wild).all())
    with pytest.raises(ValueError, match="parametrisation='exp'"):
        flexround(parametrisation="exp")


def test_lrq_is_flexround_of_low_rank():
    w = draw((6, 10), 12)
    grid = make_grid(w, 3, "channel")
    rule, full = lrq(2), flexround()
    v = rule.init(w, grid, jax.random.key(1))
    np.testing.assert_array_equal(rule.soft(v, w, grid), full.soft(full.init(w, grid), w, grid))
    assert float(jnp.abs(v["U"]).max()) > 0
    v = randomised(v, 5)
    wide = {"s1": v["s1"], "s3": v["s3"], "S2": v["L"] @ v["U"] + v["c"]}
    np.testing.assert_array_equal(rule.hard(v, w, grid).codes, full.hard(wide, w, grid).codes)
    assert sum(a.size for a in jax.tree.leaves(v)) < sum(a.size for a in jax.tree.leaves(wide))


def test_adaround_start_hardening_and_regulariser():
    w = draw((5, 20), 13)
    grid = make_grid(w, 4, "channel")
    rule = adaround(reg_weight=1.0)
    v = rule.init(w, grid)
    u = np.asarray(w / grid.scale, np.float64)
    np.testing.assert_allclose(rectified_sigmoid(v), u - np.floor(u), atol=1e-5)
    up = np.floor(u + 0.5) + np.asarray(grid.zero)  # hard(V0) rounds to nearest
    np.testing.assert_array_equal(rule.hard(v, w, grid).codes, np.clip(up, 0, 15))
    half = jnp.zeros_like(w)  # h = 1/2 everywhere: each weight counts fully
    assert float(rule.reg(half, 0.5)) == pytest.approx(w.size)
    decided = jnp.where(v >= 0, 10.0, -10.0)
    assert float(rule.reg(decided, 0.9)) == 0.0
    assert float(rule.reg(half, 0.1)) == 0.0  # warm-up
    undecided = jnp.full_like(w, 1.0)
    h = float(rectified_sigmoid(jnp.float32(1.0)))
    for t, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        expected = w.size * (1 - abs(2 * h - 1) ** beta)
        assert float(rule.reg(undecided, t)) == pytest.approx(expected, rel=1e-4)


def test_adaquant_adds_whole_steps():
    w = draw((4, 8), 14)
    grid = make_grid(w, 3, "channel")
    rule = adaquant(learn_s1=False)
    v = {"add": jnp.ones_like(w)}
    near = rtn().hard((), w, grid).codes.astype(int)
    np.testing.assert_array_equal(rule.hard(v, w, grid).codes, np.clip(near + 1, 0, 7))


@pytest.mark.parametrize("name", ["adaround", "adaquant", "flexround", "lrq"])
def test_learned_rules_lie_between_brute_force_and_nearest(name):
    """W2, 5 inputs, fixed grid: no rule beats the best of 4^5 codes, each beats nearest."""
    from qlab.quantization.methods import squared_error
    from qlab.quantization.reconstruct import block_reconstruct

    rng = np.random.default_rng(3)
    # So many rows that what the last bit of a float changes in single ones does not show.
    w = jnp.asarray(rng.standard_normal((600, 5)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((64, 1)) + 0.5 * rng.standard_normal((64, 5)), jnp.float32)
    grid = make_grid(w, 2, "channel")
    options = {} if name == "adaround" else {"learn_s1": False}
    rule = ROUNDING_RULES[name](**options)

    def loss_fn(v, batch, key, t):
        return squared_error(batch @ rule.soft(v, w, grid).T, batch @ w.T) + rule.reg(v, t)

    # To 0, so that the integers stop.
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 800))
    run = jax.jit(
        lambda v: block_reconstruct(
            loss_fn, v, x, optimizer, 800, jax.random.key(0), batch_size=64
        )[0]
    )
    v = run(rule.init(w, grid, jax.random.key(1)))
    h = np.asarray(x.T @ x / 64, np.float64)
    w64, s, z = (np.asarray(a, np.float64) for a in (w, grid.scale, grid.zero))
    codes = np.array(list(itertools.product(range(4), repeat=5)), np.float64)

    def errors(q):
        e = s * (q - z) - w64
        return np.einsum("ri,ij,rj->r", e, h, e)

    best = np.array(
        [
            min(np.einsum("ci,ij,cj->c", e, h, e))
            for e in (s[r] * (codes - z[r]) - w64[r] for r in range(600))
        ]
    )
    got = errors(np.asarray(rule.hard(v, w, grid).codes, np.float64))
    near = errors(np.asarray(rtn().hard((), w, grid).codes, np.float64))
    assert np.all(got >= best * (1 - 1e-4))
    assert got.sum() < 0.95 * near.sum()
