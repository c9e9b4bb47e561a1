"""Calibration sets of a study: from the training images, from some classes, from photographs, or made without data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from qlab.quantization.bn_statistics import bn_stat_loss
from qlab.quantization.ptq_stages import Stages, site_inputs


def photo_patches(num: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """f32[num, H, W, C] in [0, 1]: patches of two photographs that scikit-learn carries, at a quarter of their size.

    Out of the domain of digits; gray, the same in all channels.
    """
    from sklearn.datasets import load_sample_images

    images: Any = load_sample_images()
    rng = np.random.RandomState(seed)
    height, width, channels = shape
    out = np.empty((num, height, width), np.float32)
    gray = []
    for image in images.images:
        a = np.asarray(image, np.float32).mean(-1) / 255.0
        a = a[: a.shape[0] // 4 * 4, : a.shape[1] // 4 * 4]
        gray.append(a.reshape(a.shape[0] // 4, 4, -1, 4).mean((1, 3)))
    for i in range(num):
        a = gray[rng.randint(len(gray))]
        y, x = rng.randint(a.shape[0] - height + 1), rng.randint(a.shape[1] - width + 1)
        out[i] = a[y : y + height, x : x + width]
    return np.repeat(out[..., None], channels, -1)


def remembered(inputs: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{site: (mean f32[C], var f32[C])} of f32[N, positions, C], as batch norms keep them."""
    return {name: (x.mean((0, 1)), x.var((0, 1))) for name, x in inputs.items()}


@partial(jax.jit, static_argnums=(0, 4, 5))
def synthetic(
    stages: Stages,
    params: Any,
    running: Mapping[str, tuple[jax.Array, jax.Array]],
    key: jax.Array,
    shape: tuple[int, ...],
    num_steps: int = 200,
) -> jax.Array:
    """f32[shape] in [0, 1]: noise driven by Adam until the net's sites see the means and variances they remember.

    The nets of this study have no batch norms; the statistics of every weight product's input on the training
    images stand in for them, and nothing else of the data is used.

    Args:
      running: see `remembered`.
    """
    optimizer = optax.adam(3e-2)

    def loss(z):
        seen = {
            name: x[:, :, None]
            for name, x in site_inputs(stages, params, jax.nn.sigmoid(z)).items()
        }
        return bn_stat_loss(seen, running, per_sample=False, spread="std")

    def body(carry, _):
        z, state = carry
        updates, state = optimizer.update(jax.grad(loss)(z), state)
        return (optax.apply_updates(z, updates), state), None

    z = jax.random.normal(key, shape)
    last: Any = jax.lax.scan(body, (z, optimizer.init(z)), None, length=num_steps)[0]
    return jax.nn.sigmoid(last[0])
