"""Heuristic nets: encoding f32[E, m] -> f32[E, heads], one head for h(s), A heads for Q(s, .)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def _dense(key: jax.Array, fan_in: int, fan_out: int, scale: float = 2.0) -> Params:
    w = jax.random.normal(key, (fan_in, fan_out)) * jnp.sqrt(scale / fan_in)
    return {"w": w, "b": jnp.zeros(fan_out)}


def _norm(x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def net_init(
    key: jax.Array, inputs: int, heads: int, *, widths: tuple[int, ...], blocks: int = 0
) -> Params:
    """Dense layers of the given widths, `blocks` residual blocks of the last width, a linear head.

    The sizes of the paper family are widths (5000, 1000) with 4 blocks; a block is two dense layers,
    with layer normalisation where the original has batch normalisation (no running state to keep).
    """
    k_dense, k_blocks, k_head = jax.random.split(key, 3)
    sizes = (inputs, *widths)
    keys = jax.random.split(k_dense, len(widths))
    width = widths[-1]
    pairs = jax.random.split(k_blocks, (blocks, 2))
    return {
        "dense": [_dense(k, a, b) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)],
        "blocks": [[_dense(k, width, width) for k in pair] for pair in pairs],
        "head": _dense(k_head, width, heads, 1.0),
    }


def net_apply(params: Params, enc: jax.Array) -> jax.Array:
    """f32[E, heads].

    >>> net = net_init(jax.random.key(0), 9, 4, widths=(16, 8), blocks=1)
    >>> net_apply(net, jnp.zeros((2, 9))).shape
    (2, 4)
    """
    x = enc
    for layer in params["dense"]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    for first, second in params["blocks"]:
        y = jax.nn.relu(_norm(x @ first["w"] + first["b"]))
        x = jax.nn.relu(x + _norm(y @ second["w"] + second["b"]))
    return x @ params["head"]["w"] + params["head"]["b"]


# What `search` takes: jax.tree_util.Partial(h_value, params) and so on.
def h_value(params: Params, enc: jax.Array) -> jax.Array:
    """h f32[E] from a net with one head."""
    return net_apply(params, enc)[:, 0]


q_values = net_apply


def min_q(params: Params, enc: jax.Array) -> jax.Array:
    """h(s) = min over a of Q(s, a): f32[E]."""
    return net_apply(params, enc).min(-1)


def linear(params: tuple[jax.Array, jax.Array], enc: jax.Array) -> jax.Array:
    """h = weights . enc + offset: f32[E]."""
    weights, offset = params
    return enc @ weights + offset
