"""A small perceptron for agents on vectors: Linear, LayerNorm, SiLU, and a zero-initialised head.

The zero head makes every policy uniform and every value zero before the first update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp

LN_EPS = 1e-5


def _one_draw(key: jax.Array, shapes: Iterable[tuple[int, int]]) -> list[jax.Array]:
    """Matrices of these shapes, uniform in [-1, 1], from one draw."""
    shapes = list(shapes)
    ends = list(accumulate(a * b for a, b in shapes))
    draw = jax.random.uniform(key, (ends[-1] if ends else 0,), minval=-1.0, maxval=1.0)
    starts = [0, *ends[:-1]]
    return [draw[s:e].reshape(ab) for s, e, ab in zip(starts, ends, shapes, strict=False)]


def mlp_init(key: jax.Array, num_in: int, hidden: Sequence[int], num_out: int) -> Any:
    """Parameters of an MLP: LeCun-uniform hidden layers, zero head. hidden = () is a linear map.

    All weights come from one draw: a draw a layer would take longer to compile than to train with.
    """
    widths = (num_in, *hidden)
    layers = [
        {
            "w": w * (3 / len(w)) ** 0.5,
            "scale": jnp.ones(w.shape[1]),
            "shift": jnp.zeros(w.shape[1]),
        }
        for w in _one_draw(key, pairwise(widths))  # variance 1 / fan-in
    ]
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
    blocks = _one_draw(key, ((a + 1, b) for a, b in pairwise(widths)))
    scaled = [block * (len(block) - 1) ** -0.5 for block in blocks]
    return [{"w": block[:-1], "b": block[-1]} for block in scaled]


def dense_apply(params: Any, x: jax.Array) -> jax.Array:
    """x: f32[..., I] -> f32[..., O]: ReLU after every layer but the last.

    >>> dense_apply([{"w": jnp.eye(2), "b": jnp.zeros(2)}] * 2, jnp.array([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]
