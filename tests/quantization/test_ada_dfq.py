"""AdaDFQ's exact properties, its losses and optimizers against NumPy in float64, and the step taken apart."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.configs.ada_dfq import get_config
from qlab.experiments.ada_dfq import build
from qlab.lab.errors import UserError
from qlab.nn.generator import GeneratorSize, generator
from qlab.nn.resnet import ResNetSize, resnet
from qlab.quantization.ada_dfq import (
    METHODS,
    Coefficients,
    DataFree,
    Fit,
    coefficients,
    cross_entropy,
    disagreement_entropy,
    gen_loss,
    learned,
    margin_loss,
    normalised,
    q_loss,
    student_loss,
)
from qlab.quantization.bn_statistics import bn_stat_loss, net_bn_inputs
from qlab.quantization.data_free import assert_data_free

C = 10


@pytest.fixture
def logits(rng):
    return tuple(jnp.asarray(2 * rng.standard_normal((16, C)), jnp.float32) for _ in range(2))


@pytest.fixture
def y(rng):
    return jnp.asarray(rng.integers(0, C, 16), jnp.int32)


def softmax64(z):
    e = np.exp(np.asarray(z, np.float64) - np.asarray(z, np.float64).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ce64(z, y):
    return -np.log(softmax64(z)[np.arange(len(y)), y]).mean()


def entropy64(z):
    p = softmax64(z)
    return -(p * np.log(p)).sum(-1)


# The exact tests.


def test_equal_nets_reach_the_least_loss_with_no_gradient(logits):
    z, _ = logits

    @jax.jit
    def at(z_p, z_q, t):
        margin = jax.grad(lambda q: margin_loss(disagreement_entropy(z_p, q), C, 0.1, 0.8))(z_q)
        h = disagreement_entropy(z_p, z_q, t)
        return h, jax.value_and_grad(q_loss, (0, 1))(z_p, z_q, t), normalised(h, C), margin

    for t in (1.0, 4.0, 20.0):
        h, (loss, grads), x, margin = at(z, z, t)
        np.testing.assert_allclose(h, math.log(C), rtol=1e-6)
        np.testing.assert_allclose(loss, -(t**2) * math.log(C), rtol=1e-6)
        for grad in grads:
            np.testing.assert_allclose(grad, 0, atol=1e-5)
        assert bool((x == 0).all())  # the guard
        assert bool((margin == 0).all())


def test_the_least_loss_is_reached_only_there(logits):
    z_p, z_q = logits
    assert float(q_loss(z_p, z_q)) > -400 * math.log(C) + 1e-2
    assert float(q_loss(z_p, z_p + jnp.arange(16.0)[:, None])) == pytest.approx(
        -400 * math.log(C), rel=1e-6
    )


def test_a_constant_on_all_logits_changes_nothing(logits, y):
    z_p, z_q = logits
    moved = z_q + jnp.linspace(-3, 3, 16)[:, None]
    for f in (
        lambda q: disagreement_entropy(z_p, q),
        lambda q: q_loss(z_p, q),
        lambda q: gen_loss(z_p, q, y, jnp.float32(0.3), Coefficients()),
        lambda q: student_loss(z_p, q, y, METHODS["gdfq"]),
    ):
        f = jax.jit(f)
        np.testing.assert_allclose(f(moved), f(z_q), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.8), (0.3, 0.6), (0.0, 1.0), (0.0, 0.5)])
def test_margin_is_zero_exactly_inside(low, high, rng):
    margin = jax.jit(lambda h: margin_loss(h, C, low, high))
    for _ in range(30):
        h = jnp.asarray(rng.uniform(0.2, math.log(C), 16) * rng.choice([0.6, 1.0]), jnp.float32)
        x = (np.asarray(h, np.float64) - float(h.min())) / (math.log(C) - float(h.min()))
        loss = float(margin(h))
        expected = np.maximum(low - x, 0).mean() + np.maximum(x - high, 0).mean()
        assert loss == pytest.approx(expected, abs=1e-5)
        assert (loss <= 1e-6) == bool(((x >= low - 1e-6) & (x <= high + 1e-6)).all())
        assert loss >= low / 16 - 1e-6  # the sample of least entropy has H' = 0


def test_agreement_with_a_silent_student_is_cross_entropy(logits, y):
    z, _ = logits
    c = Coefficients(margin=0.0, a_ds=0.0, a_as=1.0, gamma=0.0)
    loss = gen_loss(z, jnp.zeros_like(z), y, jnp.float32(9.0), c)
    assert float(loss) == pytest.approx(float(cross_entropy(z, y).mean()), rel=1e-6)
    assert float(loss) == pytest.approx(ce64(z, np.asarray(y)), rel=1e-5)


def test_bn_loss_is_zero_at_the_running_statistics(family, teacher):
    x = jax.random.uniform(jax.random.key(3), (8, 8, 8, 1))

    @jax.jit
    def loss(p, x):
        _, seen, running = net_bn_inputs(family.net, p, x)
        return bn_stat_loss(seen, running, per_sample=False, spread="var"), seen

    params = teacher
    for _ in range(
        3
    ):  # a norm deeper down sees what those before it put out: three norms, three rounds
        _, seen = loss(params, x)
        stats = tuple(
            {
                site: {"mean": u.mean((0, 1, 2))[None], "var": u.var((0, 1, 2))[None]}
                for key, u in seen.items()
                for name, site in [key.split("/")]
                if name == group.name
            }
            for group in family.net.groups
        )
        params = family.keep(params, stats)
    assert float(loss(params, x)[0]) < 1e-10
    assert float(loss(params, 1.5 * x)[0]) > 1e-3


# The losses as the published codes have them.


def test_losses_against_float64(logits, y):
    z_p, z_q = logits
    n, bns = np.asarray(y), 0.7
    h = entropy64(np.float64(z_p) - np.float64(z_q))
    x = (h - h.min()) / (math.log(C) - h.min())
    for name, (low, ds) in {"ada_dfq": (0.1, 0.2), "ada_sg": (0.3, 0.1)}.items():
        margin = np.maximum(low - x, 0).mean() + np.maximum(x - 0.8, 0).mean()
        pair = ds * ce64(z_p - z_q, n) + 0.1 * ce64(z_p + z_q, n)
        found = gen_loss(z_p, z_q, y, jnp.float32(bns), METHODS[name])
        assert float(found) == pytest.approx(margin + pair + bns, rel=1e-5)
        t = entropy64((np.float64(z_p) - np.float64(z_q)) / 20)
        found = student_loss(z_p, z_q, y, METHODS[name])
        assert float(found) == pytest.approx(-400 * t.mean() + 400 * math.log(C), rel=2e-3)
    found = gen_loss(z_p, z_q, y, jnp.float32(bns), METHODS["gdfq"])
    assert float(found) == pytest.approx(ce64(z_p, n) + 0.1 * bns, rel=1e-5)
    p, q = softmax64(np.float64(z_p) / 20), softmax64(np.float64(z_q) / 20)
    kd = 400 * (p * np.log(p / q)).mean()  # over samples and classes
    found = student_loss(z_p, z_q, y, METHODS["gdfq"])
    assert float(found) == pytest.approx(kd + ce64(z_q, n), rel=1e-3)


def test_generator_and_student_pull_the_entropy_apart(logits, y):
    """A step down G's disagreement term lowers the entropy that a step down L_Q raises (the zero-sum pair)."""
    z_p, z_q = logits

    @jax.jit
    def entropies(z_p, z_q):
        at = jnp.argmax(z_p - z_q, -1)
        down_g = jax.grad(lambda p: cross_entropy(p - z_q, at).sum())(z_p)
        down_q = jax.grad(lambda q: q_loss(z_p, q, 1.0))(z_q)
        pairs = (z_p - 0.1 * down_g, z_q), (z_p, z_q), (z_p, z_q - 0.1 * down_q)
        return [disagreement_entropy(*pair).mean() for pair in pairs]

    lower, h, higher = entropies(z_p, z_q)
    assert float(lower) < float(h) < float(higher)


