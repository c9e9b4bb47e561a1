"""The generator against a forward pass in NumPy, its convolutions against XLA's, its ways to use labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.nn.generator import GeneratorSize, generator
from qlab.nn.taps import conv

SIZE = GeneratorSize(side=8, channels=2, classes=3, latent=5, widths=(4, 3))


def lax_conv(x, kernel, stride=1):
    kernel = kernel.reshape(3, 3, x.shape[-1], -1)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(("side", "num_in", "out"), [(2, 1, 1), (4, 3, 5), (6, 4, 2)])
def test_convolutions_are_xlas(side, num_in, out, rng):
    x = jnp.asarray(rng.standard_normal((2, side, side + 2, num_in)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((9 * num_in, out)), jnp.float32)
    doubled = x.repeat(2, 1).repeat(2, 2)
    for kind, expected in (
        ("same", lax_conv(x, kernel)),
        ("nearest", lax_conv(doubled, kernel)),
        ("down", lax_conv(x, kernel, 2)),
    ):
        np.testing.assert_allclose(conv(x, kernel, kind), expected, atol=1e-4, err_msg=kind)


def forward64(p, z, y):
    """The published net in float64, label product, norms with eps 1e-5, 0.8, 0.8, 1e-5."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def norm(x, eps, n=None):
        m, v = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - m) / np.sqrt(v + eps)
        return x if n is None else x * n["scale"][0] + n["bias"][0]

    def conv64(x, layer):
        k = layer["kernel"].reshape(3, 3, x.shape[-1], -1)
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = x.shape[1:3]
        taps = [padded[:, i : i + h, j : j + w] @ k[i, j] for i in range(3) for j in range(3)]
        return sum(taps) + layer["bias"]

    z = np.asarray(z, np.float64) * p["embedding"][y]
    x = (z @ p["dense"]["kernel"] + p["dense"]["bias"]).reshape(len(z), 2, 2, -1)
    x = norm(x, 1e-5, p["norm0"])
    for i in ("1", "2"):
        x = conv64(x.repeat(2, 1).repeat(2, 2), p["conv" + i])
        x = norm(x, 0.8, p["norm" + i])
        x = np.where(x > 0, x, 0.2 * x)
    return norm(np.tanh(conv64(x, p["conv3"])), 1e-5)


def test_apply_is_the_published_net(rng):
    g = generator(SIZE)
    shapes = jax.eval_shape(g.init, jax.random.key(0))
    params = jax.tree.map(lambda a: 0.5 * rng.standard_normal(a.shape).astype(np.float32), shapes)
    z, y = rng.standard_normal((6, 5)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])
    images = jax.jit(g.apply)(params, z, y)
    assert images.shape == (6, 8, 8, 2)
    np.testing.assert_allclose(images, forward64(params, z, y), atol=2e-4)
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=1e-2)  # eps on a small variance


@pytest.mark.slow
def test_initial_values_lie_within_torchs_bounds():
    p = generator(GeneratorSize(widths=(8, 4))).init(jax.random.key(1))
    for name, fan_in in (("dense", 100), ("conv1", 72), ("conv2", 72), ("conv3", 36)):
        most = float(jnp.abs(p[name]["kernel"]).max()) * fan_in**0.5
        assert 0.9 < most <= 1.0, name
    assert 0.9 < float(p["embedding"].std()) < 1.1


def test_labels_by_norms_reach_the_images(rng):
    g = generator(SIZE._replace(labels="norms"))
    shapes = jax.eval_shape(g.init, jax.random.key(0))
    params = jax.tree.map(lambda a: 0.5 * rng.standard_normal(a.shape).astype(np.float32), shapes)
    for norm in ("norm0", "norm1", "norm2"):  # as after init
        params[norm] = {
            "scale": jnp.ones_like(params[norm]["scale"]),
            "bias": 0 * params[norm]["bias"],
        }
    assert params["norm1"]["scale"].shape == (3, 4)
    assert "embedding" not in params
    z = jnp.asarray(rng.standard_normal((4, 5)), jnp.float32)
    y = jnp.array([0, 0, 1, 1])
    apply = jax.jit(g.apply)
    same = apply(params, z, y)  # scales start at 1, biases at 0: labels do nothing yet
    np.testing.assert_array_equal(same, apply(params, z, 1 - y))
    params["norm2"]["bias"] = jnp.asarray(params["norm2"]["bias"]).at[1].add(1.0)
    assert float(jnp.abs(apply(params, z, y) - apply(params, z, 1 - y)).max()) > 0.1


def test_bad_sizes_are_named():
    with pytest.raises(UserError, match="side 10"):
        generator(GeneratorSize(side=10))
    with pytest.raises(UserError, match="labels='both'"):
        generator(GeneratorSize(labels="both"))
