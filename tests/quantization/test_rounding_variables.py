"""Other variables, losses and optimizers of learned rounding, against closed forms, NumPy and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlab.quantization import ROUNDING_RULES, dequantize, make_grid
from qlab.quantization.adaquant import adaquant
from qlab.quantization.adaround import adaround, rectified_sigmoid
from qlab.quantization.recon_losses import LOSSES, Aux, recon_loss
from qlab.quantization.rounding_optimizers import UNIT, choosable, keep_within, make_optimizer
from qlab.quantization.rounding_variables import softmax_rounding, ste_offset, tanh_rounding

RELAXED = {
    "adaround": (adaround, rectified_sigmoid),
    "tanh": (tanh_rounding, lambda v: 0.5 * (1 + jnp.tanh(v))),
    "softmax": (softmax_rounding, lambda v: jax.nn.softmax(v, 0)[1]),
}


@pytest.fixture
def weights():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((6, 40)), jnp.float32)
    return w, make_grid(w, 3, calibration="minmax", ties="half_up")


@pytest.mark.parametrize("name", RELAXED)
def test_starts_at_the_fraction_and_rounds_half_up(weights, name):
    make, h = RELAXED[name]
    w, grid = weights
    rule = make()
    v = rule.init(w, grid)
    u = w / grid.scale
    np.testing.assert_allclose(h(v), u - jnp.floor(u), atol=2e-4)
    half_up = jnp.clip(jnp.floor(u + 0.5) + grid.zero, grid.q_min, grid.q_max)
    np.testing.assert_array_equal(rule.hard(v, w, grid).codes, half_up)
    inside = (jnp.floor(u) + grid.zero >= 0) & (jnp.floor(u) + grid.zero < 7)
    np.testing.assert_allclose(rule.soft(v, w, grid)[inside], w[inside], atol=1e-3)


@pytest.mark.parametrize("name", RELAXED)
def test_exact_halves_go_up(name):
    w = jnp.array([[0.0, 0.5, 1.5, 2.5, 7.0]])
    grid = make_grid(w, 3, calibration="minmax")
    assert grid.scale.item() == 1.0
    rule = RELAXED[name][0]()
    assert rule.hard(rule.init(w, grid), w, grid).codes.tolist() == [[0, 1, 2, 3, 7]]


def test_tanh_and_softmax_take_the_same_path_under_adam(weights):
    w, grid = weights
    target = jnp.asarray(np.random.default_rng(2).standard_normal(w.shape), jnp.float32)
    paths = []
    for rule in (tanh_rounding(), softmax_rounding()):
        v, opt = rule.init(w, grid), optax.adam(0.05, eps=0.0)
        state = opt.init(v)

        def loss(v, rule=rule):
            return ((rule.soft(v, w, grid) - target) ** 2).sum()

        # on a rail the gradient is 0, and Adam without eps divides 0 by 0
        def step(carry, _, opt=opt, loss=loss):
            v, state = carry
            change, state = opt.update(jax.grad(loss)(v), state)
            return (optax.apply_updates(v, jnp.nan_to_num(change)), state), None

        (v, _), _ = jax.lax.scan(step, (v, state), length=5)
        paths.append(rule.soft(v, w, grid))
    np.testing.assert_allclose(*paths, atol=1e-4)


def test_free_offsets_are_adaquant_with_a_fixed_step(weights):
    w, grid = weights
    delta = jnp.asarray(np.random.default_rng(3).standard_normal(w.shape), jnp.float32)
    free, other = ste_offset(bound=None), adaquant(learn_s1=False)
    np.testing.assert_array_equal(free.soft(delta, w, grid), other.soft({"add": delta}, w, grid))
    np.testing.assert_array_equal(dequantize(free.hard(delta, w, grid)), free.soft(delta, w, grid))
    near = ste_offset()
    u = w / grid.scale
    q = (near.hard(delta, w, grid).codes - grid.zero).astype(jnp.float32)
    ok = (q + grid.zero > 0) & (q + grid.zero < 7)
    assert (((q - jnp.floor(u)) * ok >= 0) & ((q - jnp.floor(u)) * ok <= 1)).all()


def test_every_new_rule_is_registered():
    assert {"tanh", "softmax", "ste"} <= set(ROUNDING_RULES)


def test_losses_in_float64():
    rng = np.random.default_rng(4)
    y, y_q, weight = (rng.standard_normal((7, 3, 5)) for _ in range(3))
    weight = weight**2
    aux = Aux(jax.nn.relu, lambda a: 2.0 * a, jnp.asarray(weight, jnp.float32))

    def log_softmax(z):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = log_softmax(2 * y), log_softmax(2 * y_q)
    cos = (y * y_q).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(y_q, axis=-1)
    l2 = ((y - y_q) ** 2).sum(-1).mean()
    want = {
        "l2": l2,
        "l1": np.abs(y - y_q).sum(-1).mean(),
        "log_l2": np.log(1e-12 + l2),
        "cosine": (1 - cos).mean(),
        "activation": ((np.maximum(y, 0) - np.maximum(y_q, 0)) ** 2).sum(-1).mean(),
        "fisher": (weight * (y - y_q) ** 2).sum(-1).mean(),
        "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
    }
    assert set(want) == set(LOSSES)
    a, b = jnp.asarray(y, jnp.float32), jnp.asarray(y_q, jnp.float32)
    for name, value in want.items():
        np.testing.assert_allclose(recon_loss(name)(a, b, aux), value, rtol=2e-5, err_msg=name)


def test_an_error_of_zero_has_a_finite_logarithm_and_gradient():
    y = jnp.ones((2, 3))
    value, grad = jax.value_and_grad(lambda q: recon_loss("log_l2")(y, q, Aux()))(y)
    np.testing.assert_allclose(value, np.log(1e-12), rtol=1e-6)
    assert jnp.isfinite(grad).all()


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="loss='l3'"):
        recon_loss("l3")
    with pytest.raises(ValueError, match=r"aux\.fisher"):
        recon_loss("fisher")(jnp.ones((1, 2)), jnp.ones((1, 2)), Aux())
    with pytest.raises(ValueError, match="optimizer='adagrad'"):
        make_optimizer("adagrad", 0.1)
    with pytest.raises(ValueError, match="schedule='linear'"):
        make_optimizer("adam", 0.1, "linear")
    with pytest.raises(ValueError, match="bound=0"):
        ste_offset(bound=0)


OPTAX = {
    "sgd": lambda lr: optax.sgd(lr),
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "adam": lambda lr: optax.adam(lr),
    "adamw": lambda lr: optax.adamw(lr, weight_decay=1e-2),
    "adamax": lambda lr: optax.adamax(lr),
    "lion": lambda lr: optax.lion(lr),
    "sign_sgd": lambda lr: optax.sign_sgd(lr),
}


def test_optimizers_are_those_of_optax_also_behind_an_index():
    assert set(OPTAX) == set(UNIT)
    names = tuple(UNIT)
    chosen = choosable(names)
    rng = np.random.default_rng(5)
    start = jnp.asarray(rng.standard_normal(6), jnp.float32)
    grads = jnp.asarray(rng.standard_normal((4, 6)), jnp.float32)
    update = jax.jit(chosen.update)
    for i, name in enumerate(names):
        rate = optax.cosine_decay_schedule(0.1, 4)
        want, ours, behind = start, start, start
        opt, mine = OPTAX[name](rate), make_optimizer(name, 0.1, num_steps=4)
        s, m, state = opt.init(want), mine.init(ours), chosen.init(behind)
        for j, g in enumerate(grads):
            step, s = opt.update(g, s, want)
            want = optax.apply_updates(want, step)
            step, m = mine.update(g, m, ours)
            ours = optax.apply_updates(ours, step)
            step, state = update(jnp.int32(i), g, state, behind)
            behind = behind + rate(j) * step
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(behind, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_projection_keeps_parameters_within():
    opt = optax.chain(optax.adam(0.3), keep_within(-0.5, 0.5))
    p = jnp.zeros(3)
    state = opt.init(p)
    for _ in range(10):
        step, state = opt.update(jnp.array([1.0, -1.0, 0.0]), state, p)
        p = optax.apply_updates(p, step)
    np.testing.assert_allclose(p, [-0.5, 0.5, 0.0], atol=1e-6)
