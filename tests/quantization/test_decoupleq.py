"""decoupleQ's layer algorithm against enumeration, a float64 copy and turns by hand; the record against its product."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab import ops
from qlab.lab.errors import UserError
from qlab.quantization import (
    DecoupleQ,
    decoupleq_layer,
    dequantize,
    fit_affine,
    gptq_round,
    quantize_matrix,
    shrink_search,
)
from qlab.quantization.affine_fit import minmax, nearest, width_of
from qlab.quantization.decoupleq import all_codes, projected

SHAPE = (16, 8)  # one for most tests: a compiled layer takes seconds


def problem(shape=SHAPE, seed=0, samples=64):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    x = rng.standard_normal((samples, 1)) + 0.4 * rng.standard_normal((samples, shape[1])) + 0.3
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x / samples, jnp.float32)


@cache
def layer(**options):
    return jax.jit(partial(decoupleq_layer, cfg=DecoupleQ(**options)))


gptq = jax.jit(partial(gptq_round, ties="half_up"))
fit = jax.jit(fit_affine, static_argnames=("group", "symmetric"))


def damped(h, damp=0.01):
    h = np.float64(h)
    return h + damp * np.diag(h).mean() * np.eye(len(h))


def loss(w_hat, w, h):
    e = np.float64(w_hat) - np.float64(w)
    return np.einsum("oi,ij,oj->o", e, np.float64(h), e)


# The integer step


def grid(seed):
    w, h = problem((6, 8), seed)
    return w, h, *minmax(w, -2.0, 1.0)


PROJECTED = DecoupleQ(iters=5, inner=5, learning_rate=2e-2)  # few steps: the bias correction counts
SOLVERS = {
    "nearest": lambda w, h, s, z: nearest(w, s, z, -2.0, 1.0),
    "train": lambda w, h, s, z: projected(
        w, h, s, z, -2.0, 1.0, PROJECTED, jnp.argsort(-jnp.diagonal(h))
    ),
    "gptq": lambda w, h, s, z: gptq(w, h, s, z, -2, 1),
    "exhaustive": lambda w, h, s, z: all_codes(
        w[:, :5], h[:5, :5], *(jnp.broadcast_to(a, (6, 5)) for a in (s, z)), -2.0, 1.0, 2
    ),
}
SOLVERS = {k: v if k == "gptq" else jax.jit(v) for k, v in SOLVERS.items()}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_negative_scale_is_the_same_grid_mirrored(name):
    """q s + z = (-1 - q) (-s) + (z - s): levels and weights are the same."""
    w, h, s, z = grid(8)
    q, mirrored = SOLVERS[name](w, h, s, z), SOLVERS[name](w, h, -s, z - s)
    assert len(np.unique(q)) == 4
    np.testing.assert_array_equal(mirrored, -1 - q)


def test_halves_go_up():
    w = jnp.array([[-1.5, -0.5, 0.5, 1.5]])
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    assert nearest(w, one, zero, -8, 7).tolist() == [[-1, 0, 1, 2]]
    assert SOLVERS["gptq"](w, jnp.eye(4), one, zero + 0.5).tolist() == [[-2, -1, 0, 1]]


def test_a_scale_of_zero_is_no_division_by_it():
    assert np.asarray(
        nearest(jnp.ones((1, 2)), jnp.zeros((1, 1)), jnp.ones((1, 1)), -2, 1)
    ).tolist() == [[0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_all_codes_are_tried_and_no_solver_is_better(seed):
    w, h, s, z = grid(seed + 20)
    w, h = w[:, :5], damped(h[:5, :5])
    codes = np.array(list(itertools.product(range(-2, 2), repeat=5)))
    s64, z64 = np.float64(s), np.float64(z)
    best = np.array([loss(codes * s64[r] + z64[r], np.float64(w[r]), h).min() for r in range(6)])
    h = jnp.asarray(h, jnp.float32)
    q = {name: f(w, h, s, z) for name, f in SOLVERS.items()}
    got = {name: loss(q[name] * s64 + z64, w, h) for name in q}
    np.testing.assert_allclose(got["exhaustive"], best, rtol=1e-4)
    for name in ("nearest", "gptq", "train"):
        assert (got[name] >= best * (1 - 1e-4)).all()
    for name in ("gptq", "train"):
        assert got[name].sum() < got["nearest"].sum()


def numpy_projected(w, h, s, z, order, iters, inner, rate):
    w, h, s, z = (np.float64(a) for a in (w, h, s, z))
    low, high = np.minimum(-2 * s, s) + z, np.maximum(-2 * s, s) + z
    v, m, n, t = w.copy(), np.zeros_like(w), np.zeros_like(w), 0
    low, high = (np.broadcast_to(a, w.shape) for a in (low, high))

    def adam(columns, eps):
        nonlocal t
        t += 1
        g = ((v - w) @ h)[:, columns]
        m[:, columns] = 0.9 * m[:, columns] + 0.1 * g
        n[:, columns] = 0.999 * n[:, columns] + 0.001 * g**2
        size = np.sqrt(n[:, columns]) / np.sqrt(1 - 0.999**t) + eps
        v[:, columns] -= rate / (1 - 0.9**t) * m[:, columns] / size
        v[:, columns] = np.clip(v[:, columns], low[:, columns], high[:, columns])

    for _ in range(iters):
        adam(np.arange(w.shape[1]), 1e-5)
    for k, i in enumerate(order[:-1]):
        v[:, i] = np.clip(np.floor((v[:, i] - z[:, 0]) / s[:, 0] + 0.5), -2, 1) * s[:, 0] + z[:, 0]
        for _ in range(inner):
            adam(order[k + 1 :], 1e-4)
    return np.clip(np.floor((v - z) / s + 0.5), -2, 1)


def test_projected_adam_equals_its_float64_copy():
    w, h, s, z = grid(9)
    order = np.argsort(-np.diag(h))
    got = SOLVERS["train"](w, h, s, z)
    expected = numpy_projected(w, h, s, z, order, 5, 5, 2e-2)
    assert (np.asarray(got) != expected).mean() <= 0.021  # one weight at a tie may tip
    assert (np.asarray(got) != np.asarray(nearest(w, s, z, -2, 1))).mean() > 0.05


# The alternation


def test_a_diagonal_hessian_makes_gptq_nearest():
    w, _ = problem(seed=10)
    h = jnp.diag(jnp.arange(1.0, 9.0))
    a, b = layer(num_outer=0)(w, h)[0], layer(num_outer=1)(w, h)[0]
    np.testing.assert_array_equal(a.codes, b.codes)


def test_one_turn_is_gptq_on_the_min_max_grid_where_that_is_better_than_nearest():
    w, h = problem(seed=11)
    qt, history = layer(num_outer=1)(w, h)
    s, z = minmax(w, -2, 1)
    hd = jnp.asarray(damped(h), jnp.float32)
    perm = jnp.argsort(-jnp.diagonal(hd))
    q = gptq(w, hd, s, z, -2, 1, perm=perm)
    near = nearest(w, s, z, -2, 1)
    keep = loss(q * s + z, w, hd) < loss(near * s + z, w, hd)
    np.testing.assert_array_equal(qt.codes, np.where(keep[:, None], q, near) + 2)
    np.testing.assert_allclose(history[0], loss(near * s + z, w, hd).sum(), rtol=1e-4)


def test_two_turns_by_hand():
    """GPTQ or nearest on the min/max grid; the searched range, refitted, and GPTQ on it; the best floats."""
    w, h = problem(seed=13)
    qt, history = layer(num_outer=2)(w, h)
    hd = jnp.asarray(damped(h), jnp.float32)
    perm = jnp.argsort(-jnp.diagonal(hd))
    s, z = minmax(w, -2, 1)
    candidates = [(nearest(w, s, z, -2, 1), s, z)]
    candidates.append((gptq(w, hd, s, z, -2, 1, perm=perm), s, z))
    s, z = shrink_search(w, hd, 2)
    s, z, _ = fit(nearest(w, s, z, -2, 1), w, hd)
    candidates.append((gptq(w, hd, s, z, -2, 1, perm=perm), s, z))
    losses = np.stack([loss(q * s + z, w, hd) for q, s, z in candidates])
    best = losses.argmin(0)
    assert len(set(best)) > 1
    q = np.stack([np.asarray(q) for q, _, _ in candidates])[best, np.arange(16)]
    np.testing.assert_array_equal(qt.codes, q + 2)
    expected = [losses[0], losses[:2].min(0), losses.min(0), fit(q, w, hd).err]
    np.testing.assert_allclose(history, np.sum(expected, 1), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"group": 3}, marks=pytest.mark.slow),
        pytest.param({"symmetric": True}, marks=pytest.mark.slow),
        pytest.param({"float_step": False}, marks=pytest.mark.slow),
    ],
)
def test_history_falls_and_ends_at_the_loss_of_the_record(options):
    w, h = problem(seed=12)
    qt, history = layer(**options)(w, h)
    history = np.asarray(history)
    assert len(history) == (5 if "float_step" in options else 8)
    assert (np.diff(history) <= 0).all()
    np.testing.assert_allclose(history[-1], loss(dequantize(qt), w, damped(h)).sum(), rtol=1e-4)
    assert history[-1] < 0.9 * history[1]  # and it does something beyond GPTQ
    assert qt.shape == (16, 8)
    if "float_step" not in options:  # the floats are the best for the integers
        hd = jnp.asarray(damped(h), jnp.float32)
        best = fit(qt.codes[:, :8], w, hd, options.get("group", 8), qt.signed).err
        np.testing.assert_allclose(loss(dequantize(qt), w, hd), best, rtol=1e-3)


def test_more_turns_and_a_search_start_no_worse():
    w, h = problem(seed=13)
    losses = [float(layer(num_outer=k)(w, h)[1][-1]) for k in (0, 1, 2)]
    losses.append(float(layer()(w, h)[1][-1]))
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["gptq", "exhaustive"])
@pytest.mark.parametrize("seed", range(3))
def test_enumeration_with_the_best_floats_is_a_lower_bound(seed, solver):
    w, h = problem((6, 5), seed)
    codes = [np.array(c) for c in itertools.product(range(-2, 2), repeat=5)]
    hd = damped(h)
    root = np.linalg.cholesky(hd).T
    best = []
    for r in range(2):
        target = root @ np.float64(w[r])
        pairs = (root @ np.stack([c, np.ones(5)], 1) for c in codes)
        best.append(
            min(
                np.sum((a @ np.linalg.lstsq(a, target, rcond=None)[0] - target) ** 2) for a in pairs
            )
        )
    qt, _ = layer(solver=solver)(w, h)
    got = loss(dequantize(qt), w, hd)[:2]
    assert (got >= np.array(best) * (1 - 1e-3) - 1e-6).all()
    if solver == "exhaustive":
        assert (got < 20 * np.array(best) + 0.05).all()


@pytest.mark.parametrize("options", [{}, pytest.param({"group": 3}, marks=pytest.mark.slow)])
def test_weights_on_a_grid_are_found_exactly(options):
    rng = np.random.default_rng(14)
    q = rng.integers(-2, 2, SHAPE)
    q[:, [0, 3, 6]], q[:, [1, 4, 7]] = -2, 1  # both ends of every group: min/max is the grid
    s, z = rng.uniform(0.5, 1, (16, 1)), rng.uniform(-0.3, 0.3, (16, 1))
    _, h = problem(seed=14)
    w = jnp.asarray(q * s + z, jnp.float32)
    qt, history = layer(**options)(w, h)
    if not options:  # three weights lie on several grids
        np.testing.assert_array_equal(qt.codes, q + 2)
    assert float(history[-1]) < 1e-9
    np.testing.assert_allclose(dequantize(qt), w, atol=1e-5)
    got = fit(q, w, h)
    np.testing.assert_allclose(got.scale, s, rtol=1e-4)
    np.testing.assert_allclose(got.offset, z, atol=1e-4)


@pytest.mark.parametrize("factor", [2.0**-40, 4.0, 3.0])
def test_scaled_weights_scale_the_floats_and_leave_the_codes(factor):
    w, h = problem(seed=15)
    one, other = layer()(w, h)[0], layer()(w * factor, h)[0]
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_allclose(other.scale, factor * one.scale, rtol=1e-4)
    np.testing.assert_allclose(other.offset, factor * one.offset, rtol=1e-3, atol=1e-4 * factor)


@pytest.mark.slow
def test_a_group_of_the_whole_row_is_no_group():
    w, h = problem(seed=16)
    plain, grouped = layer()(w, h), layer(group=8)(w, h)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(grouped), strict=True):
        np.testing.assert_array_equal(a, b)
    assert width_of(-1, 8) == width_of(0, 8) == width_of(100, 8) == 8


def test_rows_are_independent():
    w, h = problem(seed=17)
    whole = dequantize(layer()(w, h)[0])
    turned = dequantize(layer()(jnp.roll(w, 3, 0), h)[0])
    np.testing.assert_allclose(jnp.roll(turned, -3, 0), whole, rtol=1e-4, atol=1e-5)


def test_degenerate_rows_and_dead_inputs():
    w, h = problem(seed=18)
    w = w.at[0].set(0.0).at[1].set(0.8).at[2].set(-0.8).at[3, 1:].set(0.0)
    h = h.at[2].set(0.0).at[:, 2].set(0.0)
    qt, history = layer()(w, h)
    assert np.isfinite(dequantize(qt)).all()
    assert np.isfinite(history).all()
    np.testing.assert_allclose(dequantize(qt)[:3], w[:3], atol=1e-5)
    _, flat = layer()(w, jnp.zeros_like(h))  # inputs that say nothing: nearest stays
    assert not np.asarray(flat).any()


@pytest.mark.parametrize(
    ("options", "width", "message"),
    [
        ({"solver": "gtpq"}, 4, "solver='gtpq'"),
        ({"num_outer": -1}, 4, "num_outer=-1"),
        ({"bits": 9}, 4, "bits=9 is no width"),
        ({"solver": "exhaustive"}, 11, r"would try 2\^22 rows of codes \(11 inputs, 2 bits\)"),
    ],
)
def test_what_cannot_run_is_one_line(options, width, message):
    with pytest.raises(ValueError, match=message) as e:
        decoupleq_layer(jnp.ones((2, width)), jnp.eye(width), DecoupleQ(**options))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"h \(3, 3\); \(out, in\) and \(in, in\)"):
        decoupleq_layer(jnp.ones((2, 4)), jnp.eye(3))


# The record


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group:8"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"symmetric": True}, marks=pytest.mark.slow),
    ],
)
def test_packed_product_is_the_product_with_the_dequantized_record(options):
    rng = np.random.default_rng(19)
    w, x = rng.standard_normal((5, 20)), rng.standard_normal((64, 20)).cumsum(1)
    qt = quantize_matrix(w, x, method="decoupleq", bits=2, **options)
    assert (qt.offset is None) == ("symmetric" in options)
    packed = ops.pack(qt)
    np.testing.assert_array_equal(ops.unpack(packed).codes, qt.codes)
    np.testing.assert_array_equal(dequantize(packed), dequantize(qt))
    x = jnp.asarray(x, jnp.float32)
    expected = np.float64(x) @ np.float64(dequantize(qt)).T
    got = np.asarray(ops.matmul(x, packed))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_own_matrices_of_awkward_shapes():
    rng = np.random.default_rng(20)
    for shape, bits in (((1, 1), 2), ((3, 1), 1), ((1, 9), 8)):
        w, x = rng.standard_normal(shape), rng.standard_normal((4, shape[1]))
        w_hat = dequantize(quantize_matrix(w, x, method="decoupleq", bits=bits))
        assert w_hat.shape == shape
        assert loss(w_hat, w, np.eye(shape[1])).sum() < 0.5 * (w**2).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "tensor"}, "fits scales to rows or groups"),
        ({"x_calib": np.zeros((5, 8))}, "nothing but zeros"),
        ({"x_calib": None}, "needs x_calib"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(change, message):
    w, x = np.ones((2, 8)), np.ones((5, 8))
    with pytest.raises(UserError, match=message) as e:
        quantize_matrix(**{"w": w, "x_calib": x, "method": "decoupleq", **change})
    assert "\n" not in str(e.value)
