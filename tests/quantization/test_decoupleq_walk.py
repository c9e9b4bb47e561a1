"""The walk over a net against layer after layer by hand; the block step against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlab.nn.chain import Layer, affine, forward
from qlab.nn.models import mlp
from qlab.quantization import (
    DecoupleQ,
    block_step,
    decoupleq_layer,
    dequantize,
    fit_affine,
    fp_target,
    pack_qtensor,
)
from qlab.quantization.decoupleq_walk import adam, decoupleq, shrink_gptq
from qlab.quantization.post_training import post_training
from qlab.quantization.tasks import Task, storage

MODEL = mlp((4, 6, 6, 6, 3))
NUM = 20
TASKS = (Task("w2", 2, "channel"), Task("w3", 3, "channel"))


def nets(key):
    layers = MODEL.layers(MODEL.init(key))
    return {"plain": tuple(Layer(a.w, 0.1 * jax.random.normal(key, a.b.shape)) for a in layers)}


def data():
    rng = np.random.default_rng(0)
    test = rng.random((30, 2, 2, 1)).astype(np.float32), rng.integers(0, 3, 30)
    return rng.random((40, 2, 2, 1)).astype(np.float32), test


def run(method, **options):
    exp = post_training(
        MODEL.chain, MODEL.shapes, nets, *data(), TASKS, method, num_calibration=NUM, **options
    )
    state = exp.init(jax.random.key(7))
    for phase in exp.phases:
        for _ in range(phase.num_steps):
            state, _ = phase.step(state)
    return exp, state


def records(state, t):
    """QTensors and biases of the net, layer after layer."""
    out = []
    for g in state.groups:
        for n in range(g.error.shape[1]):
            out += [
                jax.tree.map(lambda a, n=n: a[t, n], pair) for pair in zip(g.q, g.b_q, strict=True)
            ]
    return out


def by_hand(task, target):
    pool, _ = data()
    key = jax.random.key(7)
    layers = nets(jax.random.fold_in(key, 0))["plain"]
    pick = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 1), 0), len(pool))
    x_q = x_fp = jnp.asarray(pool)[pick[:NUM]]
    out = []
    for pre, a in zip(MODEL.chain.pre, layers, strict=True):
        x_q, x_fp = pre(x_q), pre(x_fp)
        h = x_q.T @ x_q / NUM
        w = a.w if target == "same" else fp_target(a.w, x_fp.T @ x_q / NUM, h, 0.01)
        out.append(jax.jit(lambda w, h: decoupleq_layer(w, h, DecoupleQ(task.bits))[0])(w, h))
        x_q, x_fp = affine(Layer(dequantize(out[-1]), a.b), x_q), affine(a, x_fp)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("target", "unit"), [("same", "layer"), ("same", "block"), ("fp", "net")])
def test_the_walk_is_layer_after_layer_whatever_the_unit(target, unit):
    exp, state = run(decoupleq(target=target), target=target, unit=unit)
    assert len(exp.phases) == {"layer": 4, "block": 2, "net": 1}[unit]
    for t, task in enumerate(TASKS):
        for (mine, _), theirs in zip(records(state, t), by_hand(task, target), strict=True):
            assert (mine.codes != theirs.codes).mean() < 0.05  # batched products may tip a tie
            same = (np.asarray(mine.codes) == theirs.codes).all(1)
            np.testing.assert_allclose(mine.scale[same], theirs.scale[same], rtol=1e-2, atol=1e-4)
            np.testing.assert_allclose(mine.offset[same], theirs.offset[same], rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def blocks():
    """Blocks of two layers with biases trained, and without a block step."""
    plain = run(decoupleq(DecoupleQ(num_outer=2)), target="same", unit="block")
    method = decoupleq(
        DecoupleQ(num_outer=2),
        num_steps=60,
        optimizer=adam(3e-3),
        train=("scale", "offset", "extra"),
    )
    return plain, run(method, target="same", unit="block")


@pytest.mark.slow
def test_the_block_step_moves_floats_only_and_lowers_the_error(blocks):
    (_, plain), (exp, tuned) = blocks
    for t in range(2):
        (first, b), (moved, b_moved) = records(plain, t)[0], records(tuned, t)[0]
        np.testing.assert_array_equal(first.codes, moved.codes)
        assert not np.array_equal(first.scale, moved.scale)
        assert not np.array_equal(first.offset, moved.offset)
        assert not np.array_equal(b, b_moved)
    for g, h in zip(plain.groups, tuned.groups, strict=True):
        assert (h.carry.block[:, 1] <= h.carry.block[:, 0]).all()
        if g is plain.groups[0]:  # the first block has the same inputs in both
            assert (h.error[:, 0, 0] < g.error[:, 0, 0]).all()
    _, (x, y) = data()
    for t, task in enumerate(TASKS):  # and the trained biases are those that are evaluated
        net = [Layer(dequantize(q), b) for q, b in records(tuned, t)]
        right = np.asarray(forward(MODEL.chain, net, jnp.asarray(x))).argmax(-1) == y
        assert float(exp.evaluate(tuned)[f"{task.name}/accuracy"]) == pytest.approx(
            100 * right.mean(), abs=1e-3
        )


@pytest.mark.slow
def test_groups_symmetry_and_their_storage():
    for options, method in (
        ({"group": 2}, decoupleq(DecoupleQ(num_outer=2))),
        ({"symmetric": True}, shrink_gptq()),
    ):
        exp, state = run(method, target="same", grid_options=options)
        q = state.groups[0].q[0]
        assert q.scale.shape == (2, 1, 6, 2 if "group" in options else 1)
        assert (q.offset is None) == ("symmetric" in options)
        # codes are held at the widest task's bits, so W3's bytes are those of the arrays
        held = [
            pack_qtensor(jax.tree.map(lambda a, n=n: a[1, n], g.q[0]))
            for g in state.groups
            for n in range(g.error.shape[1])
        ]
        assert float(exp.evaluate(state)["w3/bytes"]) == sum(qt.nbytes for qt in held)


def test_storage_of_real_offsets_and_groups():
    task = Task("w2", 2, "channel")
    assert storage([(10, 16)], task, {"offset": True})["bytes"] == 10 * (4 + 8)
    assert storage([(10, 16)], task, {"group": 8})["bytes"] == 10 * (4 + 2 * 5)
    assert storage([(10, 16)], task, {"group": 8, "symmetric": True})["bytes"] == 10 * (4 + 2 * 4)


def test_a_group_that_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"group=4 does not divide the inputs of all layers \(4, 6, 6, 6\)"
    ):
        run(decoupleq(), grid_options={"group": 4})
    with pytest.raises(ValueError, match="num_outer=-1"):
        decoupleq(DecoupleQ(num_outer=-1))


# The block step alone


def block(seed=0):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((64, 8)) + rng.standard_normal((64, 1)), jnp.float32)
    h = x.T @ x / 64
    return w, x, h, jax.jit(lambda w, h: decoupleq_layer(w, h, DecoupleQ(num_outer=1))[0])(w, h)


def linear(w_hat, extra, x):
    del extra
    return x @ w_hat[0].T


@pytest.mark.slow
def test_on_one_linear_layer_the_block_step_finds_the_float_step():
    w, x, h, qt = block()
    best = fit_affine(qt.codes, w, h)
    (got,), _, losses = jax.jit(
        lambda qt: block_step(
            linear, (qt,), (), x, x @ w.T, optax.adam(optax.cosine_decay_schedule(0.03, 1500)),
            jax.random.key(0), num_steps=1500, batch_size=64,
        )
    )(qt)  # fmt: skip
    np.testing.assert_array_equal(got.codes, qt.codes)
    np.testing.assert_allclose(losses[1] * 5, best.err.sum(), rtol=1e-3)
    assert losses[1] < losses[0]
    np.testing.assert_allclose(got.scale, best.scale, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(got.offset, best.offset, rtol=2e-2, atol=5e-3)


def test_only_what_is_named_moves_and_nothing_gets_worse():
    w, x, _, qt = block(1)
    y = x @ w.T

    def scaled(w_hat, extra, x):
        return linear(w_hat, (), x) * extra["norm"] + extra["bias"]

    extra = {"norm": jnp.ones(5), "bias": jnp.zeros(5)}

    def go(rate, train, num_steps=20, mask=None):
        return block_step(
            scaled,
            (qt,),
            extra,
            x,
            y,
            adam(rate),
            jax.random.key(0),
            num_steps=num_steps,
            train=train,
            mask=mask,
        )

    for train in (("scale",), ("offset", "extra")):
        (got,), other, losses = go(1e-3, train)
        assert losses[1] < losses[0]
        assert np.array_equal(got.scale, qt.scale) == ("scale" not in train)
        assert np.array_equal(got.offset, qt.offset) == ("offset" not in train)
        for name in extra:
            assert np.array_equal(other[name], extra[name]) == ("extra" not in train)
    (worse,), other, losses = go(50.0, ("scale", "extra"))
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(worse.scale, qt.scale)
    np.testing.assert_array_equal(other["norm"], extra["norm"])
    (same,), _, losses = go(1e-3, ("scale",), num_steps=0)
    np.testing.assert_array_equal(same.scale, qt.scale)
    # masked samples count for nothing
    mask = jnp.arange(64) < 32
    expected = ((x @ dequantize(qt).T - y)[:32] ** 2).mean()
    np.testing.assert_allclose(go(1e-3, ("scale",), 0, mask)[2][0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"train=\('codes',\)"):
        go(1e-3, ("codes",))
