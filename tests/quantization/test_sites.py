"""Nets with sites, block-wise quantization, transforms and the study on them: against NumPy and each other."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from qlab import ops
from qlab.nn.sites import FLOAT, Run, block_net, capture, pick, sites
from qlab.nn.vit import Encoder
from qlab.quantization import observers as obs
from qlab.quantization.activations import Log, affine, minmax
from qlab.quantization.blocks import (
    fake_run,
    float_act,
    gptq_weight,
    nearest_weight,
    packed_run,
    quantize_block,
    run_blocks,
    site_by_site,
)
from qlab.quantization.qtensor import QTensor
from qlab.quantization.site_study import TESTED, Cell, site_study
from qlab.quantization.transforms import Transform, chain, identity, scale_norm, smooth_scale

run_block = jax.jit(lambda block, params, x: block(params, x), static_argnums=0)
apply = jax.jit(lambda net, params, x: net.apply(params, x), static_argnums=0)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (12, 8, 8, 1))


def captured(block, p, x):
    """`capture` compiled, and the order of the sites, which jit would return by alphabet."""
    y, seen = _capture(block, p, x)
    return y, seen, ORDER[block]


ORDER = {}


@partial(jax.jit, static_argnums=0)
def _capture(block, p, x):
    y, seen = capture(block, p, x)
    ORDER[block] = list(seen)
    return y, seen


def test_a_group_runs_as_its_blocks_one_by_one(net, params, x):
    y = x
    for group, stacked in zip(net.groups, params, strict=True):
        for i in range(group.n):
            y = run_block(group.block, pick(stacked, i), y)
    np.testing.assert_allclose(apply(net, params, x), y, rtol=1e-5, atol=1e-5)


def test_encoder_equals_attention_written_out(params, net):
    p = jax.tree.map(np.float64, pick(params[1], 0))
    h = np.random.default_rng(0).standard_normal((3, 5, 16))

    def norm(x, q):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * q["scale"] + q["bias"]

    def lin(x, q):
        return x @ q["kernel"] + q["bias"]

    qkv = lin(norm(h, p["norm1"]), p["qkv"])
    out = np.zeros_like(h)
    for n in range(3):
        for head in range(2):
            q, k, v = (qkv[n][:, i * 16 + head * 8 : i * 16 + head * 8 + 8] for i in range(3))
            s = np.exp(q @ k.T / np.sqrt(8.0))
            out[n][:, head * 8 : head * 8 + 8] = s / s.sum(-1, keepdims=True) @ v
    y = h + lin(out, p["proj"])
    f = lin(norm(y, p["norm2"]), p["fc1"])
    y = y + lin(0.5 * f * (1 + erf(f / np.sqrt(2))), p["fc2"])
    got = run_block(net.groups[1].block, pick(params[1], 0), jnp.asarray(h, jnp.float32))
    np.testing.assert_allclose(got, y, rtol=2e-4, atol=2e-4)


def test_capture_and_sites_agree(net, params):
    tokens = jax.random.normal(jax.random.key(2), (12, 16, 16))
    block, p = net.groups[1].block, pick(params[1], 0)
    y, seen, order = captured(block, p, tokens)
    found = sites(block, p, tokens)
    assert [s.name for s in found] == order == ["qkv", "q", "k", "probs", "v", "proj", "fc1", "fc2"]
    assert [s.shape for s in found] == [seen[site].shape for site in order]
    assert [(s.out, s.width) for s in found if s.kind == "linear"] == [
        (48, 16),
        (16, 16),
        (32, 16),
        (16, 32),
    ]
    np.testing.assert_allclose(y, run_block(block, p, tokens), rtol=1e-5, atol=1e-5)


def test_blocks_of_a_group_must_be_alike_and_sites_unique():
    with pytest.raises(ValueError, match="group 'body' differ"):
        block_net(("body",), lambda rngs: [[Encoder(8, 2, h, rngs=rngs) for h in (8, 16)]])

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x, run=FLOAT):
            return run.linear("a", self.a, run.linear("a", self.a, x))

    net = block_net(("twice",), lambda rngs: [[Twice(rngs)]])
    with pytest.raises(ValueError, match="two sites of a block are called 'a'"):
        capture(net.groups[0].block, pick(net.init(jax.random.key(0))[0], 0), jnp.ones((1, 2)))


def test_calibrate_is_one_pass_for_any_sites(net, params, x):
    batches = [x[:6], x[6:]]
    stats = obs.calibrate(net, params, batches, {"qkv": obs.minmax(), "head/head": obs.moments()})
    assert set(stats) == {"encoder.0/qkv", "encoder.1/qkv", "head/head"}
    block = net.groups[1].block
    tokens = run_block(net.groups[0].block, pick(params[0], 0), x)
    seen = captured(block, pick(params[1], 1), run_block(block, pick(params[1], 0), tokens))[1]
    want = seen["qkv"].min(), seen["qkv"].max()
    np.testing.assert_allclose(stats["encoder.1/qkv"], want, rtol=1e-4)
    with pytest.raises(ValueError, match=r"no site is called .qvk.; there are encoder\.0/fc1"):
        obs.calibrate(net, params, batches, {"qvk": obs.minmax()})
    with pytest.raises(ValueError, match="no batch"):
        obs.calibrate(net, params, [], {})


# -- blocks


def _act(i):
    return (
        Log(jnp.float32(1.0), 2.0**i.bits) if i.site == "probs" else affine(*minmax(i.x_fp), i.bits)
    )


def _weight(i):
    """GPTQ at one site of an encoder, nearest elsewhere."""
    make = gptq_weight if i.site == "qkv" else nearest_weight
    return make(calibration="minmax")(i)


METHOD = site_by_site(act=_act, weight=_weight)


@partial(jax.jit, static_argnums=0)
def _one(block, p, x_q, x_fp, bits):
    q, failed = METHOD(block, p, x_q, x_fp, bits, bits, jax.random.key(0))
    return q, failed, block(q.params, x_q, fake_run(q)), block(p, x_fp)


@pytest.fixture(scope="module")
def walks(net, params, x):
    """{bits: (blocks, quantized output, float output)}, block after block by hand."""
    made = {}
    for bits in (8, 4):
        out, x_q, x_fp = [], x, x
        for g, stacked in zip(net.groups, params, strict=True):
            blocks = []
            for i in range(g.n):
                q, failed, x_q, x_fp = _one(g.block, pick(stacked, i), x_q, x_fp, float(bits))
                assert float(failed) == 0.0
                blocks.append(q)
            out.append(jax.tree.map(lambda *a: jnp.stack(a), *blocks))
        made[bits] = (tuple(out), x_q, x_fp)
    return made


run_fake = jax.jit(run_blocks, static_argnums=0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_execution_equals_the_fake_one(net, x, walks, bits, monkeypatch):
    blocks, y, _ = walks[bits]
    np.testing.assert_allclose(run_fake(net, blocks, x), y, rtol=1e-4, atol=1e-4)
    # Codes of any width are made by one program; how wide they are stored is said here.
    narrow = jax.tree.map(
        lambda q: dataclasses.replace(q, bits=bits) if isinstance(q, QTensor) else q,
        blocks,
        is_leaf=lambda q: isinstance(q, QTensor),
    )
    products, int8 = [], ops.int8_matmul
    monkeypatch.setattr(ops, "int8_matmul", lambda *a, **k: (products.append(1), int8(*a, **k))[1])
    packed = jax.jit(lambda x: run_blocks(net, narrow, x, packed_run))(x)
    assert len(products) == 1 + 2 * 4 + 1  # all of them in integers
    # a value on the edge between two codes may fall to either side
    gap = np.abs(packed - y) / np.abs(y).max()
    assert np.median(gap) < 1e-5
    assert gap.max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_every_site_is_on_its_grid(walks, bits):
    q = pick(walks[bits][0][1], 0)
    assert set(q.weights) == {"qkv", "proj", "fc1", "fc2"}
    assert set(q.acts) == {"qkv", "q", "k", "probs", "v", "proj", "fc1", "fc2"}
    assert max(int(w.codes.max()) for w in q.weights.values()) == 2**bits - 1


def test_float_sites_change_nothing(net, params, x):
    g = net.groups[0]
    q, _ = quantize_block(
        g.block, pick(params[0], 0), x, x, 4.0, 4.0, jax.random.key(0),
        act=float_act, weight=lambda i: None,
    )  # fmt: skip
    assert not q.weights
    assert not q.acts
    np.testing.assert_array_equal(g.block(q.params, x, fake_run(q)), g.block(pick(params[0], 0), x))


# -- transforms


def _smoother(net):
    """SmoothQuant at qkv and fc1 of an encoder."""

    def init(params, x, key):
        return jax.random.uniform(key, (2, 2, 16), minval=0.2, maxval=5.0)

    def apply(params, t):
        block = scale_norm(params[1], "norm1", ("qkv",), t[0])
        return params[0], scale_norm(block, "norm2", ("fc1",), t[1]), params[2]

    return Transform(init, apply)


@pytest.mark.parametrize("which", ["identity", "scale", "chain"])
def test_transforms_keep_the_function(net, params, x, which):
    made = {
        "identity": identity(),
        "scale": _smoother(net),
        "chain": chain(_smoother(net), _smoother(net)),
    }[which]
    new = made(params, x, jax.random.key(3))
    y = apply(net, params, x)
    np.testing.assert_allclose(apply(net, new, x), y, atol=1e-4 * float(jnp.abs(y).max()))
    if which != "identity":
        assert not np.allclose(new[1]["qkv"]["kernel"], params[1]["qkv"]["kernel"])


def test_smooth_scale_balances_inputs_and_weights():
    a, w = jnp.array([8.0, 1.0]), jnp.array([2.0, 1.0])
    s = smooth_scale(a, w)
    np.testing.assert_allclose(a / s, w * s, rtol=1e-6)  # alpha = 1/2: both sides equal


# -- the study


@pytest.mark.slow  # each smoke study runs one too
def test_site_study_runs_cells_as_a_walk_by_hand(net, params, x, walks):
    labels = np.arange(12, dtype=np.int32) % 10
    cells = [Cell("w8a8", 8, 8), Cell("w4a4", 4, 4), Cell("w4a4", 4, 4, run=1)]
    study = site_study(
        net, lambda key: {"plain": params}, np.asarray(x), (np.asarray(x), labels), cells, METHOD,
        num_calibration=12, vary=("method",),
    )  # fmt: skip
    state = study.init(jax.random.key(0))
    (phase,) = study.phases
    assert phase.num_steps == 3 * (4 + 1)
    errors = []
    for _ in range(phase.num_steps):
        state, metrics = phase.step(state)
        errors.append(float(metrics["error"]))
    values = study.evaluate(state)
    assert {f"w4a4/{m}" for m in TESTED} < set(values)
    assert float(values["w4a4/variance_method"]) == 0.0  # nothing here is random
    assert float(values["w4a4/sites_total"]) == 2 + 2 * 12 + 2
    for bits, last in ((8, 3), (4, 8)):
        _, y, y_fp = walks[bits]  # on the same images, in another order
        gap = float(((y - y_fp) ** 2).mean() / (y_fp**2).mean())
        np.testing.assert_allclose(values[f"w{bits}a{bits}/error"], gap, rtol=0.05)
        assert errors[last] == float(values[f"w{bits}a{bits}/error"])  # of the last block
        right = 100 * (y.argmax(-1) == labels).mean()
        np.testing.assert_allclose(values[f"w{bits}a{bits}/accuracy"], right, atol=9.0)
    assert values["w8a8/error"] < values["w4a4/error"]
    weights = sum(p["kernel"].size for p in (params[1][s] for s in ("qkv", "proj", "fc1", "fc2")))
    weights += params[0]["patch"]["kernel"].size + params[2]["head"]["kernel"].size
    rows = 16 + 2 * (48 + 16 + 32 + 16) + 10
    assert float(values["w8a8/bytes"]) == weights + 5 * rows
    assert float(values["w4a4/bytes"]) == weights / 2 + 5 * rows


def test_site_study_refuses_what_does_not_fit(net, params, x):
    make = partial(
        site_study, net, lambda key: {"plain": params}, np.asarray(x), (np.asarray(x), np.zeros(12)),
        [Cell("w4a4", 4, 4)], METHOD,
    )  # fmt: skip
    with pytest.raises(ValueError, match="num_calibration=13, but the pool holds 12"):
        make(num_calibration=13)
    with pytest.raises(ValueError, match="vary="):
        make(num_calibration=4, vary=("nets",))


def test_run_is_a_plain_pair(net, params, x):
    counted = []
    run = Run(lambda site, layer, x: (counted.append(site), layer(x))[1], lambda site, x: x)
    jax.eval_shape(lambda p, x: net.apply(p, x, run), params, x)
    assert counted == ["patch", "qkv", "proj", "fc1", "fc2", "head"]  # traced once for both blocks
