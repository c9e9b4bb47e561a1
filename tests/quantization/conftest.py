"""Nets with sites for several files."""

import jax
import numpy as np
import pytest

from qlab.nn.vit import ViTSize, vit


@pytest.fixture(scope="module")
def net():
    return vit(ViTSize(dim=16, depth=2, heads=2, hidden=32))


@pytest.fixture(scope="module")
def params(net):
    """Of a size as after training, LayerNorms not 1 and 0; drawn here because net.init takes seconds to compile."""
    rng = np.random.default_rng(7)

    def draw(path, shape):
        name, noise = path[-1].key, rng.standard_normal(shape.shape)
        if name == "kernel":
            noise = noise / np.sqrt(shape.shape[-2])
        elif name == "scale":
            noise = 1 + 0.1 * noise
        else:
            noise = 0.1 * noise
        return jax.numpy.asarray(noise, shape.dtype)

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def draw_resnet():
    """family -> params of a net with batch norms, drawn in NumPy, as family.init takes seconds to compile."""

    def drawn(family):
        rng = np.random.default_rng(4)

        def draw(path, a):
            noise = rng.standard_normal(a.shape).astype(np.float32)
            name = path[-1].key
            if name == "kernel":
                return jax.numpy.asarray(noise / a.shape[-2] ** 0.5)
            return jax.numpy.asarray(0.1 * noise + (name in ("scale", "var")))

        shapes = jax.eval_shape(family.init, jax.random.key(0))
        return jax.tree_util.tree_map_with_path(draw, shapes)

    return drawn
