"""A small perceptron for agents on vectors: Linear, LayerNorm, SiLU, and a zero-initialised head.

The zero head makes every policy uniform and every value zero before the first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

LN_EPS = 1e-5


def mlp_init(key: jax.Array, num_in: int, hidden: Sequence[int], num_out: int) -> Any:
    """Parameters of an MLP: LeCun-uniform hidden layers, zero head. hidden = () is a linear map.

    All weights come from one draw: a draw a layer would take longer to compile than to train with.
    """
    widths = (num_in, *hidden)
    sizes = [a * b for a, b in pairwise(widths)]
    draw = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    layers, start = [], 0
    for (a, b), size in zip(pairwise(widths), sizes, strict=True):
        w = draw[start : start + size].reshape(a, b) * (3 / a) ** 0.5  # variance 1 / a
        layers.append({"w": w, "scale": jnp.ones(b), "shift": jnp.zeros(b)})
        start += size
    return {"layers": layers, "w": jnp.zeros((widths[-1], num_out)), "b": jnp.zeros(num_out)}


def mlp_apply(params: Any, x: jax.Array) -> jax.Array:
    """x: f32[..., I] -> f32[..., O].

    >>> p = mlp_init(jax.random.key(0), 3, (8, 8), 2)
    >>> mlp_apply(p, jnp.ones((4, 3))).tolist()[0]
    [0.0, 0.0]
    """
    for layer in params["layers"]:
        x = x @ layer["w"]
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + LN_EPS)
        x = jax.nn.silu(x * layer["scale"] + layer["shift"])
    return x @ params["w"] + params["b"]


def dense_init(key: jax.Array, num_in: int, hidden: Sequence[int], num_out: int) -> Any:
    """Parameters of a plain ReLU perceptron: fan-in uniform weights and biases, as SAC's nets have.

    Each entry is uniform in +-1/sqrt(fan_in); all come from one draw.
    """
    widths = (num_in, *hidden, num_out)
    sizes = [(a + 1) * b for a, b in pairwise(widths)]
    draw = jax.random.uniform(key, (sum(sizes),), minval=-1.0, maxval=1.0)
    layers, start = [], 0
    for (a, b), size in zip(pairwise(widths), sizes, strict=True):
        block = draw[start : start + size].reshape(a + 1, b) * a**-0.5
        layers.append({"w": block[:a], "b": block[a]})
        start += size
    return layers


def dense_apply(params: Any, x: jax.Array) -> jax.Array:
    """x: f32[..., I] -> f32[..., O]: ReLU after every layer but the last.

    >>> dense_apply([{"w": jnp.eye(2), "b": jnp.zeros(2)}] * 2, jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]
