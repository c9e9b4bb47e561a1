"""A small perceptron for agents on vectors: Linear, LayerNorm, SiLU, and a zero-initialised head.

The zero head makes every policy uniform and every value zero before the first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LN_EPS = 1e-5


def mlp_init(key: jax.Array, num_in: int, hidden: Sequence[int], num_out: int) -> Any:
    """Parameters of an MLP: LeCun-normal hidden layers, zero head. hidden = () is a linear map."""
    layers = []
    for width in hidden:
        key, k = jax.random.split(key)
        w = jax.random.normal(k, (num_in, width)) / jnp.sqrt(num_in)
        layers.append({"w": w, "scale": jnp.ones(width), "shift": jnp.zeros(width)})
        num_in = width
    return {"layers": layers, "w": jnp.zeros((num_in, num_out)), "b": jnp.zeros(num_out)}


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
