"""Nets with sites, activation records, observers, block-wise quantization: against NumPy and against each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.nn.sites import FLOAT, Run, block_net, capture, pick, sites
from qlab.nn.vit import Encoder, ViTSize, vit
from qlab.quantization import observers as obs
from qlab.quantization.activations import (
    Affine,
    Log,
    PerToken,
    affine,
    decode,
    encode,
    fake,
    minmax,
    quantile,
    search_range,
)
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
from qlab.quantization.site_study import TESTED, Cell, site_study
from qlab.quantization.transforms import Transform, chain, identity, scale_norm, smooth_scale

SIZE = ViTSize(dim=16, depth=2, heads=2, hidden=32)


@pytest.fixture(scope="module")
def net():
    return vit(SIZE)


@pytest.fixture(scope="module")
def params(net):
    # LayerNorms with scales and biases that are not 1 and 0
    key = jax.random.key(7)
    made = net.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(made)
    leaves = [
        a + 0.1 * jax.random.normal(jax.random.fold_in(key, i), a.shape)
        for i, a in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (12, 8, 8, 1))


def test_a_group_runs_as_its_blocks_one_by_one(net, params, x):
    y = x
    for group, stacked in zip(net.groups, params, strict=True):
        for i in range(group.n):
            y = group.block(pick(stacked, i), y)
    np.testing.assert_allclose(net.apply(params, x), y, rtol=1e-5, atol=1e-5)


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
    from scipy.special import erf

    y = y + lin(0.5 * f * (1 + erf(f / np.sqrt(2))), p["fc2"])
    got = net.groups[1].block(pick(params[1], 0), jnp.asarray(h, jnp.float32))
    np.testing.assert_allclose(got, y, rtol=2e-4, atol=2e-4)


def test_capture_and_sites_agree(net, params, x):
    tokens = jnp.zeros((2, 16, 16))
    y, seen = capture(net.groups[1].block, pick(params[1], 0), tokens)
    found = sites(net.groups[1].block, pick(params[1], 0), tokens)
    assert (
        [s.name for s in found]
        == list(seen)
        == ["qkv", "q", "k", "probs", "v", "proj", "fc1", "fc2"]
    )
    assert [s.shape for s in found] == [a.shape for a in seen.values()]
    assert [(s.out, s.width) for s in found if s.kind == "linear"] == [
        (48, 16),
        (16, 16),
        (32, 16),
        (16, 32),
    ]
    np.testing.assert_array_equal(y, net.groups[1].block(pick(params[1], 0), tokens))


def test_blocks_of_a_group_must_be_alike_and_sites_unique():
    with pytest.raises(ValueError, match="group 'body' differ"):
        block_net(("body",), lambda rngs: [[Encoder(8, 2, h, rngs=rngs) for h in (8, 16)]])
    from flax import nnx

    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x, run=FLOAT):
            return run.linear("a", self.a, run.linear("a", self.a, x))

    net = block_net(("twice",), lambda rngs: [[Twice(rngs)]])
    with pytest.raises(ValueError, match="two sites of a block are called 'a'"):
        capture(net.groups[0].block, pick(net.init(jax.random.key(0))[0], 0), jnp.ones((1, 2)))


# -- activation records


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"widen": False}])
def test_fake_is_decode_of_encode_and_within_half_a_step(bits, per, options):
    x = jax.random.normal(jax.random.key(bits), (40, 3)) * jnp.array([0.1, 1.0, 5.0]) + 2.0
    record = affine(*minmax(x, per=per), bits, **options)
    codes = encode(record, x)
    x_hat = fake(record, x)
    np.testing.assert_array_equal(x_hat, decode(record, codes))
    np.testing.assert_array_equal(fake(record, x_hat), x_hat)  # idempotent
    assert codes.min() >= record.q_min
    assert codes.max() <= record.q_max
    np.testing.assert_array_equal(codes, np.round(codes))
    # the zero point is rounded too, so an end of the range may lie half a step outside the rails
    assert np.all(np.abs(x_hat - x) <= np.asarray(record.scale) * (1 + 1e-5))
    if options.get("widen", True):
        assert float(jnp.abs(fake(record, jnp.zeros((1, 3)))).max()) == 0.0


def test_affine_against_numpy_and_32_bits_is_the_identity():
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    record = affine(*minmax(jnp.asarray(x)), 4)
    lo, hi = x.min(), x.max()
    s = (hi - lo) / 15
    z = np.round(-lo / s)
    want = s * (np.clip(np.round(x / s) + z, 0, 15) - z)
    np.testing.assert_allclose(fake(record, jnp.asarray(x)), want, atol=1e-5)
    for sym in (False, True):
        wide = affine(*minmax(jnp.asarray(x)), 32, symmetric=sym)
        np.testing.assert_array_equal(fake(wide, jnp.asarray(x)), x)
    np.testing.assert_array_equal(fake(PerToken(jnp.float32(32)), jnp.asarray(x)), x)


def test_gradient_is_one_inside_and_on_the_rails_else_zero():
    record = Affine(jnp.float32(1.0), jnp.float32(0.0), jnp.float32(0.0), jnp.float32(3.0))
    grad = jax.vmap(jax.grad(lambda v: fake(record, v)))(jnp.array([-0.7, -0.2, 1.3, 3.4, 3.6]))
    assert grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    dead = affine(jnp.zeros(()), jnp.zeros(()), 8)  # a channel that is always 0
    assert float(fake(dead, jnp.zeros(()))) == 0.0
    assert np.isfinite(float(fake(dead, jnp.ones(()))))


def test_per_token_uses_each_rows_own_range():
    x = jnp.array([[0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 20.0, 30.0]])
    np.testing.assert_allclose(fake(PerToken(jnp.float32(2)), x), x, rtol=1e-6)


@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("zero_code", ["repo", "reserve"])
def test_log_codes(per_octave, zero_code):
    r = Log(jnp.float32(0.7), jnp.float32(16.0), per_octave, zero_code)
    q = jnp.arange(16 if zero_code == "repo" else 15, dtype=jnp.float32)
    np.testing.assert_allclose(
        decode(r, q), 0.7 * 2.0 ** (-np.arange(len(q)) / per_octave), rtol=1e-6
    )
    np.testing.assert_array_equal(encode(r, decode(r, q)), q)
    none = 16.0 if zero_code == "repo" else 15.0
    assert encode(r, jnp.array([0.0, 1e-30, 2.0])).tolist() == [none, none, 0.0]
    assert decode(r, jnp.array(none)) == 0.0
    x = jax.random.uniform(jax.random.key(0), (50,))
    np.testing.assert_array_equal(fake(r, x), decode(r, encode(r, x)))
    assert jax.grad(lambda v: fake(r, v))(0.3) == 1.0


def test_quantile_and_search():
    x = jnp.arange(1001.0)[:, None] * jnp.array([1.0, -1.0])
    lo, hi = quantile(x, 0.999, per="channel")
    np.testing.assert_allclose(lo, [1.0, -999.0], atol=1e-2)
    np.testing.assert_allclose(hi, [999.0, -1.0], atol=1e-2)
    z = jnp.concatenate([jax.random.normal(jax.random.key(0), (500, 1)), jnp.full((1, 1), 50.0)])
    shares = jnp.linspace(0.05, 1.0, 40)
    lo, hi = search_range(z, 3, *minmax(z), shares, p=1.0)
    errors = [
        float(jnp.abs(fake(affine(z.min() * s, z.max() * s, 3), z) - z).mean()) for s in shares
    ]
    np.testing.assert_allclose(hi / z.max(), shares[int(np.argmin(errors))], rtol=1e-6)
    assert hi < 0.5 * z.max()


# -- observers


def _fold(o, x, cuts):
    state = o.init(x.shape[-1])
    for part in np.split(np.asarray(x), cuts):
        state = o.update(state, jnp.asarray(part))
    return o.finalize(state)


@pytest.mark.parametrize(
    "o",
    [
        obs.minmax(),
        obs.minmax("channel"),
        obs.percentile(0.99),
        obs.least_error(3),
        obs.histogram(),
    ],
)
def test_observers_do_not_depend_on_the_batches(o):
    x = jax.random.normal(jax.random.key(0), (400, 3)) * jnp.array([0.01, 1.0, 30.0])
    for a, b in zip(
        jax.tree.leaves(_fold(o, x, [])),
        jax.tree.leaves(_fold(o, x[::-1], [1, 7, 200])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("o", [obs.moments(), obs.second_moment()])
def test_moments_agree_with_numpy_however_cut_and_merged(o):
    x = np.asarray(jax.random.normal(jax.random.key(0), (300, 4)) + 3.0)
    a, b = (o.update(o.init(4), jnp.asarray(p)) for p in (x[:100], x[100:]))
    merged = o.finalize(o.merge(a, b))
    whole = _fold(o, x, [17, 40])
    for p, q in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-4)
    if isinstance(whole, obs.Moments):
        np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(whole.covariance, np.cov(x.T, bias=True), rtol=2e-3, atol=2e-4)
    else:
        np.testing.assert_allclose(whole, x.T @ x / 300, rtol=1e-4)


def test_masked_rows_do_not_count_and_percentile_is_close():
    x = jax.random.normal(jax.random.key(0), (5000, 2))
    mask = jnp.arange(5000) < 3000
    wild = jnp.where(mask[:, None], x, 1e3)
    for o in (obs.minmax(), obs.percentile(0.95), obs.moments(), obs.second_moment(), obs.ema()):
        a = o.finalize(o.update(o.init(2), wild, mask))
        b = o.finalize(o.update(o.init(2), x[:3000]))
        for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5)
    lo, hi = _fold(obs.percentile(0.95), x, [])
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


def test_calibrate_is_one_pass_for_any_sites(net, params, x):
    batches = [x[:5], x[5:]]
    stats = obs.calibrate(net, params, batches, {"qkv": obs.minmax(), "head/head": obs.moments()})
    assert set(stats) == {"encoder.0/qkv", "encoder.1/qkv", "head/head"}
    tokens = net.groups[0].block(pick(params[0], 0), x)
    y, _ = capture(net.groups[1].block, pick(params[1], 0), tokens)
    _, seen = capture(net.groups[1].block, pick(params[1], 1), y)
    np.testing.assert_allclose(
        stats["encoder.1/qkv"], (seen["qkv"].min(), seen["qkv"].max()), rtol=1e-4
    )
    with pytest.raises(ValueError, match=r"no site is called .qvk.; there are encoder\.0/fc1"):
        obs.calibrate(net, params, batches, {"qvk": obs.minmax()})
    with pytest.raises(ValueError, match="no batch"):
        obs.calibrate(net, params, [], {})


# -- blocks


def _act(i):
    return (
        Log(jnp.float32(1.0), 2.0**i.bits) if i.site == "probs" else affine(*minmax(i.x_fp), i.bits)
    )


@partial(jax.jit, static_argnums=(0, 6))
def _one(block, p, x_q, x_fp, w_bits, a_bits, max_bits):
    q, failed = quantize_block(
        block, p, x_q, x_fp, w_bits, a_bits, jax.random.key(0),
        act=_act, weight=gptq_weight(max_bits=max_bits, calibration="minmax"),
    )  # fmt: skip
    return q, failed, block(q.params, x_q, fake_run(q)), block(p, x_fp)


@pytest.fixture(scope="module", params=[(8, 8), (4, 4)])
def quantized(request, net, params, x):
    w_bits, a_bits = request.param
    out, x_q, x_fp = [], x, x
    for g, stacked in zip(net.groups, params, strict=True):
        made = []
        for i in range(g.n):
            q, failed, x_q, x_fp = _one(
                g.block, pick(stacked, i), x_q, x_fp, w_bits, a_bits, w_bits
            )
            assert float(failed) == 0.0
            made.append(q)
        out.append(jax.tree.map(lambda *a: jnp.stack(a), *made))
    return tuple(out), x_q


def test_packed_execution_equals_the_fake_one(net, x, quantized):
    blocks, y = quantized
    np.testing.assert_allclose(run_blocks(net, blocks, x), y, rtol=1e-4, atol=1e-4)
    packed = run_blocks(net, blocks, x, packed_run)
    # a value on the edge between two codes may fall to either side
    gap = np.abs(packed - y) / np.abs(y).max()
    assert np.median(gap) < 1e-5
    assert gap.max() < 0.05


def test_every_site_is_on_its_grid(net, params, x, quantized):
    blocks, _ = quantized
    q = pick(blocks[1], 0)
    assert set(q.weights) == {"qkv", "proj", "fc1", "fc2"}
    assert set(q.acts) == {"qkv", "q", "k", "probs", "v", "proj", "fc1", "fc2"}
    assert len(np.unique(q.weights["qkv"].codes[0])) <= 2 ** q.weights["qkv"].bits


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
        return jax.random.uniform(key, (2, SIZE.depth, SIZE.dim), minval=0.2, maxval=5.0)

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
    y = net.apply(params, x)
    np.testing.assert_allclose(net.apply(new, x), y, atol=1e-4 * float(jnp.abs(y).max()))
    if which != "identity":
        assert not np.allclose(new[1]["qkv"]["kernel"], params[1]["qkv"]["kernel"])


def test_smooth_scale_balances_inputs_and_weights():
    a, w = jnp.array([8.0, 1.0]), jnp.array([2.0, 1.0])
    s = smooth_scale(a, w)
    np.testing.assert_allclose(a / s, w * s, rtol=1e-6)  # alpha = 1/2: both sides equal


# -- the study


def test_site_study_runs_cells_as_a_walk_by_hand(net, params, x):
    labels = np.arange(12, dtype=np.int32) % 10
    method = site_by_site(act=_act, weight=nearest_weight(calibration="minmax"))
    cells = [Cell("w8a8", 8, 8), Cell("w3a4", 3, 4), Cell("w3a4", 3, 4, run=1)]
    study = site_study(
        net, lambda key: {"plain": params}, np.asarray(x), (np.asarray(x), labels), cells, method,
        num_calibration=12, vary=("method",),
    )  # fmt: skip
    state = study.init(jax.random.key(0))
    for phase in study.phases:
        for _ in range(phase.num_steps):
            state, _ = phase.step(state)
    values = study.evaluate(state)
    assert {f"w3a4/{m}" for m in TESTED} < set(values)
    assert float(values["w3a4/variance_method"]) == 0.0  # nothing here is random
    assert float(values["w3a4/sites_total"]) == 2 + 2 * 12 + 2
    # the same by hand
    x_q, x_fp = state.x_cal[1], state.x_cal[1]
    quantized = []
    for g, stacked in zip(net.groups, params, strict=True):
        made = []
        for i in range(g.n):
            p = pick(stacked, i)
            q, _ = partial(method, g.block)(p, x_q, x_fp, 3.0, 4.0, jax.random.key(9))
            x_q, x_fp = g.block(q.params, x_q, fake_run(q)), g.block(p, x_fp)
            made.append(q)
        quantized.append(jax.tree.map(lambda *a: jnp.stack(a), *made))
    logits = run_blocks(net, tuple(quantized), x)
    np.testing.assert_allclose(
        values["w3a4/accuracy"], 100 * (logits.argmax(-1) == labels).mean(), atol=9.0
    )
    gap = float(((x_q - x_fp) ** 2).mean() / (x_fp**2).mean())
    np.testing.assert_allclose(values["w3a4/error"], gap, rtol=0.05)
    assert values["w8a8/error"] < values["w3a4/error"]
    bits = sum(p["kernel"].size for p in (params[1][s] for s in ("qkv", "proj", "fc1", "fc2")))
    bits += params[0]["patch"]["kernel"].size + params[2]["head"]["kernel"].size
    rows = 16 + 2 * (48 + 16 + 32 + 16) + 10
    assert float(values["w8a8/bytes"]) == bits + 5 * rows


def test_site_study_refuses_what_does_not_fit(net, params, x):
    method = site_by_site(act=_act, weight=nearest_weight())
    make = partial(
        site_study, net, lambda key: {"plain": params}, np.asarray(x), (np.asarray(x), np.zeros(12)),
        [Cell("w4a4", 4, 4)], method,
    )  # fmt: skip
    with pytest.raises(ValueError, match="num_calibration=13, but the pool holds 12"):
        make(num_calibration=13)
    with pytest.raises(ValueError, match="vary="):
        make(num_calibration=4, vary=("nets",))


def test_run_is_a_plain_pair(net, params, x):
    counted = []
    run = Run(lambda site, layer, x: (counted.append(site), layer(x))[1], lambda site, x: x)
    net.apply(params, x, run)
    assert counted == ["patch", "qkv", "proj", "fc1", "fc2", "head"]  # traced once for both blocks