# The step.

FIT = Fit(num_steps=8, batch_size=6, rate_q=1e-2, warmup=2, range_steps=3, mean=(0.3,), std=(0.4,))


@pytest.fixture(scope="module")
def family():
    return resnet(ResNetSize(widths=(3,), classes=4))


@pytest.fixture(scope="module")
def teacher(family, draw_resnet):
    return draw_resnet(family)


@pytest.fixture(scope="module")
def dfq(family):
    return DataFree(family, generator(GeneratorSize(8, 1, 4, 10, (4, 3))), FIT)


@pytest.fixture(scope="module")
def step(dfq):
    return jax.jit(dfq.step)


@pytest.fixture(scope="module")
def states(dfq, step, teacher):
    """The state before each of 8 steps and after the last, and the metrics."""
    out, metrics = [dfq.init(jax.random.key(2), teacher, w_bits=3, a_bits=3)], []
    for _ in range(8):
        new, m = step(out[-1])
        out.append(new)
        metrics.append(m)
    return out, metrics


def same(a, b):
    return [
        bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]


@pytest.mark.slow
def test_what_moves_when(states, teacher):
    s, metrics = states
    for i in range(8):
        assert all(same(s[i + 1].teacher, teacher))
        assert not all(same(s[i + 1].generator, s[i].generator))
        assert all(same(s[i + 1].student, s[i].student)) == (i < 2)  # the warm-up
        assert all(same(s[i + 1].ranges, s[i].ranges)) == (i >= 3)
        assert int(s[i + 1].step) == i + 1
        assert all(math.isfinite(float(v)) for v in metrics[i].values())
    assert float(s[8].ranges["stem/out"][2]) == 3
    trained = jax.tree_util.tree_leaves_with_path(s[8].student)
    names = {path[-1].key for path, _ in trained}
    assert names == {"kernel", "bias", "scale"}  # no running statistics
    moved = [
        path
        for (path, a), b in zip(trained, jax.tree.leaves(learned(teacher)), strict=True)
        if bool((a != b).any())
    ]
    assert len(moved) == len(trained)  # kernels, the head's bias, scales and biases of norms: all


