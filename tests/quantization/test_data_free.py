"""Images of batch norms, and the check that training sees no real one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.nn.resnet import ResNetSize, resnet
from qlab.quantization.bn_statistics import bn_stat_loss, net_bn_inputs
from qlab.quantization.data_free import assert_data_free, zeroq_images
from qlab.quantization.observers import calibrate, minmax

IMAGES = np.random.default_rng(1).random((20, 4, 4, 1)).astype(np.float32)


def clean(state):
    return {**state, "w": state["w"] + jnp.ones((4, 16)) @ jnp.ones((16, 3))}


STATE = {"key": jax.random.key(0), "w": jnp.zeros((4, 3)), "step": jnp.int32(0)}


def test_a_clean_step_passes():
    assert_data_free(clean, STATE, IMAGES)
    assert_data_free(jax.jit(clean), STATE, IMAGES)


def test_an_image_in_the_state_is_found():
    hidden = {**STATE, "buffer": jnp.zeros((3, 4, 4, 1)).at[1].set(IMAGES[7])}
    with pytest.raises(AssertionError, match=r"state\['buffer'\]"):
        assert_data_free(clean, hidden, IMAGES)


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.jit, lambda f: lambda s: jax.lax.fori_loop(0, 2, lambda i, s: f(s), s)],
    ids=["plain", "jit", "loop"],
)
@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (2, 16)], ids=["images", "rows"])
def test_an_image_in_a_constant_is_found(wrap, shape):
    held = jnp.asarray(IMAGES[3:5]).reshape(shape)

    def step(state):
        return {**state, "w": state["w"] + held[state["step"]].sum()}

    with pytest.raises(AssertionError, match="real image"):
        assert_data_free(wrap(step), STATE, IMAGES)


def test_an_image_behind_a_callback_is_found():
    def step(state):
        shape = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)
        x = jax.pure_callback(lambda i: IMAGES[int(i)], shape, state["step"])
        return {**state, "w": state["w"] + x.sum()}

    with pytest.raises(AssertionError, match="calls the host"):
        assert_data_free(step, STATE, IMAGES)


@pytest.fixture(scope="module")
def family():
    return resnet(ResNetSize(widths=(3,), classes=4))


@pytest.fixture(scope="module")
def params(family):
    """Running statistics of inputs of mean 0.3 and deviation 0.4."""
    params = family.init(jax.random.key(0))
    x = 0.3 + 0.4 * jax.random.normal(jax.random.key(5), (64, 8, 8, 1))
    for _ in range(3):
        params = family.keep(params, jax.jit(lambda p: family.learn(p, x, 0.0)[1])(params))
    return params


@pytest.mark.slow
@pytest.mark.parametrize("per_sample", [False, True])
def test_zeroq_images_have_the_statistics(family, params, per_sample):
    def distance(x):
        _, seen, running = net_bn_inputs(family.net, params, x)
        return float(bn_stat_loss(seen, running, per_sample=per_sample, spread="std"))

    made = zeroq_images(
        family.net, params, jax.random.key(1), 16, (8, 8, 1), mean=0.3, std=0.4,
        num_steps=150, per_sample=per_sample,
    )  # fmt: skip
    noise = 0.3 + 0.4 * jax.random.uniform(jax.random.key(1), made.shape)  # of another mean
    assert made.shape == (16, 8, 8, 1)
    assert distance(made) < 0.1 * distance(noise)
    assert float(made.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(made.std()) == pytest.approx(0.4, abs=0.05)


@pytest.mark.slow
def test_zeroq_images_calibrate_any_observer(family, params):
    made = zeroq_images(family.net, params, jax.random.key(1), 16, (8, 8, 1), num_steps=5)
    found = calibrate(family.net, params, [made[:8], made[8:]], {"out": minmax()})
    assert float(found["stem/out"][1]) > 0
