"""PD-Quant's exact properties against NumPy in float64, its branches taken apart, and its walk over blocks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlab.configs.pd_quant import get_config
from qlab.experiments.pd_quant import build
from qlab.lab.errors import UserError
from qlab.nn.resnet import ResNetSize, norms, resnet
from qlab.nn.sites import pick
from qlab.quantization.activations import affine, fake, qdrop
from qlab.quantization.adaround import adaround, rectified_sigmoid
from qlab.quantization.block_rounding import learned_weight
from qlab.quantization.blocks import (
    Around,
    SiteInput,
    fake_run,
    nearest_weight,
    packed_run,
    quantize_block,
    run_blocks,
)
from qlab.quantization.bn_statistics import (
    bn_inputs,
    bn_stat_loss,
    correct_inputs,
    distribution_correct,
)
from qlab.quantization.grid import make_grid, search_affine
from qlab.quantization.methods import squared_error
from qlab.quantization.pd_quant import (
    WIDE,
    Beside,
    Fit,
    Parts,
    beside,
    block_loss,
    init_theta,
    pd_loss,
    pd_quant,
    quantize_resnet,
    searched_act,
    unit_of,
)
from qlab.quantization.qtensor import dequantize
from qlab.quantization.quantizers import lsq_step
from qlab.quantization.site_study import Cell, site_study

SIZE = ResNetSize(channels=1, widths=(3,), classes=4)
GRID = {"calibration": "shares", "n_grid": 20}


@pytest.fixture(scope="module")
def family():
    return resnet(SIZE)


@pytest.fixture(scope="module")
def float_params(family):
    """Of the net with norms: running statistics of its own inputs, as training leaves them."""
    params = family.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(5), (32, 8, 8, 1))
    return family.keep(params, jax.jit(lambda p: family.learn(p, x, 0.0)[1])(params))


@pytest.fixture(scope="module")
def params(family, float_params):
    return family.fold(float_params)


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (12, 8, 8, 1)) ** 2


def entropy_free_kl(p, q, t):
    p, q = (np.asarray(z, np.float64) / t for z in (p, q))
    p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
    return (np.exp(p) * (p - q)).sum(-1).mean()


# -- (1): the prediction difference


def test_prediction_difference_is_the_kl_from_the_float_net():
    z, z_q = (3 * jax.random.normal(jax.random.key(i), (7, 5)) for i in (0, 1))
    for t in (1.0, 4.0):  # not squared: the value falls with T
        np.testing.assert_allclose(pd_loss(z, z_q, t), entropy_free_kl(z, z_q, t), rtol=1e-5)
    assert abs(float(pd_loss(z, z_q) - pd_loss(z_q, z))) > 1e-3  # the float net comes first
    for kind in ("kl", "mse", "cosine"):
        value, grad = jax.value_and_grad(lambda q, k=kind: pd_loss(z, q, kind=k))(z)
        assert abs(float(value)) < 1e-6
        np.testing.assert_allclose(grad, 0.0, atol=1e-6)
    n = [np.asarray(a, np.float64) for a in (z, z_q)]
    np.testing.assert_allclose(pd_loss(z, z_q, kind="mse"), ((n[0] - n[1]) ** 2).mean(), rtol=1e-5)
    cos = (n[0] * n[1]).sum(-1) / np.linalg.norm(n[0], axis=-1) / np.linalg.norm(n[1], axis=-1)
    np.testing.assert_allclose(pd_loss(z, z_q, kind="cosine"), (1 - cos).mean(), rtol=1e-4)


# -- (2), (5): AdaRound as the paper uses it


def test_rounding_starts_at_the_fraction_and_its_regulariser_counts():
    w = jax.random.normal(jax.random.key(0), (3, 40))
    rule, grid = adaround(reg_weight=1.0), make_grid(w, 4, calibration="minmax")
    v = rule.init(w, grid)
    u = np.asarray(w, np.float64) / np.asarray(grid.scale, np.float64)
    fraction = u - np.floor(u)
    np.testing.assert_allclose(rectified_sigmoid(v), fraction, atol=1e-4)
    q = np.clip(np.floor(u + 0.5) + np.asarray(grid.zero), 0, 15)
    far = np.abs(fraction - 0.5) > 1e-4
    np.testing.assert_array_equal(rule.hard(v, w, grid).codes[far], q[far])
    assert float(rule.reg(jnp.zeros((3, 4)), 0.5)) == 12.0  # all h = 1/2
    assert float(rule.reg(jnp.array([9.0, -9.0]), 0.5)) == 0.0  # all h in {0, 1}
    assert float(rule.reg(jnp.array([9.0, 0.3]), 0.5)) > 0.0
    assert float(rule.reg(jnp.zeros(4), 0.1)) == 0.0  # the warm-up


def test_activation_steps_are_searched():
    x = jax.random.normal(jax.random.key(0), (40, 3)) + 0.5
    i = SiteInput("a", x, x, None, jnp.float32(2), jax.random.key(0))
    scale, zero = search_affine(x, 2, None, n_grid=20)
    record = searched_act(n_grid=20, signed=("a",), max_bits=2)(i)
    np.testing.assert_allclose([record.scale, record.zero], [scale.item(), zero.item()], rtol=1e-6)
    relu = jax.nn.relu(x)  # of one sign: shares of the range by brute force, zero at its end
    record = searched_act({}, num=30, n_grid=20)(i._replace(x=relu))
    a, top = np.asarray(relu[:30], np.float64), float(relu[:30].max())
    errors = {}
    for share in np.arange(1, 21) / 20:
        s = top * share / 3
        errors[s] = (np.abs(np.clip(np.round(a / s), 0, 3) * s - a) ** 2.4).mean()
    np.testing.assert_allclose(record.scale, min(errors, key=errors.get), rtol=1e-5)
    assert float(record.zero) == 0.0
    assert searched_act()(i._replace(w=jnp.ones((2, 3)))) is None


def test_a_trained_step_has_lsqs_gradient():
    record, x = affine(-0.4, 3.1, 2), 3 * jax.random.normal(jax.random.key(0), (50,))

    def by_record(s):
        return (fake(dataclasses.replace(record, scale=s), x) ** 2).sum()

    def by_lsq(s):
        return (lsq_step(x, s, record.zero, record.q_min, record.q_max) ** 2).sum()

    got, want = (jax.value_and_grad(f)(record.scale) for f in (by_record, by_lsq))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert abs(float(want[1])) > 1.0


def test_adaround_of_one_product_beats_nearest():
    w = jax.random.normal(jax.random.key(0), (4, 24))
    x = jax.random.normal(jax.random.key(1), (64, 24)) @ jax.random.normal(
        jax.random.key(2), (24, 24)
    )
    i = SiteInput("a", x + 0.1, x, w, jnp.float32(2), jax.random.key(3))
    fit = learned_weight(adaround(), optax.adam(3e-2), num_iters=200, max_bits=2, **GRID)
    learned, nearest = (
        float(squared_error((x + 0.1) @ dequantize(f(i)[0]).T, x @ w.T))
        for f in (fit, nearest_weight(max_bits=2, **GRID))
    )
    assert learned < 0.9 * nearest
    with pytest.raises(ValueError, match="'a' is no plain product"):
        fit(i._replace(x=None))


def test_qdrop_takes_elements_one_by_one():
    x = jnp.arange(4000.0).reshape(20, 200)
    mixed = qdrop(jax.random.key(0), -x - 1, x, 0.3)
    taken = np.asarray(mixed) < 0
    assert abs(taken.mean() - 0.3) < 0.03
    np.testing.assert_array_equal(np.abs(mixed) - taken, x)
    np.testing.assert_array_equal(qdrop(jax.random.key(0), -x, x, 1.0), -x)
    np.testing.assert_array_equal(qdrop(jax.random.key(0), -x, x, 0.0), x)


# -- (3), (6): statistics of batch norms


def test_bn_loss_against_numpy_and_its_zero():
    rng = np.random.default_rng(0)
    u = {name: rng.standard_normal((5, 4, 3, c)) + 1 for name, c in (("a", 2), ("b", 6))}
    run = {
        k: (rng.standard_normal(v.shape[-1]), rng.random(v.shape[-1]) + 0.5) for k, v in u.items()
    }
    as32 = partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    want_sample, want_batch = 0.0, 0.0
    for k, a in u.items():
        mean, var = run[k]
        m, s = a.mean((1, 2)), np.sqrt(a.var((1, 2), ddof=1) + 1e-6)
        want_sample += (((m - mean) ** 2).sum() + ((s - np.sqrt(var + 1e-6)) ** 2).sum()) / 5
        m, v = a.mean((0, 1, 2)), a.var((0, 1, 2))
        want_batch += (((m - mean) ** 2).mean() + ((v - var) ** 2).mean()) / 2
    np.testing.assert_allclose(bn_stat_loss(as32(u), as32(run)), want_sample, rtol=1e-5)
    got = bn_stat_loss(as32(u), as32(run), per_sample=False, spread="var")
    np.testing.assert_allclose(got, want_batch, rtol=1e-5)
    # one sample, and running statistics that are its own
    one = u["a"][:1]
    own = {"a": (one.mean((0, 1, 2)), one.var((0, 1, 2), ddof=1))}
    assert float(bn_stat_loss(as32({"a": one}), as32(own))) < 1e-10
    # two samples whose means cancel: the batch's are right, each sample's are not
    pair = np.concatenate([one - own["a"][0] + 1, one - own["a"][0] - 1])
    zero = {"a": (pair.mean((0, 1, 2)), pair.var((0, 1, 2)))}
    assert float(bn_stat_loss(as32({"a": pair}), as32(zero), per_sample=False)) < 1e-10
    assert float(bn_stat_loss(as32({"a": pair}), as32(zero))) > 1.0
    assert float(bn_stat_loss({}, {})) == 0.0


def test_correction_moves_statistics_and_lamb_c_divides(family, float_params, x):
    block, p = family.net.groups[0].block, pick(float_params[0], 0)
    running = norms(p)
    inputs = partial(bn_inputs, block, p)

    @partial(jax.jit, static_argnums=1)
    def fix(lamb_c, n):
        new = distribution_correct(inputs, running, x, lamb_c, n, 1e-2)
        return new, bn_stat_loss(inputs(new), running)

    before = float(bn_stat_loss(inputs(x), running))
    np.testing.assert_array_equal(fix(0.02, 0)[0], x)
    new, after = fix(jnp.float32(1.0), 60)
    assert float(after) < 0.6 * before
    held, less = fix(jnp.float32(1e-9), 60)  # a divisor: the smaller, the firmer
    assert float(jnp.abs(held - x).max()) < 5e-2
    assert float(jnp.abs(held - x).mean()) < 0.1 * float(jnp.abs(new - x).mean())
    assert float(after) < float(less)
    # evaluation mode: a sample's inputs of norms do not depend on the others
    np.testing.assert_allclose(inputs(x)["stem_bn"][:1], inputs(x[:1])["stem_bn"], atol=1e-5)


def test_every_block_gets_its_own_corrected_input(family, float_params, x):
    made = correct_inputs(family.net, float_params, x, lamb_c=0.02, n=3)
    assert [a.shape[1:] for a in made] == [x.shape, (12, 8, 8, 3), (12, 8, 8, 3)]
    y = x
    for g, group in enumerate(family.net.groups):
        gap = float(jnp.abs(made[g][0] - y).max())
        assert (gap == 0.0) if group.name == "head" else (0.0 < gap < 4e-3)
        y = group.block(pick(float_params[g], 0), y)


# -- (4) and the branches


@pytest.fixture(scope="module")
def block1(family, params, x):
    """The residual block on its grids: (block, q, x_q, x_fp, rest, logits)."""
    net, p = family.folded, pick(params[1], 0)
    x_fp = net.groups[0].block(pick(params[0], 0), x)
    x_q = x_fp + 0.1 * jax.random.normal(jax.random.key(4), x_fp.shape)
    make = jax.jit(
        lambda x_q, x_fp: quantize_block(
            net.groups[1].block, p, x_q, x_fp, 2.0, 2.0, jax.random.key(0),
            act=searched_act(), weight=nearest_weight(max_bits=2, **GRID),
        )
    )  # fmt: skip
    q, _ = make(x_q, x_fp)

    def rest(y):
        return net.suffix(params, 1, 0, y)

    return net.groups[1].block, q, x_q, x_fp, rest, rest(net.groups[1].block(p, x_fp))


def test_sites_are_quantized_where_they_arise(block1):
    _, q, x_q, _, _, _ = block1
    assert set(q.acts) == {"mid", "features"}
    assert set(q.weights) == {"conv1", "conv2"}
    assert float(q.acts["mid"].q_max) == 3.0
    assert float(q.acts["features"].q_max) == 255.0  # the last layer's input
    del x_q


def test_the_three_branches(block1):
    block, q, x_q, x_fp, rest, logits = block1
    key, y = jax.random.key(7), block(q.params, x_fp)
    unit = unit_of(block, q, 2.0, Fit(), adaround(reg_weight=0.0), WIDE)
    theta = init_theta(unit)
    here, there = (x_q, x_fp, y, logits), (x_q, 2 * x_fp, y + 1, logits)

    def value(lamb_r, batch, quantized=1.0):
        return block_loss(unit, Parts(lamb_r), rest, 0.5, quantized)(theta, batch, key, 0.5)

    # V starts where the weights are float, within the rails
    ends = {s: (qt.scale * -qt.zero, qt.scale * (3 - qt.zero)) for s, qt in q.weights.items()}
    soft = {s: jnp.clip(q.params[s]["kernel"].T, *ends[s]) for s in ends}
    run = fake_run(q)._replace(linear=lambda s, layer, a: a @ soft[s].T + layer.bias[...])

    @jax.jit
    def values():
        mixed = qdrop(jax.random.split(key)[0], x_q, x_fp, 0.5)
        return {
            "rec": value(None, here),
            "pd": value(0.1, here) - value(None, here),
            "pd_there": value(0.1, there) - value(None, there),
            "dropped": value(0.1, here, 0.5) - value(None, here, 0.5),
            "rec_by_hand": squared_error(block(q.params, mixed, run), y),
            "pd_by_hand": pd_loss(logits, rest(block(q.params, x_q, run)), 4.0) / 0.1,
        }

    v = {k: float(a) for k, a in values().items()}
    np.testing.assert_allclose(v["rec"], v["rec_by_hand"], rtol=1e-3)  # of the mixture
    np.testing.assert_allclose(
        v["pd"], v["pd_by_hand"], rtol=2e-2, atol=1e-4
    )  # of x_q, over lamb_r
    np.testing.assert_allclose(v["pd_there"], v["pd"], rtol=2e-2, atol=1e-3)  # knows no x', no y'
    assert abs(v["dropped"] - v["pd"]) > 1e-3  # activations are dropped in this branch too


def test_last_blocks_prediction_difference_is_that_of_the_whole_net(family, params):
    y = jnp.arange(8.0).reshape(2, 4)
    assert family.folded.suffix(params, 2, 0, y) is y


def test_packed_execution_equals_the_fake_one(block1):
    block, q, x_q, _, _, _ = block1
    y, z = block(q.params, x_q, fake_run(q)), block(q.params, x_q, packed_run(q))
    gap = np.abs(y - z) / np.abs(y).max()
    assert np.median(gap) < 1e-5
    assert gap.max() < 0.05  # a value on the edge between two codes may fall to either side


@pytest.fixture(scope="module")
def learned(family, params, float_params, x):
    """All blocks by PD-Quant in a study of two cells, W2A2 twice with the same key."""
    labels = np.arange(12, dtype=np.int32) % 4
    method = pd_quant(
        Parts(), Fit(num_iters=30, batch_size=8, rate=3e-2, step_rate=1e-2), max_bits=2,
        num_search=8, **GRID,
    )  # fmt: skip
    study = site_study(
        family.folded, lambda key: {"plain": params}, np.asarray(x), (np.asarray(x), labels),
        [Cell("w2a2", 2, 2), Cell("w2a2", 2, 2, run=1)], method, around=True, wide=WIDE,
        beside=lambda key, name, x: beside(
            correct_inputs(family.net, float_params, x, lamb_c=0.02, n=3)
        ),
        num_calibration=12, vary=("method",),
    )  # fmt: skip
    state = study.init(jax.random.key(0))
    for _ in range(1 + len(family.folded.groups)):  # the first cell
        state, _ = study.phases[0].step(state)
    return study, state


def test_the_papers_own_scale_says_what_is_missing():
    with pytest.raises(UserError, match=r"needs ImageNet .* and a trained ResNet-18"):
        build(get_config("full"))
    c = get_config("smoke")
    c.method = "brecq"
    with pytest.raises(UserError, match="expected rtn, adaround, blocks"):
        build(c)


@pytest.mark.slow
def test_the_study_gives_the_method_what_it_needs(family, learned, params):
    study, state = learned
    a_cell_and_its_repeat = [a.x.shape[:2] for a in state.beside]
    assert a_cell_and_its_repeat == [(2, 1)] * 3  # one block a group
    values = study.evaluate(state)
    logits = family.folded.apply(params, state.x_cal[0])
    y = state.x_cal[0]
    for g, q in zip(family.folded.groups, state.quantized, strict=True):
        y = g.block(q.params and pick(q, 0).params, y, fake_run(pick(q, 0)))
    np.testing.assert_allclose(
        values["w2a2/kl_calibration"], entropy_free_kl(logits, y, 1.0), rtol=1e-2, atol=1e-4
    )
    # 8 bits for stem and head, 2 between; a scale and a zero point a row
    num_bytes = 3 * 9 + 2 * 3 * 7 + 4 * 3 + 5 * (3 + 3 + 3 + 4)
    assert float(values["w2a2/bytes"]) == num_bytes
    assert float(values["w2a2/sites_total"]) == 4 + 3


@pytest.mark.slow
def test_steps_are_learned_and_zero_points_stay(learned):
    _, state = learned
    q = pick(state.quantized[1], 0)
    for site in ("mid", "features"):
        assert float(q.acts[site].zero) == 0.0
        assert float(q.acts[site].scale) > 0.0
    codes = np.concatenate([np.asarray(qt.codes).ravel() for qt in q.weights.values()])
    assert codes.max() <= 3


@pytest.mark.slow
def test_learning_lowers_the_loss_and_parts_switch(block1, params, family):
    block, q, x_q, x_fp, rest, logits = block1
    del rest, logits
    suffix = lambda p, y, run=None: family.folded.suffix(p, 1, 0, y, *([run] if run else []))  # noqa: E731

    def made(x, parts=Parts(None), shares=(0.5, 0.5)):  # noqa: B008
        method = pd_quant(parts, Fit(100, 12, 3e-2, 1e-2), max_bits=2, **GRID)

        @jax.jit
        def step(side):
            bits, around = jnp.float32(2), Around(params, side, suffix)
            return method(block, q.params, x_q, x_fp, bits, bits, jax.random.key(3), around)[0]

        new = step(Beside(x, *map(jnp.float32, shares)))
        y = block(new.params, x_q, fake_run(new))
        return new, float(squared_error(y, block(q.params, x_fp)))

    nearest = float(squared_error(block(q.params, x_q, fake_run(q)), block(q.params, x_fp)))
    plain, error = made(x_fp)
    assert error < nearest

    def moved(new):
        """Share of the integers that differ from those of QDrop."""
        codes = [(new.weights[s].codes, plain.weights[s].codes) for s in plain.weights]
        return np.concatenate([np.ravel(a != b) for a, b in codes]).mean()

    other, _ = made(3.0 * x_fp)  # the target comes from the corrected input
    assert moved(other) > 0.02
    brecq, _ = made(x_fp, shares=(1.0, 1.0))
    assert moved(brecq) > 0.0
    for parts in (Parts(kind="mse"), Parts(suffix="nearest")):
        new, _ = made(x_fp, parts)
        assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(new))
        assert float(jnp.abs(fake(new.acts["mid"], x_fp)).max()) > 0


def test_float_inputs_must_be_given(block1, params):
    block, q, x_q, x_fp, _, _ = block1
    around = Around(params, None, lambda p, y: y)
    with pytest.raises(ValueError, match="no float inputs"):
        jax.eval_shape(
            lambda x: pd_quant(max_bits=2)(
                block, q.params, x, x_fp, 2.0, 2.0, jax.random.key(0), around
            )[0],
            x_q,
        )


@pytest.mark.slow
def test_a_net_of_your_own(family, float_params, x):
    fit = Fit(num_iters=20, batch_size=8, rate=3e-2, step_rate=1e-2)
    made = quantize_resnet(
        family, float_params, x, w_bits=8, a_bits=8, fit=fit, num_correct=2, **GRID
    )
    want = family.apply(float_params, x)
    y = run_blocks(family.folded, made.blocks, x)
    np.testing.assert_allclose(y, want, atol=0.1 * float(jnp.abs(want).max()))