@pytest.mark.slow
def test_a_step_is_a_function_of_its_state(states, step):
    s, _ = states
    again, _ = step(jax.tree.map(jnp.copy, s[4]))
    assert all(same(again, s[5]))


@pytest.mark.slow
def test_optimizers_are_torchs(dfq, states):
    """Q: SGD with weight decay, momentum 0.9, Nesterov. G: Adam, betas 0.5 and 0.999. Both rates fall at quarters."""
    s, _ = states

    def grads(s):
        k_z, k_y = jax.random.split(jax.random.fold_in(s.key, s.step))
        z = jax.random.normal(k_z, (6, 10))
        y = jax.random.randint(k_y, (6,), 0, 4)
        net = dfq.family.net

        def of_g(g):
            x = 0.3 + 0.4 * dfq.generator.apply(g, z, y)
            z_p, seen, running = net_bn_inputs(net, s.teacher, x)
            bns = bn_stat_loss(seen, running, per_sample=False, spread="var")
            return gen_loss(z_p, dfq.quantized(s, s.student, x)[0], y, bns, s.coefficients), (
                x,
                z_p,
            )

        g, (x, z_p) = jax.grad(of_g, has_aux=True)(s.generator)
        q = jax.grad(lambda q: q_loss(z_p, dfq.quantized(s, q, x)[0]))(s.student)
        return g, q

    grads = jax.jit(grads)
    m = v = buf = 0.0
    for t in range(4):
        g, q = grads(s[t])
        g, old, new = (
            np.asarray(a["conv2"]["kernel"], np.float64)
            for a in (g, s[t].generator, s[t + 1].generator)
        )
        m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g**2
        rate = 1e-3 * 0.1 ** (t // 2)
        hat = m / (1 - 0.5 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
        np.testing.assert_allclose(
            new - old, -rate * hat[0] / (np.sqrt(hat[1]) + 1e-8), atol=2e-2 * rate
        )
        if t >= 2:
            site = lambda a: np.asarray(a[1]["conv2"]["kernel"], np.float64)  # noqa: E731
            d = site(q) + 1e-4 * site(s[t].student)
            buf = 0.9 * buf + d
            step = site(s[t].student) - site(s[t + 1].student)
            ulp = float(np.finfo(np.float32).eps * np.abs(site(s[t].student)).max())
            np.testing.assert_allclose(
                step, 1e-3 * (d + 0.9 * buf), atol=1e-3 * float(np.abs(step).max()) + ulp
            )


@pytest.mark.slow
def test_an_epoch_is_its_steps(dfq, states):
    s, metrics = states
    after, mean = jax.jit(dfq.epoch, static_argnums=1)(s[2], 3)
    assert int(after.step) == 5
    for a, b in zip(jax.tree.leaves(after.student), jax.tree.leaves(s[5].student), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    expected = sum(float(m["loss"]) for m in metrics[2:5]) / 3
    assert float(mean["loss"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_real_images_train_the_student_alone(dfq, states):
    s, _ = states
    x, y = jax.random.uniform(jax.random.key(9), (6, 8, 8, 1)), jnp.array([0, 1, 2, 3, 0, 1])
    new, _ = jax.jit(dfq.step_on)(s[4], x, y)
    assert all(same(new.generator, s[4].generator))
    assert not all(same(new.student, s[4].student))


def test_bad_schedules_and_methods_are_named(dfq, teacher):
    with pytest.raises(UserError, match="range_steps=0"):
        dfq._replace(fit=FIT._replace(range_steps=0)).init(jax.random.key(0), teacher)
    with pytest.raises(UserError, match="warmup=9 of 8"):
        dfq._replace(fit=FIT._replace(warmup=9)).init(jax.random.key(0), teacher)
    other = dfq._replace(generator=generator(GeneratorSize(8, 1, 5, 10, (4, 3))))
    with pytest.raises(UserError, match="4 classes, its generator is asked for 5"):
        other.init(jax.random.key(0), teacher)
    with pytest.raises(UserError, match="method='dfq'"):
        coefficients("dfq", {})
    assert coefficients("ada_dfq", {"a_as": 0.0}).a_as == 0


# The study.


def test_arms_are_the_published_methods():
    c = get_config()
    for arm, c_published in METHODS.items():
        merged = {**c.to_dict(), **c.arms[arm].to_dict()}
        assert {k: merged[k] for k in c_published._fields} == c_published._asdict(), arm


def merged(arm, **changes):
    c = get_config("smoke")
    c.update(c.arms[arm])
    c.update(changes)
    c.arm = arm
    return c


def test_bad_configs_are_one_line():
    with pytest.raises(UserError, match="source='gaussian'"):
        build(merged("ada_dfq", source="gaussian"))
    with pytest.raises(UserError, match="ResNet-18"):
        build(merged("ada_dfq", net="imagenet_resnet18"))


@pytest.mark.slow
def test_the_study_trains_without_data_and_the_upper_bound_does_not():
    """`init` itself checks; the arm that is meant to train on real images is caught by the same check."""
    from qlab import data

    images = data.load("digits16").x_train
    for arm, clean in (("ada_dfq", True), ("real_kd", False)):
        c = get_config("smoke")
        c.update({} if clean else {"source": "real"})
        c.arm = arm
        study = build(c)
        state, step = study.init(jax.random.key(0)), study.phases[0].step
        if clean:
            assert_data_free(step, state, images)
            hidden = state._replace(cells=state.cells._replace(key=jnp.asarray(images[:2])))
            with pytest.raises(AssertionError, match=r"state\.cells\.key"):
                assert_data_free(lambda s: s.step, hidden, images)
        else:
            with pytest.raises(AssertionError, match="holds a real image"):
                assert_data_free(step, state, images)


def test_published_constants_of_the_inputs_are_those_of_the_training_images():
    from qlab import data

    x, c = data.load("digits16").x_train, get_config()
    assert c.pixel_mean[0] == pytest.approx(x.mean(), abs=5e-4)
    assert c.pixel_std[0] == pytest.approx(x.std(), abs=5e-4)
